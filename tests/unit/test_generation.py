"""Generation: the tokens of a plain greedy loop whatever the batch, stops, adapters, resuming."""

import dataclasses
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlora.artefact import sha256_tree, write_json
from tlora.errors import UserError
from tlora.generation import Completion, Prompt, first_stop, prompt_seed
from tlora.generation import transformers as backends
from tlora.stages.generate import Partial, benchmark_records, generate
from tlora.tasks import arithmetic
from tlora.tasks.prompts import encode, encode_prompt, render

torch = pytest.importorskip("torch")

KINDS = ["llama", "mistral", "gpt2", "t5"]
TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:"


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token a byte, and the beginning marked as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_model(kind: str, context: int = 512) -> Any:
    """Return a small random model with varied greedy text of printable ASCII characters.

    Its weights are far from zero; a saved copy speaks all bytes.
    """
    import transformers

    torch.manual_seed(1)
    shared: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 2}
    if kind == "t5":
        config = transformers.T5Config(
            **shared,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            **shared, n_embd=32, n_layer=2, n_head=4, n_positions=context, bos_token_id=1
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind](
            **shared,
            bos_token_id=1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            **({"sliding_window": 24, "head_dim": 8} if kind == "mistral" else {}),
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
    scale = 1.0 if kind == "t5" else 0.3
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                embedding = any(word in name for word in ("emb", "wte", "shared"))
                weight.normal_(0, 1.0 if embedding else scale)
    others = torch.arange(97, 259)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, others, -1e9)
    )
    return model.eval()


def prompts(count: int, longest: int = 60) -> list[Prompt]:
    """Return prompts of many lengths."""
    rng = random.Random(0)
    return [
        Prompt(f"p{i}", (1, *(rng.randrange(3, 259) for _ in range(rng.randint(1, longest)))))
        for i in range(count)
    ]


def run(backend: Any, asked: list[Prompt], new: int, stop: list[str]) -> dict[str, Completion]:
    """Return all completions by id, and check that each prompt has one."""
    found = [item for batch in backend.generate(asked, new, stop) for item in batch]
    assert sorted(item.id for item in found) == sorted(item.id for item in asked)
    return {item.id: item for item in found}


