"""What a preset is said to cost, against closed forms, and against results that are there."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tlora import cli
from tlora.errors import UserError
from tlora.estimate import GB, Assumptions, Cost, Estimate, Row, cached, estimate, rows, table
from tlora.plan import Plan, Unit

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "b" * 40
WIDE, DEEP, LAYERS, WORDS, RANK = 64, 96, 3, 128, 4
TARGETS = {"q_proj": (WIDE, WIDE), "v_proj": (WIDE // 2, WIDE), "down_proj": (WIDE, DEEP)}
ATTENTION = 2 * WIDE * WIDE + 2 * (WIDE // 2) * WIDE
N = LAYERS * (ATTENTION + 3 * WIDE * DEEP + 2 * WIDE) + WIDE + 2 * WORDS * WIDE
A = LAYERS * RANK * sum(sum(shape) for shape in TARGETS.values())
FILES: dict[str, dict[str, Any]] = {
    "models/small": {"path": "org/small", "revision": COMMIT, "dtype": "bfloat16"},
    "tasks/sums": {
        "source": "arithmetic",
        "data": {"train": 20, "validation": 2, "test": 5},
        "prompt": "{instruction}",
        "rank": RANK,
        "lora_alpha": 8,
        "target_modules": list(TARGETS),
        "learning_rate": 0.001,
        "batch_size": 4,
        "epochs": 2,
        "max_length": 100,
        "calibration_samples": 5,
        "benchmarks": ["sums"],
    },
    "benchmarks/sums": {
        "source": "arithmetic",
        "data": {"test": 5},
        "implementation": "gsm8k",
        "max_new_tokens": 8,
    },
    "p": {"models": ["small"], "tasks": ["sums"], "seeds": [1]},
    **{f"methods/{name}": {"implementation": name} for name in ("full", "lora", "dora_", "tlora")},
}
FILES["methods/dora"] = {"implementation": "lora", "options": {"use_dora": True}}
FILES["methods/corda"] = {"implementation": "corda"}
del FILES["methods/dora_"]
ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDE,
    "intermediate_size": DEEP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
}
# A GPU of one FLOP a second that needs no time for anything else.
PLAIN = {"tflops": 1e-12, "utilisation": 1, "svd_tflops": 1e-12, "start": 1e-9, "load": 1e9}
PLAIN |= {"cpu_below": 1e-9, "step_ms": 1e-9, "bandwidth": 1e30}
TOKENS = 20 * 100  # every sample is cut to max_length


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration with a small model of the hub, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, values in FILES.items():
        path = Path("config", f"{name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False))
    Path("config/models/architectures").mkdir()
    Path("config/models/architectures/small.json").write_text(json.dumps(ARCHITECTURE))
    return tmp_path


def plan(*methods: str, **more: Any) -> Plan:
    """Plan the preset with some methods."""
    return Plan([Path("config/p.yaml")], {"methods": list(methods), **more})


def of(found: Estimate, stage: str) -> Row:
    """Return the row of a stage."""
    return {row.stage: row for row in found.rows}[stage]


def cost(found: Estimate, stage: str) -> Cost:
    """Return what the jobs of a stage that are to do take."""
    return of(found, stage).cost


def made(unit: Unit, **files: dict) -> None:
    """Write an artefact's files."""
    unit.folder.mkdir(parents=True)
    for name, content in files.items():
        (unit.folder / f"{name}.json").write_text(json.dumps(content))
    if unit.stage == "generate":
        unit.main.write_text("")


@pytest.mark.parametrize(
    ("method", "flops"),
    [("full", 6 * N), ("lora", 4 * N + 6 * A), ("tlora", 4 * N + 3 * A)],
)
def test_training(method: str, flops: float) -> None:
    """6 N a token for all weights, 4 N + 6 A for adapters; TLoRA trains B alone."""
    if method == "tlora":
        frozen = LAYERS * RANK * sum(shape[1] for shape in TARGETS.values())
        flops = 4 * N + 6 * (A - frozen)
    found = estimate(plan(method), Assumptions(**PLAIN))
    assert cost(found, "train").gpu == pytest.approx(2 * TOKENS * flops, rel=1e-6)
    assert cost(found, "train").cpu == 0


