"""Prompt templates and their tokens: training and generation see the same prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that the loss passes over."""

_FIELD = re.compile(r"\{(\w+)\}")


def render(template: str, record: Mapping[str, str]) -> str:
    """Fill the `{field}` places of a prompt template from a record.

    Braces around anything but a word stay as they are, and so do braces in the record's text.

    Raises
    ------
    UserError
        For a place that names no field of the record.
    """

    def fill(match: re.Match[str]) -> str:
        if match[1] not in record:
            raise UserError(
                f"prompt: {match[0]}: expected one of the record's fields: {', '.join(record)}"
            )
        return record[match[1]]

    return _FIELD.sub(fill, template)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids that generation starts from.

    The beginning-of-sequence token stands first where the tokenizer itself puts it there (Llama,
    Gemma; not GPT-2, Qwen); nothing is added at the end.
    """
    return _beginning(tokenizer) + _ids(tokenizer, prompt)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int
) -> tuple[list[int], list[int], bool]:
    r"""Return a training sequence: the prompt's tokens, then those of `{response}\n{eos}`.

    Prompt and target are tokenised apart, so the prompt of generation is an exact prefix of the
    sequence, whatever the tokenizer merges. Source of the target: the released code of TLoRA.

    Parameters
    ----------
    tokenizer
        It must have an end-of-sequence token.
    prompt, response
        Texts; the prompt as `render` returns it.
    max_length
        Tokens kept, from the left. With a prompt that long no label remains.

    Returns
    -------
    input_ids, labels : list of int
        Of equal length; the labels are -100 on the prompt.
    truncated : bool
        Whether tokens were cut off.

    Raises
    ------
    UserError
        When the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: eos_token: none: expected a tokenizer that has one"
        )
    head = encode_prompt(tokenizer, prompt)
    target = [*_ids(tokenizer, response + "\n"), tokenizer.eos_token_id]
    input_ids = head + target
    labels = [IGNORED] * len(head) + target
    return input_ids[:max_length], labels[:max_length], len(input_ids) > max_length


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence id if the tokenizer puts one before a text, else nothing."""
    if tokenizer.bos_token_id is None:
        return []
    marked = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    return marked[:1] if marked[:1] == [tokenizer.bos_token_id] else []
