"""MetaMathQA: problems of GSM8K's and MATH's training sets, rewritten, with worked answers (Yu et
al. 2023, arXiv 2309.12284)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tlora.tasks import loading

MARKER = "The answer is:"
COLUMNS = ("query", "response", "original_question")


@dataclass(frozen=True)
class Data:
    """Which problems are trained on.

    Attributes
    ----------
    repo, revision
        The hub dataset and the commit that is read. A `data_root` comes first: then
        `{data_root}/metamath/train.jsonl` (or `MetaMathQA-395K.json`, as the hub names it) is read.
    samples
        Problems in use, train and validation together; None: all 395,000.
    subset_seed
        Draws the samples; None takes the first ones, as the paper's released code does.
    validation
        Samples set aside as the validation split, always the same ones. Problems rewritten from one
        original question stay together.
    """

    repo: str = "meta-math/MetaMathQA"
    revision: str | None = "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"
    samples: int | None = None
    subset_seed: int | None = None
    validation: int = 0

    def __post_init__(self) -> None:
        loading.check_sizes(self.validation, self.samples)
        loading.check_revision(self.revision)


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, str]]:
    """Return the records of "train" or "validation"; there is no test split.

    The response is kept as it is: it ends with a line `The answer is: X`, whose X is the reference.

    Raises
    ------
    UserError
        For missing files or columns, another split, or more samples than there are.
    """
    loading.check_split(split, "metamath", ("train", "validation"))
    where, rows = loading.fetch(_file(data_root), hub(data, split), COLUMNS)
    kept = loading.training_rows(
        rows, data.samples, data.subset_seed, data.validation, "original_question", split, where
    )
    return [
        {
            "id": f"train-{i}",
            "instruction": row["query"],
            "response": row["response"],
            "reference": answer(row["response"]),
        }
        for i, row in kept
    ]


def answer(response: str) -> str:
    """Return what a worked answer ends with, all of it where it does not say."""
    return response.rpartition(MARKER)[2].strip()


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it reads the hub."""
    return loading.local_sources(_file(data_root), hub(data, split))


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return loading.known_rows(395_000, data, split)


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return what `load` reads of the hub without a `data_root`."""
    return [(data.repo, None, "train", data.revision)]


def _file(data_root: Path | None) -> Path | None:
    return loading.locate(data_root, "metamath", "train", "MetaMathQA-395K")
