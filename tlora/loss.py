"""The loss of a causal model without logits of all tokens at a time."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tlora.modules import forwards

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LEAST = 4
"""Times the hidden size that a vocabulary has at least for logits to be worth avoiding."""
# Tokens of a chunk, at least: fewer make no faster product.
_ROWS = 256
# Relative difference of two losses that are the same to the rounding of the number format.
_SAME = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


@contextlib.contextmanager
def chunked_loss(model: PreTrainedModel) -> Iterator[bool]:
    """Within it, the model computes its loss in chunks of tokens, of those with a label alone.

    Logits of a large vocabulary are what takes most memory in training a small batch; here neither
    they nor their gradient exist for more than a chunk. The model's other outputs change: `logits`
    holds the hidden states.

    It is left out where it would not be the same or not help: models without transformers' loss of
    causal models, vocabularies below `LEAST` times the hidden size, and heads that are trained,
    carry an adapter or are followed by what is not linear (soft-capping: found out by computing
    both losses of a few tokens).

    Parameters
    ----------
    model
        A causal model, with or without adapters, whose weights are in this process's memory.

    Yields
    ------
    bool
        Whether the loss is computed so.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if not _suits(base, head):
        yield False
        return
    before = _probe(base)
    stock = vars(base).get("_loss_function")
    with contextlib.ExitStack() as changed:
        changed.callback(_set_loss, base, stock)
        _set_loss(base, _loss_function(head))
        changed.enter_context(forwards({head: lambda hidden: hidden}))
        # What lies between head and loss, and is not linear, shows in the loss.
        same = bool((_probe(base) - before).abs() <= _SAME[_dtype(head)] * before.abs())
        if not same:
            changed.close()
        yield same


def _suits(base: PreTrainedModel, head: nn.Module | None) -> bool:
    from torch import nn
    from transformers.loss.loss_utils import ForCausalLMLoss

    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not head.weight.requires_grad
        and _dtype(head) in _SAME
        and head.out_features >= LEAST * head.in_features
        and base.loss_function is ForCausalLMLoss
        # or it would take the loss of hidden states as if they were logits
        and "self.loss_function(" in inspect.getsource(type(base).forward)
    )


def _dtype(head: nn.Module) -> str:
    return str(head.weight.dtype).removeprefix("torch.")


def _set_loss(base: PreTrainedModel, function: Any) -> None:
    """Give a model a loss function of its own; None: that of its class."""
    if function is None:
        vars(base).pop("_loss_function", None)
    else:
        base.loss_function = function


def _loss_function(head: nn.Module) -> Any:
    """Return what stands in for transformers' ForCausalLMLoss where `logits` are hidden states."""
    import torch
    from torch.nn.functional import pad

    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(logits.device)
        kept = shift_labels != ignore_index
        count = kept.sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=logits.device)
        hidden = logits[kept].to(head.weight.dtype)
        return _function().apply(hidden, head.weight, head.bias, shift_labels[kept], count)

    return loss


@functools.cache
def _function() -> Any:
    """Return the cross-entropies of a linear head over a count as an autograd function.

    The gradient of the hidden states is made on the way, as in torch's `linear_cross_entropy`,
    which in bfloat16 would round the loss to three digits. The head's is not made.
    """
    import torch

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias, labels, count):
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            total = torch.zeros((), device=hidden.device)
            rows = max(_ROWS, math.ceil(len(hidden) * weight.shape[1] / weight.shape[0]))
            with torch.autocast(hidden.device.type, enabled=False):
                for start in range(0, len(hidden), rows):
                    part = slice(start, start + rows)
                    chosen = labels[part, None]
                    logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
                    sums = logits.logsumexp(1, keepdim=True)
                    total += (sums - logits.gather(1, chosen)).sum()
                    if gradient is not None:
                        logits.sub_(sums).exp_()
                        logits.scatter_add_(1, chosen, logits.new_full(chosen.shape, -1))
                        logits.div_(count)
                        torch.mm(logits.to(weight.dtype), weight, out=gradient[part])
            ctx.gradient = gradient
            return total / count

        @staticmethod
        def backward(ctx, gradient):
            found, ctx.gradient = ctx.gradient, None
            return found.mul_(gradient), None, None, None, None

    return Chunked


def _probe(base: PreTrainedModel) -> Tensor:
    """Return the loss on a few tokens; nothing of the model's state or of chance changes."""
    import torch

    size = base.get_input_embeddings().num_embeddings
    ids = (torch.arange(12, device=base.device) * 7919 % size)[None]
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        with torch.no_grad():
            return base(input_ids=ids, labels=ids, use_cache=False).loss.float()
    finally:
        for module in training:
            module.training = True
