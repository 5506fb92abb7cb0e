"""What every method must satisfy; a new file in config/methods is tested unasked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from contract.grid import Grid

from tlora import methods, params
from tlora.artefact import check_files, read_json, sha256_tree
from tlora.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "config" / "methods").glob("*.yaml"))
FULL = "full"


def distance(found: list[Any], expected: list[Any]) -> float:
    """Largest difference over the largest magnitude."""
    scale = max(float(logits.abs().max()) for logits in expected)
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / scale


def initial(grid: Grid, name: str) -> Path | None:
    """Return the folder of a method's A0 and B0, None where they are drawn at the start."""
    unit = grid.cell(name).units.get("initialize")
    return grid.make(unit).parent if unit else None


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_base_model(grid: Grid, name: str) -> None:
    assert distance(grid.logits(grid.fresh(name)), grid.logits(grid.base())) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_starts_near_the_base_model_in_bfloat16(grid: Grid, halved: Grid, name: str) -> None:
    # The residual is rounded to bfloat16 once more: bounded by what rounding the weights does.
    base = halved.logits(halved.base())
    noise = distance(base, grid.logits(grid.base()))
    assert distance(halved.logits(halved.fresh(name)), base) <= 1.5 * noise


@pytest.mark.parametrize("name", NAMES)
def test_trains_what_it_says_and_nothing_else(grid: Grid, name: str) -> None:
    run = grid.train(name)
    after = dict(run.model.named_parameters())
    assert {n for n, p in after.items() if p.requires_grad} == run.trainable
    changed = {n for n, p in after.items() if not p.equal(run.before[n])}
    assert changed <= run.trainable
    # E of AdaLoRA is masked, and a gradient may be exactly 0; whole kinds of weights may not stay.
    kinds = {n.split(".lora_")[-1] for n in run.trainable}
    assert {n.split(".lora_")[-1] for n in changed} == kinds
    card = read_json(grid.path(grid.cell(name).units["train"]))
    assert card["trainable_parameters"] == sum(after[n].numel() for n in run.trainable)
    assert card["trainable_parameters"] == counted(grid, name)
    assert grid.loss(run.model) < 0.99 * grid.loss(grid.base())


