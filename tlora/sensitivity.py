"""How much the loss depends on each weight matrix: S(W) = mean |W * grad W|.

Algorithm 1 of the paper: the absolute value is taken per sample, then averaged over samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError
from tlora.modules import ALL_LINEAR, calibrating, find_targets, model_inputs, read_samples
from tlora.progress import bar

if TYPE_CHECKING:
    from torch import Tensor, nn

# Elements of a weight that are multiplied at a time: on a processor what stays in its cache (and
# below what torch splits over threads), on a GPU 64 MiB of float32 beside the gradient.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}


def sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target_modules: str | Iterable[str] = ALL_LINEAR,
) -> dict[str, float]:
    """Return S(W) = (1/N) sum over samples of mean(|W * grad_W loss|) for every target layer.

    Samples go through the model one by one, without their padding; a sample's loss is the mean over
    its label tokens. So the result does not depend on the batch size. A gradient exists for one
    target weight at a time: each is reduced to a number and freed as soon as backward has made it.

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

    def consume(weight: Tensor) -> None:
        value = _mean_product(weight.detach(), weight.grad)
        found[id(weight)] = found[id(weight)] + value if id(weight) in found else value
        weight.grad = None

    handles = []
    with calibrating(model, weights.values()):
        try:
            for weight in weights.values():
                handles.append(weight.register_post_accumulate_grad_hook(consume))
            for index, sample in enumerate(bar(samples, desc="sensitivity", unit="sample")):
                inputs = model_inputs(model, sample, loss=True)
                loss = getattr(model(**inputs), "loss", None)
                if loss is None:
                    raise UserError(
                        f"model: {type(model).__name__} returns no loss: expected a model with a "
                        "language-modelling head"
                    )
                loss.backward()
                del loss
                for key, value in _read(found).items():
                    totals[key] += value
                received.update(found)
                found.clear()
                _check_finite(targets, totals, index)
        finally:
            for handle in handles:
                handle.remove()
    for name, module in targets.items():
        if id(module.weight) not in received:
            raise UserError(f"{name}: takes no part in the loss: remove it from target_modules")
    return {name: totals[id(module.weight)] / len(samples) for name, module in targets.items()}


def _mean_product(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return mean |W * G| as a float64 number on the weight's device, which nothing waits for.

    Products are float32, in pieces, so that no large copy exists.
    """
    import torch

    size = _CHUNK.get(weight.device.type, _CHUNK["cuda"])
    rows = max(1, size // max(1, weight[0].numel()))
    sums = [
        (weight[start : start + rows].float() * gradient[start : start + rows].float()).abs_().sum()
        for start in range(0, len(weight), rows)
    ]
    return torch.stack(sums).double().sum() / weight.numel()


def _read(values: Mapping[int, Tensor]) -> dict[int, float]:
    """Return numbers that lie on devices: each device is waited for once."""
    import torch

    devices: dict[torch.device, list[int]] = {}
    for key, value in values.items():
        devices.setdefault(value.device, []).append(key)
    return {
        key: number
        for keys in devices.values()
        for key, number in zip(
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
