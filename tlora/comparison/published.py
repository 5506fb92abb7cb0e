"""The ledger of published numbers: whether they can be right, and ours beside them.

Files of `config/published/` have one line a printed number, with the columns of `COLUMNS`:
`document` and `table` say where it is printed; `model`, `task`, `method` and `benchmark` are names
as in config/; `settings` is what is known of the recipe (`rank=128 learning_rate=2e-5`); `value` is
the number as printed, zeros included, in `unit`; `n_items` is how many items it is a share of,
`seeds` how many runs it is a mean of. What does not apply is empty. A benchmark called `average` is
the mean of the other percentages of its method in its table.

`doubts` holds such numbers against arithmetic and against each other; it knows no table and no
paper. `beside` sets them beside a comparison's own.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tlora.comparison.collect import Comparison, Row, Section
from tlora.comparison.statistics import wilson_half_width
from tlora.errors import UserError

COLUMNS = (
    "document",
    "table",
    "model",
    "task",
    "method",
    "settings",
    "benchmark",
    "metric",
    "value",
    "unit",
    "n_items",
    "seeds",
    "notes",
)

AVERAGE = "average"

RARE = 500
"""Values that a number can take from which on an equal one elsewhere is no mere chance."""


@dataclass(frozen=True)
class Published:
    """One printed number.

    Attributes
    ----------
    value
        As printed.
    settings
        Known settings of the recipe, as printed.
    n_items, seeds
        None where they do not apply or are unknown.
    """

    document: str
    table: str
    model: str
    task: str
    method: str
    settings: Mapping[str, str]
    benchmark: str
    metric: str
    value: str
    unit: str
    n_items: int | None
    seeds: int | None
    notes: str

    @property
    def exact(self) -> Fraction:
        """The printed number."""
        return Fraction(self.value)

    @property
    def decimals(self) -> int:
        """Digits behind the point that are not zeros to fill up."""
        return len(self.value.partition(".")[2].rstrip("0"))

    @property
    def share(self) -> bool:
        """Whether it is the share of right answers of one run."""
        return self.unit == "%" and self.n_items is not None and self.seeds == 1

    @property
    def half_width(self) -> float | None:
        """95 % half-width of one run from its items alone, in percentage points."""
        if not self.share or not self.n_items:
            return None
        return 100 * wilson_half_width(float(self.exact) / 100, self.n_items)

    @property
    def source(self) -> str:
        """Where it is printed."""
        return f"{self.document}, table {self.table}"

    @property
    def recipe(self) -> tuple[tuple[str, str], ...]:
        """Its settings with equal numbers written alike, sorted."""
        return tuple(sorted((key, _plain(value)) for key, value in self.settings.items()))


@dataclass(frozen=True)
class Doubt:
    """Something to know before a published number is relied on.

    Attributes
    ----------
    kind
        `unattainable`, `average`, `contradiction`, `repeat`: the numbers cannot all be right, or
        look so; `seeds`, `untuned`, `items`, `cost`: what they can and cannot show.
    text
        One sentence.
    entries
        The numbers it is about.
    """

    kind: str
    text: str
    entries: tuple[Published, ...]


WRONG = ("unattainable", "average", "contradiction", "repeat")
"""Kinds of doubts about single numbers."""


def read(paths: Iterable[Path]) -> list[Published]:
    """Read files of published numbers, in their order.

    Raises
    ------
    UserError
        Naming the file, line and column of the first value that is none.
    """
    found = []
    for path in paths:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ()) != COLUMNS:
                raise UserError(
                    f"{path}:1: {','.join(rows.fieldnames or ())!r}: expected the columns "
                    + ",".join(COLUMNS)
                )
            found += [_parse(row, f"{path}:{rows.line_num}") for row in rows]
    return found


def _parse(row: dict[str, Any], where: str) -> Published:
    if None in row or None in row.values():
        raise UserError(f"{where}: expected {len(COLUMNS)} values")
    row = {name: value.strip() for name, value in row.items()}
    for name in ("document", "table", "model", "method", "metric", "unit"):
        if not row[name]:
            raise UserError(f"{where}: {name}: '': expected a text")
    if not re.fullmatch(r"-?\d+(\.\d+)?", row["value"]):
        raise UserError(f"{where}: value: {row['value']!r}: expected a number such as 23.50")
    for name in ("n_items", "seeds"):
        if row[name] and (not row[name].isdecimal() or int(row[name]) < 1):
            raise UserError(f"{where}: {name}: {row[name]!r}: expected a number from 1, or nothing")
        row[name] = int(row[name]) if row[name] else None
    pairs = [pair.partition("=") for pair in row["settings"].split()]
    wrong = ["".join(pair) for pair in pairs if not all(pair)]
    if wrong:
        raise UserError(f"{where}: settings: {wrong[0]!r}: expected key=value")
    if row["unit"] == "%" and not 0 <= float(row["value"]) <= 100:
        raise UserError(f"{where}: value: {row['value']!r}: expected a percentage")
    row["settings"] = {key: value for key, _, value in pairs}
    return Published(**row)


def _plain(value: object) -> str:
    """Write equal values alike: 2e-5, 2.0e-05 and 0.00002 are one."""
    try:
        return repr(float(str(value)))
    except ValueError:
        return str(value)


# ---------------------------------------------------------------- doubts


def doubts(published: Sequence[Published]) -> list[Doubt]:
    """Return what is doubtful about published numbers, gravest first."""
    checks = (_contradictions, _unattainable, _averages, _repeats)
    context = (_seeds, _items, _untuned, _costs)
    return [doubt for check in (*checks, *context) for doubt in check(published)]


def _groups(
    published: Iterable[Published], *names: str
) -> dict[tuple[object, ...], list[Published]]:
    groups: dict[tuple[object, ...], list[Published]] = {}
    for entry in published:
        groups.setdefault(tuple(getattr(entry, name) for name in names), []).append(entry)
    return groups


def _contradictions(published: Sequence[Published]) -> list[Doubt]:
    """One method with one recipe on one benchmark has one value."""
    names = ("document", "model", "task", "method", "recipe", "benchmark", "metric")
    found = []
    for group in _groups(published, *names).values():
        values = _groups(group, "exact")
        if len(values) > 1:
            first = group[0]
            told = ", ".join(
                f"{some[0].value} (table {', '.join(dict.fromkeys(e.table for e in some))})"
                for some in values.values()
            )
            text = f"{_who(first)} is printed as {told}, with the same recipe as far as known"
            found.append(Doubt("contradiction", text, tuple(group)))
    return found


def attainable(value: str, n: int, decimals: int) -> bool:
    """Tell whether a printed percentage is some k of n items, rounded or cut off.

    Parameters
    ----------
    value
        The percentage, as printed.
    n
        Number of items.
    decimals
        Digits behind the point that were printed (a zero at the end may only fill up).

    >>> attainable("23.17", 164, 2), attainable("23.50", 164, 1)
    (True, False)
    """
    printed, unit = Fraction(value), Fraction(1, 10**decimals)
    lowest = math.floor((printed - unit) * n / 100)
    for count in range(max(0, lowest), min(n, math.ceil((printed + unit) * n / 100)) + 1):
        share = Fraction(100 * count, n)
        if abs(share - printed) <= unit / 2 or math.floor(share / unit) * unit == printed:
            return True
    return False


def _unattainable(published: Sequence[Published]) -> list[Doubt]:
    found = []
    for group in _groups((e for e in published if e.share), "document", "benchmark").values():
        decimals = max(entry.decimals for entry in group)
        for same in _groups(group, "exact", "n_items").values():
            first = same[0]
            n = first.n_items or 1
            if attainable(first.value, n, decimals):
                continue
            below = math.floor(first.exact * n / 100)
            near = " and ".join(
                f"{count} = {100 * count / n:.{decimals + 1}f} %"
                for count in (below, below + 1)
                if count <= n
            )
            who = ", ".join(
                f"{_who(some[0], benchmark=False)} (table {', '.join(e.table for e in some)})"
                for some in _groups(same, "model", "method", "recipe").values()
            )
            text = f"{first.benchmark} {first.value} % is no share of {n} items ({near}): {who}"
            found.append(Doubt("unattainable", text, tuple(same)))
    return found


def _averages(published: Sequence[Published]) -> list[Doubt]:
    found = []
    names = ("document", "table", "model", "method", "recipe")
    for group in _groups(published, *names).values():
        parts = [e for e in group if e.unit == "%" and e.benchmark != AVERAGE]
        for entry in group:
            if entry.benchmark != AVERAGE or not parts:
                continue
            mean = sum((part.exact for part in parts), Fraction(0)) / len(parts)
            step = Fraction(1, 10 ** len(entry.value.partition(".")[2]))
            # the parts are rounded or cut off as well
            if abs(mean - entry.exact) > 2 * step:
                text = (
                    f"{_who(entry)} (table {entry.table}) is printed as {entry.value}; the mean of "
                    f"its {len(parts)} values is {float(mean):.{len(str(step.denominator)) - 1}f}"
                )
                found.append(Doubt("average", text, (entry, *parts)))
    return found


def _repeats(published: Sequence[Published]) -> list[Doubt]:
    """The same number for two base models is more likely copied than measured."""
    found = []
    shares = [entry for entry in published if entry.share]
    for group in _groups(shares, "document", "method", "benchmark", "exact").values():
        models = _groups(group, "model")
        possible = min(group[0].n_items or 0, 10 ** (2 + group[0].decimals))
        if len(models) < 2 or possible < RARE:
            continue
        told = " and ".join(str(model) for (model,) in models)
        tables = ", ".join(dict.fromkeys(entry.table for entry in group))
        first = group[0]
        text = (
            f"{first.method} on {first.benchmark} has {first.value} for {told} alike (table "
            f"{tables}): one may repeat the other"
        )
        found.append(Doubt("repeat", text, tuple(group)))
    return found


def _seeds(published: Sequence[Published]) -> list[Doubt]:
    found = []
    for (document,), group in _groups(published, "document").items():
        single = [e for e in group if e.seeds == 1 and e.benchmark]
        if single:
            total = sum(bool(entry.benchmark) for entry in group)
            text = f"{document}: {len(single)} of {total} values are of one run each; how far they "
            found.append(Doubt("seeds", text + "vary from seed to seed is unknown", tuple(single)))
    return found


def _items(published: Sequence[Published]) -> list[Doubt]:
    """What one run's items leave open, by benchmark and table."""
    found = []
    shares = [entry for entry in published if entry.share]
    groups = _groups(shares, "document", "benchmark", "n_items")
    for (document, benchmark, items), group in groups.items():
        widest = max(entry.half_width or 0.0 for entry in group)
        told = []
        for (table, model), rows in _groups(group, "table", "model").items():
            best = max(rows, key=lambda entry: entry.exact)
            near = [entry for entry in rows if _within(entry, best)]
            if len(rows) > 1:
                told.append(f"{len(near)} of {len(rows)} (table {table}, {model})")
        text = (
            f"{document}: {benchmark} with {items} items has 95 % half-widths of up to "
            f"{widest:.1f} points"
        )
        if told:
            text += "; within two independent runs' noise of the best: " + ", ".join(told)
        found.append(Doubt("items", text, tuple(group)))
    return found


