"""Costs: sums by hand, with and without tuning, what is not known, who reaches the baseline."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from unit.grid_tree import labels_of, make_grid, write

from tlora.comparison import collect, costs, tables


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(
    seed: int = 1,
    before: dict[str, float] | None = None,
    train: float | None = 3600.0,
    devices: int | None = None,
    evaluation: float = 360.0,
    peak: int = 100,
) -> collect.Run:
    """Return a run with these seconds, from its artefacts in the working directory."""
    folder = Path(f"run{random.Random(f'{seed}{before}{train}').getrandbits(60)}")
    paths = {path: write(Path(path), {"seconds": s}) for path, s in (before or {}).items()}
    cell = {"model": "m", "task": "t", "method": "x", "seed": seed, "spec_id": "s", "scores": {}}
    cell |= {"costs": list(paths.values())}
    cell["generations"] = {"b": write(folder / "generate.json", {"seconds": evaluation})}
    cell["train"] = str(folder / "train.json")
    if train is not None:
        card = {"train_seconds": train, "peak_memory_bytes": peak, "trainable_parameters": 7}
        write(folder / "train.json", card | ({"processes": devices} if devices else {}))
    run = collect.load_run(cell, [])
    assert set(run.failures) == ({""} if train is None else set())
    return run


def choice_of(
    *trials: collect.Run, values: tuple[float | None, ...] = (0.5, 0.6)
) -> collect.Choice:
    tried = tuple({"learning_rate": 10.0**-n} for n in range(len(trials)))
    return collect.Choice("accuracy", True, trials, tried, values, 1, {})


def row_of(*runs: collect.Run, choice: collect.Choice | None = None) -> collect.Row:
    return collect.Row("m", "t", "x", "X", False, runs, choice)


# ---------------------------------------------------------------- sums


def test_one_run(here: Path) -> None:
    found = costs.row_costs(row_of(run_of(before={"c.json": 1800.0, "i.json": 1800.0})))
    assert found["initialization_seconds"] == 3600
    assert found["tuning_seconds"] is None and found["tuning_trials"] is None
    assert (found["training_seconds"], found["evaluation_seconds"]) == (3600, 360)
    assert found["model_device_hours"] == pytest.approx(2.0)
    assert found["total_device_hours"] == found["all_device_hours"] == pytest.approx(2.1)
    assert found["devices"] == 1


def test_training_counts_for_every_device(here: Path) -> None:
    found = costs.row_costs(row_of(run_of(before={"i.json": 3600.0}, devices=4)))
    assert found["training_seconds"] == 3600 and found["devices"] == 4
    assert found["training_device_hours"] == pytest.approx(4.0)
    assert found["model_device_hours"] == pytest.approx(5.0)
    assert found["all_device_hours"] == pytest.approx(5.1)
    trials = choice_of(run_of(9, train=900.0, devices=4), run_of(9, train=1800.0, devices=4))
    found = costs.row_costs(row_of(run_of(devices=4), choice=trials))
    assert found["tuning_device_hours"] == pytest.approx(1 + 2 + 0.2)


def test_a_model_costs_the_mean_of_its_runs_and_all_runs_their_sum(here: Path) -> None:
    runs = [run_of(seed, {"i.json": 3600.0}, train=3600.0 * seed) for seed in (1, 3)]
    found = costs.row_costs(row_of(*runs))
    assert found["training_device_hours"] == pytest.approx(2.0)
    assert found["model_device_hours"] == pytest.approx(3.0)
    # the initialization, shared by both, once
    assert found["all_device_hours"] == pytest.approx(1 + 1 + 3 + 0.2)


def test_tuning_is_in_the_sum_and_shared_jobs_are_not_twice(here: Path) -> None:
    shared = {"i.json": 3600.0}
    trials = [run_of(9, shared, train=1800.0), run_of(9, shared, train=1800.5)]
    found = costs.row_costs(row_of(run_of(1, shared), choice=choice_of(*trials)))
    assert (found["tuning_trials"], found["tuning_failed"]) == (2, 0)
    # two trainings and two validations; the initialization is the run's
    assert found["tuning_seconds"] == pytest.approx(2 * 1800 + 0.5 + 2 * 360)
    assert found["tuning_device_hours"] == pytest.approx(found["tuning_seconds"] / 3600)
    assert found["model_device_hours"] == pytest.approx(2 + found["tuning_seconds"] / 3600)
    assert found["all_device_hours"] == pytest.approx(found["total_device_hours"])


def test_jobs_of_trials_that_the_run_does_not_need_are_tuning(here: Path) -> None:
    """The calibration is shared, the initialization is not: another setting, another adapter."""
    trials = [
        run_of(9, {"c.json": 3600.0, f"i{n}.json": 100.0 + n}, train=1800.0 + n) for n in (1, 2)
    ]
    run = run_of(1, {"c.json": 3600.0, "i2.json": 102.0})
    found = costs.row_costs(row_of(run, choice=choice_of(*trials)))
    assert found["tuning_seconds"] == pytest.approx(101 + 1801 + 1802 + 2 * 360)


def test_failed_runs_and_trials_cost_what_is_known(here: Path) -> None:
    lost = run_of(2, train=None)
    diverged = run_of(9, train=720.0)
    diverged = replace(diverged, failures={"": "loss: nan"})
    choice = choice_of(diverged, run_of(9, train=1440.0), values=(None, 0.4))
    found = costs.row_costs(row_of(run_of(1), lost, choice=choice))
    assert (found["tuning_trials"], found["tuning_failed"]) == (2, 1)
    assert found["tuning_seconds"] == pytest.approx(720 + 1440 + 720)
    assert found["training_seconds"] == 3600
    none = costs.row_costs(row_of(lost))
    assert none["training_seconds"] is none["model_device_hours"] is none["devices"] is None


def test_peaks_of_memory(here: Path) -> None:
    row = row_of(run_of(1, peak=100), run_of(2, peak=120))
    assert costs.row_costs(row)["peak_memory_bytes"] == 120
    runs = tuple(replace(run, initialization_memory=300 + run.seed) for run in row.runs)
    found = costs.row_costs(replace(row, runs=runs))
    keys = [f"{part}peak_memory_bytes" for part in ("initialization_", "training_", "")]
    assert [found[key] for key in keys] == [302, 120, 302]


def test_size_is_of_the_exported_weights(here: Path) -> None:
    run = run_of()
    card = write(Path("e/export.json"), {"files": {"a.safetensors": "", "config.json": ""}})
    run = replace(run, export_path=Path(card))
    assert costs.weight_bytes(run) is None  # deleted to save room
    Path("e/weights").mkdir()
    Path("e/weights/a.safetensors").write_bytes(b"x" * 321)
    Path("e/weights/config.json").write_bytes(b"x" * 50)
    assert costs.weight_bytes(run) == 321
    assert costs.row_costs(row_of(run))["adapter_bytes"] == 321
    assert costs.weight_bytes(replace(run, export_path=None)) is None


# ---------------------------------------------------------------- a comparison


def judged(grid: Path, levels: dict[str, float], items: int = 300) -> None:
    """Give every score verdicts on single items: so large a share of them is right."""
    for cell in json.loads(grid.read_text())["cells"]:
        for path in cell["scores"].values():
            draw = random.Random(path)
            verdicts = [draw.random() < levels[cell["method"]] for _ in range(items)]
            found = [{"id": str(n), "correct": v, "extracted": "x"} for n, v in enumerate(verdicts)]
            score = json.loads(Path(path).read_text())
            score |= {"n": items, "value": sum(verdicts) / items, "items": found}
            Path(path).write_text(json.dumps(score | {"metrics": {"accuracy": score["value"]}}))


def test_who_reaches_the_baseline_and_at_what_cost(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), steps=2, seeds=(1, 2, 3))
    judged(grid, {"base": 0.1, "full": 0.2, "lora": 0.5, "pissa": 0.5, "tlora": 0.85})
    comparison = collect.load(grid, labels_of(grid))
    spent = costs.records(comparison, tables.records(comparison, "lora"))
    found = {row["method"]: row for row in spent}
    states = {name: row["choice_test_reaches_baseline"] for name, row in found.items()}
    assert states == {
        "base": None,
        "full": "lower",
        "lora": "baseline",
        "pissa": "not distinguishable",
        "tlora": "higher",
    }
    ratios = {name: row["choice_test_cost_ratio"] for name, row in found.items()}
    assert ratios["base"] is ratios["full"] is None and ratios["lora"] == 1
    trained = {name: row["training_seconds"] for name, row in found.items()}
    expected = (trained["tlora"] + 2.5 + 11.25) / trained["lora"]
    assert ratios["tlora"] == pytest.approx(expected, abs=1e-3)
    assert next(csv.DictReader(io.StringIO(tables.to_csv(spent))))["method"] == "base"
    text = costs.to_markdown(comparison, spent)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert lines["Full fine-tuning"].split("|")[-2].strip() == "no"
    assert lines["PiSSA"].split("|")[-2].strip().startswith("= 1.")
    assert lines["TLoRA"].split("|")[-2].strip() == f"{ratios['tlora']:.2f}"
    assert "nothing was tuned" in text and "end of training only" in text


def test_nothing_is_invented_without_verdicts_or_baseline(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("tlora",), steps=2, seeds=(1,))
    comparison = collect.load(grid)
    spent = costs.records(comparison, tables.records(comparison, "lora"))
    assert {row["choice_test_reaches_baseline"] for row in spent} == {None}
    assert {row["choice_test_cost_ratio"] for row in spent} == {None}
    assert "Reaches baseline" not in costs.to_markdown(comparison, spent)


def test_unequal_and_failed_trials_are_told(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "tlora"), steps=2)
    comparison = collect.load(grid)
    (section,) = comparison.sections
    choices = [None, choice_of(run_of(9)), choice_of(run_of(9), run_of(9), values=(None, 0.5))]
    choices[1] = replace(choices[1], values=(0.5,), winner=0)
    rows = tuple(replace(r, choice=c) for r, c in zip(section.rows, choices, strict=True))
    comparison = replace(comparison, sections=(replace(section, rows=rows),))
    spent = costs.records(comparison, tables.records(comparison, "lora"))
    text = costs.to_markdown(comparison, spent)
    assert "Tuning (s)" in text and "with all trials of the tuning" in text
    assert "unequal numbers of trials" in text
    assert "Failed trials: tlora" in text
