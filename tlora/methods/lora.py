"""LoRA (Hu et al., arXiv 2106.09685) as PEFT has it: A random, B zero, both trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Context


@dataclass(frozen=True)
class Options:
    """Options of PEFT's LoraConfig."""

    lora_dropout: float = 0.0


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's LoRA on the model; A is drawn from torch's global generator, seeded by the run."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        lora_dropout=options.lora_dropout,
    )
    return get_peft_model(model, config)
