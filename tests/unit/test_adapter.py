"""The adapter is stock PEFT: exact at the start, frozen for good, and loads without the package."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tlora import (
    allocate,
    build_adapter,
    fold_scaling,
    freeze_a,
    get_tlora_model,
    input_subspaces,
    sensitivity,
)
from tlora.adapter import export_adapter, frozen_names, fused, load_initial, save_initial
from tlora.errors import UserError
from tlora.modules import module_shapes
from tlora.peft_folder import Stored, read_tensors, write_tensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

FAMILIES = ["llama", "mistral", "qwen", "gemma", "gpt2", "t5"]


def logits(model, samples):
    """Concatenated logits of all samples, without gradients."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**s).logits.flatten(0, 1).float() for s in samples])


def adapted(tiny, rows, family="llama", r=4, **options):
    model = tiny(family)
    return get_tlora_model(model, rows(family), r=r, lora_alpha=2 * r, **options)


def fill_b(model, scale=0.05):
    """Stand for training: B is no longer 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(noise)
    return model


def trainable(model) -> set[str]:
    """Which kinds of weights would be trained."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {"A" if ".lora_A." in n else "B" if ".lora_B." in n else n for n in names}


def a_weights(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_A." in n}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_before_training_equal_the_base_models(tiny, rows, family, dtype):
    model = tiny(family).to(getattr(torch, dtype))
    samples = rows(family)
    before = logits(model, samples)
    result = get_tlora_model(model, samples, r=4, lora_alpha=8)
    assert isinstance(result, peft.PeftModel)
    assert torch.equal(logits(result, samples), before)
    # The adapter is really there.
    fill_b(result)
    assert not torch.equal(logits(result, samples), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_ranks_scalings_and_a(tiny, rows, family):
    model, samples = tiny(family), rows(family)
    scores = sensitivity(model, samples, "all-linear")
    allocation = allocate(scores, 3, 12, module_shapes(model))
    assert len(set(allocation.ranks.values())) > 1
    subspaces = input_subspaces(model, samples, allocation.ranks)
    result = build_adapter(model, allocation, subspaces)
    layers = {
        name: layer
        for name, layer in result.get_base_model().named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert set(layers) == {name for name, rank in allocation.ranks.items() if rank}
    mean = sum(scores.values()) / len(scores)
    for name, layer in layers.items():
        assert layer.r["default"] == allocation[name].rank
        assert layer.scaling["default"] == pytest.approx(4 * scores[name] / mean, rel=1e-12)
        assert torch.equal(layer.lora_A["default"].weight, subspaces[name])
        assert not layer.lora_B["default"].weight.any()


def test_rank_0_gets_no_adapter(tiny, rows):
    model, samples = tiny("llama"), rows("llama")
    scores = dict.fromkeys(module_shapes(model), 1.0)
    idle = "model.layers.1.mlp.up_proj"
    scores[idle] = 1e-6
    allocation = allocate(scores, 2, 2, module_shapes(model))
    result = build_adapter(model, allocation, input_subspaces(model, samples, allocation.ranks))
    base = result.get_base_model()
    assert type(base.get_submodule(idle)) is torch.nn.Linear
    assert not base.get_submodule(idle).weight.requires_grad
    assert isinstance(base.get_submodule("model.layers.0.mlp.up_proj"), peft.tuners.lora.LoraLayer)


def test_names_that_end_other_names():
    """PEFT takes a listed name as the end of a name, too."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
            self.tower = torch.nn.Module()
            self.tower.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
            self.config = type("Config", (), {"model_type": "none"})()

        def forward(self, x):
            return self.tower.layers[0](self.layers[0](x))

    shapes = {"layers.0": (4, 4)}
    allocation = allocate({"layers.0": 1.0}, 2, 6, shapes)
    result = build_adapter(Model(), allocation, {"layers.0": torch.eye(2, 4)})
    found = [n for n, m in result.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert found == ["base_model.model.layers.0"]
    shapes["tower.layers.0"] = (4, 4)
    allocation = allocate({"layers.0": 1.0, "tower.layers.0": 3.0}, 2, 6, shapes)
    rows_ = {name: torch.eye(rank, 4) for name, rank in allocation.ranks.items()}
    result = build_adapter(Model(), allocation, rows_)
    found = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in result.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert found == {"layers.0": (1, 1.5), "tower.layers.0": (3, 4.5)}


class TestFrozen:
    """A stays frozen through everything that PEFT does with an adapter."""

    def test_from_the_start(self, tiny, rows):
        assert trainable(adapted(tiny, rows)) == {"B"}
        assert trainable(adapted(tiny, rows, freeze_a=False)) == {"A", "B"}
        assert trainable(adapted(tiny, rows, variant="released")) == {"A", "B"}

    def test_set_adapter_and_disable(self, tiny, rows):
        model = adapted(tiny, rows)
        model.set_adapter("default")
        assert trainable(model) == {"B"}
        with model.disable_adapter():
            pass
        assert trainable(model) == {"B"}
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
        assert trainable(model) == {"B"}
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("other")
        model.set_adapter("default")
        assert trainable(model) == {"B"}

    def test_merge_and_unmerge(self, tiny, rows):
        samples = rows("llama")
        model = fill_b(adapted(tiny, rows))
        before = logits(model, samples)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, samples), before, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, samples), before, atol=1e-5, rtol=1e-5)
        assert trainable(model) == {"B"}
        merged = model.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        torch.testing.assert_close(logits(merged, samples), before, atol=1e-5, rtol=1e-5)

    def test_disabled_adapter_is_the_base_model(self, tiny, rows):
        samples = rows("llama")
        before = logits(tiny("llama"), samples)
        model = fill_b(adapted(tiny, rows))
        with model.disable_adapter():
            assert torch.equal(logits(model, samples), before)

    def test_loading_forgets_and_freeze_a_registers_again(self, tiny, rows, tmp_path):
        adapted(tiny, rows).save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
        assert trainable(model) == {"A", "B"}, "PEFT keeps it: freeze_a could go"
        assert freeze_a(model) is model
        assert trainable(model) == {"B"}
        model.set_adapter("default")
        assert trainable(model) == {"B"}
        assert frozen_names(model) == ["lora_A"]
        with pytest.raises(UserError, match="no LoRA adapter 'other'"):
            freeze_a(model, "other")

    def test_one_layer_is_not_all_layers(self, tiny, rows):
        """The registry is a class attribute in PEFT: other adapters must not see ours."""
        adapted(tiny, rows)
        other = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
        assert trainable(other) == {"A", "B"}

    def test_trainer_trains_b_alone_and_resume_keeps_it_so(self, tiny, rows, collate, tmp_path):
        from transformers import Trainer, TrainingArguments

        samples = rows("llama", count=8)

        def trainer(model, steps):
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=0.01,
                lr_scheduler_type="constant",
                save_steps=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                gradient_checkpointing=True,
            )
            return Trainer(
                model=model, args=arguments, train_dataset=samples, data_collator=collate
            )

        model = adapted(tiny, rows)
        start = a_weights(model)
        trainer(model, 2).train()
        resumed = adapted(tiny, rows)
        trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for found in (model, resumed):
            assert trainable(found) == {"B"}
            after = a_weights(found)
            assert all(torch.equal(start[name], after[name]) for name in start)
            assert any(p.any() for n, p in found.named_parameters() if ".lora_B." in n)
        whole = adapted(tiny, rows)
        trainer(whole, 4).train()
        for (name, one), (_, two) in zip(
            whole.named_parameters(), resumed.named_parameters(), strict=True
        ):
            torch.testing.assert_close(one, two, msg=name)


class TestSaved:
    """Saved folders are plain PEFT."""

    def test_config_is_neutral(self, tiny, rows, tmp_path):
        model = tiny("llama")
        model.name_or_path = "/somewhere/on/this/machine"
        model = get_tlora_model(model, rows("llama"), r=4, lora_alpha=8)
        model.save_pretrained(tmp_path / "peft")
        save_initial(model, tmp_path / "initial")
        for folder in ("peft", "initial"):
            config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
            assert config["init_lora_weights"] is True
            assert not config["base_model_name_or_path"]
            assert config["peft_type"] == "LORA"
            assert all(key.startswith("^model\\.layers\\.") for key in config["rank_pattern"])
            assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()

    def test_public_name_of_the_base_is_kept(self, tiny, rows, tmp_path):
        model = tiny("llama")
        model.name_or_path = "group/model"
        model = get_tlora_model(model, rows("llama"), r=4, lora_alpha=8)
        assert model.peft_config["default"].base_model_name_or_path == "group/model"

    def test_loads_where_the_package_is_not_installed(self, tiny, rows, tmp_path):
        script = """
            import sys
            class Refuse:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] == "tlora":
                        raise ImportError(name)
            sys.meta_path.insert(0, Refuse())
            import torch, transformers
            from peft import PeftModel
            folder = sys.argv[1]
            for family, kind in (("llama", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM"),
                                 ("gpt2", "AutoModelForCausalLM")):
                base = getattr(transformers, kind).from_pretrained(f"{folder}/{family}")
                model = PeftModel.from_pretrained(base, f"{folder}/{family}-adapter").eval()
                inputs, expected = torch.load(f"{folder}/{family}.pt")
                with torch.no_grad():
                    found = model(**inputs).logits
                assert torch.equal(found, expected), family
            assert "tlora" not in sys.modules
            """
        for family in ("llama", "t5", "gpt2"):
            tiny(family).save_pretrained(tmp_path / family)
            model = fill_b(adapted(tiny, rows, family)).eval()
            model.save_pretrained(tmp_path / f"{family}-adapter")
            sample = rows(family)[2]
            with torch.no_grad():
                torch.save((sample, model(**sample).logits), tmp_path / f"{family}.pt")
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
        subprocess.run(command, check=True, cwd=tmp_path)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_initial_round_trip(self, tiny, rows, tmp_path, family, dtype):
        dtype = getattr(torch, dtype)
        samples = rows(family)
        before = logits(tiny(family).to(dtype), samples)
        model = get_tlora_model(tiny(family).to(dtype), samples, r=4, lora_alpha=8)
        frozen = save_initial(model, tmp_path)
        assert frozen == ["lora_A"]
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        loaded = load_initial(tiny(family).to(dtype), tmp_path, frozen)
        assert trainable(loaded) == {"B"}
        assert torch.equal(logits(loaded, samples), before)
        one, two = a_weights(model), a_weights(loaded)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_initial_is_byte_deterministic(self, tiny, rows, tmp_path):
        for name in ("one", "two"):
            save_initial(adapted(tiny, rows), tmp_path / name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
            assert one == two
        config = json.loads((tmp_path / "one/adapter_config.json").read_text())
        assert config["target_modules"] == sorted(config["target_modules"])

    def test_initial_that_does_not_fit(self, tiny, rows, tmp_path):
        save_initial(adapted(tiny, rows), tmp_path)
        with pytest.raises(UserError, match="does not fit the base model"):
            load_initial(tiny("gpt2"), tmp_path)
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
            load_initial(tiny("llama"), tmp_path)


class TestResidual:
    """Adapters whose B0 is not 0."""

    @pytest.fixture(params=["llama", "gpt2"])
    def pissa(self, request, tiny, rows, tmp_path):
        family = request.param
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            init_lora_weights="pissa",
            target_modules="all-linear",
            rank_pattern={"mlp.down_proj": 2},
        )
        model = peft.get_peft_model(tiny(family), config)
        assert save_initial(model, tmp_path / "initial") == []
        return family, tmp_path

    def test_start_equals_the_base_model(self, pissa, tiny, rows):
        family, folder = pissa
        samples = rows(family)
        base = tiny(family)
        before = logits(base, samples)
        model = load_initial(base, folder / "initial", [])
        assert trainable(model) == {"A", "B"}
        torch.testing.assert_close(logits(model, samples), before, atol=2e-5, rtol=1e-5)
        # Otherwise the adapter would have been lost.
        with model.disable_adapter():
            assert not torch.allclose(logits(model, samples), before, atol=1e-2)
        config = json.loads((folder / "initial/adapter_config.json").read_text())
        assert config["init_lora_weights"] is True

    @pytest.mark.parametrize("rslora", [False, True])
    def test_export_is_the_trained_function_on_the_unmodified_base(
        self, tiny, rows, tmp_path, rslora
    ):
        samples = rows("llama")
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            init_lora_weights="pissa",
            target_modules=["q_proj", "down_proj"],
            rank_pattern={} if rslora else {"down_proj": 2},
            alpha_pattern={} if rslora else {"down_proj": 5},
        )
        save_initial(peft.get_peft_model(tiny("llama"), config), tmp_path / "initial")
        model = load_initial(tiny("llama"), tmp_path / "initial", [])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        expected = logits(model, samples)
        model.save_pretrained(tmp_path / "trained")
        export_adapter(tmp_path / "trained", tmp_path / "initial", tmp_path / "export")
        loaded = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "export")
        torch.testing.assert_close(logits(loaded, samples), expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(expected, logits(tiny("llama"), samples), atol=1e-2)
        ranks = {layer.r["default"] for layer in loaded.modules() if hasattr(layer, "lora_A")}
        assert ranks == ({8} if rslora else {8, 4})
        assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]

    def test_without_residual_it_is_a_copy(self, tiny, rows, tmp_path):
        model = adapted(tiny, rows)
        save_initial(model, tmp_path / "initial")
        fill_b(model).save_pretrained(tmp_path / "trained")
        trained = read_tensors(tmp_path / "trained/adapter_model.safetensors")
        for name, initial in (("with", tmp_path / "initial"), ("without", None)):
            export_adapter(tmp_path / "trained", initial, tmp_path / name)
            assert read_tensors(tmp_path / name / "adapter_model.safetensors") == trained

    def test_bfloat16_survives(self, tiny, tmp_path):
        config = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"])
        model = peft.get_peft_model(tiny("llama"), config).to(torch.bfloat16)
        save_initial(model, tmp_path / "initial")
        state = {n: p.clone() for n, p in peft.get_peft_model_state_dict(model).items()}
        fill_b(model).save_pretrained(tmp_path / "trained")
        export_adapter(tmp_path / "trained", tmp_path / "initial", tmp_path / "export")
        from safetensors.torch import load_file

        found = load_file(tmp_path / "export/adapter_model.safetensors")
        after = peft.get_peft_model_state_dict(model)
        for name, tensor in found.items():
            assert tensor.dtype == torch.bfloat16
            axis, sign = (0, 1) if ".lora_A." in name else (1, -1)
            expected = torch.cat([after[name], sign * state[name]], dim=axis)
            assert torch.equal(tensor, expected)

    def test_folders_that_do_not_fit(self, tiny, tmp_path):
        for name, rank, targets in (
            ("a", 2, ["q_proj"]),
            ("b", 3, ["q_proj"]),
            ("c", 2, ["v_proj"]),
        ):
            config = peft.LoraConfig(r=rank, init_lora_weights="pissa", target_modules=targets)
            save_initial(peft.get_peft_model(tiny("llama"), config), tmp_path / name)
        with pytest.raises(UserError, match="shape"):
            export_adapter(tmp_path / "a", tmp_path / "b", tmp_path / "out")
        with pytest.raises(UserError, match="other modules"):
            export_adapter(tmp_path / "a", tmp_path / "c", tmp_path / "out")


class TestFold:
    """One directory that scales right in PEFT and where one scaling rules all modules."""

    @pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
    def test_same_logits_with_one_scaling(self, tiny, rows, tmp_path, family):
        samples = rows(family)
        model = fill_b(adapted(tiny, rows, family))
        expected = logits(model, samples)
        model.save_pretrained(tmp_path / "adapter")
        fold_scaling(tmp_path / "adapter", tmp_path / "folded")
        loaded = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "folded")
        size = expected.abs().max().item()
        torch.testing.assert_close(logits(loaded, samples), expected, atol=2e-4 * size, rtol=0)
        assert not torch.allclose(logits(tiny(family), samples), expected, atol=0.02 * size)
        config = json.loads((tmp_path / "folded/adapter_config.json").read_text())
        ranks = [m.r["default"] for m in model.modules() if hasattr(m, "lora_A")]
        assert config["r"] == config["lora_alpha"] == max(ranks)
        assert config["alpha_pattern"] == config["rank_pattern"]
        layers = [m for m in loaded.modules() if hasattr(m, "lora_A")]
        assert {layer.scaling["default"] for layer in layers} == {1.0}
        assert sorted(layer.r["default"] for layer in layers) == sorted(ranks)
        # What a reader does that knows r and lora_alpha only, as vLLM.
        del config["alpha_pattern"]
        assert config["lora_alpha"] / config["r"] == 1

    def test_b_is_multiplied_in_float32(self, tiny, rows, tmp_path):
        model = fill_b(adapted(tiny, rows)).to(torch.bfloat16)
        save_initial(model, tmp_path / "adapter")
        fold_scaling(tmp_path / "adapter", tmp_path / "folded")
        tensors = read_tensors(tmp_path / "folded/adapter_model.safetensors")
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                b = layer.lora_B["default"].weight
                folded = tensors[f"base_model.model.{name}.lora_B.weight"]
                assert folded.dtype == "F32"
                expected = (b.double() * layer.scaling["default"]).float()
                assert np.array_equal(folded.numbers(), expected.detach().numpy())

    def test_rslora(self, tiny, rows, tmp_path):
        config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
        model = fill_b(peft.get_peft_model(tiny("llama"), config))
        model.save_pretrained(tmp_path / "adapter")
        fold_scaling(tmp_path / "adapter", tmp_path / "folded")
        loaded = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "folded")
        samples = rows("llama")
        torch.testing.assert_close(
            logits(loaded, samples), logits(model, samples), atol=1e-5, rtol=1e-4
        )

    def test_refuses_what_it_cannot_fold(self, tiny, tmp_path):
        config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])
        peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "dora")
        with pytest.raises(UserError, match="use_dora"):
            fold_scaling(tmp_path / "dora", tmp_path / "out")
        with pytest.raises(UserError, match="another folder"):
            fold_scaling(tmp_path / "dora", tmp_path / "dora")
        with pytest.raises(UserError, match="is missing"):
            fold_scaling(tmp_path, tmp_path / "out")


def test_exporting_and_folding_import_no_torch(tiny, rows, tmp_path):
    model = adapted(tiny, rows)
    save_initial(fill_b(model), tmp_path / "adapter")
    code = """
import sys
from tlora.adapter import export_adapter, fold_scaling
folder = sys.argv[1]
export_adapter(f"{folder}/adapter", f"{folder}/adapter", f"{folder}/export")
fold_scaling(f"{folder}/export", f"{folder}/folded")
heavy = {"torch", "transformers", "peft"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_safetensors_bytes(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "a": torch.randn(2, 2),
        "h": torch.randn(4).half(),
        "e": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "one.safetensors")
    stored = read_tensors(tmp_path / "one.safetensors")
    for name, tensor in tensors.items():
        assert np.array_equal(stored[name].numbers(), tensor.float().numpy())
        again = Stored.of(stored[name].numbers(), stored[name].dtype)
        assert again == stored[name]
    write_tensors(tmp_path / "two.safetensors", stored)
    for name, tensor in load_file(tmp_path / "two.safetensors").items():
        assert torch.equal(tensor, tensors[name])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-4])
    for name in ("cut", "none"):
        with pytest.raises(UserError, match=f"{name}.safetensors"):
            read_tensors(tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="no safetensors file"):
        read_tensors(tmp_path / "text.safetensors")


class TestOneCall:
    """`get_tlora_model` is the four steps."""

    def test_equals_the_steps(self, tiny, rows):
        model, samples = tiny("llama"), rows("llama")
        scores = sensitivity(model, samples, ["q_proj", "up_proj"])
        shapes = module_shapes(model, ["q_proj", "up_proj"])
        allocation = allocate(scores, 4, 8, shapes)
        subspaces = input_subspaces(model, samples, allocation.ranks)
        expected = a_weights(build_adapter(model, allocation, subspaces))
        found = a_weights(adapted(tiny, rows, target_modules=["q_proj", "up_proj"]))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_batches_are_read_once(self, tiny, rows, collate):
        samples = rows("llama")
        reads = []

        class Shuffling:
            """A loader that gives other samples every time."""

            def __iter__(self):
                reads.append(1)
                return iter([collate(samples)] if len(reads) == 1 else [samples[0]])

        expected = a_weights(adapted(tiny, rows))
        for batches in (Shuffling(), iter(samples), (s for s in samples)):
            model = get_tlora_model(tiny("llama"), batches, r=4, lora_alpha=8)
            found = a_weights(model)
            assert found.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
        assert len(reads) == 1

    def test_reads_no_more_samples_than_asked_for(self, tiny, rows):
        samples = rows("llama")

        def endless():
            while True:
                yield from samples

        found = get_tlora_model(tiny("llama"), endless(), r=4, lora_alpha=8, calibration_samples=5)
        expected = a_weights(adapted(tiny, rows))
        assert all(torch.equal(p, expected[name]) for name, p in a_weights(found).items())
        with pytest.raises(UserError, match="calibration_samples: 0"):
            get_tlora_model(tiny("llama"), samples, r=4, calibration_samples=0)

    def test_data_loader(self, tiny, rows, collate):
        from torch.utils.data import DataLoader

        loader = DataLoader(rows("llama"), batch_size=2, shuffle=True, collate_fn=collate)
        model = get_tlora_model(tiny("llama"), loader, r=4, lora_alpha=8)
        assert trainable(model) == {"B"}

    def test_alpha_defaults_to_r(self, tiny, rows):
        model = get_tlora_model(tiny("llama"), rows("llama"), r=4)
        assert model.peft_config["default"].lora_alpha == 4

    def test_exhausted_iterator(self, tiny):
        with pytest.raises(UserError, match="no sample"):
            get_tlora_model(tiny("llama"), iter(()), r=4)

    def test_subspaces_that_do_not_fit(self, tiny):
        name = "model.layers.0.mlp.up_proj"
        allocation = allocate({name: 1.0}, 3, 3, {name: (48, 32)})
        for subspaces in ({}, {name: torch.zeros(2, 32)}):
            with pytest.raises(UserError, match=r"up_proj: subspace of shape .*expected \(3, 32\)"):
                build_adapter(tiny("llama"), allocation, subspaces)


# -- the fused forward pass of training ------------------------------------------------------------


def losses_and_gradients(model, samples):
    """The loss of each sample, and all gradients of them, each flattened into one tensor."""
    model.eval()  # no dropout of the model's own
    model.zero_grad()
    found = [model(**sample).loss for sample in samples]
    sum(found).backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.requires_grad]
    return torch.stack(found).detach(), torch.cat(gradients)


def relative(found, expected) -> float:
    """The norm of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen", "t5"])
def test_fused_is_the_same_function(tiny, rows, family, freeze):
    """To rounding, trained A or not, with biases; afterwards PEFT's own again."""
    model = fill_b(adapted(tiny, rows, family, freeze_a=freeze)).double()
    samples = rows(family)
    expected = losses_and_gradients(model, samples)
    before = logits(model, samples)
    with fused(model):
        assert any("forward" in layer.__dict__ for layer in model.modules())
        for found, wanted in zip(losses_and_gradients(model, samples), expected, strict=True):
            assert relative(found, wanted) < 1e-10
        with model.disable_adapter():
            plain = logits(model, samples)
        assert not torch.equal(plain, before)
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    assert torch.equal(logits(model, samples), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, samples), plain)


