"""index.html: the page to look at a comparison with, from tables down to single completions.

It needs no network and no server. The page itself holds the tables; panels of rows and runs and the
items are files of `index_files/` that it loads when they are asked for (see `index_items`).
Whatever models wrote goes into the page as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tlora.artefact import read_json
from tlora.comparison import costs, fingerprint, index_items, ledger, tables
from tlora.comparison.collect import Choice, Comparison, Row, Run, Section
from tlora.comparison.published import Ledger
from tlora.comparison.tables import DASH, MARKS, PUBLISHED_NOTE, Column, Record

FILES = "index_files"
"""The folder beside the page."""

ASSETS = Path(__file__).with_name("assets")

POINTS = 300
"""Most points of a loss curve; longer logs are averaged."""

BADGES = {"best": "best", "tie": "tie"}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes
    ----------
    key
        What the column is sorted by; None stands last.
    href
        Where its text leads.
    badge
        A short remark before the text, shown as a label.
    below
        A second, smaller line.
    """

    text: str
    key: float | str | None = None
    href: str = ""
    badge: str = ""
    below: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a table, with what filters look at."""

    cells: tuple[Cell, ...]
    base: bool = False
    task: str = ""
    model: str = ""
    good: bool = True
    """Whether it has a best mean, or one not distinguishable from it."""


@dataclass(frozen=True)
class Table:
    """A table that the page sorts and filters; the cells of column `header` name their row."""

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    header: int = 0
    search: bool = False


@dataclass
class Atlas:
    """Numbers of rows, runs and places on the page, in the comparison's order.

    Attributes
    ----------
    runs, names, labels
        All runs, trials of the tuning last, what they and their methods are called.
    cells
        The grid's cell of every run.
    places
        (section, benchmark) of every set of items.
    out
        The folder of the page, which links are relative to.
    """

    comparison: Comparison
    out: Path
    rows: list[Row] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    cells: list[Mapping[str, Any]] = field(default_factory=list)
    places: list[tuple[Section, str]] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)

    def run(self, run: Run) -> int:
        """Return a run's number."""
        return self.numbers[id(run)]

    def link(self, path: str | Path) -> str:
        """Return a file's path as seen from the page."""
        return quote(Path(os.path.relpath(path, self.out)).as_posix())


def write(
    comparison: Comparison,
    grid: Mapping[str, Any],
    found: Sequence[Record],
    numbers: Ledger,
    pictures: Path,
    folder: Path,
    out: Path,
) -> str:
    """Write the page's files below `folder` and return the page.

    Parameters
    ----------
    comparison, found, numbers
        What is shown: artefacts, records of table.csv and published numbers.
    grid
        The content of grid.json.
    pictures
        pictures.json (a list: path, task, model, title, description), beside the pictures, which
        are copied.
    folder
        Where the files go for now; the page refers to it as `index_files`.
    out
        Where page and folder will stand.

    Raises
    ------
    UserError
        For a broken artefact.
    """
    atlas = _atlas(comparison, grid, out)
    places = [
        {**place, **_opponents(atlas, found, section, benchmark)}
        for place, (section, benchmark) in zip(
            _write_items(atlas, folder), atlas.places, strict=True
        )
    ]
    for number, row in enumerate(atlas.rows):
        index_items.script(folder, f"rows/{number}", _row_panel(atlas, row, places))
    for number, run in enumerate(atlas.runs):
        index_items.script(folder, f"runs/{number}", _run_panel(atlas, number, run, places))
    shown = _copy_plots(pictures, folder / "plots")
    return _render(atlas, found, numbers, shown, places)


