"""Parameter counts of the real architectures, against closed forms and published figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tlora import cli, methods, params
from tlora.config import Library, typed
from tlora.errors import UserError
from tlora.methods import Context

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Library(ROOT / "config")

# (out, in) of every target of one layer, how many layers, and all weights of the model (the sizes
# that the hub states for these repositories).
Layer = list[tuple[int, int]]


def llama(hidden: int, wide: int, keys: int) -> Layer:
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    return [*attention, (wide, hidden), (wide, hidden), (hidden, wide)]


T5_MLP = [(3072, 768), (768, 3072)]
SHAPES: dict[str, list[tuple[int, Layer]]] = {
    "llama2_7b": [(32, llama(4096, 11008, 4096))],
    "llama2_13b": [(40, llama(5120, 13824, 5120))],
    "llama3_8b": [(32, llama(4096, 14336, 1024))],
    "mistral_7b": [(32, llama(4096, 14336, 1024))],
    "qwen2_5_0_5b": [(24, llama(896, 4864, 128))],
    "qwen2_5_7b": [(28, llama(3584, 18944, 512))],
    "t5_base": [(12, [(768, 768)] * 4 + T5_MLP), (12, [(768, 768)] * 8 + T5_MLP)],
}
FULL = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "t5_base": 222_903_552,
}
# What a method trains of each target, by implementation.
PARTS = {
    "lora": "AB",
    "lora_plus": "AB",
    "lora_fa": "B",
    "adalora": "ABE",
    "olora": "AB",
    "pissa": "AB",
    "milora": "AB",
    "lora_ga": "AB",
    "corda": "AB",
    "eva": "AB",
    "tlora": "B",
}


def closed_form(model: str, rank: int, parts: str) -> int:
    """Sum over targets of A (r in), B (r out), E (r) and a magnitude for every output (m)."""
    total = 0
    for layers, targets in SHAPES[model]:
        for out, columns in targets:
            sizes = {"A": rank * columns, "B": rank * out, "E": rank, "m": out}
            total += layers * sum(sizes[part] for part in parts)
    return total


def counted(model: str, method: str, rank: int, **context: object) -> params.Count:
    config, _ = LIBRARY.model(model)
    source = params.source_of(model, config, LIBRARY)
    entry, document = LIBRARY.method(method)
    module = methods.load(entry.implementation)
    options = typed(document, ("options",), module.module.Options, entry.options)
    values = {"target_modules": "all-linear", "seed": 0, **context}
    architecture = params.on_meta(source, config.architecture)
    return params.count(architecture, module, options, Context(rank, 1.0, **values))


def in_millions(number: int) -> str:
    """As published: cut off after two decimals."""
    return f"{number // 10_000 / 100:.2f}"


PUBLISHED = [
    *(("llama2_7b", name, 128, "319.81") for name in ("lora", "lora_plus", "olora", "pissa")),
    *(("llama2_7b", name, 128, "319.81") for name in ("lora_ga", "corda")),
    ("llama2_7b", "dora", 128, "321.17"),
    ("llama2_7b", "adalora", 128, "319.84"),
    ("llama2_7b", "full", 128, "6738.41"),
    ("llama2_7b", "tlora_init", 128, "174.06"),
    *(("llama2_7b", name, 32, "79.95") for name in ("lora", "lora_plus", "olora", "pissa")),
    *(("llama2_7b", name, 32, "79.95") for name in ("lora_ga", "corda")),
    ("llama2_7b", "dora", 32, "81.31"),
    ("llama2_7b", "adalora", 32, "79.96"),
    *(("t5_base", name, 32, "12.97") for name in ("lora", "lora_plus", "olora", "pissa")),
    *(("t5_base", name, 32, "12.97") for name in ("lora_ga", "corda")),
    ("t5_base", "dora", 32, "13.17"),
    ("t5_base", "adalora", 32, "12.98"),
    ("t5_base", "full", 32, "222.90"),
]


@pytest.mark.parametrize(("model", "method", "rank", "millions"), PUBLISHED)
def test_published_figures(model: str, method: str, rank: int, millions: str) -> None:
    assert in_millions(counted(model, method, rank).trainable) == millions


def test_published_integers() -> None:
    assert counted("llama2_7b", "dora", 128).trainable == 321_175_552
    assert counted("t5_base", "lora", 32).trainable == 12_976_128
    assert counted("t5_base", "dora", 32).trainable == 13_178_880


OTHERS = [model for model in SHAPES if model not in ("llama2_7b", "t5_base")]


@pytest.mark.slow
@pytest.mark.parametrize("model", OTHERS)
@pytest.mark.parametrize(
    ("method", "parts"), [("lora", "AB"), ("dora", "ABm"), ("adalora", "ABE"), ("tlora", "B")]
)
def test_other_architectures(model: str, method: str, parts: str) -> None:
    found = counted(model, method, 128)
    assert found.trainable == closed_form(model, 128, parts)
    assert found.base == FULL[model]


@pytest.mark.parametrize("model", OTHERS)
def test_full_trains_every_weight(model: str) -> None:
    assert counted(model, "full", 1).trainable == FULL[model]


@pytest.mark.slow
@pytest.mark.parametrize("method", LIBRARY.names("methods"))
def test_every_method_of_the_configuration(method: str) -> None:
    config, _ = LIBRARY.method(method)
    found = counted("qwen2_5_0_5b", method, 64)
    parts = PARTS.get(config.implementation)
    if config.implementation == "full":
        assert found.trainable == FULL["qwen2_5_0_5b"]
    elif config.options.get("use_dora"):
        assert found.trainable == closed_form("qwen2_5_0_5b", 64, "ABm")
    elif config.options.get("freeze_a") is False:
        assert found.trainable == closed_form("qwen2_5_0_5b", 64, "AB")
    elif parts is not None:
        assert found.trainable == closed_form("qwen2_5_0_5b", 64, parts)
    # a method that is not in this file's table is counted, too
    assert 0 < found.trainable <= found.base


def test_kinds_of_modules() -> None:
    found = counted("llama2_7b", "dora", 16)
    assert found.modules == dict.fromkeys(found.kinds, 32)
    assert found.kinds["down_proj"] == 32 * (16 * (4096 + 11008) + 4096)
    whole = counted("t5_base", "full", 16)
    assert whole.modules["q"] == 36 and whole.kinds["shared"] == 32128 * 768


def test_default_targets_are_the_seven_projections() -> None:
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert list(counted("llama2_7b", "lora", 8).kinds) == seven
    assert counted("llama2_7b", "lora", 8) == counted("llama2_7b", "lora", 8, target_modules=seven)
    assert list(counted("t5_base", "lora", 8).kinds) == ["q", "k", "v", "o", "wi", "wo"]


def test_the_shared_architecture_stays_as_it_is() -> None:
    first = counted("qwen2_5_0_5b", "lora", 4)
    counted("qwen2_5_0_5b", "full", 4)
    assert counted("qwen2_5_0_5b", "lora", 4) == first


def test_ranks_of_a_run(tmp_path: Path) -> None:
    from tlora.allocation import allocate

    shapes = {
        f"model.layers.{layer}.self_attn.{name}": shape
        for layer in range(24)
        for name, shape in (("q_proj", (896, 896)), ("v_proj", (128, 896)))
    }
    values = {name: float(1 + place % 7) for place, name in enumerate(shapes)}
    values["model.layers.0.self_attn.q_proj"] = 0.0
    allocation = allocate(values, 16, 16.0, shapes)
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps(allocation.to_json()))
    ranks = params.read_ranks(file)
    assert ranks["model.layers.0.self_attn.q_proj"] == 0 and len(set(ranks.values())) > 3
    targets = ["q_proj", "v_proj"]
    found = counted("qwen2_5_0_5b", "tlora", 16, target_modules=targets, ranks=ranks)
    assert found.trainable == allocation.budget["parameters_without_a"]
    assert found.modules == {"q_proj": 23, "v_proj": 24}
    with_a = counted("qwen2_5_0_5b", "tlora_unfrozen", 16, target_modules=targets, ranks=ranks)
    assert with_a.trainable == allocation.budget["parameters_with_a"]


def test_ranks_of_a_saved_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny = ROOT / "workflow/resources/tiny"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    pattern = {r"^model\.layers\.1\.self_attn\.q_proj": 3}
    config = LoraConfig(r=5, target_modules=["q_proj", "up_proj"], rank_pattern=pattern)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    ranks = params.read_ranks(tmp_path)
    assert sorted(set(ranks.values())) == [3, 5] and len(ranks) == 8
    targets = ["q_proj", "up_proj"]
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counted("tiny", "eva", 5, target_modules=targets, ranks=ranks).trainable == expected


def message(*arguments: object, **context: object) -> str:
    with pytest.raises(UserError) as caught:
        counted(*arguments, **context)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_refused() -> None:
    known = "known: down_proj, embed_tokens"
    assert known in message("qwen2_5_0_5b", "lora", 4, target_modules=["q_prj"])
    assert "matches no module" in message("qwen2_5_0_5b", "lora", 4, target_modules="nothing")
    expected = "lora: rank: 129: expected at most 128, the smaller side of model.layers.0.self_attn"
    assert expected in message("qwen2_5_0_5b", "lora", 129)
    assert "eva: base model: is an encoder-decoder" in message("t5_base", "eva", 4)
    assert "lora: its ranks are not allocated" in message("tiny", "lora", 4, ranks={"a": 1})
    assert "a: no module of" in message("tiny", "tlora", 4, ranks={"a": 1})
    assert "half its smaller side" in message("qwen2_5_0_5b", "lora_ga", 65)


def test_a_method_that_needs_weights_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = methods.load("lora")

    def adapt(model: object, options: object, context: object) -> None:
        float(next(model.parameters()).detach().sum())  # type: ignore[attr-defined]

    monkeypatch.setattr(lora.module, "adapt", adapt)
    text = message("tiny", "lora", 4)
    assert text.startswith("tlora/methods/lora.py: adapt: needs weights: expected `skeleton`")


@pytest.mark.parametrize("path", sorted((ROOT / "config/models/architectures").glob("*.json")))
def test_architectures_belong_to_models_with_a_commit(path: Path) -> None:
    model, _ = LIBRARY.model(path.stem)
    assert model.revision is not None and len(model.revision) == 40
    assert set(model.revision) <= set("0123456789abcdef")
    seq2seq = json.loads(path.read_text()).get("is_encoder_decoder", False)
    assert model.architecture == ("seq2seq" if seq2seq else "causal")


def write_model(folder: Path, **values: object) -> None:
    (folder / "config/models/architectures").mkdir(parents=True, exist_ok=True)
    (folder / "config/models/m.yaml").write_text(yaml.safe_dump(values))


def test_where_the_architecture_comes_from(tmp_path: Path) -> None:
    library = Library(tmp_path / "config")
    write_model(tmp_path, path="someone/something", revision="0" * 40)
    assert params.source_of("m", library.model("m")[0], library) == "someone/something"
    written = tmp_path / "config/models/architectures/m.json"
    written.write_text("{}")
    assert params.source_of("m", library.model("m")[0], library) == str(written)
    local = ROOT / "workflow/resources/tiny"
    write_model(tmp_path, path=str(local))
    assert params.source_of("m", library.model("m")[0], library) == str(local)
    written.unlink()
    write_model(tmp_path, path="./absent")
    with pytest.raises(UserError, match=r"expected a folder with config.json, or .*m\.json"):
        params.source_of("m", library.model("m")[0], library)


def test_broken_architectures_are_one_line(tmp_path: Path) -> None:
    for content in ("{}", "no json", '{"model_type": "no-such-model"}'):
        file = tmp_path / "config.json"
        file.write_text(content)
        with pytest.raises(UserError, match=r"config\.json") as caught:
            params.on_meta(str(file), "causal")
        params.on_meta.cache_clear()
        assert "\n" not in str(caught.value)


def test_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["params", "tiny", "lora", "tlora", "--task", "arithmetic"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("Tiny Llama (0.9M): rank 8, target modules q_proj k_proj")
    assert "q_proj          4    8,192    4,096" in shown
    assert "Trainable           78,848   43,008" in shown
    assert "Base model         935,040  935,040" in shown
    assert shown[-1] == "tlora: ranks taken as equal; --allocation gives those of a run"
    options = ["--rank", "2", "--target-modules", "q_proj"]
    assert cli.main(["params", "tiny", "lora", "--task", "arithmetic", *options]) == 0
    assert "Trainable            2,048" in capsys.readouterr().out
    for arguments, expected in (
        (["params", "tinny", "lora"], "did you mean 'tiny'?"),
        (["params", "tiny", "lorra"], "no method of this name"),
        (["params", "tiny", "lora", "--rank", "0"], "--rank: 0: expected at least 1"),
        (["params", "tiny", "tlora", "--allocation", str(tmp_path / "a")], "no such file"),
    ):
        assert cli.main(arguments) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


@pytest.mark.slow
def test_no_weights_are_allocated() -> None:
    """Counting a model of 52 GB of float32 needs less memory than its smallest layer."""
    code = (
        "import resource; from tlora import cli;"
        "import transformers.models.llama.modeling_llama, peft.tuners.lora;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "assert cli.main(['params', 'llama2_13b', 'lora', '--rank', '128']) == 0;"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "13,015,864,320" in done.stdout
    assert int(done.stdout.split()[-1]) < 200
