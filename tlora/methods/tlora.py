"""TLoRA (arXiv 2604.18124): A from the top right singular vectors of W C, frozen; B trained.

Ranks and scalings follow the sensitivity mean|W * grad W|. The method itself lives in
`tlora.sensitivity`, `tlora.allocation`, `tlora.subspace` and `tlora.adapter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Context

INITIALIZES = True


@dataclass(frozen=True)
class Options:
    """Options of TLoRA.

    variant
        "paper" (Eqs. 6 and 7) or "released" (the authors' code).
    allocate_rank, allocate_scaling
        False keeps the rank, or the scaling, the same for all modules (the paper's ablations).
    algorithm
        "sketch" streams the samples; "exact" reads the covariance, which other methods may share.
    center
        Whether the samples' mean is taken off before the covariance (the authors' code does).
    freeze_a
        Whether only B is trained.
    """

    variant: Literal["paper", "released"] = "paper"
    allocate_rank: bool = True
    allocate_scaling: bool = True
    algorithm: Literal["sketch", "exact"] = "sketch"
    center: bool = False
    freeze_a: bool = True


def statistics(options: Options) -> dict[str, dict]:
    """The sensitivity always, the covariance where it is read."""
    wanted: dict[str, dict] = {"sensitivity": {}}
    if options.algorithm == "exact":
        wanted["covariance"] = {"center": options.center}
    return wanted


def allocation(options: Options) -> dict:
    """Options of the allocation."""
    return {
        "variant": options.variant,
        "rank": options.allocate_rank,
        "scale": options.allocate_scaling,
    }


def reads_batches(options: Options) -> bool:
    """The sketch runs the model itself."""
    return options.algorithm == "sketch"


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Compute the subspaces and put the adapter on the model."""
    from tlora.adapter import build_adapter
    from tlora.allocation import Allocation
    from tlora.artefact import read_json
    from tlora.subspace import input_subspaces, subspaces_from_file

    allocated = Allocation.from_json(read_json(context.allocation))
    ranks = {name: module.rank for name, module in allocated.items() if module.rank > 0}
    if options.algorithm == "exact":
        subspaces = subspaces_from_file(model, context.statistics["covariance"], ranks)
    else:
        subspaces = input_subspaces(
            model, context.batches(), ranks, center=options.center, seed=context.seed
        )
    return build_adapter(model, allocated, subspaces, freeze_a=options.freeze_a)
