"""Training that is killed goes on where it was; another run's partial state is never used."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from workflow.project import Job, Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

# Checkpoints of the small preset: ten steps, one after every second step.
EVERY = 2
PATIENCE = 300


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the finished project, in which these tests train into folders of their own."""
    folder = tmp_path_factory.mktemp("resume")
    yield finished.copy(folder / "checkout")
    shutil.rmtree(folder, ignore_errors=True)


def command(project: Project, job: Job, name: str, **changes: Any) -> list[str]:
    """Return the job's own command with another folder to work in, and with a changed spec."""
    words = job.arguments
    spec = {**json.loads(words[words.index("--spec") + 1]), **changes}
    place = json.loads(words[words.index("--place") + 1])
    place["work"] = f"{name}/work"
    for option, value in {
        "--spec": json.dumps(spec),
        "--place": json.dumps(place),
        "--out": f"{name}/out",
        "--log": f"{name}/train.log",
    }.items():
        words[words.index(option) + 1] = value
    return [str(project.tools / "tlora"), *words]


def card(folder: Path) -> dict[str, Any]:
    """Read a run's train.json."""
    return json.loads((folder / "train.json").read_text(encoding="utf-8"))


def uninterrupted(finished: Project, job: Job) -> dict[str, Any]:
    """Return train.json of the run that nothing disturbed."""
    return card(finished.folder / job.arguments[job.arguments.index("--out") + 1])


def wait_for_checkpoint(process: subprocess.Popen[str], work: Path, step: int) -> None:
    """Return as soon as the checkpoint of a step is whole."""
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE:
        if (work / f"checkpoint-{step}" / "manifest.json").is_file():
            return
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}:\n{process.communicate()[0]}")
        time.sleep(0.002)
    pytest.fail(f"no checkpoint of step {step} within {PATIENCE} s")


def killed(project: Project, job: Job, name: str, step: int) -> None:
    """Start a run and kill it with SIGKILL right after the checkpoint of a step."""
    for _ in range(3):
        process = project.start(command(project, job, name))
        wait_for_checkpoint(process, project.path(f"{name}/work"), step)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            out = project.path(f"{name}/out")
            assert not list(out.glob("[!.]*")), "a killed run left something at its place"
            return
        # The machine was busy and the run was faster than the signal.
        shutil.rmtree(project.path(name))
    pytest.fail("the run could not be killed in time")


def lasting(project: Project) -> dict[str, Any]:
    """Return the state of all files but those that a killed job leaves for its next attempt."""
    return {name: one for name, one in project.state().items() if "/.work/" not in name}


def newest(work: Path) -> Path:
    """Return the newest whole checkpoint."""
    whole = [path.parent for path in work.glob("checkpoint-*/manifest.json")]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]))


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "tlora"])
def test_killed_run_ends_with_the_same_weights(
    finished: Project, project: Project, jobs: dict[str, Job], method: str
) -> None:
    """Bitwise the weights of a run that nothing disturbed, from a checkpoint really used."""
    job = jobs[f"train tiny/arithmetic/{method}"]
    expected = uninterrupted(finished, job)
    killed(project, job, method, step=EVERY)
    work = project.path(f"{method}/work")
    step = int(newest(work).name.partition("-")[2])
    before = (work / "log.jsonl").read_text().splitlines()[:step]

    project.run(command(project, job, method))

    out = project.path(f"{method}/out")
    found = card(out)
    assert found["files"] == expected["files"]
    assert found["attempts"] == 2
    assert found["final_loss"] == expected["final_loss"]
    assert found["trainable_parameters"] == expected["trainable_parameters"]
    after = (out / "log.jsonl").read_text().splitlines()
    assert after[:step] == before, "the steps before the checkpoint were done again"
    assert [json.loads(line)["step"] for line in after] == list(range(1, 11))
    assert found["train_seconds"] >= json.loads(before[-1])["seconds"], "the first attempt is free"
    assert not work.exists(), "success did not delete the partial state"


def test_torn_checkpoint_falls_back_to_the_one_before(
    finished: Project, project: Project, jobs: dict[str, Job]
) -> None:
    """A checkpoint that a kill left half written is passed over."""
    job = jobs["train tiny/arithmetic/lora"]
    killed(project, job, "torn", step=2 * EVERY)
    work = project.path("torn/work")
    torn = newest(work)
    (torn / "trainer_state.json").unlink()
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    shutil.copytree(work, project.path("torn/whole"), ignore=shutil.ignore_patterns(torn.name))
    step = int(newest(project.path("torn/whole")).name.partition("-")[2])
    before = (work / "log.jsonl").read_text().splitlines()[:step]

    project.run(command(project, job, "torn"))

    out = project.path("torn/out")
    assert card(out)["files"] == uninterrupted(finished, job)["files"]
    assert (out / "log.jsonl").read_text().splitlines()[:step] == before


def test_another_learning_rate_starts_afresh(
    finished: Project, project: Project, jobs: dict[str, Job]
) -> None:
    """After completion, and over another run's checkpoints, the new rate trains from step 1."""
    job = jobs["train tiny/arithmetic/lora"]
    killed(project, job, "stale", step=EVERY)
    assert newest(project.path("stale/work")).is_dir()
    commands = {
        name: command(project, job, name, learning_rate=1.0e-4) for name in ("stale", "clean")
    }
    running = {name: project.start(words) for name, words in commands.items()}
    for process in running.values():
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output

    stale, clean = card(project.path("stale/out")), card(project.path("clean/out"))
    assert stale["attempts"] == clean["attempts"] == 1
    assert stale["files"] == clean["files"]
    old = uninterrupted(finished, job)["files"]
    assert clean["files"]["adapter_model.safetensors"] != old["adapter_model.safetensors"]


def test_snakemake_goes_on_after_a_kill(
    finished: Project, checkout: Project, jobs: dict[str, Job]
) -> None:
    """The same command again finishes the run; in between nothing half made is at its place."""
    job = jobs["train tiny/arithmetic/tlora"]
    out = checkout.folder / job.arguments[job.arguments.index("--out") + 1]
    shutil.rmtree(out)
    target = str(out.relative_to(checkout.folder) / "train.json")
    others = lasting(checkout)
    work = checkout.path("results/.work/train") / job.id
    for _ in range(3):
        snakemake = checkout.start(checkout.snakemake_command(target))
        wait_for_checkpoint(snakemake, work, EVERY)
        for process in psutil.Process(snakemake.pid).children(recursive=True):
            if str(checkout.tools / "command.py") in " ".join(process.cmdline()):
                process.kill()
        output, _ = snakemake.communicate(timeout=PATIENCE)
        if snakemake.returncode:
            break
        shutil.rmtree(out)
    assert snakemake.returncode == 1, output
    assert not list(out.glob("[!.]*")) if out.exists() else True
    assert newest(work).is_dir()
    assert lasting(checkout) == others

    checkout.snakemake(target)

    assert card(out)["attempts"] == 2
    assert card(out)["files"] == uninterrupted(finished, job)["files"]
    assert not work.exists()