def _within(entry: Published, best: Published) -> bool:
    width = math.hypot(entry.half_width or 0.0, best.half_width or 0.0)
    return float(best.exact - entry.exact) <= width


def _untuned(published: Sequence[Published]) -> list[Doubt]:
    found = []
    for (document,), group in _groups(published, "document").items():
        rates: dict[str, list[Published]] = {}
        for (task,), rows in _groups(group, "task").items():
            rows = [entry for entry in rows if "learning_rate" in entry.settings]
            methods = {entry.method for entry in rows}
            used = {_plain(entry.settings["learning_rate"]) for entry in rows}
            if len(methods) > 1 and len(used) == 1:
                rate = rows[0].settings["learning_rate"]
                rates[f"{rate} ({task}, {len(methods)} methods)"] = rows
        if rates:
            text = f"{document}: all methods of a task have one learning rate, tuned or not: "
            entries = tuple(entry for rows in rates.values() for entry in rows)
            found.append(Doubt("untuned", text + ", ".join(rates), entries))
    return found


def _costs(published: Sequence[Published]) -> list[Doubt]:
    """Training time and memory of every method over the table's first."""
    found = []
    timed = [entry for entry in published if not entry.benchmark]
    for (document, table, model), group in _groups(timed, "document", "table", "model").items():
        methods = {
            str(method): {entry.metric: entry for entry in rows}
            for (method,), rows in _groups(group, "method").items()
        }
        first, *others = methods
        base = methods[first]
        for method in others:
            own = methods[method]
            if "training_seconds" not in base or "training_seconds" not in own:
                continue
            before = float(base["training_seconds"].exact)
            spent = float(own["training_seconds"].exact)
            start = own.get("initialization_seconds")
            extra = float(start.exact) if start else 0.0
            text = (
                f"{document}, table {table}: {method} trains {_more(spent, before)} than {first} "
                f"on {model}"
            )
            if extra:
                text += f", {_more(spent + extra, before)} with its {extra:.0f} s of initialization"
            text += _memory(own, base)
            found.append(Doubt("cost", text, tuple(group)))
    return found


