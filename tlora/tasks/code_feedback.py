"""CodeFeedback-Filtered-Instruction: programming questions with answers (Zheng et al. 2024, arXiv
2402.14658)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tlora.tasks import loading

COLUMNS = ("query", "answer")


@dataclass(frozen=True)
class Data:
    """Which questions are trained on.

    Attributes
    ----------
    repo, revision
        The hub dataset and the commit that is read. A `data_root` comes first: then
        `{data_root}/code_feedback/train.jsonl` (or `CodeFeedback-Filtered-Instruction.jsonl`, as
        the hub names it) is read.
    samples
        Questions in use, train and validation together; None: all 156,526.
    subset_seed
        Draws the samples; None takes the first ones, as the paper's released code does.
    validation
        Samples set aside as the validation split, always the same ones.
    """

    repo: str = "m-a-p/CodeFeedback-Filtered-Instruction"
    revision: str | None = "a08c213a9748c66c15d0225814be80a2e77adf4a"
    samples: int | None = None
    subset_seed: int | None = None
    validation: int = 0

    def __post_init__(self) -> None:
        loading.check_sizes(self.validation, self.samples)
        loading.check_revision(self.revision)


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, str]]:
    """Return the records of "train" or "validation"; there is no test split.

    Raises
    ------
    UserError
        For missing files or columns, another split, or more samples than there are.
    """
    loading.check_split(split, "code_feedback", ("train", "validation"))
    where, rows = loading.fetch(_file(data_root), hub(data, split), COLUMNS)
    kept = loading.training_rows(
        rows, data.samples, data.subset_seed, data.validation, "query", split, where
    )
    return [
        {
            "id": f"train-{i}",
            "instruction": row["query"],
            "response": row["answer"],
            "reference": row["answer"],
        }
        for i, row in kept
    ]


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it reads the hub."""
    return loading.local_sources(_file(data_root), hub(data, split))


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return loading.known_rows(156_526, data, split)


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return what `load` reads of the hub without a `data_root`."""
    return [(data.repo, None, "train", data.revision)]


def _file(data_root: Path | None) -> Path | None:
    return loading.locate(data_root, "code_feedback", "train", "CodeFeedback-Filtered-Instruction")
