"""The schema of all YAML: models, tasks, methods, benchmarks and presets.

Every mistake is a `UserError` that names the file, the line, the key, the value and what was
expected. Nothing here is imported by a stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tlora import benchmarks
from tlora.errors import UserError

KINDS = ("models", "tasks", "methods", "benchmarks")
LM_EVAL = "lm_eval"


class Strict(BaseModel):
    """A mapping without unknown keys and without silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Model(Strict):
    """A base model: a folder or a repository of the Hugging Face hub."""

    label: str | None = None
    path: str = Field(description="folder (relative to the working directory) or hub repository")
    revision: str | None = Field(None, description="commit of the hub repository")
    architecture: Literal["causal", "seq2seq"] = "causal"
    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int | None = Field(
        None, gt=0, description="so many of the longest samples fit in a forward pass; placement"
    )
    gpus: int | None = Field(None, gt=0, description="GPUs of a training job; placement")
    processes: int | None = Field(None, gt=0, description="default: one a GPU; placement")
    deepspeed: str | None = Field(None, description="a file of config/deepspeed; placement")


class Hyperparameters(Strict):
    """What all methods of a task share, and what overrides and `vary` may set."""

    rank: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)
    target_modules: str | list[str] = "all-linear"
    learning_rate: float = Field(gt=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(gt=0, description="samples an optimizer step, over all devices")
    epochs: float = Field(1.0, gt=0)
    calibration_samples: int = Field(32, gt=0)
    max_length: int = Field(512, gt=1, description="tokens of prompt and target")


class Task(Hyperparameters):
    """Training data, prompt, shared hyperparameters and benchmarks."""

    label: str | None = None
    source: str = Field(description="module of tlora/tasks")
    data: dict[str, Any] = {}
    prompt: str = Field(description="template with {instruction}")
    benchmarks: list[str] = Field(min_length=1)
    validation: str | None = Field(
        None,
        description="benchmark whose rules judge the validation split, or loss; default: first",
    )
    gpus: int | None = Field(None, gt=0, description="in place of the model's; placement")


class Method(Strict):
    """A fine-tuning method: an implementation and its options."""

    label: str | None = None
    paper: str | None = None
    extends: str | None = None
    implementation: str | None = Field(None, description="module of tlora/methods")
    options: dict[str, Any] = {}
    training: dict[str, Any] = Field(
        {}, description="own hyperparameters, used with `hyperparameters: own`"
    )


class Benchmark(Strict):
    """Test data, decoding and the scorer."""

    label: str | None = None
    source: str = Field(description="module of tlora/tasks")
    data: dict[str, Any] = {}
    implementation: str = Field(description="module of tlora/benchmarks")
    options: dict[str, Any] = Field({}, description="options of the scorer")
    prompt: str | None = Field(None, description="in place of the task's prompt")
    turn_prompt: str | None = Field(None, description="what each further turn of a dialogue adds")
    max_new_tokens: int = Field(gt=0)
    num_beams: int = Field(1, gt=0)
    stop: list[str] = []
    limit: int | None = Field(None, gt=0, description="first items only")
    workers: int = Field(1, gt=0, description="processes of a scoring job; placement")


class Override(Strict):
    """Values set for some cells only."""

    models: list[str] | None = None
    tasks: list[str] | None = None
    methods: list[str] | None = None
    benchmarks: list[str] | None = None
    set: dict[str, Any]


class Grid(Strict):
    """One of several grids of a preset; what it leaves out is the preset's."""

    models: list[str] | None = Field(None, min_length=1)
    tasks: list[str] | None = Field(None, min_length=1)
    methods: list[str] | None = Field(None, min_length=1)
    seeds: list[int] | None = Field(None, min_length=1)
    vary: list[dict[str, Any]] = []


class Tune(Strict):
    """Trials on the validation split, by which every method gets values of its own."""

    grid: dict[str, list[Any]] = Field(
        {}, description="values by key; every combination of them is a trial"
    )
    methods: dict[str, dict[str, list[Any]]] = Field(
        {}, description="grids of single methods, in place of `grid`; as many trials"
    )
    seed: int = Field(0, description="of all trials; none of the preset's seeds")
    limit: int | None = Field(None, gt=0, description="first items of the validation split only")


class Preset(Strict):
    """A grid: models x tasks x methods x seeds; or several of them."""

    extends: str | None = Field(None, description="a preset beside this one; keys here win")
    models: list[str] = Field([], min_length=1)
    tasks: list[str] = Field([], min_length=1)
    methods: list[str] = Field([], min_length=1)
    seeds: list[int] = Field([], min_length=1)
    grids: list[Grid] = Field(
        [], description="{models, tasks, methods, seeds, vary}, each optional"
    )
    calibration_seed: int = 0
    hyperparameters: Literal["shared", "own"] = "shared"
    overrides: list[Override] = []
    vary: list[dict[str, Any]] = Field([], description="{methods: [...], key: [values]}")
    set: dict[str, Any] = Field({}, description="set in every cell; wins over all else")
    tune: Tune | None = Field(None, description="{grid, methods, seed, limit}")
    strict: bool = Field(False, description="refuse tables whose rows are not comparable")
    baseline: str = Field("lora", description="the method that all others are compared with")
    data_root: str | None = Field(None, description="folder with the data, instead of the hub")
    backend: Literal["transformers", "vllm"] = Field("transformers", description="generates")
    server: str | None = Field(None, description="URL of a vLLM server that jobs share; placement")
    unsafe_no_sandbox: bool = Field(False, description="run generated code without a sandbox")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise UserError(f"{key.start_mark.name}:{line}: {key.value}: this key stands twice")
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@dataclasses.dataclass(frozen=True)
class Document:
    """A parsed YAML file: its values, and `file:line` of every key."""

    path: Path
    values: dict[str, Any]
    places: Mapping[tuple[str | int, ...], str]

    def where(self, key: Iterable[str | int] = ()) -> str:
        """Return `file:line` of a key, or of the nearest key above it."""
        at = tuple(key)
        while at and at not in self.places:
            at = at[:-1]
        return self.places[at] if at else str(self.path)

    def placed(self, origins: Mapping[tuple[str | int, ...], str]) -> Document:
        """Return the document with some keys, and all below them, said to come from elsewhere."""
        kept = {
            at: place
            for at, place in self.places.items()
            if not any(at[: len(key)] == key for key in origins)
        }
        return dataclasses.replace(self, places={**kept, **origins})


def _places(path: Path, node: yaml.Node, at: tuple = ()) -> dict[tuple, str]:
    found: dict[tuple, str] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found[(*at, key.value)] = f"{path}:{key.start_mark.line + 1}"
            found |= _places(path, value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*at, index)] = f"{path}:{value.start_mark.line + 1}"
            found |= _places(path, value, (*at, index))
    return found


