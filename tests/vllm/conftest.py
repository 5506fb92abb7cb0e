"""vLLM on the CPU lives in an environment of its own, which `make vllm-test` installs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from contract.grid import PRESET, Grid, make_grid
from vllm_server import SETTINGS

from tlora.plan import Plan

DRIVER = Path(__file__).with_name("driver.py")
FEW = "  - {{benchmarks: [arithmetic], set: {{limit: 16}}}}\n"


@pytest.fixture(scope="session")
def vllm_bin(root: Path) -> Path:
    """The folder of the programs of the environment with vLLM; skipped where there is none."""
    stamp = root / ".venv-vllm/.stamp"
    state = stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else "not installed"
    if state != str(root):
        pytest.skip(f"vLLM on the CPU: {state}: `make vllm-test` installs it where it can")
    return root / ".venv-vllm/bin"


@pytest.fixture(scope="session")
def environment(vllm_bin: Path) -> dict[str, str]:
    """The environment variables of everything that runs vLLM."""
    path = f"{vllm_bin}{os.pathsep}{os.environ['PATH']}"
    secrets = ("TLORA_SERVER_KEY", "OPENAI_API_KEY", "VLLM_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in secrets}
    return kept | SETTINGS | {"PATH": path}


@pytest.fixture(scope="session")
def drive(
    vllm_bin: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[dict[str, Any]]], str]:
    """The function that runs jobs with vLLM and returns what was logged."""

    def run(jobs: list[dict[str, Any]]) -> str:
        path = tmp_path_factory.mktemp("driver") / "jobs.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        begun = time.perf_counter()
        done = subprocess.run(
            [vllm_bin / "python", DRIVER, path],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        print(f"{done.stdout}all: {time.perf_counter() - begun:.1f} s")
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def grid(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """Every method on the tiny base model: vLLM has no attention for smaller heads."""
    folder = tmp_path_factory.mktemp("vllm")
    made = make_grid(root, folder, PRESET + FEW)
    (folder / "config/models/random.yaml").write_text(
        f"path: {root}/workflow/resources/tiny\nmicro_batch: 2\ndtype: float32\n"
    )
    return Grid(made.folder, Plan([folder / "config/contract.yaml"]))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Two engines share two cores with the tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def export(grid: Grid) -> Callable[[str], Path]:
    """The function that returns a method's export, and leaves the trained model in the grid."""

    def make(name: str) -> Path:
        grid.train(name)
        return grid.make(grid.cell(name).units["export"])

    return make


@pytest.fixture(scope="session")
def repeat() -> Callable[[Path, Path, int], Path]:
    """The function that writes an adapter with more ranks, each several times: it says the same."""
    import numpy as np

    from tlora import peft_folder as peft

    def write(weights: Path, out: Path, times: int) -> Path:
        out.mkdir(parents=True)
        config = peft.read_config(weights)
        assert not config["rank_pattern"] and not config["use_rslora"]
        tensors = {}
        for name, tensor in peft.read_tensors(weights / peft.WEIGHTS).items():
            values = [tensor.numbers()] * times
            joined = np.concatenate(values, axis=0 if "lora_A" in name else 1)
            tensors[name] = peft.Stored.of(joined, tensor.dtype)
        peft.write_tensors(out / peft.WEIGHTS, tensors)
        peft.write_config(out, {**config, "r": config["r"] * times})
        return out

    return write
