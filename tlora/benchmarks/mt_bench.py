"""MT-Bench: every turn is rated from 1 to 10 by a judge (Zheng et al. 2023, arXiv 2306.05685).

What the judge is told, when it gets a reference answer, how a rating is read and how ratings are
averaged follow `gen_judgment.py` and `show_result.py` of FastChat (mode "single"). There a judgment
without a rating is left out of the mean without a word; here it is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.benchmarks import Context, summarise
from tlora.benchmarks.judge import Judgment, Question, judgments
from tlora.errors import UserError
from tlora.tasks.prompts import render

CONTEXT = True
JUDGMENTS = Path("results/.judgments")
"""Where judgments are kept, unless the job is handed another folder (`judgments`)."""
TURNS = 2
RATINGS = (1, 10)

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")


@dataclass(frozen=True)
class Options:
    """Who judges.

    Attributes
    ----------
    judge
        The model; where it is asked stands in the environment (tlora/benchmarks/judge.py).
    """

    judge: str = "gpt-4-0613"

    def __post_init__(self) -> None:
        if not self.judge:
            raise ValueError("judge: expected the name of a model")


def score(
    records: Sequence[Mapping[str, Any]], options: Options, context: Context
) -> dict[str, Any]:
    """Have the answers to both turns of every question judged.

    Parameters
    ----------
    records
        Two for every question: `id` ("81/1", "81/2"), `turn` (1, 2), `completion` and the
        question's `reference` as tlora/tasks/mt_bench.py gives it.
    options
        Who judges.
    context
        `workers` requests are made at the same time; judgments are kept in the folder `judgments`.

    Returns
    -------
    dict
        Content of score.json. The value is the mean rating over the turns that have one, those
        without are `unextracted`; metrics beside it are the means of each turn and category. Under
        `judge` stand the model that was asked for and the names under which it answered.

    Raises
    ------
    UserError
        Records that are no MT-Bench; no endpoint or one that fails; no rating at all.
    """
    asked = questions(records)
    folder = Path(context.place.get("judgments") or JUDGMENTS)
    answers = judgments(asked, options.judge, folder, context.workers)
    items = [_item(*pair) for pair in zip(records, answers, strict=True)]
    names = sorted({answer.model for answer in answers if answer.model})
    return {**summary(items), "judge": {"model": options.judge, "answered_as": names}}


def questions(records: Iterable[Mapping[str, Any]]) -> list[Question]:
    """Return what the judge is asked about every record, in their order.

    Raises
    ------
    UserError
        Naming the item whose fields are not those of MT-Bench, or whose other turn is missing.
    """
    records = list(records)
    answers: dict[str, dict[int, str]] = {}
    for record in records:
        _check(record)
        answers.setdefault(_conversation(record), {})[record["turn"]] = record["completion"]
    return [_question(record, answers[_conversation(record)]) for record in records]


def rating(judgment: str) -> int | float | None:
    """Return the rating that a judgment states, None where it states none from 1 to 10.

    The first number in double brackets, else the first in single brackets.
    """
    match = _RATING.search(judgment) or _RATING_BACKUP.search(judgment)
    if match is None:
        return None
    value = float(match[1])
    if not RATINGS[0] <= value <= RATINGS[1]:
        return None
    return int(value) if value.is_integer() else value


def summary(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of ratings.

    Parameters
    ----------
    items
        One for every turn, each with `turn`, `category` and `value` (the rating, or None).

    Raises
    ------
    UserError
        Where no item has a rating.
    """
    rated = [item for item in items if item["value"] is not None]
    if not rated:
        raise UserError(
            f"no rating in {len(items)} judgments: expected '[[5]]' or the like from the judge"
        )
    turns = sorted({item["turn"] for item in rated})
    categories = sorted({item["category"] for item in rated})
    means = {f"turn_{turn}": _mean(rated, turn=turn) for turn in turns}
    means |= {category: _mean(rated, category=category) for category in categories}
    return summarise(items, means, metric="score", value=_mean(rated))


def _mean(rated: Iterable[Mapping[str, Any]], **where: Any) -> float:
    """Return the mean rating of the items with these fields."""
    found = [item["value"] for item in rated if all(item[key] == where[key] for key in where)]
    return sum(found) / len(found)


def _item(record: Mapping[str, Any], judgment: Judgment) -> dict[str, Any]:
    value = rating(judgment.text)
    return {
        "id": record["id"],
        "correct": None,
        "extracted": value,
        "value": value,
        "turn": record["turn"],
        "category": record["reference"]["category"],
        "prompt": record["reference"]["prompts"][record["turn"] - 1]["name"],
        "judgment": judgment.text,
    }


def _question(record: Mapping[str, Any], answers: Mapping[int, str]) -> Question:
    reference, turn = record["reference"], record["turn"]
    fields = {}
    for index in range(1, TURNS + 1):
        if index not in answers:
            raise UserError(
                f"item {record['id']!r}: turn: expected an answer to turn {index} as well"
            )
        fields[f"question_{index}"] = reference["turns"][index - 1]
        fields[f"answer_{index}"] = answers[index]
        if reference["answers"] is not None:
            fields[f"ref_answer_{index}"] = reference["answers"][index - 1]
    fields |= {"question": fields["question_1"], "answer": fields["answer_1"]}
    prompt = reference["prompts"][turn - 1]
    try:
        user = render(prompt["prompt_template"], fields)
    except UserError as error:
        raise UserError(f"item {record['id']!r}: {prompt['name']}: {error}") from error
    return Question(str(record["id"]), prompt["system_prompt"], user)


def _conversation(record: Mapping[str, Any]) -> str:
    return str(record["id"]).rpartition("/")[0]


def _check(record: Mapping[str, Any]) -> None:
    where, turn, reference = f"item {record['id']!r}", record.get("turn"), record["reference"]
    if turn not in range(1, TURNS + 1) or not str(record["id"]).endswith(f"/{turn}"):
        raise UserError(f"{where}: turn: {turn!r}: expected 1 or 2, and an id that ends with it")
    known = isinstance(reference, dict) and {"category", "turns", "answers", "prompts"} <= set(
        reference
    )
    if not known:
        raise UserError(
            f"{where}: reference: {str(reference)[:60]}: expected the category, turns, answers and "
            "prompts of an MT-Bench question"
        )
