"""LoRA-FA (Zhang et al., arXiv 2308.03303): A random and frozen, B trained.

The optimizer is PEFT's `create_lorafa_optimizer`: Adam on B's gradient times
(s^2 A A^T)^-1, the best approximation of the full gradient with this A. Where the machine has
bfloat16, PEFT takes that product in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora import zero
from tlora.methods import lora

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from tlora.methods import Context

ZERO = 2
"""ZeRO-3 has no gradient of a parameter that could be replaced, unless its size divides."""


@dataclass(frozen=True)
class Options:
    """LoRA-FA has no options."""


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put plain LoRA on the model and freeze its A."""
    from tlora.adapter import freeze_a

    return freeze_a(lora.adapt(model, lora.Options(), context))


def trainer(model: PeftModel, options: Options, context: dict[str, Any]) -> dict[str, Any]:
    """Return a Trainer mixin that makes PEFT's optimizer.

    ZeRO spreads what the optimizer sees over the processes, where A and B of a module no longer
    stand side by side. There the gradients are clipped and multiplied before the step, and the
    optimizer is the rest of PEFT's.
    """
    from transformers import TrainerCallback

    class Multiply(TrainerCallback):
        norm: float | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.deepspeed_plugin is None:
                return
            optimizer = kwargs["optimizer"].optimizer
            factors = _factors(model)

            def multiply() -> None:
                from deepspeed.utils import safe_set_full_grad

                gradients = zero.gradients_of([b for b, _ in factors])
                optimizer.clip_grad = 0.0  # done here: PEFT's optimizer gets clipped gradients
                gradients, self.norm = zero.clipped(gradients, args.max_grad_norm)
                for (b, factor), gradient in zip(factors, gradients, strict=True):
                    safe_set_full_grad(b, _product(gradient, factor))

            zero.before_step(optimizer, multiply)

    class LoraFa:
        def create_optimizer(self, model: Any = None) -> Optimizer:
            from peft.optimizers import create_lorafa_optimizer

            if self.optimizer is None:
                model = self.model if model is None else model
                rates = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
                if self.is_deepspeed_enabled:
                    self.optimizer = _plain(
                        [p for p in model.parameters() if p.requires_grad], rates
                    )
                else:
                    self.optimizer = create_lorafa_optimizer(
                        model, r=context["rank"], lora_alpha=context["lora_alpha"], **rates
                    )
            return self.optimizer

        def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_grad_norm(*args, **kwargs)
            return found if multiply.norm is None else multiply.norm

    multiply = Multiply()
    return {"mixin": LoraFa, "callbacks": [multiply]}


def _factors(model: PeftModel) -> list[tuple[Parameter, Tensor]]:
    """Return every B with (s^2 A A^T)^-1, (rank, rank) float32, computed as PEFT does."""
    import torch
    from peft.tuners.lora import LoraLayer

    found = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
            gram = a.detach().float() @ a.detach().float().T
            inverse = torch.linalg.pinv(gram + 1e-8 * torch.eye(len(gram), device=gram.device))
            found.append((b, inverse / layer.scaling["default"] ** 2))
    return found


def _product(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return their product in bfloat16 where the machine has it, as PEFT does."""
    import torch
    from accelerate.utils import is_bf16_available

    with torch.autocast(gradient.device.type, torch.bfloat16, enabled=is_bf16_available()):
        return (gradient @ factor).to(gradient.dtype)


def _plain(parameters: list[Parameter], rates: dict[str, float]) -> Optimizer:
    """Return PEFT's optimizer without its product."""
    import math

    import torch

    class Adam(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group)

        def _step(self, parameter: Parameter, group: dict[str, Any]) -> None:
            state, gradient = self.state[parameter], parameter.grad
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            state["exp_avg"].lerp_(gradient, 0.1)
            state["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            correction = math.sqrt(1 - 0.999 ** state["step"]) / (1 - 0.9 ** state["step"])
            scale = state["exp_avg_sq"].sqrt().add_(1e-6)
            parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] * correction)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    return Adam([{"params": parameters}], rates)
