"""GLUE's tasks as text to text (Wang et al. 2018, arXiv 1804.07461; T5: arXiv 1910.10683).

GLUE's validation set is the test set here: its own test set has no public labels. Validation
records are carved from the training set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import UserError
from tlora.tasks import loading

TASKS = {
    "mrpc": ("MRPC", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "cola": ("CoLA", ("sentence",), ("unacceptable", "acceptable")),
    "rte": ("RTE", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": ("SST2", ("sentence",), ("negative", "positive")),
    "qnli": ("QNLI", ("question", "sentence"), ("entailment", "not_entailment")),
}
"""The name of the files, the columns with text, and GLUE's own names of labels 0 and 1."""

ROWS = {
    "mrpc": (3_668, 408),
    "cola": (8_551, 1_043),
    "rte": (2_490, 277),
    "sst2": (67_349, 872),
    "qnli": (104_743, 5_463),
}
"""Published records for training, and of GLUE's validation set."""


@dataclass(frozen=True)
class Data:
    """Which task, and where it comes from.

    Attributes
    ----------
    task
        mrpc, cola, rte, sst2 or qnli.
    repo, revision
        The hub dataset and the commit that is read. A `data_root` comes first: then
        `{data_root}/glue/{MRPC,CoLA,RTE,SST2,QNLI}_train.jsonl` and `..._validation.jsonl` are
        read, with the hub's columns (`label` is 0 or 1).
    validation
        Training records set aside as the validation split, always the same ones.
    """

    task: str
    repo: str = "nyu-mll/glue"
    revision: str | None = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
    validation: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}")
        loading.check_sizes(self.validation)
        loading.check_revision(self.revision)


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, str]]:
    """Return the records of a split: "train", "validation" or "test".

    The instruction is the text, or both texts on a line each; response and reference are the
    label's name.

    Raises
    ------
    UserError
        For missing files or columns, another split, and a label that is not 0 or 1.
    """
    loading.check_split(split, f"glue {data.task}")
    _, texts, words = TASKS[data.task]
    kinds = {**dict.fromkeys(texts, str), "label": int}
    where, rows = loading.fetch(_file(data, split, data_root), hub(data, split), kinds)

    def text(row: dict[str, Any]) -> str:
        return "\n".join(row[column] for column in texts)

    indexed = (
        list(enumerate(rows))
        if split == "test"
        else loading.carve(rows, data.validation, text, split, where)
    )
    records = []
    for i, row in indexed:
        if row["label"] not in (0, 1):
            raise UserError(f"{where}: row {i + 1}: label: {row['label']}: expected 0 or 1")
        word = words[row["label"]]
        records.append(
            {
                "id": f"{_source(split)}-{i}",
                "instruction": text(row),
                "response": word,
                "reference": word,
            }
        )
    return records


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it reads the hub."""
    return loading.local_sources(_file(data, split, data_root), hub(data, split))


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    train, test = ROWS[data.task]
    return test if split == "test" else loading.known_rows(train, data, split)


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return what `load` reads of the hub without a `data_root`."""
    return [(data.repo, data.task, _source(split), data.revision)]


def _source(split: str) -> str:
    """Return GLUE's own name of a split."""
    return "validation" if split == "test" else "train"


def _file(data: Data, split: str, data_root: Path | None) -> Path | None:
    return loading.locate(data_root, "glue", f"{TASKS[data.task][0]}_{_source(split)}")
