"""Scores of lm-evaluation-harness, as that library aggregates them.

The completions come from tlora/tasks/lm_eval.py: the library evaluates where the model is, and its
verdicts stand in every line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlora.benchmarks import summarise
from tlora.errors import UserError


@dataclass(frozen=True)
class Options:
    """Which of the task's metrics is the headline.

    Attributes
    ----------
    metric
        A metric of the task ("acc_norm"), where it has filters with one of them
        ("exact_match,flexible-extract"); by default the first one that the library reports.
    """

    metric: str | None = None


def score(records: Sequence[Mapping[str, Any]], options: Options) -> dict[str, Any]:
    """Return the library's own results, and its verdict on every item.

    Parameters
    ----------
    records
        Lines as tlora/tasks/lm_eval.py makes them, all of them: the first holds the `results`.
    options
        Which metric is the headline.

    Returns
    -------
    dict
        Content of score.json. An item's `value` is what the headline metric says of it, `correct`
        whether that is 1 where it is 0 or 1; `extracted` is what was read off the completion.
        Under `lm_eval` stand the task, its version and the library's.

    Raises
    ------
    UserError
        Lines of another origin, a line that is missing, or an unknown metric.
    """
    results = records[0].get("results") if records else None
    if not isinstance(results, dict) or not {"task", "n", "metric", "metrics"} <= results.keys():
        raise UserError(
            "results: expected the results of lm_eval in the first line, as its benchmarks have"
        )
    if len(records) != results["n"]:
        raise UserError(f"n: {results['n']}: {len(records)} lines: expected as many")
    known = results["metrics"]
    metric = options.metric or results["metric"]
    if metric not in known:
        raise UserError(
            f"options: metric: {metric!r}: no such metric of {results['task']}: expected one of "
            + ", ".join(known)
        )
    items = [_item(record, metric) for record in records]
    further = {name: value for name, value in known.items() if name != metric}
    about = {key: value for key, value in results.items() if key not in ("metric", "metrics", "n")}
    return {**summarise(items, further, metric=metric, value=known[metric]), "lm_eval": about}


def _item(record: Mapping[str, Any], metric: str) -> dict[str, Any]:
    try:
        value, answers = record["metrics"].get(metric), record["answers"]
    except (KeyError, AttributeError) as error:
        raise UserError(
            f"item {record['id']!r}: metrics, answers: expected both, as lm_eval's items have"
        ) from error
    chosen = metric.partition(",")[2] or "none"
    return {
        "id": record["id"],
        "correct": bool(value) if value in (0, 1) else None,
        "extracted": answers.get(chosen, record["completion"]),
        "value": value if isinstance(value, int | float) else None,
    }
