"""Generation with stock transformers, and stock PEFT for adapters."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.base_model import load_model, load_tokenizer, peak_memory_bytes
from tlora.errors import UserError
from tlora.generation import Completion, Prompt, Rules, first_stop, read_export, rules_of

if TYPE_CHECKING:
    import torch
    from transformers import (
        Cache,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )

logger = logging.getLogger(__name__)

CHECK_EVERY = 8
"""Steps between looks for stop strings and finished rows; results do not depend on it."""
GROWTH = 256
"""Tokens by which the room of a cache grows."""
ROWS = {"cpu": 32, "cuda": 256}
"""Most rows of a batch. With 1M parameters on one core 32 and 64 rows are equally fast (70 items a
second on GSM8K), 128 slower; fewer lose less when a job is killed."""
MEMORY = {"cpu": 2 * 2**30, "cuda": None}
"""Bytes that a batch's cache and activations may take; None: 40 % of the device's memory."""


def load(
    identity: dict[str, Any],
    export: Path | None,
    place: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    longest: int | None = None,
) -> TransformersBackend:
    """Load the base model with what an export adds to it.

    Parameters
    ----------
    identity
        The spec's `model`: dtype and architecture.
    export
        An export.json with its weights/ beside it; None for the base model.
    place
        `model`: folder or repository of the base model, `revision`, `threads`.
    tokenizer
        The base model's, if it is loaded already.
    longest
        Most tokens of a sequence; not needed here, where memory is taken as sequences grow.

    Raises
    ------
    UserError
        Weights that are not what export.json vouches for, or that do not fit the base model.
    """
    import torch

    torch.set_num_threads(int(place.get("threads") or torch.get_num_threads()))
    form, weights = read_export(export)
    if form == "model":
        model = load_model(identity, {**place, "model": str(weights), "revision": None})
    else:
        model = load_model(identity, place)
    if form == "adapter":
        model = _with_adapter(model, weights)
    return TransformersBackend(model, tokenizer or load_tokenizer(place))


def _with_adapter(model: PreTrainedModel, weights: Path) -> PreTrainedModel:
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(weights))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{weights}: does not fit the base model: {reason[:200]}") from error
    return adapted.get_base_model().eval()


class TransformersBackend:
    """Batched decoding with `generate` of transformers.

    Parameters
    ----------
    model
        In evaluation mode; its own generation settings are put aside.
    tokenizer
        Decodes the completions.
    rows
        Most rows of a batch; by default what the device takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: int | None = None,
    ) -> None:
        from transformers import GenerationConfig

        self.model = model
        self.rows = rows or ROWS[model.device.type]
        self.rules = rules_of(tokenizer, model.config, model.generation_config)
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else min(self.rules.ends, default=0)
        # A model's own settings (sampling, penalties) would be merged into every call.
        start = getattr(model.generation_config, "decoder_start_token_id", None)
        model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(self.rules.ends) or None,
            pad_token_id=self.pad,
            decoder_start_token_id=start if start is not None else _decoder_start(model),
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop: Sequence[str],
        num_beams: int = 1,
    ) -> Iterator[list[Completion]]:
        """Yield the completions batch by batch, long prompts first.

        A prompt with less room left in the model's context than `max_new_tokens` gets what there
        is. With several beams a stop string cuts the best one and decides nothing between them.

        Raises
        ------
        UserError
            Before any work, naming the first prompt that leaves no room for a new token, or that
            asks for a temperature with several beams.
        """
        prompts = list(prompts)
        self.rules.check(prompts, max_new_tokens)
        for prompt in prompts:
            if num_beams > 1 and prompt.temperature:
                raise UserError(
                    f"item {prompt.id!r}: temperature: {prompt.temperature}: expected 0 with "
                    f"num_beams: {num_beams}"
                )
        return self._batches(prompts, max_new_tokens, [text for text in stop if text], num_beams)

    def peak_memory(self) -> int:
        """Return the peak memory of this process so far, in bytes."""
        return peak_memory_bytes()

    def close(self) -> None:
        """Do nothing: all is held by this process."""

    def _batches(
        self, prompts: list[Prompt], max_new_tokens: int, stop: list[str], beams: int
    ) -> Iterator[list[Completion]]:
        import torch

        room = _room(self.model)
        # A table of positions ends with the context; rotary positions go on, for finished rows.
        table = self.rules.context is not None and not _rotary(self.model)
        waiting = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))
        while waiting:
            longest = len(waiting[0].input_ids)
            size = beams * _bytes(self.model, longest, max_new_tokens)
            rows = max(1, min(self.rows, room // size))
            batch = waiting[:rows]
            if table or beams > 1:
                first = self.rules.limit(batch[0], max_new_tokens)
                batch = [p for p in batch if self.rules.limit(p, max_new_tokens) == first]
            done = []
            while len(done) < len(batch):
                part = batch[len(done) : len(done) + rows]
                failed = False
                try:
                    done += self._decode(part, max_new_tokens, stop, beams)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    failed = True
                if failed:  # outside the handler: the exception keeps the failed tensors alive
                    rows = len(part) // 2
                    logger.warning("out of memory: going on with %d rows", rows)
                    torch.cuda.empty_cache()
            yield done
            waiting = waiting[len(batch) :]

    def _decode(
        self, batch: list[Prompt], max_new_tokens: int, stop: list[str], beams: int
    ) -> list[Completion]:
        """Decode one batch; rows that are finished leave it whenever half of it is."""
        import torch

        device = self.model.device
        limits = [self.rules.limit(prompt, max_new_tokens) for prompt in batch]
        width = max(len(prompt.input_ids) for prompt in batch)
        ids = torch.full((len(batch), width), self.pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
            mask[row, width - len(prompt.input_ids) :] = 1
        draws = _Draws(batch)
        if beams > 1:
            tokens = self._whole(ids, mask, {"num_beams": beams, "max_new_tokens": limits[0]})
        elif self.rules.seq2seq:
            watch = _Watch(self.rules, limits, stop, start=1, leave=False)
            options = {"max_new_tokens": max(limits), "stopping_criteria": _criteria(watch)}
            tokens = self._whole(ids, mask, options | draws.options(range(len(batch))))
        else:
            tokens = self._continue(ids.to(device), mask.to(device), limits, stop, draws)
        return [
            self.rules.completion(prompt, row, limit, stop)
            for prompt, row, limit in zip(batch, tokens, limits, strict=True)
        ]

    def _whole(
        self, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
    ) -> list[list[int]]:
        """Return the new tokens of every row, and padding after their end, from one call."""
        import torch

        device = self.model.device
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), **options
            )
        return made[:, 1 if self.rules.seq2seq else ids.shape[1] :].tolist()

    def _continue(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        limits: list[int],
        stop: list[str],
        draws: _Draws,
    ) -> list[list[int]]:
        """Return the new tokens of every row of a causal model, and padding after their end."""
        import torch

        width = ids.shape[1]
        cache = _cache(self.model)
        rows = list(range(len(limits)))
        tokens: list[list[int]] = [[] for _ in rows]
        while rows:
            watch = _Watch(self.rules, [limits[row] for row in rows], stop, start=width)
            longest = max(limits[row] for row in rows)
            with torch.inference_mode():
                ids = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_new_tokens=width + longest - ids.shape[1],
                    stopping_criteria=_criteria(watch),
                    **draws.options(rows),
                )
            new = ids[:, width:].tolist()
            active = [at for at, done in enumerate(watch.finished(ids)) if not done]
            for at, row in enumerate(rows):
                tokens[row] = new[at]
            if active:
                chosen = torch.tensor(active, device=ids.device)
                ids = ids[chosen]
                grown = mask.new_ones((len(rows), ids.shape[1] - mask.shape[1]))
                mask = torch.cat([mask, grown], dim=1)[chosen]
                cache.batch_select_indices(chosen)
            rows = [rows[at] for at in active]
        return tokens


