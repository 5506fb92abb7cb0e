"""GSM8K: grade-school word problems with worked answers (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tlora.errors import UserError
from tlora.tasks import loading

COLUMNS = ("question", "answer")

_ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Data:
    """Where the problems come from.

    Attributes
    ----------
    repo, name, revision
        The hub dataset, its configuration and the commit that is read. A `data_root` comes first:
        then `{data_root}/gsm8k/train.jsonl` and `test.jsonl` are read.
    validation
        Training problems set aside as the validation split, always the same ones.
    """

    repo: str = "openai/gsm8k"
    name: str = "main"
    revision: str | None = "e53f048856ff4f594e959d75785d2c2d37b678ee"
    validation: int = 0

    def __post_init__(self) -> None:
        loading.check_sizes(self.validation)
        loading.check_revision(self.revision)


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, str]]:
    """Return the records of a split: "train", "validation" or "test".

    Raises
    ------
    UserError
        For missing files or columns, another split, and an answer without `#### N`.
    """
    loading.check_split(split, "gsm8k")
    where, rows = loading.fetch(_file(split, data_root), hub(data, split), COLUMNS)
    source = _source(split)
    indexed = (
        list(enumerate(rows))
        if split == "test"
        else loading.carve(rows, data.validation, "question", split, where)
    )
    return [
        record(f"{source}-{i}", row["question"], row["answer"], f"{where}: row {i + 1}")
        for i, row in indexed
    ]


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it reads the hub."""
    return loading.local_sources(_file(split, data_root), hub(data, split))


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return 1_319 if split == "test" else loading.known_rows(7_473, data, split)


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return what `load` reads of the hub without a `data_root`."""
    return [(data.repo, data.name, _source(split), data.revision)]


def _source(split: str) -> str:
    return "test" if split == "test" else "train"


def _file(split: str, data_root: Path | None) -> Path | None:
    return loading.locate(data_root, "gsm8k", _source(split))


def record(identifier: str, question: str, answer: str, where: str) -> dict[str, str]:
    """Return a record of a problem in GSM8K's answer format.

    The response is the reasoning without its `<<...>>` annotations, then `The answer is: N` with
    the number as it stands after `####` but without thousands commas; the reference is the raw
    answer.
    """
    reasoning, mark, number = answer.rpartition("####")
    if not mark or not number.strip():
        raise UserError(f"{where}: answer: expected it to end with '#### ' and a number")
    text = _ANNOTATION.sub("", reasoning).strip()
    final = f"The answer is: {number.strip().replace(',', '')}"
    return {
        "id": identifier,
        "instruction": question,
        "response": f"{text}\n{final}" if text else final,
        "reference": answer,
    }
