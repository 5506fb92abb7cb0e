"""The variant "released" against what the authors' code gave on a small random Llama."""

from __future__ import annotations

import json

import pytest

from tlora import allocate, get_tlora_model, input_subspaces, sensitivity
from tlora.modules import module_shapes
from tlora.subspace import covariances, subspace_from_covariance

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def golden(shared_data):
    """(model, samples, reference numbers, reference tensors)."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = shared_data / "golden/tiny-llama"
    reference = json.loads((folder / "reference.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    samples = [
        {key: torch.tensor([values]) for key, values in sample.items()}
        for sample in reference["samples"]
    ]
    return model, samples, reference, load_file(folder / "reference.safetensors")


@pytest.fixture(scope="module")
def scores(golden):
    model, samples, _, _ = golden
    return sensitivity(model, samples, "all-linear")


@pytest.fixture(scope="module")
def allocation(golden, scores):
    model, _, reference, _ = golden
    shapes = module_shapes(model)
    return allocate(scores, reference["r"], reference["lora_alpha"], shapes, variant="released")


def test_sensitivities(golden, scores):
    expected = {name: module["score"] for name, module in golden[2]["modules"].items()}
    assert scores == pytest.approx(expected, rel=1e-4)


def test_ranks_alphas_and_scalings_exactly(golden, allocation):
    found = {name: (m.rank, m.alpha, m.scaling) for name, m in allocation.items()}
    assert found == {
        name: (module["rank"], module["alpha"], module["effective_scaling"])
        for name, module in golden[2]["modules"].items()
    }


def test_covariances(golden):
    model, samples, _, tensors = golden
    matrices, alias = covariances(model, samples, "all-linear", center=True)
    for name, owner in alias.items():
        expected = tensors[f"covariance/{name}"]
        assert (matrices[owner] - expected).norm() <= 1e-5 * expected.norm()


def min_cosine(one, other) -> float:
    return torch.linalg.svdvals(one.double() @ other.double().T).min().item()


def test_span_of_a(golden, allocation):
    model, samples, _, tensors = golden
    found = input_subspaces(model, samples, allocation.ranks, "exact", center=True)
    adapted = [name for name, rank in allocation.ranks.items() if rank > 0]
    assert len(adapted) == 17
    for name in adapted:
        assert min_cosine(found[name], tensors[f"A/{name}"]) >= 0.999


def test_span_of_a_from_the_reference_covariance(golden, allocation):
    model, _, _, tensors = golden
    for name, rank in allocation.ranks.items():
        if rank:
            weight = model.get_submodule(name).weight
            found = subspace_from_covariance(weight, tensors[f"covariance/{name}"], rank)
            assert min_cosine(found, tensors[f"A/{name}"]) >= 0.999


def test_one_call(golden):
    from transformers import AutoModelForCausalLM

    model, samples, reference, tensors = golden
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    result = get_tlora_model(
        fresh,
        samples,
        r=reference["r"],
        lora_alpha=reference["lora_alpha"],
        variant="released",
        algorithm="exact",
    ).get_base_model()
    for name, expected in reference["modules"].items():
        layer = result.get_submodule(name)
        if expected["rank"] == 0:
            assert not hasattr(layer, "lora_A")
            continue
        assert layer.r["default"] == expected["rank"]
        scaling = pytest.approx(expected["effective_scaling"], rel=1e-12)
        assert layer.scaling["default"] == scaling
        a = layer.lora_A["default"].weight
        assert a.requires_grad
        assert min_cosine(a.detach(), tensors[f"A/{name}"]) >= 0.999