def plain_greedy(model: Any, prompt: Prompt, new: int) -> list[int]:
    """Return what argmax gives, one prompt at a time, without padding, mask or cache."""
    ids, made = list(prompt.input_ids), []
    with torch.no_grad():
        for _ in range(new):
            if model.config.is_encoder_decoder:
                start = model.config.decoder_start_token_id
                logits = model(
                    input_ids=torch.tensor([ids]),
                    decoder_input_ids=torch.tensor([[start, *made]]),
                ).logits
            else:
                logits = model(input_ids=torch.tensor([ids + made]), use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
            if made[-1] == 2:
                break
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_a_plain_loop_whatever_the_batch(kind: str) -> None:
    model, tokenizer = tiny_model(kind), byte_tokenizer()
    asked = prompts(16)
    results = [
        run(backends.TransformersBackend(model, tokenizer, rows), asked, 32, [])
        for rows in (1, 5, 16)
    ]
    assert results[0] == results[1] == results[2]
    for prompt in asked[:4]:
        tokens = plain_greedy(model, prompt, 32)
        ended = tokens[-1] == 2
        text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        assert results[0][prompt.id] == Completion(
            prompt.id, text, "eos" if ended else "length", len(prompt.input_ids), len(tokens)
        )
    assert len({item.text for item in results[0].values()}) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_and_ends_cut_alike_in_every_batch(kind: str) -> None:
    model, tokenizer = tiny_model(kind), byte_tokenizer()
    asked = prompts(24)
    free = run(backends.TransformersBackend(model, tokenizer, 24), asked, 48, [])
    # Stop strings of several tokens that occur in about half of the completions.
    texts = [item.text for item in free.values()]
    stops = ["never there"]
    while sum(first_stop(text, stops) >= 0 for text in texts) < 8:
        text = next(text for text in texts if first_stop(text, stops) < 0 and len(text) > 12)
        stops.append(text[8:11])
    stops.append(stops[1][:2])
    seen = set()
    for rows in (1, 24):
        cut = run(backends.TransformersBackend(model, tokenizer, rows), asked, 48, stops)
        for prompt in asked:
            whole, item = free[prompt.id], cut[prompt.id]
            at = first_stop(whole.text, stops)
            assert item.text == (whole.text[:at] if at >= 0 else whole.text)
            assert item.finish_reason == ("stop" if at >= 0 else whole.finish_reason)
            if at >= 0:
                tokens = plain_greedy(model, prompt, item.completion_tokens)
                assert first_stop(tokenizer.decode(tokens, skip_special_tokens=True), stops) >= 0
                before = tokenizer.decode(tokens[:-1], skip_special_tokens=True)
                assert first_stop(before, stops) < 0
            seen.add(item.finish_reason)
    assert {"stop", "length"} <= seen


def test_finished_rows_leave_and_a_finished_batch_ends() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    asked = prompts(16)
    backend = backends.TransformersBackend(model, tokenizer, 16)
    plain = [plain_greedy(model, prompt, 64) for prompt in asked]
    # End tokens: some completions reach one, a few never do.
    ends: set[int] = {2}
    for token in range(3, 97):
        gone = [row for row in plain if not (ends | {token}).isdisjoint(row)]
        if len(gone) <= 13:
            ends.add(token)
    assert sum(not ends.isdisjoint(row[:30]) for row in plain) >= 8
    backend.rules = dataclasses.replace(backend.rules, ends=frozenset(ends))
    model.generation_config.eos_token_id = sorted(ends)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    found = run(backend, asked, 64, [])
    hook.remove()
    assert sizes[0] == 16 and sizes[-1] <= 8 and sizes == sorted(sizes, reverse=True)
    for prompt, tokens in zip(asked, plain, strict=True):
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[:end]
        assert found[prompt.id].text == tokenizer.decode(kept, skip_special_tokens=True)
        assert found[prompt.id].finish_reason == ("length" if end is None else "eos")

    sizes.clear()
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append(1))
    backend.rules = dataclasses.replace(backend.rules, ends=frozenset({2}))
    model.generation_config.eos_token_id = [2]
    everywhere = [chr(code) for code in range(33, 127)]
    run(backend, asked, 500, everywhere)
    hook.remove()
    assert len(sizes) <= backends.CHECK_EVERY


def test_stop_of_many_bytes_is_found() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    assert tokenizer.decode(tokenizer("Größe – 数")["input_ids"], skip_special_tokens=True) == (
        "Größe – 数"
    )
    backend = backends.TransformersBackend(model, tokenizer)
    ids = tokenizer("größer – 数! Größe – 数!", add_special_tokens=False)["input_ids"]
    item = backend.rules.completion(Prompt("a", (1,)), ids, 500, ["nowhere", "Größe – 数"])
    assert (item.text, item.finish_reason) == ("größer – 数! ", "stop")
    assert tokenizer.decode(ids[: item.completion_tokens]).endswith("Größe – 数")
    watch = backends._Watch(backend.rules, [500], ["Größe – 数"], start=0)
    assert watch.finished(torch.tensor([ids[: item.completion_tokens - 1]])) == [False]
    assert watch.finished(torch.tensor([ids])) == [True]


def test_the_models_own_sampling_settings_are_put_aside() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    plain = run(backends.TransformersBackend(model, tokenizer), prompts(4), 20, [])
    model = tiny_model("llama")
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2, max_length=5
    )
    assert run(backends.TransformersBackend(model, tokenizer), prompts(4), 20, []) == plain


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_context_bounds_prompts_and_completions(kind: str) -> None:
    model, tokenizer = tiny_model(kind, context=64), byte_tokenizer()
    backend = backends.TransformersBackend(model, tokenizer, 8)
    asked = [Prompt(str(n), tuple(range(3, 3 + n))) for n in (63, 62, 60, 60, 40, 8, 5)]
    asked = [Prompt(f"{at}", prompt.input_ids) for at, prompt in enumerate(asked)]
    found = run(backend, asked, 20, [])
    for prompt in asked:
        room = min(20, 64 - len(prompt.input_ids))
        tokens = plain_greedy(model, prompt, room)
        assert found[prompt.id].completion_tokens == len(tokens)
        assert found[prompt.id].text == tokenizer.decode(tokens, skip_special_tokens=True)
    too_long = [*asked, Prompt("long one", tuple(range(3, 67)))]
    with pytest.raises(UserError, match=r"'long one': prompt: 64 tokens: .* context of 64"):
        backend.generate(too_long, 20, [])
    with pytest.raises(UserError, match="'none': prompt: no tokens"):
        backend.generate([Prompt("none", ())], 20, [])


