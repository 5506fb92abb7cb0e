"""`tlora new method`: what it writes works as it stands, and so does the README's example."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tlora import cli
from tlora.config import Library, read_yaml, typed
from tlora.errors import UserError
from tlora.scaffold import new_method

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "lora_orthogonal"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What the scaffold looks at."""
    for name in ("config/methods", "tlora/methods"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_method_of_its_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = new_method("mine", folder=project)
    assert written == [project / "config/methods/mine.yaml", project / "tlora/methods/mine.py"]
    method, _ = Library(project / "config").method("mine")
    assert method.implementation == "mine" and method.label == "mine"
    found = importlib.util.spec_from_file_location("mine", written[1])
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "mine", module)
    found.loader.exec_module(module)
    assert module.Options(**method.options) == module.Options(gain=1.0)
    with pytest.raises(ValueError, match=r"^gain: 0.0: expected a number above 0"):
        module.Options(gain=0.0)


def test_a_variant(project: Path) -> None:
    (written,) = new_method("mine", "tlora", project)
    library = Library(project / "config")
    method, _ = library.method("mine")
    parent, _ = library.method("tlora")
    assert (method.implementation, method.options) == (parent.implementation, parent.options)
    assert method.label == "mine" and method.extends is None
    # the parent's effective options stand in the comment, as YAML
    lines = [line[4:] for line in written.read_text().splitlines() if line.startswith("#   ")]
    options = yaml.safe_load("\n".join(lines))
    assert options["freeze_a"] is True and options["init"] == "wc"
    # an option moved from the comment to the file is that variant
    text = written.read_text().replace("options: {}", "options: {freeze_a: false}")
    written.write_text(text)
    document = read_yaml(written)
    from tlora.methods import tlora

    assert not typed(document, ("options",), tlora.Options, document.values["options"]).freeze_a


@pytest.mark.parametrize(
    ("name", "extends", "expected"),
    [
        ("lora", None, "lora.yaml is there already"),
        ("rslora", "lora", "rslora.yaml is there already"),
        ("__init__", None, "expected a name of lower-case letters"),
        ("My-Method", None, "expected a name of lower-case letters"),
        ("../evil", None, "expected a name of lower-case letters"),
        ("1st", None, "expected a name of lower-case letters"),
        ("", None, "expected a name of lower-case letters"),
        ("lambda", None, "no word of Python or YAML"),
        ("yes", None, "no word of Python or YAML"),
        ("null", None, "no word of Python or YAML"),
        ("base", None, "names a row of its own"),
        ("mine", "tlorra", "did you mean 'tlora'?"),
        ("mine", "tlora_scale", "extends another one itself"),
    ],
)
def test_bad_names(project: Path, name: str, extends: str | None, expected: str) -> None:
    before = sorted(project.rglob("*"))
    with pytest.raises(UserError) as caught:
        new_method(name, extends, project)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(project.rglob("*")) == before


def test_a_module_without_yaml_is_taken_too(project: Path) -> None:
    (project / "tlora/methods/taken.py").write_text("")
    with pytest.raises(UserError, match=r"taken\.py is there already"):
        new_method("taken", folder=project)


def test_on_the_command_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert cli.main(["new", "method", "mine"]) == 0
    assert "wrote config/methods/mine.yaml" in capsys.readouterr().out
    assert cli.main(["new", "method", "mine"]) == 1
    assert "is there already" in capsys.readouterr().err
    monkeypatch.chdir(project / "config")
    assert cli.main(["new", "method", "other"]) == 1
    assert "run it in the project's top level" in capsys.readouterr().err


def example() -> str:
    """Return the README's worked example: the code block that begins with its file's name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.escape(f"# tlora/methods/{EXAMPLE}.py")
    (found,) = re.findall(rf"^```python\n({first}\n.*?)^```$", text, re.M | re.S)
    return found


@pytest.mark.slow
def test_readme_example_and_scaffold_satisfy_the_contract(tmp_path: Path) -> None:
    """In a copy of the project: as scaffolded, as a variant, and edited to the README's example."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.partial")
    for name in ("config", "tlora", "tests", "workflow/resources"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy2(ROOT / name, checkout / name)
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tlora = ("-m", "tlora.cli")
    python(*tlora, "new", "method", "as_scaffolded")
    python(*tlora, "new", "method", "as_variant", "--extends", "as_scaffolded")
    python(*tlora, "new", "method", EXAMPLE)
    (checkout / f"tlora/methods/{EXAMPLE}.py").write_text(example(), encoding="utf-8")
    names = ["as_scaffolded", "as_variant", EXAMPLE]
    (checkout / "config/mine.yaml").write_text(
        f"models: [tiny]\ntasks: [arithmetic]\nmethods: [{', '.join(names)}]\nseeds: [1]\n"
    )
    assert "valid" in python(*tlora, "validate", "config/mine.yaml")
    counted = python(*tlora, "params", "tiny", "lora", *names, "--rank", "8")
    (trainable,) = [line for line in counted.splitlines() if line.startswith("Trainable")]
    assert trainable.split()[1:] == ["78,848"] * 4
    contract = ("-m", "pytest", "tests/contract/test_contract.py", "-q", "-p", "no:cacheprovider")
    passed = python(*contract, "-k", f"as_scaffolded or {EXAMPLE}")
    count = int(re.search(r"(\d+) passed", passed)[1])
    assert count >= 14 and "failed" not in passed and "skipped" not in passed, passed
