"""A complete run of a small grid: what it leaves behind, and what it does when it is run again."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from workflow.project import GRID, MINI, Job, Project, labels, run_of

from tlora.code import SHOWN_ONLY

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

METHODS = ("full", "lora", "pissa", "tlora")
# Parsing arguments decides no result; spec and code only stamp what a job may resume from.
COMMAND_LINE = {
    *("tlora.cli", "tlora.code", "tlora.spec", "tlora.lease", "tlora.distributed"),
    *("tlora.devices", "tlora.estimate", "tlora.forks"),
}
# Loaded for a statistic that no method of the small preset reads.
BRANCHES = {"calibrate": {"tlora/subspace.py"}}


def folder(jobs: dict[str, Job], label: str) -> Path:
    """Return the artefact's folder of a job, relative to the checkout."""
    arguments = jobs[label].arguments
    return Path(arguments[arguments.index("--out") + 1])


def artefact(project: Project, jobs: dict[str, Job], label: str, name: str) -> dict:
    """Read a JSON file of a job's artefact."""
    return json.loads((project.folder / folder(jobs, label) / name).read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Return a file's checksum."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_stage_ran_once_and_equal_work_once(jobs: dict[str, Job]) -> None:
    """One job a cell and stage; PiSSA's start needs no data, so it is shared between tasks."""
    expected = [
        "prepare tiny/arithmetic",
        "overlap arithmetic/arithmetic",
        "calibrate tiny/arithmetic/sensitivity",
        "allocate tiny/arithmetic/tlora",
        "initialize tiny/any/pissa",
        "initialize tiny/arithmetic/tlora",
        *(label for method in METHODS for label in run_of(method)),
        "generate tiny/arithmetic/base/arithmetic",
        "score tiny/arithmetic/base/arithmetic",
        *GRID,
    ]
    assert sorted(jobs) == sorted(expected)


def test_the_jobs_used_the_checkouts_own_package(finished: Project) -> None:
    """What is tested is the copy, whatever else is installed."""
    program = "import tlora; print(tlora.__file__)"
    output = finished.run([sys.executable, "-c", program])
    assert Path(output.strip()).is_relative_to(finished.folder)
    assert all(call["status"] == 0 for call in finished.calls())


def test_prepare_wrote_what_its_card_says(finished: Project, jobs: dict[str, Job]) -> None:
    """Counts are those of the preset and the checksums are those of the files."""
    card = artefact(finished, jobs, "prepare tiny/arithmetic", "card.json")
    assert card["counts"] == {"train": 42, "validation": 4}
    assert card["overlap"]["validation"]["exact"] == 0
    made = finished.folder / folder(jobs, "prepare tiny/arithmetic")
    assert {name: sha256(made / name) for name in card["sha256"]} == card["sha256"]
    assert set(card["sha256"]) == {"train.parquet", "validation.parquet"}


@pytest.mark.parametrize("method", METHODS)
def test_training_left_complete_records(
    finished: Project, jobs: dict[str, Job], method: str
) -> None:
    """train.json has every field, the log every step, and nothing partial is left."""
    label = f"train tiny/arithmetic/{method}"
    made = finished.folder / folder(jobs, label)
    card = artefact(finished, jobs, label, "train.json")
    rows = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    assert card["steps"] == 10 == len(rows)
    assert card["samples"] == 40
    assert card["dropped_samples"] == 2
    assert card["attempts"] == 1
    assert 0 < card["trainable_parameters"] <= card["total_parameters"]
    assert (card["trainable_parameters"] == card["total_parameters"]) == (method == "full")
    assert card["tokens"] > 0
    assert card["peak_memory_bytes"] > 10**7
    assert card["tokens_per_second"] == pytest.approx(card["tokens"] / card["train_seconds"])
    assert set(card["versions"]) == {"torch", "transformers", "peft", "accelerate", "tlora"}
    assert {name: sha256(made / "weights" / name) for name in card["files"]} == card["files"]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] == card["final_loss"]
    assert rows[-1]["epoch"] == 1
    assert set(rows[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "seconds"}
    left = [path.name for path in finished.path("results").rglob("*.partial")]
    assert not left
    assert not any(finished.path("results/.work").glob("*/*")), "partial state outlived success"


def test_tlora_trains_b_alone(finished: Project, jobs: dict[str, Job]) -> None:
    """A is frozen, so fewer numbers are trained than with LoRA at the same budget of ranks."""
    allocation = artefact(finished, jobs, "allocate tiny/arithmetic/tlora", "allocation.json")
    expected = sum(module["rank"] * module["shape"][0] for module in allocation["modules"].values())
    card = artefact(finished, jobs, "train tiny/arithmetic/tlora", "train.json")
    assert card["trainable_parameters"] == expected


@pytest.mark.parametrize("method", METHODS)
def test_export_vouches_for_its_files(finished: Project, jobs: dict[str, Job], method: str) -> None:
    """A folder that others load: an adapter, or for full fine-tuning a model."""
    label = f"export tiny/arithmetic/{method}"
    card = artefact(finished, jobs, label, "export.json")
    weights = finished.folder / folder(jobs, label) / "weights"
    assert card["form"] == ("model" if method == "full" else "adapter")
    assert {name: sha256(weights / name) for name in card["files"]} == card["files"]
    assert {path.name for path in weights.glob("[!.]*")} == set(card["files"])
    config = "config.json" if method == "full" else "adapter_config.json"
    text = (weights / config).read_text(encoding="utf-8")
    assert str(finished.folder) not in text, "the artefact is tied to this machine"
    if method != "full":
        assert json.loads(text)["init_lora_weights"] is True, "loading would initialise again"


@pytest.mark.parametrize("method", [*METHODS, "base"])
def test_generations_and_scores_fit_together(
    finished: Project, jobs: dict[str, Job], method: str
) -> None:
    """Completions are in the benchmark's order and every one has a verdict."""
    name = f"tiny/arithmetic/{method}/arithmetic"
    path = finished.folder / folder(jobs, f"generate {name}") / "generations.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"test-{index}" for index in range(8)]
    assert all(line["completion_tokens"] <= 4 for line in lines)
    assert {line["finish_reason"] for line in lines} <= {"eos", "stop", "length"}
    score = artefact(finished, jobs, f"score {name}", "score.json")
    assert score["n"] == 8
    assert [item["id"] for item in score["items"]] == [line["id"] for line in lines]
    assert score["value"] == sum(item["correct"] for item in score["items"]) / 8


def test_tables_name_every_method(finished: Project) -> None:
    """One row a method and one for the base model, in each format."""
    made = finished.path("results/comparison/mini")
    rows = list(csv.DictReader((made / "table.csv").open(encoding="utf-8")))
    assert {row["method"] for row in rows} == {"base", *METHODS}
    for name in ("table.md", "table.tex", "table.html"):
        text = (made / name).read_text(encoding="utf-8")
        for label in ("Full fine-tuning", "LoRA", "PiSSA", "TLoRA", "Base model"):
            assert label in text, f"{name}: {label}"
    assert (made / "ledger.csv").stat().st_size > 0
    assert list((made / "plots" / "arithmetic").glob("*.png"))


def test_tracking_stored_every_run(finished: Project, jobs: dict[str, Job]) -> None:
    """MLflow's store below results/ holds a run per cell, with the curves of log.jsonl."""
    import mlflow

    assert finished.path("results/comparison/mini/tracked.json").is_file()
    store = f"sqlite:///{finished.path('results/mlflow.db')}"
    client = mlflow.MlflowClient(tracking_uri=store)
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments)
    trained = [run for run in runs if client.get_metric_history(run.info.run_id, "train/loss")]
    assert len(trained) == len(METHODS)
    for run in trained:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == list(range(1, 11))
        assert run.info.status == "FINISHED"


