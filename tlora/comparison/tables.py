"""The comparison as CSV, Markdown, LaTeX and plain text.

All forms are rendered from the same records, the rows of table.csv, so they cannot disagree; equal
inputs give equal bytes.

Columns of table.csv
--------------------
One row per model, task and method. `seeds`: runs with a seed that did not fail; `failed`: runs
without some number; `baseline`: 1 for the row that the others are compared with;
`not_comparable`: what differs from the other rows though nobody asked for it; `by_design`: what
differs on purpose (`tlora.comparison.fingerprint`); `trials`: how many the tuning had; `tuned`: the
values that they chose, and `tuned_edges`: which of these are the "lower" or "upper" end of what was
tried, both as JSON. For every benchmark B:

- `B_mean_percent`, `B_std_percent` (sample standard deviation over seeds), `B_ci95_percent` (95 %
  half-width over seeds and items), `B_bootstrap_low_percent`, `B_bootstrap_high_percent` (95 %
  interval of the hierarchical bootstrap), `B_n` (items of one run), `B_unextracted_percent`,
  `B_failed` (runs without this number), `B_{metric}_mean_percent` for further metrics;
- `B_mark`: `best`, `tie` (not distinguishable from the best) or `worse`; `B_minus_best_percent`,
  `B_minus_best_ci95_percent`, `B_p_best`, and the same with `baseline`: difference, its 95 %
  half-width and p-value, the latter corrected for all such comparisons of the table;
- `B_compared_by`: `crossed` (seeds and items), or `mcnemar`, `items` (one run each);
  `B_compared_n`: items that the comparison rests on; `B_detectable_percent`: the least difference
  that it finds in 80 % of cases.

A metric that is no share has no `_percent` in its columns' names. Costs are means over seeds
(`peak_memory_bytes`: the maximum) of one run. An empty field: does not apply, or no number.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlora.comparison import fingerprint
from tlora.comparison.collect import Choice, Comparison, Row, Section
from tlora.comparison.published import NOTHING_PUBLISHED, Ledger
from tlora.comparison.statistics import (
    Analysis,
    Difference,
    analyse,
    bootstrap_intervals,
    mean_ranks,
    summarise,
    wilson_half_width,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 120
"""Columns of a terminal that `text` stays within."""

TEX_WIDTH = 84
"""Letters of a LaTeX table's line: what fits the default text width in footnote size."""

TEX_LINES = 46
"""Lines of tables that one page of LaTeX holds, with a caption and some warnings."""

DASH = "–"

BASELINE = "lora"
"""The method that all others are compared with, where a table has it."""

DRAWS = 1000
"""Resamples of the bootstrap."""

