"""Trials: what is refused, what they become, which of them wins, and how losses are judged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from tlora.artefact import read_json, write_json
from tlora.benchmarks import load
from tlora.errors import UserError
from tlora.plan import Plan
from tlora.stages.choose import choose, edges

FILES = {
    "models/tiny": {"path": "base", "micro_batch": 8},
    "tasks/sums": {
        "source": "arithmetic",
        "data": {"train": 20, "validation": 6, "test": 5},
        "prompt": "{instruction}",
        "rank": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "learning_rate": 0.001,
        "batch_size": 4,
        "benchmarks": ["sums"],
    },
    "methods/lora": {"implementation": "lora"},
    "methods/tlora": {"implementation": "tlora"},
    "benchmarks/sums": {
        "source": "arithmetic",
        "data": {"test": 5},
        "implementation": "gsm8k",
        "max_new_tokens": 8,
    },
}
PRESET: dict[str, Any] = {
    "models": ["tiny"],
    "tasks": ["sums"],
    "methods": ["lora", "tlora"],
    "seeds": [1, 2],
    "tune": {"grid": {"learning_rate": [0.1, 0.01]}},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model's files and a configuration."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shape = [32, 32]
    weight = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4096]}
    header = json.dumps({"model.layers.0.self_attn.q_proj.weight": weight}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    for name, values in FILES.items():
        write(name, values)
    return tmp_path


def write(name: str, values: dict[str, Any]) -> None:
    path = Path(f"config/{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))


def plan(**changes: Any) -> Plan:
    write("p", {**PRESET, **changes})
    return Plan([Path("config/p.yaml")])


def test_every_method_has_the_same_number_of_trials_on_the_validation_split() -> None:
    """One seed, judged by records carved from the training data, never by the test set."""
    found = plan()
    assert [len(choice.trials) for choice in found.choices] == [2, 2]
    assert [cell.row.name for cell in found.cells] == ["base"]
    trials = [trial for choice in found.choices for trial in choice.trials]
    assert {trial.seed for trial in trials} == {0}
    assert [t.settings["learning_rate"].value for t in trials] == [0.1, 0.01] * 2
    for trial in trials:
        assert list(trial.scores) == ["validation"]
        spec = trial.generates["validation"].spec
        assert spec["benchmark"]["split"] == "validation"
        assert spec["benchmark"]["data"] == trial.units["prepare"].spec["data"]
        assert spec["prompt"] == "{instruction}"
    # Calibration and initialisation are shared by all trials of a method.
    assert len(found.of("calibrate")) == len(found.of("initialize")) == 1


def chosen(found: Plan, index: int, winner: int) -> None:
    unit = found.choices[index].unit
    trials = unit.spec["trials"]
    content = {"trials": trials, "winner": winner, "settings": trials[winner]["settings"]}
    write_json(unit.main, content)


def test_runs_with_fresh_seeds_follow_the_choice() -> None:
    """Only once it is made; other trials with the same winner ask for the same runs."""
    found = plan()
    chosen(found, 0, 1)
    found = plan()
    runs = [cell for cell in found.cells if not cell.base]
    assert [(cell.row.name, cell.seed) for cell in runs] == [("lora", 1), ("lora", 2)]
    rate = runs[0].settings["learning_rate"]
    assert (rate.value, rate.source) == (0.01, str(found.choices[0].unit.main))
    assert runs[0].units["train"].spec["learning_rate"] == 0.01
    assert list(runs[0].scores) == ["sums"]

    before = {trial.units["train"].id for trial in found.choices[0].trials}
    more = plan(tune={"grid": {"learning_rate": [0.1, 0.01, 0.003]}})
    after = {trial.units["train"].id for trial in more.choices[0].trials}
    assert before < after and len(after) == 3
    assert more.choices[0].unit.id != found.choices[0].unit.id and not more.choices[0].cells
    chosen(more, 0, 1)
    again = plan(tune={"grid": {"learning_rate": [0.1, 0.01, 0.003]}})
    confirmed = [cell.units["train"].id for cell in again.choices[0].cells]
    assert confirmed == [cell.units["train"].id for cell in runs]


def test_grids_of_single_methods_and_several_fields() -> None:
    """Every combination is a trial; a method's own grid stands in place of the common one."""
    grid = {"learning_rate": [0.1, 0.01], "lora_alpha": [4.0, 8.0]}
    own = {"tlora": {"learning_rate": [1.0, 2.0, 3.0, 4.0]}}
    found = plan(tune={"grid": grid, "methods": own})
    assert found.trials("lora") == [
        {"learning_rate": rate, "lora_alpha": alpha} for rate in (0.1, 0.01) for alpha in (4.0, 8.0)
    ]
    assert [trial.trial["learning_rate"] for trial in found.choices[1].trials] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [0, 1]}, r"p.yaml:\d+: seeds: 0: expected none that tune.seed has"),
        ({"tune": {"grid": {}}}, r"p.yaml:\d+: tune.grid: expected \{key: \[values\]\}"),
        ({"tune": {"grid": {"learning_rate": []}}}, "expected different values"),
        ({"tune": {"grid": {"learning_rate": [0.1, 0.1]}}}, "expected different values"),
        ({"tune": {"grid": {"learningrate": [0.1]}}}, "unknown key; did you mean 'learning_rate'"),
        ({"tune": {"grid": {"learning_rate": [-1.0]}}}, r"p.yaml:\d+: learning_rate: -1.0"),
        ({"set": {"learning_rate": 0.1}}, "set has it too: expected one of the two"),
        ({"vary": [{"learning_rate": [0.5]}]}, "vary has it too: expected one of the two"),
        (
            {
                "tune": {
                    "grid": {"learning_rate": [0.1, 0.2]},
                    "methods": {"tlora": {"learning_rate": [0.1]}},
                }
            },
            r"p.yaml:\d+: tune.methods.tlora: 1 trials of tlora, 2 of lora: expected equally many",
        ),
        (
            {"tune": {"grid": {"learning_rate": [0.1]}, "methods": {"dora": {"rank": [1]}}}},
            "tune.methods: 'dora': not in this preset",
        ),
        ({"set": {"data.validation": 0}}, "data.validation: 0: expected a number of records"),
    ],
)
def test_unfair_or_contradictory_grids_are_refused(changes: dict[str, Any], message: str) -> None:
    """In one line, before anything runs."""
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_a_task_without_rules_is_judged_by_its_loss() -> None:
    """The trial's own prepared validation samples are read, by plain transformers."""
    write("tasks/sums", {**FILES["tasks/sums"], "validation": "loss"})
    (trial, _) = plan(backend="vllm").choices[0].trials
    unit = trial.generates["validation"]
    assert unit.inputs["prepare"] is trial.units["prepare"]
    assert unit.spec["benchmark"]["likelihood"] == trial.units["prepare"].id
    assert unit.spec["backend"] == "transformers"
    assert trial.scores["validation"].spec["implementation"] == "likelihood"


