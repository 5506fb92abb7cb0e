"""HumanEval+ and MBPP+: programming problems with tests (Liu et al. 2023, arXiv 2305.01210).

HumanEval+ v0.1.10 holds the 164 problems of HumanEval (Chen et al. 2021, arXiv 2107.03374), MBPP+
v0.2.0 378 of MBPP (Austin et al. 2021, arXiv 2108.07732), each with the original tests (base) and
those that EvalPlus adds (plus).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import UserError
from tlora.tasks import loading
from tlora.tasks.prompts import render
from tlora.tasks.web import web_file

INSTRUCTION = "Create a Python script for this problem:\n{prompt}"
"""What WizardCoder (arXiv 2306.08568) asks; `{prompt}` is the problem's text."""


@dataclass(frozen=True)
class Release:
    """A published file of problems.

    Attributes
    ----------
    url
        Where it lies.
    sha256
        Of its content, unpacked.
    names
        What it is called in a `data_root`, without suffix.
    """

    url: str
    sha256: str
    names: tuple[str, ...]


_URL = "https://github.com/evalplus/{0}/releases/download/{1}/{2}.jsonl.gz"
RELEASES = {
    "humaneval": Release(
        _URL.format("humanevalplus_release", "v0.1.10", "HumanEvalPlus"),
        "42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f",
        ("HumanEvalPlus-v0.1.10", "HumanEvalPlus", "test"),
    ),
    "mbpp": Release(
        _URL.format("mbppplus_release", "v0.2.0", "MbppPlus"),
        "b54e762755248ca411b523c917fa9f93c07b5ff2966bf60b3917b853926a3dad",
        ("MbppPlus-v0.2.0", "MbppPlus", "test"),
    ),
}
TEXTS = ("task_id", "prompt", "entry_point", "canonical_solution")


@dataclass(frozen=True)
class Data:
    """Which problems, and how they are put.

    Attributes
    ----------
    dataset
        "humaneval" or "mbpp". EvalPlus' release of it is fetched; a `data_root` comes first: then
        `{data_root}/{dataset}/` or `{data_root}/code/` holds the file, under its own name
        (HumanEvalPlus-v0.1.10.jsonl.gz, MbppPlus-v0.2.0.jsonl.gz).
    instruction
        What the model is asked; `{prompt}` is the problem's text, and other fields of the problem
        can be named too.
    """

    dataset: str = "humaneval"
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if self.dataset not in RELEASES:
            raise ValueError(f"dataset: expected {' or '.join(RELEASES)}")
        if "{prompt}" not in self.instruction:
            raise ValueError("instruction: expected a text with {prompt}")


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, Any]]:
    """Return the problems; there is only a test split.

    A record's `reference` is the problem itself (`dataset`, `task_id`, `entry_point`, `prompt`,
    `canonical_solution`, `atol`) with its inputs packed in `tests`, so that a file of completions
    is judged without anything else.

    Raises
    ------
    UserError
        Another split; a file that is missing, cannot be fetched or is broken, with the line.
    """
    loading.check_split(split, data.dataset, ("test",))
    path = _local(data, data_root) or web_file(*_released(data))
    # Of MBPP+ one problem has an object without keys for the plus tests: none.
    kinds = {"base_input": list, "plus_input": object, "atol": object}
    rows = loading.read_rows(path, {**dict.fromkeys(TEXTS, str), **kinds})
    return [_record(data, row, str(path)) for row in rows]


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it is fetched."""
    path = _local(data, data_root)
    return {} if path is None else {path.name: path}


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return {"humaneval": 164, "mbpp": 378}[data.dataset]


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return no hub dataset: the ones of this name lack the inputs of the tests."""
    return []


def web(data: Data, split: str) -> list[tuple[str, str]]:
    """Return the files of the web that `load` reads without a `data_root`: URL and checksum."""
    return [_released(data)]


def _released(data: Data) -> tuple[str, str]:
    release = RELEASES[data.dataset]
    return release.url, release.sha256


def _local(data: Data, data_root: Path | None) -> Path | None:
    if data_root is None:
        return None
    own = Path(data_root) / data.dataset
    folder = own if own.is_dir() else own.parent / "code"
    return loading.find_file(folder, *RELEASES[data.dataset].names) if folder.is_dir() else None


def _record(data: Data, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key, kinds in (("plus_input", list | dict), ("atol", int | float)):
        if not isinstance(row[key], kinds):
            raise UserError(
                f"{where}: task_id: {row['task_id']!r}: {key}: {str(row[key])[:60]}: "
                f"expected {'a number' if key == 'atol' else 'a list'}"
            )
    solution = row["canonical_solution"]
    return {
        "id": row["task_id"],
        "instruction": render(data.instruction, {key: row[key] for key in TEXTS}),
        "response": row["prompt"] + solution if data.dataset == "humaneval" else solution,
        "reference": pack(data.dataset, row),
    }


def pack(dataset: str, problem: Mapping[str, Any]) -> dict[str, Any]:
    """Return a problem as the scorer reads it, its tests packed into one text.

    Parameters
    ----------
    dataset
        "humaneval" or "mbpp".
    problem
        A line of EvalPlus' file.
    """
    tests = json.dumps([list(problem["base_input"]), list(problem["plus_input"])])
    return {
        "dataset": dataset,
        **{key: problem[key] for key in (*TEXTS, "atol")},
        "tests": base64.b64encode(zlib.compress(tests.encode(), 9)).decode(),
    }
