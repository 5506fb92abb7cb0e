"""vLLM in process says what transformers says: the stage, and every method's export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from contract.grid import Grid

from tlora.artefact import read_json, sha256_tree, write_json
from tlora.generation import Completion, Prompt
from tlora.generation.transformers import TransformersBackend
from tlora.peft_folder import read_config, scaling
from tlora.stages.generate import benchmark_records, generate
from tlora.tasks.prompts import encode_prompt, render

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "config" / "methods").glob("*.yaml"))
STAGED = ("lora", "tlora", "dora")
MODELS = ("dora", "full")
NEW = 20
STOP = ["never said", "answer is: 1"]


@dataclass
class Answers:
    """What vLLM said, and what was logged meanwhile."""

    folder: Path
    log: str
    methods: dict[str, dict[str, Completion]] = field(default_factory=dict)


def prompts(grid: Grid) -> list[Prompt]:
    """Return the prompts of the benchmark that no method was trained on."""
    from tlora.base_model import load_tokenizer

    unit = grid.cell("lora").generates["arithmetic"]
    records = benchmark_records(unit.spec["benchmark"], None)
    tokenizer = load_tokenizer(unit.placement)
    texts = [render(unit.spec["prompt"], record) for record in records]
    return [Prompt(str(at), tuple(encode_prompt(tokenizer, text))) for at, text in enumerate(texts)]


def staged_job(grid: Grid, name: str, export: Path, out: Path) -> dict[str, Any]:
    """Return the job of the stage `generate` for a method, with vLLM."""
    unit = grid.cell(name).generates["arithmetic"]
    place = unit.placement | {"stamp": unit.id, "work": str(out) + ".work"}
    return {
        "kind": "stage",
        "name": name,
        "spec": unit.spec | {"backend": "vllm"},
        "inputs": {"export": str(export)},
        "out": str(out),
        "place": place,
    }


def exported(folder: Path) -> Path:
    """Write the card of an adapter in weights/."""
    files = sha256_tree(folder / "weights")
    write_json(folder / "export.json", {"form": "adapter", "files": files})
    return folder / "export.json"


@pytest.fixture(scope="module")
def odd(
    grid: Grid,
    export: Callable[[str], Path],
    repeat: Callable[[Path, Path, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """Jobs with adapters that vLLM cannot serve: they are merged on the way.

    One has a rank above what it takes, the other is for an architecture without LoRA layers there.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("odd")
    lora = staged_job(grid, "lora", export("lora"), folder / "out")
    repeat(export("lora").parent / "weights", folder / "rank/weights", 130)
    rank = {**lora, "name": "rank", "inputs": {"export": str(exported(folder / "rank"))}}

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1024,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(5)
    model.save_pretrained(folder / "gpt2")
    AutoTokenizer.from_pretrained(lora["place"]["model"]).save_pretrained(folder / "gpt2")
    adapter = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapter)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    adapted.save_pretrained(folder / "adapter/weights")
    gpt2 = {**lora, "name": "gpt2", "inputs": {"export": str(exported(folder / "adapter"))}}
    gpt2["place"] = lora["place"] | {"model": str(folder / "gpt2")}
    return {"rank": rank, "gpt2": gpt2}


