"""Which source files a job depends on, one word per stage, and what partial state must agree with.

That the files listed are those really loaded is checked on the jobs of a real run
(tests/workflow/test_run.py): there every stage's process is started anyway.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tlora import cli, code, lease, plan, spec
from tlora.errors import UserError

# Stages of a cell, each with a spec; then those of a preset, whose spec is the grid.
CELL = (
    *("download", "prepare", "overlap", "calibrate", "allocate", "initialize", "train"),
    *("export", "check", "generate", "score", "choose"),
)
PRESET = ("compare", "index", "track")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up package in place of tlora, with a function to write its modules."""
    folder = tmp_path / "tlora"
    folder.mkdir()
    monkeypatch.setattr(code, "PACKAGE", folder)
    code.imports.cache_clear()
    yield folder
    code.imports.cache_clear()


def write(package: Path, **modules: str) -> None:
    """Write modules; a double underscore in a name stands for a folder."""
    for name, text in modules.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def closure(package: Path, *modules: str) -> list[str]:
    """Return the closure's files below the package."""
    return [path.relative_to(package).as_posix() for path in code.closure(modules)]


def test_every_form_of_import_counts(package: Path) -> None:
    """At the top, in functions, relative, of a module's names; transitively, with packages."""
    (package / "__init__.py").write_text("")
    (package / "sub").mkdir()
    (package / "sub" / "__init__.py").write_text("from . import inner")
    write(
        package,
        a="import os, tlora.b\nfrom tlora import c",
        b="def f():\n    from tlora.sub import deep",
        c="if True:\n    from .d import name",
        d="try:\n    import tlora.e\nexcept ImportError:\n    pass",
        e="",
        sub__inner="",
        sub__deep="from ..f import x",
        f="",
        unused="",
    )
    assert closure(package, "tlora.a") == [
        "__init__.py",
        "a.py",
        "b.py",
        "c.py",
        "d.py",
        "e.py",
        "f.py",
        "sub/__init__.py",
        "sub/deep.py",
        "sub/inner.py",
    ]


@pytest.mark.parametrize(
    "block",
    [
        "class C:\n    from tlora import b",
        "async def f():\n    async with x:\n        from tlora import b",
        "for x in y:\n    pass\nelse:\n    from tlora import b",
        "try:\n    pass\nexcept E:\n    from tlora import b",
        "try:\n    pass\nexcept* E:\n    pass\nelse:\n    from tlora import b",
        "try:\n    pass\nfinally:\n    from tlora import b",
        "match x:\n    case 1:\n        from tlora import b",
        "if x:\n    pass\nelif y:\n    from tlora import b",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from tlora import b",
    ],
)
def test_every_place_of_an_import_counts(package: Path, block: str) -> None:
    """Every statement that holds statements is looked into."""
    write(package, a=block, b="")
    assert closure(package, "tlora.a") == ["a.py", "b.py"]


def test_type_only_imports_do_not_count(package: Path) -> None:
    """What only a type checker sees decides no result; the other branch does."""
    write(
        package,
        a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tlora.b\n"
        "else:\n    import tlora.c",
        b="",
        c="import typing\nif typing.TYPE_CHECKING:\n    import tlora.b",
    )
    assert closure(package, "tlora.a") == ["a.py", "c.py"]


def test_cycles_end(package: Path) -> None:
    """Two modules that import each other."""
    write(package, a="import tlora.b", b="import tlora.a")
    assert closure(package, "tlora.a") == ["a.py", "b.py"]


def listed(stage: str, **fields: str) -> set[str]:
    """Return a stage's files relative to the package."""
    return {path.relative_to(code.PACKAGE).as_posix() for path in code.stage_files(stage, fields)}


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "tlora"])
def test_a_method_lists_no_other_method(method: str) -> None:
    """Changing one method's source reruns no other's."""
    for stage in ("initialize", "train", "export"):
        found = listed(stage, implementation=method)
        assert {name for name in found if name.startswith("methods/")} == {
            "methods/__init__.py",
            f"methods/{method}.py",
        }
        core = {"sensitivity.py", "allocation.py", "subspace.py"}
        assert bool(found & {"allocation.py"}) == (method == "tlora")
        assert method == "tlora" or not found & core


def test_no_stage_lists_what_the_schema_needs() -> None:
    """Otherwise every file would depend on every other, and a new key would rerun everything."""
    for stage in (*CELL, *PRESET):
        found = listed(stage, implementation="gsm8k" if stage == "score" else "tlora")
        assert not found & {"config.py", "selection.py", "plan.py", "spec.py", "code.py", "cli.py"}


