"""The order of samples, the log and its costs, checkpoints, and training itself in small."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlora.artefact import stamped
from tlora.checkpoints import delete_torn, last_checkpoint, seal
from tlora.errors import UserError
from tlora.stages.train import Log, cut, sample_order
from tlora.tasks import tokenised

sizes = st.integers(1, 60)


@given(
    count=sizes,
    batch=st.integers(1, 20),
    epochs=st.floats(0.1, 4, allow_nan=False),
    seed=st.integers(0, 3),
)
def test_order_is_whole_batches_of_permuted_epochs(
    count: int, batch: int, epochs: float, seed: int
) -> None:
    """Only whole global batches, no sample twice an epoch, nothing lost but the ragged end."""
    steps = int(count // batch * epochs)
    if steps == 0:
        with pytest.raises(UserError, match="batch_size"):
            sample_order(count, batch, epochs, seed)
        return
    order, dropped = sample_order(count, batch, epochs, seed)
    assert len(order) == steps * batch
    assert set(order) <= set(range(count))
    epoch = count // batch * batch
    for start in range(0, len(order), epoch):
        part = order[start : start + epoch]
        assert max(Counter(part).values()) == 1
    begun = math.ceil(len(order) / epoch)
    assert dropped == begun * (count - epoch)


@given(count=st.integers(20, 60), batch=st.integers(1, 20), seed=st.integers(0, 5))
def test_order_follows_from_the_seed_alone(count: int, batch: int, seed: int) -> None:
    """Equal seeds agree; more epochs go on where fewer stop; epochs differ from each other."""
    once, _ = sample_order(count, batch, 1, seed)
    twice, _ = sample_order(count, batch, 2, seed)
    assert sample_order(count, batch, 1, seed)[0] == once == twice[: len(once)]
    assert twice[len(once) :] != once
    assert sample_order(count, batch, 1, seed + 1)[0] != once


def test_order_is_not_the_files() -> None:
    """Samples are shuffled, and whatever the batch size, in the same way."""
    order, dropped = sample_order(42, 4, 1, 1)
    assert dropped == 2
    assert order != sorted(order)
    assert sample_order(42, 1, 1, 1)[0][:40] == order


# -- micro batches ---------------------------------------------------------------------------------


def batch_of(lengths: list[int]) -> list[dict[str, Any]]:
    """Return samples of these lengths."""
    return [
        {"id": str(index), "input_ids": [1] * length, "labels": [1] * length}
        for index, length in enumerate(lengths)
    ]


def padded(part: list[dict[str, Any]]) -> int:
    """Return the tokens of a micro batch."""
    return len(part) * max(len(sample["input_ids"]) for sample in part)


def drawn(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return samples whose lengths are like MetaMathQA's."""
    generator = random.Random(seed)
    return batch_of([min(512, round(generator.lognormvariate(5.4, 0.55))) for _ in range(count)])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), data=st.data())
def test_micro_batches_are_the_best_cut(lengths: list[int], data: st.DataObject) -> None:
    """Every sample once; of all cuts that fit memory the least sum of squares."""
    batch = batch_of(lengths)
    least = data.draw(st.integers(1, len(lengths)))
    count = data.draw(st.integers(least, len(lengths)))
    parts = tokenised.micro_batches(batch, count, least)
    assert len(parts) == count and all(parts)
    flat = [sample for part in parts for sample in part]
    assert sorted(s["id"] for s in flat) == sorted(s["id"] for s in batch)
    ordered = sorted(lengths, reverse=True)
    assert [len(sample["input_ids"]) for sample in flat] == ordered
    limit = ordered[0] * math.ceil(len(lengths) / least)
    assert max(map(padded, parts)) <= limit

    def squares(ends: tuple[int, ...]) -> float:
        cut = list(zip([0, *ends], [*ends, len(ordered)], strict=True))
        tokens = [ordered[start] * (end - start) for start, end in cut]
        return sum(t**2 for t in tokens) if max(tokens) <= limit else math.inf

    best = min(map(squares, itertools.combinations(range(1, len(ordered)), count - 1)))
    assert sum(padded(part) ** 2 for part in parts) == best


