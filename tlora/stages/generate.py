"""Completions of a benchmark's prompts; an interrupted job goes on where it stopped."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tlora.artefact import read_json, remove, staged, stamped, write_json, write_text
from tlora.base_model import load_tokenizer, peak_memory_bytes
from tlora.errors import UserError
from tlora.generation import BACKENDS, Backend, Completion, Prompt, prompt_seed
from tlora.progress import bar
from tlora.tasks.prompts import encode_prompt, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def generate(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write generations.jsonl, in the benchmark's order, and generate.json.

    Until then finished batches lie in `place["work"]`, and count only under the same
    `place["stamp"]`.

    Parameters
    ----------
    spec
        `model`, `export`, `prompt` (a template), `benchmark` and `backend`, "transformers" (the
        default) or "vllm". The benchmark's `prompt` replaces `prompt`, `turn_prompt` is what
        further turns of a dialogue add, `num_beams` and `seed` are 1 and 0 by default.
    inputs
        `export`: export.json; none for the base model.
    out
        The artefact's folder.
    place
        `model`, `revision`, `data_root`, `threads`, `work`, `stamp`; `server`: the URL of a vLLM
        server of the base model, in place of an engine of this process.

    Raises
    ------
    UserError
        Bad data, a prompt that does not fit the model, or an adapter that does not.
    """
    export = inputs.get("export")
    if (spec["export"] is None) != (export is None):
        raise UserError(f"export: {spec['export']}: the input is {export}: expected both or none")
    if export is not None and read_json(export).get("failed"):
        # No weights to ask; the score says why.
        cost = {"seconds": 0.0, "peak_memory_bytes": None, "tokens": 0}
        write_json(Path(out) / "generate.json", cost)
        write_text(Path(out) / "generations.jsonl", "")
        return
    name = spec.get("backend") or "transformers"
    if name not in BACKENDS:
        raise UserError(f"backend: {name!r}: expected one of {', '.join(BACKENDS)}")
    if place.get("server") and name != "vllm":
        raise UserError(f"server: backend: {name!r}: expected 'vllm', which a server runs")
    benchmark = spec["benchmark"]
    if "likelihood" in benchmark:
        _likelihood(spec, inputs, out, place)
        return
    source = importlib.import_module(f"tlora.tasks.{benchmark['source']}")
    if hasattr(source, "evaluate"):
        _evaluate(source, spec, export, out, place)
        return
    turns = _turns(benchmark_records(benchmark, place.get("data_root")))
    tokenizer = load_tokenizer(place)
    work = Partial(Path(place["work"]), place["stamp"])
    done = work.completions({turn.id for turn in turns})
    if done:
        logger.info("going on after %d of %d completions", len(done), len(turns))

    load = functools.partial(_load, name, spec, export, place, tokenizer)
    template = benchmark.get("prompt") or spec["prompt"]
    with Dialogues(turns, template, benchmark, tokenizer, load) as dialogues:
        while not dialogues.complete(work, done):
            logger.warning("%s: does not fit the benchmark: starting afresh", work.file)
            work.forget()
            done.clear()
    lines = [_line(turn, dialogues.texts[turn.id], done[turn.id]) for turn in turns]
    cost = work.cost()
    tokens = sum(completion.completion_tokens for completion in done.values())
    write_json(Path(out) / "generate.json", {**cost, "tokens": tokens})
    write_text(Path(out) / "generations.jsonl", "".join(lines))
    logger.info("%d completions, %d tokens, %.1f s", len(lines), tokens, cost["seconds"])
    work.delete()


def _load(name: str, spec: dict, export: Path | None, place: dict[str, Any], *more: Any) -> Any:
    """Return a backend, by name: one must not be imported for another."""
    module = importlib.import_module(f"tlora.generation.{name}")
    return module.load(spec["model"], export, place, *more)


def _evaluate(
    source: ModuleType, spec: dict, export: Path | None, out: Path, place: dict[str, Any]
) -> None:
    """Write what a data source says that runs the model itself, by its function `evaluate`."""
    name, benchmark = spec.get("backend") or "transformers", spec["benchmark"]
    if name != "transformers":
        raise UserError(
            f"backend: {name!r}: expected 'transformers' for the source {benchmark['source']}"
        )
    work = Partial(Path(place["work"]), place["stamp"])
    started = time.perf_counter()

    def model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(place)
        return _load(name, spec, export, place, tokenizer).model, tokenizer

    data = source.Data(**benchmark.get("data", {}))
    rows = source.evaluate(data, benchmark.get("limit"), model, work.folder / "answers")
    work.add([], time.perf_counter() - started, peak_memory_bytes())
    write_json(Path(out) / "generate.json", {**work.cost(), "tokens": None})
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(Path(out) / "generations.jsonl", "".join(lines))
    work.delete()