class _Draws:
    """Samples the rows that have a temperature, each with a generator of its own.

    The largest of logits / temperature plus Gumbel noise is a draw from their softmax, so that
    `generate` stays greedy and a row's draws know nothing of the other rows.

    Parameters
    ----------
    batch
        The prompts; rows are numbered by their order.
    """

    def __init__(self, batch: list[Prompt]) -> None:
        import torch

        self.temperatures = [prompt.temperature for prompt in batch]
        self.generators = [torch.Generator().manual_seed(prompt.seed) for prompt in batch]

    def options(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return what `generate` is to be handed for a batch of these rows."""
        from transformers import LogitsProcessorList

        drawn = [(at, row) for at, row in enumerate(rows) if self.temperatures[row]]
        if not drawn:
            return {}

        def draw(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.float().clone()
            for at, row in drawn:
                noise = scores.new_empty(scores.shape[1], device="cpu")
                noise.exponential_(generator=self.generators[row]).log_()
                scores[at] = scores[at] / self.temperatures[row] - noise.to(scores.device)
            return scores

        return {"logits_processor": LogitsProcessorList([draw])}


class _Watch:
    """Tells `generate` which rows are finished: a stop string, an end token, or the row's limit.

    A stopping criterion of transformers: called after every step with all tokens so far, it returns
    one truth value a row. It looks every `CHECK_EVERY` steps, and at the last tokens only: a stop
    string of n bytes ends within the last n tokens.

    Parameters
    ----------
    rules
        What ends a completion.
    limits
        Most new tokens of each row.
    stop
        Stop strings.
    start
        Tokens before the first new one.
    leave
        Whether to end the whole call when half of the rows are finished.
    """

    def __init__(
        self,
        rules: Rules,
        limits: list[int],
        stop: list[str],
        start: int,
        leave: bool = True,
    ) -> None:
        self.rules, self.limits, self.stop, self.start = rules, limits, stop, start
        self.tail = max((len(text.encode()) for text in stop), default=0) + CHECK_EVERY + 4
        self.least = len(limits) // 2 if leave and len(limits) >= 4 else 0
        self.done = [False] * len(limits)
        self.seen: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: object, **unused: Any) -> torch.Tensor:
        import torch

        made = input_ids.shape[1] - self.start
        if made % CHECK_EVERY == 0 or made >= max(self.limits):
            done = self.finished(input_ids)
            if len(done) - sum(done) <= self.least:
                done = [True] * len(done)
            self.verdict = torch.tensor(done, device=input_ids.device)
        elif self.seen is None:
            self.verdict = torch.zeros(len(self.limits), dtype=torch.bool, device=input_ids.device)
        self.seen = made
        return self.verdict

    def finished(self, input_ids: torch.Tensor) -> list[bool]:
        """Return for every row whether it is finished."""
        made = input_ids.shape[1] - self.start
        new = input_ids[:, self.start :].tolist()
        for row, tokens in enumerate(new):
            if not self.done[row]:
                self.done[row] = made >= self.limits[row] or self._ended(tokens)
        return list(self.done)

    def _ended(self, tokens: list[int]) -> bool:
        if not self.rules.ends.isdisjoint(tokens):
            return True
        # The beginning of a tail may decode otherwise than within the whole text: ask again.
        return bool(
            self.stop
            and first_stop(self.rules.decode(tokens[-self.tail :]), self.stop) >= 0
            and first_stop(self.rules.decode(tokens), self.stop) >= 0
        )


def _criteria(watch: _Watch) -> StoppingCriteriaList:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([watch])


def _cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache whose growing layers write in place."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [
        _growing_layer()() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@functools.cache
def _growing_layer() -> type:
    """Return a cache layer that writes new keys and values in place.

    The stock one copies all it holds at every step: 1.5 to 1.9 times the time on one core.
    """
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values are views into buffers with room for more."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.buffers = [self.keys, self.values]
            start = self.get_seq_length()
            self.keys = self._put(0, self.keys, key_states, start)
            self.values = self._put(1, self.values, value_states, start)
            return self.keys, self.values

        def _put(
            self, which: int, held: torch.Tensor, states: torch.Tensor, start: int
        ) -> torch.Tensor:
            buffer, end = self.buffers[which], start + states.shape[-2]
            # Rows that were chosen or reordered are no view into the buffer any more.
            current = start and held.data_ptr() == buffer.data_ptr()
            if not current or end > buffer.shape[-2]:
                shape = (*states.shape[:-2], end + GROWTH, states.shape[-1])
                buffer = self.buffers[which] = states.new_empty(shape)
                if start:
                    buffer[..., :start, :] = held
            buffer[..., start:end, :] = states
            return buffer[..., :end, :]

    return GrowingLayer


def _decoder_start(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "decoder_start_token_id", None)


def _rotary(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, key, None) is not None for key in ("rope_parameters", "rope_theta"))


def _room(model: PreTrainedModel) -> int:
    """Return the bytes that a batch may take."""
    import torch

    fixed = MEMORY[model.device.type]
    if fixed is not None:
        return fixed
    return int(0.4 * torch.cuda.get_device_properties(model.device).total_memory)


def _bytes(model: PreTrainedModel, prompt: int, new: int) -> int:
    """Estimate the bytes of one row: its cache, and the activations of reading its prompt."""
    config = model.config.get_text_config()
    hidden = config.hidden_size
    layers = getattr(config, "num_hidden_layers", 1) * (2 if model.config.is_encoder_decoder else 1)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    cached = 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    element = model.dtype.itemsize
    return element * (cached * (prompt + new + GROWTH) + (4 * inner + 8 * hidden) * prompt)