def _memory(own: Mapping[str, Published], base: Mapping[str, Published]) -> str:
    key = "training_peak_memory"
    if key not in own or key not in base:
        return ""
    ratio = float(own[key].exact / base[key].exact)
    return f"; peak memory {100 * abs(ratio - 1):.1f} % {'less' if ratio < 1 else 'more'}"


def _more(value: float, base: float) -> str:
    return f"{100 * abs(value / base - 1):.1f} % {'longer' if value >= base else 'shorter'}"


def _who(entry: Published, benchmark: bool = True) -> str:
    rank = f", rank {entry.settings['rank']}" if "rank" in entry.settings else ""
    name = f"{entry.method} ({entry.model}{rank})"
    return f"{entry.benchmark} of {name}" if benchmark else name


# ---------------------------------------------------------------- beside ours


@dataclass(frozen=True)
class Ledger:
    """Published numbers of a comparison's models and benchmarks.

    Attributes
    ----------
    rows
        Beside ours: what `beside` returns.
    doubts
        Those about numbers of these models and benchmarks.
    """

    rows: tuple[dict[str, Any], ...] = ()
    doubts: tuple[Doubt, ...] = ()


NOTHING_PUBLISHED = Ledger()


def ledger(
    comparison: Comparison, found: Sequence[Mapping[str, Any]], published: Sequence[Published]
) -> Ledger:
    """Return what `published` says of a comparison's models and benchmarks.

    Parameters
    ----------
    comparison, found
        The sections, and the records of table.csv.
    published
        What `read` returns.
    """
    rows = beside(comparison, found, published)
    places = {(row["model"], row["benchmark"]) for row in rows}
    models = {model for model, _ in places}
    about = [
        doubt
        for doubt in doubts(published)
        if any(
            (entry.model, entry.benchmark) in places
            or (not entry.benchmark and entry.model in models)
            for entry in doubt.entries
        )
    ]
    return Ledger(tuple(rows), tuple(about))