def _atlas(comparison: Comparison, grid: Mapping[str, Any], out: Path) -> Atlas:
    atlas = Atlas(comparison, out, rows=comparison.rows)
    known = [*grid["cells"], *(one for c in grid.get("choices", []) for one in c["trials"])]
    cells = {_identity(cell): cell for cell in known}
    shown = [(run, row.label, "") for row in atlas.rows for run in row.runs]
    for row in atlas.rows:
        if row.choice:
            pairs = zip(row.choice.trials, row.choice.tried, strict=True)
            shown += [(run, row.label, f", trial with {_settings_text(t)}") for run, t in pairs]
    for run, label, remark in shown:
        key = (run.model, run.task, run.method, run.seed, run.spec_id)
        atlas.numbers[id(run)] = len(atlas.runs)
        atlas.runs.append(run)
        seed = "" if run.seed is None else f", seed {run.seed}"
        atlas.names.append(f"{label}{seed}{remark}")
        atlas.labels.append(label)
        atlas.cells.append(cells.get(key, {}))
    atlas.places = [
        (section, benchmark)
        for section in comparison.sections
        for benchmark in section.benchmarks
        if any(benchmark in run.generations for row in section.rows for run in row.runs)
    ]
    return atlas


def _identity(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell.get(key) for key in ("model", "task", "method", "seed", "spec_id"))


def _write_items(atlas: Atlas, folder: Path) -> list[dict[str, Any]]:
    """Write every place's items; return what the page must know of the places."""
    places = []
    for number, (section, benchmark) in enumerate(atlas.places):
        sources = []
        for run in (run for row in section.rows for run in row.runs):
            if benchmark in run.generations:
                score = atlas.cells[atlas.run(run)]["scores"].get(benchmark)
                path = run.generations[benchmark]
                sources.append(index_items.Source(atlas.run(run), path, score and Path(score)))
        count = index_items.write_place(folder, number, sources)
        places.append(
            {
                "title": f"{section.title}: {atlas.comparison.labels[benchmark]}",
                "items": count,
                "runs": [source.run for source in sources],
                "share": section.share(benchmark),
            }
        )
    return places


# ---------------------------------------------------------------- panels


Block = dict[str, Any]


