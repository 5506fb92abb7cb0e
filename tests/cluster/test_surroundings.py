"""What fails outside Slurm in the middle of a training: the disk and the MLflow server."""

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
    assert "track in MLflow" in output and "train tiny" not in output
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
