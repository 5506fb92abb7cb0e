"""Locks, environments, Makefile, wheel, and what importing the package may load."""

from __future__ import annotations

import email
import importlib.metadata
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = ("core", "dev", "train", "code", "lm_eval", "vllm")
ON_TOP = {"dev": "core", "train": "core", "code": "core", "lm_eval": "core"}
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "mlflow", "snakemake")
STAGES = {
    "download",
    "prepare",
    "overlap",
    "calibrate",
    "allocate",
    "initialize",
    "train",
    "export",
} | {
    "check",
    "generate",
    "score",
    "choose",
    "compare",
    "index",
    "track",
}
PURE = ("config", "spec", "allocation", "code", "artefact", "errors", "progress", "cli")
INTERPRETER = shlex.quote(sys.executable)
PURE_FOLDERS = ("methods", "tasks", "benchmarks", "comparison", "stages")


def pins(root: Path, lock: str) -> dict[str, str]:
    lines = (root / "envs" / f"{lock}.lock").read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in found if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][^+;\s]*", line)]
    assert not wrong, f"not name==version, or a local version: {wrong}"
    names = [canonicalize_name(line.split("==")[0]) for line in found]
    assert len(names) == len(set(names)), "a package stands twice"
    return dict(zip(names, (line.split("==")[1] for line in found), strict=True))


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_every_package_without_local_version(root: Path, lock: str) -> None:
    assert pins(root, lock)


def test_lock_names_what_the_platform_was_tried_with(root: Path) -> None:
    core = pins(root, "core")
    assert core["torch"] == "2.13.0"
    assert core["transformers"] == "5.23.0"
    assert core["peft"] == "0.21.2"
    assert core["snakemake"] == "9.27.1"
    assert not {"evalplus", "deepspeed", "vllm", "anthropic", "lm-eval"} & core.keys()
    assert not [name for name in core if name.startswith(("google-gen", "nvidia-"))]


@pytest.mark.parametrize(("lock", "below"), ON_TOP.items())
def test_locks_on_top_repeat_nothing(root: Path, lock: str, below: str) -> None:
    assert not pins(root, lock).keys() & pins(root, below).keys()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("lock", ["core", "dev", "code", "lm_eval"])
def test_lock_is_closed(root: Path, lock: str, python: str) -> None:
    """Every requirement of a locked package is locked, in a version that satisfies it."""
    locked = pins(root, "core") | pins(root, lock)
    lacking = []
    for name in locked:
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            # torch's CUDA builds pin their own libraries, which are not listed
            if name == "torch" and needed.name.startswith(("nvidia", "cuda", "triton")):
                continue
            place = {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}
            if needed.marker is not None and not needed.marker.evaluate(place):
                continue
            version = locked.get(canonicalize_name(needed.name))
            if version is None or not needed.specifier.contains(version, prereleases=True):
                lacking.append(f"{name} needs {text}, locked: {version}")
    assert not lacking


def test_installed_versions_are_the_locked_ones(root: Path) -> None:
    ours = Path(sys.prefix).resolve() == (root / ".venv").resolve()
    if not ours or not (root / ".venv/.dev-stamp").exists():
        pytest.skip("not the environment that make installs")
    locked = pins(root, "core") | pins(root, "dev") | pins(root, "code") | pins(root, "lm_eval")
    different = {
        name: (importlib.metadata.version(name), version)
        for name, version in locked.items()
        if importlib.metadata.version(name).split("+")[0] != version
    }
    assert not different


def test_extras_are_pinned_as_locked(root: Path) -> None:
    locked = {
        "workflow": pins(root, "core"),
        "dev": pins(root, "dev"),
        "deepspeed": pins(root, "train"),
        "code": pins(root, "code"),
        "judge": pins(root, "code"),
        "lm_eval": pins(root, "lm_eval"),
        "vllm": pins(root, "vllm"),
    }
    extras = project(root)["project"]["optional-dependencies"]
    assert extras.keys() == locked.keys()
    for extra, requirements in extras.items():
        for text in requirements:
            name, version = text.split("==")
            assert locked[extra][canonicalize_name(name)] == version, text