# ---------------------------------------------------------------- the winner


def compare(folder: Path, scores: list[dict[str, Any]], tried: list[dict[str, Any]]) -> dict:
    inputs = {}
    for number, score in enumerate(scores):
        inputs[f"trial{number}"] = folder / f"{number}.json"
        write_json(inputs[f"trial{number}"], score)
    trials = [{"settings": one, "score": str(n)} for n, one in enumerate(tried)]
    choose({"trials": trials}, inputs, folder, {})
    return read_json(folder / "chosen.json")


def accuracy(value: float) -> dict[str, Any]:
    return {"metric": "accuracy", "value": value, "n": 10}


RATES = [{"learning_rate": rate} for rate in (0.001, 0.003, 0.01)]


@pytest.mark.parametrize(
    "values, winner, edge",
    [
        ((0.1, 0.3, 0.2), 1, {}),
        ((0.1, 0.2, 0.3), 2, {"learning_rate": "upper"}),
        ((0.3, 0.2, 0.1), 0, {"learning_rate": "lower"}),
        ((0.1, 0.3, 0.3), 1, {}),
        ((None, 0.1, None), 1, {}),
    ],
)
def test_best_trial_wins(
    tmp_path: Path, values: tuple[float | None, ...], winner: int, edge: dict[str, str]
) -> None:
    """The first of equally good ones; failed ones stay on record."""
    scores = [{"failed": "loss: nan"} if v is None else accuracy(v) for v in values]
    found = compare(tmp_path, scores, RATES)
    assert (found["winner"], found["edges"]) == (winner, edge)
    assert found["settings"] == RATES[winner]
    assert [trial["value"] for trial in found["trials"]] == list(values)
    assert [trial.get("failed") for trial in found["trials"]] == [
        "loss: nan" if v is None else None for v in values
    ]