def test_micro_batches_of_like_length_are_padded_less() -> None:
    """At least 1.3 times fewer tokens than random ones of 8, and no larger ones."""
    for size in (32, 64, 128):
        for seed in range(5):
            batch = drawn(size, seed)
            theirs = [padded(batch[at : at + 8]) for at in range(0, size, 8)]
            ours = [padded(part) for part in tokenised.micro_batches(batch, size // 8)]
            assert sum(theirs) > 1.3 * sum(ours)
            assert max(theirs) > max(ours)


def test_memory_goes_before_less_padding() -> None:
    """The least sum of squares, 2 x 6 and 4 x 5 tokens, is more at once than 3 x 6."""
    parts = tokenised.micro_batches(batch_of([4, 5, 6, 4, 5, 6]), 2)
    assert [len(part) for part in parts] == [3, 3]


def test_samples_of_one_length_are_shared_out_evenly() -> None:
    assert [len(p) for p in tokenised.micro_batches(batch_of([9] * 16), 4)] == [4, 4, 4, 4]


def test_encoder_and_decoder_are_padded_apart() -> None:
    """The longest input and the longest labels of a micro batch may be different samples'."""
    lengths = [(70, 50), (10, 90), (20, 80), (30, 40)]
    batch = [{"input_ids": [1] * a, "labels": [1] * b} for a, b in lengths]
    assert [len(part) for part in tokenised.micro_batches(batch, 2, 1)] == [1, 3]


def test_more_passes_where_they_pay() -> None:
    """Not for equal or short samples; for others up to twice as many, and no more than samples."""
    pays = tokenised.passes_that_pay
    assert pays([batch_of([300] * 8)], 1) == 1
    assert pays([batch_of([10, 20, 30, 40, 10, 20, 30, 40])], 1) == 1
    assert pays([drawn(8, seed) for seed in range(20)], 1) == 2
    assert pays([batch_of([4000] * 2 + [10] * 2)], 2, devices=2) == 2
    assert 4 < pays([drawn(32, seed) for seed in range(20)], 4) <= 8


@pytest.mark.parametrize("micro", [8, 16])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("deepspeed", [None, "zero2.json"])
def test_cut_keeps_the_samples_of_every_step(
    micro: int, processes: int, deepspeed: str | None
) -> None:
    """Whatever the number of processes; ZeRO has the passes that memory asks for."""
    batches = [drawn(32, seed) for seed in range(6)]
    place = {"micro_batch": micro, "processes": processes, "deepspeed": deepspeed}
    passes, parts = cut(batches, place)
    count = passes * processes
    assert len(parts) == count * len(batches)
    for number, batch in enumerate(batches):
        step = parts[number * count : (number + 1) * count]
        found = sorted(int(sample["id"]) for part in step for sample in part)
        assert found == list(range(32))
        assert [len(sample["input_ids"]) for part in step for sample in part] == sorted(
            (len(sample["input_ids"]) for sample in batch), reverse=True
        )
    least = max(1, 32 // micro // processes)
    assert passes == least if deepspeed else least <= passes <= 2 * least
    if not deepspeed and (micro, processes) == (16, 1):
        assert passes > least
    assert cut(batches, place, free=False)[0] == least


# -- partial state ---------------------------------------------------------------------------------


def test_folder_of_another_stamp_is_emptied(tmp_path: Path) -> None:
    """The same stamp finds what it left; another one finds nothing."""
    work = stamped(tmp_path / "work", "one")
    (work / "checkpoint-1").mkdir()
    assert (stamped(tmp_path / "work", "one") / "checkpoint-1").is_dir()
    stamped(tmp_path / "work", "two")
    assert [path.name for path in work.iterdir()] == ["stamp"]
    (work / "log.jsonl").touch()
    (work / "stamp").unlink()
    stamped(tmp_path / "work", "two")
    assert [path.name for path in work.iterdir()] == ["stamp"]


def checkpoint(work: Path, step: int) -> Path:
    """Make a whole checkpoint."""
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"weights of {step}")
    (folder / "trainer_state.json").write_text("{}")
    seal(folder)
    return folder


def test_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    """By number, not by name; one that is torn, or was damaged later, is none."""
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 8)
    whole = checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == whole
    torn = [checkpoint(tmp_path, step) for step in (12, 100, 101, 102)]
    (torn[0] / "manifest.json").unlink()
    (torn[1] / "weights").write_text("weights of 1OO")  # of the same size
    (torn[2] / "manifest.json").write_text("{")
    (torn[3] / "trainer_state.json").unlink()
    delete_torn(tmp_path)
    assert not any(path.exists() for path in torn)
    assert last_checkpoint(tmp_path) == whole
    assert whole.is_dir() and (tmp_path / "checkpoint-8").is_dir()
    (checkpoint(tmp_path, 12) / "manifest.json").unlink()
    assert last_checkpoint(tmp_path) == whole, "not sealed yet"


def row(loss: float = 1.0) -> dict[str, float]:
    """Return what Trainer logs at a step."""
    return {"loss": loss, "learning_rate": 0.1, "grad_norm": 2.0}


def steps(path: Path) -> list[int]:
    """Return the steps of a log."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_log_drops_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    """Steps done again do not stand twice; a line torn by a kill is passed over."""
    log = Log(tmp_path, 10, 2.0)
    log.start(None)
    for step in range(1, 6):
        log.row(step, row())
    with open(log.path, "a") as file:
        file.write('{"step": 6, "lo')
    again = Log(tmp_path, 10, 2.0)
    again.start(checkpoint(tmp_path, 4))
    assert steps(again.path) == [1, 2, 3, 4]
    written = again.row(5, row(0.5))
    assert written["epoch"] == 1.0
    assert steps(again.path) == [1, 2, 3, 4, 5]
    assert (log.attempts, again.attempts) == (1, 2)


def test_cost_adds_up_over_attempts(tmp_path: Path) -> None:
    """A killed attempt is not free."""
    log = Log(tmp_path, 10, 1.0)
    log.start(None)
    log.started -= 100
    log.keep()
    again = Log(tmp_path, 10, 1.0)
    again.start(None)
    assert 100 <= again.seconds() < 110
    assert again.peak > 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_ends_training(tmp_path: Path, loss: float) -> None:
    """The step is named, and nothing is logged."""
    log = Log(tmp_path, 10, 1.0)
    log.start(None)
    with pytest.raises(UserError, match=r"loss: -?(nan|inf) at step 3 of 10: expected a finite"):
        log.row(3, row(loss))
    assert steps(log.path) == []


def test_log_passes_over_what_is_no_step(tmp_path: Path) -> None:
    """Trainer's closing summary; a gradient norm that is not finite becomes null."""
    log = Log(tmp_path, 10, 1.0)
    log.start(None)
    assert log.row(10, {"train_runtime": 3.0, "train_loss": 1.0}) is None
    assert log.row(1, {**row(), "grad_norm": math.inf})["grad_norm"] is None
    assert "NaN" not in log.path.read_text()


# -- training in small -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the embedded model's tokenizer, and 18 prepared samples."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "workflow/resources/tiny")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    samples = []
    for index in range(18):
        # Lengths differ, so that micro batches are padded differently and weigh tokens differently.
        ids = [10 + (7 * index + 3 * at) % 50 for at in range(6 + index)]
        samples.append({"id": str(index), "input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    tokenised.write(folder / "train.parquet", samples)
    (folder / "card.json").write_text("{}")
    return folder


def train(base: Path, out: Path, micro: int, **changes: Any) -> tuple[dict, list[dict]]:
    """Train LoRA on two epochs of the samples; return train.json and the log."""
    from tlora.stages.train import train as stage

    spec = {
        "model": {"architecture": "causal", "dtype": "float32"},
        "implementation": "lora",
        "options": {"lora_dropout": 0.0},
        "rank": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "warmup_ratio": 0.25,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "batch_size": 8,
        "epochs": 2.0,
        "seed": 1,
        **changes,
    }
    place = {
        "model": str(base / "model"),
        "micro_batch": micro,
        "work": str(out / "work"),
        "stamp": "x",
    }
    stage(spec, {"prepare": base / "card.json"}, out / "run", place)
    rows = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
    return json.loads((out / "run/train.json").read_text()), rows


@pytest.mark.slow
def test_micro_batch_changes_no_result(base: Path, tmp_path: Path) -> None:
    """Two samples at a time or eight: the same losses, though padding and lengths differ."""
    from safetensors.torch import load_file

    small, small_rows = train(base, tmp_path / "2", micro=2)
    large, large_rows = train(base, tmp_path / "8", micro=8)
    assert small["steps"] == large["steps"] == 4
    assert small["dropped_samples"] == large["dropped_samples"] == 4
    assert small["tokens"] == large["tokens"]
    for one, other in zip(small_rows, large_rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["learning_rate"] == other["learning_rate"]
    weights = [
        load_file(tmp_path / name / "run/weights/adapter_model.safetensors") for name in "28"
    ]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4


@pytest.mark.slow
def test_shortcuts_are_taken_and_change_no_result(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's one kernel and the chunked loss, beside PEFT's and transformers' own code."""
    from peft.tuners.lora import Linear

    import tlora.adapter
    import tlora.loss

    taken: dict[str, list] = {"fused": [], "loss": []}

    @contextlib.contextmanager
    def fused(model: Any) -> Iterator[None]:
        with original[0](model):
            layers = [module for module in model.modules() if isinstance(module, Linear)]
            taken["fused"].append(all("forward" in vars(layer) for layer in layers) and len(layers))
            yield

    @contextlib.contextmanager
    def chunked_loss(model: Any) -> Iterator[bool]:
        with original[1](model) as used:
            taken["loss"].append(used)
            yield used

    original = tlora.adapter.fused, tlora.loss.chunked_loss
    monkeypatch.setattr(tlora.adapter, "fused", fused)
    monkeypatch.setattr(tlora.loss, "chunked_loss", chunked_loss)
    _, rows = train(base, tmp_path / "ours", micro=8)
    assert taken == {"fused": [6], "loss": [True]}
    monkeypatch.setattr(tlora.adapter, "fused", contextlib.nullcontext)
    monkeypatch.setattr(tlora.loss, "chunked_loss", contextlib.nullcontext)
    _, stock = train(base, tmp_path / "stock", micro=8)
    for one, other in zip(rows, stock, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_seed_decides_order_and_start(base: Path, tmp_path: Path) -> None:
    """The same seed gives the same bytes, another one another order and other weights."""
    one, rows = train(base, tmp_path / "1", micro=8)
    same, _ = train(base, tmp_path / "same", micro=8)
    other, other_rows = train(base, tmp_path / "other", micro=8, seed=2)
    assert one["files"] == same["files"]
    assert one["files"]["adapter_model.safetensors"] != other["files"]["adapter_model.safetensors"]
    assert rows[0]["loss"] != other_rows[0]["loss"]


@pytest.mark.slow
def test_full_training_changes_every_weight(base: Path, tmp_path: Path) -> None:
    """All parameters are trainable and none stays as it was."""
    from safetensors.torch import load_file

    no_adapter = {"rank": None, "lora_alpha": None, "target_modules": None, "options": {}}
    card, _ = train(base, tmp_path, micro=8, implementation="full", **no_adapter)
    assert card["trainable_parameters"] == card["total_parameters"]
    before = load_file(base / "model/model.safetensors")
    after = load_file(tmp_path / "run/weights/model.safetensors")
    assert {name for name in before if (before[name] == after[name]).all()} == set()


@pytest.mark.slow
def test_small_changes_of_bfloat16_weights_add_up(base: Path, tmp_path: Path) -> None:
    """A step changes a weight by less than bfloat16 can tell; all together are as in float32."""
    import torch
    from safetensors.torch import load_file

    values = {"rank": None, "lora_alpha": None, "target_modules": None, "options": {}}
    values |= {"implementation": "full", "learning_rate": 1e-5, "epochs": 10.0, "weight_decay": 0.0}
    before = load_file(base / "model/model.safetensors")
    changes = {}
    for dtype in ("float32", "bfloat16"):
        model = {"architecture": "causal", "dtype": dtype}
        train(base, tmp_path / dtype, micro=8, model=model, **values)
        after = load_file(tmp_path / dtype / "run/weights/model.safetensors")
        assert {str(tensor.dtype) for tensor in after.values()} == {f"torch.{dtype}"}
        found = [(after[name].float() - before[name]).flatten() for name in sorted(before)]
        changes[dtype] = torch.cat(found)
    wanted = changes["float32"]
    share = float(changes["bfloat16"] @ wanted / wanted.square().sum())
    assert share == pytest.approx(1, abs=0.05)
