"""Whether test records stand in the training data: exactly, or as a run of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

RUN = 13
"""Words of a run that makes a test text suspect (Brown et al. 2020, arXiv 2005.14165)."""

_WORD = re.compile(r"\w+")


def text_of(record: Mapping[str, Any]) -> str:
    """Return what a record asks: its `question` where it has one, else its instruction.

    A `question` leaves out what all records share, which would make all of them suspect. Of a
    dialogue all turns count.
    """
    return "\n".join(record.get("turns") or [record.get("question") or record["instruction"]])


def overlap(
    test: Sequence[tuple[str, str]], train: Iterable[str], run: int = RUN
) -> dict[str, list[str]]:
    """Return the test records that also stand in the training data.

    Only the test texts are held in memory; the training texts are passed over once.

    Parameters
    ----------
    test
        Identifier and text of each record.
    train
        Texts.
    run
        Consecutive words that must agree, whatever stands between them. Shorter texts can only
        agree exactly.

    Returns
    -------
    dict
        "exact": identifiers of the texts that agree but for case and white space; "ngram": of
        those that share a run of words with a training text. In the order of `test`.
    """
    whole: dict[str, list[int]] = {}
    runs: dict[tuple[str, ...], list[int]] = {}
    for index, (_, text) in enumerate(test):
        whole.setdefault(_plain(text), []).append(index)
        for gram in set(_runs(text, run)):
            runs.setdefault(gram, []).append(index)
    exact: set[int] = set()
    shared: set[int] = set()
    seen: set[str] = set()
    for text in train:
        plain = _plain(text)
        if plain in seen:
            continue
        seen.add(plain)
        exact.update(whole.get(plain, ()))
        for gram in _runs(plain, run):
            if gram in runs:
                shared.update(runs.pop(gram))
    return {
        "exact": [test[index][0] for index in sorted(exact)],
        "ngram": [test[index][0] for index in sorted(shared)],
    }


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _runs(text: str, run: int) -> Iterable[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return zip(*(words[at:] for at in range(run)), strict=False)
