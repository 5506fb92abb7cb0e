"""OLoRA (Büyükakyüz, arXiv 2406.01775): B and A from the QR decomposition of W.

The adapter is PEFT's own (`init_lora_weights="olora"`): B0 the first columns of Q, A0 the first
rows of R. PEFT also subtracts it from the base weights; here only A0 and B0 are kept, and the start
of training subtracts them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlora.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Context

INITIALIZES = True


@dataclass(frozen=True)
class Options:
    """OLoRA has no options."""


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's OLoRA adapter on the model.

    Raises
    ------
    UserError
        Conv1D targets, whose transposed weight PEFT would decompose.
    """
    from peft import LoraConfig, get_peft_model

    from tlora.modules import find_targets, is_conv1d

    for name, module in find_targets(model, context.target_modules).items():
        if is_conv1d(module):
            raise UserError(f"target_modules: {name}: is a Conv1D: expected nn.Linear")
    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        init_lora_weights="olora",
    )
    return get_peft_model(model, config)
