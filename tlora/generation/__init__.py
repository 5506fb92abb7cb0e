"""Completions of prompts: what every backend takes and gives.

A backend is a module of this folder with the function
`load(identity, export, place, tokenizer=None, longest=None) -> Backend`: `transformers`, and `vllm`
for an engine of this process or, where `place["server"]` is a URL, of a server that many jobs
share. Engines differ in the last bits of a logit, so the backend is part of a result's identity;
where the engine runs is not.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tlora.artefact import check_files, read_json
from tlora.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Prompt:
    """A prompt and its name.

    Attributes
    ----------
    id
        Distinct among the prompts of a job.
    input_ids
        What the model reads, special tokens included.
    temperature
        0: greedy; otherwise tokens are drawn from the softmax of logits / temperature.
    seed
        Of the draws; they do not depend on the other prompts.
    """

    id: str
    input_ids: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0


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


@dataclass(frozen=True)
class Rules:
    """Where completions end: the same for every backend, whatever its engine reports.

    Attributes
    ----------
    decode
        Tokens to text, without special ones and otherwise as it stands.
    ends
        End-of-sequence tokens.
    context
        Positions that the model knows; None where nothing bounds them.
    seq2seq
        Whether prompt and completion have a context each.
    """

    decode: Callable[[Sequence[int]], str]
    ends: frozenset[int]
    context: int | None
    seq2seq: bool = False

    def limit(self, prompt: Prompt, max_new_tokens: int) -> int:
        """Return how many tokens may follow a prompt; below 1 it does not fit."""
        if self.context is None:
            return max_new_tokens
        if self.seq2seq:
            fits = len(prompt.input_ids) <= self.context
            return min(max_new_tokens, self.context) if fits else 0
        return min(max_new_tokens, self.context - len(prompt.input_ids))

    def check(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Refuse prompts that leave no room, and count those that leave little.

        Raises
        ------
        UserError
            Naming the first prompt that has no token, or leaves no room for a new one.
        """
        for prompt in prompts:
            length = len(prompt.input_ids)
            if not length:
                raise UserError(f"item {prompt.id!r}: prompt: no tokens: expected at least one")
            if self.limit(prompt, max_new_tokens) < 1:
                raise UserError(
                    f"item {prompt.id!r}: prompt: {length} tokens: expected fewer than the model's "
                    f"context of {self.context}"
                )
        tight = sum(self.limit(prompt, max_new_tokens) < max_new_tokens for prompt in prompts)
        if tight:
            logger.warning(
                "%d of %d prompts leave less than %d tokens of the context of %d",
                tight,
                len(prompts),
                max_new_tokens,
                self.context,
            )

    def completion(
        self, prompt: Prompt, tokens: Sequence[int], limit: int, stop: Sequence[str]
    ) -> Completion:
        """Cut generated tokens at the first end token, stop string or the limit.

        Parameters
        ----------
        prompt
            Theirs.
        tokens
            What an engine made; what stands behind the end is ignored.
        limit
            Most tokens.
        stop
            Stop strings, none empty.
        """
        tokens = tokens[:limit]
        end = next((at for at, token in enumerate(tokens) if token in self.ends), None)
        body = tokens if end is None else tokens[:end]
        text, count = self.decode(body), len(body) + (end is not None)
        reason = "length" if end is None else "eos"
        at = first_stop(text, stop)
        if at >= 0:
            low, high = 1, len(body)
            while low < high:
                middle = (low + high) // 2
                if first_stop(self.decode(body[:middle]), stop) >= 0:
                    high = middle
                else:
                    low = middle + 1
            text, count, reason = text[:at], low, "stop"
        return Completion(prompt.id, text, reason, len(prompt.input_ids), count)


def rules_of(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, settings: GenerationConfig
) -> Rules:
    """Return the rules for a model: its tokenizer, configuration and generation settings."""
    decode = functools.partial(
        tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    listed = settings.eos_token_id
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    # T5's positions are relative: nothing says where they end.
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Rules(decode, frozenset(ends - {None}), context, bool(config.is_encoder_decoder))


def load_rules(
    tokenizer: PreTrainedTokenizerBase, model: str, revision: str | None = None
) -> Rules:
    """Return the rules for a model that is not loaded: of a folder, or of a repository.

    Raises
    ------
    UserError
        Where there is no model.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{model}: no model to load: {reason}") from error
    try:
        settings = GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:
        settings = GenerationConfig.from_model_config(config)
    return rules_of(tokenizer, config, settings)


class Backend(Protocol):
    """Decoding of many prompts."""

    rules: Rules

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop: Sequence[str],
        num_beams: int = 1,
    ) -> Iterator[list[Completion]]:
        """Yield every prompt's completion once, group by group, in an order of the backend's own.

        With `transformers` order and groups depend on the prompts alone: what follows a whole
        number of groups is decoded alike when those are left out.

        Raises
        ------
        UserError
            Before any work, for a prompt without room or a request that the engine cannot serve.
        """
        ...

    def peak_memory(self) -> int | None:
        """Return the bytes this job took so far, None where it cannot be told."""
        ...

    def close(self) -> None:
        """Give back what the backend holds outside this process."""
        ...


def first_stop(text: str, stop: Sequence[str]) -> int:
    """Return where in `text` the first stop string begins, -1 where none occurs."""
    return min((at for at in map(text.find, stop) if at >= 0), default=-1)


def refuse_beams(num_beams: int) -> None:
    """Refuse beam search, which is another algorithm in vLLM than in transformers.

    vLLM's goes on to the last token and ranks what ended by another rule.

    Raises
    ------
    UserError
        For more than one beam.
    """
    if num_beams != 1:
        raise UserError(
            f"num_beams: {num_beams}: expected 1 with backend 'vllm': its beam search is not that "
            "of transformers; use backend 'transformers'"
        )


def prompt_seed(seed: int, identifier: str) -> int:
    """Return the seed of one prompt's draws, below 2**63."""
    digest = hashlib.sha256(f"{seed}\n{identifier}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_export(export: Path | None) -> tuple[str, Path | None]:
    """Return the form of an export ("base", "adapter", "model") and its checked weights.

    Raises
    ------
    UserError
        Weights that are not what export.json vouches for.
    """
    if export is None:
        return "base", None
    card = read_json(export)
    weights = Path(export).parent / "weights"
    check_files(weights, card["files"])
    return card["form"], weights
