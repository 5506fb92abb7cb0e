"""The sensitivity against a float64 oracle, its memory discipline, and what it refuses."""

from __future__ import annotations

import importlib

import pytest

from tlora import sensitivity
from tlora.errors import UserError
from tlora.modules import find_targets

torch = pytest.importorskip("torch")
home = importlib.import_module("tlora.sensitivity")

FAMILIES = ["llama", "mistral", "qwen", "gemma", "gpt2", "t5"]


def oracle(model, samples, target="all-linear") -> dict[str, float]:
    """mean |W * grad W| per sample in float64 from one naive backward a sample, then the mean."""
    model = model.double()
    targets = find_targets(model, target)
    totals = dict.fromkeys(targets, 0.0)
    for sample in samples:
        logits = model(**sample).logits
        labels = sample["labels"]
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        loss = -chosen[labels != -100].mean()
        gradients = torch.autograd.grad(loss, [m.weight for m in targets.values()])
        for (name, module), gradient in zip(targets.items(), gradients, strict=True):
            totals[name] += (module.weight.detach() * gradient).abs().mean().item()
    return {name: total / len(samples) for name, total in totals.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_float64_oracle(tiny, rows, family):
    samples = rows(family)
    found = sensitivity(tiny(family), samples, "all-linear")
    expected = oracle(tiny(family), samples)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=2e-5)
    assert min(expected.values()) > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batching_and_padding_change_nothing(tiny, rows, collate, family, side):
    samples = rows(family)
    single = sensitivity(tiny(family), samples, "all-linear")
    batched = [collate(samples[:3], side), collate(samples[3:], side)]
    assert sensitivity(tiny(family), batched, "all-linear") == pytest.approx(single, rel=1e-9)


def test_samples_weigh_the_same_whatever_their_length(tiny, rows):
    """A mean over all label tokens of a batch would weigh long samples more."""
    samples = rows("llama")
    each = [sensitivity(tiny("llama"), [sample], "all-linear") for sample in samples]
    together = sensitivity(tiny("llama"), samples, "all-linear")
    for name, value in together.items():
        # but for the rounding of what goes through the model together
        assert value == pytest.approx(sum(one[name] for one in each) / len(each), rel=1e-6)


def test_bfloat16(tiny, rows):
    samples = rows("llama")
    exact = sensitivity(tiny("llama"), samples, "all-linear")
    rough = sensitivity(tiny("llama").to(torch.bfloat16), samples, "all-linear")
    assert rough == pytest.approx(exact, rel=0.1)


def shared_layer(model) -> str:
    """Give the model one more use of a target weight: two layers hold it."""
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    return "all-linear"


def repeated_layer(model) -> str:
    """One layer that a forward pass goes through twice."""
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj = first.up_proj
    return "all-linear"


def tied_head(model) -> str:
    """A target that is the embedding, too."""
    model.lm_head.weight = model.model.embed_tokens.weight
    return r"lm_head|.*\.q_proj"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", [shared_layer, repeated_layer, tied_head])
def test_all_uses_of_a_weight_count(tiny, rows, monkeypatch, change, checkpointing):
    """The gradient is their sum, and its absolute value is no sum of theirs."""
    model, exact, samples = tiny("llama"), tiny("llama"), rows("llama")
    target = change(model)
    change(exact)
    expected = oracle(exact, samples, target)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole, mean = [], home._Products.mean
    monkeypatch.setattr(home._Products, "mean", lambda *a: (whole.append(a[3:] == ()), mean(*a))[1])
    assert sensitivity(model, samples, target) == pytest.approx(expected, rel=2e-5)
    assert whole.count(True) == len(samples), "of one weight the whole gradient was to be made"


def test_weight_that_is_used_beside_its_layer_is_refused(tiny, rows):
    model = tiny("llama")
    layer, norm = model.model.layers[0].self_attn.o_proj, model.model.norm
    norm.register_forward_hook(lambda *a: a[2] + layer.weight.mean())
    with pytest.raises(UserError, match=r"layers\.0.*o_proj: the model uses its weight beside"):
        sensitivity(model, rows("llama"))
    assert all(p.grad is None for p in model.parameters())


