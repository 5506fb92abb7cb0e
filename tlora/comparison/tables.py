"""The comparison as CSV, Markdown, LaTeX and plain text.

All forms are rendered from the same records, the rows of table.csv, so they cannot disagree; equal
inputs give equal bytes.

Columns of table.csv
--------------------
One row per model, task and method. `seeds`: runs with a seed that did not fail; `failed`: runs
without some number. For every benchmark B: `B_mean_percent`, `B_std_percent` (sample standard
deviation over seeds), `B_ci95_percent` (95 % half-width from the items alone), `B_n` (items of one
run), `B_unextracted_percent`, `B_failed` (runs without this number), and `B_{metric}_mean_percent`
for further metrics. Costs are means over seeds (`peak_memory_bytes`: the maximum) of one run.
An empty field: does not apply, or no number.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.comparison.collect import Comparison, Row, Section
from tlora.comparison.statistics import summarise, wilson_half_width

WIDTH = 120
"""Columns of a terminal that `text` stays within."""

TEX_WIDTH = 84
"""Letters of a LaTeX table's line: what fits the default text width in footnote size."""

DASH = "–"

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


def records(comparison: Comparison) -> list[Record]:
    """Return the rows of table.csv as plain numbers and strings; None where there is nothing."""
    return [
        _record(row, section.benchmarks, {b: section.metrics(b) for b in section.benchmarks})
        for section in comparison.sections
        for row in section.rows
    ]


def _record(row: Row, benchmarks: Sequence[str], metrics: dict[str, list[str]]) -> Record:
    record: Record = {
        "model": row.model,
        "task": row.task,
        "method": row.method,
        "label": row.label,
        "base": int(row.base),
        "runs": len(row.runs),
        "seeds": len(row.seeds),
        "failed": row.failed(),
        "trainable_parameters": row.trainable_parameters,
    }
    for name in benchmarks:
        accuracy = row.accuracy(name)
        record |= {
            f"{name}_mean_percent": _percent(accuracy.mean),
            f"{name}_std_percent": _percent(accuracy.std),
            f"{name}_ci95_percent": _percent(row.half_width(name)),
            f"{name}_n": next(iter(row.items(name)), None),
            f"{name}_unextracted_percent": _percent(row.unextracted(name)),
            f"{name}_failed": row.failed(name),
        }
        for metric in metrics[name]:
            mean = row.further(name, metric).mean
            record[f"{name}_{metric}_mean_percent"] = _percent(mean)
    return record | {
        "initialization_seconds": _rounded(row.initialization_seconds),
        "training_seconds": _rounded(summarise(row.training("train_seconds")).mean),
        "evaluation_seconds": _rounded(row.evaluation_seconds),
        "tokens_per_second": _rounded(summarise(row.training("tokens_per_second")).mean),
        "peak_memory_bytes": row.peak_memory_bytes,
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 6)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# ---------------------------------------------------------------- columns


def main_columns(found: list[Record], benchmarks: dict[str, str], answers: bool) -> list[Column]:
    """Return the columns of the table of one section.

    Parameters
    ----------
    found
        The section's records.
    benchmarks
        The section's benchmarks and their labels.
    answers
        Whether the share of completions without an answer stands beside every benchmark.
    """
    columns = [
        Column("Method", "", tuple(r["label"] for r in found), numeric=False),
        Column("Seeds", "", tuple(DASH if r["base"] else str(r["seeds"]) for r in found)),
        Column("Trainable", "parameters", _cells(found, "trainable_parameters", "{:,.0f}")),
    ]
    for name, label in benchmarks.items():
        columns.append(Column(label, "%", tuple(accuracy_cell(r, name) for r in found)))
        if answers:
            cells = _cells(found, f"{name}_unextracted_percent", "{:.2f}")
            columns.append(Column("No answer", "%", cells))
    memory = [record["peak_memory_bytes"] or 0 for record in found]
    unit, size, form = ("MiB", 2**20, "{:,.0f}")
    if max(memory, default=0) >= 2**30:
        unit, size, form = ("GiB", 2**30, "{:,.2f}")
    return [
        *columns,
        Column("Init", "s", _cells(found, "initialization_seconds", "{:,.1f}")),
        Column("Training", "s", _cells(found, "training_seconds", "{:,.1f}")),
        Column("Speed", "tokens/s", _cells(found, "tokens_per_second", "{:,.0f}")),
        Column("Peak memory", unit, _cells(found, "peak_memory_bytes", form, size)),
    ]