def beside(
    comparison: Comparison, found: Sequence[Mapping[str, Any]], published: Sequence[Published]
) -> list[dict[str, Any]]:
    """Return published numbers beside the comparison's own, in its units.

    Of several published numbers for one method and benchmark those are taken whose known settings
    differ least from ours; all of them where they are equally near.

    Parameters
    ----------
    comparison
        The sections and rows.
    found
        The records of table.csv, one a row.
    published
        What `read` returns.

    Returns
    -------
    list of dict
        `model`, `task`, `benchmark`, `method`, `label`; `status`: `rerun` where we have a number,
        `copied` where there is only the published one; `unit`; `ours` and `published` with their
        95 % half-widths; `ours_seeds`; `difference` with its half-width; `differs_in`: settings,
        seeds and items that differ as far as both are known; `doubts`: kinds of `WRONG`;
        `source`, `notes`. The interval of a difference takes both numbers for independent, which
        is rather wide (the items are the same), and knows of the published one no seed variance,
        which is rather narrow.
    """
    marked: dict[int, list[str]] = {}
    for doubt in doubts(published):
        if doubt.kind in WRONG:
            for entry in doubt.entries:
                marked.setdefault(id(entry), []).append(doubt.kind)
    rows, rest = [], list(found)
    for section in comparison.sections:
        mine, rest = rest[: len(section.rows)], rest[len(section.rows) :]
        for benchmark in section.benchmarks:
            known = [e for e in published if (e.model, e.benchmark) == (section.model, benchmark)]
            for row, record in zip(section.rows, mine, strict=True):
                for entry, differs in _nearest(known, row.method, section, row):
                    rows.append(_beside(section, benchmark, entry, differs, row, record))
                    rows[-1]["doubts"] = " ".join(sorted(set(marked.get(id(entry), []))))
            ours = {row.method for row in section.rows}
            model_row = next((row for row in section.rows if not row.base), None)
            for method in dict.fromkeys(e.method for e in known if e.method not in ours):
                for entry, differs in _nearest(known, method, section, model_row):
                    rows.append(_beside(section, benchmark, entry, differs, None, {}))
                    rows[-1]["doubts"] = " ".join(sorted(set(marked.get(id(entry), []))))
    return rows


