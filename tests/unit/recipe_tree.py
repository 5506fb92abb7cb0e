"""What the workflow adds to a made-up results tree: recipes, data cards, verdicts, trials."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unit.grid_tree import make_grid, write

from tlora.comparison import collect
from tlora.comparison.collect import Comparison

PROMPT = "### Instruction:\n{instruction}\n\n### Response:"
MODEL = {"hub": "org/base", "revision": "0123456789abcdef" * 2 + "01234567"}
MODEL |= {"dtype": "bfloat16", "architecture": "causal"}
TARGETS = ["q_proj", "v_proj"]
SETTINGS = {
    "rank": 8,
    "lora_alpha": 16.0,
    "target_modules": TARGETS,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "batch_size": 16,
    "epochs": 1.0,
    "calibration_samples": 32,
    "max_length": 512,
}


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def complete_grid(**given: Any) -> Path:
    """Write a grid of one task whose cells say what their runs are made with."""
    grid = make_grid(Path("results"), **{"tasks": ("choice",), "steps": 2} | given)

    def change(content: dict[str, Any]) -> None:
        for cell in content["cells"]:
            add_recipe(cell)

    edit(grid, change)
    return grid


def add_recipe(cell: dict[str, Any]) -> None:
    """Say what a cell's run is made with, as `Plan.grid` does."""
    own: dict[str, Any] = {}
    if not cell["base"]:
        cell["settings"] = {**SETTINGS, "options.gain": 1.0}
        full = cell["method"] == "full"
        adapter = {k: None if full else SETTINGS[k] for k in ("rank", "lora_alpha")}
        own = {"train": {"model": MODEL, "implementation": cell["method"], **adapter}}
        if cell["method"] == "tlora":
            own["sensitivity"] = {"statistic": "sensitivity", "samples": 32, "seed": 0}
        facts = {"source": "choice", "data": {"seed": 0, "train": 4000}, "sources": {}}
        facts |= {"prompt": PROMPT, "truncated": {"train": 3, "validation": 0}}
        edit(Path(cell["card"]), lambda card: card.update(facts))
    asked = {"source": "choice", "data": {"seed": 0, "test": 500}, "limit": None, "stop": ["\n"]}
    asked |= {"max_new_tokens": 48, "num_beams": 1, "turn_prompt": None}
    cell["recipe"] = own | {
        "generate": {
            name: {"model": MODEL, "export": None, "prompt": PROMPT, "benchmark": asked}
            | {"files": {}, "backend": "transformers"}
            for name in cell["scores"]
        },
        "score": {
            name: {"implementation": "choice", "options": {}, "generate": "x", "check": None}
            for name in cell["scores"]
        },
        "own": [],
        "varied": [],
    }


def change_cells(
    grid: Path, method: str, change: Callable[[dict[str, Any]], None], seed: int | None = None
) -> None:
    """Change the cells of a method, or of one of its seeds."""

    def all_of_it(content: dict[str, Any]) -> None:
        for cell in content["cells"]:
            if cell["method"] == method and seed in (None, cell["seed"]):
                change(cell)

    edit(grid, all_of_it)


def judge(grid: Path, levels: dict[str, float], items: int = 500, seed_spread: float = 0.0) -> None:
    """Give every score verdicts: the level is the share of items that a run of a method gets right.

    Items are as hard for one method as for the other; seeds move a run's level by a normal
    deviate of `seed_spread`.
    """
    for cell in json.loads(grid.read_text())["cells"]:
        for benchmark, path in cell["scores"].items():
            luck = random.Random(f"{cell['method']} {cell['seed']} {benchmark}")
            level = levels.get(cell["method"], 0.1) + luck.gauss(0, seed_spread)
            ease = random.Random(benchmark)
            # half of what makes an answer right is the item's, half the run's
            draws = [0.5 * ease.random() + 0.5 * luck.random() for _ in range(items)]
            bar = sorted(draws)[round(level * items) - 1]
            found = [
                {"id": str(index), "correct": draw <= bar, "extracted": "x"}
                for index, draw in enumerate(draws)
            ]
            value = sum(item["correct"] for item in found) / items
            told = {"n": items, "value": value, "metrics": {"accuracy": value}, "items": found}
            edit(Path(path), lambda score, told=told: score.update(told))


def tune(grid: Path, tried: dict[str, list[float]], winners: dict[str, int]) -> None:
    """Add the trials of every method: learning rates, judged on a validation split."""

    def change(content: dict[str, Any]) -> None:
        content["choices"] = []
        for method, rates in tried.items():
            cells = [cell for cell in content["cells"] if cell["method"] == method]
            folder = Path("results/choose") / method
            trials = []
            for number, rate in enumerate(rates):
                train = json.loads(Path(cells[0]["train"]).read_text())
                score = {"n": 40, "metric": "accuracy", "value": 0.5, "items": []}
                trials.append(
                    cells[0]
                    | {"seed": 0, "spec_id": f"{method}{number}"}
                    | {"train": write(folder / f"{number}/train.json", train)}
                    | {"scores": {"validation": write(folder / f"{number}/score.json", score)}}
                    | {"settings": {**SETTINGS, "learning_rate": rate}}
                )
            winner = winners[method]
            edges = {0: "lower", len(rates) - 1: "upper"}
            chosen = {
                "metric": "accuracy",
                "higher_is_better": True,
                "n": 40,
                "trials": [
                    {"settings": {"learning_rate": rate}, "score": "x", "value": 0.5}
                    for rate in rates
                ],
                "winner": winner,
                "settings": {"learning_rate": rates[winner]},
                "edges": {"learning_rate": edges[winner]} if winner in edges else {},
            }
            for cell in cells:
                cell["settings"]["learning_rate"] = rates[winner]
            place = {"model": "tiny", "task": "choice", "method": method}
            path = write(folder / "chosen.json", chosen)
            content["choices"].append(place | {"chosen": path, "trials": trials})

    edit(grid, change)


LABELS = {
    "models": {"tiny": "Tiny"},
    "tasks": {"choice": "Choice"},
    "methods": {"full": "Full", "lora": "LoRA", "pissa": "PiSSA", "tlora": "TLoRA"}
    | {"base": "Base"},
    "benchmarks": {"choice_test": "Choice test"},
}


def loaded(grid: Path) -> Comparison:
    """Return the comparison of a made-up grid."""
    return collect.load(grid, LABELS)