def test_a_batch_too_large_for_the_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    expected = run(backends.TransformersBackend(model, tokenizer), prompts(16), 12, [])
    decode = backends.TransformersBackend._decode

    def scarce(self: Any, batch: list[Prompt], *args: Any) -> list[Completion]:
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return decode(self, batch, *args)

    monkeypatch.setattr(backends.TransformersBackend, "_decode", scarce)
    assert run(backends.TransformersBackend(model, tokenizer), prompts(16), 12, []) == expected


# Beams and temperature


@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_those_of_one_prompt_at_a_time(kind: str) -> None:
    model, tokenizer = tiny_model(kind, context=80), byte_tokenizer()
    asked = [prompt for prompt in prompts(10, longest=70) if len(prompt.input_ids) < 76]
    backend = backends.TransformersBackend(model, tokenizer, 8)
    found = completed(backend, asked, 20, [], 4)
    differs = 0
    for prompt in asked:
        limit = backend.rules.limit(prompt, 20)
        with torch.no_grad():
            made = model.generate(
                input_ids=torch.tensor([prompt.input_ids]),
                attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
                num_beams=4,
                max_new_tokens=limit,
            )[0]
        tokens = made[1:] if backend.rules.seq2seq else made[len(prompt.input_ids) :]
        expected = backend.rules.completion(prompt, tokens.tolist(), limit, [])
        assert found[prompt.id] == expected
        greedy = tokenizer.decode(plain_greedy(model, prompt, limit), skip_special_tokens=True)
        differs += greedy != expected.text
    assert differs > 2
    stop = [next(item.text[3:5] for item in found.values() if len(item.text) > 8)]
    cut = completed(backend, asked, 20, stop, 4)
    for prompt in asked:
        at = first_stop(found[prompt.id].text, stop)
        assert cut[prompt.id].text == found[prompt.id].text[: at if at >= 0 else None]
        assert (cut[prompt.id].finish_reason == "stop") == (at >= 0)


def completed(
    backend: Any, asked: list[Prompt], new: int, stop: list[str], beams: int
) -> dict[str, Completion]:
    """Return all completions by id."""
    batches = backend.generate(asked, new, stop, beams)
    return {item.id: item for batch in batches for item in batch}


def heated(asked: list[Prompt], temperature: float, seed: int = 0) -> list[Prompt]:
    """Return prompts that are to be sampled."""
    return [
        dataclasses.replace(prompt, temperature=temperature, seed=prompt_seed(seed, prompt.id))
        for prompt in asked
    ]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_draws_depend_on_the_prompt_alone(kind: str) -> None:
    model, tokenizer = tiny_model(kind), byte_tokenizer()
    asked = prompts(12)
    mixed = [*heated(asked[:6], 0.7), *asked[6:]]
    stop = ["zz", "a"]
    results = [
        run(backends.TransformersBackend(model, tokenizer, rows), mixed, 40, stop)
        for rows in (1, 5, 12)
    ]
    assert results[0] == results[1] == results[2]
    greedy = run(backends.TransformersBackend(model, tokenizer), asked, 40, stop)
    assert all(results[0][prompt.id] == greedy[prompt.id] for prompt in asked[6:])
    assert any(results[0][prompt.id] != greedy[prompt.id] for prompt in asked[:6])
    other = run(backends.TransformersBackend(model, tokenizer), heated(asked[:6], 0.7, 1), 40, stop)
    assert any(results[0][prompt.id] != other[prompt.id] for prompt in asked[:6])
    cold = run(backends.TransformersBackend(model, tokenizer), heated(asked, 1e-4), 40, stop)
    assert cold == greedy


