"""Samples that go through a model together: each one's results are its own."""

from __future__ import annotations

import importlib

import pytest

from tlora import grouping, input_subspaces, sensitivity
from tlora.errors import UserError
from tlora.modules import find_targets, module_shapes, read_samples

torch = pytest.importorskip("torch")
subspace = importlib.import_module("tlora.subspace")

LENGTHS = [9, 9, 12, 11, 10, 9, 5, 12, 11, 9, 3]


def samples_of(lengths=LENGTHS, seed: int = 0) -> list[dict]:
    """Samples whose prompts, which have no labels, differ in length."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 64, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, : 1 + index % 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many samples each group had that was asked for."""
    found, original = [], grouping.group

    def group(*args, **kwargs):
        groups = original(*args, **kwargs)
        assert sorted(index for indices in groups for index in indices) == list(range(len(args[1])))
        found.extend(map(len, groups))
        return groups

    for home in (subspace, importlib.import_module("tlora.sensitivity")):
        monkeypatch.setattr(home, "group", group)
    return found


@pytest.fixture
def alone(monkeypatch):
    """A switch: every sample goes alone from then on, in the order of the groups."""
    return lambda: monkeypatch.setattr(grouping, "_TOKENS", 0)


def test_groups_are_small_and_hardly_padded():
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = grouping._by_length([{"input_ids": torch.ones(1, n)} for n in lengths])
    assert sorted(index for indices in groups for index in indices) == list(range(200))
    for indices in groups:
        size = max(lengths[index] for index in indices) * len(indices)
        assert len(indices) == 1 or size <= 512
        assert size - sum(lengths[index] for index in indices) <= size / 8
    ends = {sum(map(len, groups[:count])) for count in range(len(groups) + 1)}
    assert {1, 4, 16, 64} <= ends, "a sketch turns there"
    assert len(groups) < 120


def test_samples_with_other_inputs_go_alone():
    samples = [{"input_ids": torch.ones(1, 5), "position_ids": torch.ones(1, 5)}] * 6
    assert grouping._by_length(samples) == [[index] for index in range(6)]


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "cohere"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sensitivity_is_that_of_each_alone(tiny, sizes, family, dtype):
    dtype = getattr(torch, dtype)
    samples = samples_of()
    together = sensitivity(tiny(family).to(dtype), samples)
    assert max(sizes) > 2
    each = [sensitivity(tiny(family).to(dtype), [sample]) for sample in samples]
    expected = {name: sum(one[name] for one in each) / len(each) for name in together}
    assert together == pytest.approx(expected, rel=2e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sketch_is_that_of_each_alone(tiny, sizes, alone, family, center):
    samples = samples_of()
    model = tiny(family)
    sketches = []
    for _ in range(2):
        with subspace.sketching(model, rank=4, center=center) as start:
            sensitivity(model, samples)
        sketches.append(start)
        alone()
    assert max(sizes) > 2
    assert sizes[-len(samples) :] == [1] * len(samples)
    probes = slice(-subspace._PROBES, None)
    for name in sketches[0]:
        exact = subspace.covariances(model, samples, [name], center)[0][name] * len(samples)
        for sketch in sketches:
            # They are not turned, so that they show C to rounding: no trial, no padding is in it.
            test, sums = sketch[name].test[probes], sketch[name].sums[probes]
            torch.testing.assert_close(sums, test @ exact, rtol=1e-4, atol=1e-3)


def mixing(model):
    """Its samples are not independent: the mean over those that go together is taken off."""
    model.model.layers[0].register_forward_hook(lambda _, __, output: output - output.mean(0) / 2)


def summing(model):
    """Its loss is the sum over label tokens."""
    original = model.forward

    def forward(input_ids, labels=None, **options):
        output = original(input_ids=input_ids, labels=labels, **options)
        if labels is not None:
            output.loss = output.loss * (labels[:, 1:] != -100).sum()
        return output

    model.forward = forward


def flattening(model):
    """A layer gets the tokens of all samples in one row, as an expert does."""
    layer = model.model.layers[0].mlp
    original = layer.forward
    layer.forward = lambda x: original(x.flatten(0, -2)).view_as(x)


@pytest.mark.parametrize("change", [mixing, summing, flattening])
def test_models_that_do_otherwise_get_samples_one_by_one(tiny, sizes, change):
    samples = samples_of()
    found = []
    for together in (True, False):
        model = tiny("llama")
        change(model)
        each = [samples] if together else [[sample] for sample in samples]
        values = [sensitivity(model, part) for part in each]
        found.append({name: sum(v[name] for v in values) / len(values) for name in values[0]})
    assert set(sizes) == {1}
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    sizes.clear()
    input_subspaces(model, samples, dict.fromkeys(module_shapes(model), 2))
    assert (max(sizes) > 1) == (change is summing), "a sketch needs no loss"


def test_encoder_decoder_models_get_samples_one_by_one(tiny, rows, sizes):
    sensitivity(tiny("t5"), [rows("t5")[0]] * 3)
    assert sizes == [1, 1, 1]


def test_the_sample_that_is_nan_is_named(tiny, sizes):
    model, samples = tiny("llama"), samples_of()
    samples[4]["input_ids"][0, 6:] = 3  # beyond what a trial looks at
    for index, sample in enumerate(samples):
        if index != 4:
            sample["input_ids"][sample["input_ids"] == 3] = 5
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("nan")
    with pytest.raises(UserError, match="gradient is NaN or infinite at calibration sample 4"):
        sensitivity(model, samples)
    assert max(sizes) > 2
    assert all(p.grad is None for p in model.parameters())


def test_a_trial_sees_padding(tiny):
    """A model that reads padding would be told by it."""
    model = tiny("llama")
    original = model.forward
    model.forward = lambda attention_mask=None, **options: original(**options)
    samples = read_samples([{"input_ids": s["input_ids"].flip(1)} for s in samples_of([8] * 4)])
    targets = find_targets(model, "all-linear")
    # right padding is harmless to a causal model without its mask,
    assert max(map(len, grouping.group(model, samples, targets))) > 1
    # not to one that reads both ways
    model.forward = lambda input_ids, **options: original(input_ids=input_ids.flip(1), **options)
    assert grouping.group(model, samples, targets) == [[0], [1], [2], [3]]
