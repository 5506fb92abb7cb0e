"""`snakemake --cores all --profile slurm` on a real cluster, undisturbed and disturbed.

Every disturbance comes in the middle of a training. Afterwards the same command, given again where
the first one failed, ends with all results: scores and weights byte for byte those of the run that
nothing disturbed, every checksum right, and each run once in MLflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.runs import PATIENCE, Run
from cluster.slurm import wait

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]


def test_grid_runs_through_the_profile(undisturbed: Run) -> None:
    """All jobs run where the profile says and leave their logs; a second call finds nothing."""
    undisturbed.check(undisturbed)
    undisturbed.check_mlflow()
    jobs = undisturbed.cluster.jobs(undisturbed.project.folder)
    assert set(jobs.values()) == {"COMPLETED"}
    assert len(jobs) == 19, "all but grid and all"
    show = undisturbed.cluster.run
    for rule, partition, gpus in (("train", "gpu", 1), ("score", "cpu", 0)):
        for job in undisturbed.jobs(rule):
            text = show("scontrol", "show", "job", job)
            assert f"Partition={partition}" in text
            assert ("gres/gpu=1" in text) == bool(gpus)
            assert "Requeue=1" in text
    logs = undisturbed.project.path("logs/slurm")
    assert len(list(logs.glob("rule_train/*/*.log"))) == 2
    assert [undisturbed.card(name)["attempts"] for name in ("lora", "tlora")] == [1, 1]


def test_job_killed_by_scancel(undisturbed: Run, disturbed: Run) -> None:
    """It makes a checkpoint; snakemake submits it again, with more memory, and it goes on there."""
    snakemake = disturbed.start()
    job, process = disturbed.training()
    disturbed.cluster.run("scancel", job)
    disturbed.ended(job)
    assert not process.is_running()
    output = disturbed.finish(snakemake)
    assert "Trying to restart job" in output
    assert disturbed.card()["attempts"] == 2
    first, second = sorted(disturbed.jobs("train"), key=int)
    memory = [disturbed.cluster.run("scontrol", "show", "job", one) for one in (first, second)]
    assert "mem=62.5" in memory[0] or "mem=64000M" in memory[0], memory[0]
    assert "mem=125G" in memory[1] or "mem=128000M" in memory[1], memory[1]
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_job_that_ran_out_of_time(undisturbed: Run, disturbed: Run) -> None:
    """A training that hangs is ended by its time limit."""
    snakemake = disturbed.start()
    job, process = disturbed.training()
    disturbed.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait(lambda: disturbed.jobs("train")[job] == "TIMEOUT", 300, "time limit")
    assert not process.is_running()
    disturbed.finish(snakemake)
    assert disturbed.card()["attempts"] == 2
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_job_requeued_in_the_middle(undisturbed: Run, disturbed: Run) -> None:
    """Slurm starts it again under the same number; snakemake waits for it."""
    snakemake = disturbed.start()
    job, process = disturbed.training()
    disturbed.cluster.run("scontrol", "requeue", job)
    process.wait(60)
    disturbed.finish(snakemake)
    assert disturbed.jobs("train") == {job: "COMPLETED"}
    assert disturbed.card()["attempts"] == 2
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_node_that_crashes(undisturbed: Run, disturbed: Run) -> None:
    """Without warning: no checkpoint on the way out. The job goes on on another node."""
    snakemake = disturbed.start()
    job, process = disturbed.training()
    node = disturbed.cluster.node_of(job)
    disturbed.cluster.crash(node)
    assert not process.is_running()
    disturbed.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")
    try:
        disturbed.finish(snakemake)
    finally:
        disturbed.cluster.start(node)
    assert disturbed.jobs("train") == {job: "COMPLETED"}
    assert disturbed.card()["attempts"] == 2
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_preemption_by_requeue(undisturbed: Run, disturbed: Run) -> None:
    """A job of a partition that goes before takes the node."""
    snakemake = disturbed.start()
    job, process = disturbed.training()
    node = disturbed.cluster.node_of(job)
    urgent = ["--partition=urgent", f"--nodelist={node}", "--gpus=1", "--output=/dev/null"]
    disturbed.cluster.run("sbatch", *urgent, "--wrap=sleep 1")
    process.wait(60)
    disturbed.finish(snakemake)
    assert disturbed.jobs("train") == {job: "COMPLETED"}
    assert disturbed.card()["attempts"] == 2
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_killed_snakemake_leaves_no_second_writer(undisturbed: Run, disturbed: Run) -> None:
    """Its job lives on; the same command again submits another, which waits and does nothing."""
    snakemake = disturbed.start()
    job, process = disturbed.training()
    snakemake.process.kill()
    snakemake.process.wait()
    again = disturbed.start()
    wait(lambda: len(disturbed.jobs("train")) == 2, PATIENCE, "second job")
    (second,) = set(disturbed.jobs("train")) - {job}
    (log,) = disturbed.project.path("logs/slurm/rule_train").glob(f"*/{second}.log")
    wait(lambda: log.is_file() and "waiting for" in log.read_text(), PATIENCE, "waiting job")
    process.resume()
    disturbed.finish(again)
    assert set(disturbed.jobs("train").values()) == {"COMPLETED"}
    assert "another job made it meanwhile" in log.read_text()
    assert disturbed.card()["attempts"] == 1, "trained a second time"
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_two_snakemakes_at_work(undisturbed: Run, disturbed: Run) -> None:
    """Both submit every job; each artefact is made once."""
    pair = [disturbed.start(), disturbed.start()]
    for snakemake in pair:
        disturbed.finish(snakemake)
    assert disturbed.card()["attempts"] == 1
    logs = disturbed.project.path("logs/slurm")
    for rule in ("train", "export", "check", "generate", "score"):
        texts = [path.read_text() for path in logs.glob(f"rule_{rule}/*/*.log")]
        made = [text for text in texts if "another job made it meanwhile" not in text]
        assert len(made) == 1, f"{rule}: made {len(made)} times by {len(texts)} jobs"
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_full_disk_in_the_middle_of_a_checkpoint(undisturbed: Run, disturbed: Run) -> None:
    """The run fails and says why; with space again it goes on from the checkpoint before."""
    disturbed.project.edit("workflow/profiles/slurm/config.yaml", "retries: 3", "retries: 0")
    results = disturbed.results
    kept = results.rename(results.with_name("kept"))
    results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(results)]
    if done := subprocess.run(mount, capture_output=True, text=True).stderr:
        pytest.skip(f"cannot mount a small file system: {done.strip()}")
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", str(results)], check=True)
        snakemake = disturbed.start()
        _, process = disturbed.training()
        _fill(results)
        process.resume()
        disturbed.finish(snakemake, status=1)
        (log,) = disturbed.project.path("logs/results/train/tiny/arithmetic/lora").glob("*.log")
        assert "No space left on device" in log.read_text()
        assert not list(results.glob("train/tiny/arithmetic/lora/*/train.json"))
        (results / "filler").unlink()
        disturbed.snakemake()
        assert disturbed.card()["attempts"] == 2
        disturbed.check(undisturbed)
        disturbed.check_mlflow()
    finally:
        disturbed.end()
        subprocess.run(["umount", "--lazy", str(results)], check=True)


def _fill(folder: Path) -> None:
    """Write until nothing fits any more, not even a small file."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    with open(folder / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1))


def test_mlflow_server_killed_in_the_middle(undisturbed: Run, disturbed: Run) -> None:
    """Training does not notice; the same command again tells the server what it missed."""
    port = _free_port()
    disturbed.project.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
    database = disturbed.project.path("server.db")
    with _mlflow(disturbed.project.folder, port):
        snakemake = disturbed.start()
        _, process = disturbed.training()
        process.resume()
    disturbed.finish(snakemake)
    tracked = disturbed.one("comparison/config/tracked.json")
    assert not json.loads(tracked.read_text())["reachable"]
    with _mlflow(disturbed.project.folder, port):
        output = disturbed.snakemake()
    assert "1 of 1 steps" in output or "2 of 2 steps" in output
    assert disturbed.card()["attempts"] == 1
    disturbed.check(undisturbed)
    disturbed.check_mlflow(database)


@contextlib.contextmanager
def _mlflow(folder: Path, port: int) -> Iterator[None]:
    """Run a server whose store outlives it; kill it at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "server")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "a") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait(lambda: _answers(f"http://127.0.0.1:{port}/health"), 300, "MLflow server", 0.5)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
