"""From an allocation and subspaces to a stock PEFT adapter, and back from saved ones."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import staged
from tlora.errors import UserError
from tlora.modules import find_layers, forwards, is_conv1d
from tlora.peft_folder import (
    CONFIG,
    WEIGHTS,
    export_adapter,
    fold_scaling,
    public_name,
    read_config,
    write_config,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn

    from tlora.allocation import Allocation

__all__ = [
    "build_adapter",
    "export_adapter",
    "fold_scaling",
    "freeze_a",
    "frozen_names",
    "fused",
    "load_initial",
    "save_initial",
]

_ADAPTER = "default"


def build_adapter(
    model: nn.Module,
    allocation: Allocation,
    subspaces: Mapping[str, Tensor],
    freeze_a: bool = True,
) -> PeftModel:
    """Put a stock PEFT LoRA adapter on the model: A from the subspaces, B zero.

    Parameters
    ----------
    model
        The base model; its weights are not changed.
    allocation
        Rank and scaling by full module name; rank 0 gets no adapter.
    subspaces
        (rank, in_features) by full module name.
    freeze_a
        Register A as frozen with PEFT: `set_adapter`, `disable_adapter`, merging and training keep
        it so. Loading a saved folder does not: call `tlora.freeze_a` then.

    Raises
    ------
    UserError
        Where a subspace is missing or has another shape, or no module has a rank.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    ranks = {name: module.rank for name, module in allocation.items() if module.rank > 0}
    if not ranks:
        raise UserError("allocation: every rank is 0: expected at least one adapter")
    layers = find_layers(model, ranks)
    for name, rank in ranks.items():
        shape = (rank, allocation[name].shape[1])
        found = tuple(subspaces[name].shape) if name in subspaces else None
        if found != shape:
            raise UserError(f"{name}: subspace of shape {found}: expected {shape}")
    config = LoraConfig(
        task_type=_task_type(model),
        r=allocation.r,
        lora_alpha=allocation.lora_alpha,
        target_modules=_targets(model, ranks),
        rank_pattern={_key(name): rank for name, rank in ranks.items()},
        alpha_pattern={_key(name): allocation[name].peft_alpha for name in ranks},
        fan_in_fan_out=all(is_conv1d(layer) for layer in layers.values()),
        lora_dropout=0.0,
        bias="none",
    )
    peft_model = get_peft_model(model, config)
    config.base_model_name_or_path = public_name(config.base_model_name_or_path)
    adapted = dict(_lora_layers(peft_model))
    if adapted.keys() != ranks.keys():
        raise RuntimeError(f"PEFT adapted {sorted(adapted.keys() ^ ranks.keys())} unexpectedly")
    with torch.no_grad():
        for name, layer in adapted.items():
            layer.lora_A[_ADAPTER].weight.copy_(subspaces[name])
    if freeze_a:
        _freeze(peft_model, ("lora_A",))
    return peft_model


def _key(name: str) -> str:
    """Return a pattern that matches this full name only."""
    return "^" + re.escape(name)


