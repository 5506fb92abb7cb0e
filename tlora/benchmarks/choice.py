"""Multiple choice and true/false, read as LLM-Adapters does (Hu et al. 2023, arXiv 2304.01933)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tlora.benchmarks import summarise
from tlora.errors import UserError

RESPONSE = "### Response:"
LABELS = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)
"""The labels of BoolQ; PIQA; SIQA, ARC and OBQA; HellaSwag; WinoGrande."""

_PATTERNS = {label: re.compile("|".join(group)) for group in LABELS for label in group}
_ECHO = ("Below is an instruction", "### Instruction:")


def score(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score completions by the first label they name.

    Parameters
    ----------
    records
        Each with `id`, `completion`, `reference` (the right label, whose kind decides what is
        looked for) and perhaps `prompt`.

    Returns
    -------
    dict
        Content of score.json; completions without a label are `unextracted`, and wrong.

    Raises
    ------
    UserError
        No records, or a reference that is no label.
    """
    items = []
    for record in records:
        label = record["reference"]
        if not isinstance(label, str) or label not in _PATTERNS:
            raise UserError(
                f"item {record['id']!r}: reference: {str(label)[:60]!r}: expected one of "
                + ", ".join(_PATTERNS)
            )
        found = _PATTERNS[label].search(response(record["completion"], record.get("prompt")))
        items.append(
            {
                "id": record["id"],
                "correct": found is not None and found[0] == label,
                "extracted": found and found[0],
            }
        )
    return summarise(items)


def response(completion: str, prompt: str | None = None) -> str:
    """Return the model's own answer in a completion.

    A repeated prompt or heading before the answer is passed over. From the next `### Response:` on
    the model talks to itself: that is cut off, as the original does.
    """
    if prompt and completion.startswith(prompt):
        completion = completion[len(prompt) :]
    head, found, tail = completion.partition(RESPONSE)
    if found and (not head.strip() or head.lstrip().startswith(_ECHO)):
        head = tail.partition(RESPONSE)[0]
    return head