def _likelihood(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write how likely the given answers of the validation split are, in place of own ones."""
    module = importlib.import_module("tlora.generation.likelihood")
    samples = module.read(inputs["prepare"].parent / "validation.parquet")
    samples = samples[: spec["benchmark"].get("limit")]
    if not samples:
        raise UserError(f"{inputs['prepare']}: validation: no sample: expected at least one")
    started = time.perf_counter()
    backend = _load("transformers", spec, inputs.get("export"), place, load_tokenizer(place))
    rows = module.losses(backend.model, samples, backend.pad)
    cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
    write_json(Path(out) / "generate.json", {**cost, "tokens": None})
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    write_text(Path(out) / "generations.jsonl", "".join(lines))


def benchmark_records(benchmark: dict[str, Any], data_root: str | None) -> list[dict[str, Any]]:
    """Return the records of a benchmark's split, the first `limit` where it has one.

    The split is `test`, or what the benchmark's `split` says: trials are judged by `validation`.

    Raises
    ------
    UserError
        No records, or an id that stands twice.
    """
    source = importlib.import_module(f"tlora.tasks.{benchmark['source']}")
    data = source.Data(**benchmark.get("data", {}))
    split = benchmark.get("split") or "test"
    records = source.load(data, split, Path(data_root) if data_root else None)
    records = records[: benchmark.get("limit")]
    if not records:
        raise UserError(f"{benchmark['source']}: {split}: no records: expected at least one")
    seen: set[str] = set()
    for record in records:
        if record["id"] in seen:
            raise UserError(
                f"{benchmark['source']}: id: {record['id']!r}: stands twice: expected distinct ids"
            )
        seen.add(record["id"])
    return records


@dataclass(frozen=True)
class Turn:
    """One completion that a benchmark asks for.

    Attributes
    ----------
    id
        The record's, with "/1", "/2", ... where the record is a dialogue.
    record
        What the data source gave.
    number
        From 1; None where the record is no dialogue.
    """

    id: str
    record: dict[str, Any]
    number: int | None = None


def _turns(records: list[dict[str, Any]]) -> list[Turn]:
    """Return what is to be completed, in the benchmark's order.

    Raises
    ------
    UserError
        A dialogue without a turn, a temperature that is none, or an id that stands twice.
    """
    turns: list[Turn] = []
    for record in records:
        told = record.get("turns")
        if told is None:
            turns.append(Turn(record["id"], record))
        elif not told:
            raise UserError(f"item {record['id']!r}: turns: {told!r}: expected at least one")
        else:
            numbers = range(1, len(told) + 1)
            turns += [Turn(f"{record['id']}/{number}", record, number) for number in numbers]
        heat = record.get("temperature") or 0
        if not isinstance(heat, int | float) or not 0 <= heat < math.inf:
            raise UserError(f"item {record['id']!r}: temperature: {heat!r}: expected 0 or more")
    twice = [name for name, count in Counter(turn.id for turn in turns).items() if count > 1]
    if twice:
        raise UserError(f"item {twice[0]!r}: stands twice: expected distinct ids of all turns")
    return turns


class Dialogues:
    """Prompts a backend turn by turn: what was said before is part of the next turn's prompt.

    Parameters
    ----------
    turns
        All turns of all records.
    template
        Of the first prompt.
    benchmark
        The spec's.
    tokenizer
        The base model's.
    load
        Makes the backend when it is needed, from the most tokens of a sequence (None: unknown).
    """

    def __init__(
        self,
        turns: list[Turn],
        template: str,
        benchmark: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        load: Callable[[int | None], Backend],
    ) -> None:
        self.turns, self.template, self.benchmark = turns, template, benchmark
        self.tokenizer, self.load = tokenizer, load
        self.backend: Backend | None = None
        self.texts: dict[str, str] = {}
        self.last = max(turn.number or 1 for turn in turns)
        for turn in turns:
            if turn.number and turn.number > 1 and not benchmark.get("turn_prompt"):
                raise UserError(
                    f"turn_prompt: none: expected a template, because item "
                    f"{turn.record['id']!r} has {len(turn.record['turns'])} turns"
                )

    def __enter__(self) -> Dialogues:
        return self

    def __exit__(self, *error: object) -> None:
        if self.backend is not None:
            self.backend.close()

    def complete(self, work: Partial, done: dict[str, Completion]) -> bool:
        """Add the completions that `done` lacks to it and to the work folder.

        Returns
        -------
        bool
            False, with nothing more done, where one of `done` is of another prompt.
        """
        for number in range(1, self.last + 1):
            prompts = [
                self._prompt(turn, done) for turn in self.turns if (turn.number or 1) == number
            ]
            waiting = [prompt for prompt in prompts if prompt.id not in done]
            kept = [prompt for prompt in prompts if prompt.id in done]
            if any(done[p.id].prompt_tokens != len(p.input_ids) for p in kept):
                return False
            if waiting:
                self._run(waiting, prompts, number, work, done)
        return True

    def _prompt(self, turn: Turn, done: dict[str, Completion]) -> Prompt:
        if (turn.number or 1) == 1:
            text = render(self.template, turn.record)
        else:
            before = f"{turn.record['id']}/{turn.number - 1}"
            record = {**turn.record, "instruction": turn.record["turns"][turn.number - 1]}
            added = render(self.benchmark["turn_prompt"], record)
            text = self.texts[before] + done[before].text + added
        self.texts[turn.id] = text
        return Prompt(
            turn.id,
            tuple(encode_prompt(self.tokenizer, text)),
            float(turn.record.get("temperature") or 0),
            prompt_seed(self.benchmark.get("seed", 0), turn.id),
        )

    def _run(
        self,
        waiting: list[Prompt],
        prompts: list[Prompt],
        number: int,
        work: Partial,
        done: dict[str, Completion],
    ) -> None:
        """Decode the waiting prompts of a turn, keep every batch and add it to `done`."""
        started = time.perf_counter()
        new, stop = self.benchmark["max_new_tokens"], self.benchmark["stop"]
        if self.backend is None:
            longest = max(len(prompt.input_ids) for prompt in prompts) + new
            self.backend = self.load(longest if self.last == 1 else None)
        backend, expected = self.backend, {prompt.id for prompt in waiting}
        if number > 1:
            # How long a dialogue gets is the model's doing: no reason to refuse the benchmark.
            full = [prompt for prompt in waiting if backend.rules.limit(prompt, new) < 1]
            if full:
                logger.warning("%d dialogues fill the context before turn %d", len(full), number)
                waiting = [prompt for prompt in waiting if prompt not in full]
        else:
            full = []
        said = [Completion(prompt.id, "", "length", len(prompt.input_ids), 0) for prompt in full]
        batches = backend.generate(waiting, new, stop, self.benchmark.get("num_beams") or 1)
        label = "generate" if self.last == 1 else f"turn {number}"
        with bar(total=len(expected), desc=label, unit="item") as progress:
            for batch in itertools.chain([said] if said else [], batches):
                for completion in batch:
                    if completion.id not in expected:
                        raise RuntimeError(f"{completion.id}: completed twice, or never asked for")
                    expected.remove(completion.id)
                    done[completion.id] = completion
                now = time.perf_counter()
                work.add(batch, now - started, backend.peak_memory())
                started = now
                progress.update(len(batch))
        if expected:
            raise RuntimeError(
                f"{len(expected)} prompts without a completion: {sorted(expected)[:5]}"
            )


def _line(turn: Turn, prompt: str, completion: Completion) -> str:
    row = {
        "id": turn.id,
        "prompt": prompt,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "reference": turn.record["reference"],
    }
    if turn.number is not None:
        row["turn"] = turn.number
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


class Partial:
    """Finished batches of a job that is under way: one line a batch in partial.jsonl.

    Parameters
    ----------
    folder
        Emptied first if what it holds bears another stamp.
    stamp
        Hash of what decides the result.
    """

    def __init__(self, folder: Path, stamp: str) -> None:
        self.folder, self.file = stamped(folder, stamp), folder / "partial.jsonl"
        self.batches = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """Return the whole batches; what a killed writer left of one is cut off the file."""
        if not self.file.is_file():
            return []
        batches, whole = [], []
        for line in self.file.read_bytes().splitlines(keepends=True):
            try:
                batches.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                batches.pop()
                break
            whole.append(line)
        with staged(self.file) as temporary:
            temporary.write_bytes(b"".join(whole))
        return batches

    def completions(self, ids: set[str]) -> dict[str, Completion]:
        """Return the completions by id; a stranger's, or a second one, is a broken file.

        Parameters
        ----------
        ids
            Of all that the benchmark asks for.
        """
        found: dict[str, Completion] = {}
        for batch in self.batches:
            for row in batch["completions"]:
                completion = Completion(**row)
                if completion.id in found or completion.id not in ids:
                    logger.warning("%s: does not fit the benchmark: starting afresh", self.file)
                    self.forget()
                    return {}
                found[completion.id] = completion
        return found

    def forget(self) -> None:
        """Drop all batches."""
        self.batches = []
        remove(self.file)

    def add(self, batch: list[Completion], seconds: float, memory: int | None) -> None:
        """Append a batch, with what it cost."""
        line = {
            "seconds": seconds,
            "peak_memory_bytes": memory,
            "completions": [vars(completion) for completion in batch],
        }
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.batches.append(line)

    def cost(self) -> dict[str, Any]:
        """Return seconds (loading included) and peak memory over all attempts."""
        memory = [batch["peak_memory_bytes"] for batch in self.batches]
        return {
            "seconds": sum(batch["seconds"] for batch in self.batches),
            "peak_memory_bytes": max((m for m in memory if m is not None), default=None),
        }

    def delete(self) -> None:
        """Delete the work folder."""
        remove(self.folder)
