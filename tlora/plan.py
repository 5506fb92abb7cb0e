"""From a preset to units of work: specs, ids, paths and what depends on what."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tlora import methods, spec
from tlora.artefact import read_json
from tlora.benchmarks import Scorer
from tlora.code import stage_files
from tlora.config import Benchmark, Document, Task, module_of, typed
from tlora.errors import UserError
from tlora.selection import LOSS, VALIDATION, Row, Selection, Setting
from tlora.weights import check_fit, check_targets, is_local

RESULTS = Path("results")
LIKELIHOOD = "likelihood"

# The file of each stage that the next one is handed; it vouches for what lies beside it.
MAIN = {
    "download": "download.json",
    "overlap": "overlap.json",
    "prepare": "card.json",
    "calibrate": "calibration.json",
    "allocate": "allocation.json",
    "initialize": "adapter_init.json",
    "train": "train.json",
    "export": "export.json",
    "check": "check.json",
    "generate": "generations.jsonl",
    "score": "score.json",
    "choose": "chosen.json",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One job of one stage."""

    stage: str
    spec: dict[str, Any]
    names: tuple[str, ...]
    inputs: dict[str, Unit]
    place: dict[str, Any]
    after: tuple[Unit, ...] = ()

    @functools.cached_property
    def id(self) -> str:
        """Twelve hex digits of the spec."""
        return spec.spec_id({"stage": self.stage, **self.spec})

    @functools.cached_property
    def folder(self) -> Path:
        """Where the artefact lies. Names are for people; no path is parsed."""
        return RESULTS.joinpath(self.stage, *self.names, self.id)

    @functools.cached_property
    def main(self) -> Path:
        """The file that the next stage is handed."""
        return self.folder / MAIN[self.stage]

    @property
    def placement(self) -> dict[str, Any]:
        """Where and how the job computes: `place`, and what only its id can name."""
        place = dict(self.place)
        if self.stage in ("train", "generate", "score"):
            place["work"] = str(RESULTS / ".work" / self.stage / self.id)
        if "cell" in place:
            place["cell"] = {**place["cell"], "spec_id": self.id}
        return place

    def code(self) -> list[Path]:
        """Return the package's source files that the job depends on."""
        return stage_files(self.stage, self.spec)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a model, a task, a row and a seed; the base model's cells have neither."""

    model: str
    task: str
    row: Row
    seed: int | None
    settings: dict[str, Setting]
    units: dict[str, Unit]
    generates: dict[str, Unit]
    scores: dict[str, Unit]
    trial: Mapping[str, Any] | None = None

    @property
    def base(self) -> bool:
        """Whether this is the untrained base model."""
        return self.seed is None


@dataclasses.dataclass(eq=False)
class Choice:
    """What a method's trials decide: values for the runs of all its seeds.

    Attributes
    ----------
    unit
        The job that compares the trials.
    cells
        The runs with what it found; none before that.
    """

    model: str
    task: str
    row: Row
    seeds: list[int]
    trials: list[Cell]
    unit: Unit
    cells: list[Cell] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Test:
    """What all runs of a row are asked: two specs without the run's own ids, and their places."""

    generate: spec.Generate
    score: spec.Score
    generated: dict[str, Any]
    scored: dict[str, Any]
    after: tuple[Unit, ...]


def _nothing(*_: Any) -> list:
    return []


# The settings that training itself depends on, beside those of the adapter.
TRAINING = (
    "learning_rate",
    "schedule",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "epochs",
)
BASE = Row("base", "Base model (untrained)", {})


