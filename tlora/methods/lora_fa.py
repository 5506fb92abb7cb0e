"""LoRA-FA (Zhang et al., arXiv 2308.03303): A random and frozen, B trained.

The optimizer is PEFT's `create_lorafa_optimizer`: Adam on B's gradient times
(s^2 A A^T)^-1, the best approximation of the full gradient with this A. Where the machine has
bfloat16, PEFT takes that product in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.methods import lora

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from tlora.methods import Context


@dataclass(frozen=True)
class Options:
    """LoRA-FA has no options."""


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put plain LoRA on the model and freeze its A."""
    from tlora.adapter import freeze_a

    return freeze_a(lora.adapt(model, lora.Options(), context))


def trainer(model: PeftModel, options: Options, context: dict[str, Any]) -> dict[str, Any]:
    """Return a Trainer mixin that makes PEFT's optimizer."""

    class LoraFa:
        def create_optimizer(self, model: Any = None) -> Optimizer:
            from peft.optimizers import create_lorafa_optimizer

            if self.optimizer is None:
                self.optimizer = create_lorafa_optimizer(
                    self.model if model is None else model,
                    r=context["rank"],
                    lora_alpha=context["lora_alpha"],
                    lr=self.args.learning_rate,
                    weight_decay=self.args.weight_decay,
                )
            return self.optimizer

    return {"mixin": LoraFa}
