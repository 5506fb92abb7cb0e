"""`tlora export --for vllm`: one folder that scales right in PEFT and in vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tlora import cli
from tlora.artefact import sha256_tree, write_json
from tlora.errors import UserError
from tlora.peft_folder import CONFIG, read_config, read_tensors
from tlora.serving import VLLM_RANKS, for_vllm

ROOT = Path(__file__).resolve().parents[2]


def adapter(folder: Path, **options: Any) -> Any:
    """Save a random LoRA with ranks, scalings and a B of its own per module; return the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "workflow/resources/tiny")
    values = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 10},
        "alpha_pattern": {r"^model\.layers\.1\.mlp\.up_proj": 2.5},
        **options,
    }
    adapted = get_peft_model(model, LoraConfig(**values))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return adapted.eval()


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_right_in_peft_and_by_vllms_one_scaling(tmp_path: Path, rslora: bool) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained = adapter(tmp_path / "adapter", use_rslora=rslora)
    assert for_vllm(tmp_path / "adapter", tmp_path / "out") == 16
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        CONFIG,
        "adapter_model.safetensors",
    ]
    base = AutoModelForCausalLM.from_pretrained(ROOT / "workflow/resources/tiny")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    expected = logits(trained)
    assert float((logits(loaded) - expected).abs().max() / expected.abs().max()) < 1e-5
    # vLLM: lora_alpha / r for every module, whatever its rank
    config = read_config(tmp_path / "out")
    tensors = read_tensors(tmp_path / "out/adapter_model.safetensors")
    assert config["r"] == 10 and not config["use_rslora"]
    layers = dict(trained.base_model.model.named_modules())
    stems = {name.rpartition(".lora_")[0] for name in tensors}
    assert len(stems) == 8
    for stem in stems:
        a, b = (torch.tensor(tensors[f"{stem}.lora_{x}.weight"].numbers()) for x in "AB")
        delta = layers[stem.removeprefix("base_model.model.")].get_delta_weight("default")
        one = config["lora_alpha"] / config["r"]
        assert torch.allclose(one * b @ a, delta, rtol=1e-5, atol=1e-6)


def artefact(folder: Path, form: str, **files: str) -> Path:
    """Write an export artefact with small files in weights/."""
    weights = folder / "weights"
    weights.mkdir(parents=True)
    for name, text in files.items():
        (weights / name.replace("__", ".")).write_text(text)
    write_json(folder / "export.json", {"form": form, "files": sha256_tree(weights)})
    return folder


def test_an_export_artefact_and_its_weights_are_the_same(tmp_path: Path) -> None:
    adapter(tmp_path / "made/weights")
    card = {"form": "adapter", "files": sha256_tree(tmp_path / "made/weights")}
    write_json(tmp_path / "made/export.json", card)
    for_vllm(tmp_path / "made", tmp_path / "one")
    for_vllm(tmp_path / "made/weights", tmp_path / "two")
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")
    (tmp_path / "made/weights" / CONFIG).write_text("{}")
    with pytest.raises(UserError, match="differs from the checksum"):
        for_vllm(tmp_path / "made", tmp_path / "three")


def refused(source: Path, out: Path) -> str:
    before = sha256_tree(out) if out.is_dir() else None
    with pytest.raises(UserError) as caught:
        for_vllm(source, out)
    assert (sha256_tree(out) if out.is_dir() else None) == before
    assert not list(out.parent.glob(".*.partial"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_merged_model_is_said_to_be_one(tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", "model", config__json="{}", model__safetensors="")
    expected = f"{made}/weights: is a merged model already: serve {made}/weights"
    assert refused(made, tmp_path / "out") == expected
    assert refused(made / "weights", tmp_path / "out") == expected


def test_what_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    assert "is there already" in refused(tmp_path / "adapter", tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    assert "is there already" in refused(tmp_path / "adapter", tmp_path / "mine")
    assert "no such folder" in refused(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert f"{CONFIG} is missing" in refused(tmp_path / "empty", tmp_path / "out")
    adapter(tmp_path / "dora", use_dora=True, rank_pattern={}, alpha_pattern={})
    assert "use_dora: True: merge" in refused(tmp_path / "dora", tmp_path / "out")


def test_an_adapter_whose_base_may_have_a_residual_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "train/weights")
    (tmp_path / "train/train.json").write_text("{}")
    adapter(tmp_path / "initial")
    (tmp_path / "initial/adapter_init.json").write_text("{}")
    for folder in ("train", "train/weights", "initial"):
        assert "not exported yet" in refused(tmp_path / folder, tmp_path / "out")


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_rank_vllm_needs(tmp_path: Path, rank: int, allowed: int) -> None:
    adapter(tmp_path / "adapter", r=rank, rank_pattern={}, alpha_pattern={})
    assert for_vllm(tmp_path / "adapter", tmp_path / "out") == allowed
    assert allowed in VLLM_RANKS


def test_a_rank_too_large_for_vllm(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", r=513, rank_pattern={}, alpha_pattern={})
    said = refused(tmp_path / "adapter", tmp_path / "out")
    assert "rank: 513: expected at most 512, vLLM's largest: merge" in said


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "adapter")
    source, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    assert cli.main(["export", "--for", "vllm", source, out]) == 0
    shown = capsys.readouterr().out
    assert "max_lora_rank=16" in shown and f"--lora-modules NAME={out}" in shown
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 10
    for arguments in (["export", source, out], ["export", "--for", "vllm", source]):
        assert cli.main(arguments) == 1
        assert "expected --for vllm ADAPTER_DIR OUT_DIR" in capsys.readouterr().err
    # the stage's own call still says what it lacks
    assert cli.main(["export"]) == 1
    assert "--spec: expected a spec as JSON" in capsys.readouterr().err
    assert cli.main(["export", "--spec", "{}"]) == 1
    assert "--out: expected a folder" in capsys.readouterr().err
