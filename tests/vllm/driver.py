"""Runs jobs in the environment that has vLLM: `python driver.py JOBS.json`, all in one process.

A job is the stage `generate` ("stage"), or prompts to several adapters of one engine ("adapters").
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any


def stage(job: dict[str, Any]) -> None:
    """Run the stage `generate`."""
    from tlora.stages.generate import generate

    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    inputs = {name: Path(path) for name, path in job["inputs"].items()}
    generate(job["spec"], inputs, out, job["place"])


def adapters(job: dict[str, Any]) -> None:
    """Write the completions of the base model and of every adapter, by name and prompt."""
    from tlora.generation import Prompt
    from tlora.generation.vllm import load_adapters

    exports = {name: Path(path) for name, path in job["exports"].items()}
    backends = load_adapters(job["identity"], exports, job["place"], longest=job["longest"])
    prompts = [Prompt(str(at), tuple(ids)) for at, ids in enumerate(job["prompts"])]
    said = {
        name: {
            item.id: vars(item)
            for group in backend.generate(prompts, job["max_new_tokens"], job["stop"])
            for item in group
        }
        for name, backend in backends.items()
    }
    Path(job["out"]).write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        begun = time.perf_counter()
        {"stage": stage, "adapters": adapters}[task["kind"]](task)
        gc.collect()
        print(f"{task['name']}: {time.perf_counter() - begun:.1f} s", flush=True)