def test_second_run_does_nothing(checkout: Project) -> None:
    """Not a file changes, and `tlora` is not called."""
    before = checkout.state()
    checkout.record()
    output = checkout.snakemake()
    assert "Nothing to be done" in output
    assert checkout.calls() == []
    assert checkout.state() == before
    assert checkout.dry() == []


def test_a_further_seed_shares_what_seeds_share(checkout: Project) -> None:
    """Data, calibration and initialisation are made once for all seeds."""
    jobs = checkout.dry("--config", "seeds=[1,2]")
    expected = [label for method in METHODS for label in run_of(method)]
    assert labels(jobs) == sorted([*expected, *GRID])


def test_profile_for_slurm(fresh: Project) -> None:
    """`--profile slurm` finds the profile and plans the same jobs."""
    output = fresh.snakemake("--cores", "all", "--profile", "slurm", "--dry-run")
    assert "slurm" in output
    assert "total            33" in output


def test_report_has_categories_and_captions(checkout: Project) -> None:
    """`snakemake --report` makes one page with tables, plots and scores by task and method."""
    target = "results/comparison/mini/report.html"
    checkout.snakemake("--report", target)
    text = checkout.path(target).read_text(encoding="utf-8")
    for category in ("comparison", "arithmetic", *METHODS):
        assert f'"{category}"' in text, category
    for caption in checkout.path("workflow/report").glob("*.rst"):
        assert caption.stat().st_size > 0
    assert "score.json" in text
    assert "table.html" in text


