"""The registry of methods: each is a module of this folder, found by name and imported lazily.

A method module holds a dataclass `Options` and the hook `adapt`; everything else has a default:

`ADAPTER`
    False for a method that trains the model itself. Default True.
`INITIALIZES`
    True where A0 and B0 come from weights or data: then `adapt` runs in a job of its own, whose
    result all seeds share. Default False: `adapt` runs at the start of training with the run's
    seed.
`statistics(options) -> {statistic: its options}`
    The calibration statistics that `adapt` reads. Default none.
`allocation(options) -> options of the allocation, or None`
    Whether ranks and scalings are allocated. Default None.
`reads_batches(options) -> bool`
    Whether `adapt` runs the model on calibration samples. Default False.
`adapt(model, options, context) -> model`
    Put the adapter on the model; afterwards its logits equal the base model's.
`trainer(model, options, context) -> {"callbacks": ..., "mixin": ...}`
    What differs from plain training: keyword arguments of the Trainer, and under "mixin" a class
    whose methods (`create_optimizer`, `compute_loss`, ...) go before the Trainer's own. `context`
    is the run's spec with "steps", the number of optimizer steps. Default nothing.
`merges(options) -> bool`
    Whether the trained adapter has no plain LoRA form and is exported merged into the base model,
    in place of `export`. Default False.
`export(trained, initial, out, options) -> form`
    Write what others load; "adapter" or "model". Default: the saved adapter on the unmodified
    base model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tlora.errors import UserError


@dataclass(frozen=True)
class Context:
    """What `adapt` may use.

    Parameters
    ----------
    rank, lora_alpha, target_modules
        The task's rank budget and targets.
    seed
        The run's seed where `adapt` runs at the start of training, the calibration seed otherwise.
    allocation
        The file with rank and scaling per module, where the method allocates.
    statistics
        The main file of every calibration statistic asked for.
    batches
        Returns the calibration samples as batches (dicts of tensors), where the method reads them.
    """

    rank: int
    lora_alpha: float
    target_modules: str | list[str]
    seed: int
    allocation: Path | None = None
    statistics: dict[str, Path] = field(default_factory=dict)
    batches: Callable[[], Iterable[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class Method:
    """A method module with the defaults of what it leaves out."""

    module: ModuleType

    @property
    def adapter(self) -> bool:
        """Whether the method trains an adapter."""
        return getattr(self.module, "ADAPTER", True)

    @property
    def initializes(self) -> bool:
        """Whether `adapt` runs in a job of its own."""
        return getattr(self.module, "INITIALIZES", False)

    def options(self, values: dict[str, Any]) -> Any:
        """Build the method's `Options`."""
        return self.module.Options(**values)

    def _call(self, hook: str, default: Any, *arguments: Any) -> Any:
        function = getattr(self.module, hook, None)
        return default if function is None else function(*arguments)

    def statistics(self, options: Any) -> dict[str, dict]:
        """Return the calibration statistics that `adapt` reads, with their options."""
        return self._call("statistics", {}, options)

    def allocation(self, options: Any) -> dict | None:
        """Return the allocation's options, None where the method does not allocate."""
        return self._call("allocation", None, options)

    def reads_batches(self, options: Any) -> bool:
        """Tell whether `adapt` runs the model on calibration samples."""
        return self._call("reads_batches", False, options)

    def adapt(self, model: Any, options: Any, context: Context) -> Any:
        """Put the adapter on the model.

        Raises
        ------
        UserError
            Naming the method: targets that match nothing or are quantised, and what else the
            method does not fit.
        """
        name = self.module.__name__.rpartition(".")[2]
        try:
            if self.adapter:
                from tlora.modules import find_targets

                find_targets(model, context.target_modules)
            return self.module.adapt(model, options, context)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    def trainer(self, model: Any, options: Any, context: Any) -> dict[str, Any]:
        """Return keyword arguments of the Trainer that differ from plain training."""
        return self._call("trainer", {}, model, options, context)

    def merges(self, options: Any) -> bool:
        """Tell whether the trained adapter is exported merged into the base model."""
        return self._call("merges", False, options)

    def export(self, trained: Path, initial: Path | None, out: Path, options: Any) -> str:
        """Write the trained weights in the form that others load; return the form."""
        function = getattr(self.module, "export", None)
        if function is not None:
            return function(trained, initial, out, options)
        from tlora.adapter import export_adapter

        export_adapter(trained, initial, out)
        return "adapter"


def load(name: str) -> Method:
    """Return the method of a module `tlora/methods/{name}.py`; torch is not imported by this."""
    return Method(importlib.import_module(f"tlora.methods.{name}"))
