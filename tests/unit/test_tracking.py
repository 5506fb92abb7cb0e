"""Tracking: a real sqlite store, a real MLflow server, and servers that are dead or deaf."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.grid_tree import make_grid

from tlora import tracking
from tlora.stages.compare import compare
from tlora.stages.track import track


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no tracking settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database file of an initialised store without runs."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking.initialise(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(here: Path, empty_store: Path) -> str:
    """The URI of an empty sqlite store below results/ of the working directory.

    Absolute, because MLflow keeps one connection a URI in a process.
    """
    Path("results").mkdir()
    shutil.copy(empty_store, "results/mlflow.db")
    return f"sqlite:///{here}/results/mlflow.db"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_server(folder: Path, port: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--backend-store-uri", "sqlite:///server.db"]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
            return process
        except OSError:
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
    stop_server(process)
    raise AssertionError((folder / "server.log").read_text())


def stop_server(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_track(grid: Path, uri: str) -> dict[str, Any]:
    track({}, {"grid": grid}, grid.parent, {"tracking_uri": uri})
    return json.loads((grid.parent / "tracked.json").read_text())


def client_of(uri: str):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def all_runs(uri: str, kind: str = "cell") -> list[Any]:
    client = client_of(uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return client.search_runs(experiments, filter_string=f"tags.`tlora.kind` = '{kind}'")


def first_train(grid: Path) -> Path:
    cells = json.loads(grid.read_text())["cells"]
    return Path(next(cell["train"] for cell in cells if cell["train"]))


# ---------------------------------------------------------------- sqlite


@pytest.mark.slow
def test_one_run_a_cell_and_doing_it_again_changes_nothing(store: str) -> None:
    grid = make_grid(Path("results"), steps=12)
    compare({}, {"grid": grid}, grid.parent, {})
    first = run_track(grid, store)
    assert first["reachable"] and (first["created"], first["kept"]) == (19, 0)
    runs = all_runs(store)
    assert len(runs) == 18
    again = run_track(grid, store)
    assert (again["created"], again["kept"], again["deleted"]) == (0, 19, 0)
    assert {r.info.run_id for r in all_runs(store)} == {r.info.run_id for r in runs}
    assert list(Path("results/mlartifacts").rglob("train.json"))

    client = client_of(store)
    (run,) = [r for r in runs if r.data.tags["mlflow.runName"] == "tlora seed 2"][:1]
    task = run.data.tags["tlora.task"]
    assert run.info.status == "FINISHED"
    assert run.data.params["rank"] == "16" and run.data.params["method.name"] == "tlora"
    assert run.data.metrics["cost/initialization_seconds"] == 13.75
    assert 0 < run.data.metrics[f"{task}_test/accuracy"] < 1
    assert "tlora.data_sha256.train.parquet" in run.data.tags
    assert run.data.tags["tlora.preset.demo"] == "true"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 13))
    times = [point.timestamp for point in sorted(history, key=lambda point: point.step)]
    assert times[1] - times[0] == 500  # step times are those of the log
    names = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert names == {"train.json", "allocation.json", f"{task}_test"}
    (tables,) = all_runs(store, "comparison")
    listed = {entry.path for entry in client.list_artifacts(tables.info.run_id)}
    assert {"table.csv", "table.html", "ledger.csv"} <= listed


def plant_metric(client: Any, run: Any) -> None:
    client.log_metric(run.info.run_id, "train/loss", 99.0, step=10_000)


def plant_early_point(client: Any, run: Any) -> None:
    client.log_metric(run.info.run_id, "train/loss", 99.0, step=-1)


def plant_parameter(client: Any, run: Any) -> None:
    client.log_param(run.info.run_id, "planted", "1")


def plant_tag(client: Any, run: Any) -> None:
    client.set_tag(run.info.run_id, "tlora.base", "planted")


def plant_status(client: Any, run: Any) -> None:
    client.set_terminated(run.info.run_id, "KILLED")


def plant_artifact(client: Any, run: Any) -> None:
    client.log_text(run.info.run_id, "{}", "train.json")


def test_a_run_that_disagrees_is_replaced(store: str) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("tlora",), seeds=(1,), steps=5)
    run_track(grid, store)
    client = client_of(store)
    plants = [plant_metric, plant_early_point, plant_parameter, plant_tag, plant_status]
    for plant in [*plants, plant_artifact]:
        before = [r for r in all_runs(store) if r.data.tags["tlora.method"] == "tlora"]
        plant(client, before[0])
        counts = run_track(grid, store)
        assert (counts["created"], counts["kept"], counts["deleted"]) == (1, 1, 1), plant.__name__
        after = [r for r in all_runs(store) if r.data.tags["tlora.method"] == "tlora"]
        assert len(after) == 1 and after[0].info.run_id != before[0].info.run_id
        assert client.get_run(before[0].info.run_id).info.lifecycle_stage == "deleted"
        assert "planted" not in after[0].data.params


def test_a_doubled_run_is_deleted_and_other_runs_stay(store: str) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",), seeds=(1,), steps=3)
    run_track(grid, store)
    client = client_of(store)
    good = next(r for r in all_runs(store) if r.data.tags["tlora.method"] == "lora")
    own = {key: value for key, value in good.data.tags.items() if key.startswith("tlora.")}
    double = client.create_run(good.info.experiment_id, tags=own)
    earlier = client.create_run(good.info.experiment_id, tags={**own, "tlora.spec_id": "old"})
    counts = run_track(grid, store)
    assert (counts["created"], counts["kept"], counts["deleted"]) == (0, 2, 1)
    assert client.get_run(double.info.run_id).info.lifecycle_stage == "deleted"
    kept = client.get_run(earlier.info.run_id)
    assert kept.info.lifecycle_stage == "active"
    assert "tlora.preset.demo" not in kept.data.tags


def test_changed_files_replace_their_run_only(store: str) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "pissa"), steps=3)
    run_track(grid, store)
    path = first_train(grid)
    path.write_text(json.dumps({**json.loads(path.read_text()), "train_seconds": 1.0}))
    counts = run_track(grid, store)
    assert (counts["created"], counts["kept"], counts["deleted"]) == (1, 4, 1)


def test_failed_cells_and_a_second_preset(store: str) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",), steps=3)
    content = json.loads(grid.read_text())
    content["cells"][1]["failed"] = "out of memory"
    grid.write_text(json.dumps(content))
    run_track(grid, store)
    (failed,) = [run for run in all_runs(store) if run.info.status == "FAILED"]
    assert failed.data.tags["tlora.failed.run"] == "out of memory"
    other = Path("results/comparison/other/grid.json")
    other.parent.mkdir()
    other.write_text(json.dumps({**content, "preset": "other", "cells": content["cells"][:2]}))
    counts = run_track(other, store)
    assert (counts["created"], counts["kept"]) == (0, 2)
    marks = [
        set(run.data.tags) & {"tlora.preset.demo", "tlora.preset.other"} for run in all_runs(store)
    ]
    assert sorted(map(len, marks)) == [1, 2, 2]


def test_the_default_store_and_the_environment(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri({}) == "sqlite:///results/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    assert tracking.tracking_uri({}) == "http://env:1"
    assert tracking.tracking_uri({"tracking_uri": "http://place:1"}) == "http://place:1"


@pytest.mark.slow
def test_parallel_initialisation(here: Path) -> None:
    uri = f"sqlite:///{here}/results/mlflow.db"
    code = f"from tlora.tracking import initialise; initialise({uri!r})"
    command = [sys.executable, "-c", code]
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [job.communicate(timeout=300)[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    assert all_runs(uri) == []


def test_outdated(here: Path) -> None:
    store = tracking.DEFAULT_URI
    tracked = Path("tracked.json")
    assert not tracking.outdated(tracked, store)
    tracked.write_text('{"reachable": false, "uri": "http://host"}')
    assert tracking.outdated(tracked, "http://host")
    tracked.write_text('{"reachable": true, "uri": "http://host"}')
    assert not tracking.outdated(tracked, "http://user:pw@host")
    assert tracking.outdated(tracked, "http://other")
    tracked.write_text(json.dumps({"reachable": True, "uri": store}))
    assert tracking.outdated(tracked, store)
    Path("results").mkdir()
    Path("results/mlflow.db").touch()
    assert not tracking.outdated(tracked, store)


# ---------------------------------------------------------------- secrets


def test_nothing_secret_is_logged() -> None:
    assert tracking.redact("at http://me:pw@host:1/x?token=abc now") == "at http://host:1/x now"
    settings = {
        "learning_rate": 1e-3,
        "max_new_tokens": 64,
        "hub": {"token": "abc", "api_key": "abc", "url": "https://me:abc@host/x"},
        "password": "abc",
        "target_modules": ["q", "v"],
        "none": None,
    }
    assert tracking.parameters(settings) == {
        "learning_rate": "0.001",
        "max_new_tokens": "64",
        "hub.url": "https://host/x",
        "target_modules": '["q", "v"]',
        "none": "null",
    }


# ---------------------------------------------------------------- servers that are away


@pytest.fixture
def deaf() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://me:secret@127.0.0.1:{listener.getsockname()[1]}"


def test_a_dead_server_fails_nothing(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",), steps=3)
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    started = time.monotonic()
    known = run_track(grid, uri)
    assert time.monotonic() - started < 3
    assert known["reachable"] is False and "refused" in known["reason"]
    assert "secret" not in json.dumps(known) + caplog.text
    assert "run the workflow again" in caplog.text
    assert tracking.outdated(grid.parent / "tracked.json", uri)


def test_a_deaf_server_is_given_up(here: Path, deaf: str) -> None:
    started = time.monotonic()
    assert tracking.unreachable(deaf, timeout=0.5)
    live = tracking.LiveLogger(deaf, CELL, {}, timeout=0.5)
    for step in range(100):
        live.log({"step": step, "loss": 1.0})
    live.close(patience=1.0)
    assert time.monotonic() - started < 4


def test_a_server_that_dies_midway(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",), steps=3)
    # it answered the first question and is gone now
    monkeypatch.setattr(tracking, "unreachable", lambda uri: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    known = run_track(grid, f"http://127.0.0.1:{free_port()}")
    assert known["reachable"] is False and known["reason"]


# ---------------------------------------------------------------- live logging

CELL = {"model": "tiny", "task": "choice", "method": "lora", "seed": 1, "spec_id": "abc"}


def test_live_logging_is_off_without_a_server(here: Path) -> None:
    sqlite = {"cell": CELL, "tracking_uri": "sqlite:///results/mlflow.db"}
    for place in ({}, {"cell": CELL}, sqlite):
        live = tracking.live_logger(place)
        assert not live.enabled
        live.log({"step": 1, "loss": 1.0})
        live.close()
    assert not Path("results").exists()


def test_a_dead_server_does_not_delay_training(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    live = tracking.LiveLogger(uri, CELL, {"rank": 1}, capacity=50)
    started = time.monotonic()
    for step in range(1000):
        live.log({"step": step, "loss": 1.0})
    assert time.monotonic() - started < 0.5
    assert live.dropped > 0
    with caplog.at_level(logging.WARNING):
        live.close()
    assert time.monotonic() - started < 4
    assert "training goes on" in caplog.text and "secret" not in caplog.text


@pytest.mark.slow
def test_a_real_server_live_and_reconciled(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), steps=50)
    path = first_train(grid)
    cell = next(c for c in json.loads(grid.read_text())["cells"] if c["train"] == str(path))
    rows = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
    port = free_port()
    uri = f"http://127.0.0.1:{port}"

    # the server is away at first, and comes
    live = tracking.live_logger({"cell": cell, "tracking_uri": uri})
    for row in rows[:10]:
        live.log(row)
    process = start_server(here, port)
    try:
        for row in rows[10:20]:
            live.log(row)
        live.close()
        # the attempt was killed; the next one goes on in the same run
        live = tracking.live_logger({"cell": cell, "tracking_uri": uri})
        for row in rows[15:40]:
            live.log(row)
        live.close()
        (run,) = all_runs(uri)
        assert run.data.params["rank"] == "16" and run.info.status == "FINISHED"
        history = client_of(uri).get_metric_history(run.info.run_id, "train/loss")
        assert {point.step for point in history} == set(range(1, 41))

        counts = run_track(grid, uri)
        assert counts["reachable"] and counts["created"] == 9 and counts["deleted"] == 1
        runs = all_runs(uri)
        assert len(runs) == 9
        (mine,) = [r for r in runs if tracking.identity(cell).items() <= r.data.tags.items()]
        assert mine.info.run_id != run.info.run_id and "tlora.live" not in mine.data.tags
        history = client_of(uri).get_metric_history(mine.info.run_id, "train/loss")
        points = sorted((point.step, point.value) for point in history)
        assert points == [(row["step"], row["loss"]) for row in rows]
        again = run_track(grid, uri)
        assert (again["created"], again["kept"], again["deleted"]) == (0, 9, 0)
    finally:
        stop_server(process)