class Plan(Selection):
    """Every cell of a preset and every unit of work they need.

    Takes what `Selection` takes and refuses what it refuses; besides, targets and ranks that do not
    fit a local model.
    """

    def __init__(self, files: list[Path], command_line: Mapping[str, Any] | None = None) -> None:
        super().__init__(files, command_line)
        self.units: dict[tuple[str, str], Unit] = {}
        self._slots = list(self._cells())
        self.overlaps = self._overlaps()
        for choice in self.choices:
            if choice.unit.main.is_file():
                self.confirm(choice)

    @property
    def cells(self) -> list[Cell]:
        """All runs but trials; those that a choice has not been made for are missing."""
        parts = (one.cells if isinstance(one, Choice) else [one] for one in self._slots)
        return list(itertools.chain.from_iterable(parts))

    @property
    def settled(self) -> list[Cell]:
        """The runs whose settings no trial decides."""
        return [one for one in self._slots if isinstance(one, Cell)]

    @property
    def choices(self) -> list[Choice]:
        """What trials decide: one for every model, task and row of a preset that tunes."""
        return [one for one in self._slots if isinstance(one, Choice)]

    def confirm(self, choice: Choice, values: Mapping[str, Any] | None = None) -> list[Cell]:
        """Plan the runs with what the trials have found, or with `values`, and return them."""
        path = choice.unit.main
        found = read_json(path)["settings"] if values is None else values
        model, task, row = choice.model, choice.task, choice.row
        settings = self.settings(model, task, row, found, str(path))
        choice.cells = self._runs(model, task, row, choice.seeds, settings)
        return choice.cells

    def _unit(
        self,
        stage: str,
        fields: spec._Spec,
        names: tuple[str, ...],
        inputs: Mapping[str, Unit | None],
        place: dict[str, Any],
        after: Iterable[Unit] = (),
    ) -> Unit:
        """Return the unit of a spec; equal work is one unit, named after the first that asks.

        `after` must be made first, and decides nothing: what is fetched stands in the spec.
        """
        present = {key: unit for key, unit in inputs.items() if unit is not None}
        plain = json.loads(spec.canonical(fields.as_dict()))
        unit = Unit(stage, plain, names, present, place, tuple(after))
        return self.units.setdefault((stage, unit.id), unit)

    def _cells(self) -> Iterator[Cell | Choice]:
        seen: set[tuple] = set()
        for grid in self.grids:
            for model, task in itertools.product(grid.models, grid.tasks):
                if (model, task) not in seen:
                    seen.add((model, task))
                    yield self._base(model, task)
                for row in grid.rows:
                    settings = self.settings(model, task, row)
                    seeds = [s for s in grid.seeds if (model, task, row.name, s) not in seen]
                    seen |= {(model, task, row.name, seed) for seed in seeds}
                    if self.preset.tune is not None and seeds:
                        yield self._choice(model, task, row, seeds)
                        continue
                    yield from self._runs(model, task, row, seeds, settings)

    def _choice(self, model: str, task: str, row: Row, seeds: list[int]) -> Choice:
        """Return the trials of a row and the job that compares them."""
        trials = []
        for values in self.trials(row.method):
            settings = self.settings(model, task, row, values)
            trials += self._runs(model, task, row, [self.preset.tune.seed], settings, values)
        scores = [trial.scores[VALIDATION] for trial in trials]
        compared = [
            {"settings": dict(trial.trial), "score": score.id}
            for trial, score in zip(trials, scores, strict=True)
        ]
        unit = self._unit(
            "choose",
            spec.Choose(compared),
            (model, task, row.method),
            {f"trial{number}": score for number, score in enumerate(scores)},
            {},
        )
        return Choice(model, task, row, seeds, trials, unit)

    def _base(self, model: str, task: str) -> Cell:
        tests = {name: self._benchmark(name) for name in self.tasks[task][0].benchmarks}
        asked = self._asked(model, task, tests)
        generates, scores = self._evaluations(model, task, "base", asked)
        return Cell(model, task, BASE, None, {}, {}, generates, scores)

    def _runs(
        self,
        model: str,
        task: str,
        row: Row,
        seeds: list[int],
        settings: dict[str, Setting],
        trial: Mapping[str, Any] | None = None,
    ) -> list[Cell]:
        """Plan a row's runs. What the seed does not change is worked out and checked once."""
        if not seeds:
            return []
        config, _, identity = self.models[model]
        shared, document = self.tasks[task]
        method, options = self._implementation(row.method), self._options(row, settings)
        value = {key: setting.value for key, setting in settings.items()}
        self._check_batch(model, task, value["batch_size"])
        place = {"model": config.path, "revision": config.revision}
        fetched = self._fetched_model(model)
        data, files = self._data("tasks", task, shared, document, ["train", "validation"])
        prepare = self._unit(
            "prepare",
            spec.Prepare(identity, shared.source, data, files, shared.prompt, value["max_length"]),
            (model, task),
            {},
            {**place, "data_root": self.preset.data_root},
            [*fetched, *self._fetched("tasks", shared, data, ("train", "validation"))],
        )
        units = {"prepare": prepare}
        adapter = {"rank": None, "lora_alpha": None, "target_modules": None}
        if method.adapter:
            adapter = {key: value[key] for key in adapter}
            where = settings["target_modules"].source, settings["rank"].source
            check_targets(config.path, adapter["target_modules"], adapter["rank"], where)
        asked = self._named("methods")[row.method]
        check_fit(
            method,
            options,
            config.path,
            config.architecture == "seq2seq",
            adapter["target_modules"],
            adapter["rank"],
            f"{asked}: {row.method!r}",
        )
        if method.initializes:
            units |= self._initialization(
                model, task, row, method, options, value, prepare, identity, place
            )
        initialize = units.get("initialize")
        trained = {
            "model": identity,
            "prepare": prepare.id,
            "implementation": self.methods[row.method][0].implementation,
            "options": dataclasses.asdict(options),
            "initialize": initialize.id if initialize else None,
            **adapter,
            **{key: value[key] for key in TRAINING},
        }
        tests = (
            {name: self._benchmark(name) for name in shared.benchmarks}
            if trial is None
            else {VALIDATION: self._validation(task)}
        )
        cell = {"settings": value} | ({} if trial is None else {"trial": dict(trial)})
        at = {**place, "micro_batch": config.micro_batch, **self._devices(model, task)}
        exported = {**place, "base": identity} if method.merges(options) else {}
        evaluated = self._asked(model, task, tests, prepare)
        cells = []
        for seed in seeds:
            named = {"model": model, "task": task, "method": row.name, "seed": seed, **cell}
            after = self._trained(
                (model, task, row.method),
                spec.Train(**trained, seed=seed),
                units,
                {**at, "cell": named},
                exported,
                place,
            )
            generates, scores = self._evaluations(
                model, task, row.method, evaluated, after["export"], after["check"], prepare
            )
            made = {**units, **after}
            cells.append(Cell(model, task, row, seed, settings, made, generates, scores, trial))
        return cells

    def _trained(
        self,
        names: tuple[str, ...],
        training: spec.Train,
        made: dict[str, Unit],
        place: dict[str, Any],
        exported: dict[str, Any],
        checked: dict[str, Any],
    ) -> dict[str, Unit]:
        """Return the units of a run from training to the check, each with its place."""
        prepare, initialize = made["prepare"], made.get("initialize")
        inputs = {"prepare": prepare, "initialize": initialize}
        train = self._unit("train", training, names, inputs, place)
        export = self._unit(
            "export",
            spec.Export(train.id, training.implementation, training.options),
            names,
            {"train": train, "initialize": initialize},
            exported,
        )
        check = self._unit(
            "check",
            spec.Check(training.model, export.id),
            names,
            {
                "prepare": prepare,
                "allocate": made.get("allocate"),
                "initialize": initialize,
                "train": train,
                "export": export,
            },
            checked,
        )
        return {"train": train, "export": export, "check": check}

    def _initialization(
        self,
        model: str,
        task: str,
        row: Row,
        method: methods.Method,
        options: Any,
        value: dict[str, Any],
        prepare: Unit,
        identity: dict,
        place: dict,
    ) -> dict[str, Unit]:
        """Return the units that make A0 and B0: statistics, allocation, initialisation."""
        implementation = self.methods[row.method][0].implementation
        samples, seed = value["calibration_samples"], self.preset.calibration_seed
        units: dict[str, Unit] = {}
        for statistic, wanted in method.statistics(options).items():
            units[statistic] = self._unit(
                "calibrate",
                spec.Calibrate(
                    identity, prepare.id, statistic, samples, seed, value["target_modules"], wanted
                ),
                (model, task, statistic),
                {"prepare": prepare},
                place,
            )
        wanted = method.allocation(options)
        if wanted is not None:
            sensitivity = units["sensitivity"]
            units["allocate"] = self._unit(
                "allocate",
                spec.Allocate(sensitivity.id, value["rank"], value["lora_alpha"], wanted),
                (model, task, implementation),
                {"calibrate": sensitivity},
                {},
            )
        statistics = {key: unit for key, unit in units.items() if unit.stage == "calibrate"}
        # The allocation stands for the statistic it was made from.
        allocated = set() if wanted is None else {"sensitivity"}
        reads = method.reads_batches(options)
        depends = bool(units) or reads
        units["initialize"] = self._unit(
            "initialize",
            spec.Initialize(
                model=identity,
                implementation=implementation,
                options=dataclasses.asdict(options),
                rank=value["rank"],
                lora_alpha=value["lora_alpha"],
                target_modules=value["target_modules"],
                allocate=units["allocate"].id if "allocate" in units else None,
                statistics={key: unit.id for key, unit in statistics.items()},
                prepare=prepare.id if reads else None,
                samples=samples if reads else None,
                seed=seed if depends else None,
            ),
            (model, task if depends else "any", implementation),
            {
                **{key: unit for key, unit in statistics.items() if key not in allocated},
                "allocate": units.get("allocate"),
                "prepare": prepare if reads else None,
            },
            place,
            self._fetched_model(model),
        )
        return units

    def _asked(
        self,
        model: str,
        task: str,
        tests: Mapping[str, tuple[Benchmark, Document]],
        prepare: Unit | None = None,
    ) -> dict[str, _Test]:
        """Return what every run of a row is asked, by benchmark."""
        return {name: self._test(model, task, name, *test, prepare) for name, test in tests.items()}

    def _test(
        self,
        model: str,
        task: str,
        name: str,
        benchmark: Benchmark,
        document: Document,
        prepare: Unit | None,
    ) -> _Test:
        config, _, identity = self.models[model]
        shared, _ = self.tasks[task]
        if name == VALIDATION:
            # Carved from the training data, never the test set.
            own, at = self.tasks[task]
            data, files = self._data("tasks", task, own, at, [VALIDATION])
            split, read = {"split": VALIDATION}, VALIDATION
        else:
            data, files = self._data("benchmarks", name, benchmark, document, ["test"])
            split, read = {}, "test"
        scorer = Scorer(
            module_of(document, "implementation", "benchmarks", benchmark.implementation)
        )
        options = typed(document, ("options",), scorer.options_type, benchmark.options)
        fields = ("source", "turn_prompt", "max_new_tokens", "num_beams", "stop", "limit")
        asked = {"data": data, **{key: getattr(benchmark, key) for key in fields}, **split}
        prompt, backend = benchmark.prompt or shared.prompt, self.preset.backend
        if benchmark.implementation == LIKELIHOOD:
            # No text is generated: the probability of the given one is asked for.
            asked |= {"likelihood": prepare.id, "max_new_tokens": None}
            prompt, backend = "", "transformers"
        if hasattr(importlib.import_module(f"tlora.tasks.{benchmark.source}"), "evaluate"):
            # It has prompts and limits of its own, and an engine.
            asked |= {"max_new_tokens": None, "stop": []}
            prompt, backend = "", "transformers"
        root = self.preset.data_root
        return _Test(
            generate=spec.Generate(identity, None, prompt, asked, files, backend),
            score=spec.Score("", None, benchmark.implementation, dataclasses.asdict(options)),
            generated={
                "model": config.path,
                "revision": config.revision,
                "data_root": root,
                "server": self.preset.server if backend == "vllm" else None,
            },
            scored={
                "workers": benchmark.workers,
                "data_root": root,
                "unsafe_no_sandbox": self.preset.unsafe_no_sandbox,
            },
            after=(
                *self._fetched_model(model),
                *self._fetched("benchmarks", benchmark, data, (read,)),
            ),
        )

    def _evaluations(
        self,
        model: str,
        task: str,
        method: str,
        tests: Mapping[str, _Test],
        export: Unit | None = None,
        check: Unit | None = None,
        prepare: Unit | None = None,
    ) -> tuple[dict[str, Unit], dict[str, Unit]]:
        generates, scores = {}, {}
        for name, test in tests.items():
            names = (model, task, method, name)
            likelihood = "likelihood" in test.generate.benchmark
            generates[name] = self._unit(
                "generate",
                dataclasses.replace(test.generate, export=export.id if export else None),
                names,
                {"export": export, "prepare": prepare if likelihood else None},
                test.generated,
                test.after,
            )
            made, checked = generates[name].id, check.id if check else None
            scores[name] = self._unit(
                "score",
                dataclasses.replace(test.score, generate=made, check=checked),
                names,
                {"generate": generates[name], "check": check},
                test.scored,
            )
        return generates, scores

    def _validation(self, task: str) -> tuple[Benchmark, Document]:
        """Return the benchmark that judges trials: a task's validation split by rules of another.

        Raises
        ------
        UserError
            Where there is no validation record.
        """
        shared, document = self.tasks[task]
        data, _ = self._data("tasks", task, shared, document, [])
        if not data.get("validation"):
            raise UserError(
                f"{self.document.where(('tune',))}: tune: {task}: data.validation: "
                f"{data.get('validation')!r}: expected a number of records to judge trials by: "
                "set data.validation"
            )
        fields = {"source": shared.source, "label": None, "limit": self.preset.tune.limit}
        name = self.judge(task)
        if name == LOSS:
            plain = Benchmark(source=shared.source, implementation=LIKELIHOOD, max_new_tokens=1)
            return plain.model_copy(update=fields), document
        benchmark, at = self._benchmark(name)
        return benchmark.model_copy(update=fields), at

    def _fetched_model(self, model: str) -> list[Unit]:
        """Return what downloads a model of the hub; nothing for a folder."""
        config = self.models[model][0]
        if is_local(config.path):
            return []
        item = {"kind": "model", "repo": config.path, "revision": config.revision}
        return [self._download(item)]

    def _fetched(
        self,
        kind: str,
        config: Task | Benchmark,
        data: dict[str, Any],
        splits: Iterable[str] = ("test",),
    ) -> list[Unit]:
        """Return what downloads a source's data; nothing where it is local or embedded."""
        module = importlib.import_module(f"tlora.tasks.{config.source}")
        options = module.Data(**data)
        root = None if self.preset.data_root is None else Path(self.preset.data_root)
        items: list[dict[str, Any]] = []
        for split in splits:
            if module.sources(options, split, root):
                continue
            for repo, name, part, revision in getattr(module, "hub", _nothing)(options, split):
                items.append(
                    {"kind": "dataset", "repo": repo, "name": name, "split": part}
                    | {"revision": revision}
                )
            for url, sha256 in getattr(module, "web", _nothing)(options, split):
                items.append({"kind": "web", "url": url, "sha256": sha256})
            if hasattr(module, "fetch"):
                items.append({"kind": config.source, "data": data})
        unique = {spec.canonical(item): item for item in items}
        return [self._download(unique[text]) for text in sorted(unique)]

    def _download(self, item: dict[str, Any]) -> Unit:
        name = item.get("repo") or item.get("url", "").rpartition("/")[2] or item["data"]["task"]
        names = (item["kind"], name.replace("/", "--"))
        return self._unit("download", spec.Download([item]), names, {}, {})

    def _overlaps(self) -> dict[str, dict[str, Unit]]:
        """Return what looks for each benchmark's test records in each task's training data."""
        found: dict[str, dict[str, Unit]] = {}
        for task, (shared, document) in self.tasks.items():
            data, files = self._data("tasks", task, shared, document, ["train"])
            training = {"source": shared.source, "data": data, "files": files}
            for name in shared.benchmarks:
                benchmark, at = self._benchmark(name)
                options, read = self._data("benchmarks", name, benchmark, at, ["test"])
                tested = {"source": benchmark.source, "data": options, "files": read}
                found.setdefault(task, {})[name] = self._unit(
                    "overlap",
                    spec.Overlap(training, tested),
                    (task, name),
                    {},
                    {"data_root": self.preset.data_root},
                    [
                        *self._fetched("tasks", shared, data, ("train",)),
                        *self._fetched("benchmarks", benchmark, options),
                    ],
                )
        return found

    @property
    def comparison(self) -> Path:
        """Where the preset's tables lie."""
        return RESULTS / "comparison" / self.name

    def published(self) -> list[Path]:
        """Return the files of papers' numbers."""
        return sorted((self.library.folder / "published").glob("*.csv"))

    def grid(self) -> dict[str, Any]:
        """Return what `compare` and `track` need: the cells by id and path, without labels."""
        return {
            "preset": self.name,
            "baseline": self.preset.baseline,
            "strict": self.preset.strict,
            "cells": [self._grid_cell(cell) for cell in self.cells],
            "choices": [
                {
                    "model": choice.model,
                    "task": choice.task,
                    "method": choice.row.name,
                    "chosen": str(choice.unit.main),
                    "trials": [self._grid_cell(trial) for trial in choice.trials],
                }
                for choice in self.choices
            ],
            "tasks": {
                name: {
                    "benchmarks": task.benchmarks,
                    "overlaps": {key: str(u.main) for key, u in self.overlaps[name].items()},
                }
                for name, (task, _) in self.tasks.items()
            },
        }

    def labels(self) -> dict[str, dict[str, str]]:
        """Return the labels of everything in the grid, for people only."""
        return {
            "models": {name: entry[0].label or name for name, entry in self.models.items()},
            "tasks": {name: task.label or name for name, (task, _) in self.tasks.items()},
            "methods": {"base": BASE.label, **{row.name: row.label for row in self.rows}},
            "benchmarks": {name: one.label or name for name, (one, _) in self.benchmarks.items()},
        }

    def _grid_cell(self, cell: Cell) -> dict[str, Any]:
        units = cell.units
        after = ("prepare", "train", "export", "check")
        chain = [unit for name, unit in units.items() if name not in after]
        evaluated = next(iter(cell.generates.values()))
        return {
            "model": cell.model,
            "task": cell.task,
            "method": cell.row.name,
            "seed": cell.seed,
            "base": cell.base,
            "settings": {key: setting.value for key, setting in cell.settings.items()},
            "spec_id": evaluated.id if cell.base else units["train"].id,
            "train": None if cell.base else str(units["train"].main),
            "export": None if cell.base else str(units["export"].main),
            "check": None if cell.base else str(units["check"].main),
            "costs": [str(unit.main) for unit in chain],
            "allocation": str(units["allocate"].main) if "allocate" in units else None,
            "scores": {name: str(unit.main) for name, unit in cell.scores.items()},
            "generations": {
                name: str(unit.folder / "generate.json") for name, unit in cell.generates.items()
            },
            "card": None if cell.base else str(units["prepare"].main),
            "recipe": self._recipe(cell),
        }

    def _recipe(self, cell: Cell) -> dict[str, Any]:
        """Return what a run is made with: specs, and the settings that differ on purpose."""
        after = ("export", "check")
        own = self.preset.hyperparameters == "own" and not cell.base
        training = self.methods[cell.row.method][0].training if own else {}
        return {
            **{name: unit.spec for name, unit in cell.units.items() if name not in after},
            "generate": {name: unit.spec for name, unit in cell.generates.items()},
            "score": {name: unit.spec for name, unit in cell.scores.items()},
            "own": sorted(training),
            "varied": sorted(cell.row.varied),
        }

    def of(self, stage: str) -> list[Unit]:
        """Return all units of a stage."""
        return [unit for (name, _), unit in self.units.items() if name == stage]