def _from_here(path: Path) -> Path:
    """Return a path as seen from the working directory, where it lies below that."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path


def read_yaml(path: Path) -> Document:
    """Read a YAML mapping with the lines of its keys.

    Raises
    ------
    UserError
        Missing file, broken YAML, a key that stands twice, or no mapping.
    """
    return _read_yaml(Path(path), Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


@functools.lru_cache(maxsize=4096)
def _read_yaml(path: Path, _changed: int) -> Document:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        loader = _Loader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {values!r}")
    return Document(path, values, _places(path, node) if node is not None else {})


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelt name: the nearest one, or all there are."""
    known = sorted(known)
    match = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known) or 'none'}"


def _expected(error: Mapping[str, Any], known: Iterable[str]) -> str:
    """Say in a few words what a pydantic error expected."""
    kind, context = error["type"], error.get("ctx", {})
    value = error.get("input")
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(error['loc'][-1], known)}"
    if kind == "missing":
        return "this key is required"
    if kind in ("float_type", "int_type") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return (
                "expected a number; YAML takes this for text: write it with point and sign (1.0e-4)"
            )
    names = {
        "float_type": "expected a number",
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "string_type": "expected text",
        "bool_type": "expected true or false",
        "list_type": "expected a list",
        "dict_type": "expected a mapping",
        "literal_error": f"expected {context.get('expected')}",
    }
    return names.get(kind, error["msg"][0].lower() + error["msg"][1:])