def test_lower_losses_are_better(tmp_path: Path) -> None:
    """What the score says of its metric counts."""
    scores = [
        {"metric": "loss", "value": value, "n": 4, "higher_is_better": False}
        for value in (2.0, 1.5, 1.7)
    ]
    assert compare(tmp_path, scores, RATES)["winner"] == 1


def test_nothing_to_choose_from_is_said(tmp_path: Path) -> None:
    """All trials failed, or they were judged differently."""
    with pytest.raises(UserError, match="all 3 trials failed: a; b; c"):
        compare(tmp_path, [{"failed": reason} for reason in "abc"], RATES)
    mixed = [accuracy(0.1), {**accuracy(0.2), "n": 11}, accuracy(0.3)]
    with pytest.raises(UserError, match="trials differ in metric or items"):
        compare(tmp_path, mixed, RATES)


def test_edges_are_of_numbers_that_were_varied() -> None:
    """Words have no order, single values no end; the order of the grid does not count."""
    tried = [{"rate": rate, "schedule": word, "rank": 8} for rate in (3, 1, 2) for word in "ab"]
    assert edges(tried, {"rate": 3, "schedule": "a", "rank": 8}) == {"rate": "upper"}
    assert edges(tried, {"rate": 2, "schedule": "b", "rank": 8}) == {}


# ---------------------------------------------------------------- losses


def test_losses_are_those_of_transformers() -> None:
    """Alone and padded in a batch, for both kinds of models; float64 of the library's own loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    from tlora.generation.likelihood import losses

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    shape = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    t5 = T5Config(vocab_size=50, decoder_start_token_id=0, **shape)
    draw = torch.Generator().manual_seed(1)
    lengths = [3, 9, 5, 12, 4, 7, 6, 8, 10, 11]

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 50, (count,), generator=draw).tolist()

    for model in (LlamaForCausalLM(llama).eval(), T5ForConditionalGeneration(t5).eval()):
        seq2seq = model.config.is_encoder_decoder
        samples = []
        for number, length in enumerate(lengths):
            inputs = tokens(length)
            labels = tokens(2 + number) if seq2seq else [-100, *inputs[1:]]
            samples.append({"id": str(number), "input_ids": inputs, "labels": labels})
        rows = losses(model, samples, pad_token_id=0)
        assert [row["id"] for row in rows] == [sample["id"] for sample in samples]
        for row, sample in zip(rows, samples, strict=True):
            with torch.inference_mode():
                alone = model(
                    input_ids=torch.tensor([sample["input_ids"]]),
                    labels=torch.tensor([sample["labels"]]),
                ).loss.item()
            assert row["tokens"] == sum(label != -100 for label in sample["labels"])
            assert row["loss"] / row["tokens"] == pytest.approx(alone, rel=1e-5)


def test_mean_loss_is_over_tokens() -> None:
    """Long answers count more, as in training."""
    rows = [
        {"id": "a", "completion": "", "reference": None, "loss": 6.0, "tokens": 2},
        {"id": "b", "completion": "", "reference": None, "loss": 2.0, "tokens": 6},
    ]
    found = load("likelihood").score(rows)
    assert (found["metric"], found["value"], found["n"]) == ("loss", 1.0, 2)
    assert found["higher_is_better"] is False
    assert [item["value"] for item in found["items"]] == [3.0, pytest.approx(1 / 3)]
    assert load("likelihood").score([{**rows[0], "loss": None}]) == {
        "failed": "item 'a': the loss is no finite number"
    }
    with pytest.raises(UserError, match="item 'a': loss, tokens"):
        load("likelihood").score([{"id": "a", "completion": "x", "reference": "y"}])
