"""Which samples a statistic or an initialisation reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.base_model import load_tokenizer, padding_id
from tlora.tasks.tokenised import calibration_batches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def calibration_sample(
    spec: dict, prepared: Path, model: PreTrainedModel, place: dict[str, Any]
) -> list[dict[str, torch.Tensor]]:
    """Return the calibration samples of a spec, one a batch, on the model's device."""
    pad = padding_id(load_tokenizer(place))
    path = prepared.parent / "train.parquet"
    return list(calibration_batches(path, spec["samples"], spec["seed"], pad, model.device))
