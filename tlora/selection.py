"""What a preset selects, checked, and the effective settings of its cells."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlora import methods
from tlora.config import (
    Benchmark,
    Document,
    Hyperparameters,
    Library,
    Model,
    Task,
    library_of,
    module_of,
    nearest,
    parse,
    read_preset,
    typed,
)
from tlora.distributed import split
from tlora.errors import UserError
from tlora.weights import checksum, fingerprint


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a method, or one of the values that `vary` gives it."""

    method: str
    label: str
    varied: dict[str, Any]
    at: tuple[str | int, ...] = ("vary",)

    @property
    def name(self) -> str:
        """The method's name with the varied values."""
        values = ",".join(f"{key}={value}" for key, value in self.varied.items())
        return f"{self.method}({values})" if values else self.method


@dataclasses.dataclass(frozen=True)
class Grid:
    """Models x tasks x rows x seeds."""

    models: list[str]
    tasks: list[str]
    rows: list[Row]
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class Setting:
    """An effective value and the file and line it comes from."""

    value: Any
    source: str


LOSS, VALIDATION = "loss", "validation"
"""What judges a validation split where no benchmark can; the name of the trials' benchmark."""


class Selection:
    """The models, tasks, methods and benchmarks of a preset.

    Parameters
    ----------
    files
        The preset's YAML, or several laid over each other.
    command_line
        `--config key=value` pairs, which replace the preset's keys.

    Raises
    ------
    UserError
        For an unknown name or key, a wrong type, or a file that is missing.
    """

    def __init__(self, files: list[Path], command_line: Mapping[str, Any] | None = None) -> None:
        self.preset, self.document = read_preset(files, command_line or {})
        self.name = self.document.path.stem
        self.library: Library = library_of(self.document.path)
        self._check_lists()
        self.models = {
            name: self._model(name, asked) for name, asked in self._named("models").items()
        }
        self.tasks = {
            name: self.library.task(name, asked) for name, asked in self._named("tasks").items()
        }
        self.methods = {
            name: self.library.method(name, asked) for name, asked in self._named("methods").items()
        }
        self.benchmarks = {
            name: self.library.benchmark(name, f"{document.where(('benchmarks',))}: benchmarks")
            for task, document in self.tasks.values()
            for name in task.benchmarks
        }
        if self.preset.tune is not None:
            for task, (_, document) in self.tasks.items():
                name, asked = self.judge(task), f"{document.where(('validation',))}: validation"
                if name != LOSS and name not in self.benchmarks:
                    self.benchmarks[name] = self.library.benchmark(name, asked)
        self._check_overrides()
        self.grids = list(self._grids())
        self.rows = list({row.name: row for grid in self.grids for row in grid.rows}.values())
        self._check_tune()

    def _lists(self, key: str) -> Iterator[tuple[tuple[str | int, ...], list[Any]]]:
        """Yield what every grid lists under a key, and where."""
        for index, grid in enumerate(self.preset.grids or [None]):
            own = None if grid is None else getattr(grid, key)
            yield (
                ((key,), getattr(self.preset, key)) if own is None else (("grids", index, key), own)
            )

    def _named(self, key: str) -> dict[str, str]:
        """Return all names under a key, with the file and line that ask for them first."""
        found: dict[str, str] = {}
        for at, values in self._lists(key):
            for index, name in enumerate(values):
                found.setdefault(name, f"{self.document.where((*at, index))}: {key}")
        return found

    def _check_lists(self) -> None:
        for key in ("models", "tasks", "methods", "seeds"):
            for at, values in self._lists(key):
                if not values:
                    raise UserError(f"{self.document.where(at)}: {key}: this key is required")
                for index, value in enumerate(values):
                    if value in values[:index]:
                        where = self.document.where((*at, index))
                        raise UserError(f"{where}: {key}: {value!r}: stands twice")
        root = self.preset.data_root
        if root is not None and not Path(root).is_dir():
            where = self.document.where(("data_root",))
            raise UserError(f"{where}: data_root: {root!r}: expected a folder that exists")

    def _check_overrides(self) -> None:
        known = {
            "models": list(self.models),
            "tasks": list(self.tasks),
            "methods": list(self.methods),
            "benchmarks": list(self.benchmarks),
        }
        selections = [
            (("overrides", index), override.model_dump(exclude={"set"}))
            for index, override in enumerate(self.preset.overrides)
        ] + [
            ((*at, index), entry)
            for at, entries in self._variations()
            for index, entry in enumerate(entries)
        ]
        for at, selection in selections:
            for key in known:
                for name in selection.get(key) or []:
                    if name not in known[key]:
                        where = self.document.where((*at, key))
                        raise UserError(
                            f"{where}: {key}: {name!r}: not in this preset; "
                            f"{nearest(name, known[key])}"
                        )

    def _model(self, name: str, asked: str) -> tuple[Model, Document, dict]:
        model, document = self.library.model(name, asked)
        identity = fingerprint(model.path, model.revision, document.where(("path",)))
        identity |= {"dtype": model.dtype, "architecture": model.architecture}
        return model, document, identity

    def _variations(self) -> list[tuple[tuple[str | int, ...], list[dict[str, Any]]]]:
        """Return every list under `vary`, and where it stands."""
        grids = enumerate(self.preset.grids)
        return [
            (("vary",), self.preset.vary),
            *((("grids", index, "vary"), grid.vary) for index, grid in grids),
        ]

    def _grids(self) -> Iterator[Grid]:
        variations = self._variations()
        lists = [list(self._lists(key)) for key in ("models", "tasks", "methods", "seeds")]
        for index, parts in enumerate(zip(*lists, strict=True)):
            models, tasks, names, seeds = (values for _, values in parts)
            own = variations[index + 1 : index + 2] if self.preset.grids else []
            rows = [row for name in names for row in self._rows(name, [variations[0], *own])]
            yield Grid(models, tasks, rows, seeds)

    def _rows(
        self, name: str, variations: list[tuple[tuple[str | int, ...], list[dict[str, Any]]]]
    ) -> Iterator[Row]:
        """Yield a method's rows: itself, or one for every value that is varied."""
        label = self.methods[name][0].label or name
        entries = [
            ((*at, index), entry)
            for at, entries in variations
            for index, entry in enumerate(entries)
            if name in entry.get("methods", [name])
        ]
        if not entries:
            yield Row(name, label, {})
        for at, entry in entries:
            for key, values in entry.items():
                if key == "methods":
                    continue
                if not isinstance(values, list):
                    where = self.document.where((*at, key))
                    raise UserError(f"{where}: vary.{key}: {values!r}: expected a list")
                for value in values:
                    # Under `set` a value is a mapping of what changes together.
                    varied = value if key == "set" and isinstance(value, dict) else {key: value}
                    shown = ", ".join(f"{key} = {value}" for key, value in varied.items())
                    yield Row(name, f"{label} ({shown})", varied, at)

    def judge(self, task: str) -> str:
        """Return the benchmark whose rules judge a task's validation split, or `LOSS`."""
        config = self.tasks[task][0]
        return config.validation or config.benchmarks[0]

    def _check_tune(self) -> None:
        """Refuse grids of trials that are unfair or that other keys contradict."""
        tune = self.preset.tune
        if tune is None:
            return
        for name in tune.methods:
            if name not in self.methods:
                where = self.document.where(("tune", "methods", name))
                known = nearest(name, self.methods)
                raise UserError(f"{where}: tune.methods: {name!r}: not in this preset; {known}")
        for at, seeds in self._lists("seeds"):
            if tune.seed in seeds:
                where = self.document.where((*at, seeds.index(tune.seed)))
                raise UserError(
                    f"{where}: seeds: {tune.seed}: expected none that tune.seed has: what was "
                    "chosen is confirmed by other runs"
                )
        counts: dict[str, int] = {}
        for row in self.rows:
            at, grid = self.tuned_grid(row.method)
            place = self.document.where(at)
            if not grid:
                raise UserError(f"{place}: {'.'.join(at)}: expected {{key: [values]}}")
            for key, values in grid.items():
                where = f"{self.document.where((*at, key))}: {'.'.join((*at, key))}:"
                repeated = [value for value in values if values.count(value) > 1]
                if not values or repeated:
                    raise UserError(f"{where} {values!r}: expected different values, at least one")
                if key in self.preset.set or key in row.varied:
                    other = "set" if key in self.preset.set else "vary"
                    raise UserError(f"{where} {other} has it too: expected one of the two")
            counts[row.method] = math.prod(map(len, grid.values()))
        for method, count in counts.items():
            first = next(iter(counts))
            if count != counts[first]:
                at, _ = self.tuned_grid(method)
                raise UserError(
                    f"{self.document.where(at)}: {'.'.join(at)}: {count} trials of {method}, "
                    f"{counts[first]} of {first}: expected equally many"
                )

    def tuned_grid(self, method: str) -> tuple[tuple[str, ...], dict[str, list[Any]]]:
        """Return the grid of a method's trials, and where it stands."""
        tune = self.preset.tune
        if method in tune.methods:
            return ("tune", "methods", method), tune.methods[method]
        return ("tune", "grid"), tune.grid

    def trials(self, method: str) -> list[dict[str, Any]]:
        """Return what every trial of a method sets, in the grid's order."""
        _, grid = self.tuned_grid(method)
        return [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]

    def settings(
        self,
        model: str,
        task: str,
        row: Row,
        tuned: Mapping[str, Any] | None = None,
        origin: str | None = None,
    ) -> dict[str, Setting]:
        """Return every effective value of a cell with the file and line it comes from.

        Precedence: task < method (with `hyperparameters: own`) < overrides < vary < set < `tuned`,
        what a trial sets or a choice has found; `origin` says which.
        """
        shared, document = self.tasks[task]
        method, method_document = self.methods[row.method]
        found: dict[str, Setting] = {}
        for key in Hyperparameters.model_fields:
            source = document.where((key,)) if key in document.values else "default"
            found[key] = Setting(getattr(shared, key), source)
        implementation = self._implementation(row.method)
        kind = implementation.module.Options
        options = typed(method_document, ("options",), kind, method.options)
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
        layers.append((row.varied, self.document, row.at))
        layers.append((self.preset.set, self.document, ("set",)))
        if tuned:
            at = self.tuned_grid(row.method)[0]
            places = {} if origin is None else {(*at, key): origin for key in tuned}
            layers.append((tuned, self.document.placed(places), at))
        for values, layer, at in layers:
            for key, value in values.items():
                name = ".".join(map(str, (*at, key)))
                if key.startswith("data."):
                    continue
                if key not in found:
                    raise UserError(
                        f"{layer.where((*at, key))}: {name}: {value!r}: unknown key; "
                        f"{nearest(key, found)}"
                    )
                found[key] = Setting(value, layer.where((*at, key)))
        # What the layers brought in is checked by the schema of its keys.
        shared_keys = {key: found[key] for key in Hyperparameters.model_fields}
        origins = {(key,): setting.source for key, setting in shared_keys.items()}
        values = {key: setting.value for key, setting in shared_keys.items()}
        parse(Document(document.path, values, {}).placed(origins), Hyperparameters)
        return found

    def _implementation(self, method: str) -> methods.Method:
        config, document = self.methods[method]
        module_of(document, "implementation", "methods", config.implementation)
        return methods.load(config.implementation)

    def _options(self, row: Row, settings: dict[str, Setting]) -> Any:
        _, document = self.methods[row.method]
        options = {
            key.removeprefix("options."): setting
            for key, setting in settings.items()
            if key.startswith("options.")
        }
        values = {key: setting.value for key, setting in options.items()}
        origins = {("options", key): setting.source for key, setting in options.items()}
        module = self._implementation(row.method).module
        return typed(document.placed(origins), ("options",), module.Options, values)

    def _data(
        self, kind: str, name: str, config: Task | Benchmark, document: Document, splits: list[str]
    ) -> tuple[dict, dict]:
        """Return a source's resolved options and the checksums of the local files it reads."""
        module = module_of(document, "source", "tasks", config.source)
        values = dict(config.data)
        layers: list[tuple[Mapping[str, Any], tuple]] = [
            (override.set, ("overrides", index, "set"))
            for index, override in enumerate(self.preset.overrides)
            if name in (getattr(override, kind) or ([name] if kind == "tasks" else []))
            and (kind == "benchmarks" or override.benchmarks is None)
        ]
        if kind == "tasks":
            layers.append((self.preset.set, ("set",)))
        origins: dict[tuple[str | int, ...], str] = {}
        for layer, at in layers:
            for key, value in layer.items():
                if key.startswith("data."):
                    option = key.removeprefix("data.")
                    values[option] = value
                    origins["data", option] = self.document.where((*at, key))
        data = typed(document.placed(origins), ("data",), module.Data, values)
        files: dict[str, str] = {}
        root = None if self.preset.data_root is None else Path(self.preset.data_root)
        for part in splits:
            for label, path in module.sources(data, part, root).items():
                if not Path(path).is_file():
                    raise UserError(
                        f"{document.where(('data',))}: data: {str(path)!r}: no such file"
                    )
                files[label] = checksum(Path(path))
        return dataclasses.asdict(data), files

    def _benchmark(self, name: str) -> tuple[Benchmark, Document]:
        """Return a benchmark with this preset's overrides."""
        benchmark, document = self.benchmarks[name]
        values: dict[str, Any] = {}
        origins: dict[tuple[str | int, ...], str] = {}
        for index, override in enumerate(self.preset.overrides):
            if name not in (override.benchmarks or []):
                continue
            for key, value in override.set.items():
                where = self.document.where(("overrides", index, "set", key))
                if key in ("max_new_tokens", "limit", "stop"):
                    values[key] = value
                    origins[key,] = where
                elif not key.startswith("data."):
                    raise UserError(
                        f"{where}: overrides.{index}.set.{key}: {value!r}: unknown key; "
                        f"{nearest(key, ['max_new_tokens', 'limit', 'stop', 'data.*'])}"
                    )
        document = document.placed(origins)
        return parse(document, Benchmark, values) if values else benchmark, document

    def _devices(self, model: str, task: str) -> dict[str, Any]:
        """Return the processes of a training job, its GPUs and DeepSpeed's settings."""
        config, document, _ = self.models[model]
        gpus = self.tasks[task][0].gpus or config.gpus
        found: dict[str, Any] = {"gpus": gpus, "processes": config.processes or gpus or 1}
        if config.deepspeed is not None:
            path = self.library.folder / "deepspeed" / f"{config.deepspeed}.json"
            if not path.is_file():
                known = [file.stem for file in path.parent.glob("*.json")]
                raise UserError(
                    f"{document.where(('deepspeed',))}: deepspeed: {config.deepspeed!r}: no file "
                    f"{path}; {nearest(config.deepspeed, known)}"
                )
            found["deepspeed"] = str(path)
        return found

    def _check_batch(self, model: str, task: str, batch: int) -> None:
        config, document, _ = self.models[model]
        try:
            split(batch, config.micro_batch, self._devices(model, task)["processes"])
        except UserError as error:
            key = str(error).partition(":")[0]
            raise UserError(f"{document.where((key,))}: {error}") from error