def test_draws_follow_the_softmax() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    ids, count, temperature = (1, 40, 50), 2000, 1.5
    asked = [Prompt(str(at), ids, temperature, prompt_seed(0, str(at))) for at in range(count)]
    backend = backends.TransformersBackend(model, tokenizer, 500)
    drawn: list[int] = []
    rules = dataclasses.replace(backend.rules, decode=lambda tokens: (drawn.extend(tokens), "")[1])
    backend.rules = rules
    run(backend, asked, 1, [])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1)
    expected[2] = 0  # the end token is no part of the text
    found = torch.bincount(torch.tensor(drawn), minlength=259) / count
    # Total variation of 2000 draws from some 95 tokens: 0.087 expected, far more at temperature 1.
    assert float((found - expected).abs().sum() / 2) < 0.12
    cooler = torch.softmax(logits, -1)
    assert float((found - cooler).abs().sum() / 2) > 0.15


def test_beams_with_a_temperature_are_refused() -> None:
    backend = backends.TransformersBackend(tiny_model("llama"), byte_tokenizer())
    with pytest.raises(UserError, match=r"'p1': temperature: 0.5: expected 0 with num_beams: 2"):
        backend.generate([*prompts(1), *heated(prompts(2), 0.5)[1:]], 5, [], 2)


# The stage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


SPEC = {
    "model": {"sha256": "0", "dtype": "float32", "architecture": "causal"},
    "export": None,
    "prompt": TEMPLATE,
    "benchmark": {
        "source": "arithmetic",
        "data": {"train": 1, "validation": 0, "test": 24},
        "max_new_tokens": 24,
        "stop": ["Question"],
        "limit": None,
    },
    "files": {},
}


def place(base: Path, work: Path, stamp: str = "stamp") -> dict[str, Any]:
    """Return where the stage works."""
    return {"model": str(base), "data_root": None, "threads": 1, "work": str(work), "stamp": stamp}


def lines(out: Path) -> list[dict[str, Any]]:
    """Return the rows of generations.jsonl."""
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of an uninterrupted job."""
    out = tmp_path_factory.mktemp("whole")
    generate(SPEC, {}, out, place(base, out / "work"))
    return out


def test_stage_writes_the_benchmark_in_its_order(whole: Path) -> None:
    records = benchmark_records(SPEC["benchmark"], None)
    rows = lines(whole)
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    tokenizer = byte_tokenizer()
    for row, record in zip(rows, records, strict=True):
        assert list(row) == [
            "id",
            "prompt",
            "completion",
            "finish_reason",
            "prompt_tokens",
            "completion_tokens",
            "reference",
        ]
        assert row["prompt"] == render(TEMPLATE, record)
        assert row["reference"] == record["reference"]
        assert row["prompt_tokens"] == len(encode_prompt(tokenizer, row["prompt"]))
    cost = json.loads((whole / "generate.json").read_text())
    assert cost["tokens"] == sum(row["completion_tokens"] for row in rows)
    assert cost["seconds"] > 0 and cost["peak_memory_bytes"] > 10**6
    assert not (whole / "work").exists()


def test_prompt_tokens_are_the_training_prefix(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Prompt] = []
    original = backends.TransformersBackend.generate

    def spy(self: Any, prompts: list[Prompt], *args: Any) -> Any:
        asked.extend(prompts)
        return original(self, prompts, *args)

    monkeypatch.setattr(backends.TransformersBackend, "generate", spy)
    limited = {**SPEC, "benchmark": {**SPEC["benchmark"], "limit": 3, "max_new_tokens": 2}}
    generate(limited, {}, tmp_path, place(base, tmp_path / "work"))
    records = benchmark_records(SPEC["benchmark"], None)[:3]
    assert [prompt.id for prompt in asked] == [record["id"] for record in records]
    for prompt, record in zip(asked, records, strict=True):
        text = render(TEMPLATE, record)
        ids, labels, _ = encode(byte_tokenizer(), text, record["response"], 10**6)
        assert list(prompt.input_ids) == ids[: labels.count(-100)]


KILLED = """
import json, sys, time
from pathlib import Path
from tlora.generation import transformers as backends
from tlora.stages.generate import generate
backends.ROWS["cpu"] = 4
decode = backends.TransformersBackend._decode
def slow(self, *args):
    time.sleep(0.4)
    return decode(self, *args)