def test_every_job_starts_and_loads_its_model() -> None:
    """Both add to the time of what it computes, on every device."""
    at_rest = PLAIN | {"start": 7, "load": 2 * N / GB / 11}
    found = estimate(plan("full"), Assumptions(**at_rest))
    assert cost(found, "train").gpu == pytest.approx(2 * TOKENS * 6 * N + 7 + 11)
    path = Path("config/models/small.yaml")
    path.write_text(path.read_text() + "gpus: 2\n")
    found = estimate(plan("full"), Assumptions(**at_rest))
    assert cost(found, "train").gpu == pytest.approx(2 * TOKENS * 6 * N + 2 * (7 + 11))


def test_a_small_model_runs_on_cores() -> None:
    """Below `cpu_below` nothing is counted as a GPU's."""
    found = estimate(plan("full", "tlora"), Assumptions())
    assert sum(row.cost.gpu for row in found.rows) == 0
    assert cost(found, "train").cpu > 2 * 30


def test_a_sketch_takes_products_and_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decomposition: two runs through the samples, and seven products with each weight."""
    from tlora.methods import tlora

    monkeypatch.setattr(tlora, "sketches", tlora.reads_batches, raising=False)
    found = estimate(plan("tlora"), Assumptions(**PLAIN))
    tokens, expected = 5 * 100, 4 * N * 5 * 100
    for out, width in TARGETS.values():
        rows = min(RANK + 32, out)
        expected += LAYERS * rows * (8 * tokens + 14 * out) * width
    assert cost(found, "initialize").gpu == pytest.approx(expected)


def test_calibration_and_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLoRA: a pass forward and backward; CorDA: forward, and a matrix for every target."""
    from tlora.methods import tlora

    monkeypatch.delattr(tlora, "sketches", raising=False)
    found = estimate(plan("tlora"), Assumptions(**PLAIN))
    assert cost(found, "calibrate").gpu == pytest.approx(6 * N * 5 * 100)
    assert cost(found, "calibrate").kept == 0
    svd = 10 * LAYERS * sum(math.prod(s) * min(s) for s in TARGETS.values())
    assert cost(found, "initialize").gpu == pytest.approx(svd + 2 * N * 5 * 100)
    found = estimate(plan("corda"), Assumptions(**PLAIN))
    squares = LAYERS * sum(shape[1] ** 2 for shape in TARGETS.values())
    assert cost(found, "calibrate").gpu == pytest.approx(2 * (N + squares) * 5 * 100)
    assert cost(found, "calibrate").kept == 4 * squares


