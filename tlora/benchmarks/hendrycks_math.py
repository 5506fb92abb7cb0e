"""MATH (Hendrycks et al. 2021, arXiv 2103.03874): the paper's rule, and math-verify beside it.

The paper's rule reads the text after the last `The answer is: ` and compares it as a string, in
the normal form of the data set's authors, with the last `\\boxed{}` of the reference solution. It
knows no mathematics: `$5$` is not `5`, 1000 is not 1,000, a set in another order is another set.
In the original two missing answers count as equal, and `\\boxed 2` as missing. Neither happens
here: a completion without an answer is wrong and counted, and `\\boxed 2` is 2 (two solutions of
the training set; every test solution has its `\\boxed{}`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlora.benchmarks import Context, equivalence, summarise
from tlora.errors import UserError

CONTEXT = True
MARKER = "The answer is: "

_BEFORE_UNITS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_AFTER_UNITS = (("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0."))
_UNITS = "\\text{ "


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
    """Score completions under the paper's rule and by math-verify.

    Parameters
    ----------
    records
        Each with `id`, `completion` and `reference`: a solution whose answer stands in its last
        `\\boxed{}`, a bare answer, or a mapping that holds either as `solution` or `answer`.
        `level` and `type`, of the record or of that mapping, give accuracies of their own.
    options
        How an answer is stated.
    context
        `workers` processes judge at once.

    Returns
    -------
    dict
        Content of score.json. `correct`, `extracted` and `unextracted` follow the paper's rule,
        `math_verify_correct` (None: not decided in time) and `math_verify_extracted` math-verify.

    Raises
    ------
    UserError
        No records, or a reference without an answer.
    """
    options, context = options or Options(), context or Context()
    golds = [reference_answer(record) for record in records]
    stated = [equivalence.stated_answer(record["completion"], options.marker) for record in records]
    judged = equivalence.verdicts(zip(golds, stated, strict=True), context.workers)
    items, groups = [], defaultdict(list)
    for record, gold, answer, verdict in zip(records, golds, stated, judged, strict=True):
        extracted = paper_answer(record["completion"], options.marker)
        item = {
            "id": record["id"],
            "correct": extracted is not None and is_equivalent(extracted, gold),
            "extracted": extracted,
            **equivalence.columns(verdict, answer),
        }
        items.append(item)
        for name in _groups(record):
            groups[name].append(item["correct"])
    further = {f"{name}_accuracy": sum(groups[name]) / len(groups[name]) for name in sorted(groups)}
    return summarise(items, {**equivalence.shares(judged), **further})


def paper_answer(completion: str, marker: str = MARKER) -> str | None:
    """Return the answer as the paper's rule reads it, None where it finds none.

    The text after the last marker up to a full stop that ends a line, or up to its end.
    """
    _, _, tail = completion.rpartition(marker)
    if len(tail) == len(completion):
        return None
    return tail.partition(".\n")[0].strip().removesuffix(".").strip() or None


def reference_answer(record: Mapping[str, Any]) -> str:
    """Return the answer of a record's reference.

    Raises
    ------
    UserError
        Naming the record.
    """
    reference = record["reference"]
    if isinstance(reference, Mapping):
        reference = reference.get("solution", reference.get("answer"))
    if isinstance(reference, str):
        boxed = "\\boxed" in reference or "\\fbox" in reference
        answer = equivalence.last_boxed(reference) if boxed else reference
        if answer and answer.strip():
            return answer
    shown = repr(reference)
    raise UserError(
        f"item {record['id']!r}: reference: {shown if len(shown) <= 60 else shown[:57] + '...'}: "
        "expected a solution with \\boxed{...}, or an answer"
    )


def is_equivalent(one: str, other: str) -> bool:
    """Return whether two answers are equal as strings in normal form."""
    try:
        return normal_form(one) == normal_form(other)
    except ValueError:
        return one == other


def normal_form(answer: str) -> str:
    """Return an answer as the data set's authors compare it.

    Gone are line breaks, spaces, `\\!`, `\\left`, `\\right`, degrees, `\\$`, percent signs, a unit
    in `\\text{ ...}` at the end, and a left-hand side of at most two characters (`x=`, `k =`).
    `\\dfrac` and `\\tfrac` are `\\frac`; `\\frac12`, `\\sqrt3`, `.5` and a/b of two integers are
    written out; 0.5 alone is one half.

    Raises
    ------
    ValueError
        Where the rule is not defined: units twice, `\\frac` or `\\sqrt` of nothing.

    Source: the rule of `is_equiv` in the code of Hendrycks et al. 2021.
    """
    for old, new in _BEFORE_UNITS:
        answer = answer.replace(old, new)
    answer, units, rest = answer.partition(_UNITS)
    if units and _UNITS in rest:
        raise ValueError("units twice")
    for old, new in _AFTER_UNITS:
        answer = answer.replace(old, new)
    if answer.startswith("."):
        answer = f"0{answer}"
    if answer.count("=") == 1 and answer.index("=") <= 2:
        answer = answer.partition("=")[2]
    answer = _braced_roots(answer).replace(" ", "")
    answer = _braced_fractions(answer)
    return "\\frac{1}{2}" if answer == "0.5" else _written_out(answer)


def _braced_roots(text: str) -> str:
    head, *radicands = text.split("\\sqrt")
    if not all(radicands):
        raise ValueError("\\sqrt of nothing")
    return head + "".join(
        "\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in radicands
    )


def _braced_fractions(text: str) -> str:
    """Put single characters after \\frac in braces; a text that ends too early stays as it is."""
    done, *fractions = text.split("\\frac")
    for part in fractions:
        if not part:
            raise ValueError("\\frac of nothing")
        if part[0] != "{":
            if len(part) == 1:
                return text
            bottom = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{bottom}"
        done = f"{done}\\frac{part}"
    return done


def _written_out(text: str) -> str:
    """Write a/b of two plain integers as a \\frac."""
    top, _, bottom = text.partition("/")
    try:
        plain = text == f"{int(top)}/{int(bottom)}"
    except ValueError:
        return text
    return f"\\frac{{{top}}}{{{bottom}}}" if plain else text


def _groups(record: Mapping[str, Any]) -> list[str]:
    """Return a record's level and subject as names of metrics."""
    reference = record["reference"]
    known = {**(reference if isinstance(reference, Mapping) else {}), **record}
    found = [str(known[key]) for key in ("level", "type") if known.get(key)]
    return ["_".join(name.lower().replace("&", "and").split()) for name in found]
