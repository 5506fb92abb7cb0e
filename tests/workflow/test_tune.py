"""A preset that tunes: trials, the choice, runs with fresh seeds, and what another grid reruns."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from workflow.project import GRID, Project, labels

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

TUNED = "config/tuned.yaml"
# Judged by the loss, of which no two learning rates give the same.
PRESET = """\
models: [tiny]
tasks: [arithmetic]
methods: [lora]
seeds: [1]
tune: {{grid: {{learning_rate: [{rates}]}}}}
set: {{data.train: 16, data.validation: 4, data.test: 4, batch_size: 4}}
overrides:
  - {{benchmarks: [arithmetic], set: {{data.test: 4, max_new_tokens: 4}}}}
"""
TRIAL = [
    "train tiny/arithmetic/lora",
    "export tiny/arithmetic/lora",
    "check tiny/arithmetic/lora",
    "generate tiny/arithmetic/lora/validation",
    "score tiny/arithmetic/lora/validation",
]
CHOICE = ["choose tiny/arithmetic/lora", "choices"]


def write(project: Project, rates: str) -> None:
    project.path(TUNED).write_text(PRESET.format(rates=rates), encoding="utf-8")


@pytest.fixture(scope="module")
def tuned(sources: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A checkout in which the preset has run with two learning rates."""
    folder = tmp_path_factory.mktemp("tuned")
    project = sources.copy(folder / "checkout")
    with open(project.path("config/tasks/arithmetic.yaml"), "a", encoding="utf-8") as file:
        file.write("validation: loss\n")
    write(project, "3.0e-4, 1.0e-3")
    project.snakemake(preset=TUNED)
    yield project
    shutil.rmtree(folder, ignore_errors=True)


def chosen(project: Project) -> dict:
    """Read the newest choice."""
    paths = project.path("results/choose").rglob("chosen.json")
    return json.loads(max(paths, key=lambda path: path.stat().st_mtime_ns).read_text())


def trained(project: Project) -> dict[str, int]:
    """Return when every train.json was written."""
    found = project.path("results/train").rglob("train.json")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_best_trial_is_confirmed_by_other_seeds(tuned: Project) -> None:
    """The better rate by the validation loss, at the edge of the grid, as the table says."""
    found = chosen(tuned)
    assert (found["metric"], found["higher_is_better"], found["n"]) == ("loss", False, 4)
    assert found["trials"][1]["value"] < found["trials"][0]["value"]
    assert found["settings"] == {"learning_rate": 1.0e-3}
    assert found["edges"] == {"learning_rate": "upper"}
    assert len(trained(tuned)) == 3
    (row,) = (
        row
        for row in csv.DictReader(tuned.path("results/comparison/tuned/table.csv").open())
        if row["method"] == "lora"
    )
    assert row["seeds"] == "1"
    assert json.loads(row["tuned"]) == {"learning_rate": 1.0e-3} and row["trials"] == "2"


def test_mlflow_nests_the_trials(tuned: Project) -> None:
    """One run of the cell, one of the tuning, and below it one a trial."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tuned.path('results/mlflow.db')}")
    experiment = client.get_experiment_by_name("tiny/arithmetic")
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["tlora.kind"] for run in runs)
    assert kinds == ["cell", "cell", "trial", "trial", "tuning"]  # a cell is the base model
    (above,) = (run for run in runs if run.data.tags["tlora.kind"] == "tuning")
    for run in runs:
        trial = run.data.tags["tlora.kind"] == "trial"
        assert run.data.tags.get("mlflow.parentRunId") == (above.info.run_id if trial else None)
    assert above.data.params["learning_rate"] == "0.001"
    cell = next(run for run in runs if run.data.tags.get("tlora.method") == "lora" and run.outputs)
    assert [one.dataset.name for one in cell.inputs.dataset_inputs] == ["arithmetic"]
    assert len(cell.outputs.model_outputs) == 1


def test_another_grid_runs_its_new_trials_only(tuned: Project) -> None:
    """The winner is the same, so its runs stay; then nothing is left to do."""
    assert tuned.dry(preset=TUNED) == []
    before = trained(tuned)
    write(tuned, "3.0e-4, 1.0e-3, 2.0e-4")
    assert labels(tuned.dry(preset=TUNED)) == sorted([*TRIAL, *CHOICE, *GRID])
    tuned.snakemake(preset=TUNED)
    after = trained(tuned)
    assert before.items() <= after.items() and len(after) == len(before) + 1
    assert chosen(tuned)["settings"] == {"learning_rate": 1.0e-3}
    assert chosen(tuned)["edges"] == {"learning_rate": "upper"}
    assert tuned.dry(preset=TUNED) == []


def test_another_winner_trains_anew(tuned: Project) -> None:
    """A trial that does better, and one that diverges: it is on record, and never wins."""
    before = trained(tuned)
    write(tuned, "3.0e-4, 1.0e-3, 3.0e-3, 1.0e+30")
    tuned.snakemake(preset=TUNED)
    found = chosen(tuned)
    values = [trial["value"] for trial in found["trials"]]
    assert "expected a finite number" in found["trials"][3]["failed"] and values[3] is None
    assert found["winner"] == values.index(min(values[:3]))
    assert len(trained(tuned)) - len(before) == (3 if found["winner"] == 2 else 2)
    assert Path(tuned.path("results/comparison/tuned/table.csv")).is_file()
    assert tuned.dry(preset=TUNED) == []
