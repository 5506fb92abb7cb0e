"""MiLoRA (Wang et al., arXiv 2406.09044): A and B from the smallest singular triplets of W.

PEFT has no MiLoRA. W = U S V^T; with the last r triplets B0 = U_r sqrt(S_r / s) and
A0 = sqrt(S_r / s) V_r^T, so that the scaled product s B0 A0 is that part of W, which the start of
training subtracts from the base weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Context

INITIALIZES = True


@dataclass(frozen=True)
class Options:
    """MiLoRA has no options."""


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put a LoRA adapter on the model, set A and B, and subtract them from the base weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    from tlora.modules import weight_matrix
    from tlora.progress import bar

    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
    )
    adapted = get_peft_model(model, config)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for layer in bar(layers, desc="singular vectors", unit="module"):
            base = layer.get_base_layer()
            left, values, right = torch.linalg.svd(weight_matrix(base).float(), full_matrices=False)
            root = (values[-context.rank :] / layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight.copy_(root[:, None] * right[-context.rank :])
            layer.lora_B["default"].weight.copy_(left[:, -context.rank :] * root)
            base.weight.copy_(base.weight.float() - layer.get_delta_weight("default").float())
    return adapted
