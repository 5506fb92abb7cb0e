"""How many parameters a method trains, counted on the architecture alone: no weights are loaded.

The real model class is built from its config.json on torch's meta device, which holds shapes and no
numbers, and the method puts its adapter's shape on it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import read_json
from tlora.config import Library, Model, module_of, typed
from tlora.errors import UserError
from tlora.methods import Base, Context, Method, load
from tlora.peft_folder import read_config
from tlora.weights import (
    ALL_LINEAR,
    CONV1D,
    check_rank,
    is_local,
    match_targets,
    matrices,
    quantisation,
    shapes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Count:
    """Exact numbers of parameters.

    Parameters
    ----------
    base
        Of the base model; a weight that two modules share counts once.
    kinds
        Trained ones by kind of module, the last part of its name ("q_proj").
    modules
        Modules of each kind that have trained parameters.
    """

    base: int
    kinds: dict[str, int]
    modules: dict[str, int]

    @property
    def trainable(self) -> int:
        """Trained parameters of all kinds."""
        return sum(self.kinds.values())


@functools.lru_cache(maxsize=8)
def on_meta(source: str, architecture: str, revision: str | None = None) -> PreTrainedModel:
    """Build a model's architecture on the meta device. The result is shared: copy to change it.

    Parameters
    ----------
    source
        A folder with config.json, such a file, or a repository of the hub.
    architecture
        "causal" or "seq2seq".
    revision
        Commit of the repository.

    Raises
    ------
    UserError
        No configuration there, or one of a model that transformers does not have.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if architecture == "seq2seq" else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            return kind.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source}: no {architecture} model's config.json: {reason}") from error


def source_of(name: str, model: Model, library: Library) -> str:
    """Return where a model's configuration is.

    Its own folder, config/models/architectures/{name}.json where there is none, else the hub.
    """
    if is_local(model.path) and (Path(model.path).expanduser() / "config.json").is_file():
        return str(Path(model.path).expanduser())
    written = library.folder / "models" / "architectures" / f"{name}.json"
    if written.is_file():
        return str(written)
    if is_local(model.path):
        raise UserError(
            f"{library.folder}/models/{name}.yaml: path: {model.path!r}: expected a folder with "
            f"config.json, or {written}"
        )
    return model.path


def count(model: PreTrainedModel, method: Method, options: Any, context: Context) -> Count:
    """Count what a method trains.

    Parameters
    ----------
    model
        An architecture on the meta device, as `on_meta` returns it; it is not changed.
    method, options
        The method and its options.
    context
        Rank budget, targets, and `ranks` where they are known.

    Raises
    ------
    UserError
        Targets that match nothing, a rank above a target's smaller side, ranks that do not fit, or
        a model that the method does not fit.
    """
    import torch

    adapted = copy.deepcopy(model)
    owners = {name for name, module in adapted.named_modules() if module._parameters}
    _check(adapted, method, options, context)
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT asks transformers for a name that transformers calls deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            adapted = method.skeleton(adapted, options, context)
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"tlora/methods/{method.name}.py: adapt: needs weights: expected `skeleton` beside "
                f"it ({reason})"
            ) from error
    kinds: dict[str, int] = {}
    trained: dict[str, set[str]] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            owner = _owner(name, owners)
            kind = owner.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0) + parameter.numel()
            trained.setdefault(kind, set()).add(owner)
    base = sum(parameter.numel() for parameter in model.parameters())
    return Count(base, kinds, {kind: len(found) for kind, found in trained.items()})


def _owner(parameter: str, owners: set[str]) -> str:
    """Return the base model's module that a parameter belongs to."""
    parts = parameter.removeprefix(_PREFIX).split(".")[:-1]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in owners:
            return ".".join(parts[:end])
    return ".".join(parts)