def test_decoding_reads_weights_and_cache() -> None:
    """A step reads all weights, and keys and values of every sequence so far."""
    given = PLAIN | {"tflops": 1e12, "bandwidth": 1 / GB, "batch": 2, "completion": 1}
    found = estimate(plan("full"), Assumptions(**given, tokens_per_sample=50))
    a_token = 2 * LAYERS * 2 * (WIDE // 4) * 2
    step = 2 * N + 2 * (50 + 4) * a_token
    # Of the base model and of the trained one: five records, two at once, eight tokens.
    assert cost(found, "generate").gpu == pytest.approx(2 * 3 * 8 * step, rel=1e-6)
    slow = estimate(plan("full"), Assumptions(**{**given, "bandwidth": 1e30, "step_ms": 500}))
    assert cost(slow, "generate").gpu == pytest.approx(2 * 3 * 8 * 0.5, rel=1e-6)


def test_disk() -> None:
    """Weights in the model's own format and adapters in float32 are kept; what else is not."""
    found = estimate(plan("full", "lora", "dora"), Assumptions(jobs=1, dataset_gb=1e-12))
    magnitudes = LAYERS * sum(shape[0] for shape in TARGETS.values())
    dora = A + magnitudes
    assert cost(found, "train").kept == 2 * N + 4 * A + 4 * dora
    # Two checkpoints, each with weights and two states of Adam.
    adapters = [2 * 3 * 4 * A, 2 * 3 * 4 * dora]
    assert sorted(of(found, "train").temporary) == sorted([*adapters, 2 * 3 * 2 * N])
    # Full weights are linked, DoRA's are merged into a copy.
    assert cost(found, "export").kept == 4 * A + 2 * N
    assert cost(found, "export").temporary == 0
    assert found.kept == sum(row.cost.kept for row in found.rows)
    assert found.peak == found.kept + 2 * 3 * 2 * N
    more = estimate(plan("full", "lora", "dora"), Assumptions(jobs=2, dataset_gb=1e-12))
    assert more.peak - found.peak == max(adapters)


def test_an_initialised_adapter_may_have_twice_the_rank() -> None:
    """A frozen A is stored as well."""
    found = estimate(plan("tlora"), Assumptions())
    assert cost(found, "initialize").kept == cost(found, "train").kept == 4 * A
    assert cost(found, "export").kept == 2 * 4 * A


def test_what_is_in_the_cache_is_not_fetched(here: Path) -> None:
    """A snapshot counts only where it is whole."""
    both = plan("full", models=["small"])
    assert cost(estimate(both, Assumptions()), "download").transfer == 2 * N
    item = both.of("download")[0].spec["items"][0]
    snapshot = here / "hub" / "models--org--small" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert not cached(item)
    (snapshot / "config.json").write_text("{}")
    assert not cached(item), "no weights"
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    assert not cached(item), "a link to nothing"
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").write_text("")
    assert cached(item)
    parts = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(parts))
    (snapshot / "model-1.safetensors").write_text("")
    assert not cached(item), "one part of two"
    (snapshot / "model-2.safetensors").write_text("")
    assert cached(item)
    assert not cached({**item, "revision": "c" * 40})
    assert cost(estimate(both, Assumptions()), "download").transfer == 0


def test_results_stand_in_for_assumptions() -> None:
    """A data card's tokens, and the seconds of a run that differs in seed and rate alone."""
    found = plan("full", "lora", seeds=[1, 2])
    made(found.of("prepare")[0], card={"counts": {"train": 10}, "tokens": {"train": 123}})
    first = estimate(found, Assumptions(**PLAIN))
    assert cost(first, "train").gpu == pytest.approx(2 * 2 * 123 * (10 * N + 6 * A), rel=1e-6)
    assert (of(first, "prepare").todo, of(first, "prepare").done) == (0, 1)
    assert cost(first, "prepare").cpu == 0
    assert first.measured == {"prepare": 1}

    full = [unit for unit in found.of("train") if unit.spec["implementation"] == "full"]
    made(full[0], train={"train_seconds": 1000.0})
    second = estimate(found, Assumptions(**PLAIN))
    lora = 2 * 2 * 123 * (4 * N + 6 * A)
    assert cost(second, "train").gpu == pytest.approx(1000 + lora, rel=1e-6)
    assert (of(second, "train").todo, of(second, "train").done) == (3, 1)
    assert second.measured == {"prepare": 1, "train": 1}

    generates = found.of("generate")
    made(generates[0], generate={"seconds": 50.0, "tokens": 1})
    third = estimate(found, Assumptions(**PLAIN))
    assert cost(third, "generate").gpu == pytest.approx(50 * (len(generates) - 1))
    assert third.measured == {"prepare": 1, "train": 1, "generate": 1}
    assert "1 data cards, 1 training runs, 1 generations" in table(third)


def test_records_are_counted_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded data is made, `samples` counts, and a source's own word goes first."""
    from tlora.tasks import metamath

    data = {"train": 7, "validation": 1, "test": 3}
    assert rows("arithmetic", data, "train", None) == 7
    assert rows("arithmetic", data, "test", None) == 3
    assert rows("metamath", {"samples": 77}, "train", None) == 77

    def said(data: Any, split: str) -> int:
        return data.samples - 1 if split == "train" else 5

    monkeypatch.setattr(metamath, "rows", said, raising=False)
    assert rows("metamath", {"samples": 78}, "train", None) == 77
    assert rows("metamath", {"samples": 78}, "validation", None) == 5


def test_local_records_are_counted(here: Path) -> None:
    """Where data_root has them."""
    folder = here / "data" / "gsm8k"
    folder.mkdir(parents=True)
    row = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"})
    (folder / "test.jsonl").write_text(f"{row}\n" * 3)
    assert rows("gsm8k", {}, "test", str(here / "data")) == 3


