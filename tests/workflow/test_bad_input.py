"""What bad input gets: one line, exit status 1, and nothing already computed is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workflow.project import MINI, Job, Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

TASK = "config/tasks/arithmetic.yaml"
BENCHMARK = "config/benchmarks/arithmetic.yaml"
MODEL = "config/models/tiny.yaml"
METHOD = "config/methods/pissa.yaml"
LINE = 1 + (Path(__file__).parents[2] / METHOD).read_text().splitlines().index(
    "implementation: pissa"
)
PREFIX = "tlora: error: "


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the finished project; each test puts back what it spoils."""
    folder = tmp_path_factory.mktemp("bad")
    yield finished.copy(folder / "checkout")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def spoilt(project: Project) -> Iterator[Project]:
    """The project; its configuration is as before afterwards, its results must be all along."""
    kept = project.folder.with_name("config-kept")
    shutil.copytree(project.path("config"), kept)
    before = project.state()
    yield project
    after = {name: state for name, state in project.state().items() if "/.work/" not in name}
    assert after == {name: state for name, state in before.items() if "/.work/" not in name}
    shutil.rmtree(project.path("config"))
    kept.rename(project.path("config"))


def complaint(output: str) -> str:
    """Return the one line of error in what a command wrote."""
    lines = [line for line in output.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1, output
    assert "Traceback" not in output, output
    return lines[0].removeprefix(PREFIX)


def fragments(line: str, *expected: str) -> None:
    """Check that all of some texts stand in a line."""
    missing = [text for text in expected if text not in line]
    assert not missing, f"{line!r} does not say {missing}"


# file, what stands there, what is put there, what the line must say: place, key, value, expectation
BEFORE = {
    "unknown method": (
        MINI,
        "pissa, tlora]",
        "pisa, tlora]",
        [f"{MINI}:3", "methods", "'pisa'", "did you mean 'pissa'?"],
    ),
    "unknown task": (
        MINI,
        "[arithmetic]\nmeth",
        "[arithmetics]\nmeth",
        [f"{MINI}:2", "tasks", "'arithmetics'", "did you mean 'arithmetic'?"],
    ),
    "unknown model": (MINI, "[tiny]", "[tinny]", [f"{MINI}:1", "models", "'tinny'", "'tiny'?"]),
    "unknown benchmark": (
        TASK,
        "benchmarks: [arithmetic]",
        "benchmarks: [arithmetick]",
        [TASK, "benchmarks", "'arithmetick'", "did you mean 'arithmetic'?"],
    ),
    "unknown implementation": (
        METHOD,
        "implementation: pissa",
        "implementation: pizza",
        [f"{METHOD}:{LINE}", "implementation", "'pizza'", "did you mean 'pissa'?"],
    ),
    "unknown scorer": (
        BENCHMARK,
        "implementation: gsm8k",
        "implementation: gsm9k",
        [BENCHMARK, "implementation", "'gsm9k'", "did you mean 'gsm8k'?"],
    ),
    "unknown source": (
        TASK,
        "source: arithmetic",
        "source: geometry",
        [TASK, "source", "'geometry'"],
    ),
    "unknown key of a preset": (
        MINI,
        "seeds: [1]",
        "seeds: [1]\nseed: 1",
        [f"{MINI}:5", "seed", "1", "did you mean 'seeds'?"],
    ),
    "unknown key of a task": (
        TASK,
        "learning_rate:",
        "learning_rat: 1\nlearning_rate:",
        [TASK, "learning_rat", "unknown key; did you mean 'learning_rate'?"],
    ),
    "unknown option of a method": (
        METHOD,
        "implementation: pissa",
        "implementation: pissa\noptions: {n_iter: 4}",
        [f"{METHOD}:{LINE + 1}", "options.n_iter", "4", "did you mean 'niter'?"],
    ),
    "unknown option of the data": (
        TASK,
        "data: {seed: 0,",
        "data: {sed: 0,",
        [TASK, "data.sed", "0", "did you mean 'seed'?"],
    ),
    "unknown key to set": (
        MINI,
        "  batch_size: 4",
        "  batchsize: 4",
        [f"{MINI}:9", "set.batchsize", "4", "did you mean 'batch_size'?"],
    ),
    "number that YAML reads as text": (
        TASK,
        "learning_rate: ",
        "learning_rate: 1e-4  # ",
        [TASK, "learning_rate", "'1e-4'", "expected a number", "1.0e-4"],
    ),
    "number as text in the preset": (
        MINI,
        "  batch_size: 4",
        "  batch_size: 4\n  learning_rate: 1e-4",
        [f"{MINI}:10", "learning_rate", "'1e-4'", "expected a number"],
    ),
    "text where a list is due": (
        MINI,
        "seeds: [1]",
        "seeds: 1",
        [f"{MINI}:4", "seeds", "1", "list"],
    ),
    "batch not divisible": (
        MODEL,
        "micro_batch: ",
        "micro_batch: 3  # ",
        [MODEL, "micro_batch", "3", "divisor of 4, the batch size 4", "2, 4"],
    ),
    "targets that match nothing": (
        TASK,
        "[q_proj,",
        "[query,",
        [TASK, "target_modules", "'query'", "known: ", "q_proj"],
    ),
    "rank above the module's size": (
        TASK,
        "rank: 8",
        "rank: 4096",
        [f"{TASK}:6", "rank", "4096", "expected at most"],
    ),
    "prompt without its place": (
        TASK,
        "{instruction}",
        "{question}",
        [TASK, "prompt", "{question}", "{instruction}"],
    ),
    "no training sample": (MINI, "data.train: 42", "data.train: 0", [f"{MINI}:6", "train: 0:"]),
    "key that stands twice": (TASK, "rank: 8", "rank: 8\nrank: 4", [f"{TASK}:7", "rank", "twice"]),
    "broken YAML": (TASK, "rank: 8", "rank: [8", [TASK, "not valid YAML"]),
    "folder without a model": (
        MODEL,
        "workflow/resources/tiny",
        "workflow/resources",
        [MODEL, "path", "'workflow/resources'", "config.json"],
    ),
    "hub model without a commit": (
        MODEL,
        "workflow/resources/tiny",
        "someone/model",
        [MODEL, "revision", "expected the commit", "someone/model"],
    ),
    "seed that stands twice": (
        MINI,
        "seeds: [1]",
        "seeds: [1, 1]",
        [f"{MINI}:4", "seeds", "1", "twice"],
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_known_before_any_job(spoilt: Project, case: str) -> None:
    """The workflow does not start: what is wrong with the configuration stands in one line."""
    name, old, new, expected = BEFORE[case]
    spoilt.edit(name, old, new)
    line = complaint(spoilt.snakemake("--dry-run", status=1))
    fragments(line, *expected)
    assert line in spoilt.tlora("validate", MINI, status=1)


def test_real_run_refuses_as_the_dry_run_does(spoilt: Project) -> None:
    """No job starts either."""
    spoilt.edit(MINI, "pissa, tlora]", "pisa, tlora]")
    spoilt.record()
    complaint(spoilt.snakemake(status=1))
    assert spoilt.calls() == []


def test_missing_preset(spoilt: Project) -> None:
    """`tlora` names the file that is not there."""
    line = complaint(spoilt.tlora("validate", "config/none.yaml", status=1))
    fragments(line, "config/none.yaml", "no such file")


def test_bad_value_on_the_command_line(spoilt: Project) -> None:
    """The origin is named, and values inside lists are read as YAML reads them."""
    line = complaint(spoilt.snakemake("--dry-run", "--config", "seeds=[1,x]", status=1))
    fragments(line, "--config", "seeds.1", "'x'", "whole number")


def gsm8k(project: Project, folder: Path, train: str | None, test: str = "") -> str:
    """Write GSM8K files and a preset that reads them; return the preset."""
    data = folder / "gsm8k"
    data.mkdir(parents=True)
    row = json.dumps({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"})
    if train is not None:
        (data / "train.jsonl").write_text(train)
    (data / "test.jsonl").write_text(test or f"{row}\n")
    name = "config/real.yaml"
    project.path(name).write_text(
        f"models: [tiny]\ntasks: [gsm8k]\nmethods: [lora]\nseeds: [1]\ndata_root: {folder}\n"
    )
    return name


ROW = '{"question": "1 + 1?", "answer": "#### 2"}\n'


def test_missing_data_folder(spoilt: Project) -> None:
    """A `data_root` that does not exist, by file and line, before any job."""
    spoilt.append(MINI, "data_root: nowhere\n")
    line = complaint(spoilt.snakemake("--dry-run", status=1))
    fragments(line, f"{MINI}:13", "data_root", "'nowhere'", "expected a folder")


def test_missing_data_file(spoilt: Project, tmp_path: Path) -> None:
    """A file that the task reads, before any job."""
    preset = gsm8k(spoilt, tmp_path / "data", None)
    line = complaint(spoilt.snakemake("--dry-run", preset=preset, status=1))
    fragments(line, str(tmp_path / "data" / "gsm8k"), "train", ".jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (f'{ROW}{{"question": "1 + 1?"}}\n', ["train.jsonl:2", "'answer'", "missing", "question"]),
        (f"{ROW}{ROW}not json\n", ["train.jsonl:3", "not valid JSON"]),
        (
            f'{ROW}{{"question": 7, "answer": "#### 2"}}\n',
            ["train.jsonl:2", "question", "7", "text"],
        ),
        ('{"question": "1 + 1?", "answer": "two"}\n', ["row 1", "answer", "#### "]),
        ("", ["train.jsonl", "no rows"]),
    ],
    ids=["column missing", "broken line", "wrong type", "no answer", "empty file"],
)
def test_bad_data(spoilt: Project, tmp_path: Path, train: str, expected: list[str]) -> None:
    """What only reading the file shows ends the job with the file and the line."""
    preset = gsm8k(spoilt, tmp_path / "data", train)
    (job,) = (job for job in spoilt.dry(preset=preset) if job.rule == "prepare")
    line = complaint(stage(spoilt, job, tmp_path))
    fragments(line, str(tmp_path / "data" / "gsm8k" / "train.jsonl"), *expected)
    assert not list((tmp_path / "out").glob("[!.]*"))


def stage(
    project: Project,
    job: Job,
    folder: Path,
    place: dict[str, Any] | None = None,
    status: int = 1,
    **changes: Any,
) -> str:
    """Run a job's command, changed, into a folder of its own; it must end with `status`."""
    words = job.arguments
    spec = {**json.loads(words[words.index("--spec") + 1]), **changes}
    changed = {**json.loads(words[words.index("--place") + 1]), **(place or {})}
    changed["work"] = str(folder / "work")
    for option, value in {
        "--spec": json.dumps(spec),
        "--place": json.dumps(changed),
        "--out": str(folder / "out"),
        "--log": str(folder / "log"),
    }.items():
        words[words.index(option) + 1] = value
    return project.tlora(*words, status=status)


@pytest.mark.slow
def test_nothing_left_after_truncation(
    spoilt: Project, jobs: dict[str, Job], tmp_path: Path
) -> None:
    """A limit so short that no target is left."""
    output = stage(spoilt, jobs["prepare tiny/arithmetic"], tmp_path, max_length=3)
    fragments(complaint(output), "max_length", "3", "no training sample", "expected more tokens")
    assert not (tmp_path / "out" / "card.json").exists()


@pytest.mark.slow
def test_batch_above_the_samples(spoilt: Project, jobs: dict[str, Job], tmp_path: Path) -> None:
    """Not one optimizer step comes together."""
    job = jobs["train tiny/arithmetic/lora"]
    output = stage(spoilt, job, tmp_path, batch_size=64)
    fragments(complaint(output), "batch_size", "64", "expected at most 42")


@pytest.mark.slow
def test_loss_that_is_not_finite(spoilt: Project, jobs: dict[str, Job], tmp_path: Path) -> None:
    """Training stops at once; that is a result, which says why and holds no weights."""
    job = jobs["train tiny/arithmetic/full"]
    stage(spoilt, job, tmp_path, status=0, learning_rate=1.0e30)
    card = json.loads((tmp_path / "out" / "train.json").read_text())
    fragments(card["failed"], "loss", "nan", "step", "expected a finite number", "learning rate")
    assert card["files"] == {} and not list((tmp_path / "out" / "weights").iterdir())
    assert "expected a finite number" in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def broken_model(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the base model with one weight that is not a number."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "nan"
    shutil.copytree(project.path("workflow/resources/tiny"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_nan_in_calibration(
    spoilt: Project, jobs: dict[str, Job], broken_model: Path, tmp_path: Path
) -> None:
    """The statistic is refused, not written."""
    job = jobs["calibrate tiny/arithmetic/sensitivity"]
    output = stage(spoilt, job, tmp_path, place={"model": str(broken_model)})
    fragments(complaint(output), "NaN", "calibration sample")
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.slow
def test_adapter_of_another_model(spoilt: Project, jobs: dict[str, Job], tmp_path: Path) -> None:
    """An adapter whose matrices do not fit the base model's is named."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "other"
    shutil.copytree(spoilt.path("workflow/resources/tiny"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size //= 2
    config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    job = jobs["generate tiny/arithmetic/lora/arithmetic"]
    output = stage(spoilt, job, tmp_path, place={"model": str(folder)})
    fragments(complaint(output), "does not fit the base model")
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.slow
def test_changed_weights_are_not_exported(
    checkout: Project, jobs: dict[str, Job], tmp_path: Path
) -> None:
    """train.json vouches for the weights beside it."""
    trained = jobs["train tiny/arithmetic/lora"].arguments
    out = checkout.folder / trained[trained.index("--out") + 1]
    weights = out / "weights" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    output = stage(checkout, jobs["export tiny/arithmetic/lora"], tmp_path)
    fragments(complaint(output), "adapter_model.safetensors", "differs", "delete the folder")
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_completions_from_elsewhere(spoilt: Project, tmp_path: Path) -> None:
    """`tlora score BENCHMARK FILE` names the line that it cannot read."""
    good = json.dumps({"id": "1", "completion": "The answer is: 2", "reference": "#### 2"})
    for text, expected in (
        (f"{good}\n{{oops\n", ["lines.jsonl:2", "not valid JSON"]),
        (f'{good}\n{{"id": "2", "reference": "#### 2"}}\n', ["lines.jsonl:2", "completion"]),
        (f"{good}\n{good}\n", ["lines.jsonl:2", "'1'", "distinct"]),
    ):
        (tmp_path / "lines.jsonl").write_text(text)
        words = ["score", "gsm8k", str(tmp_path / "lines.jsonl")]
        output = spoilt.tlora(*words, "--out", str(tmp_path / "score.json"), status=1)
        fragments(complaint(output), *expected)
    words[1] = "gsm9k"
    output = spoilt.tlora(*words, "--out", str(tmp_path / "score.json"), status=1)
    fragments(complaint(output), "'gsm9k'", "did you mean 'gsm8k'?")
    assert not (tmp_path / "score.json").exists()
