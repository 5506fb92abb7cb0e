"""GSM8K: the paper's rule as headline, a strict numeric rule and math-verify beside it.

Also fits any benchmark whose answers are numbers after a marker (the embedded arithmetic task).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tlora.benchmarks import Context, equivalence, summarise
from tlora.errors import UserError

CONTEXT = True
MARKER = "The answer is: "
LONGEST = 1000
"""Characters of the longest number that is read; a longer run of digits is no answer."""

_PAPER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\w)\]%])[-+\u2212])?(?:\\?[$€£]\s?[-+\u2212]?)?)"
    r"(?P<digits>[0-9](?:[0-9.,]*[0-9])?|\.[0-9]+)"
    r"(?:\s?/\s?(?P<denominator>[0-9]+))?"
)
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
# What makes the digits before it a part of something else: a sum, a range, a mixed number, a time.
_EXPRESSION = re.compile(r"\s*(?:[*×^÷/:xX-]\s*[$0-9]|\+\s*[\w$(])|\s+[0-9]|[eE][-+]?[0-9]")


@dataclass(frozen=True)
class Options:
    """How a completion states its answer.

    Attributes
    ----------
    marker
        What stands before it.
    """

    marker: str = MARKER


def score(
    records: Sequence[Mapping[str, Any]],
    options: Options | None = None,
    context: Context | None = None,
) -> dict[str, Any]:
    """Score completions under all three rules.

    Parameters
    ----------
    records
        Each with `id`, `completion` and `reference`: a number, or a raw GSM8K answer that ends
        with `#### N`.
    options
        How an answer is stated.
    context
        `workers` processes of math-verify judge at once.

    Returns
    -------
    dict
        Content of score.json. `correct`, `extracted` and `unextracted` follow the paper's rule,
        `strict_correct` and `strict_extracted` of an item the strict one, `math_verify_correct`
        (None: not decided in time) and `math_verify_extracted` math-verify.

    Raises
    ------
    UserError
        No records, or a reference without a number.
    """
    options, context = options or Options(), context or Context()
    marker = options.marker
    golds = [reference_number(record["reference"], str(record["id"])) for record in records]
    stated = [equivalence.stated_answer(record["completion"], marker) for record in records]
    judged = equivalence.verdicts(zip(map(_show, golds), stated, strict=True), context.workers)
    items = []
    for record, gold, answer, verdict in zip(records, golds, stated, judged, strict=True):
        paper = paper_number(record["completion"], marker)
        strict = strict_number(record["completion"], marker)
        items.append(
            {
                "id": record["id"],
                "correct": paper is not None and float(paper) == _as_float(gold),
                "extracted": None if paper is None else str(paper),
                "strict_correct": strict == gold,
                "strict_extracted": None if strict is None else _show(strict),
                **equivalence.columns(verdict, answer),
            }
        )
    strict = sum(item["strict_correct"] for item in items) / max(len(items), 1)
    return summarise(items, {"strict_accuracy": strict, **equivalence.shares(judged)})


def paper_number(completion: str, marker: str = MARKER) -> int | None:
    """Return the answer as the paper's rule reads it, None where it finds none.

    The first match of a number pattern in the text after the last marker, rounded to an integer
    (half to even). A comma or slash counts once: 1,450,000 is 1450, and 7/2 is 4.

    Source: the evaluation code of MetaMath (Yu et al. 2023, arXiv 2309.12284), which the paper's
    follows.
    """
    _, found, tail = completion.rpartition(marker)
    match = _PAPER.search(tail.strip()) if found else None
    if match is None or len(match[0]) > LONGEST:
        return None
    numerator, slash, denominator = match[0].replace(",", "").partition("/")
    try:
        if not slash or int(denominator) == 0:
            return round(float(numerator))
        fraction = Fraction(int(numerator), int(denominator))
        return round(float(fraction.numerator / fraction.denominator))
    except (ValueError, OverflowError):  # "/5" has no numerator; infinity has no integer
        return None


def strict_number(completion: str, marker: str = MARKER) -> Fraction | None:
    """Return the answer as an exact number, None where there is none.

    The first number in the text after the last marker (its trailing space does not matter), up to
    the end of the line it begins on. Around it a currency sign, %, units, markup and a full stop
    may stand; thousands commas must be in their places; a/b is a fraction. No number is read from
    an expression that is not worked out (10+5, 3 x 4), a range, a time, a power of ten or
    misplaced commas and points (1,45 or 1.2.3).
    """
    _, found, tail = completion.rpartition(marker.rstrip())
    return _first_number(tail) if found else None


def reference_number(reference: object, identifier: str) -> Fraction:
    """Return the number of a reference: a number, its text, or a GSM8K answer with `#### N`.

    Raises
    ------
    UserError
        Naming the item.
    """
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        if math.isfinite(reference):
            return Fraction(repr(reference))
    elif isinstance(reference, str):
        number = _first_number(reference.rpartition("####")[2])
        if number is not None:
            return number
    shown = repr(reference)
    raise UserError(
        f"item {identifier!r}: reference: {shown if len(shown) <= 60 else shown[:57] + '...'}: "
        "expected a number, or a text that ends with '#### ' and a number"
    )


def _first_number(text: str) -> Fraction | None:
    line = text.strip().partition("\n")[0]
    match = _NUMBER.search(line)
    if match is None or len(match[0]) > LONGEST or not _PLAIN.fullmatch(match["digits"]):
        return None
    if _EXPRESSION.match(line, match.end()):
        return None
    denominator = int(match["denominator"] or 1)
    if denominator == 0:
        return None
    number = Fraction(match["digits"].replace(",", "")) / denominator
    return -number if set("-\u2212") & set(match["sign"]) else number


def _as_float(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        return float("inf")


def _show(number: Fraction) -> str:
    """Return a number as an integer or decimal where it is one, else as a/b."""
    if number.denominator == 1:
        return str(number.numerator)
    places = 0
    scaled = number
    while scaled.denominator != 1 and places < LONGEST:
        scaled, places = scaled * 10, places + 1
    if scaled.denominator != 1:
        return str(number)
    digits = str(abs(scaled.numerator)).zfill(places + 1)
    return f"{'-' if number < 0 else ''}{digits[:-places]}.{digits[-places:]}"
