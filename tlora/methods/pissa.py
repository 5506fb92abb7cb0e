"""PiSSA (Meng et al., arXiv 2404.02948): A and B from the top singular triplets of W.

The adapter is PEFT's own (`init_lora_weights="pissa"`). PEFT also subtracts it from the base
weights; here only A0 and B0 are kept, and the start of training subtracts them again, so that the
base model stays as it is on disk.
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
    """`niter`: subspace iterations of a randomized SVD; None for the exact one."""

    niter: int | None = None


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's PiSSA adapter on the model."""
    from peft import LoraConfig, get_peft_model

    suffix = "" if options.niter is None else f"_niter_{options.niter}"
    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        init_lora_weights=f"pissa{suffix}",
    )
    return get_peft_model(model, config)