def _row_panel(atlas: Atlas, row: Row, places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is told of a method: every seed's numbers, loss curves, tuning."""
    section = _section(atlas, row)
    head = ["Seed", *(atlas.comparison.labels[name] for name in section.benchmarks)]
    lines = []
    for run in row.runs:
        link = f"#run-{atlas.run(run)}"
        told = [_score_text(run, name, section.share(name)) for name in section.benchmarks]
        costs = [_seconds(run.initialization_seconds), _seconds(_of(run, "train_seconds"))]
        costs.append(_memory(_of(run, "peak_memory_bytes")))
        lines.append([[_seed(run), link], *([text, link] for text in told), *costs])
    head += ["Init (s)", "Training (s)", "Memory"]
    blocks: list[Block] = [
        {"kind": "table", "title": "Runs", "head": head, "rows": lines},
        *_browse(atlas, row, places),
        *_curves([(f"seed {_seed(run)}", run) for run in row.runs]),
    ]
    if row.choice:
        blocks.append(_trials(atlas, row.choice))
    return {"title": f"{row.label} on {section.title}", "blocks": blocks}


def _browse(atlas: Atlas, row: Row, places: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Return links to the completions of a row, and to those that the baseline got wrong."""
    name = _choice_name(atlas, row)
    links = []
    for number, ((section, _), place) in enumerate(zip(atlas.places, places, strict=True)):
        if any(row is other for other in section.rows):
            title = place["title"].removeprefix(f"{section.title}: ")
            links.append([f"Completions: {title}", f"#items?place={number}&a={name}"])
            against = place["b"]
            if against not in ("", name):
                told = f"Where {row.label} beats {place['against']}: {title}"
                query = f"place={number}&a={name}&b={against}&filter=better"
                links.append([told, f"#items?{query}"])
    return [{"kind": "links", "title": "", "items": links}] if links else []


def _choice_name(atlas: Atlas, row: Row) -> str:
    """Return the name of all runs of a row in the page's addresses."""
    if len(row.runs) == 1:
        return f"run{atlas.run(row.runs[0])}"
    return f"row{next(n for n, other in enumerate(atlas.rows) if other is row)}"


def _run_panel(
    atlas: Atlas, number: int, run: Run, places: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what is told of a run: numbers, verdict of the check, settings, files, loss curve."""
    cell = atlas.cells[number]
    section = next(s for s in atlas.comparison.sections if (s.task, s.model) == _home(run))
    facts = [
        ["Method", atlas.labels[number]],
        ["Task", section.task_label],
        ["Model", section.model_label],
    ]
    facts += [["Seed", _seed(run)], ["Run", run.spec_id]]
    blocks: list[Block] = []
    for benchmark, reason in sorted(run.failures.items()):
        blocks.append(
            {"kind": "warning", "text": f"Failed{benchmark and ', ' + benchmark}: {reason}"}
        )
    facts += _check_facts(cell, run)
    blocks.append({"kind": "facts", "title": "", "items": facts})
    lines = []
    for benchmark, score in run.scores.items():
        told = _score_text(run, benchmark, score.share)
        browse = [
            index
            for index, (home, name) in enumerate(atlas.places)
            if (home is section and name == benchmark) and number in places[index]["runs"]
        ]
        link = ["Browse", f"#items?place={browse[0]}&a=run{number}"] if browse else DASH
        label = atlas.comparison.labels.get(benchmark, benchmark)
        cost = run.evaluation.get(benchmark, {})
        row = [label, score.metric, [told, atlas.link(score.path)], str(score.n)]
        lines.append([*row, str(score.unextracted), _seconds(cost.get("seconds")), link])
    head = ["Benchmark", "Metric", "Value", "Items", "No answer", "Generation (s)", "Completions"]
    if lines:
        blocks.append({"kind": "table", "title": "Scores", "head": head, "rows": lines})
    blocks += _curves([(atlas.names[number], run)])
    training = [
        [key.removesuffix("_bytes").replace("_", " "), _memory(value)]
        if key.endswith("_bytes")
        else [key.replace("_", " "), _shown(value)]
        for key, value in _training(run).items()
    ]
    if training:
        blocks.append({"kind": "facts", "title": "Training", "items": training})
    if run.settings:
        settings = [[key, _shown(value)] for key, value in sorted(run.settings.items())]
        blocks.append({"kind": "facts", "title": "Settings", "items": settings})
    for group, values in fingerprint.fingerprint(run).items():
        if group not in ("training", "method"):
            told = [[key, _shown(value)] for key, value in _flat(values)]
            blocks.append({"kind": "facts", "title": f"Fingerprint: {group}", "items": told})
    files = [[name, path, atlas.link(path)] for name, path in _files(cell, run)]
    if files:
        blocks.append({"kind": "facts", "title": "Files", "items": files})
    return {"title": atlas.names[number], "blocks": blocks}


def _section(atlas: Atlas, row: Row) -> Section:
    return next(s for s in atlas.comparison.sections if any(row is other for other in s.rows))


def _home(run: Run) -> tuple[str, str]:
    return run.task, run.model


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {tables.plain(value)}" for key, value in settings.items())


def _seed(run: Run) -> str:
    return "none" if run.seed is None else str(run.seed)


def _of(run: Run, key: str) -> float | None:
    value = (run.training or {}).get(key)
    return value if isinstance(value, int | float) else None


def _training(run: Run) -> dict[str, Any]:
    training = run.training or {}
    return {key: training[key] for key in ledger.TRAINING if training.get(key) is not None}


def _check_facts(cell: Mapping[str, Any], run: Run) -> list[list[str]]:
    """Return the verdict of the adapter gate as far as it is known."""
    path = Path(cell["check"]) if cell.get("check") else None
    if path is None or not path.is_file():
        return [] if run.base else [["Adapter check", "not recorded"]]
    verdict = json.loads(path.read_text(encoding="utf-8"))
    if verdict.get("passed"):
        return [["Adapter check", "passed"]]
    reasons = "; ".join(map(str, verdict.get("reasons", [])))
    return [["Adapter check", f"FAILED: {reasons or 'no reason given'}"]]


def _files(cell: Mapping[str, Any], run: Run) -> list[tuple[str, str]]:
    """Return the files of a run that exist: what they are and where."""
    found = [("Data card", cell.get("card")), ("Allocation", cell.get("allocation"))]
    found += [("Before training", path) for path in cell.get("costs", [])]
    if run.train_path:
        found += [("Training", str(run.train_path))]
        found += [("Log", run.train_path.with_name("log.jsonl").as_posix())]
    found += [("Verdict of the check", cell.get("check"))]
    found += [("Export", run.export_path)]
    found += [(f"Completions, {name}", path) for name, path in run.generations.items()]
    found += [(f"Score, {name}", path) for name, path in cell.get("scores", {}).items()]
    unique = dict.fromkeys((name, str(path)) for name, path in found if path)
    return [(name, path) for name, path in unique if Path(path).is_file()]


def _curves(runs: Sequence[tuple[str, Run]]) -> list[Block]:
    """Return the loss curves of runs as one picture; nothing where there is no log."""
    series = []
    for name, run in runs:
        logged = [(int(row["step"]), row.get("loss")) for row in run.log]
        points = [(s, v) for s, v in logged if isinstance(v, int | float) and math.isfinite(v)]
        if points:
            series.append({"name": name, "points": _thinned(points)})
    return [{"kind": "curve", "title": "Training loss", "series": series}] if series else []


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most `POINTS` points: the last step and the mean loss of equal parts."""
    size = max(1, math.ceil(len(points) / POINTS))
    parts = [points[first : first + size] for first in range(0, len(points), size)]
    return [(part[-1][0], round(math.fsum(v for _, v in part) / len(part), 5)) for part in parts]


def _trials(atlas: Atlas, choice: Choice) -> Block:
    """Return the trials of a row's tuning as a table of a panel."""
    tried = list(dict.fromkeys(key for values in choice.tried for key in values))
    rows = []
    for index, (trial, values) in enumerate(zip(choice.trials, choice.tried, strict=True)):
        link = f"#run-{atlas.run(trial)}"
        remark = "chosen" if index == choice.winner else ""
        shown = [tables.plain(values[key]) if key in values else DASH for key in tried]
        rows.append([*shown, [_trial_text(choice.values[index]), link], remark])
    title = f"Tuning: trials, compared by {choice.metric} on the validation split"
    note = " ".join(_warnings(choice))
    return {
        "kind": "table",
        "title": title,
        "head": [
            *tried,
            f"{choice.metric} ({'higher' if choice.higher else 'lower'} is better)",
            "",
        ],
        "rows": rows,
        "note": note,
    }


def _trial_text(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _warnings(choice: Choice) -> list[str]:
    return [f"WARNING: {line}." for line in tables.edge_lines(choice)]


def _score_text(run: Run, benchmark: str, share: bool) -> str:
    if run.failure(benchmark) is not None or benchmark not in run.scores:
        return "failed"
    value = run.scores[benchmark].value
    return f"{100 * value:.2f} %" if share else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f}"


def _memory(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def _shown(value: Any) -> str:
    """Return a setting or a figure as people read it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        return ", ".join(map(str, value))
    return json.dumps(value, sort_keys=True)


# ---------------------------------------------------------------- tables


def sort_key(text: str) -> float | None:
    """Return the first number of a cell's text, None where there is none."""
    match = re.search(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", text)
    return float(match.group().replace(",", "").replace("−", "-")) if match else None


def _cell(text: str, numeric: bool, href: str = "", below: str = "") -> Cell:
    badge = ""
    for mark, sign in MARKS.items():
        if text.startswith(sign) and numeric:
            badge, text = BADGES[mark], text.removeprefix(sign)
    key = sort_key(text) if numeric else text.casefold()
    return Cell(text, key, "" if text in (DASH, "") else href, badge, below)


def _plain(
    columns: Sequence[Column],
    caption: str,
    header: int = 0,
    search: bool = False,
    links: Sequence[str] = (),
) -> Table:
    """Return a table of columns; `links`: where the numbers of every line lead, if anywhere."""
    lines = []
    for place, texts in enumerate(zip(*(column.cells for column in columns), strict=True)):
        link = links[place] if links else ""
        cells = [
            _cell(text, column.numeric, link if column.numeric or number == header else "")
            for number, (column, text) in enumerate(zip(columns, texts, strict=True))
        ]
        lines.append(Line(tuple(cells)))
    return Table(caption, tuple(columns), tuple(lines), header, search)


def _row_link(atlas: Atlas, row: Row) -> str:
    """Return where the numbers of a row lead: to its panel, or to its only run's."""
    if len(row.runs) == 1 and row.choice is None:
        return f"#run-{atlas.run(row.runs[0])}"
    return f"#row-{next(n for n, other in enumerate(atlas.rows) if other is row)}"


def _main(atlas: Atlas, section: Section, found: list[Record]) -> Table:
    """Return the table of a section: every number leads to its row's runs."""
    labels = {name: atlas.comparison.labels[name] for name in section.benchmarks}
    names = {label: name for name, label in labels.items()}
    columns = tables.main_columns(found, labels, details=False)
    lines = []
    for place, (row, record) in enumerate(zip(section.rows, found, strict=True)):
        href, cells = _row_link(atlas, row), []
        for column in columns:
            name = names.get(column.title)
            below = _interval(record, name) if name else ""
            cells.append(_cell(column.cells[place], column.numeric, href, below))
        good = any(record[f"{name}_mark"] in BADGES for name in labels)
        lines.append(Line(tuple(cells), bool(record["base"]), section.task, section.model, good))
    caption = f"{section.title}: mean ± standard deviation over seeds, below it the 95 % interval"
    return Table(caption, tuple(columns), tuple(lines))


def _interval(record: Record, name: str) -> str:
    low = tables.number(record, name, "bootstrap_low")
    high = tables.number(record, name, "bootstrap_high")
    if low is not None and high is not None:
        return f"{low:.1f} to {high:.1f}"
    mean, width = tables.number(record, name, "mean"), tables.number(record, name, "ci95")
    return "" if mean is None or width is None else f"{mean - width:.1f} to {mean + width:.1f}"


def _all_runs(atlas: Atlas) -> Table:
    """Return every run on every benchmark; each number leads to its run."""
    titles = ("Task", "Model", "Method", "Seed", "Benchmark", "Value", "No answer", "Items")
    columns = [Column(t, "", (), numeric=i in (3, 5, 6, 7)) for i, t in enumerate(titles)]
    columns += [Column("Training", "s", ()), Column("Memory", "MiB", ())]
    columns += [Column("Status", "", (), numeric=False)]
    lines = []
    for section in atlas.comparison.sections:
        for run in (run for row in section.rows for run in row.runs):
            href = f"#run-{atlas.run(run)}"
            for benchmark in section.benchmarks:
                score = run.scores.get(benchmark)
                failure = run.failure(benchmark)
                memory = _of(run, "peak_memory_bytes")
                texts = (
                    (section.task_label, ""),
                    (section.model_label, ""),
                    (run.label, href),
                    (_seed(run), href),
                    (atlas.comparison.labels[benchmark], ""),
                    (_score_text(run, benchmark, section.share(benchmark)), href),
                    (str(score.unextracted) if score else DASH, href),
                    (str(score.n) if score else DASH, href),
                    (_seconds(_of(run, "train_seconds")), href),
                    (DASH if memory is None else f"{memory / 2**20:,.0f}", href),
                    (f"failed: {failure}" if failure else "ok", ""),
                )
                cells = [
                    _cell(text, column.numeric, link)
                    for column, (text, link) in zip(columns, texts, strict=True)
                ]
                lines.append(Line(tuple(cells), run.base, section.task, section.model))
    return Table("Every run on every benchmark", tuple(columns), tuple(lines), 2, search=True)


def _tuning(atlas: Atlas) -> tuple[Table | None, list[str]]:
    """Return all trials of all rows, and a warning for every winner at an edge."""
    titles = ("Task", "Model", "Method", "Tried", "By", "Score", "Chosen")
    columns = [Column(title, "", (), numeric=title == "Score") for title in titles]
    lines, warnings = [], []
    for row in (row for row in atlas.rows if row.choice is not None):
        section, choice = _section(atlas, row), row.choice
        warnings += [f"{text} ({row.label} on {section.title})" for text in _warnings(choice)]
        for index, (trial, tried) in enumerate(zip(choice.trials, choice.tried, strict=True)):
            chosen = index == choice.winner
            edge = ", ".join(f"{side} edge of {key}" for key, side in sorted(choice.edges.items()))
            texts = (
                section.task_label,
                section.model_label,
                row.label,
                _settings_text(tried),
                choice.metric,
                _trial_text(choice.values[index]),
                ("chosen" + (f", at the {edge}" if edge else "")) if chosen else "",
            )
            link = f"#run-{atlas.run(trial)}"
            cells = tuple(
                _cell(text, column.numeric, link if column.title in ("Tried", "Score") else "")
                for column, text in zip(columns, texts, strict=True)
            )
            lines.append(Line(cells, False, section.task, section.model))
    if not lines:
        return None, []
    caption = "Trials of the tuning, on the validation split"
    return Table(caption, tuple(columns), tuple(lines), 2, search=True), warnings


def _environment(atlas: Atlas) -> Table | None:
    """Return the libraries' versions, one line for every version that some run had."""
    found: dict[tuple[str, str], list[Run]] = {}
    trained = [run for run in atlas.runs if run.training]
    for run in trained:
        for name, version in (run.training or {}).get("versions", {}).items():
            found.setdefault((name, str(version)), []).append(run)
    if not found:
        return None
    lines = []
    for (name, version), runs in sorted(found.items()):
        every = len(runs) == len(trained)
        who = (
            "all"
            if every
            else f"{len(runs)} of {len(trained)}: "
            + "; ".join(atlas.names[atlas.run(run)] for run in runs)
        )
        lines.append((name, version, who))
    columns = [
        Column(title, "", cells, numeric=False)
        for title, cells in zip(
            ("Library", "Version", "Runs"), zip(*lines, strict=True), strict=True
        )
    ]
    return _plain(columns, "Versions of libraries in training", 0)


def _cards(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the data cards, one a task and model."""
    cards = []
    for section in comparison.sections:
        content = dict(section.card)
        prompt = content.pop("prompt", None)
        facts = [[key, _shown(value)] for key, value in _flat(content)]
        for name, overlap in section.overlaps.items():
            label = comparison.labels.get(name, name)
            facts += [[f"overlap with {label}, {k}", _shown(v)] for k, v in _flat(overlap)]
        if facts or prompt:
            cards.append({"title": section.title, "facts": facts, "prompt": prompt})
    return cards


def _flat(content: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}, ")
        else:
            yield name, value


# ---------------------------------------------------------------- the page


def _render(
    atlas: Atlas,
    found: Sequence[Record],
    numbers: Ledger,
    pictures: Sequence[Mapping[str, str]],
    places: Sequence[Mapping[str, Any]],
) -> str:
    import jinja2

    comparison = atlas.comparison
    style, code = (
        (ASSETS / "index.css").read_text("utf-8"),
        (ASSETS / "index.js").read_text("utf-8"),
    )
    spent = costs.records(comparison, found)
    sections = []
    parts = zip(tables.split(comparison, list(found)), tables.split(comparison, spent), strict=True)
    for (section, mine), (_, cost) in parts:
        labels = {name: comparison.labels[name] for name in section.benchmarks}
        notes = tables.notes(section, mine, labels, digits=None)
        links = {row.label: _row_link(atlas, row) for row in section.rows}
        details = tables.detail_columns(section, mine, labels)
        sections.append(
            {
                "id": f"section-{len(sections)}",
                "title": section.title,
                "task": section.task,
                "model": section.model,
                "main": _main(atlas, section, mine),
                "details": _plain(
                    details,
                    f"{section.title}: every metric of every benchmark, and what was compared",
                    2,
                    links=[links[label] for label in details[2].cells],
                ),
                "costs": _plain(
                    costs.columns(section, cost, labels),
                    f"{section.title}: costs of every method",
                    links=[_row_link(atlas, row) for row in section.rows],
                ),
                "cost_notes": costs.notes(section, cost),
                "warnings": [note for note in notes if _warns(note)],
                "notes": [note for note in notes if not _warns(note)],
            }
        )
    trials, warnings = _tuning(atlas)
    ranks = tables.rank_columns(list(found), comparison.labels)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("index.html.j2").render(
        preset=comparison.preset,
        style=_Raw(style),
        code=_Raw(code),
        policy=_policy(style, code),
        data=_Raw(_embedded(_data(atlas, places))),
        tasks={section.task: section.task_label for section in comparison.sections},
        models={section.model: section.model_label for section in comparison.sections},
        sections=sections,
        ranks=_plain(ranks, "Ranks over all benchmarks; 1: highest mean", 0) if ranks else None,
        runs=_all_runs(atlas),
        trials=trials,
        warnings=warnings,
        places=places,
        plots=_grouped(comparison, pictures),
        published=_published(atlas, numbers),
        cards=_cards(comparison),
        environment=_environment(atlas),
    )


class _Raw(str):
    """Text of our own that a template takes as it is."""

    def __html__(self) -> str:
        return str(self)


def _data(atlas: Atlas, places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page's script knows from the start."""
    rows = [
        {"label": row.label, "base": row.base, "runs": [atlas.run(run) for run in row.runs]}
        for row in atlas.rows
    ]
    return {
        "files": FILES,
        "page": index_items.PAGE,
        "runs": atlas.names,
        "rows": rows,
        "places": [dict(place) for place in places],
    }


def _opponents(
    atlas: Atlas, found: Sequence[Record], section: Section, benchmark: str
) -> dict[str, str]:
    """Return whom a set of items is opened with: A the best other method, B the baseline."""
    candidates = []
    for row, record in zip(atlas.rows, found, strict=True):
        if any(row is other for other in section.rows) and row.scores(benchmark):
            mean = tables.number(record, benchmark, "mean")
            candidates.append(((bool(record["baseline"]), not row.base, mean), row))
    candidates.sort(key=lambda one: one[0])
    if not candidates:
        return {"a": "", "b": "", "against": ""}
    best, last = candidates[-2:][0][1], candidates[-1][1]
    names = {"a": _choice_name(atlas, best), "b": _choice_name(atlas, last)}
    return {**names, "against": last.label}


def _embedded(value: Any) -> str:
    """Return JSON that no text in it can end early."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _warns(note: str) -> bool:
    return "WARNING" in note or note.startswith("Failed")


def _policy(style: str, code: str) -> str:
    """Return the page's content security policy: our own script and files, nothing else."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest(code)}' 'self' file:; "
        f"style-src 'sha256-{digest(style)}'; img-src 'self' file:; base-uri 'none'; "
        "form-action 'none'"
    )


def _copy_plots(told_of: Path, folder: Path) -> list[dict[str, str]]:
    """Copy the pictures to the page's own files; return what is said of them."""
    plots, told = told_of.parent, []
    for picture in read_json(told_of):
        files = {}
        for kind, path in (("source", picture["path"]), ("vector", _vector(picture["path"]))):
            if (plots / path).is_file():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(plots / path, folder / path)
                files[kind] = quote(f"{FILES}/plots/{path}")
        told.append({"vector": "", **picture, **files})
    return told


def _grouped(comparison: Comparison, pictures: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return the pictures by section; none of a section without."""
    groups = []
    for section in comparison.sections:
        mine = [p for p in pictures if (p["task"], p["model"]) == (section.task, section.model)]
        if mine:
            names = {"task": section.task, "model": section.model, "title": section.title}
            groups.append({**names, "pictures": mine})
    return groups


def _vector(path: str) -> str:
    return Path(path).with_suffix(".pdf").as_posix()


def _published(atlas: Atlas, numbers: Ledger) -> dict[str, Any] | None:
    if not numbers.rows:
        return None
    columns = tables.published_columns(numbers.rows, atlas.comparison.labels)
    rows = {(row.model, row.task, row.label): _row_link(atlas, row) for row in atlas.rows}
    links = [rows.get((n["model"], n["task"], n["label"]), "") for n in numbers.rows]
    table = _plain(columns, "Published numbers beside ours", 1, search=True, links=links)
    doubts = [f"{doubt.kind}: {doubt.text}" for doubt in numbers.doubts]
    return {"table": table, "notes": [PUBLISHED_NOTE, *doubts]}
