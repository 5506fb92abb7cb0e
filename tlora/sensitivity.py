"""How much the loss depends on each weight matrix: S(W) = mean |W * grad W|.

Algorithm 1 of the paper: the absolute value is taken per sample, then averaged over samples.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError
from tlora.grouping import group, label_tokens, stack
from tlora.modules import (
    ALL_LINEAR,
    calibrating,
    find_targets,
    forwards,
    in_backward,
    is_conv1d,
    read_samples,
    weight_matrix,
)
from tlora.progress import bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Elements of a weight that are handled at a time: on a processor what stays in its cache, on a GPU
# 64 MiB of float32.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 24}


def sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target_modules: str | Iterable[str] = ALL_LINEAR,
) -> dict[str, float]:
    """Return S(W) = (1/N) sum over samples of mean(|W * grad_W loss|) for every target layer.

    Absolute values are of each sample's own gradient, without its padding; a sample's loss is the
    mean over its label tokens. So the result does not depend on the batch size. Samples that are
    short and of about equal length go through the model together, up to 512 tokens, where a trial
    shows that this changes nothing. Gradients of weights are made in pieces, each reduced to a
    number before the next; whole ones, one at a time, only where a weight is used more than once.

    Parameters
    ----------
    model
        A causal or encoder-decoder model in float32, bfloat16 or float16, without adapters. It is
        run in evaluation mode and left as it was; gradient checkpointing, if on, is used.
    batches
        Dicts of `input_ids`, `attention_mask`, `labels`, each (samples, tokens); read once.
    target_modules
        "all-linear", a regular expression, or a list of names, as in PEFT.

    Returns
    -------
    dict of str to float
        Full module name -> S, in the model's order. Products are taken in float32 and summed over
        samples in float64.

    Raises
    ------
    UserError
        For targets that match nothing or are quantised, no samples, samples without labels, a
        layer that takes no part in the loss, and for NaN or infinity (naming the layer).

    References
    ----------
    arXiv 2604.18124, Algorithm 1.
    """
    targets = find_targets(model, target_modules)
    samples = read_samples(batches)
    # A weight that two layers share gets one gradient.
    weights = {id(module.weight): module.weight for module in targets.values()}
    totals = dict.fromkeys(weights, 0.0)
    received: set[int] = set()
    found: dict[int, Tensor] = {}  # of the sample at hand, on the weights' devices
    products = _Products()

    def reduce(weight: Tensor, left: Tensor, right: Tensor) -> None:
        rows = (part.reshape(size, -1, part.shape[-1]) for part in (left, right))
        found[id(weight)] = products.mean(weight.detach(), *rows)

    def consume(weight: Tensor) -> None:
        if weight.grad is None:  # it was reduced above
            return
        name = next(name for name, module in targets.items() if module.weight is weight)
        if id(weight) in found:
            raise UserError(f"{name}: the model uses its weight beside the layer: not supported")
        if size > 1:
            raise UserError(f"{name}: used repeatedly on some samples only: not supported")
        found[id(weight)] = products.mean(weight.detach(), weight.grad)
        weight.grad = None

    handles = []
    size = 1  # samples that are in the model
    with calibrating(model, weights.values()), _reducing(model, targets, reduce) as (all_own, uses):
        alone = [[index] for index in range(len(samples))]
        left = deque(group(model, samples, targets, loss=True) if all_own else alone)
        try:
            for weight in weights.values():
                handles.append(weight.register_post_accumulate_grad_hook(consume))
            progress = bar(total=len(samples), desc="sensitivity", unit="sample")
            while left:
                indices = left.popleft()
                size = len(indices)
                inputs = stack(model, [samples[index] for index in indices], loss=True)
                uses.clear()
                loss = getattr(model(**inputs), "loss", None)
                if loss is None:
                    raise UserError(
                        f"model: {type(model).__name__} returns no loss: expected a model with a "
                        "language-modelling head"
                    )
                loss.backward()
                del loss
                values = _read(found)
                received.update(found)
                found.clear()
                if size > 1 and not all(map(math.isfinite, chain(*values.values()))):
                    left.extendleft([index] for index in reversed(indices))  # to name the sample
                    continue
                # Together, a sample's loss has the weight of its label tokens.
                counts = label_tokens(inputs["labels"]) if size > 1 else [1]
                for key, each in values.items():
                    totals[key] += sum(
                        value * sum(counts) / count
                        for value, count in zip(each, counts, strict=True)
                    )
                _check_finite(targets, totals, indices[0])
                progress.update(size)
        finally:
            for handle in handles:
                handle.remove()
    for name, module in targets.items():
        if id(module.weight) not in received:
            raise UserError(f"{name}: takes no part in the loss: remove it from target_modules")
    return {name: totals[id(module.weight)] / len(samples) for name, module in targets.items()}


@contextlib.contextmanager
def _reducing(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    reduce: Callable[[Tensor, Tensor, Tensor], None],
) -> Iterator[tuple[bool, Counter[int]]]:
    """Have the layers hand `reduce` their weight and the factors of its gradient, left^T right.

    Both factors are (..., features). Backward would make the whole gradient, as large
    as the weight, only to have it read once. Left to it are weights that other modules hold, too,
    and those that a forward pass uses repeatedly: their gradient is a sum. Yields whether all
    layers do so, and how often each weight was used, which the caller sets back before each pass.
    """
    import torch

    calls: Counter[int] = Counter()
    held = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )

    def backward(weight: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        if calls[id(weight)] > 1:
            return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
        reduce(weight, left, right)
        return None

    Product = _product(backward)

    def forward(module: nn.Module, inputs: Tensor) -> Tensor:
        calls[id(module.weight)] += not in_backward()
        return Product.apply(inputs, module.weight, module.bias, module)

    patched = [
        module
        for module in targets.values()
        if held[id(module.weight)] == 1
        and (type(module) is torch.nn.Linear or is_conv1d(module))
        and "forward" not in vars(module)
        and not torch.is_autocast_enabled(module.weight.device.type)
    ]
    with forwards({module: functools.partial(forward, module) for module in patched}):
        yield len(patched) == len(targets), calls


def _product(backward_of_weight: Callable[[Tensor, Tensor, Tensor], Tensor | None]) -> type:
    """Return a linear layer's product as an autograd function that leaves the weight's gradient to
    `backward_of_weight`."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, weight, bias, module):
            ctx.save_for_backward(inputs)
            ctx.module = module
            return torch.nn.functional.linear(inputs, weight_matrix(module), bias)

        @staticmethod
        def backward(ctx, gradient):
            left, right = gradient, *ctx.saved_tensors
            if is_conv1d(ctx.module):
                left, right = right, left
            below = gradient @ weight_matrix(ctx.module) if ctx.needs_input_grad[0] else None
            return below, backward_of_weight(ctx.module.weight, left, right), None, None

    return Product


