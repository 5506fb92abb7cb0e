"""From grid.json and the artefacts it names to sections, rows and runs.

A *section* is one task on one base model and becomes one table; a *row* of it is one method; a
*run* is one seed of the row. Nothing is dropped: a run that failed keeps its place and its reason.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlora.artefact import read_json
from tlora.comparison.statistics import Summary, summarise
from tlora.errors import UserError


@dataclass(frozen=True)
class Score:
    """What score.json says.

    Attributes
    ----------
    value, metrics
        Shares (0 to 1), or in the benchmark's own unit where `share` is false.
    verdicts
        What the headline metric says of every item, by id; the mean over its turns for a
        conversation. Items without a verdict are absent.
    """

    path: str
    value: float
    n: int
    metric: str
    metrics: dict[str, float]
    unextracted: int
    verdicts: dict[str, float] = field(default_factory=dict)
    share: bool = True

    @property
    def further(self) -> dict[str, float]:
        """The metrics beside the headline one."""
        return {name: value for name, value in self.metrics.items() if name != self.metric}


@dataclass(frozen=True)
class Run:
    """One cell of the grid with what its artefacts say.

    Attributes
    ----------
    initialization_seconds
        Sum over the distinct jobs of the run's chain before training, in full even where other
        runs share them; None for the base model.
    training
        train.json, or None for the base model and for a failed run.
    log
        Rows of log.jsonl in ascending `step`, one per step (the last written wins).
    failures
        Why the run, or its evaluation on one benchmark, gave no number: `{"": reason}` for the
        whole run, `{benchmark: reason}` for one evaluation.
    export_path
        export.json, with weights/ beside it; None for the base model.
    generations
        generations.jsonl by benchmark, as far as there.
    recipe
        What the run is made with: the specs of its units by name, under "generate" and "score" by
        benchmark; and the settings that differ on purpose, "own" and "varied".
    card
        The data card of `prepare`; {} for the base model and where it is absent.
    jobs
        Seconds of the distinct jobs before training, by the path of their artefacts.
    """

    model: str
    task: str
    method: str
    label: str
    base: bool
    seed: int | None
    spec_id: str
    settings: dict[str, Any]
    initialization_seconds: float | None
    initialization_memory: int | None
    training: dict[str, Any] | None
    train_path: Path | None
    log: tuple[dict[str, Any], ...]
    allocation: Path | None
    scores: dict[str, Score]
    evaluation: dict[str, dict[str, Any]]
    failures: dict[str, str]
    export_path: Path | None = None
    generations: dict[str, Path] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    jobs: dict[str, float] = field(default_factory=dict)

    def failure(self, benchmark: str) -> str | None:
        """Return why there is no number for `benchmark`, None where there is one."""
        return self.failures.get("") or self.failures.get(benchmark)


@dataclass(frozen=True)
class Choice:
    """How the tuned values of a row were found: chosen.json.

    Attributes
    ----------
    metric
        What the trials were compared by, on the validation split; its direction is `higher`.
    trials
        The trials, in the grid's order: ordinary runs of one seed. Their scores are under the
        benchmark `validation`.
    tried
        The values of every trial by setting, in the order of `trials`.
    values
        The score of every trial, None for one that failed, in the order of `trials`.
    winner
        Index of the trial that was chosen.
    edges
        Settings whose winning value is the lowest or the highest of the grid: "lower" or "upper".
    """

    metric: str
    higher: bool
    trials: tuple[Run, ...]
    tried: tuple[dict[str, Any], ...]
    values: tuple[float | None, ...]
    winner: int
    edges: dict[str, str]


@dataclass(frozen=True)
class Row:
    """The runs of one method: they differ in nothing but the seed.

    `choice` is None where the preset tunes nothing.
    """

    model: str
    task: str
    method: str
    label: str
    base: bool
    runs: tuple[Run, ...]
    choice: Choice | None = None

    def scores(self, benchmark: str) -> list[Score]:
        """Return the scores of the runs that have one, in the runs' order."""
        return [run.scores[benchmark] for run in self.runs if run.failure(benchmark) is None]

    def accuracy(self, benchmark: str) -> Summary:
        """Return mean and spread over seeds of the benchmark's headline metric."""
        return summarise([score.value for score in self.scores(benchmark)])

    def further(self, benchmark: str, metric: str) -> Summary:
        """Return mean and spread over seeds of another metric of the benchmark."""
        scores = self.scores(benchmark)
        return summarise([s.further[metric] for s in scores if metric in s.further])

    def unextracted(self, benchmark: str) -> float | None:
        """Return the share of completions without an answer that could be read (0 to 1)."""
        return summarise([s.unextracted / s.n for s in self.scores(benchmark)]).mean

    def items(self, benchmark: str) -> list[int]:
        """Return the distinct numbers of scored items, ascending; usually one."""
        return sorted({score.n for score in self.scores(benchmark)})

    def failed(self, benchmark: str | None = None) -> int:
        """Return how many runs have no number for `benchmark` (None: for at least one)."""
        if benchmark is None:
            return sum(bool(run.failures) for run in self.runs)
        return sum(run.failure(benchmark) is not None for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs that did not fail as a whole."""
        return [r.seed for r in self.runs if r.seed is not None and "" not in r.failures]

    def training(self, key: str) -> list[float]:
        """Return one number of train.json for every run that did not fail and has it."""
        good = [run.training for run in self.runs if run.training and "" not in run.failures]
        found = [training.get(key) for training in good]
        return [value for value in found if isinstance(value, int | float)]

    @property
    def trainable_parameters(self) -> int | None:
        """Mean over seeds, rounded (seeds differ only where the calibration varies with them)."""
        mean = summarise(self.training("trainable_parameters")).mean
        return None if mean is None else round(mean)

    @property
    def initialization_seconds(self) -> float | None:
        """Mean over seeds of the seconds before training; None for the base model."""
        seconds = [r.initialization_seconds for r in self.runs if "" not in r.failures]
        return summarise([value for value in seconds if value is not None]).mean

    @property
    def evaluation_seconds(self) -> float | None:
        """Mean over seeds of the generation seconds, summed over benchmarks."""
        totals = [
            math.fsum(cost["seconds"] for cost in run.evaluation.values() if "seconds" in cost)
            for run in self.runs
            if run.evaluation
        ]
        return summarise(totals).mean

    @property
    def peak_memory_bytes(self) -> int | None:
        """The largest peak of training over the seeds."""
        return max((int(v) for v in self.training("peak_memory_bytes")), default=None)


@dataclass(frozen=True)
class Section:
    """One task on one base model: the content of one table.

    Attributes
    ----------
    card
        The data card of `prepare` ({} where it is absent).
    overlaps
        overlap.json by benchmark, as far as there.
    """

    model: str
    task: str
    model_label: str
    task_label: str
    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]
    card: dict[str, Any] = field(default_factory=dict)
    overlaps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What stands above the table."""
        return f"{self.task_label}: {self.model_label}"

    def metrics(self, benchmark: str) -> list[str]:
        """Return the names of the benchmark's metrics beside the headline one, sorted."""
        names = {m for row in self.rows for s in row.scores(benchmark) for m in s.further}
        return sorted(names)

    def share(self, benchmark: str) -> bool:
        """Tell whether the headline metric is a share, which is shown in percent."""
        return all(score.share for row in self.rows for score in row.scores(benchmark))


@dataclass(frozen=True)
class Comparison:
    """All that the tables, plots and pages of one preset show."""

    preset: str
    sections: tuple[Section, ...]
    labels: dict[str, str]
    """Label of every benchmark."""

    @property
    def benchmarks(self) -> list[str]:
        """All benchmarks, in the order of the sections."""
        return list(dict.fromkeys(b for section in self.sections for b in section.benchmarks))

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of the sections."""
        return [row for section in self.sections for row in section.rows]


def load(grid_path: Path, labels: dict[str, dict[str, str]] | None = None) -> Comparison:
    """Read grid.json and every artefact it names.

    `labels` ({"models", "tasks", "methods", "benchmarks"}: label by name) are no part of the grid,
    because they change nothing that is computed; where one is missing the name stands.

    Sections come task by task in the order in which tasks and then models first appear among the
    cells; rows in the order of the cells, the base model's first.

    Raises
    ------
    UserError
        For a broken file, a value out of range, or two runs of one seed in one row. A missing
        artefact is no error: the run is then shown as failed.
    """
    grid = read_json(grid_path)
    labels = labels or {}
    runs: dict[tuple[str, str], dict[tuple[str, str, str], list[Run]]] = {}
    cards: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in grid["cells"]:
        expected = grid["tasks"].get(cell["task"], {}).get("benchmarks") or list(cell["scores"])
        cell = {"label": labels.get("methods", {}).get(cell["method"]), **cell}
        run = load_run(cell, expected)
        place = (run.task, run.model)
        rows = runs.setdefault(place, {})
        rows.setdefault((run.method, run.label, str(run.base)), []).append(run)
        if cell.get("card") and not cards.get(place):
            cards[place] = _optional(Path(cell["card"])) or {}
    choices = {
        (one["task"], one["model"], one["method"]): _choice(one) for one in grid.get("choices", [])
    }
    tasks = list(dict.fromkeys(task for task, _ in runs))
    models = list(dict.fromkeys(model for _, model in runs))
    sections = []
    for task in tasks:
        for model in (name for name in models if (task, name) in runs):
            rows = [_row(found, grid_path, choices) for found in runs[task, model].values()]
            seen = dict.fromkeys(b for row in rows for run in row.runs for b in run.scores)
            described = grid["tasks"].get(task, {})
            looked = {k: _optional(Path(v)) for k, v in described.get("overlaps", {}).items()}
            sections.append(
                Section(
                    model=model,
                    task=task,
                    model_label=labels.get("models", {}).get(model, model),
                    task_label=labels.get("tasks", {}).get(task, task),
                    benchmarks=tuple(described.get("benchmarks") or seen),
                    rows=tuple(sorted(rows, key=lambda row: not row.base)),
                    card=cards.get((task, model), {}),
                    overlaps={name: found for name, found in looked.items() if found},
                )
            )
    names = [benchmark for section in sections for benchmark in section.benchmarks]
    shown = {name: labels.get("benchmarks", {}).get(name, name) for name in names}
    return Comparison(preset=grid["preset"], sections=tuple(sections), labels=shown)


def load_run(cell: dict[str, Any], benchmarks: list[str]) -> Run:
    """Read the artefacts of one cell of grid.json.

    Parameters
    ----------
    cell
        One entry of the grid's `cells`.
    benchmarks
        The benchmarks that the cell must have a score for.
    """
    failures: dict[str, str] = {}
    if cell.get("failed"):
        reason = cell["failed"]
        failures[""] = reason if isinstance(reason, str) else "marked as failed"
    base = bool(cell.get("base"))
    train_path = Path(cell["train"]) if cell.get("train") else None
    training = _optional(train_path) if train_path else None
    if not base and training is None:
        failures.setdefault("", f"{train_path or 'train.json'} is missing")
    elif training and training.get("failed"):
        failures.setdefault("", str(training["failed"]))
    scores: dict[str, Score] = {}
    for benchmark in dict.fromkeys([*benchmarks, *cell["scores"]]):
        path = cell["scores"].get(benchmark)
        content = _optional(Path(path)) if path else None
        if content is None:
            failures[benchmark] = f"{path or 'score.json'} is missing"
        elif content.get("failed"):
            failures[benchmark] = str(content["failed"])
        else:
            scores[benchmark] = parse_score(content, path)
    generations = {name: _optional(Path(p)) for name, p in cell.get("generations", {}).items()}
    completions = {
        name: Path(path).with_name("generations.jsonl")
        for name, path in cell.get("generations", {}).items()
    }
    costs = {path: _optional(Path(path)) for path in cell.get("costs", [])}
    known = [cost for cost in costs.values() if cost is not None]
    jobs = {path: float(cost.get("seconds", 0.0)) for path, cost in costs.items() if cost}
    memory = [int(cost["peak_memory_bytes"]) for cost in known if cost.get("peak_memory_bytes")]
    allocation = Path(cell["allocation"]) if cell.get("allocation") else None
    return Run(
        model=cell["model"],
        task=cell["task"],
        method=cell["method"],
        label=cell.get("label") or cell["method"],
        base=base,
        seed=cell.get("seed"),
        spec_id=cell["spec_id"],
        settings=cell.get("settings", {}),
        initialization_seconds=None if base else math.fsum(jobs.values()),
        initialization_memory=max(memory, default=None),
        training=training,
        train_path=train_path,
        log=() if training is None or train_path is None else read_log(train_path.parent),
        allocation=allocation if allocation and allocation.is_file() else None,
        scores=scores,
        evaluation={name: cost for name, cost in generations.items() if cost is not None},
        failures=failures,
        jobs=jobs,
        recipe=cell.get("recipe", {}),
        card=(_optional(Path(cell["card"])) if cell.get("card") else None) or {},
        export_path=Path(cell["export"]) if cell.get("export") else None,
        generations={name: path for name, path in completions.items() if path.is_file()},
    )


def parse_score(content: dict[str, Any], path: str) -> Score:
    """Check and take over what the comparison needs of score.json.

    Raises
    ------
    UserError
        When there is no item, or the value is neither a share nor a mean of what stands in items.
    """
    value, n = content.get("value"), content.get("n")
    if not isinstance(n, int) or n < 1:
        raise UserError(f"{path}: n: {n!r}: expected at least one scored item")
    verdicts = _verdicts(content.get("items", []))
    share = all(0.0 <= verdict <= 1.0 for verdict in verdicts.values())
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or (share and not 0.0 <= value <= 1.0):
        raise UserError(f"{path}: value: {value!r}: expected a share between 0 and 1")
    return Score(
        path=path,
        value=float(value),
        n=n,
        metric=content.get("metric", "accuracy"),
        metrics={name: float(number) for name, number in content.get("metrics", {}).items()},
        unextracted=int(content.get("unextracted", 0)),
        verdicts=verdicts,
        share=share,
    )


def _verdicts(items: list[dict[str, Any]]) -> dict[str, float]:
    """Return the headline metric's verdict on every item, on every conversation as a whole."""
    turns: dict[str, list[float]] = {}
    for item in items:
        verdict = item["value"] if item.get("value") is not None else item.get("correct")
        if verdict is not None:
            name = str(item["id"])
            whole = name.rpartition("/")[0] if "turn" in item else name
            turns.setdefault(whole, []).append(float(verdict))
    return {name: math.fsum(found) / len(found) for name, found in turns.items()}


def read_log(folder: Path) -> tuple[dict[str, Any], ...]:
    """Read log.jsonl of a train folder: rows by ascending step, the last row of a step wins.

    A resumed run logs the steps after its checkpoint once more, hence the repeated steps.

    Raises
    ------
    UserError
        Naming the first line that is no JSON.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        return ()
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from error
        if "step" in row:
            rows[int(row["step"])] = row
    return tuple(rows[step] for step in sorted(rows))


def _choice(entry: dict[str, Any]) -> Choice | None:
    """Read chosen.json and the trials it is about; None where it is not there."""
    chosen = _optional(Path(entry["chosen"]))
    if chosen is None:
        return None
    return Choice(
        metric=chosen["metric"],
        higher=chosen["higher_is_better"],
        trials=tuple(load_run(trial, list(trial["scores"])) for trial in entry["trials"]),
        tried=tuple(trial["settings"] for trial in chosen["trials"]),
        values=tuple(
            None if "failed" in trial else float(trial["value"]) for trial in chosen["trials"]
        ),
        winner=chosen["winner"],
        edges=chosen["edges"],
    )


def _row(
    runs: list[Run], grid_path: Path, choices: dict[tuple[str, str, str], Choice | None]
) -> Row:
    first = runs[0]
    seeds = [run.seed for run in runs]
    repeated = sorted({str(seed) for seed in seeds if seeds.count(seed) > 1})
    if repeated:
        raise UserError(
            f"{grid_path}: cells: {first.model}/{first.task}/{first.label}: seed {repeated[0]}: "
            "expected one run a seed; rows with different settings need different labels"
        )
    choice = None if first.base else choices.get((first.task, first.model, first.method))
    return Row(first.model, first.task, first.method, first.label, first.base, tuple(runs), choice)


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
