"""Tokenised samples on disk: parquet with id, input_ids and labels; and batches of them.

A global batch is what one optimizer step sees; a micro batch is the part of it that goes through
the model at once, padded to its longest sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import staged
from tlora.tasks.prompts import IGNORED

if TYPE_CHECKING:
    import numpy as np
    import torch

PASS_TOKENS = 256
"""What one more pass through the model costs, in tokens: about as many as a GPU needs for its
arithmetic to take as long as reading the weights (rate over bandwidth: 156 on an A100, 206 on an
H200), and some for starting the kernels."""

LOOKED_AT = 32
"""Global batches that the number of passes is chosen from."""


def write(path: Path, samples: list[dict[str, Any]]) -> None:
    """Write samples ({"id", "input_ids", "labels"}) as parquet, atomically."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("input_ids", pyarrow.list_(pyarrow.int32())),
            ("labels", pyarrow.list_(pyarrow.int32())),
        ]
    )
    with staged(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(samples, schema=schema), temporary)


def read(path: Path) -> list[dict[str, Any]]:
    """Read samples as `write` wrote them."""
    from pyarrow import parquet

    # parquet.read_table would load pandas: 0.4 s and 400 modules for nothing.
    with parquet.ParquetFile(path) as file:
        return file.read().to_pylist()


def collate(samples: list[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad samples on the right.

    Parameters
    ----------
    samples
        "input_ids" and "labels" as lists of int; their lengths may differ (encoder-decoder).
    pad_token_id
        Fills the inputs; the attention mask is 0 there, and labels are filled with -100.

    Returns
    -------
    dict of torch.int64 tensors of shape (samples, longest)
        input_ids, attention_mask and labels.
    """
    import torch

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

    inputs = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad(inputs, pad_token_id),
        "attention_mask": pad([[1] * len(row) for row in inputs], 0),
        "labels": pad([sample["labels"] for sample in samples], IGNORED),
    }


def calibration_batches(
    path: Path, count: int, seed: int, pad_token_id: int, device: Any, batch_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `count` samples drawn without replacement by `seed`, in the order drawn.

    Fewer come where the file holds fewer.
    """
    samples = read(path)
    chosen = random.Random(seed).sample(range(len(samples)), min(count, len(samples)))
    for start in range(0, len(chosen), batch_size):
        batch = [samples[index] for index in chosen[start : start + batch_size]]
        yield {name: value.to(device) for name, value in collate(batch, pad_token_id).items()}


def passes_that_pay(
    batches: Sequence[Sequence[dict[str, Any]]], passes: int, devices: int = 1
) -> int:
    """Return how many passes an optimizer step should be cut into: the given number or up to twice.

    More passes are padded less, and each costs what `PASS_TOKENS` do.

    Parameters
    ----------
    batches
        Global batches; the first `LOOKED_AT` are looked at.
    passes
        Passes of each process that memory asks for; `devices` of them make a global batch at least.
    devices
        Processes.
    """
    most = min(2 * passes, len(batches[0]) // devices)
    total = dict.fromkeys(range(passes, max(passes, most) + 1), 0.0)
    for batch in batches[:LOOKED_AT]:
        tokens = _padded_tokens(_longest_first(batch))
        choices = _choices(tokens, max(total) * devices, _limit(tokens, passes * devices))
        for count in total:
            ends = _ends(choices, count * devices, len(batch))
            total[count] += sum(tokens[i, j] for i, j in zip([0, *ends], ends, strict=False))
            total[count] += count * devices * PASS_TOKENS
    return min(total, key=total.__getitem__)


def micro_batches(
    batch: Sequence[dict[str, Any]], count: int, least: int | None = None
) -> list[list[dict[str, Any]]]:
    """Cut a global batch into micro batches of samples of like length, the longest first.

    Little is padded then, and all take about as long: the sum of the squares of their padded tokens
    is as small as it can be. None has more tokens than micro batches of equally many samples could
    have had. Source: the usual recurrence for cutting a sorted sequence into `count` parts.

    Parameters
    ----------
    batch
        Samples of one optimizer step, in any order.
    count
        Micro batches to make, at most as many as there are samples.
    least
        Micro batches that memory asks for, at most `count`; default: `count`.

    Returns
    -------
    list of lists of samples
        `count` of them, none empty; equal batches are cut equally.
    """
    samples = _longest_first(batch)
    tokens = _padded_tokens(samples)
    choices = _choices(tokens, count, _limit(tokens, least or count))
    ends = _ends(choices, count, len(samples))
    return [samples[i:j] for i, j in zip([0, *ends], ends, strict=False)]


def _longest_first(batch: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(batch, key=lambda s: len(s["input_ids"]) + len(s["labels"]), reverse=True)


def _padded_tokens(samples: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the tokens of samples i to j - 1 in one micro batch, (n + 1, n + 1); inf for none.

    Inputs and labels count half each: an encoder-decoder pads them apart.
    """
    import numpy as np

    lengths = np.array([(len(s["input_ids"]), len(s["labels"])) for s in samples])
    count = len(samples)
    tokens = np.full((count + 1, count + 1), np.inf)
    for i in range(count):
        longest = np.maximum.accumulate(lengths[i:]).sum(axis=1) / 2
        tokens[i, i + 1 :] = longest * np.arange(1, count - i + 1)
    return tokens


def _limit(tokens: np.ndarray, count: int) -> float:
    """Return the tokens of the largest of `count` micro batches of equally many samples."""
    samples = len(tokens) - 1
    size = -(-samples // count)
    return max(float(tokens[i, min(i + size, samples)]) for i in range(0, samples, size))


def _choices(tokens: np.ndarray, most: int, limit: float) -> list[np.ndarray]:
    """Return, for 2 to `most` micro batches and every end of the last, where it best begins."""
    import numpy as np

    cost = np.where(tokens <= limit, tokens**2, np.inf)
    best, choices = cost[0], []
    for _ in range(most - 1):
        sums = best[:, None] + cost
        choices.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    return choices


def _ends(choices: list[np.ndarray], count: int, samples: int) -> list[int]:
    """Return where `count` micro batches end."""
    ends = [samples]
    for choice in reversed(choices[: count - 1]):
        ends.append(int(choice[ends[-1]]))
    return ends[::-1]
