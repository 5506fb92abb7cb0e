"""Verdicts on completions, by the benchmark's rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlora.artefact import read_json, remove, stamped, write_json
from tlora.benchmarks import Context, load
from tlora.errors import UserError

FIELDS = ("id", "completion", "reference")


def score(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write score.json for the completions of `inputs["generate"]`.

    A run that failed the adapter gate (`inputs["check"]`) is not scored: score.json then holds the
    reason under "failed".

    Raises
    ------
    UserError
        Completions that cannot be scored.
    """
    target = Path(out) / "score.json"
    if "check" in inputs and not (verdict := read_json(inputs["check"]))["passed"]:
        reason = verdict.get("failed") or "adapter gate: " + "; ".join(verdict["reasons"])
        write_json(target, {"failed": reason})
        return
    work = stamped(Path(place["work"]), place["stamp"])
    context = Context(work, place)
    score_file(spec["implementation"], inputs["generate"], target, spec["options"], context)
    remove(work)


def score_file(
    implementation: str,
    generations: Path,
    out: Path,
    options: Mapping[str, Any] | None = None,
    context: Context | None = None,
) -> dict[str, Any]:
    """Score a file of completions from anywhere, write the verdicts and return them.

    Parameters
    ----------
    implementation
        A scorer: a module of tlora/benchmarks.
    generations
        One JSON object a line with `id`, `completion` and `reference`.
    out
        The file to write; equal input gives equal bytes.
    options
        The scorer's.
    context
        Where and how to work.

    Raises
    ------
    UserError
        An unknown scorer, a missing, empty or broken file, or one the scorer refuses.
    """
    scorer = load(implementation)
    records = read_generations(generations)
    try:
        content = scorer.score(records, options, context)
    except UserError as error:
        raise UserError(f"{generations}: {error}") from error
    write_json(Path(out), content)
    return content


def read_generations(path: Path) -> list[dict[str, Any]]:
    """Read and check a file of completions.

    Raises
    ------
    UserError
        With the number of the line that is broken, lacks a field or repeats an id.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected a file of completions") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not valid UTF-8: {error.reason}") from error
    records: list[dict[str, Any]] = []
    lines: dict[Any, int] = {}
    # Not splitlines: it also splits at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UserError(f"{path}:{number}: not valid JSON: {reason}") from error
        _check(record, f"{path}:{number}")
        if record["id"] in lines:
            raise UserError(
                f"{path}:{number}: id: {record['id']!r}: stands in line "
                f"{lines[record['id']]} already: expected distinct ids"
            )
        lines[record["id"]] = number
        records.append(record)
    if not records:
        raise UserError(f"{path}: no completions: expected at least one line of JSON")
    return records


def _check(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: {str(record)[:60]}: expected a JSON object")
    for field in FIELDS:
        if field not in record:
            raise UserError(f"{where}: {field}: missing: expected {', '.join(FIELDS)}")
    if not isinstance(record["id"], str | int) or isinstance(record["id"], bool):
        raise UserError(f"{where}: id: {record['id']!r}: expected text or an integer")
    if not isinstance(record["completion"], str):
        raise UserError(f"{where}: completion: {str(record['completion'])[:60]}: expected text")
