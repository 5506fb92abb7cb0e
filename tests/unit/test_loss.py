"""The chunked loss: the same as the model's own, without logits, and left out where it is not."""

from __future__ import annotations

import contextlib

import pytest

from tlora.loss import _function, chunked_loss

torch = pytest.importorskip("torch")

VOCABULARY = 512


@pytest.fixture
def build(tiny):
    """As `tiny`, with a vocabulary that is large beside the hidden size."""
    return lambda family, **more: tiny(family, **{"vocab_size": VOCABULARY, **more})


def adapted(model):
    """Put LoRA with a B that is not 0 on a model."""
    from peft import LoraConfig, get_peft_model

    found = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return found


def batch(rows: int = 3, tokens: int = 20) -> dict:
    """Return a right-padded batch with masked prompts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 4 + row] = -100
        mask[row, tokens - 2 * row :] = 0
        labels[row, tokens - 2 * row :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model, inputs: dict, **more) -> tuple[float, dict]:
    """Return the loss and the gradients of what is trained."""
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("count", [None, 100, torch.tensor(100)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen", "gpt2", "granite", "cohere"])
def test_loss_and_gradients_are_the_models_own(build, family, count):
    model, inputs = adapted(build(family)), batch()
    more = {} if count is None else {"num_items_in_batch": count}
    expected, gradients = step(model, inputs, **more)
    with chunked_loss(model) as used:
        assert used
        found, ours = step(model, inputs, **more)
    assert found == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert step(model, inputs, **more)[0] == expected, "the model was not left as it was"


def test_torchs_own_function():
    from torch.nn.functional import linear_cross_entropy

    hidden = torch.randn(700, 16, requires_grad=True)
    weight, bias = torch.randn(300, 16), torch.randn(300)
    labels = torch.randint(300, (700,))
    values, gradients = [], []
    for function in (
        lambda: _function().apply(hidden, weight, bias, labels, torch.tensor(700)),
        lambda: linear_cross_entropy(
            hidden,
            weight,
            labels,
            linear_bias=bias,
            options=torch.nn.LinearCrossEntropyOptions(),
        ),
    ):
        hidden.grad = None
        value = function()
        value.backward()
        values.append(value.item())
        gradients.append(hidden.grad.clone())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_head_with_a_bias(build):
    model = build("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    model = adapted(model)
    expected, _ = step(model, batch())
    with chunked_loss(model) as used:
        assert used
        assert step(model, batch())[0] == pytest.approx(expected, rel=1e-6)


def test_bfloat16_is_as_near_to_float32(build):
    inputs, exact = batch(), adapted(build("llama"))
    rough = adapted(build("llama"))
    for name, parameter in rough.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        for one, other in zip(exact.parameters(), rough.parameters(), strict=True):
            one.copy_(other)
    expected, gradients = step(exact, inputs)

    def distance(found: dict) -> float:
        return sum((found[n].float() - g).norm().item() for n, g in gradients.items())

    with torch.autocast("cpu", torch.bfloat16):
        stock, stocks = step(rough, inputs)
        with chunked_loss(rough) as used:
            assert used
            found, ours = step(rough, inputs)
    assert abs(found - expected) <= 2 * abs(stock - expected) + 1e-4
    assert distance(ours) <= 1.05 * distance(stocks)


def test_no_logits_come_to_be(build, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in tree_leaves(out):
                if torch.is_tensor(value) and value.untyped_storage()._cdata not in known:
                    sizes.append(value.numel())
            return out

    model = adapted(build("llama"))
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    inputs, largest = batch(8, 60), {}
    monkeypatch.setattr("tlora.loss._ROWS", 32)
    for kind in ("chunked", "stock"):
        sizes: list[int] = []
        with chunked_loss(model) if kind == "chunked" else contextlib.nullcontext(), Watch():
            step(model, inputs)
        largest[kind] = max(sizes)
    whole = inputs["labels"].numel() * VOCABULARY
    assert largest["stock"] >= whole
    assert largest["chunked"] <= whole / 4


def test_micro_batch_without_labels_counts_nothing(build):
    model, inputs = adapted(build("llama")), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with chunked_loss(model) as used:
        assert used
        loss, gradients = step(model, inputs, num_items_in_batch=10)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma", {"final_logit_softcapping": 30.0}),  # capped logits
        ("gemma", {"final_logit_softcapping": 2.0}),
        ("t5", {}),  # another loss
        ("llama", {"vocab_size": 120}),  # too small to be worth it
    ],
)
def test_left_out_where_it_is_not_the_same(build, family, settings):
    model = build(family, **settings)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    model = adapted(model)
    base = model.get_base_model()
    inputs = {"input_ids": batch()["input_ids"] % 100, "labels": batch()["labels"] % 100}
    expected = model(**inputs).loss
    with chunked_loss(model) as used:
        assert not used
        assert model(**inputs).loss == expected
    assert "_loss_function" not in vars(base)
    assert "forward" not in vars(base.get_output_embeddings())


def test_left_out_where_the_head_is_trained(build):
    from peft import LoraConfig, get_peft_model

    for settings in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}):
        model = get_peft_model(build("llama"), LoraConfig(**settings))
        with chunked_loss(model) as used:
            assert not used
    with chunked_loss(build("llama")) as used:
        assert not used


def test_model_and_chance_are_left_as_they_were(build):
    model = adapted(build("llama")).train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), chunked_loss(model) as used:
        assert used
        assert [module.training for module in model.modules()] == modes
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.get_base_model().lm_head)
    assert model.get_base_model().loss_function.__name__ == "ForCausalLMLoss"
