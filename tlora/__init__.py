"""TLoRA, task-aware low-rank adaptation, on stock PEFT.

The names below are the public API. They are imported on first use (PEP 562), so that importing
the package loads neither torch nor PEFT.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlora.adapter import build_adapter, fold_scaling, freeze_a
    from tlora.allocation import Allocation, allocate
    from tlora.model import get_tlora_model
    from tlora.sensitivity import sensitivity
    from tlora.subspace import input_subspaces

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "allocate",
    "build_adapter",
    "fold_scaling",
    "freeze_a",
    "get_tlora_model",
    "input_subspaces",
    "sensitivity",
]

_HOMES = {
    "Allocation": "allocation",
    "allocate": "allocation",
    "build_adapter": "adapter",
    "fold_scaling": "adapter",
    "freeze_a": "adapter",
    "get_tlora_model": "model",
    "input_subspaces": "subspace",
    "sensitivity": "sensitivity",
}


class _Package(ModuleType):
    """Keeps `tlora.sensitivity` the function, whatever is imported first.

    The import system binds each submodule as an attribute of its package; for the one that shares
    its name with a public function, that would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
