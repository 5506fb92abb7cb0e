"""Generation with vLLM: an engine of this process, or a server that many jobs share."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.base_model import load_tokenizer
from tlora.errors import UserError
from tlora.generation import (
    Backend,
    Completion,
    Prompt,
    Rules,
    load_rules,
    read_export,
    refuse_beams,
)
from tlora.peft_folder import fold_scaling, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `max_lora_rank` may be. Source: vLLM 0.32, `vllm.config.lora.MaxLoRARanks`."""
GROUP = 32
"""Completions that are handed on at a time; fewer lose less when a job is killed."""

_adapter_numbers = itertools.count(1)


def load(
    identity: dict[str, Any],
    export: Path | None,
    place: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    longest: int | None = None,
) -> Backend:
    """Start an engine, or turn to a server, for the base model with what an export adds to it.

    An adapter is served beside the base model. Merged weights are what an engine of this process
    loads instead where the export is a model, where the adapter's rank is above what vLLM takes, or
    where vLLM has no adapters for the architecture; a server of the base model is no use then.

    Parameters
    ----------
    identity
        The spec's `model`: dtype and architecture.
    export
        An export.json with its weights/ beside it; None for the base model.
    place
        `model`: folder or repository of the base model, `revision`, `server`: the URL of a vLLM
        server, `work`: a folder for what vLLM reads.
    tokenizer
        The base model's, if it is loaded already.
    longest
        Most tokens of a sequence, which bounds the memory of the cache; None: the model's context.

    Raises
    ------
    UserError
        An architecture that is not causal, weights that are not what export.json vouches for or do
        not fit, an engine that does not start, or a server that cannot be had.
    """
    if identity["architecture"] != "causal":
        raise UserError(
            f"architecture: {identity['architecture']!r}: expected 'causal' with backend 'vllm'"
        )
    tokenizer = tokenizer or load_tokenizer(place)
    form, weights = read_export(export)
    work = Path(place["work"])
    rank = 0
    if form == "adapter":
        weights = folded(weights, work / "adapter")
        rank = read_config(weights)["r"]
    if place.get("server"):
        if form != "model" and rank <= RANKS[-1]:
            from tlora.generation import server

            return server.load(place, weights, tokenizer)
        logger.info("a server of the base model cannot serve merged weights: starting an engine")
    if form == "adapter" and not (rank <= RANKS[-1] and _takes_adapters(place)):
        form, weights, rank = "model", _merged(identity, weights, place, work / "merged"), 0
    if form == "model":
        rules = load_rules(tokenizer, str(weights))
        return VllmBackend(start(identity, place, rules, longest, merged=weights), rules)
    rules = load_rules(tokenizer, place["model"], place.get("revision"))
    engine = start(identity, place, rules, longest, rank)
    return VllmBackend(engine, rules, _request(weights) if rank else None)


def load_adapters(
    identity: dict[str, Any],
    exports: Mapping[str, Path],
    place: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    longest: int | None = None,
) -> dict[str, VllmBackend]:
    """Start one engine of this process for several adapters of the same base model.

    Parameters
    ----------
    identity, place, tokenizer, longest
        As for `load`.
    exports
        An export.json of form "adapter" by name.

    Returns
    -------
    dict
        A backend by name; "" is the base model.

    Raises
    ------
    UserError
        As `load`, and for an export that is a model.
    """
    tokenizer = tokenizer or load_tokenizer(place)
    work = Path(place["work"])
    folders = {}
    for name, export in exports.items():
        form, weights = read_export(export)
        if form != "adapter":
            raise UserError(f"{export}: form: {form!r}: expected 'adapter'")
        folders[name] = folded(weights, work / name)
    rank = max((read_config(folder)["r"] for folder in folders.values()), default=0)
    rules = load_rules(tokenizer, place["model"], place.get("revision"))
    engine = start(identity, place, rules, longest, rank)
    backends = {name: VllmBackend(engine, rules, _request(at)) for name, at in folders.items()}
    return {"": VllmBackend(engine, rules), **backends}


def folded(weights: Path, out: Path) -> Path:
    """Write an adapter as vLLM reads it, with all scaling in B; return its absolute folder."""
    fold_scaling(weights, out)
    return out.resolve()


def _request(folder: Path) -> LoRARequest:
    from vllm.lora.request import LoRARequest

    # vLLM tells adapters apart by name and number.
    number = next(_adapter_numbers)
    return LoRARequest(f"tlora-{number}", number, str(folder))


def _takes_adapters(place: dict[str, Any]) -> bool:
    """Tell whether vLLM has LoRA layers for the base model's architecture."""
    from transformers import AutoConfig

    _import()
    from vllm.model_executor.models import ModelRegistry, supports_lora

    config = AutoConfig.from_pretrained(place["model"], revision=place.get("revision"))
    known = [ModelRegistry.models.get(name) for name in config.architectures or []]
    return all(supports_lora(model.load_model_cls()) for model in known if model is not None)


