"""Tokenised samples on disk: parquet with id, input_ids and labels; and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import staged
from tlora.tasks.prompts import IGNORED

if TYPE_CHECKING:
    import torch


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

    return parquet.read_table(path).to_pylist()


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
