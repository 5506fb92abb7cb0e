"""Commonsense reasoning as LLM-Adapters prepared it (Hu et al. 2023, arXiv 2304.01933): 170k
training records of eight data sets, and the test set of each.

The files are those of github.com/AGI-Edgerunners/LLM-Adapters: `ft-training_set` holds the training
records, `dataset/{name}/test.json` each test set. No hub dataset holds the test sets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tlora.errors import UserError
from tlora.tasks import loading

COLUMNS = ("instruction", "input", "output", "answer")
TESTS = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)
"""The test sets, named as their folders."""

FOLDER = Path("data")
"""Where files are looked for without a `data_root`."""

# Every instruction says what to do, then asks, then lists the labels.
_QUESTION = re.compile(r"Please [^:]*: (.+?)\s*Answer format: [\w/ ]+", re.DOTALL)


ROWS = {
    "boolq": 3_270,
    "piqa": 1_838,
    "social_i_qa": 1_954,
    "hellaswag": 10_042,
    "winogrande": 1_267,
    "ARC-Easy": 2_376,
    "ARC-Challenge": 1_172,
    "openbookqa": 500,
}
"""Published test records."""


@dataclass(frozen=True)
class Data:
    """Which records.

    Attributes
    ----------
    test
        The test set to read as the test split: boolq, piqa, social_i_qa, hellaswag, winogrande,
        ARC-Easy, ARC-Challenge or openbookqa. Training needs none.
    repo, revision
        A hub dataset of the training records, and its commit; None: local files are read. A
        `data_root` comes first: `{data_root}/commonsense/commonsense_170k.json` and
        `{data_root}/commonsense/{test}/test.json`; without one they are looked for in `./data`.
    samples
        Records in use, train and validation together; None: all 170,420.
    subset_seed
        Draws the samples; None takes the first ones.
    validation
        Samples set aside as the validation split, always the same ones.
    """

    test: str | None = None
    repo: str = "zwhe99/commonsense_170k"
    revision: str | None = None
    samples: int | None = None
    subset_seed: int | None = None
    validation: int = 0

    def __post_init__(self) -> None:
        if self.test is not None and self.test not in TESTS:
            raise ValueError(f"test: expected one of {', '.join(TESTS)}")
        loading.check_sizes(self.validation, self.samples)
        loading.check_revision(self.revision)


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, str]]:
    """Return the records of a split: "train", "validation" or "test".

    Beside the usual fields, `question` is the instruction without what all of a set share.

    Raises
    ------
    UserError
        For missing files or columns, another split, or an `input`, for which the prompt has no
        place.
    """
    where, rows = loading.fetch(_file(data, split, data_root), hub(data, split), COLUMNS)
    indexed = (
        list(enumerate(rows))
        if split == "test"
        else loading.training_rows(
            rows, data.samples, data.subset_seed, data.validation, "instruction", split, where
        )
    )
    name = data.test if split == "test" else "train"
    records = []
    for i, row in indexed:
        if row["input"].strip():
            raise UserError(f"{where}: row {i + 1}: input: {row['input'][:40]!r}: expected no text")
        records.append(
            {
                "id": f"{name}-{i}",
                "instruction": row["instruction"],
                "response": row["output"],
                "reference": row["answer"],
                "question": question(row["instruction"]),
            }
        )
    return records


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it reads the hub."""
    path = _file(data, split, data_root)
    if path is not None and split == "test":
        return {f"{data.test}/{path.name}": path}
    return loading.local_sources(path, hub(data, split))


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return ROWS[data.test] if split == "test" else loading.known_rows(170_420, data, split)


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return what `load` reads of the hub without a `data_root`: training records at a commit."""
    if split == "test" or data.revision is None:
        return []
    return [(data.repo, None, "train", data.revision)]


def question(instruction: str) -> str:
    """Return an instruction without its first words, which all of a set share, and the labels."""
    match = _QUESTION.fullmatch(instruction.strip())
    return match[1] if match else instruction


def _file(data: Data, split: str, data_root: Path | None) -> Path | None:
    loading.check_split(split, "commonsense")
    if split == "test" and data.test is None:
        raise UserError(f"commonsense: test: None: expected one of {', '.join(TESTS)}")
    if data_root is None and split != "test" and data.revision is not None:
        return None
    folder, stem = "commonsense", "commonsense_170k"
    if split == "test":
        folder, stem = f"commonsense/{data.test}", "test"
    try:
        return loading.find_file((FOLDER if data_root is None else data_root) / folder, stem)
    except UserError as error:
        raise UserError(
            f"{error}; it is in github.com/AGI-Edgerunners/LLM-Adapters, below "
            + ("dataset" if split == "test" else "ft-training_set")
        ) from error
