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
`unfit(options, base) -> reason, or None`
    Why the method cannot work on a base model (`Base`). Asked before any job starts, with what the
    model's files tell, and again before `adapt`. Default None.
`adapt(model, options, context) -> model`
    Put the adapter on the model; afterwards its logits equal the base model's.
`skeleton(model, options, context) -> model`
    Put the adapter's shape on a model without weights (torch's meta device), for counting its
    parameters. Default `adapt`; where that computes A0 and B0, `plain_lora`.
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
import re
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
    ranks
        Rank by full module name where the ranks are known to differ; read by `skeleton` only.
    """

    rank: int
    lora_alpha: float
    target_modules: str | list[str]
    seed: int
    allocation: Path | None = None
    statistics: dict[str, Path] = field(default_factory=dict)
    batches: Callable[[], Iterable[dict[str, Any]]] | None = None
    ranks: dict[str, int] | None = None


@dataclass(frozen=True)
class Base:
    """What of a base model decides whether a method fits it.

    Parameters
    ----------
    rank
        The rank budget; None for a method without adapter.
    targets
        Shape of every target's weight by full module name; {} where it is not known.
    conv1d
        Whether the targets are GPT-2's Conv1D, whose weights are stored as (in, out).
    seq2seq
        Whether it is an encoder-decoder model.
    quantised
        How its weights are quantised, None where they are not or it is not known.
    """

    rank: int | None = None
    targets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    conv1d: bool = False
    seq2seq: bool = False
    quantised: str | None = None


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

    @property
    def name(self) -> str:
        """The module's name."""
        return self.module.__name__.rpartition(".")[2]

    def unfit(self, options: Any, base: Base) -> str | None:
        """Return why the method cannot work on a base model, None where it can."""
        if base.quantised is not None:
            return f"base model: quantised weights ({base.quantised}): expected full-precision ones"
        return self._call("unfit", None, options, base)

    def adapt(self, model: Any, options: Any, context: Context) -> Any:
        """Put the adapter on the model.

        Raises
        ------
        UserError
            Naming the method: targets that match nothing or are quantised, and what else the
            method does not fit.
        """
        try:
            reason = self.unfit(options, self._base(model, context))
            if reason is not None:
                raise UserError(reason)
            return self.module.adapt(model, options, context)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def _base(self, model: Any, context: Context) -> Base:
        """Describe a model in memory."""
        seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        if not self.adapter:
            packed = {str(p.dtype) for p in model.parameters() if not p.is_floating_point()}
            if getattr(model, "is_quantized", False):
                packed.add("by its configuration")
            return Base(seq2seq=seq2seq, quantised=min(packed, default=None))
        from tlora.modules import find_targets, is_conv1d

        targets = find_targets(model, context.target_modules)
        return Base(
            rank=context.rank,
            targets={name: tuple(module.weight.shape) for name, module in targets.items()},
            conv1d=any(map(is_conv1d, targets.values())),
            seq2seq=seq2seq,
        )

    def skeleton(self, model: Any, options: Any, context: Context) -> Any:
        """Put the adapter's shape on a model without weights."""
        function = getattr(self.module, "skeleton", None)
        if function is not None:
            return function(model, options, context)
        if self.initializes:
            return plain_lora(model, context)
        return self.module.adapt(model, options, context)

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


def plain_lora(model: Any, context: Context) -> Any:
    """Put PEFT's LoRA on the model, with `context.ranks` where they are given."""
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = context.target_modules
    ranks = {name: rank for name, rank in (context.ranks or {}).items() if rank > 0}
    if ranks:
        targets = "|".join(map(re.escape, ranks))  # a listed name would match endings, too
    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=targets,
        rank_pattern={"^" + re.escape(name): rank for name, rank in ranks.items()},
    )
    return get_peft_model(model, config)


def load(name: str) -> Method:
    """Return the method of a module `tlora/methods/{name}.py`; torch is not imported by this."""
    return Method(importlib.import_module(f"tlora.methods.{name}"))
