"""Completions of a benchmark's prompts; an interrupted job goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tlora.artefact import remove, staged, stamped, write_json, write_text
from tlora.base_model import load_tokenizer, peak_memory_bytes
from tlora.errors import UserError
from tlora.generation import Backend, Completion, Prompt
from tlora.progress import bar
from tlora.tasks.prompts import encode_prompt, render

logger = logging.getLogger(__name__)


def generate(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write generations.jsonl, in the benchmark's order, and generate.json.

    Until then finished batches lie in `place["work"]`, and count only under the same
    `place["stamp"]`.

    Raises
    ------
    UserError
        Bad data, a prompt that does not fit the model, or an adapter that does not.
    """
    from tlora.generation.transformers import load

    export = inputs.get("export")
    if (spec["export"] is None) != (export is None):
        raise UserError(f"export: {spec['export']}: the input is {export}: expected both or none")
    benchmark = spec["benchmark"]
    records = benchmark_records(benchmark, place.get("data_root"))
    texts = [render(spec["prompt"], record) for record in records]
    tokenizer = load_tokenizer(place)
    prompts = [
        Prompt(record["id"], tuple(encode_prompt(tokenizer, text)))
        for record, text in zip(records, texts, strict=True)
    ]
    work = Partial(Path(place["work"]), place["stamp"])
    known = {prompt.id: len(prompt.input_ids) for prompt in prompts}
    done = work.completions(known)
    if done:
        logger.info("going on after %d of %d completions", len(done), len(prompts))
    waiting = [prompt for prompt in prompts if prompt.id not in done]
    if waiting:
        _run(
            lambda: load(spec["model"], export, place, tokenizer),
            waiting,
            benchmark,
            work,
            done,
        )
    lines = [
        _line(record, text, done[record["id"]]) for record, text in zip(records, texts, strict=True)
    ]
    cost = work.cost()
    tokens = sum(completion.completion_tokens for completion in done.values())
    write_json(Path(out) / "generate.json", {**cost, "tokens": tokens})
    write_text(Path(out) / "generations.jsonl", "".join(lines))
    logger.info("%d completions, %d tokens, %.1f s", len(lines), tokens, cost["seconds"])
    work.delete()


def benchmark_records(benchmark: dict[str, Any], data_root: str | None) -> list[dict[str, Any]]:
    """Return the records of a benchmark's test split, the first `limit` where it has one.

    Raises
    ------
    UserError
        No records, or an id that stands twice.
    """
    source = importlib.import_module(f"tlora.tasks.{benchmark['source']}")
    data = source.Data(**benchmark.get("data", {}))
    records = source.load(data, "test", Path(data_root) if data_root else None)
    records = records[: benchmark.get("limit")]
    if not records:
        raise UserError(f"{benchmark['source']}: test: no records: expected at least one")
    seen: set[str] = set()
    for record in records:
        if record["id"] in seen:
            raise UserError(
                f"{benchmark['source']}: id: {record['id']!r}: stands twice: expected distinct ids"
            )
        seen.add(record["id"])
    return records


def _run(
    load: Callable[[], Backend],
    waiting: list[Prompt],
    benchmark: dict[str, Any],
    work: Partial,
    done: dict[str, Completion],
) -> None:
    """Decode the waiting prompts, keep every batch in the work folder and add it to `done`."""
    started = time.perf_counter()
    backend = load()
    expected = {prompt.id for prompt in waiting}
    with bar(total=len(waiting), desc="generate", unit="item") as progress:
        for batch in backend.generate(waiting, benchmark["max_new_tokens"], benchmark["stop"]):
            for completion in batch:
                if completion.id not in expected:
                    raise RuntimeError(f"{completion.id}: completed twice, or never asked for")
                expected.remove(completion.id)
                done[completion.id] = completion
            now = time.perf_counter()
            work.add(batch, now - started, peak_memory_bytes())
            started = now
            progress.update(len(batch))
    if expected:
        raise RuntimeError(f"{len(expected)} prompts without a completion: {sorted(expected)[:5]}")


def _line(record: dict[str, Any], prompt: str, completion: Completion) -> str:
    row = {
        "id": record["id"],
        "prompt": prompt,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "reference": record["reference"],
    }
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

    def completions(self, prompt_tokens: dict[str, int]) -> dict[str, Completion]:
        """Return the completions by id; one of another prompt, or a second one, is a broken file.

        Parameters
        ----------
        prompt_tokens
            Tokens of every prompt of the benchmark, by id.
        """
        found: dict[str, Completion] = {}
        for batch in self.batches:
            for row in batch["completions"]:
                completion = Completion(**row)
                known = prompt_tokens.get(completion.id) == completion.prompt_tokens
                if completion.id in found or not known:
                    logger.warning("%s: does not fit the benchmark: starting afresh", self.file)
                    self.batches = []
                    remove(self.file)
                    return {}
                found[completion.id] = completion
        return found

    def add(self, batch: list[Completion], seconds: float, memory: int) -> None:
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
        return {
            "seconds": sum(batch["seconds"] for batch in self.batches),
            "peak_memory_bytes": max(batch["peak_memory_bytes"] for batch in self.batches),
        }

    def delete(self) -> None:
        """Delete the work folder."""
        remove(self.folder)
