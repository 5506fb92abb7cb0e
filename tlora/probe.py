"""What a model says to a few held-out prompts: greedy tokens, and logits where it is told more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.tasks import tokenised
from tlora.tasks.prompts import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PROMPTS = 8
POSITIONS = 8
NEW_TOKENS = 16


def held_out(prepared: Path) -> list[dict[str, Any]]:
    """Return some samples that were not trained on, or of training where there are no others.

    Parameters
    ----------
    prepared
        The card.json of `prepare`.
    """
    for split in ("validation", "train"):
        path = prepared.parent / f"{split}.parquet"
        samples = tokenised.read(path) if path.is_file() else []
        if samples:
            return samples[:PROMPTS]
    return []


def probe(model: Any, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Ask a model; nothing is padded, so no other sample matters.

    Parameters
    ----------
    model
        Causal or encoder-decoder, in any mode; it is left in evaluation mode.
    samples
        Each with `input_ids` and `labels` as lists of int.

    Returns
    -------
    dict of tensors on the CPU, for every sample i
        `logits.i` (positions, vocabulary) float32: what predicts some of the labels, given all
        before them. `tokens.i` (at most 16,) int64: greedy continuation of the prompt. `margins.i`
        (like tokens) float32: how far each token's logit lies above the second best.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device
    seq2seq = bool(model.config.is_encoder_decoder)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for index, sample in enumerate(samples):
            labels = torch.tensor([sample["labels"]], device=device)
            places = [at for at, label in enumerate(sample["labels"]) if label != IGNORED]
            input_ids = torch.tensor([sample["input_ids"]], device=device)
            if seq2seq:
                prompt = input_ids
                # Named, because PEFT's models take no decoder inputs from labels alone.
                shifted = model.get_base_model() if hasattr(model, "peft_config") else model
                decoder = shifted.prepare_decoder_input_ids_from_labels(labels=labels)
                logits = model(input_ids=input_ids, decoder_input_ids=decoder).logits[0]
                before = 0
            else:
                prompt = input_ids[:, : places[0]]
                logits = model(input_ids=input_ids).logits[0]
                before = 1
            step = max(1, len(places) // POSITIONS)
            chosen = [at - before for at in places[::step][:POSITIONS]]
            found[f"logits.{index}"] = logits[chosen].float().cpu()
            tokens, margins = _greedy(model, prompt, seq2seq)
            found[f"tokens.{index}"] = tokens
            found[f"margins.{index}"] = margins
    return found


def _greedy(model: Any, prompt: Tensor, seq2seq: bool) -> tuple[Tensor, Tensor]:
    """Return the greedy tokens after a prompt of one row, and their margins."""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    result = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
    )
    tokens = result.sequences[0, 1 if seq2seq else prompt.shape[1] :]
    best = torch.stack([scores[0].float().topk(2).values for scores in result.scores])
    return tokens.cpu(), (best[:, 0] - best[:, 1]).cpu()


def frozen_digests(model: Any) -> dict[str, str]:
    """Return a digest of the adapter weights that are registered as frozen, by their name."""
    if not hasattr(model, "peft_config"):
        return {}
    from tlora.adapter import frozen_names

    named = sorted(model.named_parameters())
    return {
        name: digest_of(p.detach().float().cpu().numpy() for key, p in named if f".{name}." in key)
        for name in frozen_names(model)
    }


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """Return the SHA-256 of arrays, as float32, one after the other."""
    import hashlib

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.astype("<f4").tobytes())
    return digest.hexdigest()