MARKS = {"best": "* ", "tie": "= "}
"""What stands before a number."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column as people see it: a title, its unit and the texts of its cells."""

    title: str
    unit: str
    cells: tuple[str, ...]
    numeric: bool = True

    @property
    def heading(self) -> str:
        """Title and unit in one line."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


# ---------------------------------------------------------------- records


def records(comparison: Comparison, baseline: str = BASELINE) -> list[Record]:
    """Return the rows of table.csv as plain numbers and strings; None where there is nothing.

    `baseline` is the name of the method that all others of its table are compared with.
    """
    return [
        record
        for section in comparison.sections
        for record in _section_records(section, baseline, comparison.labels)
    ]


def verdicts(section: Section, benchmark: str) -> dict[str, NDArray[np.float64]]:
    """Return the verdicts of every row's runs on the items that all runs have been scored on.

    Returns
    -------
    dict
        Arrays (runs, items) by the place of the row in its section, as text; without the rows
        that have no verdicts.
    """
    rows = {
        str(place): [score.verdicts for score in row.scores(benchmark) if score.verdicts]
        for place, row in enumerate(section.rows)
    }
    runs = [run for found in rows.values() for run in found]
    if not runs:
        return {}
    shared = set.intersection(*(set(run) for run in runs))
    items = [item for item in runs[0] if item in shared]
    return {
        place: np.array([[run[item] for item in items] for run in found], dtype=float)
        for place, found in rows.items()
        if found and items
    }


def _section_records(section: Section, baseline: str, labels: Mapping[str, str]) -> list[Record]:
    unlike = fingerprint.differences(section, baseline, labels)
    methods = [row.method for row in section.rows]
    compared = str(methods.index(baseline)) if baseline in methods else None
    bases = [str(place) for place, row in enumerate(section.rows) if row.base]
    samples = {name: verdicts(section, name) for name in section.benchmarks}
    analyses = analyse(samples, compared, bases)
    intervals = {name: bootstrap_intervals(found, DRAWS) for name, found in samples.items()}
    found = []
    for place, row in enumerate(section.rows):
        record = _identity(row) | {"baseline": int(str(place) == compared)}
        record["not_comparable"], record["by_design"] = fingerprint.footnotes(unlike, place)
        record |= _tuned(row.choice)
        record["trainable_parameters"] = row.trainable_parameters
        for name in section.benchmarks:
            record |= _benchmark_record(section, row, name)
            bounds = intervals[name].get(str(place), (None, None))
            record |= _compared(section, name, analyses[name], str(place), bounds)
        found.append(record | _cost_record(row))
    return found


def _identity(row: Row) -> Record:
    return {
        "model": row.model,
        "task": row.task,
        "method": row.method,
        "label": row.label,
        "base": int(row.base),
        "runs": len(row.runs),
        "seeds": len(row.seeds),
        "failed": row.failed(),
    }


def _tuned(choice: Choice | None) -> Record:
    if choice is None:
        return {"trials": None, "tuned": "", "tuned_edges": ""}
    return {
        "trials": len(choice.tried),
        "tuned": json.dumps(choice.tried[choice.winner], sort_keys=True),
        "tuned_edges": json.dumps(choice.edges, sort_keys=True),
    }


def _benchmark_record(section: Section, row: Row, name: str) -> Record:
    accuracy, share = row.accuracy(name), section.share(name)
    record: Record = {
        _key(name, "mean", share): _scaled(accuracy.mean, share),
        _key(name, "std", share): _scaled(accuracy.std, share),
        f"{name}_n": next(iter(row.items(name)), None),
        f"{name}_unextracted_percent": _scaled(row.unextracted(name)),
        f"{name}_failed": row.failed(name),
    }
    for metric in section.metrics(name):
        mean = row.further(name, metric).mean
        record[_key(name, f"{metric}_mean", share)] = _scaled(mean, share)
    return record


def _compared(
    section: Section,
    name: str,
    analysis: Analysis,
    place: str,
    bounds: tuple[float | None, float | None],
) -> Record:
    share = section.share(name)
    one = analysis.methods.get(place)
    width = one.half_width if one else None
    mean = section.rows[int(place)].accuracy(name).mean
    items = section.rows[int(place)].items(name)
    if one is None and share and mean is not None:
        # no verdicts on single items: what the share alone says of them
        width = wilson_half_width(mean, items[0])
    record: Record = {_key(name, "ci95", share): _scaled(width, share)}
    for side, bound in zip(("low", "high"), bounds, strict=True):
        record[_key(name, f"bootstrap_{side}", share)] = _scaled(bound, share)
    record[f"{name}_mark"] = one.mark if one else None
    gaps: list[tuple[str, Difference | None, float | None]] = [
        ("baseline", one.baseline if one else None, one.p_baseline if one else None),
        ("best", one.best if one else None, one.p_best if one else None),
    ]
    for other, gap, p in gaps:
        value, half = (gap.value, gap.half_width) if gap else (None, None)
        record[_key(name, f"minus_{other}", share)] = _scaled(value, share)
        record[_key(name, f"minus_{other}_ci95", share)] = _scaled(half, share)
        record[f"{name}_p_{other}"] = None if p is None else round(p, 6)
    tests = [gap.test for _, gap, _ in gaps if gap]
    record[f"{name}_compared_by"] = tests[0] if tests else None
    record[f"{name}_compared_n"] = analysis.items or None
    record[_key(name, "detectable", share)] = _scaled(analysis.detectable, share)
    return record


def _cost_record(row: Row) -> Record:
    return {
        "initialization_seconds": _rounded(row.initialization_seconds),
        "training_seconds": _rounded(summarise(row.training("train_seconds")).mean),
        "evaluation_seconds": _rounded(row.evaluation_seconds),
        "tokens_per_second": _rounded(summarise(row.training("tokens_per_second")).mean),
        "peak_memory_bytes": row.peak_memory_bytes,
    }


def _key(benchmark: str, what: str, share: bool) -> str:
    return f"{benchmark}_{what}{'_percent' if share else ''}"


def number(record: Mapping[str, Any], benchmark: str, what: str) -> Any:
    """Return a number of a record, be it in percent or in the benchmark's own unit."""
    own = _key(benchmark, what, False)
    return record[own] if own in record else record[_key(benchmark, what, True)]


def unit(record: Mapping[str, Any], benchmark: str) -> str:
    """Return the unit of a benchmark's numbers: percent, or points of its own scale."""
    return "%" if _key(benchmark, "mean", True) in record else "points"


def _scaled(value: float | None, share: bool = True) -> float | None:
    return None if value is None else round(100 * value if share else value, 6)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# ---------------------------------------------------------------- columns


def main_columns(found: list[Record], benchmarks: dict[str, str], details: bool) -> list[Column]:
    """Return the columns of the table of one section.

    Parameters
    ----------
    found
        The section's records.
    benchmarks
        The section's benchmarks and their labels.
    details
        Whether the 95 % half-width and the share of completions without an answer stand beside
        every benchmark.
    """
    columns = [
        Column("Method", "", tuple(_marked(found)), numeric=False),
        Column("Seeds", "", tuple(DASH if r["base"] else str(r["seeds"]) for r in found)),
        *_tuned_columns(found),
        Column("Trainable", "parameters", _cells(found, "trainable_parameters", "{:,.0f}")),
    ]
    for name, label in benchmarks.items():
        cells = tuple(MARKS.get(r[f"{name}_mark"], "") + accuracy_cell(r, name) for r in found)
        columns.append(Column(label, unit(found[0], name), cells))
        if details:
            widths = tuple(_cell(number(r, name, "ci95"), "{:.2f}") for r in found)
            columns.append(Column("95 %", "±", widths))
            cells = _cells(found, f"{name}_unextracted_percent", "{:.2f}")
            columns.append(Column("No answer", "%", cells))
    memory = [record["peak_memory_bytes"] or 0 for record in found]
    size_unit, size, form = ("MiB", 2**20, "{:,.0f}")
    if max(memory, default=0) >= 2**30:
        size_unit, size, form = ("GiB", 2**30, "{:,.2f}")
    return [
        *columns,
        Column("Init", "s", _cells(found, "initialization_seconds", "{:,.1f}")),
        Column("Training", "s", _cells(found, "training_seconds", "{:,.1f}")),
        Column("Speed", "tokens/s", _cells(found, "tokens_per_second", "{:,.0f}")),
        Column("Memory", size_unit, _cells(found, "peak_memory_bytes", form, size)),
    ]


