"""TLoRA (arXiv 2604.18124): A from the top right singular vectors of W C, frozen; B trained.

Ranks and scalings follow the sensitivity mean|W * grad W|. The method itself lives in
`tlora.sensitivity`, `tlora.allocation`, `tlora.subspace` and `tlora.adapter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
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
    init
        What A starts from: "wc", top right singular vectors of W C (the method); "w", those of W;
        "random", drawn as LoRA's by the run's seed.
    """

    variant: Literal["paper", "released"] = "paper"
    allocate_rank: bool = True
    allocate_scaling: bool = True
    algorithm: Literal["sketch", "exact"] = "sketch"
    center: bool = False
    freeze_a: bool = True
    init: Literal["wc", "w", "random"] = "wc"


def statistics(options: Options) -> dict[str, dict]:
    """The sensitivity always, the covariance where it is read."""
    wanted: dict[str, dict] = {"sensitivity": {}}
    if options.init == "wc" and options.algorithm == "exact":
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
    return options.init == "wc" and options.algorithm == "sketch"


def sketches(options: Options) -> bool:
    """Whether products take the place of decompositions (`tlora plan` counts them)."""
    return reads_batches(options)


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Compute the subspaces and put the adapter on the model."""
    from tlora.adapter import build_adapter
    from tlora.allocation import Allocation
    from tlora.artefact import read_json
    from tlora.subspace import input_subspaces, subspaces_from_file

    allocated = Allocation.from_json(read_json(context.allocation))
    ranks = {name: module.rank for name, module in allocated.items() if module.rank > 0}
    if options.init != "wc":
        subspaces = _weight_subspaces(model, ranks, options.init == "random")
    elif options.algorithm == "exact":
        subspaces = subspaces_from_file(model, context.statistics["covariance"], ranks)
    else:
        subspaces = input_subspaces(
            model, context.batches(), ranks, center=options.center, seed=context.seed
        )
    return build_adapter(model, allocated, subspaces, freeze_a=options.freeze_a)


def skeleton(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put an adapter of the allocated ranks on the model, of the same rank where none are given."""
    from tlora.adapter import freeze_a
    from tlora.methods import plain_lora

    adapted = plain_lora(model, context)
    return freeze_a(adapted) if options.freeze_a else adapted


def _weight_subspaces(
    model: PreTrainedModel, ranks: dict[str, int], random: bool
) -> dict[str, Tensor]:
    """Return A of the initialisations that read no data, (rank, in_features) each."""
    import torch

    from tlora.modules import find_layers, weight_matrix
    from tlora.subspace import subspace_from_covariance

    found = {}
    for name, layer in find_layers(model, ranks).items():
        weight = weight_matrix(layer)
        if random:
            found[name] = _random(torch.empty(ranks[name], weight.shape[1]))
        else:
            identity = torch.eye(weight.shape[1], device=weight.device)
            found[name] = subspace_from_covariance(weight, identity, ranks[name])
    return found


def _random(a: Tensor) -> Tensor:
    """Draw A in place as PEFT's LoRA does."""
    import math

    import torch

    return torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))


def trainer(model: PeftModel, options: Options, context: dict[str, Any]) -> dict[str, Any]:
    """Draw a random A anew by the run's seed: the saved one is the same for all seeds.

    B is 0, so that nothing else depends on it.
    """
    if options.init == "random":
        import torch
        from peft.tuners.lora import LoraLayer

        torch.manual_seed(context["seed"])
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _random(layer.lora_A["default"].weight.data)
    return {}