def _check(model: PreTrainedModel, method: Method, options: Any, context: Context) -> None:
    weights = matrices({name: tuple(p.shape) for name, p in model.named_parameters()})
    targets: dict[str, tuple[int, ...]] = {}
    if method.adapter:
        name = type(model).__name__
        targets = match_targets(weights, context.target_modules, name, method.name)
        if context.ranks is None:
            check_rank(targets, context.rank, method.name)
    config = model.config.to_dict()
    base = Base(
        rank=context.rank if method.adapter else None,
        targets=targets,
        conv1d=config.get("model_type") in CONV1D,
        seq2seq=bool(config.get("is_encoder_decoder")),
        quantised=quantisation(config),
    )
    reason = method.unfit(options, base)
    if reason is not None:
        raise UserError(f"{method.name}: {reason}")
    if context.ranks is not None:
        if not method.initializes:
            raise UserError(f"{method.name}: its ranks are not allocated: expected no allocation")
        for name, rank in context.ranks.items():
            if name not in weights:
                raise UserError(
                    f"{name}: no module of {type(model).__name__} has the allocation's name"
                )
            check_rank({name: weights[name]}, rank, "allocation")


def read_ranks(path: Path) -> dict[str, int]:
    """Return the rank of every module.

    Parameters
    ----------
    path
        An allocation.json, or the folder of a saved LoRA adapter.

    Raises
    ------
    UserError
        Neither of them.
    """
    if path.is_dir():
        read_config(path)
        return {
            name.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): shape[0]
            for name, shape in shapes(str(path)).items()
            if name.endswith(".lora_A.weight")
        }
    if not path.is_file():
        raise UserError(f"{path}: no such file: expected allocation.json, or an adapter's folder")
    from tlora.allocation import Allocation

    content = read_json(path)
    if not isinstance(content, dict) or "modules" not in content:
        raise UserError(f"{path}: modules: expected an allocation with this key")
    return Allocation.from_json(content).ranks


def table(
    library: Library,
    model_name: str,
    names: Iterable[str],
    rank: int,
    target_modules: str | list[str] = ALL_LINEAR,
    allocation: Path | None = None,
) -> str:
    """Return a table of the parameters that methods train, a column a method.

    Parameters
    ----------
    library
        The configuration folder.
    model_name, names
        A model and methods of it.
    rank, target_modules
        As a task gives them.
    allocation
        What `read_ranks` reads, for methods whose ranks are allocated; without it their ranks are
        taken as equal.

    Raises
    ------
    UserError
        An unknown name, or what `count` refuses.
    """
    model, _ = library.model(model_name, "params")
    ranks = None if allocation is None else read_ranks(allocation)
    # lora_alpha changes no count.
    context = Context(rank, float(rank), target_modules, seed=0, ranks=ranks)
    chosen = {name: _method(library, name) for name in names}
    architecture = on_meta(
        source_of(model_name, model, library), model.architecture, model.revision
    )
    counts = {name: count(architecture, *entry, context) for name, entry in chosen.items()}
    said = [
        f"{name}: ranks taken as equal; --allocation gives those of a run"
        for name, (method, options) in chosen.items()
        if ranks is None and (method.allocation(options) or {}).get("rank")
    ]
    targets = target_modules if isinstance(target_modules, str) else " ".join(target_modules)
    given = f"rank {rank}" if allocation is None else f"ranks of {allocation}"
    head = f"{model.label or model_name}: {given}, target modules {targets}"
    return "\n".join([head, "", *_lines(counts), *([""] if said else []), *said])


def _method(library: Library, name: str) -> tuple[Method, Any]:
    config, document = library.method(name, "params")
    module_of(document, "implementation", "methods", config.implementation)
    method = load(config.implementation)
    return method, typed(document, ("options",), method.module.Options, config.options)


def _lines(counts: Mapping[str, Count]) -> list[str]:
    kinds = list(dict.fromkeys(kind for one in counts.values() for kind in one.kinds))
    rows = [["Module", "Count", *counts]]
    for kind in kinds:
        modules = max(one.modules.get(kind, 0) for one in counts.values())
        rows.append(
            [kind, str(modules), *(f"{one.kinds.get(kind, 0):,}" for one in counts.values())]
        )
    rows.append(["Trainable", "", *(f"{one.trainable:,}" for one in counts.values())])
    rows.append(["Base model", "", *(f"{one.base:,}" for one in counts.values())])
    rows.append(["Share", "", *(f"{one.trainable / one.base:.4%}" for one in counts.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1 : 1 + len(kinds)], rule, *lines[1 + len(kinds) :]]