backends.TransformersBackend._decode = slow
spec, place, out = map(json.loads, sys.argv[1:])
generate(spec, {}, Path(out), place)
"""


@pytest.mark.slow
def test_killed_job_goes_on_and_gives_the_same_file(
    base: Path, whole: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.ROWS, "cpu", 4)
    out, work = tmp_path / "out", tmp_path / "work"
    where = place(base, work)
    arguments = [json.dumps(value) for value in (SPEC, where, str(out))]
    child = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=root)
    partial = work / "partial.jsonl"
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.read_bytes().count(b"\n") >= 2):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = partial.read_bytes().count(b"\n")
    assert 2 <= kept < 6 and not (out / "generations.jsonl").exists()
    partial.write_bytes(partial.read_bytes() + b'{"seconds": 1.0, "completions": [{"id": "te')

    decoded: list[str] = []
    original = backends.TransformersBackend._decode

    def spy(self: Any, batch: list[Prompt], *args: Any) -> Any:
        decoded.extend(prompt.id for prompt in batch)
        return original(self, batch, *args)

    monkeypatch.setattr(backends.TransformersBackend, "_decode", spy)
    generate(SPEC, {}, out, where)
    assert len(decoded) == 24 - 4 * kept
    assert (out / "generations.jsonl").read_bytes() == (whole / "generations.jsonl").read_bytes()
    assert not work.exists()


def write_partial(work: Path, stamp: str, ids: list[str], tokens: Callable[[str], int]) -> None:
    """Leave what a killed job leaves: one batch with completions that no model gives."""
    partial = Partial(work, stamp)
    partial.add([Completion(i, "forged", "eos", tokens(i), 1) for i in ids], 5.0, 10**12)


def test_only_the_same_stamp_goes_on(base: Path, whole: Path, tmp_path: Path) -> None:
    tokens = {row["id"]: row["prompt_tokens"] for row in lines(whole)}
    expected = (whole / "generations.jsonl").read_bytes()
    work = tmp_path / "work"

    write_partial(work, "stamp", ["test-3"], tokens.__getitem__)
    generate(SPEC, {}, tmp_path / "same", place(base, work))
    rows = lines(tmp_path / "same")
    assert [row["id"] for row in rows if row["completion"] == "forged"] == ["test-3"]
    cost = json.loads((tmp_path / "same" / "generate.json").read_text())
    assert cost["seconds"] > 5 and cost["peak_memory_bytes"] == 10**12

    for name, stamp, ids, count in (
        ("stamp", "another", ["test-3"], tokens.__getitem__),
        ("prompt", "stamp", ["test-3"], lambda i: tokens[i] + 1),
        ("twice", "stamp", ["test-3", "test-3"], tokens.__getitem__),
        ("strange", "stamp", ["test-99"], lambda i: 1),
    ):
        write_partial(work, stamp, ids, count)
        generate(SPEC, {}, tmp_path / name, place(base, work))
        assert (tmp_path / name / "generations.jsonl").read_bytes() == expected, name
        assert not work.exists()


def test_lost_and_doubled_completions_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = backends.TransformersBackend._decode
    for wrong, message in ((lambda b: b[1:], "without a completion"), (lambda b: b + b, "twice")):
        monkeypatch.setattr(
            backends.TransformersBackend,
            "generate",
            lambda self, asked, new, stop, beams, wrong=wrong: iter(
                [wrong(decode(self, list(asked), 2, [], beams))]
            ),
        )
        with pytest.raises(RuntimeError, match=message):
            generate(SPEC, {}, tmp_path / "out", place(base, tmp_path / "work", message))
        assert not (tmp_path / "out" / "generations.jsonl").exists()


def test_bad_benchmarks_are_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"id": "a", "instruction": "", "response": "", "reference": "1"}
    monkeypatch.setattr(arithmetic, "load", lambda *args: [record, record])
    with pytest.raises(UserError, match="arithmetic: id: 'a': stands twice"):
        benchmark_records(SPEC["benchmark"], None)
    monkeypatch.setattr(arithmetic, "load", lambda *args: [])
    with pytest.raises(UserError, match="arithmetic: test: no records"):
        benchmark_records(SPEC["benchmark"], None)


def test_a_run_without_its_export_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export: 0123: the input is None"):
        generate({**SPEC, "export": "0123"}, {}, tmp_path, place(base, tmp_path / "work"))


def test_own_prompt_of_a_benchmark_counts(base: Path, tmp_path: Path) -> None:
    benchmark = {**SPEC["benchmark"], "limit": 2, "prompt": "Q: {instruction}\nA:"}
    generate({**SPEC, "benchmark": benchmark}, {}, tmp_path, place(base, tmp_path / "work"))
    records = benchmark_records(SPEC["benchmark"], None)[:2]
    expected = [f"Q: {record['instruction']}\nA:" for record in records]
    assert [row["prompt"] for row in lines(tmp_path)] == expected


def test_unknown_backends_and_idle_servers_are_refused(base: Path, tmp_path: Path) -> None:
    where = place(base, tmp_path / "work")
    with pytest.raises(UserError, match=r"backend: 'vlm': expected one of transformers, vllm"):
        generate({**SPEC, "backend": "vlm"}, {}, tmp_path, where)
    with pytest.raises(UserError, match=r"server: backend: 'transformers': expected 'vllm'"):
        generate(SPEC, {}, tmp_path, {**where, "server": "http://localhost:1"})
    seq2seq = {**SPEC["model"], "architecture": "seq2seq"}
    with pytest.raises(UserError, match=r"architecture: 'seq2seq': expected 'causal'"):
        generate({**SPEC, "model": seq2seq, "backend": "vllm"}, {}, tmp_path, where)


def test_vllm_that_is_not_there_is_one_line(base: Path, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(UserError, match="backend: 'vllm': vLLM cannot be imported here: install"):
        generate({**SPEC, "backend": "vllm"}, {}, tmp_path, place(base, tmp_path / "work"))


# Dialogues

TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:"


def dialogues(context: int = 512) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return records of one to three turns with and without temperature, and their spec."""
    rng = random.Random(1)
    records: list[dict[str, Any]] = []
    for at in range(9):
        turns = [f"{at} {'x' * rng.randrange(30)} turn {n}" for n in range(1, at % 3 + 2)]
        record = {"id": f"r{at}", "instruction": turns[0], "response": "", "reference": [at]}
        if at:
            record["turns"] = turns
        if at % 2:
            record["temperature"] = 0.7
        records.append(record)
    benchmark = {**SPEC["benchmark"], "turn_prompt": TURN, "stop": [], "max_new_tokens": 12}
    return records, {**SPEC, "benchmark": benchmark}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records and the spec of dialogues, which the stage reads in place of problems."""
    records, spec = dialogues()
    monkeypatch.setattr(arithmetic, "load", lambda *args: records)
    monkeypatch.setitem(backends.ROWS, "cpu", 3)
    return records, spec


def test_dialogues_have_a_row_a_turn(base: Path, tmp_path: Path, told: Any) -> None:
    records, spec = told
    generate(spec, {}, tmp_path, place(base, tmp_path / "work"))
    rows = {row["id"]: row for row in lines(tmp_path)}
    names = ["r0"]
    names += [f"r{at}/{n}" for at in range(1, 9) for n in range(1, len(records[at]["turns"]) + 1)]
    assert list(rows) == names
    assert "turn" not in rows["r0"]
    for record in records[1:]:
        said = ""
        for number, instruction in enumerate(record["turns"], 1):
            row = rows[f"{record['id']}/{number}"]
            template = TEMPLATE if number == 1 else TURN
            said += template.replace("{instruction}", instruction)
            assert row["prompt"] == said
            assert (row["turn"], row["reference"]) == (number, record["reference"])
            assert row["prompt_tokens"] == len(encode_prompt(byte_tokenizer(), said))
            said += row["completion"]
    seeded = {**spec, "benchmark": {**spec["benchmark"], "seed": 5}}
    generate(seeded, {}, tmp_path / "seed", place(base, tmp_path / "work"))
    others = {row["id"]: row for row in lines(tmp_path / "seed")}
    for record in records:
        first = record["id"] + ("/1" if "turns" in record else "")
        same = others[first]["completion"] == rows[first]["completion"]
        assert same == ("temperature" not in record)


@pytest.mark.parametrize("batches", range(1, 6))
def test_dialogues_go_on_from_every_batch(
    base: Path, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    _, spec = told
    generate(spec, {}, tmp_path / "whole", place(base, tmp_path / "work"))
    decode, left = backends.TransformersBackend._decode, [batches]

    def dying(self: Any, *args: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return decode(self, *args)

    monkeypatch.setattr(backends.TransformersBackend, "_decode", dying)
    with pytest.raises(KeyboardInterrupt):
        generate(spec, {}, tmp_path / "out", place(base, tmp_path / "work"))
    kept = (tmp_path / "work/partial.jsonl").read_bytes().count(b"\n")
    assert kept == batches
    left[0] = 6 - batches
    generate(spec, {}, tmp_path / "out", place(base, tmp_path / "work"))
    assert left[0] == 0
    names = [tmp_path / name / "generations.jsonl" for name in ("whole", "out")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_later_turn_of_another_dialogue_starts_afresh(
    base: Path, tmp_path: Path, told: Any
) -> None:
    _, spec = told
    generate(spec, {}, tmp_path / "whole", place(base, tmp_path / "work"))
    partial = Partial(tmp_path / "work", "stamp")
    forged = [Completion("r2/3", "forged", "eos", 9, 1), Completion("r2/1", "f", "eos", 48, 1)]
    partial.add(forged, 1.0, 1)
    generate(spec, {}, tmp_path / "out", place(base, tmp_path / "work"))
    names = [tmp_path / name / "generations.jsonl" for name in ("whole", "out")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_dialogue_that_fills_the_context_ends_there(
    tmp_path: Path, told: Any, caplog: pytest.LogCaptureFixture
) -> None:
    records, spec = told
    model = tiny_model("llama", context=150)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    generate(spec, {}, tmp_path, place(tmp_path / "base", tmp_path / "work"))
    rows = lines(tmp_path)
    full = [row for row in rows if row["prompt_tokens"] >= 150]
    assert full and all(row["turn"] > 1 for row in full)
    for row in full:
        assert (row["completion"], row["finish_reason"]) == ("", "length")
        assert row["completion_tokens"] == 0
    assert len(rows) == 1 + sum(len(record["turns"]) for record in records[1:])
    assert "dialogues fill the context before turn" in caplog.text


def test_bad_dialogues_are_named(base: Path, tmp_path: Path, told: Any) -> None:
    records, spec = told
    where = place(base, tmp_path / "work")
    bare = {**spec, "benchmark": {**spec["benchmark"], "turn_prompt": None}}
    with pytest.raises(UserError, match=r"turn_prompt: none: .* item 'r1' has 2 turns"):
        generate(bare, {}, tmp_path, where)
    records[0]["id"] = "r2/1"
    with pytest.raises(UserError, match=r"'r2/1': stands twice"):
        generate(spec, {}, tmp_path, where)
    records[0] |= {"id": "r0", "temperature": -1}
    with pytest.raises(UserError, match=r"'r0': temperature: -1: expected 0 or more"):
        generate(spec, {}, tmp_path, where)
    records[0] |= {"temperature": None, "turns": []}
    with pytest.raises(UserError, match=r"'r0': turns: \[\]: expected at least one"):
        generate(spec, {}, tmp_path, where)


# The command, killed


@pytest.mark.slow
def test_killed_command_goes_on_and_gives_the_same_file(root: Path, tmp_path: Path) -> None:
    benchmark = {
        "source": "arithmetic",
        "data": {"seed": 3, "train": 1, "validation": 0, "test": 600},
        "max_new_tokens": 40,
        "stop": [],
        "limit": None,
    }
    identity = {"sha256": "0", "dtype": "float32", "architecture": "causal"}
    spec = {**SPEC, "model": identity, "benchmark": benchmark}

    def command(name: str) -> list[str]:
        where = {
            "model": str(root / "workflow/resources/tiny"),
            "threads": 1,
            "work": str(tmp_path / f"{name}.work"),
        }
        texts = ["--spec", json.dumps(spec), "--place", json.dumps(where)]
        return [sys.executable, "-m", "tlora.cli", "generate", *texts, "--out", tmp_path / name]

    subprocess.run(command("whole"), cwd=root, check=True, timeout=300)
    expected = (tmp_path / "whole/generations.jsonl").read_bytes()
    assert expected.count(b"\n") == 600
    partial = tmp_path / "killed.work/partial.jsonl"
    kept = 0
    for least in (3, 8):
        child = subprocess.Popen(command("killed"), cwd=root)
        deadline = time.monotonic() + 300
        while not (partial.is_file() and partial.read_bytes().count(b"\n") >= least):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert kept < partial.read_bytes().count(b"\n") < 19
        kept = partial.read_bytes().count(b"\n")
        assert not (tmp_path / "killed/generations.jsonl").exists()
    subprocess.run(command("killed"), cwd=root, check=True, timeout=300)
    assert (tmp_path / "killed/generations.jsonl").read_bytes() == expected
    assert not partial.parent.exists()


def test_bfloat16_goes_through(base: Path, tmp_path: Path) -> None:
    spec = {**SPEC, "model": {**SPEC["model"], "dtype": "bfloat16"}}
    export, _ = export_adapter(base, tmp_path)
    spec["export"] = "0123"
    generate(spec, {"export": export}, tmp_path / "out", place(base, tmp_path / "work"))
    assert len(lines(tmp_path / "out")) == 24


# Exports


def export_adapter(base: Path, folder: Path, **options: Any) -> tuple[Path, Any]:
    """Write an adapter with a random B as an export; return export.json and the merged model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    adapted.save_pretrained(folder / "weights")
    files = sha256_tree(folder / "weights")
    write_json(folder / "export.json", {"form": "adapter", "files": files})
    return folder / "export.json", adapted.merge_and_unload()


