"""The method in one call.

Apart from `tlora.adapter`, which every run loads and which must not depend on how ranks are
allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tlora.adapter import build_adapter
from tlora.allocation import allocate
from tlora.modules import ALL_LINEAR, module_shapes, read_samples

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def get_tlora_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    r: int = 32,
    lora_alpha: float | None = None,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    *,
    calibration_samples: int | None = None,
    variant: str = "paper",
    algorithm: str = "sketch",
    center: bool | None = None,
    freeze_a: bool | None = None,
    seed: int = 0,
    passes: int = 1,
    tolerance: float = 1e-4,
) -> PeftModel:
    """Return the model with a TLoRA adapter, ready for any trainer that takes PEFT models.

    Sensitivity, allocation, subspaces and adapter in one call; its outputs equal the base
    model's until B is trained.

    Parameters
    ----------
    model
        A causal or encoder-decoder model whose targets are `nn.Linear` or `Conv1D`.
    batches
        Calibration samples: dicts of `input_ids`, `attention_mask`, `labels`, each (samples,
        tokens). Read once and kept, so that every pass sees the same samples.
    r, lora_alpha
        Mean rank and alpha, as for LoRA; alpha is r where not given.
    target_modules
        "all-linear", a regular expression, or a list of names, as in PEFT.
    calibration_samples
        How many samples to read at most (the paper has 32); None reads all.
    variant
        "paper" or "released": how ranks and scalings are allocated.
    algorithm, seed, passes, tolerance
        As in `input_subspaces`.
    center, freeze_a
        None follows the variant: "paper" does not center and freezes A, "released" the reverse.

    Raises
    ------
    UserError
        As `sensitivity`, `allocate` and `input_subspaces`.
    """
    from tlora.sensitivity import sensitivity
    from tlora.subspace import input_subspaces, sketching

    released = variant == "released"
    samples = read_samples(batches, calibration_samples)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    shapes = module_shapes(model, targets)
    center = released if center is None else center
    # The passes of the sensitivity are the first run of the sketch, too.
    shared = algorithm == "sketch" and isinstance(r, int) and r > 0
    with sketching(model, targets, r, center, seed) if shared else nullcontext() as start:
        scores = sensitivity(model, samples, targets)
    allocation = allocate(scores, r, r if lora_alpha is None else lora_alpha, shapes, variant)
    subspaces = input_subspaces(
        model,
        samples,
        allocation.ranks,
        algorithm=algorithm,
        center=center,
        seed=seed,
        passes=passes,
        start=start,
        tolerance=tolerance,
    )
    return build_adapter(
        model, allocation, subspaces, freeze_a=not released if freeze_a is None else freeze_a
    )