class Double(torch.nn.Linear):
    """A layer that is linear in its weight, but not by `nn.Linear`'s forward."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


def test_layers_of_a_kind_of_their_own(tiny, rows):
    found = []
    for kind in (Double, torch.nn.Linear):
        model = tiny("llama")
        layer = model.model.layers[0].mlp.down_proj
        own = kind(layer.in_features, layer.out_features, bias=False)
        own.weight = torch.nn.Parameter(layer.weight.detach() * (1 if kind is Double else 2))
        model.model.layers[0].mlp.down_proj = own
        found.append(sensitivity(model, rows("llama")))
    # W dL/dW is the same however a product is shared out between the weight and a factor.
    assert found[0] == pytest.approx(found[1], rel=2e-5)


def test_under_autocast(tiny, rows):
    exact = sensitivity(tiny("llama"), rows("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        rough = sensitivity(tiny("llama"), rows("llama"))
    assert rough == pytest.approx(exact, rel=0.1)
    assert rough != exact


def test_no_weight_gradient_is_made(tiny, rows, monkeypatch):
    """Beside the pieces nothing as large as a weight comes to be."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in tree_leaves(out):
                if torch.is_tensor(value) and value.untyped_storage()._cdata not in known:
                    sizes.append(value.untyped_storage().nbytes() // 4)
            return out

    model, sizes = tiny("llama"), []
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    targets = [f"{name}_proj" for name in ("gate", "up", "down")]
    least = min(m.weight.numel() for m in find_targets(model, targets).values())
    monkeypatch.setitem(home._CHUNK, "cpu", least // 4)
    with Watch():
        sensitivity(model, [rows("llama")[0]], targets)
    assert least // 8 < max(sizes) < least
    assert all(p.grad is None for p in model.parameters())


def test_products_in_pieces(tiny, rows, monkeypatch):
    whole = sensitivity(tiny("gpt2"), rows("gpt2"), "all-linear")
    monkeypatch.setitem(home._CHUNK, "cpu", 100)
    assert sensitivity(tiny("gpt2"), rows("gpt2"), "all-linear") == pytest.approx(whole, rel=1e-6)


def test_devices_are_waited_for_once_a_backward_pass(tiny, rows, monkeypatch):
    """Sensitivities stay on their device; what the model itself reads does not count."""
    model, samples, made = tiny("llama"), rows("llama"), []
    original, read = home._Products.mean, home._read
    monkeypatch.setattr(home._Products, "mean", lambda *a: made.append(original(*a)) or made[-1])
    reads = []
    monkeypatch.setattr(home, "_read", lambda found: reads.append(len(found)) or read(found))
    home.sensitivity(model, samples, "all-linear")
    assert set(reads) == {14}
    assert len(reads) <= len(samples)
    assert {(type(value), value.dtype, value.dim()) for value in made} == {
        (torch.Tensor, torch.float64, 1)
    }
    assert sum(len(value) for value in made) == 14 * len(samples)


def test_frozen_parameters_get_no_gradient(tiny, rows):
    model, seen = tiny("llama"), set()
    handle = model.lm_head.register_forward_hook(
        lambda *_: seen.update(n for n, p in model.named_parameters() if p.requires_grad)
    )
    sensitivity(model, rows("llama"), "all-linear")
    handle.remove()
    assert seen == {f"{name}.weight" for name in find_targets(model, "all-linear")}


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_used_and_changes_nothing(tiny, rows, family, reentrant):
    samples = rows(family)

    def run(model) -> tuple[dict[str, float], int]:
        runs = []
        layer = next(
            m for n, m in model.named_modules() if n.endswith(("mlp.act_fn", "DenseReluDense.act"))
        )
        handle = layer.register_forward_hook(lambda *_: runs.append(1))
        try:
            return sensitivity(model, samples, "all-linear"), len(runs)
        finally:
            handle.remove()

    expected, plain = run(tiny(family))
    model = tiny(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, checkpointed = run(model)
    assert found == pytest.approx(expected, rel=1e-6)
    # A trial of what may go together has three runs without a backward pass.
    assert checkpointed - plain == plain - (3 if family == "llama" else 0)
    assert all("forward" not in vars(module) for module in model.modules())


def state(model) -> list:
    """Everything that a caller may have set on a model."""
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    parameters = [
        (p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or ()), p.clone().tolist())
        for p in model.parameters()
    ]
    return [modules, parameters]


def unusual(model):
    """Set modes, requires_grad and gradients that are neither all on nor all off."""
    model.train()
    model.model.layers[0].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    kept = model.model.layers[1].mlp.up_proj.weight
    kept.grad = torch.ones_like(kept)
    return kept.grad


def test_model_is_left_as_it_was(tiny, rows):
    model = tiny("llama")
    gradient = unusual(model)
    before = state(model)
    sensitivity(model, rows("llama"), "all-linear")
    after = state(model)
    assert after[0] == before[0]
    assert [p[:1] + p[2:] for p in after[1]] == [p[:1] + p[2:] for p in before[1]]
    assert [p.grad is gradient for p in model.parameters()].count(True) == 1
    assert (gradient == 1).all()


def test_model_is_left_as_it_was_after_an_exception(tiny, rows):
    model = tiny("llama")
    unusual(model)
    model.gradient_checkpointing_enable()
    before = state(model)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sensitivity(model, rows("llama"), "all-linear")
    handle.remove()
    after = state(model)
    assert after[0] == before[0]
    assert [p[:1] + p[2:] for p in after[1]] == [p[:1] + p[2:] for p in before[1]]


def test_dropout_is_off(tiny, rows):
    model = tiny("t5").train()
    assert sensitivity(model, rows("t5"), "all-linear") == sensitivity(
        tiny("t5"), rows("t5"), "all-linear"
    )
    assert model.training


def test_tied_weight_counts_for_both_of_its_layers(tiny, rows):
    model = tiny("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    found = sensitivity(model, rows("llama"), ["up_proj"])
    assert len(set(found.values())) == 1
    assert len(found) == 2


class TestTargets:
    """Which layers `target_modules` names."""

    def test_all_linear_leaves_the_output_head_out(self, tiny):
        for family in FAMILIES:
            names = find_targets(tiny(family), "all-linear")
            assert names
            assert not any("lm_head" in name for name in names)

    def test_same_as_peft(self, tiny):
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        for family in FAMILIES:
            mine = set(find_targets(tiny(family), "all-linear"))
            peft = get_peft_model(tiny(family), LoraConfig(target_modules="all-linear"))
            base = peft.get_base_model()
            assert mine == {n for n, m in base.named_modules() if isinstance(m, LoraLayer)}

    def test_list_and_regular_expression(self, tiny):
        expected = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
        assert list(find_targets(tiny("llama"), ["v_proj", "q_proj"])) == expected
        assert list(find_targets(tiny("llama"), r".*\.self_attn\.[qv]_proj")) == expected
        assert list(find_targets(tiny("llama"), [expected[3]])) == expected[3:]

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (["q_porj"], "'q_porj'.*did you mean 'q_proj'"),
            (["q_proj", "wte"], "'wte'.*linear layers here"),
            (["mlp"], "'mlp'.*is a LlamaMLP: expected nn.Linear or Conv1D"),
            (["embed_tokens"], "is a Embedding"),
            ("nothing.*", "'nothing.*'.*matches no linear layer of LlamaForCausalLM"),
            ("[", "no regular expression"),
            ([], "matches no linear layer"),
        ],
    )
    def test_what_matches_nothing_is_refused(self, tiny, target, message):
        with pytest.raises(UserError, match=message):
            find_targets(tiny("llama"), target)

    def test_quantised_layers_are_refused_by_name(self, tiny):
        model = tiny("llama")
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        for target in ("all-linear", ["up_proj"]):
            with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*quantised"):
                find_targets(model, target)

    def test_packed_layers_are_refused_by_name(self, tiny):
        class QuantLinear(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

        model = tiny("llama")
        model.model.layers[0].mlp.up_proj = QuantLinear()
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj.*quantised"):
            find_targets(model, "all-linear")

    def test_weights_that_are_not_loaded_are_refused(self, tiny):
        model = tiny("llama")
        model.model.layers[0].mlp.up_proj.to("meta")
        with pytest.raises(UserError, match="not loaded"):
            find_targets(model, "all-linear")

    def test_adapted_model_is_refused(self, tiny):
        from peft import LoraConfig, get_peft_model

        with pytest.raises(UserError, match="already carries an adapter"):
            find_targets(get_peft_model(tiny("llama"), LoraConfig()), "all-linear")


class TestBadInput:
    """One line that names what is wrong."""

    def test_nan_names_the_layer(self, tiny, rows):
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
        message = r"layers\.1\.self_attn\.v_proj: weight is NaN or infinite at calibration sample 0"
        with pytest.raises(UserError, match=message):
            sensitivity(model, rows("llama"), "all-linear")
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "no sample"),
            (iter(()), "no sample"),
            ({"input_ids": [[1, 2]]}, "one dict"),
            ([[1, 2]], "item 0: list: expected a dict with input_ids"),
            ([{"labels": [[1, 2]]}], "expected a dict with input_ids"),
            ([{"input_ids": [[1, 2], [3]]}], "input_ids: expected numbers of equal length"),
            ([{"input_ids": [[3, 4, 5]]}], "no labels"),
            ([{"input_ids": [[3, 4]], "labels": [[-100, -100]]}], "without label tokens"),
            ([{"input_ids": [[3, 4]], "labels": [[3, -100]]}], "without label tokens"),
            ([{"input_ids": [[3, 4]], "labels": [[3, 4, 5]]}], "labels of shape"),
            (
                [{"input_ids": [[3, 4]], "attention_mask": [[0, 0]], "labels": [[3, 4]]}],
                "without tokens",
            ),
        ],
    )
    def test_samples(self, tiny, batches, message):
        with pytest.raises(UserError, match=message):
            sensitivity(tiny("llama"), batches, "all-linear")

    def test_encoder_decoder_without_labels(self, tiny):
        for labels, message in ((None, "no labels"), ([[-100, -100]], "without label tokens")):
            with pytest.raises(UserError, match=message):
                sensitivity(tiny("t5"), [{"input_ids": [[3, 4]], "labels": labels}], "all-linear")

    def test_layer_outside_the_loss(self, tiny, rows):
        model = tiny("llama")
        model.extra = torch.nn.Linear(4, 4)
        with pytest.raises(UserError, match="extra: takes no part in the loss"):
            sensitivity(model, rows("llama"), ["q_proj", "extra"])
