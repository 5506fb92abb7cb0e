"""LoRA+ (Hayou et al., arXiv 2402.12354): LoRA whose B learns faster than its A.

The optimizer is PEFT's `create_loraplus_optimizer`.
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
    """`ratio`: learning rate of B over that of A, which is the run's learning rate."""

    ratio: float = 16.0

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio}: expected at least 1")


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put plain LoRA on the model."""
    return lora.adapt(model, lora.Options(), context)


def trainer(model: PeftModel, options: Options, context: dict[str, Any]) -> dict[str, Any]:
    """Return a Trainer mixin that makes PEFT's optimizer.

    A method of the Trainer rather than its argument `optimizers`, which DeepSpeed refuses.
    """

    class LoraPlus:
        def create_optimizer(self, model: Any = None) -> Optimizer:
            from peft.optimizers import create_loraplus_optimizer

            if self.optimizer is None:
                model = self.model if model is None else model
                kind, values = self.get_optimizer_cls_and_kwargs(self.args, model)
                self.optimizer = create_loraplus_optimizer(
                    model,
                    kind,
                    loraplus_lr_ratio=options.ratio,
                    loraplus_weight_decay=self.args.weight_decay,
                    **values,
                )
            return self.optimizer

    return {"mixin": LoraPlus}