def _targets(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """Return `target_modules` that PEFT matches with exactly these full names.

    PEFT takes a listed name as the end of a name, too; where that hits another module, a regular
    expression says it exactly.
    """
    names = sorted(names)
    wanted = set(names)
    endings = tuple(f".{name}" for name in names)
    others = (name for name, _ in model.named_modules() if name not in wanted)
    if any(name.endswith(endings) for name in others):
        return "|".join(re.escape(name) for name in names)
    return names


def _task_type(model: nn.Module) -> str | None:
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def _lora_layers(model: nn.Module, adapter_name: str = _ADAPTER) -> Iterable[tuple[str, LoraLayer]]:
    """Yield the layers that carry the adapter, by their name in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield name, module


def freeze_a(model: PeftModel, adapter_name: str = _ADAPTER) -> PeftModel:
    """Freeze A of a LoRA adapter so that PEFT keeps it frozen; returns the same model.

    Needed after `PeftModel.from_pretrained(..., is_trainable=True)`, because saved adapters do not
    say what was frozen.

    Raises
    ------
    UserError
        Where the model has no LoRA adapter of this name.
    """
    return _freeze(model, ("lora_A",), adapter_name)


def _freeze(model: PeftModel, names: Iterable[str], adapter_name: str = _ADAPTER) -> PeftModel:
    layers = list(_lora_layers(model, adapter_name))
    if not layers:
        raise UserError(f"model: has no LoRA adapter {adapter_name!r}")
    for _, layer in layers:
        # requires_grad_(False) alone is undone by set_adapter and disable_adapter.
        layer.frozen_peft_weight_names = {
            **layer.frozen_peft_weight_names,
            adapter_name: tuple(names),
        }
        layer._freeze_non_trainable_peft_weights(adapter_name)
    return model


def frozen_names(model: PeftModel, adapter_name: str = _ADAPTER) -> list[str]:
    """Return which of the adapter's weights are registered as frozen: ["lora_A"] or []."""
    found = {
        name
        for _, layer in _lora_layers(model, adapter_name)
        for name in layer.frozen_peft_weight_names.get(adapter_name, ())
    }
    return sorted(found)


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within it, plain LoRA layers add their branch in one kernel, and cast nothing twice.

    PEFT computes base + (B h) * scaling in three passes over what is as large as the output, and
    under autocast it casts the input to A's float32 first, which autocast undoes. Here it is one
    `torch.addmm` into the base's output: the same function to rounding, and in bfloat16 rounded
    once and not three times. The model keeps its classes, parameters and names; layers of another
    kind (dropout, DoRA, a bias, quantised, Conv1D) and calls of another kind are PEFT's. ZeRO-3
    gathers what a module's call needs, and B is read without one: leave it out there.

    Parameters
    ----------
    model
        Any model, with or without adapters.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    with forwards({layer: _fused_forward(layer) for layer in layers}):
        yield


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's LoRA of a linear layer, with one adapter and nothing more."""
    from peft.tuners.lora import Linear
    from torch import nn

    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and list(module.lora_A) == [_ADAPTER]
        and not module.lora_variant
        and isinstance(module.lora_dropout[_ADAPTER], nn.Identity)
        and module.lora_B[_ADAPTER].bias is None
    )


def _fused_forward(layer: LoraLayer) -> Callable[..., Tensor]:
    import torch

    stock, base = layer.forward, layer.base_layer
    a, b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other_call = args or kwargs or layer.disable_adapters or layer.merged
        cast = x.dtype != a.weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if other_call or cast or layer.active_adapters != [_ADAPTER]:
            return stock(x, *args, **kwargs)
        result = base(x)
        added = torch.addmm(
            result.flatten(0, -2),
            a(x).flatten(0, -2),
            b.weight.t(),
            alpha=layer.scaling[_ADAPTER],
        )
        return added.view_as(result)

    return forward


def save_initial(model: PeftModel, out_dir: Path | str, base_model: str = "") -> list[str]:
    """Save A0 and B0 as a plain PEFT folder; equal adapters give equal bytes.

    Parameters
    ----------
    model
        A model with a LoRA adapter.
    out_dir
        Gets `adapter_config.json` and `adapter_model.safetensors`.
    base_model
        The base model's public name for the configuration.

    Returns
    -------
    list of str
        What `load_initial` takes as `frozen`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with staged(out_dir / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_config(out_dir, model.peft_config[_ADAPTER].to_dict(), base_model)
    return frozen_names(model)


def load_initial(
    model: nn.Module, init_dir: Path | str, frozen: Iterable[str] = ("lora_A",)
) -> PeftModel:
    """Return a trainable adapter from a folder that `save_initial` wrote.

    Where B0 is not 0, scaling * B0 A0 is subtracted from the base weights in memory, so that the
    outputs equal the base model's to rounding; `export_adapter` adds it back.

    Parameters
    ----------
    model
        The unmodified base model. Changed in place where B0 is not 0.
    init_dir
        The folder.
    frozen
        Weights to freeze, as `save_initial` returned them.

    Raises
    ------
    UserError
        Where the folder is no LoRA adapter or does not fit the model.
    """
    import torch
    from peft import PeftModel
    from safetensors import safe_open

    init_dir = Path(init_dir)
    read_config(init_dir)
    with safe_open(init_dir / WEIGHTS, framework="pt") as file:
        stored = len(file.keys())
    try:
        peft_model = PeftModel.from_pretrained(model, str(init_dir), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{init_dir / CONFIG}: does not fit the base model: {reason}") from error
    layers = dict(_lora_layers(peft_model))
    if 2 * len(layers) > stored:
        raise UserError(f"{init_dir / WEIGHTS}: expected A and B of {len(layers)} modules")
    with torch.no_grad():
        for layer in layers.values():
            if layer.lora_B[_ADAPTER].weight.any():
                weight = layer.get_base_layer().weight
                delta = layer.get_delta_weight(_ADAPTER).float()
                weight.copy_(weight.float() - delta)
    frozen = list(frozen)
    return _freeze(peft_model, frozen) if frozen else peft_model
