"""A process that asks math-verify whether two mathematical texts are equal.

Run as a script it answers one line of JSON, `[gold, answer]`, with one line, `[equal, readable]`;
`equal` is null where that took more memory than there is.
It imports nothing of this package, so that it starts without an installed one.

math-verify's own time limits are signals of the wall clock: they depend on what else the machine
does, and cannot end a computation inside C (a power tower's integer). Here the kernel ends the
process after `seconds` of its own processor time for one pair, and the caller starts another.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import resource
import sys
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space; 0.07 GB are needed as a rule."""

_DOLLAR = re.compile(r"(?<!\\)\$")
# A number and its unit in words: as LaTeX it would be a product of the words' letters.
_WITH_UNIT = re.compile(
    r"[^A-Za-z\\]*[0-9][^A-Za-z\\]*\s(?!and|sqrt|sin|cos|tan|log|exp)[A-Za-z]{3}[A-Za-z .]*"
)


def equal(gold: str, answer: str) -> tuple[bool, bool]:
    """Return whether math-verify calls two texts equal, and whether it can read the answer."""
    from math_verify import verify

    expected, found = _parsed(gold), _parsed(answer)
    return bool(found) and verify(expected, found, timeout_seconds=None), bool(found)


@functools.lru_cache(10_000)  # two thirds of the time, and many references are equal
def _parsed(text: str) -> list[Any]:
    """Parse LaTeX, marked as such where it is not already, or a number with a unit in words."""
    from math_verify import parse

    text = " ".join(text.split())
    marked = _DOLLAR.search(text) or _WITH_UNIT.fullmatch(text)
    return parse(text if marked else f"${text}$", parsing_timeout=None)


def parse_quickly() -> None:
    """Have ANTLR look for a parse without the rules' context first: 0.6 times the time of a pair.

    Such a parse is the one that is found with the context; where there is none, all is done anew
    with the context, errors included. Source: ANTLR 4, PredictionMode.SLL.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    converter = latex2sympy2._Latex2Sympy
    with_context = converter.create_parser

    def create_parser(self: Any, text: str) -> Any:
        parser = with_context(self, text)
        parser._interp.predictionMode = PredictionMode.SLL
        without_context = parser.math

        def math() -> Any:
            try:
                return without_context()
            except Exception:
                return with_context(self, text).math()

        parser.math = math
        return parser

    converter.create_parser = create_parser


def main(seconds: int) -> None:
    """Answer the lines of standard input until it ends."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    parse_quickly()
    equal("1", "2")  # imports and compiles, outside the first pair's time
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = math.ceil(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(
            resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
        )
        try:
            verdict = equal(*json.loads(line))
        except (MemoryError, RecursionError):  # elsewhere math-verify takes them for "not equal"
            verdict = (None, True)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
