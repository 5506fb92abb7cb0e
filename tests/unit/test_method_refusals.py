"""A method that does not fit a model is refused by name: before any job, and before training."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tlora import methods
from tlora.config import Library, typed
from tlora.errors import UserError
from tlora.methods import Base, Context
from tlora.plan import Plan
from tlora.weights import check_fit

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Library(ROOT / "config")
NAMES = LIBRARY.names("methods")
GPT2 = {
    "h.0.attn.c_attn": (32, 96),
    "h.0.attn.c_proj": (32, 32),
    "h.0.mlp.c_fc": (32, 128),
    "wte": (64, 32),
}
LLAMA = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.mlp.up_proj": (64, 32)}


def files(folder: Path, weights: dict[str, tuple[int, int]], **config: Any) -> str:
    """Write what a local model tells without being loaded."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries = {f"{n}.weight": {"dtype": "F32", "shape": s} for n, s in weights.items()}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return str(folder)


def method(name: str) -> tuple[methods.Method, Any]:
    config, document = LIBRARY.method(name)
    module = methods.load(config.implementation)
    return module, typed(document, ("options",), module.module.Options, config.options)


def fits(name: str, path: str, rank: int = 4, seq2seq: bool = False) -> str | None:
    """Return what is said before any job starts, None where nothing is."""
    module, options = method(name)
    targets = "all-linear" if module.adapter else None
    try:
        check_fit(
            module,
            options,
            path,
            seq2seq,
            targets,
            rank if module.adapter else None,
            f"config/p.yaml:3: methods: {name!r}",
        )
    except UserError as error:
        assert str(error).startswith(f"config/p.yaml:3: methods: {name!r}: ")
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_conv1d_before_any_job(tmp_path: Path, name: str) -> None:
    said = fits(name, files(tmp_path / "gpt2", GPT2, model_type="gpt2"))
    if method(name)[0].name == "olora":
        assert said is not None and "h.0.attn.c_attn: is a Conv1D: expected nn.Linear" in said
    else:
        assert said is None
    assert fits(name, files(tmp_path / "llama", LLAMA, model_type="llama")) is None


@pytest.mark.parametrize("name", NAMES)
def test_quantised_base_before_any_job(tmp_path: Path, name: str) -> None:
    path = files(tmp_path / "gptq", LLAMA, quantization_config={"quant_method": "gptq"})
    said = fits(name, path)
    assert said is not None
    assert "quantised weights (gptq): expected full-precision ones" in said


@pytest.mark.parametrize("name", NAMES)
def test_encoder_decoder_before_any_job(tmp_path: Path, name: str) -> None:
    local = fits(name, files(tmp_path / "t5", LLAMA, is_encoder_decoder=True))
    hub = fits(name, "google-t5/t5-base", seq2seq=True)
    if method(name)[0].name == "eva":
        assert "is an encoder-decoder model: expected a causal one" in str(local)
        assert hub == local
    else:
        assert local is None and hub is None


def test_ranks_before_any_job(tmp_path: Path) -> None:
    path = files(tmp_path / "llama", LLAMA)
    assert fits("lora_ga", path, rank=16) is None
    assert "rank 17: expected at most 16, half its smaller side" in str(fits("lora_ga", path, 17))
    # of a repository of the hub nothing is known but the rank
    assert fits("lora_ga", "someone/something", rank=17) is None
    assert "rank: 1: expected a larger one" in str(fits("adalora", "someone/something", rank=1))
    assert fits("adalora", "someone/something", rank=2) is None


def tiny(kind: str) -> Any:
    import transformers

    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_ff=32, d_kv=8, num_layers=1, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def refused(name: str, model: Any, rank: int = 4, targets: Any = "all-linear") -> str:
    """Return what is said before training, of a model in memory."""
    module, options = method(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        module.adapt(model, options, Context(rank, 4.0, targets, seed=0))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(value.equal(before[key]) for key, value in after.items())
    assert str(caught.value).startswith(f"{module.name}: ")
    return str(caught.value)


def test_the_same_before_training() -> None:
    assert "c_fc: is a Conv1D" in refused("olora", tiny("gpt2"), targets=["c_fc"])
    assert "encoder-decoder" in refused("eva", tiny("t5"))
    assert "rank: 1: expected a larger one" in refused("adalora", tiny("t5"), rank=1)
    assert "rank 17: expected at most 16" in refused("lora_ga", tiny("t5"), rank=17)


@pytest.mark.parametrize("name", NAMES)
def test_quantised_weights_before_training(name: str) -> None:
    import torch

    model = tiny("t5")
    layer = model.encoder.block[0].layer[0].SelfAttention.q
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    assert "quantised" in refused(name, model)


def test_full_refuses_a_model_that_says_it_is_quantised() -> None:
    model = tiny("t5")
    model.is_quantized = True
    assert "quantised weights (by its configuration)" in refused("full", model)


def test_a_new_methods_reason_is_asked_for_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = method("lora")

    def unfit(options: Any, base: Base) -> str | None:
        return "targets: too many" if len(base.targets) > 1 else None

    monkeypatch.setattr(module.module, "unfit", unfit, raising=False)
    assert "lora: targets: too many" in refused("lora", tiny("t5"))


@pytest.mark.parametrize(
    ("config", "named", "expected"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "full", "quantised weights (gptq)"),
        ({"model_type": "gpt2"}, "olora", "h.0.attn.c_attn: is a Conv1D: expected nn.Linear"),
        ({"is_encoder_decoder": True}, "eva", "is an encoder-decoder model"),
    ],
)
def test_a_preset_is_refused_by_the_methods_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict, named: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "base", GPT2, **config)
    for kind in ("tasks", "methods", "benchmarks"):
        (tmp_path / "config").mkdir(exist_ok=True)
        (tmp_path / "config" / kind).symlink_to(ROOT / "config" / kind)
    (tmp_path / "config/models").mkdir()
    (tmp_path / "config/models/m.yaml").write_text("path: base\n")
    methods = "[full, olora]" if named == "full" else f"[full, {named}]"
    preset = tmp_path / "config/p.yaml"
    preset.write_text(
        f"models: [m]\ntasks: [arithmetic]\nmethods: {methods}\nseeds: [1]\n"
        "set: {target_modules: all-linear}\n"
    )
    with pytest.raises(UserError) as caught:
        Plan([preset])
    assert str(caught.value).startswith(f"config/p.yaml:3: methods: {named!r}: ")
    assert expected in str(caught.value)
