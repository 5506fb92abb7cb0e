"""The adapter gate: green for every method, red for every planted fault."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contract.grid import Grid

from tlora.artefact import read_json, sha256_tree, write_json
from tlora.stages.check import NOISE, check

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "config" / "methods").glob("*.yaml"))
PICKED = ("lora", "tlora", "pissa", "dora", "adalora", "full")


@pytest.mark.parametrize("name", NAMES)
def test_every_method_passes(grid: Grid, name: str) -> None:
    card = grid.make(grid.cell(name).units["check"])
    assert read_json(card) == {"passed": True, "reasons": []}
    compared = {entry["what"] for entry in read_json(card.parent / "figures.json")["comparisons"]}
    forms = {"merged"} if merged(grid, name) else {"exported", "merged"}
    assert {f"{form} against trained" for form in forms | {"reloaded"}} <= compared


def merged(grid: Grid, name: str) -> bool:
    return read_json(grid.make(grid.cell(name).units["export"]))["form"] == "model"


@pytest.mark.parametrize("name", PICKED)
def test_passes_in_bfloat16_within_its_noise(halved: Grid, name: str) -> None:
    card = halved.make(halved.cell(name).units["check"])
    assert read_json(card) == {"passed": True, "reasons": []}
    figures = read_json(card.parent / "figures.json")
    assert figures["noise"] > 0
    limits = {entry["limit"] for entry in figures["comparisons"] if "bfloat16" in entry.get("unit")}
    assert limits == {NOISE}


class Planted:
    """A copy of a run's files in which something is changed."""

    def __init__(self, grid: Grid, name: str, folder: Path) -> None:
        self.grid, self.unit = grid, grid.cell(name).units["check"]
        grid.make(self.unit)
        self.inputs = {}
        for key, path in grid.inputs(self.unit).items():
            shutil.copytree(path.parent, folder / key)
            self.inputs[key] = folder / key / path.name
        self.place = dict(self.unit.placement)
        self.out = folder / "out"

    def weights(self, kind: str) -> Path:
        return self.inputs[kind].parent / "weights"

    def seal(self, kind: str) -> None:
        """Write the manifest anew: the fault is one that checksums do not see."""
        card = read_json(self.inputs[kind])
        write_json(self.inputs[kind], card | {"files": sha256_tree(self.weights(kind))})

    def check(self) -> str:
        """Return the reasons to fail."""
        self.out.mkdir()
        check(self.unit.spec, self.inputs, self.out, self.place)
        verdict = read_json(self.out / "check.json")
        assert verdict["passed"] == (not verdict["reasons"])
        return "; ".join(verdict["reasons"])


@pytest.fixture
def planted(grid: Grid, tmp_path: Path) -> Callable[[str], Planted]:
    return lambda name: Planted(grid, name, tmp_path / "planted")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_unchanged_copy_passes(planted: Callable[[str], Planted]) -> None:
    assert planted("tlora").check() == ""


@pytest.mark.parametrize("name", ["lora", "pissa", "tlora"])
def test_another_scaling_fails(planted: Callable[[str], Planted], name: str) -> None:
    run = planted(name)
    path = run.weights("export") / "adapter_config.json"
    config = read_json(path)
    config["lora_alpha"] *= 1.1
    config["alpha_pattern"] = {k: 1.1 * v for k, v in config["alpha_pattern"].items()}
    write_json(path, config)
    run.seal("export")
    reasons = run.check()
    assert "exported against trained" in reasons and "merged against trained" in reasons
    assert ("scaling" in reasons) == (name != "lora")


def test_another_scaling_fails_in_bfloat16(halved: Grid, tmp_path: Path) -> None:
    run = Planted(halved, "tlora", tmp_path / "planted")
    path = run.weights("export") / "adapter_config.json"
    config = read_json(path)
    write_json(
        path,
        config | {"alpha_pattern": {k: 1.1 * v for k, v in config["alpha_pattern"].items()}},
    )
    run.seal("export")
    assert "exported against reloaded float32" in run.check()


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "milora"])
def test_a_forgotten_residual_fails(planted: Callable[[str], Planted], name: str) -> None:
    run = planted(name)
    shutil.rmtree(run.weights("export"))
    shutil.copytree(run.weights("train"), run.weights("export"))
    run.seal("export")
    assert "exported against trained" in run.check()


@pytest.mark.parametrize("name", ["tlora", "lora_fa"])
def test_an_a_that_was_drawn_again_fails(planted: Callable[[str], Planted], name: str) -> None:
    import torch

    run = planted(name)

    def draw(tensors: dict[str, Any]) -> None:
        for key in tensors:
            if ".lora_A." in key:
                tensors[key] = torch.nn.init.kaiming_uniform_(torch.empty_like(tensors[key]))

    for kind in ("train", "export"):
        torch.manual_seed(1)
        rewrite(run.weights(kind), draw)
        run.seal(kind)
    reasons = run.check()
    assert "reloaded against trained" in reasons and "exported against trained" in reasons
    assert "though it is frozen" in reasons


@pytest.mark.parametrize("name", ["lora", "dora", "tlora"])
def test_another_base_model_fails(
    planted: Callable[[str], Planted], name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = planted(name)
    shutil.copytree(run.place["model"], tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.05)
    model.save_pretrained(tmp_path / "other")
    run.place["model"] = str(tmp_path / "other")
    assert "reloaded against trained" in run.check()


def test_weights_that_learned_nothing_fail(planted: Callable[[str], Planted]) -> None:
    from safetensors.torch import load_file, save_file

    run = planted("lora")

    def zero(tensors: dict[str, Any]) -> None:
        for key in tensors:
            if ".lora_B." in key:
                tensors[key].zero_()

    for kind in ("train", "export"):
        rewrite(run.weights(kind), zero)
        run.seal(kind)
    base = load_file(run.grid.path(run.unit.inputs["train"]).parent / "probe.safetensors")
    assert "against trained" in run.check()
    # With a trained model that says what the base model says, only the effect is missing.
    from tlora.probe import held_out, probe

    answers = probe(run.grid.base(), held_out(run.inputs["prepare"]))
    assert answers.keys() == base.keys()
    save_file(answers, run.inputs["train"].parent / "probe.safetensors")
    shutil.rmtree(run.out)
    assert run.check().startswith("changes the base model's logits by 0")


def test_another_rank_than_allocated_fails(planted: Callable[[str], Planted]) -> None:
    run = planted("tlora")
    allocation = read_json(run.inputs["allocate"])
    name = next(iter(allocation["modules"]))
    allocation["modules"][name]["rank"] += 1
    write_json(run.inputs["allocate"], allocation)
    reasons = run.check()
    assert f"trained: {name}: rank" in reasons and f"exported: {name}: rank" in reasons


def test_a_failed_run_is_not_scored(grid: Grid, tmp_path: Path) -> None:
    from tlora.stages.score import score

    unit = next(iter(grid.cell("lora").scores.values()))
    inputs = {"generate": tmp_path / "absent", "check": tmp_path / "check.json"}
    write_json(inputs["check"], {"passed": False, "reasons": ["exported: wrong"]})
    score(unit.spec, inputs, tmp_path, {})
    assert read_json(tmp_path / "score.json") == {"failed": "adapter gate: exported: wrong"}
