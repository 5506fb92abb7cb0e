"""OLoRA (Büyükakyüz, arXiv 2406.01775): B and A from the QR decomposition of W.

The adapter is PEFT's own (`init_lora_weights="olora"`): B0 the first columns of Q, A0 the first
rows of R. PEFT also subtracts it from the base weights; here only A0 and B0 are kept, and the start
of training subtracts them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Base, Context

INITIALIZES = True


@dataclass(frozen=True)
class Options:
    """OLoRA has no options."""


def unfit(options: Options, base: Base) -> str | None:
    """PEFT decomposes the weight as it is stored: not that of a Conv1D, which is transposed."""
    if base.conv1d:
        name = next(iter(base.targets), "its targets")
        return f"target_modules: {name}: is a Conv1D: expected nn.Linear"
    return None


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's OLoRA adapter on the model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        init_lora_weights="olora",
    )
    return get_peft_model(model, config)