def _nearest(
    known: Sequence[Published], method: str, section: Section, row: Row | None
) -> list[tuple[Published, list[str]]]:
    """Return a method's published numbers with what their recipe differs in, the nearest only."""
    of_method = [entry for entry in known if entry.method == method]
    if row is None or not of_method:
        return []
    settings = row.runs[0].settings
    differing = []
    for entry in of_method:
        differs = [
            f"{key}: {_show(settings[key])}, published {value}"
            for key, value in entry.settings.items()
            if key in settings and _plain(settings[key]) != _plain(value)
        ]
        if entry.task != section.task:
            differs.insert(0, f"task: {section.task}, published {entry.task}")
        differing.append((entry, differs))
    least = min(len(differs) for _, differs in differing)
    nearest = [(entry, differs) for entry, differs in differing if len(differs) == least]
    # the same number printed in several tables is told once
    unique: dict[object, tuple[Published, list[str]]] = {}
    for entry, differs in nearest:
        unique.setdefault((entry.exact, tuple(differs)), (entry, differs))
    return list(unique.values())


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _beside(
    section: Section,
    benchmark: str,
    entry: Published,
    differs: list[str],
    row: Row | None,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    suffix = "_percent" if entry.unit == "%" else ""
    ours = record.get(f"{benchmark}_mean{suffix}")
    width = record.get(f"{benchmark}_ci95{suffix}")
    both = ours is not None and width is not None and entry.half_width is not None
    seeds = record.get("seeds")
    if row is not None and not row.base and entry.seeds not in (None, seeds):
        differs = [*differs, f"seeds: {seeds}, published {entry.seeds}"]
    items = record.get(f"{benchmark}_n")
    if entry.n_items is not None and items not in (None, entry.n_items):
        differs = [*differs, f"items: {items}, published {entry.n_items}"]
    return {
        "model": section.model,
        "task": section.task,
        "benchmark": benchmark,
        "method": entry.method,
        "label": entry.method if row is None else row.label,
        "status": "copied" if ours is None else "rerun",
        "unit": entry.unit,
        "ours": ours,
        "ours_half_width": width,
        "ours_seeds": seeds,
        "published": entry.value,
        "published_half_width": _rounded(entry.half_width),
        "difference": None if ours is None else _rounded(ours - float(entry.exact)),
        "difference_half_width": _rounded(math.hypot(width, entry.half_width)) if both else None,
        "differs_in": "; ".join(differs) if row is not None else "",
        "doubts": "",
        "source": entry.source,
        "notes": entry.notes,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