def detail_columns(section: Section, found: list[Record], labels: dict[str, str]) -> list[Column]:
    """Return a second table of the section: one row per benchmark, metric and method."""
    lines: list[tuple[str, ...]] = []
    for name in section.benchmarks:
        for row, record in zip(section.rows, found, strict=True):
            metric = next((s.metric for s in row.scores(name)), "accuracy")
            lines.append(
                (
                    labels[name],
                    metric,
                    record["label"],
                    accuracy_cell(record, name),
                    _cell(record[f"{name}_ci95_percent"], "{:.2f}"),
                    _cell(record[f"{name}_n"], "{:d}"),
                    _cell(record[f"{name}_unextracted_percent"], "{:.2f}"),
                )
            )
        for metric in section.metrics(name):
            for row in section.rows:
                summary = row.further(name, metric)
                value = _spread(_percent(summary.mean), _percent(summary.std), row.base)
                items = next(iter(row.items(name)), None)
                share = summary.mean
                known = items is not None and share is not None and 0 <= share <= 1
                width = _percent(wilson_half_width(share, items)) if known else None
                cells = (value, _cell(width, "{:.2f}"), _cell(items, "{:d}"), DASH)
                lines.append((labels[name], metric, row.label, *cells))
    titles = [
        ("Benchmark", ""),
        ("Metric", ""),
        ("Method", ""),
        ("Value", "%"),
        ("95 % half-width", "points"),
        ("Items", "n"),
        ("No answer", "%"),
    ]
    cells_of = list(zip(*lines, strict=True)) if lines else [()] * len(titles)
    return [
        Column(title, unit, tuple(cells), numeric=index > 2)
        for index, ((title, unit), cells) in enumerate(zip(titles, cells_of, strict=True))
    ]


def accuracy_cell(record: Record, benchmark: str) -> str:
    """Return mean and standard deviation as shown: `12.34 ± 0.56`, or that runs failed."""
    failed = record[f"{benchmark}_failed"] or 0
    mean = record[f"{benchmark}_mean_percent"]
    if mean is None:
        return "failed" if failed else DASH
    text = _spread(mean, record[f"{benchmark}_std_percent"], bool(record["base"]))
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


