"""Small random models of every supported family and their calibration samples."""

from __future__ import annotations

import pytest

VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(family: str, seed: int = 0, **more):
    """Return a random float32 model in evaluation mode with weights large enough to matter.

    `more`: settings of the configuration, of which GPT-2 and T5 know only the vocabulary's size.
    """
    import torch
    import transformers as t

    torch.manual_seed(seed)
    if family == "gpt2":
        config = t.GPT2Config(
            vocab_size=more.get("vocab_size", VOCABULARY),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = t.GPT2LMHeadModel(config)
    elif family == "t5":
        config = t.T5Config(
            vocab_size=more.get("vocab_size", VOCABULARY),
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
        model = t.T5ForConditionalGeneration(config)
    else:
        kinds = {
            "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
            "mistral": (t.MistralForCausalLM, t.MistralConfig, {}),
            "qwen": (t.Qwen2ForCausalLM, t.Qwen2Config, {}),
            "gemma": (t.Gemma2ForCausalLM, t.Gemma2Config, {"head_dim": 8}),
            "granite": (t.GraniteForCausalLM, t.GraniteConfig, {"logits_scaling": 4.0}),
            "cohere": (t.CohereForCausalLM, t.CohereConfig, {"logit_scale": 0.5}),
        }
        kind, settings, extra = kinds[family]
        model = kind(settings(**{**_COMMON, **extra, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def sample_rows(family: str, count: int = 5, seed: int = 0) -> list[dict]:
    """Return samples of different lengths as dicts of (1, tokens) tensors, prompts masked."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        length = 6 + 3 * index
        ids = torch.randint(3, VOCABULARY, (1, length), generator=generator)
        if family == "t5":
            labels = torch.randint(3, VOCABULARY, (1, 3 + 2 * index), generator=generator)
        else:
            labels = ids.clone()
            labels[:, : 2 + index] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def padded(samples: list[dict], side: str = "right") -> dict:
    """Collate samples into one batch with an attention mask and labels padded with -100."""
    import torch

    def pad(value: int, rows: list) -> torch.Tensor:
        width = max(row.shape[1] for row in rows)
        out = torch.full((len(rows), width), value)
        for index, row in enumerate(rows):
            where = slice(0, row.shape[1]) if side == "right" else slice(width - row.shape[1], None)
            out[index, where] = row[0]
        return out

    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad(0, ids),
        "attention_mask": pad(0, [torch.ones_like(row) for row in ids]),
        "labels": pad(-100, [sample["labels"] for sample in samples]),
    }


@pytest.fixture
def tiny():
    """The function `build`."""
    return build


@pytest.fixture
def rows():
    """The function `sample_rows`."""
    return sample_rows


@pytest.fixture
def collate():
    """The function `padded`."""
    return padded