def test_every_job_names_the_sources_it_loads(finished: Project, jobs: dict[str, Job]) -> None:
    """The package files among a job's inputs are those it loads: none missing, none idle.

    Taken from the real run, where each job wrote down its modules. Only what costs no further
    rerun may be listed without being loaded: what the work before the job depends on anyway.
    """
    listed: dict[str, set[str]] = defaultdict(set)
    loaded: dict[str, set[str]] = defaultdict(set)
    asked = {
        (job.rule, str(folder(jobs, label))): job for label, job in jobs.items() if job.arguments
    }
    answered = []
    for call in finished.calls():
        arguments = call["arguments"]
        if "--out" not in arguments:
            continue
        job = asked[arguments[0], arguments[arguments.index("--out") + 1]]
        answered.append(job)
        sources = {path for path in job.input if path.startswith("tlora/") and path.endswith(".py")}
        shown = SHOWN_ONLY if job.rule != "track" else SHOWN_ONLY - {"tlora.tracking"}
        found = {source_of(finished, name) for name in set(call["loaded"]) - shown}
        beside = {source_of(finished, name) for name in COMMAND_LINE}
        modules = found - (beside - sources)
        assert modules <= sources, f"{job.label} loads what its inputs do not list"
        listed[job.rule] |= sources
        loaded[job.rule] |= modules
    assert sorted(answered) == sorted(asked.values())
    before: set[str] = set()
    for rule in ("prepare", "calibrate", "allocate", "initialize", "train", "export", "check"):
        before |= loaded[rule]
        idle = listed[rule] - before - BRANCHES.get(rule, set())
        assert not idle, f"{rule} lists what none of its jobs loads"
    for rule in ("generate", "score", "compare", "index", "track"):
        assert listed[rule] == loaded[rule], rule


def source_of(project: Project, module: str) -> str:
    """Return the file of a module, as a job's input names it."""
    path = Path(*module.split("."))
    package = path / "__init__.py"
    return (package if (project.folder / package).is_file() else path.with_suffix(".py")).as_posix()


def test_jobs_that_need_no_torch_load_none(finished: Project) -> None:
    """Start-up of torch takes seconds; these jobs are many and short."""
    light = ("allocate", "score", "compare")
    heavy = {call["arguments"][0]: call["heavy"] for call in finished.calls()}
    assert {verb: heavy[verb] for verb in light} == {verb: [] for verb in light}


def test_forks_make_the_same(fresh: Project, finished: Project, jobs: dict[str, Job]) -> None:
    """Jobs in forks of one process, which has torch loaded, leave the bytes of those that start it.

    As the small preset runs without them, for the sake of what each job loads by itself.
    """
    fresh.record()
    del fresh.environment["TLORA_FORKS"]
    score = folder(jobs, "score tiny/arithmetic/tlora/arithmetic") / "score.json"
    fresh.snakemake(str(score))
    heavy = defaultdict(list)
    for call in fresh.calls():
        heavy[call["arguments"][0]].append(len(call["heavy"]))
        assert call["status"] == 0
    # A job handed over is noted by the fork and by the caller, which itself loads nothing.
    assert heavy["train"] == heavy["generate"] == heavy["export"] == [3, 0]
    assert heavy["allocate"] == heavy["score"] == [0]
    weights = folder(jobs, "train tiny/arithmetic/tlora") / "weights" / "adapter_model.safetensors"
    for path in (score, weights):
        assert sha256(fresh.folder / path) == sha256(finished.folder / path)


def test_listing_commands(finished: Project) -> None:
    """`tlora list`, `where`, `show`, `validate` and `table` answer about the finished preset."""
    (known,) = (line for line in finished.tlora("list").splitlines() if line.startswith("methods"))
    assert set(known.removeprefix("methods: ").split(", ")) >= set(METHODS)
    assert finished.tlora("list", MINI).count("\n") == len(METHODS) + 1
    lines = finished.tlora("where", MINI).splitlines()
    assert lines
    assert all(line.endswith("\tmade") for line in lines)
    assert all(finished.path(line.partition("\t")[0]).is_file() for line in lines)
    shown = finished.tlora("show", MINI, "arithmetic", "tlora")
    assert any(line.split() == ["batch_size", "4", f"{MINI}:9"] for line in shown.splitlines())
    assert any("config/tasks/arithmetic.yaml:" in line for line in shown.splitlines())
    assert "5 cells" in finished.tlora("validate", MINI)
    assert "TLoRA" in finished.tlora("table", MINI)
