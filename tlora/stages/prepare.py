"""Records rendered, tokenised and split."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import sha256_file, write_json
from tlora.base_model import load_tokenizer
from tlora.errors import UserError
from tlora.progress import bar
from tlora.tasks import tokenised
from tlora.tasks.overlap import RUN, overlap, text_of
from tlora.tasks.prompts import IGNORED, encode, encode_prompt, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def prepare(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write train.parquet, validation.parquet and the data card.

    Raises
    ------
    UserError
        Bad data, or no training sample with a target left after truncation.
    """
    source = importlib.import_module(f"tlora.tasks.{spec['source']}")
    data = source.Data(**spec["data"])
    root = Path(place["data_root"]) if place.get("data_root") else None
    records = {split: source.load(data, split, root) for split in ("train", "validation")}
    tokenizer = load_tokenizer(place)
    seq2seq = spec["model"]["architecture"] == "seq2seq"

    card: dict[str, Any] = {
        "counts": {},
        "tokens": {},
        "truncated": {},
        "without_target": {},
        "prompt": spec["prompt"],
        "max_length": spec["max_length"],
        "source": spec["source"],
        "data": spec["data"],
        "sources": spec["files"],
        "sha256": {},
        "overlap": _overlap(records),
    }
    for split in ("train", "validation"):
        samples, truncated, empty = [], 0, 0
        for record in bar(records[split], desc=f"tokenising {split}", unit="record"):
            prompt = render(spec["prompt"], record)
            encoded = _encode(tokenizer, prompt, record["response"], spec["max_length"], seq2seq)
            input_ids, labels, cut = encoded
            truncated += cut
            if all(label == IGNORED for label in labels):
                empty += 1
                continue
            samples.append({"id": record["id"], "input_ids": input_ids, "labels": labels})
        if split == "train" and not samples:
            raise UserError(
                f"max_length: {spec['max_length']}: no training sample has a target left after "
                f"truncation ({len(records[split])} records read); expected more tokens"
            )
        tokenised.write(out / f"{split}.parquet", samples)
        card["counts"][split] = len(samples)
        card["tokens"][split] = sum(len(sample["input_ids"]) for sample in samples)
        card["truncated"][split] = truncated
        card["without_target"][split] = empty
        card["sha256"][f"{split}.parquet"] = sha256_file(out / f"{split}.parquet")
    logger.info("prepared %s", card["counts"])
    write_json(out / "card.json", card)


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int, seq2seq: bool
) -> tuple[list[int], list[int], bool]:
    """Return input_ids, labels and whether tokens were cut off."""
    if not seq2seq:
        return encode(tokenizer, prompt, response, max_length)
    head = [*encode_prompt(tokenizer, prompt), tokenizer.eos_token_id]
    target = [
        *tokenizer(response, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    cut = len(head) > max_length or len(target) > max_length
    return head[:max_length], target[:max_length], cut


def _overlap(records: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, int]]:
    """Count the validation records that also stand in the training split.

    The stage `overlap` does the same for the test records of each benchmark.
    """
    texts = [(record["id"], text_of(record)) for record in records["validation"]]
    found = overlap(texts, map(text_of, records["train"]) if texts else ())
    return {
        "validation": {
            "n": len(texts),
            "exact": len(found["exact"]),
            f"ngram{RUN}": len(found["ngram"]),
        }
    }
