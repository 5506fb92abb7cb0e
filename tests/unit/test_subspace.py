"""Input subspaces against float64 singular value decompositions."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest

from tlora import input_subspaces, sensitivity
from tlora.errors import UserError
from tlora.modules import find_targets, module_shapes, weight_matrix
from tlora.subspace import covariances, subspace_from_covariance, subspaces_from_file

torch = pytest.importorskip("torch")
home = importlib.import_module("tlora.subspace")

FAMILIES = ["llama", "mistral", "qwen", "gemma", "gpt2", "t5"]


def oracle_covariances(model, samples, center=False) -> dict:
    """Mean over samples of X^T X in float64 from inputs caught by hooks, one sample at a time."""
    model = model.double()
    totals = {}

    def hook(name):
        def receive(_, arguments):
            x = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            if center:
                x = x - x.mean(0, keepdim=True)
            totals[name] = totals.get(name, 0) + x.T @ x / len(samples)

        return receive

    targets = find_targets(model, "all-linear")
    handles = [m.register_forward_pre_hook(hook(n)) for n, m in targets.items()]
    for sample in samples:
        model(**sample)
    for handle in handles:
        handle.remove()
    return totals


def energy(weight, covariance, rows) -> float:
    product = weight.double() @ covariance.double()
    return ((product @ rows.double().T).norm() ** 2).item()


def min_cosine(one, other) -> float:
    return torch.linalg.svdvals(one.double() @ other.double().T).min().item()


def uniform(model, rank) -> dict[str, int]:
    return dict.fromkeys(module_shapes(model), rank)


@pytest.fixture(scope="module")
def tiny_base(root):
    """The demo's base model with calibration samples of an embedded task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tlora.tasks import arithmetic

    folder = root / "workflow/resources/tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = arithmetic.load(arithmetic.Data(), "train", None)[:32]
    texts = [f"{record['instruction']} {record['response']}" for record in records]
    samples = [{"input_ids": [tokenizer(text)["input_ids"]]} for text in texts]
    weights = {n: weight_matrix(m) for n, m in find_targets(model, "all-linear").items()}
    sums, exact = {}, {}
    for center in (False, True):
        matrices, alias = covariances(model, samples, "all-linear", center)
        sums[center] = {name: matrices[alias[name]] for name in weights}
        exact[center] = {
            name: subspace_from_covariance(weight, sums[center][name], 16)
            for name, weight in weights.items()
        }
    return model, samples, weights, sums, exact


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_full_svd(tiny, rows, family, center):
    samples = rows(family)
    model = tiny(family)
    ranks = uniform(model, 5)
    found = input_subspaces(model, samples, ranks, "exact", center)
    expected = oracle_covariances(tiny(family), samples, center)
    targets = find_targets(tiny(family).double(), "all-linear")
    assert list(found) == list(ranks)
    for name, rows_ in found.items():
        product = weight_matrix(targets[name]) @ expected[name]
        _, values, right = torch.linalg.svd(product)
        assert rows_.dtype == torch.float32
        assert rows_.shape == (5, product.shape[1])
        torch.testing.assert_close(rows_ @ rows_.T, torch.eye(5), atol=1e-5, rtol=0)
        assert min_cosine(rows_, right[:5]) > 1 - 1e-5
        # In order, each with its sign: the largest entry is positive.
        captured = (product @ rows_.double().T).norm(dim=0)
        torch.testing.assert_close(captured, values[:5], rtol=1e-4, atol=0)
        assert (rows_.gather(1, rows_.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("algorithm", ["exact", "sketch"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("center", [False, True])
def test_padding_never_counts(tiny, rows, collate, family, side, algorithm, center):
    samples = rows(family)
    model = tiny(family)
    ranks = uniform(model, 4)
    single = input_subspaces(model, samples, ranks, algorithm, center)
    batched = input_subspaces(model, [collate(samples, side)], ranks, algorithm, center)
    for name in ranks:
        torch.testing.assert_close(batched[name], single[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_covariances_equal_oracle_and_shared_inputs_share(tiny, rows, family, center):
    samples = rows(family)
    matrices, alias = covariances(tiny(family), samples, "all-linear", center)
    expected = oracle_covariances(tiny(family), samples, center)
    assert list(alias) == list(expected)
    assert set(alias.values()) == set(matrices)
    for name, matrix in expected.items():
        found = matrices[alias[name]]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), matrix, rtol=1e-4, atol=1e-5 * matrix.max())


def test_which_inputs_are_shared(tiny, rows):
    _, alias = covariances(tiny("llama"), rows("llama"), "all-linear")
    layer = "model.layers.1."
    assert {name.removeprefix(layer): owner for name, owner in alias.items() if layer in name} == {
        "self_attn.q_proj": layer + "self_attn.q_proj",
        "self_attn.k_proj": layer + "self_attn.q_proj",
        "self_attn.v_proj": layer + "self_attn.q_proj",
        "self_attn.o_proj": layer + "self_attn.o_proj",
        "mlp.gate_proj": layer + "mlp.gate_proj",
        "mlp.up_proj": layer + "mlp.gate_proj",
        "mlp.down_proj": layer + "mlp.down_proj",
    }
    # All cross attentions read the encoder's output.
    _, alias = covariances(tiny("t5"), rows("t5"), "all-linear")
    cross = {
        owner
        for name, owner in alias.items()
        if name.endswith(("Attention.k", "Attention.v")) and "EncDec" in name
    }
    assert cross == {"decoder.block.0.layer.1.EncDecAttention.k"}


def test_inputs_changed_in_place_are_not_shared():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)
            self.one = torch.nn.Linear(4, 4)
            self.two = torch.nn.Linear(4, 4)
            self.config = type("Config", (), {})()

        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            first = self.one(x)
            x.mul_(2)
            return first + self.two(x)

    torch.manual_seed(0)
    matrices, alias = covariances(Model(), [{"input_ids": [[1, 2, 3]]}] * 2, ["one", "two"])
    assert alias == {"one": "one", "two": "two"}
    torch.testing.assert_close(matrices["two"], 4 * matrices["one"])


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_sketch_captures_the_energy_on_the_tiny_base_model(tiny_base, rank, center):
    model, samples, weights, sums, exact = tiny_base
    worst = {}
    for passes in (0, 1):
        found = input_subspaces(
            model, samples, uniform(model, rank), "sketch", center, passes=passes
        )
        ratios = []
        for name, weight in weights.items():
            reference = energy(weight, sums[center][name], exact[center][name][:rank])
            ratios.append(energy(weight, sums[center][name], found[name]) / reference)
            gram = found[name] @ found[name].T
            torch.testing.assert_close(gram, torch.eye(rank), atol=1e-5, rtol=0)
        worst[passes] = min(ratios)
    assert worst[0] >= 0.999
    assert worst[1] >= 0.9999
    assert inspect.signature(input_subspaces).parameters["passes"].default == 1


def test_passes_improve_a_flat_spectrum(tiny, rows):
    """Random weights are the hard case: every pass must bring the sketch nearer."""
    model, samples = tiny("llama"), rows("llama", count=12)
    # The oversampling of 32 would hold all of these small inputs.
    model_ranks = uniform(model, 2)
    matrices, alias = covariances(model, samples, "all-linear")
    weights = {n: weight_matrix(m) for n, m in find_targets(model, "all-linear").items()}
    exact = input_subspaces(model, samples, model_ranks, "exact")
    lost = []
    original = home._first_test
    home._first_test = lambda weight, rank, key: original(weight, rank, key)[:6]
    try:
        for passes in (0, 1, 2):
            found = input_subspaces(model, samples, model_ranks, passes=passes)
            lost.append(
                sum(
                    1
                    - energy(w, matrices[alias[n]], found[n])
                    / energy(w, matrices[alias[n]], exact[n])
                    for n, w in weights.items()
                )
            )
    finally:
        home._first_test = original
    assert lost[0] > 2 * lost[1] > 4 * lost[2] > 0


def test_sketch_never_forms_the_covariance(tiny, rows):
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    shapes.add(tuple(value.shape))
            return out

    model = tiny("llama")
    ranks = {"model.layers.0.mlp.down_proj": 2}
    with Watch():
        input_subspaces(model, rows("llama"), ranks, "exact")
    assert (48, 48) in shapes
    shapes.clear()
    with Watch():
        input_subspaces(model, rows("llama"), ranks, "sketch", passes=2)
    assert (48, 48) not in shapes
    # rank 2 and an oversampling of 32, but no more than the layer's 32 outputs.
    assert (32, 48) in shapes


def shared(model, samples, expected, ranks, **options):
    """Subspaces whose first run through the samples is the sensitivity's."""
    with home.sketching(model, "all-linear", expected) as start:
        sensitivity(model, samples, "all-linear")
    assert not any(module._forward_pre_hooks for module in model.modules())
    found = input_subspaces(model, samples, ranks, start=start, **options)
    assert start == {}
    return found


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_sensitivity_is_the_first_run(tiny_base, rank, monkeypatch):
    model, samples, weights, sums, exact = tiny_base
    samples = [sample | {"labels": sample["input_ids"]} for sample in samples]
    runs = []
    original = home._stream
    monkeypatch.setattr(home, "_stream", lambda *args: (runs.append(1), original(*args))[1])
    for expected in (8, rank):
        runs.clear()
        found = shared(model, samples, expected, uniform(model, rank))
        assert len(runs) <= 1
        for name, weight in weights.items():
            reference = energy(weight, sums[False][name], exact[False][name][:rank])
            assert energy(weight, sums[False][name], found[name]) >= 0.9999 * reference


def estimates(monkeypatch) -> list[float]:
    """What is estimated to be missed, module by module, as it comes to be known."""
    found, original = [], home._Image.missed
    monkeypatch.setattr(
        home._Image, "missed", lambda self: found.append(original(self)) or found[-1]
    )
    return found


def seen(test, covariance):
    sketch = home.Sketch(test)
    sketch.sums += test @ covariance
    return sketch


@pytest.mark.parametrize("rank", [2, 4])
def test_estimate_of_what_is_missed(tiny, rows, monkeypatch, rank):
    """Beside what is missed indeed, on flat spectra, where perturbation theory is at its worst."""
    model, samples = tiny("llama", hidden_size=128, intermediate_size=160), rows("llama", count=16)
    ranks = uniform(model, rank)
    matrices, alias = covariances(model, samples)
    exact = input_subspaces(model, samples, ranks, "exact")
    estimated = estimates(monkeypatch)
    monkeypatch.setattr(home, "sketch_rows", lambda rows, columns, rank: 24)
    found = input_subspaces(model, samples, ranks, passes=1, tolerance=1)
    assert len(estimated) == len(ranks), "further runs were made"
    for (name, layer), share in zip(
        find_targets(model, "all-linear").items(), estimated, strict=True
    ):
        weight, matrix = weight_matrix(layer), matrices[alias[name]]
        missed = 1 - energy(weight, matrix, found[name]) / energy(weight, matrix, exact[name])
        assert missed / 3 < share < 10 * missed + 1e-7, name


@pytest.mark.parametrize("key", ["a", "b", "c", "d", "e"])
def test_a_flat_rest_is_not_taken_for_what_is_missed(key):
    """Directions that are weaker than all that were found add up, and none of them is missed."""
    strengths = torch.cat([torch.logspace(0, -1, 20), torch.full((180,), 0.05)])
    first = torch.eye(24, 200)
    image = home._Image(
        torch.eye(200), 20, seen(home._probed(first, key), strengths.diag()).factor(True)
    )
    assert (image.subspace()[:, :20].abs().sum() - 20).abs() < 1e-3, "all was found"
    assert image.missed() < 1e-4
    strengths[30] = 0.5
    image = home._Image(
        torch.eye(200), 20, seen(home._probed(first, key), strengths.diag()).factor(True)
    )
    assert image.missed() > 0.01, "one that is stronger was not"


def test_further_runs_are_for_those_that_need_them(tiny_base, monkeypatch):
    model, samples, weights, sums, exact = tiny_base
    estimated, streams, original = estimates(monkeypatch), [], home._stream
    monkeypatch.setattr(
        home, "_stream", lambda *args: (streams.append(list(args[2])), original(*args))[1]
    )
    ranks = uniform(model, 8)
    for tolerance in (1, 1e-5, 0):
        estimated.clear()
        streams.clear()
        found = input_subspaces(model, samples, ranks, passes=2, tolerance=tolerance)
        first = dict(zip(ranks, estimated[: len(ranks)], strict=True))
        left = [name for name in ranks if 2 * first[name] > tolerance]
        assert streams[:2] == [list(ranks), left] if left else streams == [list(ranks)]
        for name in ranks.keys() - set(left):
            reference = energy(weights[name], sums[False][name], exact[False][name][:8])
            captured = energy(weights[name], sums[False][name], found[name])
            assert captured >= (1 - tolerance) * reference
        assert bool(left) == (tolerance < 1)
        assert (len(left) == len(ranks)) == (tolerance == 0)


def test_what_only_late_samples_hold_is_found(monkeypatch):
    """A direction that a turned sketch is blind to: only the probes, which do not turn, see it."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(101, 200)
            self.one = torch.nn.Linear(200, 200)
            self.config = type("Config", (), {})()

        def forward(self, input_ids, attention_mask=None):
            return self.one(self.embed(input_ids))

    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        # All tokens but the last lie in 100 directions, more than the sketch has rows.
        model.embed.weight.copy_(torch.eye(101, 200) * torch.logspace(0, -1, 101)[:, None])
        model.embed.weight[100, 100] = 2
        model.one.weight.copy_(torch.eye(200))
    early = torch.randint(0, 100, (20, 1, 60), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": ids} for ids in early] + [{"input_ids": [[100] * 59]}]
    estimated = estimates(monkeypatch)
    found = input_subspaces(model, samples, {"one": 4})["one"]
    assert found[0].abs().argmax() == 100, "the strongest direction of all"
    assert estimated[0] > 0.1


def test_much_larger_ranks_than_expected_take_a_further_run(tiny, rows, monkeypatch):
    model, samples = tiny("llama"), rows("llama")
    monkeypatch.setattr(home, "sketch_rows", lambda rows, columns, rank: rank)
    monkeypatch.setattr(home, "further_rows", lambda rows, columns, rank: rank)
    runs = []
    original = home._stream
    monkeypatch.setattr(home, "_stream", lambda *args: (runs.append(1), original(*args))[1])
    for rank, passes, count in ((4, 1, 1), (4, 0, 0), (4, 2, 2), (5, 0, 1), (5, 1, 1), (6, 1, 2)):
        runs.clear()
        found = shared(model, samples, 4, uniform(model, rank), passes=passes)
        assert len(runs) == count
        for one in found.values():
            torch.testing.assert_close(one @ one.T, torch.eye(rank), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(30, 80), (120, 80)])
def test_a_further_run_adds_to_what_is_known(shape):
    """C is rebuilt as from all rows of both runs, and so is W C, tall or wide."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    basis = torch.linalg.qr(torch.randn(80, 80)).Q
    covariance = (basis * torch.logspace(0, -4, 80)) @ basis.T
    first = home._orthonormal_rows(torch.randn(20, 80))
    image = home._Image(weight, 5, seen(home._probed(first, "a"), covariance).factor(True))
    test = image.aim("a")
    assert len(test) == min(5 + 32 + home._PROBES, shape[0])
    assert not {"image", "thrown", "left", "right"} & vars(image).keys(), "waits for the next run"
    factor = seen(test, covariance).factor(False, image.factor)
    rows = torch.cat([first, test]).double()
    sums = rows @ covariance.double()
    expected = sums.T @ torch.linalg.pinv(sums @ rows.T, rtol=1e-9) @ sums
    found = factor.scale * factor.rows.double().T @ factor.rows.double()
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    right = torch.linalg.svd(weight.double() @ expected).Vh[:5]
    assert min_cosine(home._Image(weight, 5, factor, image).subspace(), right) > 1 - 1e-6
    alone = home._Image(weight, 5, image.factor).subspace()
    assert min_cosine(alone, right) < 1 - 1e-4, "the first run did not show it all"


def test_what_checkpointing_runs_again_counts_once(tiny, rows):
    sketches = []
    for checkpointing in (False, True):
        model = tiny("llama")
        if checkpointing:
            model.gradient_checkpointing_enable()
        with home.sketching(model, "all-linear", 4) as start:
            sensitivity(model, rows("llama"), "all-linear")
        sketches.append(start)
    for name, sketch in sketches[0].items():
        torch.testing.assert_close(sketches[1][name].sums, sketch.sums, rtol=1e-4, atol=1e-5)
        assert sketches[1][name].tokens == sketch.tokens > 0


def test_start_of_other_targets_is_refused(tiny, rows):
    model = tiny("llama")
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: is no target"):
        input_subspaces(model, rows("llama"), uniform(model, 2), start={})


def test_the_head_as_a_target_sees_all_tokens(tiny, rows):
    model = tiny("llama")
    for target in ("lm_head", "model.layers.1.mlp.down_proj"):
        matrices, _ = covariances(model, rows("llama"), [target])
        with torch.no_grad():
            totals = []
            handle = model.get_submodule(target).register_forward_pre_hook(
                lambda _, arguments, totals=totals: totals.append(arguments[0][0])
            )
            for sample in rows("llama"):
                model(sample["input_ids"])
            handle.remove()
        expected = sum(x.T @ x for x in totals) / len(totals)
        torch.testing.assert_close(matrices[target], expected, rtol=1e-4, atol=1e-4)


def test_oversampling():
    weight = torch.eye(500)
    assert home._first_test(weight, 4, "a").shape == (4 + 32, 500)
    assert home._first_test(weight, 200, "a").shape == (400, 500)
    assert home._first_test(weight[:100], 10, "a").shape == (10 + 50, 500)
    assert home._first_test(weight[:40], 20, "a").shape == (40, 500)


def test_deterministic_given_the_seed(tiny, rows):
    def run(seed, algorithm="sketch"):
        torch.manual_seed(torch.seed() % 1000)
        return input_subspaces(
            tiny("llama"), rows("llama"), uniform(tiny("llama"), 2), algorithm, seed=seed, passes=0
        )

    one, two, three = run(0), run(0), run(1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)
    exact = [run(seed, "exact") for seed in (0, 1)]
    assert all(torch.equal(exact[0][name], exact[1][name]) for name in one)


def test_global_random_state_is_untouched(tiny, rows):
    model = tiny("llama")
    before = torch.get_rng_state()
    input_subspaces(model, rows("llama"), uniform(model, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("algorithm", ["exact", "sketch"])
def test_every_pass_sees_the_same_samples(tiny, rows, algorithm):
    samples = rows("llama")
    read = []

    class Shuffling:
        def __iter__(self):
            read.append(1)
            return iter(samples if len(read) == 1 else samples[:1])

    model, ranks = tiny("llama"), uniform(tiny("llama"), 3)
    expected = input_subspaces(model, samples, ranks, algorithm, passes=2)
    for batches in (Shuffling(), iter(samples)):
        found = input_subspaces(model, batches, ranks, algorithm, passes=2)
        assert all(torch.equal(found[name], expected[name]) for name in ranks)
    assert len(read) == 1


def test_own_rank_for_every_module_and_none_for_rank_0(tiny, rows):
    model = tiny("llama")
    names = list(module_shapes(model))
    ranks = {names[3]: 7, names[0]: 0, names[6]: 32}
    for algorithm in ("sketch", "exact"):
        found = input_subspaces(model, rows("llama"), ranks, algorithm)
        assert {n: tuple(t.shape) for n, t in found.items()} == {
            names[3]: (7, 32),
            names[0]: (0, 32),
            names[6]: (32, 48),
        }


@pytest.mark.parametrize("algorithm", ["exact", "sketch"])
def test_rows_stay_orthonormal_where_the_input_has_few_directions(tiny, algorithm):
    """Two tokens span two directions: the other rows are filled up."""
    model = tiny("llama")
    ranks = uniform(model, 12)
    found = input_subspaces(model, [{"input_ids": [[5, 9]]}], ranks, algorithm)
    for rows_ in found.values():
        assert rows_.shape[0] == 12
        torch.testing.assert_close(rows_ @ rows_.T, torch.eye(12), atol=1e-4, rtol=0)


@pytest.mark.parametrize("algorithm", ["exact", "sketch"])
def test_input_that_is_always_zero(tiny, rows, algorithm):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    found = input_subspaces(model, rows("llama"), {"model.layers.0.mlp.down_proj": 3}, algorithm)
    (rows_,) = found.values()
    torch.testing.assert_close(rows_ @ rows_.T, torch.eye(3), atol=1e-5, rtol=0)


def test_tall_and_wide_weights():
    torch.manual_seed(0)
    for shape in ((7, 20), (20, 7), (9, 9)):
        weight = torch.randn(shape)
        x = torch.randn(30, shape[1])
        right = torch.linalg.svd(weight.double() @ (x.T @ x).double()).Vh
        found = subspace_from_covariance(weight, x.T @ x, 4)
        assert min_cosine(found, right[:4]) > 1 - 1e-6


@pytest.mark.parametrize("algorithm", ["exact", "sketch"])
def test_bfloat16_model(tiny, rows, algorithm):
    model = tiny("llama").to(torch.bfloat16)
    ranks = uniform(model, 3)
    found = input_subspaces(model, rows("llama"), ranks, algorithm)
    exact = input_subspaces(model.float(), rows("llama"), ranks, "exact")
    for name in ranks:
        assert found[name].dtype == torch.float32
        assert min_cosine(found[name], exact[name]) > 0.9


def test_model_is_left_as_it_was(tiny, rows):
    model = tiny("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]

    def check():
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == grads
        assert not any(m._forward_pre_hooks for m in model.modules())

    input_subspaces(model, rows("llama"), uniform(model, 2))
    check()
    broken = [*rows("llama"), {"input_ids": [[10**6]]}]
    with pytest.raises(IndexError):
        input_subspaces(model, broken, uniform(model, 2))
    check()


def test_from_file(tiny, rows, tmp_path):
    from safetensors.torch import save_file

    model = tiny("t5")
    matrices, alias = covariances(model, rows("t5"), "all-linear")
    save_file(matrices, tmp_path / "calibration.safetensors")
    (tmp_path / "calibration.json").write_text(json.dumps({"alias": alias}))
    ranks = uniform(model, 4) | {"encoder.block.0.layer.0.SelfAttention.q": 0}
    found = subspaces_from_file(model, tmp_path / "calibration.json", ranks)
    expected = input_subspaces(model, rows("t5"), ranks, "exact")
    assert list(found) == list(ranks)
    assert all(torch.equal(found[name], expected[name]) for name in ranks)
    alias["encoder.block.0.layer.0.SelfAttention.k"] = "gone"
    (tmp_path / "calibration.json").write_text(json.dumps({"alias": alias}))
    with pytest.raises(UserError, match=r"SelfAttention\.k: no covariance"):
        subspaces_from_file(model, tmp_path / "calibration.json", ranks)


class TestBadInput:
    """One line that names what is wrong."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ranks": {"nowhere": 2}}, "nowhere: no module"),
            ({"ranks": {"model.layers.0.mlp": 2}}, "is a LlamaMLP"),
            ({"ranks": {"model.layers.0.mlp.up_proj": 33}}, "rank 33: expected 0 to 32"),
            ({"ranks": {"model.layers.0.mlp.up_proj": -1}}, "rank -1"),
            ({"algorithm": "magic"}, "algorithm: 'magic'"),
            ({"passes": 3}, "passes: 3"),
            ({"batches": []}, "no sample"),
        ],
    )
    def test_arguments(self, tiny, rows, change, message):
        good = {"batches": rows("llama"), "ranks": {"model.layers.0.mlp.up_proj": 2}}
        with pytest.raises(UserError, match=message):
            input_subspaces(tiny("llama"), **{**good, **change})

    @pytest.mark.parametrize("algorithm", ["exact", "sketch"])
    def test_nan_names_the_module(self, tiny, rows, algorithm):
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] = float("nan")
        ranks = {f"model.layers.{i}.self_attn.q_proj": 2 for i in (0, 1)}
        with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj: input is NaN"):
            input_subspaces(model, rows("llama"), ranks, algorithm)

    def test_module_without_input(self, tiny, rows):
        model = tiny("llama")
        model.extra = torch.nn.Linear(4, 4)
        with pytest.raises(UserError, match="extra: gets no input"):
            input_subspaces(model, rows("llama"), {"extra": 2})
