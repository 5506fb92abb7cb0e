"""The schema of all YAML: what it takes, and the one line that names what it does not."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tlora.config import (
    Benchmark,
    Library,
    Method,
    Model,
    Preset,
    Task,
    command_line,
    library_of,
    merge,
    nearest,
    parse,
    read_preset,
    read_yaml,
    typed,
)
from tlora.errors import UserError

TASK = """\
source: arithmetic
prompt: "{instruction}"
rank: 8
lora_alpha: 8
learning_rate: 1.0e-3
batch_size: 16
benchmarks: [arithmetic]
"""
PRESET = """\
models: [tiny]
tasks: [sums]
methods: [lora]
seeds: [1, 2]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    """Write a file below the working directory."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def library(**files: str) -> Library:
    """Write the files of a configuration, named kind__name; return its library."""
    for kind in ("models", "tasks", "methods", "benchmarks"):
        Path("config", kind).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write(f"config/{name.replace('__', '/')}.yaml", text)
    return Library(Path("config"))


def message(function: Any, *arguments: Any) -> str:
    """Return the one-line message of the `UserError` that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_all_shipped_files_are_valid(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every YAML in config/ fits its schema, also those that no preset names."""
    monkeypatch.chdir(root)
    shipped = Library(Path("config"))
    read = {
        "models": shipped.model,
        "tasks": shipped.task,
        "methods": shipped.method,
        "benchmarks": shipped.benchmark,
    }
    for kind, function in read.items():
        assert shipped.names(kind)
        for name in shipped.names(kind):
            function(name)
    for preset in Path("config").glob("*.yaml"):
        read_preset([preset], {})


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (Task, TASK + "ranks: 8", "f.yaml:8: ranks: 8: unknown key; did you mean 'rank'?"),
        (Task, TASK + "max_length: 1", "f.yaml:8: max_length: 1: input should be greater than 1"),
        (Task, TASK + "epochs: [1]", "f.yaml:8: epochs: [1]: expected a number"),
        (Task, "rank: 8.5\n", "f.yaml:1: rank: 8.5: expected a whole number"),
        (Model, "path: 3", "f.yaml:1: path: 3: expected text"),
        (Model, "path: a\ndtype: float16", "f.yaml:2: dtype: 'float16': expected 'float32' or"),
        (Model, "dtype: float32", "f.yaml: path: this key is required"),
        (Model, "path: a\nmicro_batch: 0", "f.yaml:2: micro_batch: 0: "),
        (Model, "path: a\nmicro_batch: true", "f.yaml:2: micro_batch: True: expected a whole"),
        (Benchmark, "stop: USER", "f.yaml:1: stop: 'USER': expected a list"),
        (Benchmark, "limit: ten", "f.yaml:1: limit: 'ten': expected a whole number"),
        (Method, "options: [a]", "f.yaml:1: options: ['a']: expected a mapping"),
        (Method, "implementations: a", "unknown key; did you mean 'implementation'?"),
        (Preset, "seeds: []", "f.yaml:1: seeds: []: "),
        (Preset, "seeds:\n  - 1\n  - x", "f.yaml:3: seeds.1: 'x': expected a whole number"),
        (
            Preset,
            "overrides:\n  - {set: {}, sets: 1}",
            "f.yaml:2: overrides.0.sets: 1: unknown key",
        ),
    ],
)
def test_mistakes_name_line_key_value_and_expectation(
    schema: type, text: str, expected: str
) -> None:
    """Whatever is wrong first in a file, other keys missing or not."""
    found = write("f.yaml", textwrap.dedent(text))
    document = read_yaml(found)
    with pytest.raises(UserError) as caught:
        parse(document, schema)
    lines = [str(caught.value)]
    if expected not in lines[0]:
        # A required key that is missing may be reported first: supply those.
        full = {
            Task: {"source": "a", "prompt": "a", "rank": 1, "lora_alpha": 1.0, "batch_size": 1}
            | {"learning_rate": 1.0, "benchmarks": ["a"]},
            Benchmark: {"source": "a", "implementation": "a", "max_new_tokens": 1},
            Preset: {"models": ["a"], "tasks": ["a"], "methods": ["a"], "seeds": [1]},
        }.get(schema, {})
        lines.append(message(parse, document, schema, {**full, **document.values}))
    assert any(expected in line for line in lines), lines


@pytest.mark.parametrize("text", ["1e-4", "'0.1'", "1e5"])
def test_number_that_yaml_reads_as_text(text: str) -> None:
    """YAML 1.1 wants a point and a sign; the line says so, and nothing is converted silently."""
    write("f.yaml", TASK.replace("1.0e-3", text))
    found = message(parse, read_yaml(Path("f.yaml")), Task)
    assert found.startswith(f"f.yaml:5: learning_rate: {text.strip(chr(39))!r}: expected a number")


def test_whole_numbers_are_numbers() -> None:
    """`epochs: 2` needs no point."""
    write("f.yaml", TASK + "epochs: 2\n")
    assert parse(read_yaml(Path("f.yaml")), Task).epochs == 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: a: this key stands twice"),
        ("a:\n  b: 1\n  b: 2", "f.yaml:3: b: this key stands twice"),
        ("a: {b: 1, b: 2}", "f.yaml:1: b: this key stands twice"),
        ("- a", "f.yaml: expected a mapping"),
        ("a: [1", "f.yaml:1: not valid YAML"),
        ("a: 1\n b: 2", "f.yaml:2: not valid YAML"),
    ],
)
def test_broken_files(text: str, expected: str) -> None:
    """Broken YAML and keys that stand twice, with the line."""
    assert message(read_yaml, write("f.yaml", text)).startswith(expected)


def test_missing_and_empty_files() -> None:
    """A missing one is named; an empty one has no keys."""
    assert message(read_yaml, Path("none.yaml")) == "none.yaml: no such file"
    assert read_yaml(write("empty.yaml", "# nothing\n")).values == {}


def test_lines_of_nested_keys() -> None:
    """Every key and list item has its line; what has none answers with the key above it."""
    document = read_yaml(write("f.yaml", "a:\n  b:\n    - 1\n    - 2\nc: {d: 3}\n"))
    assert document.where(("a", "b", 1)) == "f.yaml:4"
    assert document.where(("c", "d")) == "f.yaml:5"
    assert document.where(("c", "x", "y")) == "f.yaml:5"
    assert document.where(("x",)) == "f.yaml"
    moved = document.placed({("a", "b"): "--config"})
    assert moved.where(("a", "b", 1)) == "--config"
    assert moved.where(("a",)) == "f.yaml:1"


def test_changed_file_is_read_again() -> None:
    """Reading is remembered, but not past a change."""
    import os

    path = write("f.yaml", "a: 1")
    assert read_yaml(path).values == {"a": 1}
    write("f.yaml", "a: 2")
    os.utime(path, ns=(1, 1))
    assert read_yaml(path).values == {"a": 2}


def test_extends_supplies_what_is_left_out() -> None:
    """Mappings merge, everything else replaces; each value keeps the file and line it is from."""
    method, document = library(
        methods__parent="label: P\nimplementation: tlora\noptions: {variant: a,\n center: true}",
        methods__child="extends: parent\noptions: {variant: released}",
    ).method("child")
    assert method.implementation == "tlora"
    assert method.label is None
    assert method.options == {"variant": "released", "center": True}
    assert document.where(("options", "variant")) == "config/methods/child.yaml:2"
    assert document.where(("options", "center")) == "config/methods/parent.yaml:4"


def test_extends_is_one_level_deep() -> None:
    """A chain, a missing parent and neither of the two keys are errors."""
    found = library(
        methods__a="implementation: lora",
        methods__b="extends: a",
        methods__c="extends: b",
        methods__d="extends: aa",
        methods__e="label: E",
    )
    assert message(found.method, "c").startswith("config/methods/c.yaml:1: extends: 'b': extends")
    assert "config/methods/d.yaml:1: extends: 'aa'" in message(found.method, "d")
    assert "did you mean 'a'?" in message(found.method, "d")
    assert "implementation: this key (or extends) is required" in message(found.method, "e")


def test_unknown_name_has_the_nearest() -> None:
    """Who asked, the name, and what there is."""
    found = library(methods__lora="implementation: lora", methods__pissa="implementation: pissa")
    expected = "p.yaml:3: methods: 'pisa': no method of this name in config/methods; did you mean"
    assert message(found.method, "pisa", "p.yaml:3: methods").startswith(expected)
    assert message(found.method, "xxxxxx").endswith("known: lora, pissa")
    assert nearest("a", []) == "known: none"


def test_task_needs_the_place_of_the_instruction() -> None:
    """A prompt without {instruction} would train on nothing."""
    found = library(tasks__sums=TASK.replace("{instruction}", "{question}"))
    expected = "config/tasks/sums.yaml:2: prompt: '{question}': expected a template"
    assert message(found.task, "sums").startswith(expected)


def test_later_presets_and_the_command_line_replace() -> None:
    """Each value is attributed to where it stands."""
    library()
    first = write("config/first.yaml", PRESET)
    second = write("config/second.yaml", "seeds: [3]\nset: {rank: 4}\n")
    preset, document = read_preset([first, second], {"set": {"epochs": "2"}, "calibration_seed": 5})
    assert (preset.models, preset.seeds) == (["tiny"], [3])
    assert preset.set == {"epochs": 2}
    assert preset.calibration_seed == 5
    assert document.where(("models", 0)) == "config/first.yaml:1"
    assert document.where(("seeds", 0)) == "config/second.yaml:1"
    assert document.where(("set", "epochs")) == "--config"


def test_a_preset_may_extend_another() -> None:
    """What it leaves out is the other's, with the other's lines; a circle and a gap are named."""
    library()
    write("config/below.yaml", PRESET + "set: {rank: 2, epochs: 2}\n")
    above = write("config/above.yaml", "extends: below\nseeds: [3]\nset: {rank: 4}\n")
    preset, document = read_preset([above], {})
    assert (preset.models, preset.seeds) == (["tiny"], [3])
    assert preset.set == {"rank": 4, "epochs": 2}
    assert document.where(("models",)) == "config/below.yaml:1"
    assert document.path == above
    write("config/below.yaml", PRESET + "extends: above\n")
    assert message(read_preset, [above], {}) == (
        "config/below.yaml:5: extends: 'above': extends itself"
    )
    write("config/below.yaml", PRESET + "extends: nothing\n")
    assert message(read_preset, [above], {}) == (
        "config/below.yaml:5: extends: 'nothing': no preset config/nothing.yaml"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seeds": ["1", "2"]}, [1, 2]),
        ({"seeds": [1]}, [1]),
    ],
)
def test_lists_on_snakemakes_command_line(given: dict, expected: list[int]) -> None:
    """Snakemake hands over text inside lists; it is read as YAML reads it."""
    library()
    assert read_preset([write("config/p.yaml", PRESET)], given)[0].seeds == expected


def test_mistakes_on_the_command_line_name_it() -> None:
    """Not the file, in which nothing is wrong."""
    library()
    path = write("config/p.yaml", PRESET)
    found = message(read_preset, [path], {"seeds": ["x"]})
    assert found == "--config: seeds.0: 'x': expected a whole number"
    assert message(read_preset, [path], {"seed": 1}).startswith("--config: seed: 1: unknown key")


def test_command_line_of_tlora() -> None:
    """KEY=VALUE, the value as YAML."""
    assert command_line(["seeds=[1, 2]", "data_root=/a=b"]) == {
        "seeds": [1, 2],
        "data_root": "/a=b",
    }
    assert message(command_line, ["seeds"]) == "--config: 'seeds': expected KEY=VALUE"


def test_library_is_the_nearest_folder_above() -> None:
    """A preset may lie in a subfolder; the library is named as seen from here."""
    library()
    assert library_of(write("config/papers/p.yaml", PRESET)).folder == Path("config")
    assert library_of(Path("config/p.yaml").absolute()).folder == Path("config")
    assert "holds methods/ and tasks/" in message(library_of, Path("other/p.yaml"))


def test_merge_keeps_both_and_changes_neither() -> None:
    """Mappings merge at every depth, lists replace."""
    below, above = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}, "e": 2}
    assert merge(below, above) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": 2}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


@dataclass(frozen=True)
class Options:
    """Options of a made-up method."""

    kind: Literal["one", "two"]
    count: int = 1
    ratio: float = 0.5
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("count: expected 1 or more")


def options(text: str) -> Any:
    """Read options from a file."""
    document = read_yaml(write("m.yaml", f"options: {{{text}}}"))
    return typed(document, ("options",), Options, document.values["options"])


def test_typed_builds_the_dataclass() -> None:
    """Defaults, whole numbers as floats, lists as tuples."""
    assert options("kind: two, ratio: 1, names: [a, b]") == Options("two", 1, 1.0, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: three", "m.yaml:1: options.kind: 'three': expected 'one' or 'two'"),
        ("kind: one, cont: 2", "m.yaml:1: options.cont: 2: unknown key; did you mean 'count'?"),
        ("count: 2", "m.yaml:1: options.kind: this key is required"),
        ("kind: one, count: 1.5", "m.yaml:1: options.count: 1.5: expected a whole number"),
        ("kind: one, ratio: 1e-4", "m.yaml:1: options.ratio: '1e-4': expected a number; YAML"),
        ("kind: one, count: 0", "m.yaml:1: options.count: 0: expected 1 or more"),
        ("kind: one, names: [1]", "m.yaml:1: options.names.0: 1: expected text"),
    ],
)
def test_typed_names_what_is_wrong(text: str, expected: str) -> None:
    """As the schema does."""
    assert message(options, text).startswith(expected)