@pytest.fixture(scope="module")
def answers(
    grid: Grid,
    odd: dict[str, dict[str, Any]],
    export: Callable[[str], Path],
    drive: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """Everything that vLLM is asked, in one process; one engine for all adapters."""
    folder = tmp_path_factory.mktemp("answers")
    exports = {name: export(name) for name in NAMES}
    forms = {name: read_json(card)["form"] for name, card in exports.items()}
    assert sorted(name for name, form in forms.items() if form == "model") == sorted(MODELS)
    unit = grid.cell("lora").generates["arithmetic"]
    asked = prompts(grid)
    jobs: list[dict[str, Any]] = [
        {
            "kind": "adapters",
            "name": "all adapters",
            "identity": unit.spec["model"],
            "exports": {n: str(path) for n, path in exports.items() if n not in MODELS},
            "place": unit.placement | {"work": str(folder / "adapters")},
            "prompts": [prompt.input_ids for prompt in asked],
            "longest": max(len(prompt.input_ids) for prompt in asked) + NEW,
            "max_new_tokens": NEW,
            "stop": STOP,
            "out": str(folder / "adapters.json"),
        }
    ]
    jobs += [staged_job(grid, name, exports[name], folder / name) for name in (*STAGED, "full")]
    for name, job in odd.items():
        out = str(folder / name)
        place = job["place"] | {"work": f"{out}.work"}
        jobs.append({**job, "out": out, "place": place})
    made = Answers(folder, drive(jobs))
    for name, said in json.loads((folder / "adapters.json").read_text()).items():
        made.methods[name] = {at: Completion(**item) for at, item in said.items()}
    return made


def of_transformers(model: Any, grid: Grid) -> dict[str, Completion]:
    """Return what a model in memory says with transformers."""
    from tlora.base_model import load_tokenizer

    tokenizer = load_tokenizer(grid.cell("lora").generates["arithmetic"].placement)
    backend = TransformersBackend(model, tokenizer)
    said = [item for batch in backend.generate(prompts(grid), NEW, STOP) for item in batch]
    return {item.id: item for item in said}


@pytest.fixture(scope="module")
def base(grid: Grid) -> dict[str, Completion]:
    """What the untrained base model says."""
    return of_transformers(grid.base(), grid)


def test_base_model_speaks_alike(base: dict[str, Completion], answers: Answers) -> None:
    assert answers.methods[""] == base
    assert {item.finish_reason for item in base.values()} >= {"eos", "stop"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MODELS])
def test_exported_adapter_speaks_as_the_trained_model(
    grid: Grid, base: dict[str, Completion], answers: Answers, name: str
) -> None:
    model = grid.train(name).model
    expected = of_transformers(getattr(model, "get_base_model", lambda: model)(), grid)
    assert answers.methods[name] == expected
    assert expected != base


def test_tlora_has_mixed_ranks_and_scalings(export: Callable[[str], Path]) -> None:
    config = read_config(export("tlora").parent / "weights")
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert len(ranks) > 1
    names = [name.removeprefix("^").replace("\\", "") for name in config["rank_pattern"]]
    assert len({round(scaling(config, name), 6) for name in names}) > 1


@pytest.mark.parametrize("name", [*STAGED, "full"])
def test_stage_writes_the_same_file_with_both_backends(
    grid: Grid, answers: Answers, name: str
) -> None:
    cell = grid.cell(name)
    with_transformers = grid.make(cell.generates["arithmetic"]).read_bytes()
    folder = answers.folder / name
    assert (folder / "generations.jsonl").read_bytes() == with_transformers
    assert not Path(f"{folder}.work").exists()
    untrained = [cell for cell in grid.plan.cells if cell.base]
    of_base = grid.make(untrained[0].generates["arithmetic"]).read_bytes()
    assert with_transformers != of_base


@pytest.mark.parametrize("name", ["rank", "gpt2"])
def test_adapters_that_vllm_cannot_serve_are_merged(
    answers: Answers, odd: dict[str, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    job = odd[name]
    place = job["place"] | {"work": str(tmp_path / "work")}
    said = {}
    for given in (job["inputs"], {}):
        spec = job["spec"] | {"backend": "transformers", "export": "0123" if given else None}
        inputs = {key: Path(path) for key, path in given.items()}
        generate(spec, inputs, tmp_path / "out", place)
        said[bool(given)] = (tmp_path / "out/generations.jsonl").read_bytes()
    assert (answers.folder / name / "generations.jsonl").read_bytes() == said[True] != said[False]
    assert not Path(f"{answers.folder / name}.work").exists()