def _merged(identity: dict[str, Any], weights: Path, place: dict[str, Any], out: Path) -> Path:
    """Write the base model with an adapter merged into its weights; return the folder.

    All of it on the CPU, so that the accelerator is left to the engine.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        place["model"], revision=place.get("revision"), dtype=getattr(torch, identity["dtype"])
    )
    try:
        model = PeftModel.from_pretrained(base, str(weights))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{weights}: does not fit the base model: {reason[:200]}") from error
    logger.info("merging the adapter: vLLM cannot serve it beside the base model")
    model.merge_and_unload(safe_merge=True).save_pretrained(out)
    return out.resolve()


def _import() -> None:
    """Import vLLM with settings that keep its log in ours and its scheduling reproducible.

    Raises
    ------
    UserError
        Where it is not installed.
    """
    # In one process the order of requests, and so the batches, are the same in every run.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM  # noqa: F401
    except ImportError as error:
        raise UserError(
            "backend: 'vllm': vLLM cannot be imported here: install the project's extra `vllm`, or "
            f"name a `server`: {error}"
        ) from error


def start(
    identity: dict[str, Any],
    place: dict[str, Any],
    rules: Rules,
    longest: int | None = None,
    rank: int = 0,
    merged: Path | None = None,
) -> LLM:
    """Start an engine of this process.

    Parameters
    ----------
    identity
        `dtype`.
    place
        `model` and `revision` of the base model, whose tokenizer is used.
    rules
        The model's.
    longest
        Most tokens of a sequence, where that is known.
    rank
        The largest rank of an adapter, 0 for none.
    merged
        A folder of weights to load in place of the base model's.

    Raises
    ------
    UserError
        Where vLLM is not installed, or the engine does not start.
    """
    _import()
    from vllm import LLM
    from vllm.platforms import current_platform

    bounds = [bound for bound in (longest, rules.context) if bound is not None]
    adapters: dict[str, Any] = {}
    if rank:
        allowed = min(size for size in RANKS if size >= rank)
        adapters = {"enable_lora": True, "max_loras": 1, "max_lora_rank": allowed}
    try:
        return LLM(
            model=place["model"] if merged is None else str(merged),
            revision=place.get("revision") if merged is None else None,
            tokenizer=place["model"],
            tokenizer_revision=place.get("revision"),
            dtype=identity["dtype"],
            max_model_len=min(bounds, default=None),
            # The model's own sampling settings are put aside, as in the other backend.
            generation_config="vllm",
            enable_prefix_caching=False,
            # Compiling for a CPU takes longer than it saves.
            enforce_eager=current_platform.is_cpu(),
            disable_log_stats=True,
            seed=0,
            **adapters,
        )
    except (OSError, ValueError, RuntimeError) as error:
        logger.info("vLLM did not start", exc_info=True)
        reason = " ".join(str(error).split())
        raise UserError(f"backend: 'vllm': the engine did not start: {reason[:300]}") from error


class VllmBackend:
    """Decoding with an engine of this process.

    Parameters
    ----------
    engine
        May be shared.
    rules
        What ends a completion.
    adapter
        None for the model as it was loaded.
    """

    def __init__(self, engine: LLM, rules: Rules, adapter: LoRARequest | None = None) -> None:
        self.engine, self.rules, self.adapter = engine, rules, adapter

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop: Sequence[str],
        num_beams: int = 1,
    ) -> Iterator[list[Completion]]:
        """Yield the completions as they are finished.

        Raises
        ------
        UserError
            Before any work: beams, or a prompt that leaves no room for a new token.
        """
        refuse_beams(num_beams)
        prompts = list(prompts)
        self.rules.check(prompts, max_new_tokens)
        return self._stream(prompts, max_new_tokens, [text for text in stop if text])

    def _stream(
        self, prompts: list[Prompt], max_new_tokens: int, stop: list[str]
    ) -> Iterator[list[Completion]]:
        engine = self.engine.llm_engine
        for at, prompt in enumerate(prompts):
            self._ask(at, prompt, max_new_tokens, stop)
        group: list[Completion] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                at, (made, *_) = int(output.request_id), output.outputs
                prompt = prompts[at]
                limit = self.rules.limit(prompt, max_new_tokens)
                tokens = list(made.token_ids)
                item = self.rules.completion(prompt, tokens, limit, stop)
                if item.finish_reason == "length" and len(tokens) < limit:
                    # It saw a stop string that the text as a whole does not hold.
                    self._ask(at, prompt, max_new_tokens, [])
                    continue
                group.append(item)
            if len(group) >= GROUP:
                yield group
                group = []
        if group:
            yield group

    def _ask(self, at: int, prompt: Prompt, max_new_tokens: int, stop: list[str]) -> None:
        self.engine.llm_engine.add_request(
            str(at),
            {"prompt_token_ids": list(prompt.input_ids)},
            self._sampling(prompt, max_new_tokens, stop),
            lora_request=self.adapter,
        )

    def _sampling(self, prompt: Prompt, max_new_tokens: int, stop: list[str]) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=prompt.temperature,
            seed=prompt.seed if prompt.temperature else None,
            max_tokens=self.rules.limit(prompt, max_new_tokens),
            stop=stop,
            stop_token_ids=sorted(self.rules.ends),
            detokenize=bool(stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def peak_memory(self) -> None:
        """Return None: an engine takes what memory there is, whatever the model needs."""

    def close(self) -> None:
        """Do nothing: the engine ends with this process."""
