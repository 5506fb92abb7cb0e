"""LoRA (Hu et al., arXiv 2106.09685) as PEFT has it: A random, B zero, both trained.

With options also rsLoRA (scaling alpha / sqrt(r)) and DoRA (a trained magnitude for every row of
the weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Context


@dataclass(frozen=True)
class Options:
    """Options of PEFT's LoraConfig.

    use_rslora
        Scaling alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
    use_dora
        Weight-decomposed LoRA (Liu et al., arXiv 2402.09353); it has no plain LoRA form.
    """

    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False


def merges(options: Options) -> bool:
    """DoRA scales the rows of the sum of base and adapter: only merged is it what others load."""
    return options.use_dora


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's LoRA on the model; A is drawn from torch's global generator, seeded by the run."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    return get_peft_model(model, config)
