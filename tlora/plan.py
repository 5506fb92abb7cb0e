"""From a preset to units of work: cells, their effective settings, specs, ids and paths."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlora import methods, spec
from tlora.artefact import sha256_file
from tlora.code import stage_files
from tlora.config import (
    Benchmark,
    Document,
    Hyperparameters,
    Library,
    Model,
    Preset,
    Task,
    library_of,
    module_of,
    nearest,
    parse,
    read_preset,
    typed,
)
from tlora.errors import UserError
from tlora.weights import check_targets, fingerprint

RESULTS = Path("results")

# The file of each stage that the next one is handed; it vouches for what lies beside it.
MAIN = {
    "prepare": "card.json",
    "calibrate": "calibration.json",
    "allocate": "allocation.json",
    "initialize": "adapter_init.json",
    "train": "train.json",
    "export": "export.json",
    "generate": "generations.jsonl",
    "score": "score.json",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One job of one stage."""

    stage: str
    spec: dict[str, Any]
    names: tuple[str, ...]
    inputs: dict[str, Unit]
    place: dict[str, Any]

    @functools.cached_property
    def id(self) -> str:
        """Twelve hex digits of the spec."""
        return spec.spec_id({"stage": self.stage, **self.spec})

    @property
    def folder(self) -> Path:
        """Where the artefact lies. Names are for people; no path is parsed."""
        return RESULTS.joinpath(self.stage, *self.names, self.id)

    @property
    def main(self) -> Path:
        """The file that the next stage is handed."""
        return self.folder / MAIN[self.stage]

    @property
    def resumable(self) -> bool:
        """Whether an interrupted job goes on where it stopped."""
        return self.stage in ("train", "generate")

    def code(self) -> list[Path]:
        """Return the package's source files that the job depends on."""
        return stage_files(self.stage, self.spec)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a method, or one of the values that `vary` gives it."""

    method: str
    label: str
    varied: dict[str, Any]

    @property
    def name(self) -> str:
        """The method's name with the varied values."""
        values = ",".join(f"{key}={value}" for key, value in self.varied.items())
        return f"{self.method}({values})" if values else self.method


@dataclasses.dataclass(frozen=True)
class Setting:
    """An effective value and the file and line it comes from."""

    value: Any
    source: str


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

    @property
    def base(self) -> bool:
        """Whether this is the untrained base model."""
        return self.seed is None


BASE = Row("base", "Base model (untrained)", {})


