"""The registry of scorers: each is a module of this folder, found by name; none loads torch.

A scorer holds the function `score(records) -> dict`, which turns completions into verdicts, and
where it needs them:

`Options`
    A dataclass, filled from the benchmark's `options:`; then the signature is
    `score(records, options)`.
`CONTEXT = True`
    Then a `Context` follows: `score(records, options, context)`.

A record holds `id`, `completion` and `reference`, and whatever else stands in its line of
generations.jsonl.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tlora.errors import UserError


@dataclasses.dataclass(frozen=True)
class Context:
    """Where and how a scorer works; nothing in it changes a verdict.

    Attributes
    ----------
    work
        Folder for verdicts reached so far, which the next attempt of the same job (spec, inputs and
        code are equal) finds again; None where nothing is kept.
    place
        `workers` (processes), and what else the job was handed.
    """

    work: Path | None = None
    place: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Processes to use at once."""
        return int(self.place.get("workers") or 1)


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a scorer that has none."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A scorer's module with defaults for what it leaves out."""

    module: ModuleType

    @property
    def options_type(self) -> type:
        """The dataclass of its options."""
        return getattr(self.module, "Options", NoOptions)

    def score(
        self,
        records: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
        context: Context | None = None,
    ) -> dict[str, Any]:
        """Return the content of score.json.

        Raises
        ------
        UserError
            Records or options that the scorer refuses.
        """
        arguments: list[Any] = []
        wants_context = getattr(self.module, "CONTEXT", False)
        if hasattr(self.module, "Options") or wants_context:
            try:
                arguments.append(self.options_type(**(options or {})))
            except (TypeError, ValueError) as error:
                raise UserError(f"options: {error}") from error
        if wants_context:
            arguments.append(context or Context())
        return self.module.score(records, *arguments)


def names() -> list[str]:
    """Return the names of all scorers."""
    files = Path(__file__).parent.glob("*.py")
    # Read rather than imported: one scorer must not load all the others.
    return sorted(file.stem for file in files if "\ndef score(" in file.read_text("utf-8"))


def load(name: str) -> Scorer:
    """Return the scorer of a module `tlora/benchmarks/{name}.py`.

    Raises
    ------
    UserError
        For an unknown name, with the nearest known one.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"implementation: {name!r}: no such scorer: {hint}expected one of " + ", ".join(known)
        )
    return Scorer(importlib.import_module(f"{__name__}.{name}"))


def summarise(
    items: Sequence[dict[str, Any]],
    further: Mapping[str, float] | None = None,
    metric: str = "accuracy",
    value: float | None = None,
) -> dict[str, Any]:
    """Return the content of score.json from per-item verdicts.

    Parameters
    ----------
    items
        Each with `id`, `correct` and `extracted` (None: no answer could be read).
    further
        Metrics beside the headline one.
    metric
        The name of the headline metric.
    value
        Its value; by default the share of items that are correct.

    Raises
    ------
    UserError
        For no items at all.
    """
    if not items:
        raise UserError("no items: expected at least one completion to score")
    if value is None:
        value = sum(item["correct"] for item in items) / len(items)
    return {
        "n": len(items),
        "metric": metric,
        "value": value,
        "metrics": {metric: value, **(further or {})},
        "unextracted": sum(item["extracted"] is None for item in items),
        "items": list(items),
    }
