"""The mean loss a token of the given answers: lower is better.

For tasks whose validation split no rule can judge: conversations, programs without tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tlora.benchmarks import summarise
from tlora.errors import UserError


def score(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of minus the natural logarithm of a token's probability, over all tokens.

    Parameters
    ----------
    records
        Each with `id`, `loss` (summed over the answer's tokens) and `tokens`.

    Returns
    -------
    dict
        Content of score.json, with `higher_is_better` false; an item's `value` is its own mean.
        Just `failed`, the reason, where a loss is None: no finite number.

    Raises
    ------
    UserError
        No records, or one without loss or tokens.
    """
    items = []
    for record in records:
        if "loss" not in record or not record.get("tokens"):
            raise UserError(f"item {record['id']!r}: loss, tokens: expected both")
        if record["loss"] is None:
            return {"failed": f"item {record['id']!r}: the loss is no finite number"}
        mean = record["loss"] / record["tokens"]
        items.append({"id": record["id"], "correct": None, "extracted": "", "value": mean})
    tokens = sum(record["tokens"] for record in records)
    loss = math.fsum(record["loss"] for record in records) / tokens if tokens else math.nan
    return {**summarise(items, metric="loss", value=loss), "higher_is_better": False}
