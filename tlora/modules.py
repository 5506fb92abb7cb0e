"""Target layers of a model and the samples they are calibrated on."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

ALL_LINEAR = "all-linear"

# Everything else that a batch may hold (ids, references, lengths) is no input of the model.
_ENCODER_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_DECODER_KEYS = ("decoder_input_ids", "decoder_attention_mask")


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers that `target_modules` names, in the model's order.

    Parameters
    ----------
    model
        A model without adapters.
    target_modules
        As in PEFT: "all-linear" (every linear layer but the output head), another string (a regular
        expression that matches the whole name), or names, each the last parts of a module's name.

    Returns
    -------
    dict
        Full name -> `nn.Linear` or GPT-2's `Conv1D`.

    Raises
    ------
    UserError
        Where nothing matches, a name in a list matches nothing, a named module is no linear layer,
        a layer is quantised, or the model already carries an adapter.
    """
    named = dict(model.named_modules())
    if any(hasattr(module, "lora_A") or hasattr(module, "base_layer") for module in named.values()):
        raise UserError("model: already carries an adapter: expected the plain base model")
    if isinstance(target_modules, str):
        matched = _match_string(model, named, target_modules)
    else:
        matched = _match_names(named, list(target_modules))
    if not matched:
        raise UserError(
            f"target_modules: {target_modules!r}: matches no linear layer of {type(model).__name__}"
        )
    for name, module in matched.items():
        _check_weight(name, module)
    return matched


def find_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers with exactly these full names, in the model's order."""
    wanted = set(names)
    found = {name: module for name, module in model.named_modules() if name in wanted}
    if missing := sorted(wanted - found.keys()):
        raise UserError(f"{missing[0]}: no module of {type(model).__name__} has this name")
    for name, module in found.items():
        if not _is_linear(module):
            raise UserError(f"{name}: is a {type(module).__name__}: expected nn.Linear or Conv1D")
        _check_weight(name, module)
    return found


def _match_string(
    model: nn.Module, named: dict[str, nn.Module], target: str
) -> dict[str, nn.Module]:
    if target.lower() == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {n: m for n, m in named.items() if _is_linear(m) and m is not head}
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UserError(f"target_modules: {target!r}: no regular expression: {error}") from error
    return {n: m for n, m in named.items() if _is_linear(m) and pattern.fullmatch(n)}


def _match_names(named: dict[str, nn.Module], targets: list[str]) -> dict[str, nn.Module]:
    matched = {}
    for target in targets:
        found = {n: m for n, m in named.items() if n == target or n.endswith(f".{target}")}
        if not found:
            known = sorted({n.rpartition(".")[2] for n, m in named.items() if _is_linear(m)})
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"linear layers here: {known}"
            raise UserError(f"target_modules: {target!r}: matches no module; {hint}")
        for name, module in found.items():
            if not _is_linear(module):
                raise UserError(
                    f"target_modules: {target!r}: {name} is a {type(module).__name__}: "
                    "expected nn.Linear or Conv1D"
                )
        matched.update(found)
    return {name: module for name, module in named.items() if name in matched}


def _is_linear(module: nn.Module) -> bool:
    """Tell linear layers, including those of quantisation libraries (refused later, by name)."""
    from torch import nn

    return (
        isinstance(module, nn.Linear) or is_conv1d(module) or hasattr(module, "qweight")
    ) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's layer, whose weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None


def _check_weight(name: str, module: nn.Module) -> None:
    import torch

    weight = getattr(module, "weight", None)
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if (
        hasattr(module, "qweight")
        or weight is None
        or hasattr(weight, "quant_state")
        or weight.dtype not in floating
        or type(weight.data) is not torch.Tensor
    ):
        raise UserError(
            f"{name}: {type(module).__name__}: quantised or sharded weight: "
            "expected a full-precision one (load the model without quantisation)"
        )
    if weight.is_meta:
        raise UserError(f"{name}: its weight is not loaded (meta device): expected it in memory")


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a layer's weight as (out_features, in_features), a view without gradient."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight


def module_shapes(
    model: nn.Module, target_modules: str | Iterable[str] = ALL_LINEAR
) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of every target layer, in the model's order."""
    targets = find_targets(model, target_modules)
    return {name: tuple(weight_matrix(module).shape) for name, module in targets.items()}