@pytest.mark.parametrize("lock", ["core", "vllm"])
def test_locks_satisfy_the_package_itself(root: Path, lock: str) -> None:
    locked = pins(root, lock)
    for text in project(root)["project"]["dependencies"]:
        needed = Requirement(text)
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)]), text


def test_conda_environments_are_rendered_from_the_locks(root: Path) -> None:
    script = runpy.run_path(str(root / "envs/render.py"))
    for env, locks in script["LOCKS"].items():
        text = (root / "envs" / f"{env}.yaml").read_text()
        assert text == script["render"](env), f"envs/{env}.yaml: run `make envs`"
        *conda, pip = yaml.safe_load(text)["dependencies"]
        assert all(re.fullmatch(r"\w+=[0-9.]+", line) for line in conda)
        expected = {name: version for lock in locks for name, version in pins(root, lock).items()}
        found = dict(line.split("==") for line in pip["pip"])
        assert {canonicalize_name(name): found[name] for name in found} == expected
        assert os.access(root / "envs" / f"{env}.post-deploy.sh", os.X_OK)


def test_post_deploy_refuses_a_folder_without_the_project(root: Path, tmp_path: Path) -> None:
    script = root / "envs/core.post-deploy.sh"
    done = subprocess.run([script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no checkout" in done.stderr


def test_links_and_profiles(root: Path) -> None:
    assert os.readlink(root / "slurm") == "workflow/profiles/slurm"
    assert os.readlink(root / "profiles") == "workflow/profiles"
    default = yaml.safe_load((root / "profiles/default/config.yaml").read_text())
    slurm = yaml.safe_load((root / "slurm/config.yaml").read_text())
    shared = {key for key in default.keys() & slurm.keys() if not key.startswith("__")}
    assert not shared, "profiles/default would replace these keys"
    assert {"executor", "jobs", "slurm-status-command"} <= slurm.keys()
    text = (root / "slurm/config.yaml").read_text()
    assert "default-resources" in slurm and "set-resources" in slurm
    assert not re.search(r"^ +gpus:", text, re.M)


def test_catalog_files(root: Path) -> None:
    usage = yaml.safe_load((root / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["software-stack-deployment"]["conda"] is True
    assert (root / "workflow/Snakefile").is_file()
    assert (root / "config/README.md").is_file()


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def bare(root: Path, tmp_path: Path) -> Path:
    """A folder, its name with a space, that holds what `make` reads."""
    folder = tmp_path / "with space"
    (folder / "envs").mkdir(parents=True)
    locks = [f"envs/{lock}.lock" for lock in ("core", "dev", "code")]
    for name in ("Makefile", "pyproject.toml", *locks):
        (folder / name).write_bytes((root / name).read_bytes())
    return folder


def test_make_lists_its_targets(bare: Path) -> None:
    listed = {line.split()[1] for line in make(bare).stdout.splitlines()}
    assert {"help", "demo", "test", "test-fast", "lint", "clean", "clean-results"} <= listed


def shim(folder: Path, answer: str) -> Path:
    """A stand-in for python3 that gives one answer."""
    path = folder / "python-shim"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


def test_make_names_a_missing_interpreter(bare: Path) -> None:
    done = make(bare, "demo", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "no-such-python: not found; Python 3.11 or newer is needed" in done.stderr


def test_make_names_an_old_interpreter(bare: Path) -> None:
    patch = "import sys; code = sys.argv[1]; sys.version_info = (3, 9, 2); exec(code)"
    old = shim(bare.parent, f"exec {INTERPRETER} -c '{patch}' \"$2\"")
    done = make(bare, "demo", f"PYTHON={old}")
    assert done.returncode != 0
    assert "is Python 3.9; 3.11 or newer is needed" in done.stderr


def test_make_names_a_missing_venv_package(bare: Path) -> None:
    answer = f'case "$2" in *ensurepip*) exit 1;; *) exec {INTERPRETER} "$@";; esac'
    done = make(bare, "demo", f"PYTHON={shim(bare.parent, answer)}")
    assert done.returncode != 0
    assert "python3-venv is missing" in done.stderr
    assert not (bare / ".venv").exists()


def finished(folder: Path, written: str) -> Path:
    """A .venv that passes for a finished one."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    stamp = folder / ".venv/.core-stamp"
    stamp.write_text(f"{written}\n")
    return stamp


def test_make_keeps_a_finished_environment(bare: Path) -> None:
    finished(bare, str(bare))
    assert "up to date" in make(bare, ".venv/.core-stamp").stdout


def test_make_renews_after_the_lock(bare: Path) -> None:
    stamp = finished(bare, str(bare))
    later = stamp.stat().st_mtime + 10
    os.utime(bare / "envs/core.lock", (later, later))
    assert "envs/core.lock" in make(bare, "-n", ".venv/.core-stamp").stdout


@pytest.mark.slow
@pytest.mark.parametrize("state", ["no stamp", "moved", "no interpreter"])
def test_make_starts_anew_where_the_environment_is_broken(bare: Path, state: str) -> None:
    stamp = finished(bare, "/another/folder" if state == "moved" else str(bare))
    (bare / ".venv/left-over").touch()
    if state == "no stamp":
        stamp.unlink()
    if state == "no interpreter":
        (bare / ".venv/bin/python").unlink()
        (bare / ".venv/bin/python").symlink_to("/no/such/python")
    # the new environment is made, and then nothing can be installed
    done = make(
        bare,
        ".venv/.core-stamp",
        f"PYTHON={sys.executable}",
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
    )
    assert done.returncode != 0
    assert "making .venv" in done.stdout
    assert not (bare / ".venv/left-over").exists()
    assert not stamp.exists()


def test_clean_keeps_results_and_clean_results_asks(bare: Path) -> None:
    (bare / "results").mkdir()
    (bare / ".venv").mkdir()
    make(bare, "clean")
    assert not (bare / ".venv").exists()
    assert make(bare, "clean-results").returncode != 0
    assert (bare / "results").exists()
    assert make(bare, "clean-results", "YES=1").returncode == 0
    assert not (bare / "results").exists()


def loaded_by(module: str) -> set[str]:
    """Return which of the heavy packages a fresh interpreter holds after importing `module`."""
    code = f"import {module}, sys; print(*sys.modules.keys() & {set(HEAVY)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def light_modules() -> list[str]:
    package = Path(__file__).resolve().parents[2] / "tlora"
    names = [f"tlora.{name}" for name in PURE if (package / f"{name}.py").exists()]
    for folder in PURE_FOLDERS:
        names += [
            f"tlora.{folder}.{path.stem}".removesuffix(".__init__")
            for path in sorted((package / folder).glob("*.py"))
        ]
    return ["tlora", *names]


def test_importing_the_light_modules_loads_nothing_heavy() -> None:
    """All in one interpreter; only a failure is looked into module by module."""
    modules = light_modules()
    if loaded_by(", ".join(modules)):
        guilty = {module: found for module in modules if (found := loaded_by(module))}
        assert not guilty


@pytest.mark.slow
def test_wheel_holds_the_package_and_no_workflow_dependency(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    listed = ["pyproject.toml", "LICENSE", "README.md", "tlora"]
    present = [name for name in listed if (root / name).exists()]
    subprocess.run(["cp", "-r", *(str(root / name) for name in present), source], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("tlora-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
        (entries,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "tlora = tlora.cli:program" in archive.read(entries).decode()
    modules = {path.relative_to(root).as_posix() for path in (root / "tlora").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0] for name in names} == {"tlora", metadata.split("/")[0]}
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    plain = {
        Requirement(text).name for text in fields.get_all("Requires-Dist") if "extra" not in text
    }
    assert {"torch", "transformers", "peft"} <= plain
    assert not plain & {"snakemake", "mlflow", "pandas", "datasets"}
