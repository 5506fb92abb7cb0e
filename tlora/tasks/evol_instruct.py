"""WizardLM's evolved instructions with answers (Xu et al. 2023, arXiv 2304.12244)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import UserError
from tlora.tasks import loading

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True)
class Data:
    """Which instructions are trained on.

    Attributes
    ----------
    repo, revision
        The hub dataset and the commit that is read. A `data_root` comes first: then
        `{data_root}/evol_instruct/train.jsonl` (or `WizardLM_evol_instruct_V2_143k.json`, as the
        hub names it) is read. Its rows hold `conversations`, of which the first question and
        answer are taken, or `instruction` and `output`.
    samples
        Instructions in use, train and validation together; None: all (143,000 of them on the hub).
    subset_seed
        Draws the samples; None takes the first ones, as the paper's released code does.
    validation
        Samples set aside as the validation split, always the same ones.
    """

    repo: str = "WizardLMTeam/WizardLM_evol_instruct_V2_196k"
    revision: str | None = "8a7d15a83028b5c93915677704f492839e2675f6"
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
        For missing files or columns, a conversation that does not begin with a question and its
        answer, another split, or more samples than there are.
    """
    loading.check_split(split, "evol_instruct", ("train", "validation"))
    where, rows = loading.fetch(_file(data_root), hub(data, split), columns)
    pairs = [_pair(row, f"{where}: row {i}") for i, row in enumerate(rows, start=1)]
    kept = loading.training_rows(
        pairs, data.samples, data.subset_seed, data.validation, "instruction", split, where
    )
    return [{"id": f"train-{i}", **pair, "reference": pair["response"]} for i, pair in kept]


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return the local file that `load` reads, by its name; nothing where it reads the hub."""
    return loading.local_sources(_file(data_root), hub(data, split))


def rows(data: Data, split: str) -> int:
    """Return how many records are published, for estimates before anything is read."""
    return loading.known_rows(143_000, data, split)


def hub(data: Data, split: str) -> list[loading.HubSplit]:
    """Return what `load` reads of the hub without a `data_root`."""
    return [(data.repo, None, "train", data.revision)]


def columns(present: Sequence[str]) -> Mapping[str, type]:
    """Return the columns to read, by those there are."""
    if "conversations" in present:
        return {"conversations": list}
    return {"instruction": str, "output": str}


def _pair(row: dict[str, Any], where: str) -> dict[str, str]:
    """Return the instruction and the response of a row of either form."""
    if "conversations" not in row:
        return {"instruction": row["instruction"], "response": row["output"]}
    texts = []
    for turn, speakers in zip(row["conversations"][:2], (_ASKS, _ANSWERS), strict=False):
        text = turn.get("value") if isinstance(turn, dict) else None
        if isinstance(text, str) and turn.get("from") in speakers:
            texts.append(text)
    if len(texts) != 2:
        raise UserError(
            f"{where}: conversations: expected it to begin with a text from {_ASKS[0]}, "
            f"then one from {_ANSWERS[0]}"
        )
    return {"instruction": texts[0], "response": texts[1]}


def _file(data_root: Path | None) -> Path | None:
    return loading.locate(data_root, "evol_instruct", "train", "WizardLM_evol_instruct_V2_143k")
