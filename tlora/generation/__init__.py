"""Completions of prompts: what every backend takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Prompt:
    """A prompt and its name. `input_ids` holds what the model reads, special tokens included."""

    id: str
    input_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """What a model said.

    Attributes
    ----------
    id
        Of its prompt.
    text
        Up to the first stop string, which is no part of it; without special tokens.
    finish_reason
        "eos", "stop" (a stop string) or "length" (the limit, or the model's context was full).
    prompt_tokens, completion_tokens
        Tokens read, and tokens generated up to the end or the stop string inclusive.
    """

    id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Backend(Protocol):
    """Greedy decoding of many prompts."""

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str]
    ) -> Iterator[list[Completion]]:
        """Yield every prompt's completion once, batch by batch, in an order of the backend's own.

        The order and the batches depend on the prompts alone: what follows a whole number of
        batches is decoded alike when those are left out.
        """
        ...


def first_stop(text: str, stop: Sequence[str]) -> int:
    """Return where in `text` the first stop string begins, -1 where none occurs."""
    return min((at for at in map(text.find, stop) if at >= 0), default=-1)