class Plan:
    """Every cell of a preset and every unit of work they need.

    Parameters
    ----------
    files
        The preset's YAML, or several laid over each other.
    command_line
        `--config key=value` pairs, which replace the preset's keys.

    Raises
    ------
    UserError
        Anything wrong that can be known before a job starts.
    """

    def __init__(self, files: list[Path], command_line: Mapping[str, Any] | None = None) -> None:
        self.preset, self.document = read_preset(files, command_line or {})
        self.command_line = dict(command_line or {})
        self.name = self.document.path.stem
        self.library: Library = library_of(self.document.path)
        self.units: dict[tuple[str, str], Unit] = {}
        self._check_lists()
        self.models = {
            name: self._model(name, index) for index, name in enumerate(self.preset.models)
        }
        self.tasks = {
            name: self.library.task(name, self._asked("tasks", index))
            for index, name in enumerate(self.preset.tasks)
        }
        self.methods = {
            name: self.library.method(name, self._asked("methods", index))
            for index, name in enumerate(self.preset.methods)
        }
        self.benchmarks = {
            name: self.library.benchmark(name, f"{document.where(('benchmarks',))}: benchmarks")
            for task, document in self.tasks.values()
            for name in task.benchmarks
        }
        self._check_overrides()
        self.rows = list(self._rows())
        self.cells = list(self._cells())

    # -- what the preset asks for ---------------------------------------------------------------

    def _asked(self, key: str, index: int) -> str:
        return f"{self.document.where((key, index))}: {key}"

    def _check_lists(self) -> None:
        for key in ("models", "tasks", "methods", "seeds"):
            values = getattr(self.preset, key)
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise UserError(f"{self._asked(key, index)}: {value!r}: stands twice")
        root = self.preset.data_root
        if root is not None and not Path(root).is_dir():
            where = self.document.where(("data_root",))
            raise UserError(f"{where}: data_root: {root!r}: expected a folder that exists")

    def _check_overrides(self) -> None:
        known = {
            "models": self.preset.models,
            "tasks": self.preset.tasks,
            "methods": self.preset.methods,
            "benchmarks": list(self.benchmarks),
        }
        selections = [
            (("overrides", index), override.model_dump(exclude={"set"}))
            for index, override in enumerate(self.preset.overrides)
        ] + [(("vary", index), entry) for index, entry in enumerate(self.preset.vary)]
        for at, selection in selections:
            for key in known:
                for name in selection.get(key) or []:
                    if name not in known[key]:
                        where = self.document.where((*at, key))
                        raise UserError(
                            f"{where}: {key}: {name!r}: not in this preset; "
                            f"{nearest(name, known[key])}"
                        )

    def _model(self, name: str, index: int) -> tuple[Model, Document, dict]:
        model, document = self.library.model(name, self._asked("models", index))
        identity = fingerprint(model.path, model.revision, document.where(("path",)))
        return model, document, {**identity, "dtype": model.dtype, "architecture": model.architecture}

    def _rows(self) -> Iterator[Row]:
        for name in self.preset.methods:
            label = self.methods[name][0].label or name
            entries = [
                (index, entry)
                for index, entry in enumerate(self.preset.vary)
                if name in entry.get("methods", self.preset.methods)
            ]
            if not entries:
                yield Row(name, label, {})
            for index, entry in entries:
                for key, values in entry.items():
                    if key == "methods":
                        continue
                    if not isinstance(values, list):
                        where = self.document.where(("vary", index, key))
                        raise UserError(f"{where}: vary.{key}: {values!r}: expected a list")
                    for value in values:
                        yield Row(name, f"{label} ({key} = {value})", {key: value})

    # -- effective settings ---------------------------------------------------------------------

    def settings(self, model: str, task: str, row: Row) -> dict[str, Setting]:
        """Return every effective value of a cell with the file and line it comes from.

        Precedence: task < method (with `hyperparameters: own`) < overrides < vary < set.
        """
        shared, document = self.tasks[task]
        method, method_document = self.methods[row.method]
        found: dict[str, Setting] = {}
        for key in Hyperparameters.model_fields:
            source = document.where((key,)) if key in document.values else "default"
            found[key] = Setting(getattr(shared, key), source)
        implementation = self._implementation(row.method)
        options = typed(method_document, ("options",), implementation.module.Options, method.options)
        for field in dataclasses.fields(options):
            at = ("options", field.name)
            source = method_document.where(at) if field.name in method.options else "default"
            found[f"options.{field.name}"] = Setting(getattr(options, field.name), source)

        layers: list[tuple[Mapping[str, Any], Document, tuple]] = []
        if self.preset.hyperparameters == "own":
            layers.append((method.training, method_document, ("training",)))
        for index, override in enumerate(self.preset.overrides):
            selected = (
                override.benchmarks is None
                and model in (override.models or [model])
                and task in (override.tasks or [task])
                and row.method in (override.methods or [row.method])
            )
            if selected:
                layers.append((override.set, self.document, ("overrides", index, "set")))
        layers.append((row.varied, self.document, ("vary",)))
        layers.append((self.preset.set, self.document, ("set",)))
        for values, origin, at in layers:
            for key, value in values.items():
                name = ".".join(map(str, (*at, key)))
                if key.startswith("data."):
                    continue
                if key not in found:
                    raise UserError(
                        f"{origin.where((*at, key))}: {name}: {value!r}: unknown key; "
                        f"{nearest(key, found)}"
                    )
                source = "command line" if "set" in self.command_line and at == ("set",) else None
                found[key] = Setting(value, source or origin.where((*at, key)))
        self._check_settings(found, document)
        return found

    def _check_settings(self, found: dict[str, Setting], document: Document) -> None:
        """Check the values that layers brought in by the schema of their keys."""
        for key, setting in found.items():
            if key in Hyperparameters.model_fields:
                values = {name: found[name].value for name in Hyperparameters.model_fields}
                where = Document(Path(setting.source.rsplit(":", 1)[0]), values, {})
                parse(where, Hyperparameters)

    def _implementation(self, method: str) -> methods.Method:
        config, document = self.methods[method]
        module_of(document, "implementation", "methods", config.implementation)
        return methods.load(config.implementation)

    def _options(self, row: Row, settings: dict[str, Setting]) -> Any:
        _, document = self.methods[row.method]
        values = {
            key.removeprefix("options."): setting.value
            for key, setting in settings.items()
            if key.startswith("options.")
        }
        module = self._implementation(row.method).module
        return typed(document, ("options",), module.Options, values)

    # -- units ------------------------------------------------------------------------------------

    def _unit(
        self,
        stage: str,
        fields: spec._Spec,
        names: tuple[str, ...],
        inputs: Mapping[str, Unit | None],
        place: dict[str, Any],
    ) -> Unit:
        """Return the unit of a spec; equal work is one unit, named after the first that asks."""
        present = {key: unit for key, unit in inputs.items() if unit is not None}
        plain = json.loads(spec.canonical(fields.as_dict()))
        unit = Unit(stage, plain, names, present, place)
        return self.units.setdefault((stage, unit.id), unit)

    def _data(
        self, kind: str, name: str, config: Task | Benchmark, document: Document, splits: list[str]
    ) -> tuple[dict, dict]:
        """Return a source's resolved options and the checksums of the local files it reads."""
        module = module_of(document, "source", "tasks", config.source)
        values = dict(config.data)
        layers = [
            override.set
            for override in self.preset.overrides
            if name in (getattr(override, kind) or ([name] if kind == "tasks" else []))
            and (kind == "benchmarks" or override.benchmarks is None)
        ]
        for layer in (*layers, self.preset.set if kind == "tasks" else {}):
            for key, value in layer.items():
                if key.startswith("data."):
                    values[key.removeprefix("data.")] = value
        data = typed(document, ("data",), module.Data, values)
        files: dict[str, str] = {}
        root = None if self.preset.data_root is None else Path(self.preset.data_root)
        for split in splits:
            for label, path in module.sources(data, split, root).items():
                if not Path(path).is_file():
                    raise UserError(
                        f"{document.where(('data',))}: data: {str(path)!r}: no such file"
                    )
                files[label] = _checksum(str(path), Path(path).stat().st_mtime_ns)
        return dataclasses.asdict(data), files

    def _cells(self) -> Iterator[Cell]:
        for model in self.preset.models:
            for task in self.preset.tasks:
                yield self._base(model, task)
                for row in self.rows:
                    settings = self.settings(model, task, row)
                    for seed in self.preset.seeds:
                        yield self._cell(model, task, row, seed, settings)

    def _base(self, model: str, task: str) -> Cell:
        generates, scores = self._evaluations(model, task, "base", None)
        return Cell(model, task, BASE, None, {}, {}, generates, scores)

    def _cell(
        self, model: str, task: str, row: Row, seed: int, settings: dict[str, Setting]
    ) -> Cell:
        config, model_document, identity = self.models[model]
        shared, document = self.tasks[task]
        method, options = self._implementation(row.method), self._options(row, settings)
        value = {key: setting.value for key, setting in settings.items()}
        self._check_batch(config, model_document, value["batch_size"])
        place = {"model": config.path, "revision": config.revision}
        data, files = self._data("tasks", task, shared, document, ["train", "validation", "test"])
        prepare = self._unit(
            "prepare",
            spec.Prepare(
                identity, shared.source, data, files, shared.prompt, value["max_length"]
            ),
            (model, task),
            {},
            {**place, "data_root": self.preset.data_root},
        )
        units = {"prepare": prepare}
        plain_options = dataclasses.asdict(options)
        adapter = {"rank": None, "lora_alpha": None, "target_modules": None}
        if method.adapter:
            adapter = {key: value[key] for key in adapter}
            where = settings["target_modules"].source, settings["rank"].source
            check_targets(config.path, adapter["target_modules"], adapter["rank"], where)
        if method.initializes:
            units |= self._initialization(
                model, task, row, method, options, value, prepare, identity, place
            )
        initialize = units.get("initialize")
        train = self._unit(
            "train",
            spec.Train(
                model=identity,
                prepare=prepare.id,
                implementation=self.methods[row.method][0].implementation,
                options=plain_options,
                initialize=initialize.id if initialize else None,
                **adapter,
                **{
                    key: value[key]
                    for key in (
                        "learning_rate",
                        "schedule",
                        "warmup_ratio",
                        "weight_decay",
                        "max_grad_norm",
                        "batch_size",
                        "epochs",
                    )
                },
                seed=seed,
            ),
            (model, task, row.method),
            {"prepare": prepare, "initialize": initialize},
            {**place, "micro_batch": config.micro_batch},
        )
        export = self._unit(
            "export",
            spec.Export(
                train.id, self.methods[row.method][0].implementation, plain_options
            ),
            (model, task, row.method),
            {"train": train, "initialize": initialize},
            {},
        )
        units |= {"train": train, "export": export}
        generates, scores = self._evaluations(model, task, row.method, export)
        return Cell(model, task, row, seed, settings, units, generates, scores)

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
                **{key: unit for key, unit in statistics.items() if key != "sensitivity"},
                "allocate": units.get("allocate"),
                "prepare": prepare if reads else None,
                **({} if wanted is not None else {"sensitivity": statistics.get("sensitivity")}),
            },
            place,
        )
        return units

    def _evaluations(
        self, model: str, task: str, method: str, export: Unit | None
    ) -> tuple[dict[str, Unit], dict[str, Unit]]:
        config, _, identity = self.models[model]
        shared, _ = self.tasks[task]
        generates, scores = {}, {}
        for name in shared.benchmarks:
            benchmark, document = self._benchmark(name)
            data, files = self._data("benchmarks", name, benchmark, document, ["test"])
            module_of(document, "implementation", "benchmarks", benchmark.implementation)
            fields = ("source", "max_new_tokens", "stop", "limit")
            generates[name] = self._unit(
                "generate",
                spec.Generate(
                    identity,
                    export.id if export else None,
                    shared.prompt,
                    {"data": data, **{key: getattr(benchmark, key) for key in fields}},
                    files,
                ),
                (model, task, method, name),
                {"export": export},
                {
                    "model": config.path,
                    "revision": config.revision,
                    "data_root": self.preset.data_root,
                },
            )
            scores[name] = self._unit(
                "score",
                spec.Score(generates[name].id, benchmark.implementation),
                (model, task, method, name),
                {"generate": generates[name]},
                {},
            )
        return generates, scores

    def _benchmark(self, name: str) -> tuple[Benchmark, Document]:
        """Return a benchmark with this preset's overrides."""
        benchmark, document = self.benchmarks[name]
        values: dict[str, Any] = {}
        for index, override in enumerate(self.preset.overrides):
            if name not in (override.benchmarks or []):
                continue
            for key, value in override.set.items():
                if key in ("max_new_tokens", "limit", "stop"):
                    values[key] = value
                elif not key.startswith("data."):
                    where = self.document.where(("overrides", index, "set", key))
                    raise UserError(
                        f"{where}: overrides.{index}.set.{key}: {value!r}: unknown key; "
                        f"{nearest(key, ['max_new_tokens', 'limit', 'stop', 'data.*'])}"
                    )
        return parse(document, Benchmark, values) if values else benchmark, document

    def _check_batch(self, model: Model, document: Document, batch: int) -> None:
        micro = model.micro_batch
        if micro is not None and batch % min(micro, batch):
            valid = [size for size in range(1, batch + 1) if batch % size == 0]
            near = sorted(sorted(valid, key=lambda size: abs(size - micro))[:2])
            raise UserError(
                f"{document.where(('micro_batch',))}: micro_batch: {micro}: expected a divisor of "
                f"the batch size {batch}; nearest: {', '.join(map(str, near))}"
            )

    # -- what the workflow asks -------------------------------------------------------------------

    @property
    def comparison(self) -> Path:
        """Where the preset's tables lie."""
        return RESULTS / "comparison" / self.name

    def grid(self) -> dict[str, Any]:
        """Return what `compare` and `track` need: the cells by id and path, without labels."""
        return {
            "preset": self.name,
            "cells": [self._grid_cell(cell) for cell in self.cells],
            "tasks": {name: {"benchmarks": task.benchmarks} for name, (task, _) in self.tasks.items()},
        }

    def labelled_grid(self) -> dict[str, Any]:
        """Return the grid with the labels of everything in it."""
        grid = self.grid()
        rows = {"base": BASE.label, **{row.name: row.label for row in self.rows}}
        for cell in grid["cells"]:
            cell["label"] = rows[cell["method"]]
        for name, (task, _) in self.tasks.items():
            grid["tasks"][name]["label"] = task.label or name
        grid["models"] = {
            name: {"label": entry[0].label or name} for name, entry in self.models.items()
        }
        grid["benchmarks"] = {
            name: {"label": one.label or name} for name, (one, _) in self.benchmarks.items()
        }
        return grid

    def _grid_cell(self, cell: Cell) -> dict[str, Any]:
        units = cell.units
        chain = [unit for name, unit in units.items() if name not in ("prepare", "train", "export")]
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
            "costs": [str(unit.main) for unit in chain],
            "allocation": str(units["allocate"].main) if "allocate" in units else None,
            "scores": {name: str(unit.main) for name, unit in cell.scores.items()},
            "generations": {
                name: str(unit.folder / "generate.json") for name, unit in cell.generates.items()
            },
            "card": None if cell.base else str(units["prepare"].main),
        }

    def of(self, stage: str) -> list[Unit]:
        """Return all units of a stage."""
        return [unit for (name, _), unit in self.units.items() if name == stage]


@functools.lru_cache(maxsize=4096)
def _checksum(path: str, _changed: int) -> str:
    return sha256_file(Path(path))


