"""Samples that go through a model together: each one's results stay its own.

Short samples leave a matrix product too few rows to be fast. What goes together is of about equal
length, padded on the right, and is only done where a trial on a few tokens showed that the model
gives every layer the same inputs as it does one by one.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tlora.modules import model_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

# Tokens that go through the model together, where a sample alone has less: from here on a product
# is about as fast as it gets, and what autograd keeps is no more than of one long sample.
_TOKENS = 512
# Padding is at most this share of them.
_PADDING = 1 / 8
# What is padded, and with what. Samples with other keys go alone.
_PADDED = {"input_ids": 0, "attention_mask": 0, "labels": -100}
# Tokens of the two samples of the trial.
_TRIAL = (4, 3)
_on_trial = contextvars.ContextVar("on_trial", default=False)


def group(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    loss: bool = False,
) -> list[list[int]]:
    """Return the indices of the samples that go through the model at a time, each index once.

    Parameters
    ----------
    model
        In evaluation mode.
    samples
        Of `read_samples`.
    layers
        Those whose inputs must be the same as one by one.
    loss
        Whether the loss must be the mean over all label tokens, too.
    """
    alone = [[index] for index in range(len(samples))]
    together = _by_length(samples)
    trial = next((indices for indices in together if len(indices) > 1), None)
    if trial is None or getattr(model.config, "is_encoder_decoder", False):
        return alone
    pair = [samples[index] for index in trial[:2]]
    return together if _same(model, pair, layers, loss) else alone


def stack(model: nn.Module, samples: list[dict[str, Tensor]], loss: bool = False) -> dict[str, Any]:
    """Return the forward arguments of some samples of a group, as `model_inputs` does of one."""
    from torch.nn.utils.rnn import pad_sequence

    found = [model_inputs(model, sample, loss) for sample in samples]
    if len(found) == 1:
        return found[0]
    padded = {
        key: pad_sequence([inputs[key][0] for inputs in found], True, value)
        for key, value in _PADDED.items()
        if key in found[0]
    }
    return {**found[0], **padded}


def label_tokens(labels: Tensor) -> list[int]:
    """Return each sample's number of tokens that a causal model is asked to predict."""
    return (labels[:, 1:] != -100).sum(dim=1).tolist()


def _by_length(samples: list[dict[str, Tensor]]) -> list[list[int]]:
    """Return groups of about equal length, the longest samples first.

    Groups end where a sketch may turn, after 1, 4, 16, ... samples.
    """
    lengths = [
        int((s["attention_mask"] != 0).sum()) if "attention_mask" in s else s["input_ids"].shape[1]
        for s in samples
    ]
    groups: list[list[int]] = []
    edge = 0
    for before, index in enumerate(sorted(range(len(samples)), key=lambda i: -lengths[i])):
        keys = samples[index].keys()
        last = groups[-1] if groups and before != edge else []
        if before == edge:
            edge = max(1, 4 * edge)
        size = lengths[last[0]] * (len(last) + 1) if last else 0
        tokens = sum(lengths[i] for i in last) + lengths[index]
        fits = size <= _TOKENS and size - tokens <= _PADDING * size
        if last and fits and keys <= _PADDED.keys() and keys == samples[last[0]].keys():
            last.append(index)
        else:
            groups.append([index])
    return groups


def on_trial() -> bool:
    """Tell whether what goes through a model now is a trial's, which is no sample."""
    return _on_trial.get()


def _same(
    model: nn.Module, pair: list[dict[str, Tensor]], layers: Mapping[str, nn.Module], loss: bool
) -> bool:
    """Tell whether a few tokens of two samples give the same alone and together."""
    short = []
    for sample, size in zip(pair, _TRIAL, strict=True):
        ids = sample["input_ids"][:, :size]
        if "attention_mask" in sample:
            ids = sample["input_ids"][sample["attention_mask"] != 0][None, :size]
        short.append({"input_ids": ids, "labels": ids} if loss else {"input_ids": ids})
    sizes = [one["input_ids"].shape[1] for one in short]
    if loss and min(sizes) < 2:
        return False
    alone: dict[str, list[Tensor]] = {}
    losses = [_run(model, stack(model, [one], loss), layers, alone) for one in short]
    together: dict[str, list[Tensor]] = {}
    batch = stack(model, short, loss)
    mean = _run(model, batch, layers, together)
    for name in layers:
        both, each = together.get(name, []), alone.get(name, [])
        if len(both) != 1 or len(each) != 2 or both[0].shape[:-1] != (2, max(sizes)):
            return False
        for padded, rows, size in zip(both[0], each, sizes, strict=True):
            if not _close(padded[:size], rows.reshape(-1, rows.shape[-1])):
                return False
    if not loss:
        return True
    if mean is None or None in losses:
        return False
    counts = label_tokens(batch["labels"])
    return _close(mean, sum(n * one for n, one in zip(counts, losses, strict=True)) / sum(counts))


def _run(
    model: nn.Module,
    inputs: dict[str, Any],
    layers: Mapping[str, nn.Module],
    seen: dict[str, list[Tensor]],
) -> Tensor | None:
    """Add what the layers get to `seen`, by their names, and return the loss, if there is one."""
    import torch

    def keep(name: str) -> Callable[..., None]:
        def receive(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            rows = arguments[0] if arguments else next(iter(keywords.values()))
            seen.setdefault(name, []).append(rows)

        return receive

    handles = [
        layer.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    token = _on_trial.set(True)
    try:
        with torch.no_grad():
            return getattr(model(**inputs), "loss", None)
    finally:
        _on_trial.reset(token)
        for handle in handles:
            handle.remove()


def _close(one: Tensor, other: Tensor) -> bool:
    """Tell values that differ by rounding from values of something else."""
    import torch

    tolerance = torch.finfo(one.dtype).eps ** 0.5
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm())
