"""Loading the base model and its tokenizer, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(place: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `place["model"]`.

    Raises
    ------
    UserError
        Where there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place["model"], revision=place.get("revision"))
    except (OSError, ValueError) as error:
        raise UserError(f"{place['model']}: no tokenizer to load: {_first_line(error)}") from error


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills batches: the padding token, else the end of sequence."""
    padding = tokenizer.pad_token_id
    return tokenizer.eos_token_id if padding is None else padding


def load_model(identity: dict[str, Any], place: dict[str, Any]) -> PreTrainedModel:
    """Load the base model in evaluation mode.

    Parameters
    ----------
    identity
        The spec's `model`: dtype ("float32" or "bfloat16") and architecture ("causal", "seq2seq").
    place
        `model`: folder or repository, `revision`; the first GPU is used where there is one.

    Raises
    ------
    UserError
        Where there is none, or of another architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    _log_like_us()
    seq2seq = identity["architecture"] == "seq2seq"
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(
            place["model"],
            revision=place.get("revision"),
            dtype=getattr(torch, identity["dtype"]),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{place['model']}: no model to load: {_first_line(error)}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _log_like_us() -> None:
    """Send what transformers logs where our own log goes; no progress bars without a terminal."""
    from transformers.utils import logging

    logging.disable_default_handler()
    logging.enable_propagation()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def source_name(place: dict[str, Any]) -> str:
    """Return what an adapter's config may say of its base: the repository, or nothing.

    A folder's path would tie the adapter to this machine.
    """
    return "" if Path(place["model"]).is_dir() else place["model"]


def peak_memory_bytes() -> int:
    """Return the peak memory so far: of the GPU where there is one, else of the process.

    Source: `torch.cuda.max_memory_allocated`, or `getrusage`'s maximum resident set size.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
