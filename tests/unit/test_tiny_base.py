"""The shipped base model, and the recipe that makes it."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlora.artefact import read_json, sha256_file
from tlora.stages import tiny_base
from tlora.tasks import arithmetic, choice, gsm8k, mixture, prompts

SMALL = {
    "vocabulary": 400,
    "tokenizer_documents": 300,
    "hidden": 32,
    "intermediate": 64,
    "layers": 2,
    "heads": 2,
    "positions": 64,
    "context": 32,
    "batch": 4,
    "steps": 30,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def shipped(root: Path) -> Path:
    return root / "workflow" / "resources" / "tiny"


@pytest.fixture(scope="module")
def model(shipped: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shipped)


@pytest.fixture(scope="module")
def tokenizer(shipped: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small model made by the recipe."""
    out = tmp_path_factory.mktemp("recipe") / "tiny"
    tiny_base.tiny_base(SMALL, {}, out, {})
    return out


# the shipped model


def test_record_names_every_file(shipped: Path) -> None:
    record = read_json(shipped / "recipe.json")
    files = {path.name for path in shipped.iterdir()}
    assert set(record["files"]) == files - {"recipe.json", "README.md"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    for name, digest in record["files"].items():
        assert sha256_file(shipped / name) == digest, name
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 12e6
    assert record["recipe"] == tiny_base.RECIPE
    assert record["seconds"] < 15 * 60


def test_record_names_the_data(shipped: Path) -> None:
    # The mixture and the tokenizer's recipe are those that the shipped model was made with.
    record = read_json(shipped / "recipe.json")
    drawn = itertools.islice(mixture.documents(tiny_base.RECIPE["seed"] + 1), 256)
    assert record["first_documents_sha256"] == tiny_base.text_digest(drawn)
    made = tiny_base.train_tokenizer(tiny_base.RECIPE)
    assert made.backend_tokenizer.to_str() == _tokenizer_text(shipped)


def _tokenizer_text(folder: Path) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()


def test_shape_of_the_model(model) -> None:
    import torch

    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 0.5e6 <= parameters <= 3e6
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert set(TARGETS) <= names
    assert model.config.max_position_embeddings >= 1024


def test_weights_and_activations_are_structured(model, tokenizer) -> None:
    import torch

    documents = list(itertools.islice(mixture.documents(10**6), 64))
    inputs = {}
    module = model.model.layers[1].self_attn.q_proj
    hook = module.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
    losses = []
    spectra = []
    with torch.no_grad():
        for document in documents:
            given, learned = tokenizer(list(document[:2]), add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[tokenizer.bos_token_id, *given, *learned]])
            labels = ids.clone()
            labels[:, : len(given) + 1] = prompts.IGNORED
            losses.append(model(input_ids=ids, labels=labels).loss.item())
            spectra.append(inputs["x"].flatten(0, 1))
    hook.remove()
    assert sum(losses) / len(losses) < math.log(len(tokenizer)) / 3
    values = torch.linalg.svdvals(torch.cat(spectra)) ** 2
    half = int((values.cumsum(0) < 0.5 * values.sum()).sum()) + 1
    assert half <= len(values) // 8


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(mark in text for mark in (tiny_base.BOS, tiny_base.EOS, tiny_base.PAD)):
        assert tokenizer.decode(ids) == text
    assert all(0 <= index < len(tokenizer) for index in ids)


def test_special_tokens(tokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a")["input_ids"][0] == 1
    assert (
        len({tokenizer(f" {n}", add_special_tokens=False)["input_ids"][0] for n in range(60)}) == 60
    )


def test_model_and_tokenizer_agree(model, tokenizer, shipped: Path) -> None:
    config = json.loads((shipped / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("task", [arithmetic, choice])
def test_embedded_tasks_fit_their_lengths(root: Path, tokenizer, task) -> None:
    import yaml

    name = task.__name__.rpartition(".")[2]
    config = yaml.safe_load((root / "config" / "tasks" / f"{name}.yaml").read_text())
    benchmark = yaml.safe_load((root / "config" / "benchmarks" / f"{name}.yaml").read_text())
    for split in ("train", "test"):
        for record in task.load(task.Data(**config["data"]), split, None):
            prompt = prompts.render(config["prompt"], record)
            _ids, labels, truncated = prompts.encode(
                tokenizer, prompt, record["response"], config["max_length"]
            )
            assert not truncated
            target = sum(label != prompts.IGNORED for label in labels)
            assert target <= benchmark["max_new_tokens"]


@pytest.mark.slow
def test_real_gsm8k_fits(root: Path, shared_data: Path, tokenizer) -> None:
    records = gsm8k.load(gsm8k.Data(), "train", shared_data / "data")
    longest = truncated = 0
    for record in records:
        prompt = mixture.ALPACA.replace("{instruction}", record["instruction"])
        longest = max(longest, len(prompts.encode_prompt(tokenizer, prompt)))
        truncated += prompts.encode(tokenizer, prompt, record["response"], 512)[2]
    assert longest + 512 <= 1024
    assert truncated < 0.03 * len(records)


# the recipe


def test_recipe_is_a_stage() -> None:
    assert list(inspect.signature(tiny_base.tiny_base).parameters) == [
        "spec",
        "inputs",
        "out",
        "place",
    ]


def test_recipe_is_deterministic(made: Path, tmp_path: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.rand(7)  # another state of the global generator
        tiny_base.tiny_base(SMALL, {}, tmp_path / "again", {})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    again, first = read_json(tmp_path / "again" / "recipe.json"), read_json(made / "recipe.json")
    assert again["files"] == first["files"] and again["loss"] == first["loss"]
    tiny_base.tiny_base({**SMALL, "seed": 1}, {}, tmp_path / "other", {})
    other = read_json(tmp_path / "other" / "recipe.json")
    assert other["files"]["model.safetensors"] != first["files"]["model.safetensors"]


def test_recipe_replaces_an_older_model(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made, tmp_path / "tiny")
    (out / "left_over.bin").write_bytes(b"old")
    tiny_base.tiny_base({**SMALL, "steps": 1}, {}, out, {})
    assert not (out / "left_over.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_recipe_learns(made: Path) -> None:
    record = read_json(made / "recipe.json")
    assert record["loss"] < math.log(SMALL["vocabulary"]) - 0.3


def test_recipe_refuses_unknown_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="depth: expected one of"):
        tiny_base.tiny_base({"depth": 3}, {}, tmp_path / "x", {})
    assert not (tmp_path / "x").exists()


def test_made_files_are_readable_by_others(made: Path) -> None:
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in made.iterdir())
