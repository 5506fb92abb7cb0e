"""The loss of given answers under a model, where no rule can judge answers of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlora.tasks.prompts import IGNORED
from tlora.tasks.tokenised import collate, read

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["losses", "read"]

ROWS = 8
"""Samples of a forward pass."""


def losses(
    model: PreTrainedModel, samples: Sequence[dict[str, Any]], pad_token_id: int
) -> list[dict[str, Any]]:
    """Return one line of generations.jsonl a sample, in their order.

    Parameters
    ----------
    model
        Causal or encoder-decoder, in evaluation mode.
    samples
        As `tlora.tasks.tokenised.read` returns them.
    pad_token_id
        Fills shorter samples; changes nothing.

    Returns
    -------
    list of dict
        `id`, `completion` ("" : nothing is generated), `reference` (None), `loss`: minus the
        natural logarithm of the answer's probability, summed over its `tokens`.
        None where that is no finite number.
    """
    import torch

    # Long ones first: what does not fit the memory fails at once.
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index]["input_ids"]))
    rows: list[dict[str, Any]] = [{}] * len(samples)
    with torch.inference_mode():
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            batch = collate([samples[index] for index in chosen], pad_token_id)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            sums, counts = _sums(model, batch)
            for index, loss, count in zip(chosen, sums.tolist(), counts.tolist(), strict=True):
                rows[index] = {
                    "id": samples[index]["id"],
                    "completion": "",
                    "reference": None,
                    "loss": loss if math.isfinite(loss) else None,
                    "tokens": count,
                }
    return rows


def _sums(
    model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and number of labelled tokens, of shape (samples,)."""
    import torch

    labels = batch["labels"]
    logits = model(**batch).logits
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )
    return each.double().sum(1), (labels != IGNORED).sum(1)
