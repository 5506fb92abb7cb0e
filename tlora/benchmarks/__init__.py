"""Scorers, found by name: `score(records) -> dict` turns completions into verdicts; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tlora.errors import UserError


def summarise(
    items: Sequence[dict[str, Any]], further: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return the content of score.json from per-item verdicts.

    Parameters
    ----------
    items
        Each with `id`, `correct` and `extracted` (None: no answer could be read).
    further
        Metrics beside the accuracy, as shares.

    Raises
    ------
    UserError
        For no items at all.
    """
    if not items:
        raise UserError("no items: expected at least one completion to score")
    accuracy = sum(item["correct"] for item in items) / len(items)
    return {
        "n": len(items),
        "metric": "accuracy",
        "value": accuracy,
        "metrics": {"accuracy": accuracy, **(further or {})},
        "unextracted": sum(item["extracted"] is None for item in items),
        "items": list(items),
    }