def test_adapter_and_model_exports_speak_alike(base: Path, whole: Path, tmp_path: Path) -> None:
    _, merged = export_adapter(
        base, tmp_path / "adapter", rank_pattern={"^model.layers.0.self_attn.q_proj": 2}
    )
    merged.save_pretrained(tmp_path / "model" / "weights")
    files = sha256_tree(tmp_path / "model" / "weights")
    write_json(tmp_path / "model" / "export.json", {"form": "model", "files": files})
    write_json(tmp_path / "none" / "export.json", {"form": "base", "files": {}})
    spec = {**SPEC, "export": "0123456789ab"}
    results = {}
    for name in ("adapter", "model", "none"):
        source = {"export": tmp_path / name / "export.json"}
        generate(spec, source, tmp_path / "out" / name, place(base, tmp_path / "work"))
        results[name] = lines(tmp_path / "out" / name)
    assert results["adapter"] == results["model"]
    assert results["none"] == lines(whole)
    different = [
        a["completion"] != b["completion"]
        for a, b in zip(results["adapter"], results["none"], strict=True)
    ]
    assert sum(different) > len(different) // 2
    prompt = Prompt("a", tuple(encode_prompt(byte_tokenizer(), results["model"][0]["prompt"])))
    made = byte_tokenizer().decode(plain_greedy(merged, prompt, 24), skip_special_tokens=True)
    assert made.startswith(results["model"][0]["completion"])


def test_weights_that_changed_or_do_not_fit_are_named(base: Path, tmp_path: Path) -> None:
    export, _ = export_adapter(base, tmp_path)
    wrong = tmp_path / "weights" / "adapter_config.json"
    config = json.loads(wrong.read_text())

    def load() -> None:
        backends.load(SPEC["model"], export, place(base, tmp_path / "work"))

    wrong.write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(UserError, match=r"adapter_config.json: differs from the checksum"):
        load()
    for change in ({"r": 3}, {"target_modules": ["nothing"]}):
        wrong.write_text(json.dumps({**config, **change}))
        files = sha256_tree(tmp_path / "weights")
        write_json(export, {"form": "adapter", "files": files})
        with pytest.raises(UserError, match="does not fit the base model") as caught:
            load()
        assert "\n" not in str(caught.value)