def test_runs_that_follow_trials_are_counted() -> None:
    """Before the choice with the first trial's values, after it with the winner's."""
    plain = of(estimate(plan("lora", seeds=[1, 2]), Assumptions()), "train")
    tune = {"grid": {"learning_rate": [0.1, 0.01, 0.001]}}
    found = estimate(plan("lora", seeds=[1, 2], tune=tune), Assumptions())
    assert (of(found, "train").todo, of(found, "choose").todo) == (2 + 3, 1)
    assert of(found, "train").cost.gpu == pytest.approx(plain.cost.gpu * 5 / 2)
    assert found.choices == 1 and "have yet to make: 1." in table(found)
    # The validation split has 2 records, the test set 5; the base model is asked once.
    assert of(found, "generate").todo == 1 + 2 + 3

    planned = plan("lora", seeds=[1, 2], tune=tune)
    made(planned.choices[0].unit, chosen={"settings": {"learning_rate": 0.01}})
    after = estimate(plan("lora", seeds=[1, 2], tune=tune), Assumptions())
    assert (of(after, "train").todo, of(after, "choose").done, after.choices) == (5, 1, 0)


def test_the_table_names_every_stage_and_every_assumption(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And its options change what it says."""
    assert cli.main(["plan", "config/p.yaml", "--config", "methods=[full]", "--jobs", "3"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    head = lines[0].split()
    assert head[0] == "Stage"
    stages = " ".join(line.split()[0] for line in lines[2 : lines.index("") - 2])
    assert stages == "download overlap prepare train export check generate score"
    total = lines[lines.index("") - 1].split()
    assert total[:3] == ["total", "10", "0"]
    assert "with 3 jobs at once" in text
    for option in ("--tflops", "--utilisation", "--tokens-per-sample", "--train-rows"):
        assert any(line.split()[:1] == [option] for line in lines)


def test_a_number_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line."""
    with pytest.raises(UserError, match="--tokens-per-sample: 0: expected a number above 0"):
        Assumptions(tokens_per_sample=0)
    assert cli.main(["plan", "config/p.yaml", "--config", "methods=[full]", "--tflops", "-1"]) == 1
    assert capsys.readouterr().err == "tlora: error: --tflops: -1.0: expected a number above 0\n"


def local_data(folder: Path) -> Path:
    """Write what the paper's presets read from disk: a record each, in place of thousands."""
    labels = {"instruction": "?", "input": "", "output": "true", "answer": "true"}
    sets = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande")
    for name in (*sets, "ARC-Easy", "ARC-Challenge", "openbookqa"):
        path = folder / "commonsense" / name / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([labels]))
    (folder / "commonsense/commonsense_170k.json").write_text(json.dumps([labels]))
    for name in ("humaneval/HumanEvalPlus-v0.1.10", "mbpp/MbppPlus-v0.2.0"):
        path = folder / f"{name}.jsonl.gz"
        path.parent.mkdir()
        with gzip.open(path, "wt") as file:
            file.write("{}\n")
    (folder / "mtbench/reference_answer").mkdir(parents=True)
    for name in ("question", "judge_prompts", "reference_answer/gpt-4"):
        (folder / f"mtbench/{name}.jsonl").write_text("{}\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "paper_tuned"])
def test_the_papers_presets_take_less_than_a_minute(here: Path, name: str) -> None:
    """Of a processor's time: this machine may be busy."""
    shutil.rmtree("config")
    shutil.copytree(ROOT / "config", "config")
    root = local_data(here / "data")
    code = (
        "import resource, sys; from tlora import cli\n"
        f"words = ['plan', 'config/{name}.yaml', '--config', 'data_root={root}']\n"
        "status = cli.main(words)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.split()[-1]) < 60
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    jobs = {stage: int(lines[stage][1].replace(",", "")) for stage in ("train", "total")}
    tuned = name == "paper_tuned"
    # 136 runs; tuned each has five trials and three seeds.
    assert jobs["train"] == 136 * (8 if tuned else 1)
    assert jobs["total"] > 1000
    assert ("have yet to make" in done.stdout) == tuned