def test_fused_bfloat16_is_nearer_to_float32(tiny, rows):
    """Under autocast, as Trainer trains, what a layer answers is rounded less often."""
    model = fill_b(adapted(tiny, rows), scale=1.0)
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        layer.base_layer.bfloat16()
        weight = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
        exact = x.float() @ weight.T
        stock = layer(x)
        with fused(model):
            # Without autocast the two precisions do not mix: PEFT casts.
            assert torch.equal(layer(x), stock)
            with torch.autocast("cpu", torch.bfloat16):
                found = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            stock = layer(x)
    assert found.dtype == stock.dtype == torch.bfloat16
    assert relative(found.float(), exact) < relative(stock.float(), exact) < 0.02


@pytest.mark.parametrize("freeze", [True, False])
def test_autograd_keeps_no_input_of_a_frozen_a(freeze):
    """What the A branch reads is not kept for the backward pass, only what it makes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    layers = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    if freeze:
        freeze_a(layers)
    x, kept = torch.randn(10, 64, requires_grad=True), []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with fused(layers), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layers(x).sum().backward()
    assert ((10, 64) in kept) is not freeze
    assert (10, 4) in kept


@pytest.mark.parametrize("option", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_fused_leaves_other_layers_alone(option):
    """Dropout, DoRA and a bias of B are PEFT's."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    layers = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], **option))
    with fused(layers):
        assert not any("forward" in layer.__dict__ for layer in layers.modules())
