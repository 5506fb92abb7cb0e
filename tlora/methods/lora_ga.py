"""LoRA-GA (Wang et al., arXiv 2407.05000): A and B from the singular vectors of the gradient.

With the mean gradient G = U S V^T of the loss by W, A0 = f V_[1:r]^T and B0 = f U_[r+1:2r],
f = d_out^(1/4) / sqrt(gamma). The decomposition and the adapter are PEFT's own
(`init_lora_weights="lora_ga"`), from a gradient that is calibrated once.

PEFT 0.21 scales otherwise than paper and authors' code: it multiplies B0 by S as well and leaves
A0 without f. `formula` chooses; "paper" sets the length of PEFT's vectors to f.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tlora.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Base, Context

INITIALIZES = True


@dataclass(frozen=True)
class Options:
    """Options of LoRA-GA.

    formula
        "paper", or "peft" for PEFT's own scaling.
    stable_gamma
        gamma; the smaller, the larger A0 and B0.
    use_rslora
        Scaling alpha / sqrt(r).
    """

    formula: Literal["paper", "peft"] = "paper"
    stable_gamma: int = 16
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.stable_gamma <= 0:
            raise ValueError(f"stable_gamma: {self.stable_gamma}: expected a number above 0")


def statistics(options: Options) -> dict[str, dict]:
    """The mean gradient of every target weight."""
    return {"gradient": {}}


def unfit(options: Options, base: Base) -> str | None:
    """A and B take 2 r singular vectors of every gradient."""
    for name, shape in base.targets.items():
        if 2 * base.rank > min(shape):
            return (
                f"{name}: rank {base.rank}: expected at most {min(shape) // 2}, half its "
                "smaller side"
            )
    return None


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's LoRA-GA adapter on the model and scale it.

    Raises
    ------
    UserError
        No gradient of a target.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraGAConfig, LoraLayer
    from safetensors import safe_open

    from tlora.artefact import read_json
    from tlora.modules import find_targets

    paper = options.formula == "paper"
    path = context.statistics["gradient"]
    alias = read_json(path)["alias"]
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
        stored = set(file.keys())
        for name, module in find_targets(model, context.target_modules).items():
            owner = alias.get(name, name)
            if owner not in stored:
                raise UserError(f"{path}: {name}: no gradient of this module")
            module._peft_loraga_grad = file.get_tensor(owner).to(module.weight.device)
    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        use_rslora=options.use_rslora,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(
            direction="ArB2r",
            scale="unit" if paper else "stable",
            stable_gamma=options.stable_gamma,
        ),
    )
    adapted = get_peft_model(model, config)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for layer in layers if paper else ():
            weight = layer.get_base_layer().weight
            whole = weight.float() + layer.get_delta_weight("default").float()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            length = b.shape[0] ** 0.25 / options.stable_gamma**0.5
            # A singular value of 0 leaves a column of B without direction: it stays 0.
            tiny = torch.finfo(torch.float32).tiny
            a.mul_(length / a.norm(dim=1, keepdim=True).clamp_min(tiny))
            b.mul_(length / b.norm(dim=0, keepdim=True).clamp_min(tiny))
            weight.copy_(whole - layer.get_delta_weight("default").float())
    return adapted
