"""Whether a benchmark's test records stand in a task's training data."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from tlora.artefact import write_json
from tlora.errors import UserError
from tlora.progress import bar
from tlora.tasks.overlap import RUN, text_of
from tlora.tasks.overlap import overlap as find

logger = logging.getLogger(__name__)

LISTED = 100
"""Identifiers that are named; the counts are of all."""


def overlap(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write overlap.json.

    Parameters
    ----------
    spec
        `task` and `benchmark`, each with `source`, `data` and `files`.
    inputs
        None is read.
    out
        Folder of overlap.json: `n` test records and `train` training records; `exact` and
        `ngram13`, how many of the `n` stand in the training data word by word and how many share
        13 words in a row with a record of it; `exact_ids` and `ngram13_ids`, the first of them.
    place
        `data_root`: folder of local files, or none.

    Raises
    ------
    UserError
        Bad data, or no test record.
    """
    root = Path(place["data_root"]) if place.get("data_root") else None
    train, test = (
        _records(spec[side], split, root)
        for side, split in (("task", "train"), ("benchmark", "test"))
    )
    if not test:
        raise UserError(f"{spec['benchmark']['source']}: test: no records: expected at least one")
    texts = [(record["id"], text_of(record)) for record in test]
    found = find(texts, (text_of(r) for r in bar(train, desc="overlap", unit="record")))
    result = {
        "n": len(test),
        "train": len(train),
        "exact": len(found["exact"]),
        f"ngram{RUN}": len(found["ngram"]),
        "exact_ids": found["exact"][:LISTED],
        f"ngram{RUN}_ids": found["ngram"][:LISTED],
    }
    logger.info("%(exact)d of %(n)d test records stand in the training data", result)
    write_json(out / "overlap.json", result)


def _records(side: dict[str, Any], split: str, root: Path | None) -> list[dict[str, Any]]:
    source = importlib.import_module(f"tlora.tasks.{side['source']}")
    return source.load(source.Data(**side["data"]), split, root)
