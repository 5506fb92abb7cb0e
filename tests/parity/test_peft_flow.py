"""Every method of PEFT against its documented flow, and two against their papers' formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from contract.grid import Grid, make_grid

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH, RANK, ALPHA, RATE = 20, 4, 4, 8, 5.0e-3
METHODS = [
    "lora",
    "rslora",
    "dora",
    "pissa",
    "olora",
    "lora_plus",
    "lora_fa",
    "adalora",
    "eva",
    "lora_ga",
    "corda",
    "corda_kpm",
]
PRESET = f"""\
models: [random]
tasks: [arithmetic]
methods: [{{methods}}]
seeds: [1]
set: {{{{data.train: {STEPS * BATCH}, data.validation: 8, data.test: 8, batch_size: {BATCH}}}}}
overrides:
  - set: {{{{rank: {RANK}, lora_alpha: {ALPHA}, learning_rate: {RATE}, calibration_samples: 20}}}}
  - {{{{methods: [adalora], set: {{{{options.interval: 2}}}}}}}}
"""
PEFT_FORMULA = "  - {{methods: [lora_ga], set: {{options.formula: peft}}}}\n"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return make_grid(ROOT, tmp_path_factory.mktemp("parity"), PRESET + PEFT_FORMULA, BATCH)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The same with LoRA-GA as its paper has it."""
    return make_grid(ROOT, tmp_path_factory.mktemp("paper"), PRESET, BATCH)


def samples(grid: Grid, name: str) -> tuple[list[dict], list[dict]]:
    """Return the training samples in order, and the calibration sample, as plain lists."""
    from tlora.stages.train import sample_order
    from tlora.tasks import tokenised

    cell = grid.cell(name)
    path = grid.make(cell.units["prepare"]).parent / "train.parquet"
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in tokenised.read(path)]
    spec = cell.units["train"].spec
    order, _ = sample_order(len(rows), BATCH, spec["epochs"], spec["seed"])
    count = cell.settings["calibration_samples"].value
    drawn = tokenised.calibration_batches(path, count, 0, 0, "cpu")
    return [rows[i] for i in order], [
        {key: batch[key][0].tolist() for key in ("input_ids", "labels")} for batch in drawn
    ]


def job(grid: Grid, name: str) -> dict[str, Any]:
    """Return what the plain script is told."""
    cell = grid.cell(name)
    ordered, calibration = samples(grid, name)
    return {
        "method": name,
        "model": grid.plan.models["random"][0].path,
        # data-driven initialisations take the calibration seed
        "seed": 0 if "initialize" in cell.units else 1,
        "rank": RANK,
        "alpha": ALPHA,
        "targets": cell.units["train"].spec["target_modules"],
        "learning_rate": RATE,
        "warmup": math.ceil(cell.settings["warmup_ratio"].value * STEPS),
        "batches": [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)],
        "calibration": calibration,
    }


def test_the_script_uses_nothing_of_this_project() -> None:
    assert "tlora" not in (Path(__file__).parent / "peft_flow.py").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_first_steps_are_those_of_pefts_documented_flow(grid: Grid, name: str) -> None:
    from parity import peft_flow

    told = job(grid, name)
    model = peft_flow.adapted(told)
    expected = peft_flow.losses(model, told)
    main = grid.make(grid.cell(name).units["train"])
    rows = (main.parent / "log.jsonl").read_text().splitlines()
    found = [json.loads(row)["loss"] for row in rows]
    assert len(found) == len(expected) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    print(f"\n{name}: largest relative difference of 20 losses {worst:.1e}")
    assert worst <= 1e-5
    assert expected[-1] != expected[0]


@pytest.mark.parametrize("name", ["pissa", "olora", "eva", "lora_ga", "corda", "corda_kpm"])
def test_initial_weights_are_pefts_own(grid: Grid, name: str) -> None:
    from parity import peft_flow

    model = peft_flow.adapted(job(grid, name))
    found = products(grid, name)
    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }
    assert found.keys() == layers.keys()
    for module, (a, b) in found.items():
        expected_a = layers[module].lora_A["default"].weight.detach().double()
        expected_b = layers[module].lora_B["default"].weight.detach().double()
        if name == "eva":
            assert relative(a, expected_a) <= 1e-5
        else:
            # The product leaves the sign of a pair of vectors open.
            assert relative(b @ a, expected_b @ expected_a) <= 1e-4, module


def products(grid: Grid, name: str) -> dict[str, tuple[Any, Any]]:
    """Return A0 and B0 of the initialisation in float64 by module."""
    from safetensors.torch import load_file

    folder = grid.make(grid.cell(name).units["initialize"]).parent
    tensors = load_file(folder / "adapter_model.safetensors")
    stems = [key.removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]
    return {
        stem.removeprefix("base_model.model."): (
            tensors[f"{stem}.lora_A.weight"].double(),
            tensors[f"{stem}.lora_B.weight"].double(),
        )
        for stem in stems
    }


def relative(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())


def double_pass(grid: Grid, name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the model in float64, its mean gradients and its covariances by module.

    The covariance is that of the authors' code: every sample's inputs over their largest entry.
    """
    import torch

    model = grid.base().double()
    modules = dict(model.named_modules())
    names = list(products(grid, name))
    covariance: dict[str, Any] = dict.fromkeys(names, 0.0)

    def hook(module: str) -> Any:
        def receive(_: Any, arguments: tuple) -> None:
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            rows = rows / rows.max().abs()
            covariance[module] = covariance[module] + rows.T @ rows

        return receive

    for module in names:
        modules[module].register_forward_pre_hook(hook(module))
    _, calibration = samples(grid, name)
    for sample in calibration:
        ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
        model(input_ids=ids, labels=labels).loss.backward()
    count = len(calibration)
    gradients = {module: modules[module].weight.grad / count for module in names}
    return modules, gradients, {module: c / count for module, c in covariance.items()}


def test_lora_ga_is_its_papers_formula(paper: Grid) -> None:
    import torch

    _, gradients, _ = double_pass(paper, "lora_ga")
    for module, (a, b) in products(paper, "lora_ga").items():
        left, _, right = torch.linalg.svd(gradients[module], full_matrices=False)
        length = gradients[module].shape[0] ** 0.25 / 16**0.5
        expected_a, expected_b = length * right[:RANK], length * left[:, RANK : 2 * RANK]
        # Singular vectors have no sign.
        a = a * (a * expected_a).sum(dim=1, keepdim=True).sign()
        b = b * (b * expected_b).sum(dim=0, keepdim=True).sign()
        assert relative(a, expected_a) <= 1e-3, module
        assert relative(b, expected_b) <= 1e-3, module


@pytest.mark.parametrize("name", ["corda", "corda_kpm"])
def test_corda_is_its_papers_formula(paper: Grid, name: str) -> None:
    import torch

    modules, _, covariances = double_pass(paper, name)
    chosen = slice(None, RANK) if name == "corda" else slice(-RANK, None)
    for module, (a, b) in products(paper, name).items():
        weight, covariance = modules[module].weight.detach(), covariances[module]
        # Damped so that it can be inverted, as in the authors' code.
        damping = 0.01 * covariance.diagonal().mean()
        covariance = covariance + damping * torch.eye(len(covariance), dtype=torch.float64)
        left, values, right = torch.linalg.svd(weight @ covariance, full_matrices=False)
        part = left[:, chosen] * values[chosen] @ right[chosen] @ torch.linalg.inv(covariance)
        assert relative(ALPHA / RANK * b @ a, part) <= 1e-3, module
