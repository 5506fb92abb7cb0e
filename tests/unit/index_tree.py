"""A made-up results tree with the completions and verdicts of every item."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unit.grid_tree import make_grid, write

HOSTILE = "<img src=x onerror=\"window.ran='img'\"><script>window.ran='script'</script></script>"
"""A completion that runs where it is taken for a piece of a page."""

LEVELS = {"base": 0.05, "full": 0.6, "lora": 0.45, "pissa": 0.5, "tlora": 0.65}


def make_items(
    results: Path,
    items: int = 60,
    words: int = 20,
    check: bool = True,
    **options: Any,
) -> Path:
    """Write a grid with generations.jsonl and verdicts beside every score; return its grid.json.

    Parameters
    ----------
    items
        Of every benchmark; ids are `test-0`, `test-1` and so on.
    words
        Of a completion, beside its answer.
    check
        Whether every run has a check.json.
    options
        Of `make_grid`.

    Notes
    -----
    Item 3 is right for tlora and wrong for lora with every seed. The completion of item 5 by every
    run is `HOSTILE`, item 7 has the word "aardvark" in its prompt, and lora with the first seed
    says "wombat" on item 9.
    """
    grid = make_grid(results, **options)
    content = json.loads(grid.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        for benchmark, path in cell["scores"].items():
            folder = results / "generate" / cell["spec_id"] / f"{cell['task']}-{benchmark}"
            rows, judged = _rows(cell, benchmark, items, words)
            cost = {"seconds": 9.0, "tokens": 10 * items, "peak_memory_bytes": 2**28}
            cell["generations"][benchmark] = write(folder / "generate.json", cost)
            write_lines(folder / "generations.jsonl", rows)
            right = sum(item["correct"] for item in judged)
            value = {"n": items, "metric": "accuracy", "value": right / items}
            value |= {"metrics": {"accuracy": right / items, "strict": 0.9 * right / items}}
            value |= {"unextracted": sum(item["extracted"] is None for item in judged)}
            write(Path(path), value | {"items": judged})
        if check and not cell["base"]:
            folder = results / "check" / cell["spec_id"]
            cell["check"] = write(folder / "check.json", {"passed": True, "reasons": []})
    write(grid, content)
    return grid


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rows(
    cell: dict[str, Any], benchmark: str, items: int, words: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    ease = random.Random(benchmark)
    luck = random.Random(f"{cell['method']} {cell['seed']}")
    rows, judged = [], []
    for index in range(items):
        hard = 0.5 * ease.random() + 0.5 * luck.random()
        right = hard < LEVELS[cell["method"]]
        if index == 3 and cell["method"] in ("tlora", "lora"):
            right = cell["method"] == "tlora"
        gold = 7 * index
        answer = gold if right else gold + 1
        filler = " ".join(luck.choice(("so", "then", "we", "add", "both")) for _ in range(words))
        text: str = f"{filler}.\nThe answer is: {answer}"
        silent = not right and index % 11 == 0
        if silent:
            text = f"{filler} and so on"
        if index == 5:
            text = HOSTILE
        if index == 9 and (cell["method"], cell["seed"]) == ("lora", 1):
            text = f"A wombat. {text}"
        animal = "aardvark" if index == 7 else "zebra"
        rows.append(
            {
                "id": f"test-{index}",
                "prompt": f"### Instruction:\nA {animal} runs {index} times 7 steps. How many?"
                "\n\n### Response:",
                "completion": text,
                "finish_reason": "length" if silent else "eos",
                "prompt_tokens": 30,
                "completion_tokens": 10,
                "reference": f"7 * {index} = {gold}\n#### {gold}",
            }
        )
        found = None if silent else str(answer)
        judged.append(
            {"id": f"test-{index}", "correct": right, "extracted": found, "strict_correct": right}
        )
    return rows, judged


def make_plots(grid: Path) -> Path:
    """Write one small picture with its description, as `compare` does; return pictures.json."""
    folder = grid.parent / "plots"
    # one white pixel
    pixel = "89504e470d0a1a0a0000000d4948445200000001000000010800000000" + "3a7e9b55"
    pixel += "0000000a49444154789c63f80f000101000518d84e0000000049454e44ae426082"
    path = "arithmetic/loss__tiny__all.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(bytes.fromhex(pixel))
    picture = {"path": path, "task": "arithmetic", "model": "tiny", "title": "Training loss"}
    write(folder / "pictures.json", [picture | {"description": "It falls in every run."}])
    return folder / "pictures.json"
