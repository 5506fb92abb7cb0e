"""The items of the index page: completions and verdicts in small files that are loaded on demand.

A page opened from a file may not read other files, but may add scripts. So every file is a script
that calls `tloraData(name, value)`; its name is its path below the folder without `.js`:

`items/{place}/verdicts`
    Ids of all items of a benchmark, verdicts of every run, names of the scorer's further fields.
`items/{place}/prompts/{page}`
    [prompt, reference] of the page's items.
`items/{place}/{run}/{page}`
    What a run said of the page's items: [completion, extracted, finish reason, tokens, further
    fields] and, where it was asked otherwise than the first run, its own [prompt, reference];
    0 where it has no such item.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlora.artefact import read_json
from tlora.errors import UserError

PAGE = 200
"""Items in one file."""

KNOWN = ("id", "correct", "value", "extracted", "turn")
"""Fields of a scored item that have their own place."""


@dataclass(frozen=True)
class Source:
    """Where the items of one run on one benchmark are: generations.jsonl and score.json.

    `run` is the number of the run on the page.
    """

    run: int
    generations: Path
    score: Path | None


@dataclass
class Place:
    """All runs of one benchmark of one section, as far as written.

    Attributes
    ----------
    positions
        Place of every item by its id, in the order of appearance.
    asked
        Prompt and reference of every item as the first run has them, by its place.
    verdicts
        Of every run by item: 1 right, 0 wrong, another number for other metrics, None where there
        is no verdict.
    unread
        Of every run: the places of the items in which no answer could be read.
    fields
        Names of the scorer's further fields.
    """

    positions: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    verdicts: dict[int, dict[int, float | None]] = field(default_factory=dict)
    unread: dict[int, list[int]] = field(default_factory=dict)
    fields: dict[str, int] = field(default_factory=dict)


def script(folder: Path, name: str, value: Any) -> None:
    """Write a value as a script that hands it to the page.

    All but ASCII is escaped: the file means the same in every encoding, half a surrogate pair
    included.
    """
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    path.write_text(f'tloraData("{name}",{text});\n', encoding="ascii")


def write_place(folder: Path, number: int, sources: Sequence[Source]) -> int:
    """Write the files of one benchmark of one section and return how many items it has.

    One run is held in memory at a time.

    Parameters
    ----------
    folder
        The page's folder of files.
    number
        The place's number on the page.
    sources
        The runs, in the page's order.
    """
    place = Place()
    name = f"items/{number}"
    for source in sources:
        answers = _answers(place, source)
        for page, first in enumerate(range(0, len(place.positions), PAGE)):
            found = [answers.get(index, 0) for index in range(first, first + PAGE)]
            if any(found):
                while not found[-1]:
                    found.pop()
                script(folder, f"{name}/{source.run}/{page}", found)
    count = len(place.positions)
    for page, first in enumerate(range(0, count, PAGE)):
        script(folder, f"{name}/prompts/{page}", place.asked[first : first + PAGE])
    summary = {
        "ids": list(place.positions),
        "fields": list(place.fields),
        "verdicts": {run: _packed(found, count) for run, found in place.verdicts.items()},
        "unread": place.unread,
    }
    script(folder, f"{name}/verdicts", summary)
    return count


def _answers(place: Place, source: Source) -> dict[int, list[Any]]:
    """Return what a run said, by the item's place, and note what the place lacks."""
    items = _items(source.score)
    verdicts = place.verdicts.setdefault(source.run, {})
    unread = place.unread.setdefault(source.run, [])
    answers: dict[int, list[Any]] = {}
    for row in _lines(source.generations):
        index = place.positions.setdefault(str(row["id"]), len(place.positions))
        asked = (_text(row.get("prompt")), _text(row.get("reference")))
        if index == len(place.asked):
            place.asked.append(asked)
        item = items.get(str(row["id"]), {})
        verdicts[index] = _verdict(item)
        extracted = item.get("extracted")
        if item and extracted is None:
            unread.append(index)
        further: list[Any] = []
        for key in sorted(item.keys() - set(KNOWN)):
            column = place.fields.setdefault(key, len(place.fields))
            further += [None] * (column + 1 - len(further))
            further[column] = _scalar(item[key])
        answers[index] = [
            _text(row.get("completion")),
            None if extracted is None else _text(extracted),
            _text(row.get("finish_reason")),
            row.get("completion_tokens"),
            further,
        ]
        if asked != place.asked[index]:
            answers[index].append(asked)
    return answers


def _verdict(item: Mapping[str, Any]) -> float | None:
    value = item["value"] if item.get("value") is not None else item.get("correct")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _items(path: Path | None) -> dict[str, Mapping[str, Any]]:
    """Return the scored items by id."""
    if path is None or not path.is_file():
        return {}
    return {str(item["id"]): item for item in read_json(path).get("items", [])}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from error
            if not isinstance(row, dict) or "id" not in row:
                raise UserError(f"{path}:{number}: id: expected a completion with an id")
            yield row


def _packed(found: Mapping[int, float | None], count: int) -> str | list[float | None]:
    """Return verdicts as one sign an item where they are right or wrong, else as numbers."""
    values = [found.get(index) for index in range(count)]
    if all(value in (0.0, 1.0, None) for value in values):
        return "".join("-" if value is None else str(int(value)) for value in values)
    return values


def _text(value: Any) -> str:
    """Return what is shown of a field."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)


def _scalar(value: Any) -> Any:
    """Return a field as JSON holds it safely: plain values as they are, else their text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return round(value, 6)
    return _text(value)
