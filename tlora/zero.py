"""Gradients and weights of a model whose optimizer is DeepSpeed's ZeRO, for methods that need both.

They are spread over the processes. Gradients exist only until the optimizer's step, and what it
goes on from is a copy of the weights in float32. Source: `deepspeed.utils.tensor_fragment`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


def before_step(optimizer: Any, action: Callable[[], None]) -> None:
    """Have DeepSpeed's optimizer call `action` before each of its steps."""
    step = optimizer.step

    def stepping(*arguments: Any, **keywords: Any) -> Any:
        action()
        return step(*arguments, **keywords)

    optimizer.step = stepping


def clipped(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    """Return gradients as torch and DeepSpeed clip them, and their norm before."""
    import torch

    norm = torch.nn.utils.get_total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients], float(norm)


def gradients_of(parameters: list[Parameter]) -> list[Tensor]:
    """Return whole gradients, before a step; every process must call this."""
    from deepspeed.utils import safe_get_full_grad

    return [safe_get_full_grad(parameter) for parameter in parameters]


@contextlib.contextmanager
def around(
    parameters: list[Parameter],
    changed: list[Parameter],
    gradients: list[Tensor],
    max_norm: float,
) -> Iterator[None]:
    """Give a block after a step its gradients; what the block sets to 0 stays 0.

    Parameters
    ----------
    parameters
        All that are trained.
    changed
        Those of them in which the block sets entries to 0.
    gradients
        Of all parameters, as they were before the step; [] where the block asks for none.
    max_norm
        What the step clipped them to.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    if gradients:
        for parameter, gradient in zip(parameters, clipped(gradients, max_norm)[0], strict=True):
            parameter.grad = gradient.to(parameter.dtype)
    yield
    for parameter in parameters:
        parameter.grad = None
    for parameter in changed:
        master = safe_get_full_fp32_param(parameter)
        safe_set_full_fp32_param(parameter, master.masked_fill(parameter == 0, 0))