class _Products:
    """Means of |W * G|, in pieces that are written to the same memory again and again.

    To get fresh memory from the system and to fill it takes longer than the products.
    """

    def __init__(self) -> None:
        self.spaces: dict[tuple, Tensor] = {}

    def mean(self, weight: Tensor, left: Tensor, right: Tensor | None = None) -> Tensor:
        """Return mean |W * G| of each sample as float64 numbers on the weight's device, which
        nothing waits for.

        G is `left`, of one sample, or left^T right of each, (samples, tokens, features) both, in
        the weight's number format, as backward makes it. Products are float32.
        """
        import torch

        size = _CHUNK.get(weight.device.type, _CHUNK["cuda"])
        step = min(len(weight), max(1, size // max(1, weight[0].numel())))
        sums: list[list[Tensor]] = [[] for _ in (left if right is not None else range(1))]
        for start in range(0, len(weight), step):
            piece = weight[start : start + step]
            product = self._space(piece, torch.float32)
            # All samples while the weight's piece is at hand.
            for sample, found in enumerate(sums):
                if right is None:
                    product.copy_(left[start : start + step])
                else:
                    gradient = self._space(piece, weight.dtype)
                    part = left[sample, :, start : start + step]
                    torch.mm(part.T, right[sample], out=gradient)
                    if weight.dtype != torch.float32:
                        product.copy_(gradient)
                found.append(product.mul_(piece).abs_().sum())
        each = [torch.stack(found).double().sum() for found in sums]
        return torch.stack(each) / weight.numel()

    def _space(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (like.device, dtype, like.shape[1])
        if key not in self.spaces or len(self.spaces[key]) < len(like):
            self.spaces[key] = like.new_empty(like.shape, dtype=dtype)
        return self.spaces[key][: len(like)]


def _read(values: Mapping[int, Tensor]) -> dict[int, list[float]]:
    """Return numbers that lie on devices: each device is waited for once."""
    import torch

    devices: dict[torch.device, list[int]] = {}
    for key, value in values.items():
        devices.setdefault(value.device, []).append(key)
    return {
        key: numbers
        for keys in devices.values()
        for key, numbers in zip(
            keys, torch.stack([values[key] for key in keys]).tolist(), strict=True
        )
    }


def _check_finite(targets: dict[str, nn.Module], totals: dict[int, float], index: int) -> None:
    broken = [name for name, m in targets.items() if not math.isfinite(totals[id(m.weight)])]
    if broken:
        # NaN in one weight spreads to all gradients: name the layer it comes from, if it is one.
        source = [name for name in broken if not targets[name].weight.isfinite().all()]
        where = f"{source[0]}: weight" if source else f"{broken[0]}: gradient"
        raise UserError(f"{where} is NaN or infinite at calibration sample {index}")
