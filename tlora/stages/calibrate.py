"""Statistics of the base model over calibration samples: made once, shared by all who read them."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import sha256_file, staged, write_json
from tlora.base_model import load_model, peak_memory_bytes
from tlora.calibration import calibration_sample
from tlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def calibrate(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write calibration.safetensors and calibration.json.

    Statistics: "sensitivity" (one float64 number a module), "covariance" (X^T X / samples,
    float32, (in, in); modules that share an input share one matrix by `alias`; "normalize" divides
    each sample's X by its largest entry before) and "gradient" (the mean over samples of the loss's
    gradient, float32, in the weight's own layout).
    """
    from safetensors.torch import save_file

    started = time.perf_counter()
    model = load_model(spec["model"], place)
    batches = calibration_sample(spec, inputs["prepare"], model, place)
    statistics = {"sensitivity": _sensitivity, "covariance": _covariance, "gradient": _gradient}
    compute = statistics[spec["statistic"]]
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

    if spec["options"].get("normalize"):
        return _normalized_covariance(model, batches, spec)
    return covariances(model, batches, spec["target_modules"], **spec["options"])


def _normalized_covariance(model: PreTrainedModel, batches: list, spec: dict) -> tuple[dict, dict]:
    """Return PEFT's covariances for CorDA: every sample's X divided by its largest entry."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import calib_cov_distribution

    from tlora.modules import find_targets, model_inputs, read_samples
    from tlora.progress import bar

    targets = find_targets(model, spec["target_modules"])
    config = LoraConfig(target_modules=list(targets), corda_config=CordaConfig())

    def run() -> None:
        for sample in bar(read_samples(batches), desc="covariance", unit="sample"):
            model(**model_inputs(model, sample))

    calib_cov_distribution(model, config, run, None, None)
    tensors: dict[str, torch.Tensor] = {}
    alias: dict[str, str] = {}
    latest = ""
    for name, module in targets.items():
        matrix = module.covariance_matrix
        if not isinstance(matrix, torch.Tensor):
            raise UserError(f"{name}: gets no input: remove it from target_modules")
        # Neighbours mostly share their input.
        if not latest or not torch.equal(matrix, tensors[latest]):
            latest, tensors[name] = name, matrix
        alias[name] = latest
        del module.covariance_matrix, module.sample_count
    return tensors, alias


def _gradient(model: PreTrainedModel, batches: list, spec: dict) -> tuple[dict, dict]:
    """Return mean gradients, summed outside the model's device, one weight at a time."""
    import torch

    from tlora.modules import calibrating, find_targets, model_inputs, read_samples
    from tlora.progress import bar

    targets = find_targets(model, spec["target_modules"])
    owners: dict[int, str] = {}
    alias = {name: owners.setdefault(id(m.weight), name) for name, m in targets.items()}
    sums: dict[str, torch.Tensor] = {}

    def consume(weight: torch.Tensor) -> None:
        name, gradient = owners[id(weight)], weight.grad.float().cpu()
        sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()
        weight.grad = None

    weights = {id(module.weight): module.weight for module in targets.values()}
    samples = read_samples(batches)
    with calibrating(model, weights.values()):
        handles = [
            weight.register_post_accumulate_grad_hook(consume) for weight in weights.values()
        ]
        try:
            for sample in bar(samples, desc="gradient", unit="sample"):
                model(**model_inputs(model, sample, loss=True)).loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    for name, owner in alias.items():
        if owner not in sums:
            raise UserError(f"{name}: takes no part in the loss: remove it from target_modules")
        if not sums[owner].isfinite().all():
            raise UserError(f"{name}: gradient is NaN or infinite on the calibration samples")
    return {name: (total / len(samples)).contiguous() for name, total in sums.items()}, alias
