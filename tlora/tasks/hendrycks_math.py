"""MATH: competition problems with worked solutions (Hendrycks et al. 2021, arXiv 2103.03874)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import UserError
from tlora.tasks import loading

COLUMNS = ("problem", "solution")
FURTHER = ("level", "type")
"""Columns that are kept where they are there: results are told apart by them."""
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
"""The hub dataset's configurations, read in this order."""


@dataclass(frozen=True)
class Data:
    """Where the problems come from.

    Attributes
    ----------
    repo, revision
        The hub dataset and the commit that is read. A `data_root` comes first: then
        `{data_root}/math/train.jsonl` and `test.jsonl` are read.
    validation
        Training problems set aside as the validation split, always the same ones.
    """

    repo: str = "EleutherAI/hendrycks_math"
    revision: str | None = "21a5633873b6a120296cce3e2df9d5550074f4a3"
    validation: int = 0

    def __post_init__(self) -> None:
        loading.check_sizes(self.validation)
        loading.check_revision(self.revision)


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, Any]]:
    r"""Return the records of a split: "train", "validation" or "test".

    Raises
    ------
    UserError
        For missing files or columns, another split, and a solution without `\boxed{}`.
    """
    loading.check_split(split, "hendrycks_math")
    where, rows = loading.fetch(_file(split, data_root), hub(data, split), columns)
    indexed = (
        list(enumerate(rows))
        if split == "test"
        else loading.carve(rows, data.validation, "problem", split, where)
    )
    name = _source(split)
    return [record(f"{name}-{i}", row, f"{where}: row {i + 1}") for i, row in indexed]


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it reads the hub."""
    return loading.local_sources(_file(split, data_root), hub(data, split))


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return 5_000 if split == "test" else loading.known_rows(7_500, data, split)


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return what `load` reads of the hub without a `data_root`."""
    return [(data.repo, subject, _source(split), data.revision) for subject in SUBJECTS]


def columns(present: Sequence[str]) -> list[str]:
    """Return the columns to read, by those there are."""
    return [*COLUMNS, *(column for column in FURTHER if column in present)]


def record(identifier: str, row: Mapping[str, str], where: str) -> dict[str, Any]:
    r"""Return a record of a problem.

    The response is the solution, then a line `The answer is: X` with the content of its last
    `\boxed{}`, as MetaMathQA's responses end. The reference is the row without its problem.
    """
    answer = boxed(row["solution"])
    if answer is None:
        raise UserError(f"{where}: solution: expected its answer in \\boxed{{}}")
    return {
        "id": identifier,
        "instruction": row["problem"],
        "response": f"{row['solution']}\nThe answer is: {answer}",
        "reference": {key: row[key] for key in row if key != "problem"},
    }


def boxed(solution: str) -> str | None:
    r"""Return the content of the last `\boxed{}` or `\fbox{}`, None where there is none.

    `\boxed 5` holds what stands up to the next `$`.
    """
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    tail = solution[start:].partition("box")[2].removeprefix("ed")
    if not tail.startswith("{"):
        return tail.partition("$")[0].strip() if tail.startswith(" ") else None
    depth = 0
    for at, character in enumerate(tail):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return tail[1:at]
    return None


def _source(split: str) -> str:
    return "test" if split == "test" else "train"


def _file(split: str, data_root: Path | None) -> Path | None:
    return loading.locate(data_root, "math", _source(split))