def counted(grid: Grid, name: str) -> int:
    """Return what `tlora params` counts, with the ranks that the run has."""
    unit, start = grid.cell(name).units["train"], initial(grid, name)
    module = methods.load(unit.spec["implementation"])
    context = methods.Context(
        *(unit.spec[key] for key in ("rank", "lora_alpha", "target_modules", "seed")),
        ranks=params.read_ranks(start) if start else None,
    )
    model = params.on_meta(grid.plan.models["random"][0].path, "causal")
    return params.count(model, module, module.options(unit.spec["options"]), context).trainable


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_are_those_of_its_initialisation(grid: Grid, name: str) -> None:
    cell = grid.cell(name)
    options = cell.units["train"].spec["options"]
    module = cell.units["train"].spec["implementation"]
    frozen = options.get("freeze_a", module == "lora_fa")
    run = grid.train(name)
    assert any(".lora_A." in n for n in run.trainable) == (not frozen and name != FULL)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_exported_are_what_was_trained(grid: Grid, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = grid.logits(grid.train(name).model)
    cell = grid.cell(name)
    card = grid.make(cell.units["export"])
    exported = read_json(card)
    weights = card.parent / "weights"
    check_files(weights, exported["files"])
    assert distance(expected, grid.logits(grid.base())) > 1e-2
    if exported["form"] == "model":
        model = AutoModelForCausalLM.from_pretrained(weights)
        assert distance(grid.logits(model), expected) <= 1e-5
    else:
        config = json.loads((weights / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["init_lora_weights"] is True
        assert str(grid.folder) not in json.dumps(config)
        model = PeftModel.from_pretrained(grid.base(), weights)
        assert distance(grid.logits(model), expected) <= 1e-5
        assert distance(grid.logits(model.merge_and_unload()), expected) <= 2e-5
    if name != FULL:
        base = grid.base()
        start = initial(grid, name)
        if start is not None:
            from tlora.adapter import load_initial

            base = load_initial(base, start).unload()
        saved = PeftModel.from_pretrained(base, train_weights(grid, name))
        assert distance(grid.logits(saved), expected) <= 1e-5


def train_weights(grid: Grid, name: str) -> Path:
    return grid.make(grid.cell(name).units["train"]).parent / "weights"


@pytest.mark.parametrize("name", NAMES)
def test_folded_export_is_what_was_trained(grid: Grid, name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    from tlora.adapter import fold_scaling

    grid.train(name)
    card = grid.make(grid.cell(name).units["export"])
    if read_json(card)["form"] == "model":
        return  # merged: what serves is the model itself
    fold_scaling(card.parent / "weights", tmp_path / "folded")
    config = read_json(tmp_path / "folded" / "adapter_config.json")
    assert config["alpha_pattern"] == config["rank_pattern"] and config["r"] == config["lora_alpha"]
    model = PeftModel.from_pretrained(grid.base(), tmp_path / "folded")
    assert distance(grid.logits(model), grid.logits(grid.train(name).model)) <= 1e-5


# 10 steps, a checkpoint every 2. AdaLoRA prunes at steps 2 and 4, for good from step 5.
STOPS = [(name, (7,)) for name in NAMES] + [("adalora", (4,)), ("adalora", (5, 7, 9))]


@pytest.mark.parametrize(("name", "steps"), STOPS)
def test_resumed_is_the_same_as_uninterrupted(
    grid: Grid, name: str, steps: tuple[int, ...], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    grid.train(name)
    whole = grid.path(grid.cell(name).units["train"]).parent
    resumed = grid.interrupted(name, steps, tmp_path / "run").parent
    for path in (whole / "weights").glob("*.safetensors"):
        one, other = load_file(path), load_file(resumed / "weights" / path.name)
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].equal(other[key]), key
    config = "adapter_config.json"
    if (whole / "weights" / config).is_file():
        assert read_json(whole / "weights" / config) == read_json(resumed / "weights" / config)
    rows = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 10


def test_base_weights_on_disk_stay(grid: Grid) -> None:
    folder = Path(grid.plan.models["random"][0].path)
    before = sha256_tree(folder)
    for name in NAMES:
        grid.make(grid.cell(name).units["export"])
    assert sha256_tree(folder) == before


def test_statistics_are_shared(grid: Grid) -> None:
    made = [unit.spec["statistic"] for unit in grid.plan.of("calibrate")]
    assert sorted(made) == ["covariance", "gradient", "sensitivity"]


def test_random_a_follows_the_seed(grid: Grid) -> None:
    name = "tlora_random_a"
    unit = grid.cell(name).units["train"]
    module = methods.load(unit.spec["implementation"])
    drawn = []
    for seed in (1, 2, 1):
        model = grid.fresh(name)
        module.trainer(model, module.options(unit.spec["options"]), {"seed": seed})
        drawn.append({n: p.clone() for n, p in model.named_parameters() if ".lora_A." in n})
    assert all(drawn[0][n].equal(drawn[2][n]) for n in drawn[0])
    assert not any(drawn[0][n].equal(drawn[1][n]) for n in drawn[0])


def test_adalora_prunes_to_its_budget(grid: Grid) -> None:
    config = read_json(train_weights(grid, "adalora") / "adapter_config.json")
    kept = sum(sum(mask) for mask in config["rank_pattern"].values())
    assert (config["init_r"], config["target_r"]) == (4, 3)
    assert kept == 3 * len(config["rank_pattern"])
    exported = grid.make(grid.cell("adalora").units["export"]).parent / "weights"
    ranks = read_json(exported / "adapter_config.json")["rank_pattern"]
    assert 0 < sum(ranks.values()) <= kept


def test_adalora_term_counts_once_whatever_the_micro_batch(grid: Grid, tmp_path: Path) -> None:
    unit = grid.cell("adalora").units["train"]
    losses = []
    for micro in (1, 4):
        unit.place["micro_batch"] = micro
        main = grid.make(unit, tmp_path / str(micro))
        rows = (main.parent / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    unit.place["micro_batch"] = 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def refused(implementation: str, model: Any, options: dict | None = None, **values: Any) -> str:
    module = methods.load(implementation)
    context = methods.Context(
        **{"rank": 4, "lora_alpha": 4, "target_modules": "all-linear", "seed": 0, **values}
    )
    with pytest.raises(UserError) as caught:
        module.adapt(model, module.options(options or {}), context)
    assert str(caught.value).startswith(f"{implementation}: ")
    return str(caught.value)


def tiny(kind: str) -> Any:
    import transformers

    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_ff=32, d_kv=8, num_layers=1, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def test_methods_refuse_models_that_they_do_not_fit() -> None:
    assert "Conv1D" in refused("olora", tiny("gpt2"), target_modules=["c_fc"])
    assert "encoder-decoder" in refused("eva", tiny("t5"))
    assert "rank: 1" in refused("adalora", tiny("t5"), rank=1)


ADAPTERS = sorted(
    path.stem
    for path in (ROOT / "tlora" / "methods").glob("*.py")
    if path.stem not in ("__init__", FULL)
)


@pytest.mark.parametrize("implementation", ADAPTERS)
def test_quantised_weights_are_refused(implementation: str) -> None:
    model = tiny("t5")
    model.encoder.block[0].layer[0].SelfAttention.q.qweight = object()
    message = refused(implementation, model)
    assert "SelfAttention.q" in message and "quantised" in message


def rows(kind: str) -> list[dict[str, Any]]:
    """Return a few random samples of a family."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (40, 50, 60):
        ids = torch.randint(3, 32, (1, length), generator=generator)
        labels = ids.clone() if kind == "gpt2" else ids[:, :20]
        found.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.clone()}
        )
    return found


def statistics(module: Any, options: Any, model: Any, samples: list, folder: Path) -> dict:
    """Calibrate what a method reads, all-linear."""
    from safetensors.torch import save_file

    from tlora.artefact import write_json
    from tlora.stages import calibrate

    found = {}
    for name, wanted in module.statistics(options).items():
        compute = getattr(calibrate, f"_{name}")
        spec = {"target_modules": "all-linear", "options": wanted}
        tensors, alias = compute(model, samples, spec)
        save_file(tensors, folder / f"{name}.safetensors")
        write_json(folder / f"{name}.json", {"alias": alias})
        found[name] = folder / f"{name}.json"
    return found


OTHERS = [
    (kind, *method)
    for kind in ("gpt2", "t5")
    for method in [(name, {}) for name in ADAPTERS if name != "tlora"]
    + [("lora", {"use_dora": True}), ("corda", {"mode": "kpm"})]
    if (kind, method[0]) not in (("gpt2", "olora"), ("t5", "eva"))
]


@pytest.mark.parametrize(("kind", "implementation", "values"), OTHERS)
def test_other_families_start_as_the_base_model(
    kind: str, implementation: str, values: dict, tmp_path: Path
) -> None:
    import torch

    from tlora.adapter import load_initial, save_initial

    module = methods.load(implementation)
    options = module.options(values)
    torch.manual_seed(0)
    model = tiny(kind).eval()
    samples = rows(kind)
    with torch.no_grad():
        expected = [model(**sample).logits[0] for sample in samples]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = methods.Context(
        rank=4,
        lora_alpha=8,
        target_modules="all-linear",
        seed=0,
        statistics=statistics(module, options, model, samples, tmp_path),
        batches=lambda: samples,
    )
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    adapted = module.adapt(model, options, context)
    if module.initializes:
        frozen = save_initial(adapted, tmp_path / "initial")
        clean = tiny(kind).eval()
        clean.load_state_dict(state)
        adapted = load_initial(clean, tmp_path / "initial", frozen)
    with torch.no_grad():
        found = [adapted.eval()(**sample).logits[0] for sample in samples]
    assert distance(found, expected) <= 1e-5
    assert sum(p.requires_grad for p in adapted.parameters()) > 0


def test_method_modules_import_no_torch() -> None:
    program = (
        "import importlib, pkgutil, sys, tlora.methods as m\n"
        "[importlib.import_module(f'tlora.methods.{x.name}')"
        " for x in pkgutil.iter_modules(m.__path__)]\n"
        "print([x for x in ('torch', 'transformers', 'peft') if x in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