def _marked(found: list[Record]) -> list[str]:
    """Return the rows' labels, with a letter where a row is not comparable."""
    numbers = iter(range(len(found)))
    return [
        f"{record['label']} [{_letter(next(numbers))}]"
        if record["not_comparable"]
        else record["label"]
        for record in found
    ]


def _letter(number: int) -> str:
    above, rest = divmod(number, 26)
    return (_letter(above - 1) if above else "") + chr(ord("a") + rest)


def _tuned_columns(found: list[Record]) -> list[Column]:
    """Return one column for every setting that trials chose; "!" stands at the edge of a grid."""
    chosen = [json.loads(record["tuned"] or "{}") for record in found]
    edges = [json.loads(record["tuned_edges"] or "{}") for record in found]
    return [
        Column(
            key.replace("_", " ").capitalize(),
            "tuned",
            tuple(
                plain(values[key]) + (" !" if key in at else "") if key in values else DASH
                for values, at in zip(chosen, edges, strict=True)
            ),
        )
        for key in dict.fromkeys(key for values in chosen for key in values)
    ]


def plain(value: Any) -> str:
    """Return a value as YAML has it; a number that YAML takes for one.

    >>> plain(3e-05), plain(0.25), plain(16), plain("cosine")
    ('3.0e-5', '0.25', '16', 'cosine')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, int) or value == 0 or 0.1 <= abs(value) < 1e4:
        return f"{value:g}" if isinstance(value, float) else str(value)
    digits, _, power = f"{value:e}".partition("e")
    digits = digits.rstrip("0")
    return f"{digits}{'0' if digits.endswith('.') else ''}e{int(power):+d}"


def beyond(values: Sequence[Any], side: str) -> Any:
    """Return the next value of a grid below ("lower") or above ("upper") all that it has.

    It goes on as the grid does: 1e-3, 3e-3, 1e-2 with 3e-2. None where that is no positive number,
    or nothing new.

    >>> beyond([0.003, 0.01, 0.03], "upper"), beyond([8, 16], "lower"), beyond(["linear"], "upper")
    (0.1, 4, None)
    """
    numbers = sorted({v for v in values if isinstance(v, int | float) and not isinstance(v, bool)})
    if len(numbers) < 2 or len(numbers) < len(set(map(str, values))) or numbers[0] <= 0:
        return None
    inward = numbers if side == "lower" else numbers[::-1]
    # the step over two values, so that 1, 3, 10 goes on with 30 and not with 33
    after = inward[1] * inward[0] / inward[2] if len(inward) > 2 else inward[0] ** 2 / inward[1]
    rounded = float(f"{after:.1e}")
    near = float(f"{after:.0e}")
    rounded = near if math.isclose(near, after, rel_tol=0.1) and near not in numbers else rounded
    if all(isinstance(number, int) for number in numbers):
        rounded = round(after)
    new = rounded < numbers[0] if side == "lower" else rounded > numbers[-1]
    return rounded if new and rounded > 0 else None


def detail_columns(section: Section, found: list[Record], labels: dict[str, str]) -> list[Column]:
    """Return a second table of the section: one row per benchmark, metric and method."""
    lines: list[tuple[str, ...]] = []
    for name in section.benchmarks:
        share = section.share(name)
        for row, record in zip(section.rows, found, strict=True):
            metric = next((s.metric for s in row.scores(name)), "accuracy")
            lines.append(
                (
                    labels[name],
                    metric,
                    record["label"],
                    MARKS.get(record[f"{name}_mark"], "") + accuracy_cell(record, name),
                    _cell(number(record, name, "ci95"), "{:.2f}"),
                    *_gap_cells(record, name, "baseline"),
                    *_gap_cells(record, name, "best"),
                    _cell(record[f"{name}_n"], "{:d}"),
                    _cell(record[f"{name}_unextracted_percent"], "{:.2f}"),
                )
            )
        for metric in section.metrics(name):
            for row in section.rows:
                summary = row.further(name, metric)
                spread = _scaled(summary.mean, share), _scaled(summary.std, share)
                items = next(iter(row.items(name)), None)
                cells = (_spread(*spread, row.base), *[DASH] * 5, _cell(items, "{:d}"), DASH)
                lines.append((labels[name], metric, row.label, *cells))
    shares = all(section.share(name) for name in section.benchmarks)
    against = next((record["label"] for record in found if record["baseline"]), "baseline")
    titles = [
        ("Benchmark", ""),
        ("Metric", ""),
        ("Method", ""),
        ("Value", "%" if shares else "% or points"),
        ("95 % half-width", "points"),
        (f"Minus {against}", "points"),
        ("p", ""),
        ("Minus best", "points"),
        ("p", ""),
        ("Items", "n"),
        ("No answer", "%"),
    ]
    cells_of = list(zip(*lines, strict=True)) if lines else [()] * len(titles)
    return [
        Column(title, unit, tuple(cells), numeric=index > 2)
        for index, ((title, unit), cells) in enumerate(zip(titles, cells_of, strict=True))
    ]


def _gap_cells(record: Record, benchmark: str, other: str) -> tuple[str, str]:
    """Return a difference with its interval, and its p-value."""
    value = number(record, benchmark, f"minus_{other}")
    if value is None:
        return DASH, DASH
    width, p = number(record, benchmark, f"minus_{other}_ci95"), record[f"{benchmark}_p_{other}"]
    return f"{value:+.2f} ± {width:.2f}", "< 0.001" if p < 0.001 else f"{p:.3f}"


def rank_columns(found: list[Record], labels: Mapping[str, str]) -> list[Column]:
    """Return the ranks of the methods over all benchmarks of all sections; [] for less than two.

    Only methods with a number everywhere are ranked; base models are not.
    """
    means: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in found:
        for key, failed in record.items():
            if record["base"] or failed is None or not key.endswith("_failed"):
                continue
            name = key.removesuffix("_failed")
            column = means.setdefault((name, record["task"], record["model"]), {})
            mean = number(record, name, "mean")
            if mean is not None:
                column[record["label"]] = mean
    titles = {place: labels.get(place[0], place[0]) for place in means}
    for index in (1, 2):
        # what all benchmarks share need not be told
        if len({place[index] for place in means}) > 1 and len(set(titles.values())) < len(means):
            titles = {place: f"{title}, {place[index]}" for place, title in titles.items()}
    ranked = mean_ranks({titles[place]: column for place, column in means.items()})
    if len(means) < 2 or len(ranked) < 2:
        return []
    places = [places for _, places in ranked.values()]
    return [
        Column("Method", "", tuple(ranked), numeric=False),
        Column("Mean rank", "", tuple(f"{mean:.2f}" for mean, _ in ranked.values())),
        *(
            Column(title, "rank", tuple(f"{place[index]:g}" for place in places))
            for index, title in enumerate(titles.values())
        ),
    ]


def published_columns(rows: Sequence[Record], labels: Mapping[str, str]) -> list[Column]:
    """Return published numbers beside ours as one table; see `tlora.comparison.published`."""

    def pair(value: Any, width: float | None, form: str) -> str:
        if value is None:
            return DASH
        shown = format(float(value), form)
        return shown if width is None else f"{shown} ± {width:.2f}"

    shares = all(row["unit"] == "%" for row in rows)
    cells: dict[tuple[str, str], list[str]] = {
        ("Benchmark", ""): [labels.get(row["benchmark"], row["benchmark"]) for row in rows],
        ("Method", ""): [row["label"] for row in rows],
        ("Status", ""): [row["status"] for row in rows],
        ("Ours", "%" if shares else "% or points"): [
            pair(row["ours"], row["ours_half_width"], ".2f") for row in rows
        ],
        ("Published", "%" if shares else "% or points"): [
            pair(row["published"], row["published_half_width"], ".2f") for row in rows
        ],
        ("Difference", "points"): [
            pair(row["difference"], row["difference_half_width"], "+.2f") for row in rows
        ],
        ("Differs in", ""): [row["differs_in"] or DASH for row in rows],
        ("Doubts", ""): [row["doubts"] or DASH for row in rows],
        ("Source", ""): [row["source"] for row in rows],
    }
    texts = ("Benchmark", "Method", "Status", "Differs in", "Doubts", "Source")
    return [
        Column(title, unit, tuple(found), numeric=title not in texts)
        for (title, unit), found in cells.items()
    ]


PUBLISHED_NOTE = (
    "± : 95 % half-widths; of a published value, from its items alone (one run, Wilson). A "
    "difference's takes both for independent. Copied: no run of ours. Differs in: settings known "
    "on both sides."
)


def accuracy_cell(record: Record, benchmark: str) -> str:
    """Return mean and standard deviation as shown: `12.34 ± 0.56`, or that runs failed."""
    failed = record[f"{benchmark}_failed"] or 0
    mean = number(record, benchmark, "mean")
    if mean is None:
        return "failed" if failed else DASH
    text = _spread(mean, number(record, benchmark, "std"), bool(record["base"]))
    return f"{text} ({failed}/{record['runs']} failed)" if failed else text


def _spread(mean: float | None, std: float | None, base: bool) -> str:
    if mean is None:
        return DASH
    if base:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {DASH}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _cells(found: list[Record], key: str, form: str, divisor: float = 1) -> tuple[str, ...]:
    values = [record[key] for record in found]
    return tuple(_cell(None if v is None else v / divisor, form) for v in values)


def _cell(value: float | None, form: str) -> str:
    return DASH if value is None else form.format(value)


# ---------------------------------------------------------------- footnotes


def notes(
    section: Section, found: list[Record], labels: dict[str, str], digits: int | None = 12
) -> list[str]:
    """Return the footnotes of a section's table: what its numbers mean and rest on.

    Parameters
    ----------
    found
        The section's records.
    digits
        How many hex digits of each data file's SHA-256 are shown; None for all 64.
    """
    trained = [row for row in section.rows if not row.base]
    lists = {row.label: ", ".join(map(str, row.seeds)) or "none" for row in trained}
    lines = [
        "a ± b: mean and sample standard deviation (n - 1) over seeds, in percent; "
        f"{DASH}: one seed, or does not apply."
    ]
    if len(set(lists.values())) == 1:
        lines.append(f"Seeds: {next(iter(lists.values()))}.")
    elif lists:
        lines.append("Seeds: " + "; ".join(f"{k}: {v}" for k, v in lists.items()) + ".")
    if any(len(row.seeds) == 1 for row in trained):
        lines.append(
            "WARNING: one seed only for "
            + ", ".join(row.label for row in trained if len(row.seeds) == 1)
            + ": its spread over seeds is unknown; do not rank methods by these numbers."
        )
    if any(row.base for row in section.rows):
        lines.append("The first row is the base model, untrained: one run, no seed, not compared.")
    lines += _comparable_notes(section, found, labels)
    lines += _tuning_notes(section)
    lines += _test_notes(section, found, labels)
    lines += _item_notes(section, labels)
    lines.append(
        "No answer: completions in which the scorer found no answer to read; they count as wrong."
    )
    lines.append(
        "Init: calibration, allocation and initialization of one run; a job shared by several "
        "seeds or methods counts in full, once, in each row that needs it. Training, speed: mean "
        "over seeds; memory: peak of training, maximum over seeds. Generation is not included."
    )
    lines += _failure_notes(section)
    for name, digest in sorted((section.card.get("sha256") or {}).items()):
        lines.append(f"Data: {name}, SHA-256 {digest[:digits]}.")
    for name, found in section.overlaps.items():
        lines.append(
            f"{labels.get(name, name)}: of {found['n']:,} test records {found['exact']:,} stand in "
            f"the training data, {found['ngram13']:,} share 13 words in a row with it."
        )
    return lines


def _comparable_notes(section: Section, found: list[Record], labels: dict[str, str]) -> list[str]:
    """Say in what rows differ: unasked for, on purpose, and by nature."""
    against = next((record["method"] for record in found if record["baseline"]), None)
    marked = [
        (shown, record)
        for shown, record in zip(_marked(found), found, strict=True)
        if record["not_comparable"]
    ]
    lines = [
        f"WARNING: {shown}: not comparable: {record['not_comparable']}." for shown, record in marked
    ]
    if sum(not record["base"] for record in found) > 1:
        lines.append(
            f"{'But for that all' if marked else 'All'} rows agree, where nothing else is said, in "
            f"{fingerprint.compared(section)} (fingerprints.json)."
        )
    meant = [f"{r['label']}: {r['by_design']}" for r in found if r["by_design"]]
    lines += [f"On purpose: {'; '.join(meant)}."] if meant else []
    return lines + fingerprint.remarks(section, labels, against)


def _tuning_notes(section: Section) -> list[str]:
    """Say what was tried for which method, and where a grid was too narrow."""
    trained = [row for row in section.rows if not row.base]
    tuned = [(row, row.choice) for row in trained if row.choice is not None]
    if not tuned:
        return ["Nothing was tuned: a method's best settings may be others."] if trained else []
    alike: dict[str, list[Row]] = {}
    for row, choice in tuned:
        alike.setdefault(f"{tried_values(choice)}: {len(choice.tried)} trials", []).append(row)
    lines = []
    for text, rows in alike.items():
        who = "every method" if len(rows) == len(trained) else ", ".join(row.label for row in rows)
        lines.append(f"Tuned for {who} over {text} each, {tuned_by(rows[0])}.")
    seconds = [
        math.fsum((t.training or {}).get("train_seconds", 0.0) for t in choice.trials)
        for _, choice in tuned
    ]
    lines.append(
        f"The trials of a method trained {min(seconds):,.1f} to {max(seconds):,.1f} s in all; the "
        "columns of costs do not contain them."
    )
    for row, choice in tuned:
        failed = sum(value is None for value in choice.values)
        if failed:
            lines.append(f"WARNING: {row.label}: {failed} of {len(choice.tried)} trials failed.")
        lines += [f"WARNING: !: {row.label}: {line}." for line in edge_lines(choice)]
    return lines


def tried_values(choice: Choice) -> str:
    """Return what a method's trials had: `learning_rate 1.0e-3, 3.0e-3`."""
    tried = {key: [plain(one[key]) for one in choice.tried] for key in choice.tried[0]}
    return " x ".join(f"{key} {', '.join(dict.fromkeys(all_))}" for key, all_ in tried.items())