def _fail(document: Document, error: ValidationError, known: Iterable[str], at: tuple = ()) -> None:
    first = error.errors()[0]
    location = (*at, *(part for part in first["loc"] if part not in ("str", "list[str]")))
    key = ".".join(map(str, location))
    value = "" if first["type"] == "missing" else f" {first['input']!r}:"
    raise UserError(f"{document.where(location)}: {key}:{value} {_expected(first, known)}")


def parse(document: Document, schema: type[Strict], extra: Mapping[str, Any] | None = None) -> Any:
    """Check a document against a schema.

    Parameters
    ----------
    document
        The parsed file.
    schema
        One of the models above.
    extra
        Values that replace top-level keys of the file.
    """
    try:
        return schema.model_validate({**document.values, **(extra or {})})
    except ValidationError as error:
        _fail(document, error, schema.model_fields)


_hints = functools.cache(typing.get_type_hints)


@functools.cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint)


def typed(document: Document, at: tuple[str, ...], kind: type, values: Mapping[str, Any]) -> Any:
    """Build the dataclass `kind` (a source's `Data`, a method's `Options`) from YAML values.

    Returns
    -------
    object
        An instance of `kind`.

    Raises
    ------
    UserError
        Unknown key, missing key or wrong type.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            name = ".".join((*at, str(key)))
            raise UserError(
                f"{document.where((*at, key))}: {name}: {values[key]!r}: unknown key; "
                f"{nearest(key, known)}"
            )
    hints, checked = _hints(kind), {}
    for field in dataclasses.fields(kind):
        place = (*at, field.name)
        if field.name not in values:
            if field.default is field.default_factory is dataclasses.MISSING:
                raise UserError(f"{document.where(at)}: {'.'.join(place)}: this key is required")
            continue
        value = values[field.name]
        if typing.get_origin(hints[field.name]) is tuple and isinstance(value, list):
            value = tuple(value)
        try:
            checked[field.name] = _adapter(hints[field.name]).validate_python(value, strict=True)
        except ValidationError as error:
            _fail(document, error, known, place)
    try:
        return kind(**checked)
    except ValueError as error:
        # The check of a dataclass names its key first.
        key, _, expected = str(error).partition(": ")
        place = (*at, key)
        found = f" {checked[key]!r}:" if key in checked else ""
        where = f"{document.where(place)}: {'.'.join(place)}:"
        raise UserError(f"{where}{found} {expected}") from error


def module_of(document: Document, key: str, package: str, name: str) -> Any:
    """Import `tlora.{package}.{name}`, named by `key` of a document.

    Raises
    ------
    UserError
        Where there is no such module, with the nearest name.
    """
    if package == "benchmarks":
        known = benchmarks.names()
    else:
        folder = Path(__file__).parent / package
        known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if name not in known:
        raise UserError(
            f"{document.where((key,))}: {key}: {name!r}: no module of tlora/{package}; "
            f"{nearest(name, known)}"
        )
    return importlib.import_module(f"tlora.{package}.{name}")


@dataclasses.dataclass(frozen=True)
class Library:
    """The YAML files of a configuration folder: `{folder}/{kind}/{name}.yaml`."""

    folder: Path

    def names(self, kind: str) -> list[str]:
        """Return the names of all files of a kind."""
        return sorted(path.stem for path in (self.folder / kind).glob("*.yaml"))

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.yaml"

    def document(self, kind: str, name: str, asked: str) -> Document:
        """Read a file by kind and name; `asked` says who names it, for the error."""
        path = self._path(kind, name)
        if not path.is_file():
            raise UserError(
                f"{asked}: {name!r}: no {kind[:-1]} of this name in {path.parent}; "
                f"{nearest(name, self.names(kind))}"
            )
        return read_yaml(path)

    def model(self, name: str, asked: str = "models") -> tuple[Model, Document]:
        """Read a model."""
        document = self.document("models", name, asked)
        return parse(document, Model), document

    def task(self, name: str, asked: str = "tasks") -> tuple[Task, Document]:
        """Read a task."""
        document = self.document("tasks", name, asked)
        task = parse(document, Task)
        if "{instruction}" not in task.prompt:
            raise UserError(
                f"{document.where(('prompt',))}: prompt: {task.prompt!r}: expected a template "
                "with {instruction}"
            )
        return task, document

    def benchmark(self, name: str, asked: str = "benchmarks") -> tuple[Benchmark, Document]:
        """Read a benchmark; `lm_eval.TASK` is a task of lm-evaluation-harness."""
        prefix, dot, task = name.partition(".")
        if prefix == LM_EVAL and dot and not self._path("benchmarks", name).is_file():
            values = {"source": LM_EVAL, "implementation": LM_EVAL, "data": {"task": task}}
            document = Document(Path(asked), {**values, "label": task, "max_new_tokens": 1}, {})
            return parse(document, Benchmark), document
        document = self.document("benchmarks", name, asked)
        return parse(document, Benchmark), document

    def method(self, name: str, asked: str = "methods") -> tuple[Method, Document]:
        """Read a method; `extends` (one level) supplies what the file leaves out."""
        document = self.document("methods", name, asked)
        method = parse(document, Method)
        if method.extends is not None:
            at = document.where(("extends",))
            parent_document = self.document("methods", method.extends, f"{at}: extends")
            if parent_document.values.get("extends"):
                raise UserError(f"{at}: extends: {method.extends!r}: extends another one itself")
            merged = merge(parent_document.values, document.values)
            # Two rows of a table must not bear one label.
            merged["label"] = document.values.get("label")
            merged.pop("extends")
            places = {**parent_document.places, **document.places}
            document = Document(document.path, merged, places)
            method = parse(document, Method)
        if method.implementation is None:
            raise UserError(f"{document.path}: implementation: this key (or extends) is required")
        return method, document


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another: mappings merge, everything else replaces."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            value = merge(result[key], value)
        result[key] = value
    return result


def library_of(preset: Path) -> Library:
    """Return the configuration folder of a preset: the nearest one above it with `methods/`."""
    for folder in Path(preset).absolute().parents:
        if (folder / "methods").is_dir() and (folder / "tasks").is_dir():
            return Library(_from_here(folder))
    raise UserError(f"{preset}: no folder above it holds methods/ and tasks/")


def read_preset(files: list[Path], command_line: Mapping[str, Any]) -> tuple[Preset, Document]:
    """Read one preset; later files replace earlier ones' keys, the command line replaces all.

    Parameters
    ----------
    files
        The preset, or several laid over each other.
    command_line
        `--config key=value` pairs.
    """
    documents = [one for path in files for one in _with_bases(_from_here(Path(path)))]
    values: dict[str, Any] = {}
    places: dict[tuple, str] = {}
    for document in documents:
        values = merge(values, document.values)
        places |= document.places
    values |= {key: _parsed(value) for key, value in command_line.items()}
    document = Document(documents[-1].path, values, places)
    document = document.placed({(key,): "--config" for key in command_line})
    return parse(document, Preset), document


def _with_bases(path: Path) -> list[Document]:
    """Read a preset and what it extends, the latter first."""
    found: list[Document] = []
    while True:
        document = read_yaml(path)
        found.insert(0, document)
        name = document.values.get("extends")
        if name is None:
            return found
        path = path.parent / f"{name}.yaml"
        asked = f"{document.where(('extends',))}: extends: {name!r}"
        if not path.is_file():
            raise UserError(f"{asked}: no preset {path}")
        if path in [one.path for one in found]:
            raise UserError(f"{asked}: extends itself")


def _parsed(value: Any, inner: bool = False) -> Any:
    """Read the text inside lists and mappings as YAML, which snakemake's `--config` does not."""
    if isinstance(value, list):
        return [_parsed(one, True) for one in value]
    if isinstance(value, dict):
        return {key: _parsed(one, True) for key, one in value.items()}
    if inner and isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    return value


def command_line(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` as snakemake's `--config` does: the value is YAML.

    Raises
    ------
    UserError
        Without an equals sign.
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--config: {pair!r}: expected KEY=VALUE")
        values[key] = yaml.safe_load(value)
    return values
