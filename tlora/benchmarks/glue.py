"""GLUE (Wang et al. 2019) as text to text (T5, Raffel et al. 2020): the answer is a label word.

The paper reports the accuracy of all five tasks. CoLA's own metric, the Matthews correlation,
stands beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tlora.benchmarks import summarise
from tlora.errors import UserError

COLA = ("unacceptable", "acceptable")
LABELS = (
    ("not_equivalent", "equivalent"),
    COLA,
    ("entailment", "not_entailment"),
    ("negative", "positive"),
)
"""The label words of MRPC; CoLA; RTE and QNLI; SST-2."""

_WORDS = {label: words for words in LABELS for label in words}


def score(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score completions that must be one of the task's label words and nothing else.

    Parameters
    ----------
    records
        Each with `id`, `completion` and `reference`: the right label word, which tells the task.

    Returns
    -------
    dict
        Content of score.json; completions that are no label word are `unextracted`, and wrong. For
        CoLA `matthews_correlation` beside it.

    Raises
    ------
    UserError
        No records, a reference that is no label word, or references of several tasks.
    """
    words = None
    items = []
    for record in records:
        label = record["reference"]
        words = words or (_WORDS.get(label) if isinstance(label, str) else None)
        if words is None or label not in words:
            raise UserError(
                f"item {record['id']!r}: reference: {str(label)[:60]!r}: expected one of "
                + ", ".join(words or _WORDS)
            )
        found = record["completion"].strip()
        extracted = found if found in words else None
        items.append({"id": record["id"], "correct": extracted == label, "extracted": extracted})
    references = [record["reference"] for record in records]
    further = {}
    if words == COLA:
        predictions = [item["extracted"] for item in items]
        further["matthews_correlation"] = matthews_correlation(references, predictions)
    return summarise(items, further)


def matthews_correlation(
    references: Sequence[str | None], predictions: Sequence[str | None]
) -> float:
    """Return the correlation of references and predictions, -1 to 1; 0 where either is constant.

    A prediction of None is a class of its own: for two classes this is Matthews' coefficient, for
    more its generalisation (Gorodkin 2004).
    """
    n = len(references)
    true, predicted = Counter(references), Counter(predictions)
    hits = sum(a == b for a, b in zip(references, predictions, strict=True))
    covariance = hits * n - sum(count * predicted[label] for label, count in true.items())
    spread = math.prod(
        n * n - sum(count * count for count in counts.values()) for counts in (true, predicted)
    )
    return covariance / math.sqrt(spread) if spread else 0.0
