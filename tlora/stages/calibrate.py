"""Statistics of the base model over calibration samples: made once, shared by all who read them."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import sha256_file, staged, write_json
from tlora.base_model import load_model, peak_memory_bytes
from tlora.calibration import calibration_sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def calibrate(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write calibration.safetensors and calibration.json.

    Statistics: "sensitivity" (one float64 number a module) and "covariance" (X^T X / samples,
    float32, (in, in); modules that share an input share one matrix by `alias`).
    """
    from safetensors.torch import save_file

    started = time.perf_counter()
    model = load_model(spec["model"], place)
    batches = calibration_sample(spec, inputs["prepare"], model, place)
    compute = {"sensitivity": _sensitivity, "covariance": _covariance}[spec["statistic"]]
    tensors, alias = compute(model, batches, spec)
    with staged(out / "calibration.safetensors") as temporary:
        save_file(tensors, temporary)
    card = {
        "statistic": spec["statistic"],
        "samples": len(batches),
        "alias": alias,
        "shapes": {name: list(weight) for name, weight in target_shapes(model, spec).items()},
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "files": {"calibration.safetensors": sha256_file(out / "calibration.safetensors")},
    }
    logger.info("calibrated %s in %.1f s", spec["statistic"], card["seconds"])
    write_json(out / "calibration.json", card)


def target_shapes(model: PreTrainedModel, spec: dict) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of every targeted module."""
    from tlora.modules import module_shapes

    return module_shapes(model, spec["target_modules"])


def _sensitivity(model: PreTrainedModel, batches: list, spec: dict) -> tuple[dict, dict]:
    import torch

    from tlora.sensitivity import sensitivity

    values = sensitivity(model, batches, spec["target_modules"])
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}, {}


def _covariance(model: PreTrainedModel, batches: list, spec: dict) -> tuple[dict, dict]:
    from tlora.subspace import covariances

    return covariances(model, batches, spec["target_modules"], **spec["options"])
