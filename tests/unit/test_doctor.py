"""The checks of a machine, under real conditions: closed ports, full disks, tools that fail."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tlora import cli, doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no server named in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def ask(*names: str, seconds: float = doctor.SECONDS) -> dict[str, doctor.Finding]:
    """Run some of the checks."""
    checks = {name: doctor.CHECKS[name] for name in names}
    return {finding.name: finding for finding in doctor.examine(checks, seconds)}


def lock(text: str) -> None:
    """Write the lock that packages are compared with."""
    Path("envs").mkdir()
    Path("envs/core.lock").write_text(f"# a comment\n{text}\n")


def tool(folder: Path, name: str, script: str) -> None:
    """Write a program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_this_machine_is_fit_and_every_check_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the tests run, what every run needs is there."""
    monkeypatch.chdir(ROOT)
    started = time.monotonic()
    assert cli.main(["doctor"]) == 0
    assert time.monotonic() - started < 30  # ten seconds on a machine that is not busy
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == list(doctor.CHECKS)
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "fail"}
    needed = [line for line in lines if line.split()[1] in doctor.NEEDED]
    assert not [line for line in needed if line.startswith("fail")]


def test_a_package_that_is_missing_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status says so, and the line what to do."""
    lock("no-such-package==1.0\npytest==0.1")
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    assert caught.value.code == 1
    assert "missing: no-such-package: make demo" in capsys.readouterr().out


def test_a_package_of_another_version_is_a_warning() -> None:
    """It may work."""
    lock("pytest==0.1")
    found = ask("packages")["packages"]
    assert found.state == "warn"
    assert re.search(r"pytest [0-9.]+, not 0\.1", found.text)


def test_a_local_version_is_the_pinned_one() -> None:
    """torch's builds are called 2.13.0+cpu or +cu130."""
    import torch

    lock(f"torch=={torch.__version__.partition('+')[0]}")
    assert ask("packages")["packages"].state == "ok"


@pytest.mark.parametrize("what", ["a file", "no folder to write to"])
def test_results_that_cannot_be_written(what: str) -> None:
    """Both hold for root, too."""
    if what == "a file":
        Path("results").write_text("")
    else:
        if not Path("/proc/self").is_dir():
            pytest.skip("no /proc")
        Path("results").symlink_to("/proc/self")
    found = ask("disk")["disk"]
    assert (found.state, found.needed) == ("fail", True)
    assert "results" in found.text