def notes(section: Section, labels: dict[str, str], digits: int | None = 12) -> list[str]:
    """Return the footnotes of a section's table: what its numbers mean and rest on.

    Parameters
    ----------
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
        lines.append("The first row is the base model, untrained: one run, no seed.")
    lines += _item_notes(section, labels)
    lines.append(
        "No answer: completions in which the scorer found no answer to read; they count as wrong."
    )
    lines.append(
        "Init: calibration, allocation and initialization of one run; a job shared by several "
        "seeds or methods counts in full, once, in each row that needs it. Training, speed: mean "
        "over seeds; peak memory of training: maximum over seeds. Generation is not included."
    )
    lines += _failure_notes(section)
    for name, digest in sorted((section.card.get("sha256") or {}).items()):
        lines.append(f"Data: {name}, SHA-256 {digest[:digits]}.")
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
        widths = [row.half_width(name) for row in section.rows for name in names]
        widest = 100 * max(width for width in widths if width is not None)
        note = (
            f"{who}: {metric}, n = {' or '.join(map(str, items))} items; from the items alone the "
            f"95 % half-width of one run is at most {widest:.2f} points (Wilson)."
        )
        unequal = " WARNING: the runs were scored on unequal items."
        lines.append(note if len(items) == 1 else note + unequal)
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


def to_markdown(comparison: Comparison, found: list[Record]) -> str:
    """Return every section as Markdown: the table, the table of benchmarks, the footnotes."""
    lines = [f"# Comparison: {_md(comparison.preset)}", ""]
    for section, mine in split(comparison, found):
        labels = {name: comparison.labels[name] for name in section.benchmarks}
        lines += [f"## {_md(section.title)}", ""]
        lines += _markdown_table(main_columns(mine, labels, answers=False))
        lines += ["", "### Per benchmark", ""]
        lines += _markdown_table(detail_columns(section, mine, labels))
        lines += ["", *(f"- {_md(note)}" for note in notes(section, labels)), ""]
    return "\n".join(lines)


def split(comparison: Comparison, found: list[Record]) -> list[tuple[Section, list[Record]]]:
    """Return every section with its own records."""
    rest, parts = list(found), []
    for section in comparison.sections:
        mine, rest = rest[: len(section.rows)], rest[len(section.rows) :]
        parts.append((section, mine))
    return parts


def _markdown_table(columns: list[Column]) -> list[str]:
    padded = []
    for column in columns:
        cells = [_md(text) for text in (column.heading, *column.cells)]
        width = max(3, *(len(cell) for cell in cells))
        rule = "-" * (width - 1) + ":" if column.numeric else "-" * width
        aligned = [c.rjust(width) if column.numeric else c.ljust(width) for c in cells]
        padded.append([aligned[0], rule, *aligned[1:]])
    return ["| " + " | ".join(line) + " |" for line in zip(*padded, strict=True)]


def _md(text: str) -> str:
    for sign in "\\|*_<>`#[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def to_latex(comparison: Comparison, found: list[Record]) -> str:
    """Return every section as a `table` for a document that uses booktabs."""
    lines = ["% \\usepackage{booktabs}"]
    for section, mine in split(comparison, found):
        labels = {name: comparison.labels[name] for name in section.benchmarks}
        columns = main_columns(mine, labels, answers=False)
        lines += [
            "",
            "\\begin{table}[htbp]",
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
            f"\\caption{{{_tex(section.title)}}}",
            # a label is no text: only signs that are safe in a control argument
            f"\\label{{tab:{_plain(section.task)}-{_plain(section.model)}}}",
        ]
        for block in _blocks(columns, TEX_WIDTH, _tex_width):
            lines += _tabular(block)
        lines += [
            "\\begin{minipage}{\\linewidth}\\footnotesize\\raggedright",
            *(f"{_tex(note)}\\par" for note in notes(section, labels)),
            "\\end{minipage}",
            "\\end{table}",
        ]
    return "\n".join(lines) + "\n"


def _tabular(columns: list[Column]) -> list[str]:
    body = zip(*(column.cells for column in columns), strict=True)
    return [
        f"\\begin{{tabular}}{{{''.join('r' if c.numeric else 'l' for c in columns)}}}",
        "\\toprule",
        *(" & ".join(map(_tex, line)) + " \\\\" for line in _two_lines(columns)),
        " & ".join(_tex(f"({c.unit})" if c.unit else "") for c in columns) + " \\\\",
        "\\midrule",
        *(" & ".join(map(_tex, cells)) + " \\\\" for cells in body),
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
    DASH: "--",
}


def _tex(text: str) -> str:
    return "".join(TEX_SIGNS.get(sign, sign) for sign in " ".join(text.split()))


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
    for (task, model), mine in parts.items():
        used = [
            name.removesuffix("_failed")
            for name in mine[0]
            if name.endswith("_failed") and any(record[name] is not None for record in mine)
        ]
        lines += [f"{task}: {model}", *_text_table(main_columns(mine, {b: b for b in used}, True))]
        items = {b: [r[f"{b}_n"] for r in mine if r[f"{b}_n"] is not None] for b in used}
        counts = [f"{b}: n = {max(ns)} items" for b, ns in items.items() if ns]
        lines += [*textwrap.wrap("; ".join(counts), WIDTH), ""]
    lines.append(f"a ± b: mean and sample standard deviation over seeds, in percent; {DASH}: none.")
    lines.append("Init: calibration, allocation, initialization of one run; shared jobs in full.")
    if any(record["seeds"] == 1 for record in found):
        lines.append("WARNING: rows with one seed: their spread is unknown; do not rank by them.")
    if any(record["failed"] for record in found):
        lines.append("WARNING: some runs failed; table.md names them.")
    return "\n".join(lines) + "\n"


STRINGS = ("model", "task", "method", "label")


def _parsed(row: dict[str, str]) -> Record:
    record: Record = {}
    for name, value in row.items():
        if name in STRINGS:
            record[name] = value
        elif value == "":
            record[name] = None
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
    return name if len(name) <= limit else name[: limit - 1] + "…"