def read_samples(
    batches: Iterable[Mapping[str, Any]], limit: int | None = None
) -> list[dict[str, Tensor]]:
    """Read batches once and cut them into samples without padding.

    Reading once is what makes several passes see the same samples, whether `batches` is an
    iterator or a loader that shuffles. The result may be passed as `batches` again.

    Parameters
    ----------
    batches
        Dicts with `input_ids` (samples, tokens) and, as available, `attention_mask`, `labels` and
        the decoder's inputs; tensors, arrays or lists.
    limit
        How many samples to read at most; None reads all.

    Returns
    -------
    list of dict
        One dict of (1, tokens) int64 tensors a sample, on the CPU.

    Raises
    ------
    UserError
        Where there is no sample, or a batch is no dict of `input_ids`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"calibration_samples: {limit}: expected at least 1")
    if isinstance(batches, Mapping):
        raise UserError("batches: one dict: expected an iterable of dicts (put it into a list)")
    samples = list(itertools.islice(_samples(batches), limit))
    if not samples:
        raise UserError(
            "batches: no sample: expected at least one (an iterator that was read before is empty: "
            "pass a list or a DataLoader)"
        )
    return samples


def _samples(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Tensor]]:
    import torch

    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or batch.get("input_ids") is None:
            raise UserError(
                f"batches: item {index}: {type(batch).__name__}: expected a dict with input_ids"
            )
        tensors = {}
        for key in (*_ENCODER_KEYS, *_DECODER_KEYS, "labels"):
            if batch.get(key) is not None:
                try:
                    tensor = torch.as_tensor(batch[key]).detach().cpu().long()
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"batches: item {index}: {key}: expected numbers of equal length per batch"
                    ) from error
                tensors[key] = tensor if tensor.dim() > 1 else tensor[None]
        for row in range(len(tensors["input_ids"])):
            yield {key: tensor[row : row + 1] for key, tensor in tensors.items()}


def model_inputs(
    model: nn.Module, sample: Mapping[str, Tensor], loss: bool = False
) -> dict[str, Any]:
    """Return the forward arguments of one sample: padding cut off, on the model's device.

    A token counts where `attention_mask` is 1; on a decoder with labels of its own, where
    `decoder_attention_mask` is 1 or, without that, between the first and the last label that is
    not -100.

    Parameters
    ----------
    model
        A causal or an encoder-decoder model.
    sample
        An element of `read_samples`.
    loss
        Whether a loss is wanted: then labels must be there.

    Raises
    ------
    UserError
        Where the labels are missing, of another length, or none of them counts.
    """
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    labels = sample.get("labels")
    tokens = sample.get("attention_mask")
    tokens = (sample["input_ids"] == sample["input_ids"] if tokens is None else tokens != 0)[0]
    inputs = {key: sample[key][:, tokens] for key in _ENCODER_KEYS if key in sample}
    inputs["attention_mask"] = inputs["input_ids"].new_ones(inputs["input_ids"].shape)
    if not tokens.any():
        raise UserError("batches: a sample without tokens (its attention_mask is all 0)")
    if encoder_decoder:
        inputs |= _decoder_inputs(sample)
    elif labels is not None:
        if labels.shape != sample["input_ids"].shape:
            raise UserError(
                f"batches: labels of shape {tuple(labels.shape)}: expected that of input_ids, "
                f"{tuple(sample['input_ids'].shape)}"
            )
        inputs["labels"] = labels[:, tokens]
    if loss:
        if labels is None:
            raise UserError("batches: no labels: the sensitivity needs them")
        # A causal model predicts every token but the first.
        if not (inputs["labels"][:, 0 if encoder_decoder else 1 :] != -100).any():
            raise UserError("batches: a sample without label tokens: expected labels beside -100")
    elif not encoder_decoder:
        inputs.pop("labels", None)
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {key: value.to(device) for key, value in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return arguments


def _decoder_inputs(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the decoder's arguments without padding."""
    import torch

    found = {key: sample[key] for key in (*_DECODER_KEYS, "labels") if key in sample}
    if "labels" not in found and "decoder_input_ids" not in found:
        raise UserError("batches: no labels: an encoder-decoder model needs them")
    if "decoder_attention_mask" in found:
        keep = found.pop("decoder_attention_mask")[0] != 0
    elif "labels" in found:
        counted = (found["labels"][0] != -100).nonzero().flatten()
        if not len(counted):
            raise UserError("batches: a sample without label tokens: expected labels beside -100")
        # Given decoder inputs may start with tokens that have no label but are context.
        first = 0 if "decoder_input_ids" in found else int(counted[0])
        keep = torch.zeros(found["labels"].shape[1], dtype=torch.bool)
        keep[first : int(counted[-1]) + 1] = True
    else:
        return found
    return {key: value[:, keep] for key, value in found.items()}


@contextlib.contextmanager
def calibrating(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Run `model` in evaluation mode; afterwards it is as it was, also after an exception.

    Modes of all modules, `requires_grad` and `grad` of all parameters come back. Only `trained`
    requires gradients inside. Layers with gradient checkpointing switched on keep it, although
    models drop it in evaluation mode.
    """
    from torch.utils.checkpoint import checkpoint

    trained = list(trained)
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    checkpointed = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
        and hasattr(module, "_gradient_checkpointing_func")
        and "forward" not in vars(module)
        and _is_layer(module)
    ]
    functions = {
        module: functools.partial(checkpoint, module.forward, use_reentrant=False)
        for module in (checkpointed if trained else ())
    }
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
            parameter.grad = None
        with forwards(functions):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextlib.contextmanager
def forwards(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it, modules have these forward functions; before it none has one of its own."""
    try:
        for module, function in functions.items():
            module.forward = function
        yield
    finally:
        for module in functions:
            vars(module).pop("forward", None)


def in_backward() -> bool:
    """Tell whether a layer that is called now runs again for a backward pass: a checkpointed one,
    which had this input before."""
    import torch

    return torch._C._current_graph_task_id() != -1


def _is_layer(module: nn.Module) -> bool:
    """Tell the layers that transformers checkpoints one by one from the model that holds them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)
