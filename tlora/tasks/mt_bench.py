"""MT-Bench: 80 questions of two turns in eight categories (Zheng et al. 2023, arXiv 2306.05685)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import UserError

FILES = {
    "questions": "mtbench/question.jsonl",
    "references": "mtbench/reference_answer/gpt-4.jsonl",
    "prompts": "mtbench/judge_prompts.jsonl",
}
FOLDER = Path("data")
"""Where the files are looked for without a `data_root`: no hub dataset holds all three."""
TURNS = 2
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of generation, by category; the others are decoded greedily."""
REFERENCED = frozenset({"math", "reasoning", "coding"})
"""Categories whose answers are judged beside a reference answer."""
PROMPTS = ("single-v1", "single-v1-multi-turn")
REFERENCED_PROMPTS = ("single-math-v1", "single-math-v1-multi-turn")
"""What the judge is told about the first and the second turn."""


@dataclass(frozen=True)
class Data:
    """No options: the benchmark is one set of files."""


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, Any]]:
    """Return the questions; there is only a test split.

    Each record has `turns` (two instructions, of which `instruction` is the first) and, where its
    category is not decoded greedily, `temperature`. Its `reference` is all that judging needs:
    `category`, `turns`, `answers` (of GPT-4 to both turns, None where they are not used) and
    `prompts` (what the judge is told about each turn: `name`, `system_prompt`, `prompt_template`).

    Raises
    ------
    UserError
        Another split; a missing file; a broken line, with its number; a question without a
        reference answer that needs one.
    """
    if split != "test":
        raise UserError(f"mt_bench: split {split!r}: expected 'test': there is nothing to train on")
    paths = sources(data, split, data_root)
    prompts = _prompts(paths[FILES["prompts"]])
    answers = _answers(paths[FILES["references"]])
    return [
        _record(question, where, answers, prompts)
        for where, question in _objects(paths[FILES["questions"]])
    ]


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the three files that `load` reads, by their names.

    Raises
    ------
    UserError
        Naming the first that is missing.
    """
    root = FOLDER if data_root is None else Path(data_root)
    for name in FILES.values():
        if not (root / name).is_file():
            raise UserError(
                f"{root / name}: no such file: expected {', '.join(FILES.values())} in data_root "
                f"or in ./{FOLDER}, from fastchat/llm_judge/data of github.com/lm-sys/FastChat"
            )
    return {name: root / name for name in FILES.values()}


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return 160  # completions: two turns each


def hub(data: Data, split: str) -> list[tuple[str, str | None, str, str]]:
    """Return no hub dataset: see `sources`."""
    return []


def _record(
    question: Mapping[str, Any],
    where: str,
    answers: Mapping[Any, list[str]],
    prompts: Mapping[str, dict[str, str]],
) -> dict[str, Any]:
    number, category = question.get("question_id"), question.get("category")
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise UserError(f"{where}: question_id: {number!r}: expected an integer or text")
    if not isinstance(category, str):
        raise UserError(f"{where}: category: {category!r}: expected text")
    turns = _turns(question, where)
    referenced = category in REFERENCED
    if referenced and number not in answers:
        raise UserError(
            f"{where}: question_id: {number!r}: no reference answer: expected one in "
            f"{FILES['references']}, because the category is {category}"
        )
    names = REFERENCED_PROMPTS if referenced else PROMPTS
    record = {
        "id": str(number),
        "instruction": turns[0],
        "turns": turns,
        "response": "",
        "reference": {
            "category": category,
            "turns": turns,
            "answers": answers[number] if referenced else None,
            "prompts": [prompts[name] for name in names],
        },
    }
    if category in TEMPERATURES:
        record["temperature"] = TEMPERATURES[category]
    return record


def _answers(path: Path) -> dict[Any, list[str]]:
    """Return the reference answers to both turns, by question."""
    found = {}
    for where, row in _objects(path):
        choices = row.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UserError(f"{where}: choices: {str(choices)[:60]}: expected a list of objects")
        found[row.get("question_id")] = _turns(choices[0], where)
    return found


def _prompts(path: Path) -> dict[str, dict[str, str]]:
    """Return what the judge is told, by name."""
    fields = ("name", "system_prompt", "prompt_template")
    found = {}
    for where, row in _objects(path):
        for field in fields:
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: {field}: {row.get(field)!r}: expected text")
        found[row["name"]] = {field: row[field] for field in fields}
    for name in (*PROMPTS, *REFERENCED_PROMPTS):
        if name not in found:
            raise UserError(f"{path}: name: {name!r}: missing: expected a prompt of this name")
    return found


def _turns(row: Mapping[str, Any], where: str) -> list[str]:
    turns = row.get("turns")
    right = isinstance(turns, list) and len(turns) == TURNS
    if not right or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: turns: {str(turns)[:60]}: expected a list of {TURNS} texts")
    return turns


def _objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a JSON lines file, each with `file:line`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8: {error.reason}") from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: {str(row)[:60]}: expected an object")
        found.append((f"{path}:{number}", row))
    if not found:
        raise UserError(f"{path}: no lines: expected at least one object")
    return found