def tuned_by(row: Row) -> str:
    """Return how a row's trials were compared."""
    budget = fingerprint.tuning(row)
    seeds = ", ".join(map(str, budget["seed"]))
    items = f" of {budget['items']:,} items" if budget["items"] else ""
    return (
        f"one seed ({seeds}), compared by {budget['metric']} on the validation split{items}, never "
        "on test items"
    )


def edge_lines(choice: Choice) -> list[str]:
    """Return what to add to the grid where the chosen value is the lowest or highest tried."""
    lines = []
    for key, side in choice.edges.items():
        values = [tried[key] for tried in choice.tried]
        end = "highest" if side == "upper" else "lowest"
        further = beyond(values, side)
        add = "" if further is None else f": add {plain(further)}"
        lines.append(f"{key} {plain(choice.tried[choice.winner][key])} is the {end} tried{add}")
    return lines


def _test_notes(section: Section, found: list[Record], labels: dict[str, str]) -> list[str]:
    """Say what marks, intervals and p-values mean, and what the design can show."""
    by: dict[str, list[str]] = {}
    for name in section.benchmarks:
        for test in dict.fromkeys(record[f"{name}_compared_by"] for record in found):
            by.setdefault(test or "", []).append(name)
    lines = []
    if by.keys() - {""}:
        lines.append(
            "*: the highest mean; =: not distinguishable from it at the 5 % level; no mark: lower. "
            "p-values of differences are corrected for all comparisons of their kind in this table "
            "(Holm), those with the best also for picking it (studentized range); the intervals of "
            "differences are not."
        )
    if "crossed" in by:
        lines.append(
            "Intervals and tests: seeds and items crossed, both random; Student's t with "
            "Satterthwaite's degrees of freedom; as seed variance the larger of the method's own "
            "and the mean over methods, so rather wide than narrow. Seeds of two methods are "
            "independent; items are compared one by one."
        )
    alone = [labels[name] for test in ("mcnemar", "items") for name in by.get(test, [])]
    if alone:
        how = "McNemar's exact test" if "mcnemar" in by else "a paired t test"
        lines.append(
            f"WARNING: {', '.join(dict.fromkeys(alone))}: one run of each method, compared item by "
            f"item ({how}): this says nothing of other seeds."
        )
    least = []
    for name in section.benchmarks:
        value = number(found[0], name, "detectable") if found else None
        if value is not None:
            least.append(f"{labels[name]} {value:.1f}")
    if least:
        lines.append(
            "Detectable: a true difference of two methods of so many points is found in 80 % of "
            f"cases, by one comparison: {', '.join(least)}."
        )
    for name in section.benchmarks:
        used = found[0][f"{name}_compared_n"] if found else None
        most = max((n for row in section.rows for n in row.items(name)), default=0)
        whole = {len(s.verdicts) for row in section.rows for s in row.scores(name) if s.verdicts}
        if used is not None and whole and (len(whole) > 1 or used < max(whole)):
            lines.append(
                f"{labels[name]}: intervals and comparisons rest on the {used} of up to {most} "
                "items that all runs have a verdict on."
            )
    return lines


