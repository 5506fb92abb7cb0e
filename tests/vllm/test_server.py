"""A real vLLM server on localhost that jobs share: adapters at run time, keys, refusals."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from contract.grid import Grid
from vllm_server import vllm_server

from tlora.base_model import load_tokenizer
from tlora.errors import UserError
from tlora.generation import server as served
from tlora.plan import Cell
from tlora.stages.generate import generate
from tlora.tasks import arithmetic

pytestmark = pytest.mark.slow

KEY = "sk-very-secret-0123456789"


@dataclass
class Server:
    """A running server."""

    url: str
    log: Path

    def adapters(self) -> list[str]:
        """Return the names of the adapters it holds."""
        entries = served.Client(self.url).get("/v1/models")["data"]
        return [entry["id"] for entry in entries if entry.get("parent")]


@pytest.fixture(scope="module")
def server(
    root: Path,
    vllm_bin: Path,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """`vllm serve` of the tiny base model."""
    log = tmp_path_factory.mktemp("server") / "log"
    model, secret = root / "workflow/resources/tiny", {"VLLM_API_KEY": KEY}
    options = ("--max-lora-rank", 16, "--max-loras", 2)
    with vllm_server(vllm_bin / "python", model, log, environment | secret, *options) as url:
        yield Server(url, log)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLORA_SERVER_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


Job = Callable[[str | None, Path], tuple[dict, dict, dict]]


@pytest.fixture
def job(grid: Grid, export: Callable[[str], Path], server: Server) -> Job:
    """The function that returns spec, inputs and place of a method's generation.

    None asks for the base model.
    """

    def make(name: str | None, work: Path) -> tuple[dict, dict, dict]:
        inputs = {} if name is None else {"export": export(name)}
        unit = cell_of(grid, name).generates["arithmetic"]
        place = unit.placement | {"server": server.url, "work": str(work), "stamp": unit.id}
        return unit.spec | {"backend": "vllm"}, inputs, place

    return make


def cell_of(grid: Grid, name: str | None) -> Cell:
    """Return a method's cell, or the base model's."""
    return next(c for c in grid.plan.cells if (c.base if name is None else c.row.method == name))


def of_transformers(grid: Grid, name: str | None) -> bytes:
    """Return generations.jsonl of the other backend."""
    return grid.make(cell_of(grid, name).generates["arithmetic"]).read_bytes()


def test_jobs_share_one_engine(
    grid: Grid, server: Server, job: Job, root: Path, tmp_path: Path
) -> None:
    running = {}
    for name in ("lora", "tlora"):
        spec, inputs, place = job(name, tmp_path / f"{name}.work")
        command = [sys.executable, "-m", "tlora.cli", "generate", "--spec", json.dumps(spec)]
        command += ["--place", json.dumps(place), "--out", str(tmp_path / name)]
        command += ["--log", str(tmp_path / f"{name}.log"), "--input"]
        command += [f"{key}={path}" for key, path in inputs.items()]
        running[name] = subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    printed = {name: process.communicate(timeout=400)[0] for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, printed[name]
        made = (tmp_path / name / "generations.jsonl").read_bytes()
        assert made == of_transformers(grid, name) != of_transformers(grid, None)
        log = (tmp_path / f"{name}.log").read_text()
        assert "completions" in log and KEY not in log + printed[name]
        assert not (tmp_path / f"{name}.work").exists()
    assert server.adapters() == []
    assert KEY not in server.log.read_text()


def test_base_model_needs_no_adapter(grid: Grid, job: Job, tmp_path: Path) -> None:
    spec, inputs, place = job(None, tmp_path / "work")
    generate(spec, inputs, tmp_path / "out", place)
    assert (tmp_path / "out/generations.jsonl").read_bytes() == of_transformers(grid, None)
    card = json.loads((tmp_path / "out/generate.json").read_text())
    assert card["seconds"] > 0 and card["peak_memory_bytes"] is None


def test_dialogues_and_draws(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, inputs, place = job("lora", tmp_path / "work")
    benchmark = {**spec["benchmark"], "turn_prompt": "\nQ: {instruction}\nA:", "limit": None}
    records = [
        {
            "id": str(at),
            "instruction": f"Tom has {at} apples.",
            "turns": [f"Tom has {at} apples.", "And now?"],
            "reference": "",
            "temperature": 0.0 if at < 6 else 0.9,
        }
        for at in range(12)
    ]
    monkeypatch.setattr(arithmetic, "load", lambda *args: records)
    spec |= {"benchmark": benchmark}
    rows = {}
    for name, change, where in (
        ("server", {}, place),
        ("again", {}, place),
        ("seed", {"benchmark": {**benchmark, "seed": 1}}, place),
        ("transformers", {"backend": "transformers"}, {**place, "server": None}),
    ):
        generate({**spec, **change}, inputs, tmp_path / name, where)
        lines = (tmp_path / name / "generations.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    assert rows["server"] == rows["again"]
    assert rows["server"][:12] == rows["seed"][:12] == rows["transformers"][:12]
    assert rows["server"][12:] != rows["seed"][12:]
    assert [row["id"] for row in rows["server"]] == [
        f"{at}/{n}" for at in range(12) for n in (1, 2)
    ]


def test_a_forgotten_or_left_adapter_is_loaded_again(
    grid: Grid, server: Server, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, inputs, place = job("tlora", tmp_path / "work")
    backend_load = served.load

    def left(*args: Any) -> served.ServerBackend:
        """What a killed job leaves: the adapter."""
        backend_load(*args)
        return backend_load(*args)

    def forgotten(*args: Any) -> served.ServerBackend:
        """What a server that was started again knows: nothing."""
        backend = backend_load(*args)
        backend.close()
        assert server.adapters() == []
        return backend

    for load in (left, forgotten):
        monkeypatch.setattr(served, "load", load)
        out = tmp_path / load.__name__
        generate(spec, inputs, out, place)
        assert (out / "generations.jsonl").read_bytes() == of_transformers(grid, "tlora")
        assert server.adapters() == []


def test_what_a_server_cannot_do_is_said_in_one_line(
    grid: Grid,
    server: Server,
    job: Job,
    repeat: Callable[[Path, Path, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    spec, inputs, place = job("lora", tmp_path / "work")

    def refused(spec: dict, inputs: dict, place: dict) -> str:
        with pytest.raises(UserError) as caught:
            generate(spec, inputs, tmp_path / "out", place)
        assert "\n" not in str(caught.value) and KEY not in str(caught.value)
        return str(caught.value)

    other = {**place, "model": str(grid.folder / "model")}
    assert f"expected {other['model']}" in refused(spec, inputs, other)
    long = {**spec["benchmark"], "max_new_tokens": 600}
    assert "max_model_len: 512: expected at least" in refused(
        {**spec, "benchmark": long}, inputs, place
    )
    beams = {**spec["benchmark"], "num_beams": 4}
    assert "num_beams: 4: expected 1" in refused({**spec, "benchmark": beams}, inputs, place)
    missing = refused_adapter(server, grid, tmp_path / "nowhere")
    assert "nowhere" in missing
    large = repeat(inputs["export"].parent / "weights", tmp_path / "large", 8)
    assert "max_lora_rank" in refused_adapter(server, grid, large)
    merged = job("dora", tmp_path / "work")
    assert "backend: 'vllm': vLLM cannot be imported here" in refused(*merged)
    monkeypatch.setenv("TLORA_SERVER_KEY", KEY + "x")
    assert "refuses the key (401)" in refused(spec, inputs, place)
    assert KEY not in caplog.text
    monkeypatch.setenv("TLORA_SERVER_KEY", KEY)
    assert server.adapters() == []


def refused_adapter(server: Server, grid: Grid, folder: Path) -> str:
    """Return why the server does not take an adapter."""
    place = grid.cell("lora").generates["arithmetic"].placement
    client = served.Client(server.url)
    rules = served.load_rules(load_tokenizer(place), place["model"])
    with pytest.raises(UserError) as caught:
        served.ServerBackend(client, rules, "bad", None, folder).load_adapter()
    assert "\n" not in str(caught.value)
    return str(caught.value)