def test_a_disk_that_takes_no_byte() -> None:
    """The file can be made and not be filled, as on a full disk."""
    code = (
        "import resource, signal; from tlora import doctor\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "print(doctor.examine({'disk': doctor.CHECKS['disk']})[0].state)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fail"


def test_an_mlflow_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning: no run needs it. Credentials are not printed."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    uri = f"http://someone:hidden-word@127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = doctor.examine({"mlflow": doctor.CHECKS["mlflow"]})
    assert (found[0].state, found[0].needed) == ("warn", False)
    line = doctor.report(found)
    assert f"127.0.0.1:{port}" in line
    assert "someone" not in line and "hidden-word" not in line


def test_an_mlflow_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given three seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        started = time.monotonic()
        assert ask("mlflow")["mlflow"].state == "warn"
        assert time.monotonic() - started < 2 * doctor.ANSWER


def test_without_tools(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with nothing on it: warnings that say what the tools are for."""
    monkeypatch.setenv("PATH", str(here))
    found = ask("snakemake", "slurm", "apptainer", "torch")
    assert {found[name].state for name in ("snakemake", "slurm", "apptainer")} == {"warn"}
    assert all(finding.state != "fail" or finding.name == "torch" for finding in found.values())
    assert "sbatch" in found["slurm"].text
    assert "bin/activate" in found["snakemake"].advice


@pytest.mark.parametrize(
    ("script", "state", "said"),
    [
        (
            "echo 'sinfo: error: first' >&2; echo 'sinfo: fatal: no controller' >&2; exit 1",
            "warn",
            "",
        ),
        ("echo 'gpu*'; echo cpu", "ok", "cpu gpu"),
        ("true", "warn", "none"),
    ],
)
def test_slurm(
    here: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str, said: str
) -> None:
    """Tools that are there and reach no controller are no Slurm."""
    for name in ("squeue", "sbatch"):
        tool(here / "bin", name, "true")
    tool(here / "bin", "sinfo", script)
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")
    found = ask("slurm")["slurm"]
    assert found.state == state
    assert found.text == (f"partitions: {said}" if said else "sinfo: fatal: no controller")


def test_a_check_that_raises_or_hangs_is_a_line() -> None:
    """The others answer all the same."""
    release = threading.Event()

    def raises() -> tuple[str, str, str]:
        raise ValueError("a reason\nof two lines")

    def hangs() -> tuple[str, str, str]:
        release.wait(60)
        return "ok", "", ""

    checks = {"raises": raises, "hangs": hangs, "python": doctor.CHECKS["python"]}
    found = doctor.examine(checks, seconds=0.5)
    release.set()
    assert [finding.state for finding in found] == ["fail", "fail", "ok"]
    lines = doctor.report(found).splitlines()
    assert len(lines) == 3
    assert "ValueError: a reason of two lines" in lines[0]
    assert "no answer within 0.5 s" in lines[1]


class _Plan:
    """What the check asks of a plan."""

    def __init__(self, *items: dict) -> None:
        self.items = items

    def of(self, stage: str) -> list:
        assert stage == "download"

        class Unit:
            def __init__(self, item: dict) -> None:
                self.spec = {"items": [item]}

        return [Unit(item) for item in self.items]


COMMIT = "a" * 40
MODEL = {"kind": "model", "repo": "org/model", "revision": COMMIT}
DATA = {"kind": "dataset", "repo": "org/data", "name": None, "split": "train", "revision": COMMIT}


def test_what_a_preset_reads(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache or not; offline the lack of it is a failure."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def look(*items: dict) -> doctor.Finding:
        return doctor.examine({"preset": doctor.of_preset(lambda: _Plan(*items))})[0]

    assert look().state == "ok"
    folder = here / "hub" / "datasets--org--data" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}")
    assert look(DATA).state == "ok"
    found = look(DATA, MODEL)
    assert (found.state, found.needed) == ("warn", False)
    assert "1 of 2 not in the cache: org/model" in found.text
    assert "tlora download" in found.advice
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert look(DATA, MODEL).state == "fail"


def test_a_preset_that_is_refused_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Its one line stands beside the others."""
    Path("p.yaml").write_text("models: [x]\n")
    assert cli.main(["doctor", "p.yaml"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("fail  preset")
    assert "p.yaml" in last


# ---------------------------------------------------------------- the container


def _sections() -> dict[str, str]:
    text = (ROOT / "envs" / "tlora.def").read_text()
    parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return {"head": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_the_container_installs_the_locks_torch_first() -> None:
    """As the Makefile does: torch with its dependencies, then every lock without."""
    sections = _sections()
    commands = [line.strip() for line in sections["post"].splitlines()]
    installs = [line for line in commands if line.startswith("python -m pip install")]
    environments = runpy.run_path(str(ROOT / "envs" / "render.py"))
    assert installs[0].endswith(f"pip=={environments['PIP']}")
    assert installs[1].endswith("--constraint envs/core.lock torch")
    assert f"python:{environments['PYTHON']}-" in sections["head"]
    locks = [line.split()[-1] for line in installs if "--requirement" in line]
    assert locks[0] == "envs/core.lock"
    wanted = {f"envs/{name}.lock" for name in environments["LOCKS"]["train"]}
    assert wanted | {"envs/code.lock"} == set(locks)
    assert all("--no-deps" in line for line in installs[2:])
    assert "python -m pip check" in commands[commands.index(installs[-1]) :]


def test_the_container_copies_what_it_installs() -> None:
    """Every file is of the project, and none of the named ones is left out."""
    copied = [line.split() for line in _sections()["files"].splitlines() if line.strip()]
    for source, target in copied:
        assert (ROOT / source).exists()
        assert target == f"/opt/tlora/{source}"
    named = set(re.findall(r"envs/\w+\.lock", _sections()["post"]))
    assert named <= {source for source, _ in copied}


def test_the_locks_of_the_container_agree() -> None:
    """One package in two of them would be installed twice, the second time over the first."""
    seen: dict[str, str] = {}
    for lock_file in sorted(set(re.findall(r"envs/\w+\.lock", _sections()["post"]))):
        for line in (ROOT / lock_file).read_text().splitlines():
            if line and not line.startswith("#"):
                name, _, version = line.partition("==")
                assert seen.setdefault(name, version) == version, f"{lock_file}: {name}"