def test_scoring_lists_its_scorer_only() -> None:
    """Neither another scorer nor anything of the models."""
    found = listed("score", implementation="gsm8k")
    assert "benchmarks/gsm8k.py" in found
    assert "benchmarks/choice.py" not in found
    assert not {name for name in found if name.startswith(("methods/", "generation/"))}


def test_data_source_is_listed_where_data_is_read() -> None:
    """prepare names it at the top of its spec, generate below `benchmark`."""
    assert "tasks/choice.py" in listed("prepare", source="choice")
    files = code.stage_files("generate", {"benchmark": {"source": "choice"}})
    assert code.PACKAGE / "tasks" / "choice.py" in files
    assert "tasks/choice.py" not in listed("train", implementation="lora")


@pytest.mark.parametrize("word", [*CELL, *PRESET])
def test_one_word_per_stage(root: Path, word: str) -> None:
    """The word names the rule, the command, the function and the spec's class."""
    module = importlib.import_module(f"tlora.stages.{word}")
    function = getattr(module, word)
    assert list(inspect.signature(function).parameters) == ["spec", "inputs", "out", "place"]
    assert word in cli.STAGES
    rules = "\n".join(path.read_text() for path in (root / "workflow/rules").glob("*.smk"))
    (body,) = re.findall(rf"^(?:rule|checkpoint) {word}:\n((?:[ \n].*\n?)+)", rules, re.MULTILINE)
    assert f'"tlora {word} ' in body
    if word in CELL:
        assert dataclasses.is_dataclass(getattr(spec, word.capitalize()))
        assert word in plan.MAIN


def test_no_further_words(root: Path) -> None:
    """No stage, spec or command without the others."""
    modules = {path.stem for path in (root / "tlora/stages").glob("[!_]*.py")}
    assert modules == set(cli.STAGES) == {*CELL, *PRESET, "tiny_base"}
    specs = {
        name
        for name, kind in vars(spec).items()
        if inspect.isclass(kind) and issubclass(kind, spec._Spec) and kind is not spec._Spec
    }
    assert {name.lower() for name in specs} == set(CELL) == set(plan.MAIN)


def test_planning_a_preset_loads_nothing_heavy(root: Path) -> None:
    """Reading all YAML, computing all ids: no torch, transformers, peft or datasets."""
    program = (
        "import sys; from pathlib import Path; from tlora.plan import Plan\n"
        "plan = Plan([Path('config/config.yaml')]); assert plan.units\n"
        "from tlora import methods; [methods.load(n) for n in ('full', 'lora', 'pissa', 'tlora')]\n"
        "print([n for n in ('torch', 'transformers', 'peft', 'datasets', 'mlflow', 'pandas')"
        " if n in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


# -- the stamp of partial state --------------------------------------------------------------------


def stamp(text: str, folder: Path, **fields: float) -> str:
    """Return the stamp of a training run with one input, which lies in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "card.json").write_text(text)
    values = {"implementation": "lora", **fields}
    return lease.stamp_of("train", values, {"prepare": folder / "card.json"})


def test_stamp_follows_spec_and_inputs_not_paths(tmp_path: Path) -> None:
    """The same content elsewhere is the same; another value, input or input name is not."""
    same = stamp("a", tmp_path / "1", learning_rate=0.1)
    assert stamp("a", tmp_path / "2", learning_rate=0.1) == same
    assert stamp("a", tmp_path / "1", learning_rate=0.2) != same
    assert stamp("b", tmp_path / "1", learning_rate=0.1) != same
    assert stamp("a", tmp_path / "1") != same


def test_stamp_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another source of the stage is another stamp."""
    (tmp_path / "train.py").write_text("1")
    monkeypatch.setattr(code, "stage_files", lambda stage, spec: [tmp_path / "train.py"])
    before = stamp("a", tmp_path / "in")
    (tmp_path / "train.py").write_text("2")
    assert stamp("a", tmp_path / "in") != before


def test_stage_without_spec_or_with_a_missing_input(tmp_path: Path) -> None:
    """The command says what it expects."""
    out = ["--out", str(tmp_path / "out")]
    for words, expected in (
        (["train", *out], "--spec"),
        (["train", "--spec", "{", *out], "expected JSON"),
        (["train", "--spec", "{}", "--input", "prepare=nowhere", *out], "a file that exists"),
    ):
        options = cli._parser().parse_args(words)
        with pytest.raises(UserError, match=expected):
            options.run(options)
    assert not (tmp_path / "out").exists()