def _item_notes(section: Section, labels: dict[str, str]) -> list[str]:
    """One note for all benchmarks with the same metric and number of items."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in section.benchmarks:
        items = tuple(sorted({n for row in section.rows for n in row.items(name)}))
        metric = next((s.metric for row in section.rows for s in row.scores(name)), "")
        alike.setdefault((metric, items), []).append(name)
    lines = []
    for (metric, items), names in alike.items():
        who = ", ".join(labels[name] for name in names)
        if not items:
            lines.append(f"{who}: no scores.")
            continue
        note = f"{who}: {metric}, n = {' or '.join(map(str, items))} items"
        shares = [name for name in names if section.share(name)]
        widths = [
            wilson_half_width(score.value, score.n)
            for name in shares
            for row in section.rows
            for score in row.scores(name)
        ]
        if widths:
            note += (
                f"; from the items alone the 95 % half-width of one run is at most "
                f"{100 * max(widths):.2f} points (Wilson)"
            )
        unequal = " WARNING: the runs were scored on unequal items."
        lines.append(note + "." if len(items) == 1 else note + "." + unequal)
    return lines


def _failure_notes(section: Section) -> list[str]:
    lines = []
    for row in section.rows:
        for run in row.runs:
            # a run that failed as a whole has no scores either: its own reason is enough
            whole = {"": run.failures[""]} if "" in run.failures else run.failures
            for benchmark, reason in sorted(whole.items()):
                name = row.label if row.base else f"{row.label}, seed {run.seed}"
                lines.append(f"Failed: {name}{benchmark and f', {benchmark}'}: {reason}.")
    return lines


# ---------------------------------------------------------------- the forms


COSTS = (
    "initialization_seconds",
    "training_seconds",
    "evaluation_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
)


def to_csv(found: list[Record], last: Sequence[str] = ()) -> str:
    """Return records as CSV: all their columns in order of appearance, but those of `last` last."""
    names = [name for name in dict.fromkeys(k for r in found for k in r) if name not in last]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*names, *last], lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue()


def to_markdown(
    comparison: Comparison, found: list[Record], published: Ledger = NOTHING_PUBLISHED
) -> str:
    """Return the comparison as Markdown.

    Every section has its table, the table of its benchmarks and footnotes; then follow the ranks
    over all benchmarks, and published numbers beside ours where there are any.
    """
    lines = [f"# Comparison: {md(comparison.preset)}", ""]
    for section, mine in split(comparison, found):
        labels = {name: comparison.labels[name] for name in section.benchmarks}
        lines += [f"## {md(section.title)}", ""]
        lines += markdown_table(main_columns(mine, labels, details=False))
        lines += ["", "### Per benchmark", ""]
        lines += markdown_table(detail_columns(section, mine, labels))
        lines += ["", *(f"- {md(note)}" for note in notes(section, mine, labels)), ""]
    ranks = rank_columns(found, comparison.labels)
    if ranks:
        lines += ["## Ranks", "", *markdown_table(ranks), ""]
    if published.rows:
        lines += ["## Published numbers", ""]
        lines += markdown_table(published_columns(published.rows, comparison.labels))
        lines += ["", f"- {md(PUBLISHED_NOTE)}"]
        lines += [*(f"- {doubt.kind}: {md(doubt.text)}" for doubt in published.doubts), ""]
    return "\n".join(lines)


def split(comparison: Comparison, found: list[Record]) -> list[tuple[Section, list[Record]]]:
    """Return every section with its own records."""
    rest, parts = list(found), []
    for section in comparison.sections:
        mine, rest = rest[: len(section.rows)], rest[len(section.rows) :]
        parts.append((section, mine))
    return parts


def markdown_table(columns: list[Column]) -> list[str]:
    padded = []
    for column in columns:
        cells = [md(text) for text in (column.heading, *column.cells)]
        width = max(3, *(len(cell) for cell in cells))
        rule = "-" * (width - 1) + ":" if column.numeric else "-" * width
        aligned = [c.rjust(width) if column.numeric else c.ljust(width) for c in cells]
        padded.append([aligned[0], rule, *aligned[1:]])
    return ["| " + " | ".join(line) + " |" for line in zip(*padded, strict=True)]


def md(text: str) -> str:
    """Return text for Markdown, without any sign of meaning."""
    for sign in "\\|*_<>`#[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def to_latex(comparison: Comparison, found: list[Record]) -> str:
    """Return every section as a `table` for a document that uses booktabs.

    Warnings stand below the table, all other notes in the text after it, which a page may break.
    """
    lines = ["% \\usepackage{booktabs}"]
    for section, mine in split(comparison, found):
        labels = {name: comparison.labels[name] for name in section.benchmarks}
        blocks = _blocks(main_columns(mine, labels, details=False), TEX_WIDTH, _tex_width)
        # a label is no text: only signs that are safe in a control argument
        label = f"tab:{_plain(section.task)}-{_plain(section.model)}"
        remarks = notes(section, mine, labels)
        pages = _pages(blocks, TEX_LINES)
        for number, page in enumerate(pages):
            title = tex(section.title) + (" (continued)" if number else "")
            lines += [
                "",
                "\\begin{table}[htbp]",
                "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
                *(["\\addtocounter{table}{-1}"] if number else []),
                f"\\caption{{{title}}}",
                *([] if number else [f"\\label{{{label}}}"]),
                *(line for block in page for line in _tabular(block)),
            ]
            if page is pages[-1]:
                lines += _minipage([note for note in remarks if note.startswith("WARNING")])
            lines.append("\\end{table}")
        rest = [note for note in remarks if not note.startswith("WARNING")]
        lines += [
            f"{{\\footnotesize\\raggedright Notes to table~\\ref{{{label}}}.",
            *(f"{tex(note)}\\par" for note in rest),
            "}",
        ]
    return "\n".join(lines) + "\n"


def _minipage(remarks: list[str]) -> list[str]:
    if not remarks:
        return []
    start, end = "\\begin{minipage}{\\linewidth}\\raggedright", "\\end{minipage}"
    return [start, *(f"{tex(note)}\\par" for note in remarks), end]


def _pages(blocks: list[list[Column]], limit: int) -> list[list[list[Column]]]:
    """Spread blocks over floats of at most `limit` lines, at least one block each."""
    pages: list[list[list[Column]]] = []
    room = -1
    for block in blocks:
        height = 6 + len(block[0].cells)  # titles, units, rules, the space below
        room -= height
        if room < 0:
            pages.append([])
            room = limit - height
        pages[-1].append(block)
    return pages


def _tabular(columns: list[Column]) -> list[str]:
    body = zip(*(column.cells for column in columns), strict=True)

    def line(cells: Sequence[str]) -> str:
        # after the line before, a bracket or star would be taken for its argument
        return "{}" + " & ".join(map(tex, cells)) + " \\\\"

    return [
        f"\\begin{{tabular}}{{{''.join('r' if c.numeric else 'l' for c in columns)}}}",
        "\\toprule",
        *(line(titles) for titles in _two_lines(columns) if any(titles)),
        line([f"({c.unit})" if c.unit else "" for c in columns]),
        "\\midrule",
        *map(line, body),
        "\\bottomrule",
        "\\end{tabular}",
        "\\par\\medskip",
    ]


def _tex_width(column: Column) -> int:
    title = _two_lines([column])
    return 1 + max(len(t) for t in (title[0][0], title[1][0], column.unit, *column.cells))


def _blocks(
    columns: list[Column], limit: int, width: Callable[[Column], int]
) -> list[list[Column]]:
    """Cut columns into blocks that fit `limit`; each begins with the first column."""
    first, *rest = columns
    blocks: list[list[Column]] = []
    room = -1
    for column in rest:
        room -= width(column)
        if room < 0:
            blocks.append([first])
            room = limit - width(first) - width(column)
        blocks[-1].append(column)
    return blocks


def _two_lines(columns: list[Column]) -> list[tuple[str, ...]]:
    """Break every title near its middle: a page is narrow."""
    broken = []
    for words in (column.title.split() for column in columns):
        cuts = range(len(words) // 2 + 1) if len(words) > 1 else [0]
        cut = min(cuts, key=lambda k: max(len(" ".join(words[:k])), len(" ".join(words[k:]))))
        broken.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return list(zip(*broken, strict=True))


TEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "Ł": r"\L{}",
    "ł": r"\l{}",
    "×": r"$\times$",
    "÷": r"$\div$",
    "²": r"$^2$",
    "°": r"$^\circ$",
    "µ": r"$\mu$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    "…": r"\dots{}",
    DASH: "--",
    "—": "---",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
}


def tex(text: str) -> str:
    """Return text for LaTeX; what pdfLaTeX has no letter for as its number: U+4E2D."""
    return "".join(TEX_SIGNS.get(sign) or _letters(sign) for sign in " ".join(text.split()))


def _letters(sign: str) -> str:
    name = unicodedata.name(sign, "").removeprefix("GREEK SMALL LETTER ").lower()
    if "α" <= sign <= "ω" and name.isalpha() and name != "omicron":
        return rf"$\{name.replace('lamda', 'lambda')}$"
    if sign.isascii() or ("À" <= sign <= "ÿ" and sign not in "ÐÞðþ"):
        return sign
    base = unicodedata.normalize("NFKD", sign)[0]
    return base if sign.isalpha() and base.isascii() else f"U+{ord(sign):04X}"


def _plain(name: str) -> str:
    return "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name)


# ---------------------------------------------------------------- a terminal


def text(folder: Path) -> str:
    """Return the tables of a comparison folder as plain text of at most 120 columns.

    Reads table.csv and nothing else. A table too wide for the terminal goes on in further blocks
    that repeat the method.
    """
    with open(Path(folder) / "table.csv", encoding="utf-8", newline="") as file:
        found = [_parsed(row) for row in csv.DictReader(file)]
    parts: dict[tuple[str, str], list[Record]] = {}
    for record in found:
        parts.setdefault((record["task"], record["model"]), []).append(record)
    lines: list[str] = []
    tests: set[str] = set()
    for (task, model), mine in parts.items():
        used = [
            name.removesuffix("_failed")
            for name in mine[0]
            if name.endswith("_failed") and any(record[name] is not None for record in mine)
        ]
        lines += [f"{task}: {model}", *_text_table(main_columns(mine, {b: b for b in used}, True))]
        items = {b: [r[f"{b}_n"] for r in mine if r[f"{b}_n"] is not None] for b in used}
        least = {b: number(mine[0], b, "detectable") for b in used}
        counts = [
            f"{b}: n = {max(ns)} items"
            + (f", detectable difference {least[b]:.1f} points" if least[b] is not None else "")
            for b, ns in items.items()
            if ns
        ]
        lines += textwrap.wrap("; ".join(counts), WIDTH)
        for shown, record in zip(_marked(mine), mine, strict=True):
            if record["not_comparable"]:
                note = f"WARNING: {shown}: not comparable: {record['not_comparable']}"
                lines += textwrap.wrap(note, WIDTH)
        lines.append("")
        tests |= {r[f"{b}_compared_by"] for r in mine for b in used} - {None}
    ranks = rank_columns(found, {})
    lines += ["ranks", *_text_table(ranks), ""] if ranks else []
    lines.append(f"a ± b: mean and sample standard deviation over seeds, in percent; {DASH}: none.")
    if tests:
        lines += textwrap.wrap(
            "*: the highest mean; =: not distinguishable from it (5 % level, Holm); 95 %: "
            "half-width over seeds and items. Detectable: found in 80 % of cases.",
            WIDTH,
        )
    lines.append("Init: calibration, allocation, initialization of one run; shared jobs in full.")
    if tests - {"crossed"}:
        lines.append("WARNING: methods of one run each are compared by items; seeds would differ.")
    if any(record["seeds"] == 1 for record in found):
        lines.append("WARNING: rows with one seed: their spread is unknown; do not rank by them.")
    if any(json.loads(record["tuned_edges"] or "{}") for record in found):
        lines.append("WARNING: !: the lowest or highest value tried; table.md says what to add.")
    if any(record["failed"] for record in found):
        lines.append("WARNING: some runs failed; table.md names them.")
    return "\n".join(lines) + "\n"


STRINGS = ("model", "task", "method", "label", "not_comparable", "by_design")
STRINGS += ("tuned", "tuned_edges")
STRING_ENDS = ("_mark", "_compared_by")


def _parsed(row: dict[str, str]) -> Record:
    record: Record = {}
    for name, value in row.items():
        if name in STRINGS:
            record[name] = value
        elif value == "":
            record[name] = None
        elif name.endswith(STRING_ENDS):
            record[name] = value
        else:
            record[name] = float(value) if "." in value or "e" in value else int(value)
    return record


def _text_table(columns: list[Column]) -> list[str]:
    lines: list[str] = []
    for block in _blocks(columns, WIDTH + 2, lambda column: 2 + len(_text_column(column)[0])):
        rendered = [_text_column(column) for column in block]
        lines += ["", *("  ".join(parts).rstrip() for parts in zip(*rendered, strict=True))]
    return lines[1:]


def _text_column(column: Column) -> list[str]:
    texts = [_short(column.title), column.unit and f"({column.unit})"]
    texts += [_short(cell) for cell in column.cells]
    width = max(len(item) for item in texts)
    aligned = [item.rjust(width) if column.numeric else item.ljust(width) for item in texts]
    return [*aligned[:2], "-" * width, *aligned[2:]]


def _short(name: str, limit: int = 32) -> str:
    if len(name) <= limit:
        return name
    mark = re.search(r" \[[a-z]+\]$|$", name)[0]  # a footnote's letter stays
    return name[: limit - 1 - len(mark)] + "…" + mark
