"""The best of a method's trials on the validation split."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tlora.artefact import read_json, write_json
from tlora.errors import UserError

logger = logging.getLogger(__name__)


def choose(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write chosen.json: all trials, the winner, and whether it lies at an edge of the grid.

    Of equally good trials the first in the grid's order wins. A trial that failed wins never.

    Parameters
    ----------
    spec
        `trials`: what each sets, and the id of its score.
    inputs
        `trial0`, `trial1`, ...: score.json of each.
    out
        Gets chosen.json: `metric`, `higher_is_better`, `n`, `trials` (settings, score, value or
        `failed`), `winner` (an index), `settings` (the winner's) and `edges`: the settings whose
        winning value is the "lower" or "upper" end of the numbers that were tried.

    Raises
    ------
    UserError
        When every trial failed, or they were not judged by one metric.
    """
    trials, known = [], {}
    for number, trial in enumerate(spec["trials"]):
        score = read_json(inputs[f"trial{number}"])
        entry = {**trial, "value": score.get("value")}
        if "failed" in score:
            entry["failed"] = score["failed"]
        else:
            about = score["metric"], score.get("higher_is_better", True), score["n"]
            known.setdefault(about, number)
        trials.append(entry)
    if not known:
        reasons = "; ".join(trial["failed"] for trial in trials)
        raise UserError(f"tune: all {len(trials)} trials failed: {reasons[:500]}")
    if len(known) > 1:
        raise UserError(f"tune: trials differ in metric or items: {sorted(map(str, known))}")
    ((metric, higher, n),) = known
    good = [number for number, trial in enumerate(trials) if "failed" not in trial]
    sign = 1 if higher else -1
    winner = max(good, key=lambda number: (sign * trials[number]["value"], -number))
    chosen = trials[winner]["settings"]
    write_json(
        Path(out) / "chosen.json",
        {
            "metric": metric,
            "higher_is_better": higher,
            "n": n,
            "trials": trials,
            "winner": winner,
            "settings": chosen,
            "edges": edges([trial["settings"] for trial in trials], chosen),
        },
    )
    logger.info("trial %d of %d: %s: %s %s", winner + 1, len(trials), chosen, metric, n)


def edges(tried: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, str]:
    """Return "lower" or "upper" for every number that was chosen at the end of those tried.

    A setting with a single value has no end.
    """
    found = {}
    for key, value in chosen.items():
        values = sorted({settings[key] for settings in tried if _number(settings[key])})
        if _number(value) and len(values) > 1 and value in (values[0], values[-1]):
            found[key] = "lower" if value == values[0] else "upper"
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
