"""A made-up results tree: what the workflow would have written for a small grid."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

METHODS = {
    "full": ("Full fine-tuning", 1_048_576, 0.52),
    "lora": ("LoRA", 65_536, 0.41),
    "pissa": ("PiSSA", 65_536, 0.44),
    "tlora": ("TLoRA", 34_816, 0.47),
}
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write(path: Path, content: Any) -> str:
    """Write JSON and return the path as grid.json has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path.as_posix()


def score(value: float, n: int = 500) -> dict[str, Any]:
    """Return a score.json with `value` rounded to whole items."""
    correct = round(value * n)
    return {
        "n": n,
        "metric": "accuracy",
        "value": correct / n,
        "metrics": {"accuracy": correct / n, "strict": max(0, correct - 5) / n},
        "unextracted": max(0, 40 - correct // 10),
        "items": [],
    }


def log_rows(steps: int, seed: int, start: float, speed: float) -> list[dict[str, Any]]:
    """Return rows of log.jsonl with a noisy falling loss."""
    draw = random.Random(seed)
    return [
        {
            "step": step,
            "epoch": 2 * step / steps,
            "loss": start * math.exp(-speed * step / steps) + 0.4 + draw.gauss(0, 0.06),
            "learning_rate": 1e-3 * (1 - step / steps),
            "grad_norm": 1 + draw.random(),
            "seconds": 0.5 * step,
        }
        for step in range(1, steps + 1)
    ]


def make_grid(
    results: Path,
    tasks: tuple[str, ...] = ("arithmetic", "choice"),
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: tuple[int, ...] = (1, 2),
    steps: int = 100,
    preset: str = "demo",
    layers: int = 4,
    benchmarks: dict[str, list[str]] | None = None,
) -> Path:
    """Write the artefacts of a grid below `results` and return the path of its grid.json."""
    of_task = benchmarks or {task: [f"{task}_test"] for task in tasks}
    cells = []
    for number, task in enumerate(tasks):
        card = write(
            results / "prepare/tiny" / task / f"p{number}" / "card.json",
            {
                "counts": {"train": 4000, "validation": 200},
                "sha256": {"train.parquet": f"{number}a" * 32, "validation.parquet": "c" * 64},
            },
        )
        shared = {"model": "tiny", "task": task, "card": card}
        base = results / "score/tiny" / task / "base"
        cells.append(
            shared
            | {"method": "base", "seed": None, "base": True}
            | {"settings": {}, "spec_id": f"base{number:08x}", "train": None, "costs": []}
            | {"allocation": None, "generations": {}}
            | {"scores": {b: write(base / b / "score.json", score(0.07)) for b in of_task[task]}}
        )
        for place, method in enumerate(methods):
            _, parameters, level = METHODS[method]
            allocation, costs = None, []
            if method in ("pissa", "tlora"):
                folder = results / "initialize/tiny" / task / method / "i1"
                cost = {"frozen": [], "seconds": 2.5, "peak_memory_bytes": 300 * 2**20}
                costs.append(write(folder / "adapter_init.json", cost))
            if method == "tlora":
                folder = results / "calibrate/tiny" / task / "sensitivity/c1"
                cost = {"statistic": "sensitivity", "samples": 32, "seconds": 11.25}
                costs.append(write(folder / "calibration.json", cost))
                modules = {
                    f"model.layers.{layer}.{name}": {
                        "rank": (layer * 7 + index * 5 + 13 * number) % 32,
                        "alpha": 16.0,
                        "scaling": 1.0,
                        "shape": [64, 64],
                        "sensitivity": 0.1,
                    }
                    for layer in range(layers)
                    for index, name in enumerate(PROJECTIONS)
                }
                folder = results / "allocate/tiny" / task / method / "a1"
                content = {"variant": "paper", "r": 16, "modules": modules, "budget": {}}
                allocation = write(folder / "allocation.json", content)
                costs.append(allocation)
            for seed in seeds:
                spec_id = f"{number}{place}{seed}".rjust(12, "f")
                folder = results / "train/tiny" / task / method / spec_id
                train = write(
                    folder / "train.json",
                    {
                        "trainable_parameters": parameters,
                        "total_parameters": 1_048_576,
                        "steps": steps,
                        "samples": 4000,
                        "dropped_samples": 0,
                        "tokens": 400_000,
                        "tokens_per_second": 9000.0 + 100 * place + seed,
                        "train_seconds": 44.0 + place + seed / 10,
                        "peak_memory_bytes": (500 + 100 * place + seed) * 2**20,
                        "final_loss": 0.5,
                        "files": {},
                        "versions": {"torch": "2.13.0"},
                        "attempts": 1,
                    },
                )
                rows = log_rows(steps, seed + 10 * place, 2.0 + number, 2.0 + place / 2)
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / "log.jsonl").write_text(text, encoding="utf-8")
                scored = results / "score/tiny" / task / method / spec_id
                made = results / "generate/tiny" / task / method / spec_id
                cost = {"seconds": 9.0, "tokens": 12_000, "peak_memory_bytes": 2**28}
                draw = random.Random(seed + 100 * place + 1000 * number)
                scores = {
                    b: write(scored / b / "score.json", score(level + draw.gauss(0, 0.02)))
                    for b in of_task[task]
                }
                cells.append(
                    shared
                    | {"method": method, "seed": seed, "base": False}
                    | {"settings": {"learning_rate": 1e-3, "rank": 16, "method": {"name": method}}}
                    | {"spec_id": spec_id, "train": train, "costs": costs}
                    | {"allocation": allocation, "scores": scores}
                    | {
                        "generations": {
                            b: write(made / b / "generate.json", cost) for b in of_task[task]
                        }
                    }
                )
    grid = {
        "preset": preset,
        "baseline": "lora",
        "cells": cells,
        "tasks": {task: {"benchmarks": of_task[task]} for task in tasks},
    }
    path = results / "comparison" / preset / "grid.json"
    write(path, grid)
    return path


def labels_of(grid: Path) -> dict[str, dict[str, str]]:
    """Return labels for everything in a made-up grid."""
    tasks = json.loads(grid.read_text(encoding="utf-8"))["tasks"]
    benchmarks = [name for task in tasks.values() for name in task["benchmarks"]]
    return {
        "models": {"tiny": "Tiny Llama 1M"},
        "tasks": {name: name.capitalize() for name in tasks},
        "methods": {"base": "Base model", **{name: m[0] for name, m in METHODS.items()}},
        "benchmarks": {name: name.replace("_", " ").capitalize() for name in benchmarks},
    }
