"""math-verify (Kydlíček et al., huggingface/Math-Verify) as a second judge of final answers.

It compares what two LaTeX texts mean (1/2 and 0.5, sets in any order, 36 and 36^\\circ). Its
verdicts stand beside a benchmark's own rule, never in its place.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tlora.benchmarks import equivalence_worker
from tlora.errors import UserError

SECONDS = 5
"""Processor time for one pair, after which it stays undecided; a pair takes 0.01 s as a rule."""

LONGEST = 1000
"""Characters of the longest answer that is judged; a longer text is no answer."""

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})")
_FULL_STOP = re.compile(r"\.(?=\s|$)")
# Out of processor time, of stack, or of memory.
_ENDED = {-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT}


class Verdict(NamedTuple):
    """What math-verify says of an answer.

    Attributes
    ----------
    equal
        Whether it is equal to the reference; None where that could not be decided in time.
    readable
        Whether there was an answer, and math-verify could read it.
    """

    equal: bool | None
    readable: bool


UNREAD = Verdict(equal=False, readable=False)
UNDECIDED = Verdict(equal=None, readable=True)


def stated_answer(completion: str, marker: str) -> str | None:
    """Return the answer that a completion states, None where it states none.

    The text after the last marker (whose trailing space does not matter) up to the end of its
    line, or of the LaTeX environment or braces begun there; where no marker stands, the content of
    the last `\\boxed{}`. A full stop, at the end or before a space, ends it.
    """
    _, found, tail = completion.rpartition(marker.rstrip())
    if not found:
        tail = last_boxed(completion) or ""
    answer, *further = tail.strip().split("\n")
    for line in further:
        if answer.count("{") <= answer.count("}") and answer.count("\\begin") <= answer.count(
            "\\end"
        ):
            break
        answer = f"{answer} {line}"
    return _FULL_STOP.split(answer, maxsplit=1)[0].strip() or None


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{}` (or `\\boxed 2`), None where there is none."""
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return None
    content = text[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if not content.startswith("{"):
        return content.strip().partition("$")[0].split(" ")[0].rstrip(".") or None
    depth = 0
    for position, character in enumerate(content):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return content[1:position]
    return None


def verdicts(pairs: Iterable[tuple[str, str | None]], workers: int = 1) -> list[Verdict]:
    """Judge pairs of a reference and an answer, in their order.

    Equal texts and two plain integers are decided here, as math-verify decides them; every other
    pair is asked once.

    Parameters
    ----------
    pairs
        Reference and answer, both LaTeX or plain numbers; None is no answer. A full stop at the
        end of a reference does not belong to it.
    workers
        Processes at once; verdicts do not depend on their number.

    Raises
    ------
    UserError
        Where math-verify is not installed.
    """
    pairs = [(gold.strip().removesuffix("."), answer) for gold, answer in pairs]
    known = {pair: _decided(*pair) for pair in pairs}
    asked = [pair for pair, verdict in known.items() if verdict is None]
    known.update(zip(asked, ask(asked, workers), strict=True))
    return [known[pair] for pair in pairs]


def _decided(gold: str, answer: str | None) -> Verdict | None:
    if answer is None or not answer.strip() or len(answer) > LONGEST:
        return UNREAD
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return Verdict(int(gold) == int(answer), readable=True)
    return Verdict(equal=True, readable=True) if gold.split() == answer.split() else None


def ask(pairs: Sequence[tuple[str, str]], workers: int = 1) -> list[Verdict]:
    """Have math-verify judge every pair, in processes of their own.

    Raises
    ------
    UserError
        Where math-verify is not installed.
    """
    if not pairs:
        return []
    results: list[Verdict] = [UNDECIDED] * len(pairs)
    waiting = deque(enumerate(pairs))
    workers = max(1, min(workers, -(-len(pairs) // 20)))
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_work_off, waiting, results) for _ in range(workers)]
        try:
            for one in running:
                one.result()
        finally:
            waiting.clear()
    return results


def _work_off(waiting: deque, results: list[Verdict]) -> None:
    """Take pairs from the queue until it is empty; a process that was ended is replaced."""
    while waiting:
        with _Process() as process:
            while waiting:
                try:
                    index, pair = waiting.popleft()
                except IndexError:
                    return
                results[index] = process.judge(*pair)
                if results[index].equal is None:
                    break


class _Process:
    """One process of `equivalence_worker`."""

    def __enter__(self) -> _Process:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            # -P: the script's folder holds modules that must not hide others of the same name.
            [sys.executable, "-P", equivalence_worker.__file__, str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # SymPy orders some sets by hash.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            text=True,
            encoding="utf-8",
        )
        return self

    def judge(self, gold: str, answer: str) -> Verdict:
        try:
            self._process.stdin.write(json.dumps([gold, answer]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return Verdict(*json.loads(line))
        status = self._process.wait()
        if status in _ENDED:
            return UNDECIDED
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip()
        reason = said.splitlines()[-1] if said else f"exit status {status}"
        raise UserError(f"math-verify: {reason}: expected it to run (pip install math-verify)")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def columns(verdict: Verdict, answer: str | None) -> dict[str, Any]:
    """Return what an item of score.json says of math-verify's verdict."""
    return {
        "math_verify_correct": verdict.equal,
        "math_verify_extracted": answer if verdict.readable else None,
    }


def shares(found: Sequence[Verdict]) -> Mapping[str, float]:
    """Return math-verify's accuracy, with the shares it could not read and not decide in time."""
    n = max(len(found), 1)
    return {
        "math_verify_accuracy": sum(verdict.equal is True for verdict in found) / n,
        "math_verify_unread": sum(not verdict.readable for verdict in found) / n,
        "math_verify_undecided": sum(verdict.equal is None for verdict in found) / n,
    }
