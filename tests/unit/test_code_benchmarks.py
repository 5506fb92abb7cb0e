"""HumanEval and MBPP: sources, extraction, verdicts, programs that mean harm, and interruptions.

Small problems in EvalPlus' format stand for the real files; tests of those are skipped where the
shared data is absent. `tests/benchmarks/reference_solutions.py` judges all 542 of them.
"""

from __future__ import annotations

import base64
import collections
import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import zlib
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import write

from tlora import sandbox
from tlora.benchmarks import Context, evalplus, load, recorder
from tlora.errors import UserError
from tlora.stages.score import score_file
from tlora.tasks import evalplus as source
from tlora.tasks import web

pytest.importorskip("evalplus", reason="evalplus is not installed (the extra `code`)")

ADD = {
    "task_id": "HumanEval/9000",
    "entry_point": "add_all",
    "prompt": "from typing import List\n\n\ndef double(number):\n    return 2 * number\n\n\n"
    'def add_all(numbers: List[int]) -> int:\n    """Return the sum, doubled.\n\n'
    '    >>> add_all([1, 2])\n    6\n    """\n',
    "canonical_solution": "    return double(sum(numbers))\n",
    "atol": 0,
    "base_input": [[[1, 2]], [[]]],
    "plus_input": [[[2**53 + 1]], [[-5, 5, 7]]],
}
MEAN = {
    "task_id": "HumanEval/9001",
    "entry_point": "mean",
    "prompt": 'def mean(numbers):\n    """Return the mean."""\n',
    "canonical_solution": "    return sum(numbers) / len(numbers)\n",
    "atol": 1e-6,
    "base_input": [[[1.0, 2.0]], [[0.1, 0.2, 0.3]]],
    "plus_input": [[[1e9, 1e9 + 1]]],
}
ZERO = {
    "task_id": "HumanEval/32",
    "entry_point": "find_zero",
    "prompt": 'def find_zero(xs: list):\n    """Return a zero of the polynomial."""\n',
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "atol": 1e-4,
    "base_input": [[[1, 2]]],
    "plus_input": [[[4, -1]]],
}
# Of real MBPP problems the number and the name: EvalPlus knows by them what to compare.
SHARED = {
    "task_id": "Mbpp/2",
    "entry_point": "similar_elements",
    "prompt": '"""\nWrite a function to find the shared elements.\n'
    'assert set(similar_elements((3, 4), (4, 7))) == {4}\n"""\n',
    "canonical_solution": "def similar_elements(one, other):\n"
    "    assert type(one) is tuple\n    return tuple(set(one) & set(other))\n",
    "atol": 0,
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "plus_input": {},
}
MATCH = {
    "task_id": "Mbpp/737",
    "entry_point": "check_str",
    "prompt": '"""\nDoes the text begin with a vowel?\nassert check_str("annie")\n"""\n',
    "canonical_solution": "import re\n"
    "def check_str(text):\n    return re.search('^[aeiou]', text)\n",
    "atol": 0,
    "base_input": [["annie"], ["dawood"]],
    "plus_input": [["Else"], ["ink"]],
}
LARGE = {
    "task_id": "HumanEval/9002",
    "entry_point": "power",
    "prompt": 'def power(n: int):\n    """Return n, n times."""\n',
    "canonical_solution": "    return [n] * n + [n ** n]\n",
    "atol": 0,
    "base_input": [[3]],
    "plus_input": [[20_000]] * 3,
}
WHOLE = {
    "task_id": "HumanEval/9003",
    "entry_point": "third",
    "prompt": 'def third(n: int):\n    """Return thirds."""\n',
    "canonical_solution": "    return [i / 3 for i in range(n)]\n",
    "atol": 0,
    "base_input": [[10]],
    "plus_input": [[100_000]] * 6,
}
HUMANEVAL, MBPP = (ADD, MEAN, ZERO, LARGE, WHOLE), (SHARED, MATCH)
QUICK = evalplus.Options(test_seconds=0.4, set_seconds=1.0, memory_mib=512)


def dataset(problem: dict) -> str:
    return "mbpp" if problem["task_id"].startswith("Mbpp") else "humaneval"


def solution(problem: dict) -> str:
    """A problem's reference solution as a program of its own."""
    head = problem["prompt"] if dataset(problem) == "humaneval" else ""
    return head + problem["canonical_solution"]


def record(completion: str, problem: dict = ADD, identifier: str = "0") -> dict:
    reference = source.pack(dataset(problem), problem)
    return {"id": identifier, "completion": completion, "reference": reference}


def verdicts(*records: dict, options: evalplus.Options = QUICK, **place: object) -> list[tuple]:
    """Return (base, plus) of each record."""
    renamed = [{**one, "id": str(at)} for at, one in enumerate(records)]
    result = evalplus.score(renamed, options, Context(place={"workers": 2, **place}))
    return [(item["correct"], item["plus_correct"]) for item in result["items"]]


@pytest.fixture(autouse=True, scope="module")
def _box() -> None:
    try:
        sandbox.find()
    except UserError as error:
        assert "does not hold" not in str(error)
        pytest.skip(str(error))


# verdicts


RIGHT_BOTH, RIGHT_BASE, WRONG = (True, True), (True, False), (False, False)


def test_right_wrong_and_empty_programs() -> None:
    found = verdicts(
        *(record(solution(problem), problem) for problem in (ADD, SHARED)),
        *(record("", problem) for problem in (ADD, SHARED)),
        record("def add_all(numbers):\n    return 6", ADD),
        record("def add_all(numbers):\n    return 2 * sum(map(int, map(float, numbers)))", ADD),
        record("def similar_elements(a, b):\n    return a", SHARED),
    )
    assert found == [RIGHT_BOTH, RIGHT_BOTH, WRONG, WRONG, WRONG, RIGHT_BASE, WRONG]


@pytest.mark.slow
def test_comparisons_are_those_of_evalplus() -> None:
    """Tolerances, oracles, sets, what is no data, and large values."""
    cases = [
        *((problem, solution(problem), RIGHT_BOTH) for problem in (*HUMANEVAL, *MBPP)),
        (MEAN, "def mean(numbers):\n    return sum(numbers) / len(numbers) + 1e-8", RIGHT_BOTH),
        (MEAN, "def mean(numbers):\n    return sum(numbers) / len(numbers) + 0.01", WRONG),
        (ZERO, "def find_zero(xs):\n    return -xs[0] / xs[1] + 1e-6", RIGHT_BOTH),
        (ZERO, "def find_zero(xs):\n    return -xs[0] / xs[1] + 1e-3", WRONG),
        (ZERO, "def find_zero(xs):\n    xs.clear()\n    return 0.0", WRONG),
        (SHARED, "def similar_elements(a, b):\n    return [x for x in a if x in b]", RIGHT_BOTH),
        (MATCH, "def check_str(text):\n    return text[0].lower() in 'aeiou'", RIGHT_BASE),
        (MATCH, "def check_str(text):\n    return 0 if text[0] in 'aeiou' else None", RIGHT_BOTH),
        (MATCH, "def check_str(text):\n    return 0", WRONG),
        (LARGE, "def power(n):\n    return [float(n)] * n + [n ** n]", RIGHT_BOTH),
        (LARGE, "def power(n):\n    return [n] * n + [n ** n + n // 9]", RIGHT_BASE),
        (WHOLE, "def third(n):\n    return [i * (1 / 3) for i in range(n)]", RIGHT_BOTH),
        (WHOLE, "def third(n):\n    return [i / 3 for i in range(n - 1)] + [n / 3]", WRONG),
    ]
    found = verdicts(*(record(program, problem) for problem, program, _ in cases))
    assert found == [wanted for _, _, wanted in cases]


def test_score_file_holds_both_metrics_and_the_programs(tmp_path: Path) -> None:
    programs = [solution(ADD), "def add_all(numbers):\n    return 6 if numbers else 0", "none"]
    rows = [record(text, ADD, f"HumanEval/{at}") for at, text in enumerate(programs)]
    path = write(tmp_path / "generations.jsonl", rows)
    contents = []
    for workers in (1, 3):
        out = tmp_path / f"score-{workers}.json"
        score_file(
            "evalplus", path, out, {"test_seconds": 2.0}, Context(place={"workers": workers})
        )
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    result = json.loads(contents[0])
    assert result["metric"] == "accuracy" and result["value"] == 2 / 3
    assert result["metrics"] == {"accuracy": 2 / 3, "plus_accuracy": 1 / 3}
    assert result["unextracted"] == 1
    assert [item["id"] for item in result["items"]] == [row["id"] for row in rows]
    assert result["items"][1] == {
        "id": "HumanEval/1",
        "correct": True,
        "extracted": programs[1],
        "plus_correct": False,
    }
    assert result["items"][2]["extracted"] is None


def test_a_program_is_judged_without_a_sandbox_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> sandbox.Sandbox:
        raise UserError("is not installed")

    monkeypatch.setattr(sandbox, "KINDS", {"bubblewrap": missing})
    with pytest.raises(UserError, match="no sandbox for generated programs"):
        verdicts(record(solution(ADD)))
    wrong = "def add_all(numbers):\n    return 0"
    found = verdicts(record(solution(ADD)), record(wrong), unsafe_no_sandbox=True)
    assert found == [(True, True), (False, False)]


def test_equal_programs_with_randomness_get_equal_verdicts() -> None:
    luck = (
        "import random\ndef add_all(numbers):\n"
        "    order = list({str(n) for n in range(99)})\n"
        "    lucky = random.random() < 0.5 and order[0] < order[1]\n"
        "    return 2 * sum(numbers) if lucky else 0"
    )
    assert len({*verdicts(record(luck)), *verdicts(record(luck))}) == 1


# extraction


BODY = "    return double(sum(numbers))\n"
FUNCTION = "def add_all(numbers: List[int]) -> int:\n" + BODY


@pytest.mark.parametrize(
    "completion",
    [
        FUNCTION,
        f"```python\n{FUNCTION}```",
        f"Sure! Here it is:\n\n```python\n{FUNCTION}```\n\nIt adds (all) of them.",
        f"```python\n{FUNCTION}```\n\nExample usage:\n\n```python\nprint(add_all([1, 2]))\n```",
        f"{FUNCTION}\n\nassert add_all([1, 2]) == 7\n\nif __name__ == '__main__':\n    exit(1)",
        f"{FUNCTION}\n\n### Instruction:\nWrite another function.\n\n### Response:\ndef f(",
        BODY,
        f"{BODY}\n\ndef other(x):\n    return x",
        "add_all = lambda numbers: double(sum(numbers))\nhelper = 1",
        FUNCTION.replace("\n", "\r\n"),
    ],
)
def test_program_is_found(completion: str) -> None:
    assert verdicts(record(completion)) == [(True, True)]


def test_program_as_it_is() -> None:
    """The sanitizer drops a helper without `return`; without it nothing is dropped or found."""
    helper = "def each(numbers):\n    yield from numbers\n\n\n"
    program = helper + "def add_all(numbers):\n    return 2 * sum(each(numbers))\n"
    as_it_is = evalplus.Options(sanitize=False)
    assert verdicts(record(program)) == [(False, False)]
    found = verdicts(
        *(record(program), record(BODY), record(f"```python\n{program}```"), record("")),
        options=as_it_is,
    )
    assert found == [(True, True), (True, True), (False, False), (False, False)]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "\n" * 1000,
        "I cannot write that.",
        "x = 1\n" * 200,
        "def other(numbers):\n    return sum(numbers)",
        "def add_all(numbers:\n    return sum(numbers)",
        "def add_all(numbers):\n    '''Return the sum.'''",
        "def add_all(numbers):\n    pass",
        "def add_all(numbers):\n    return \0",
        "(" * 5000,
        "def add_all(numbers):\n    return " + "-" * 100_000 + "1",
        "\ud800",
    ],
)
def test_no_program_is_no_answer(completion: str) -> None:
    start = time.process_time()
    result = evalplus.score([record(completion)], QUICK)
    assert result["items"][0]["extracted"] is None
    assert not result["items"][0]["correct"]
    assert time.process_time() - start < 20


LINES = (
    "x = 1",
    "",
    "  ",
    "def f(a):",
    "    return a",
    "if x:",
    "some words here",
    "'''",
    ")",
    "(",
)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(LINES), max_size=12))
def test_longest_code_is_that_of_evalplus(lines: list[str]) -> None:
    from evalplus.sanitize import code_extract

    text = "\n".join(lines)
    assert evalplus.longest_code(text) == code_extract(text)


# what is written down


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=5)
    | st.binary(max_size=5)
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.tuples(st.integers()), inner, max_size=3)
        | st.sets(st.integers() | st.text(max_size=2), max_size=3)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


def same(one: object, other: object) -> bool:
    """Equal in value and type, all the way down."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    return repr(one) == repr(other) if isinstance(one, float) else True


@settings(max_examples=200)
@given(PLAIN)
def test_plain_data_is_written_down_exactly(value: object) -> None:
    assert same(recorder.decode(json.dumps(recorder.encode(value))), value)


@pytest.mark.parametrize(
    ("value", "equal"),
    [
        (numpy.int64(3), 3),
        (numpy.float64(0.5), 0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.bool_(True), True),
        (numpy.str_("a"), "a"),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.namedtuple("Pair", "a b")(1, 2), (1, 2)),
        (signal.SIGKILL, 9),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types_keep_what_they_equal(value: object, equal: object) -> None:
    found = recorder.decode(json.dumps(recorder.encode([value])))[0]
    assert found == equal
    assert type(found) is not type(equal)


def test_numbers_of_any_length() -> None:
    assert recorder.decode(json.dumps(recorder.encode(-(10**5000)))) == -(10**5000)


def large(value: object) -> object:
    return recorder.decode(json.dumps(recorder.brief(value)))


MANY = 20_000


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("a" * 10**6, "a" * 10**6, True),
        ("a" * 10**6, "a" * 999_999 + "b", False),
        ([1, 2] * MANY, [1.0, numpy.float32(2)] * MANY, True),
        ([1, 2] * MANY, [True, 2] * MANY, True),
        (["a", "b", 1] * MANY, ["a", numpy.str_("b"), 1.0] * MANY, True),
        (["a", "b", 1] * MANY, ["a, b", 1] * MANY, False),
        ([1, 12] * MANY, [11, 2] * MANY, False),
        ([1, 2] * MANY, (1, 2) * MANY, False),
        ([1, 2] * MANY, [1, 3] * MANY, False),
        ([0.5, 2] * MANY, [0.5, 2.0, 0.5, 2] * (MANY // 2), True),
        ([("a", 1)] * MANY, [("a", 1.0)] * MANY, True),
        ([("a", 1)] * MANY, [["a", 1]] * MANY, False),
        ([["a"], ["b"]] * MANY * 2, [["a", "b"]] * MANY * 2, False),
        (dict.fromkeys(range(MANY)), dict.fromkeys(reversed(range(MANY))), True),
        (dict.fromkeys(range(MANY)), dict.fromkeys(range(MANY), 0), False),
        (set(range(MANY)), frozenset(map(float, range(MANY))), True),
        (set(range(MANY)), set(range(1, MANY + 1)), False),
        (collections.Counter(range(MANY)), dict.fromkeys(range(MANY), 1), True),
        ([numpy.int64(3)] * MANY, [3] * MANY, True),
        ([None, b"a", 1j] * MANY, [None, b"a", 1j] * MANY, True),
        ([object()] * MANY, [object()] * MANY, False),
        (7**300_000, 7**300_000, True),
        (7**300_000, 7**300_000 + 1, False),
    ],
    ids=map(str, range(23)),
)
def test_digests_of_large_values_are_equal_where_these_are(
    one: object, other: object, equal: bool
) -> None:
    assert isinstance(large(one), recorder.Large) and isinstance(large(other), recorder.Large)
    assert (large(one) == large(other)) == equal


def test_a_large_value_equals_one_that_was_written_down_whole() -> None:
    assert large([1, 2] * MANY) == large([1.0, 2.0] * MANY)
    assert large([1.0, 2.0] * MANY) == large([1, 2] * MANY)
    assert large([1, 2] * MANY) != large([1.0, 3.0] * MANY)
    assert large([1, 2] * MANY) != large([1, 2])


def test_what_is_compared_with_a_tolerance_is_written_down_whole() -> None:
    value = [0.1] * MANY
    assert large(value) == value
    assert large([1] * 100) == [1] * 100


def test_not_a_number_and_infinity() -> None:
    found = recorder.decode(json.dumps(recorder.encode([math.nan, -math.inf])))
    assert math.isnan(found[0]) and found[1] == -math.inf


class _Always:
    def __eq__(self, other: object) -> bool:
        return True


@pytest.mark.parametrize("value", [_Always(), object(), iter([]), numpy.arange(3), {1: 2}.keys()])
def test_what_is_no_plain_data_equals_nothing(value: object) -> None:
    found = recorder.decode(json.dumps(recorder.encode(value)))
    assert found is not None
    assert not any(found == other for other in (None, 0, True, "", [], [0, 1, 2], {1}))


# programs that mean harm


def function(body: str) -> str:
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    modules = "import builtins, ctypes, gc, json, os, random, signal, socket, sys, threading, time"
    return f"{modules}\ndef add_all(numbers):\n{lines}    return None\n"


RIGHT = "return 2 * sum(numbers)"


def harmful(home: Path, secret: Path, port: int, kept: list[Path]) -> dict[str, str]:
    """Programs by what they try; most would be right if they could do it."""
    overwritten = [str(path) for path in kept]
    forged = '{"id": "0", "correct": true, "extracted": "", "plus_correct": true}\\n'
    return {
        "write to home": f"open({str(home)!r}, 'w').write('x')\n{RIGHT}",
        "read a secret": f"open({str(secret)!r}).read()\n{RIGHT}",
        "open a socket": f"socket.create_connection(('127.0.0.1', {port}), 3)\n{RIGHT}",
        "fork bomb": "while True:\n    os.fork()",
        "patient fork bomb": "while True:\n    try:\n        os.fork()\n"
        "    except OSError:\n        pass",
        "threads": f"threading.Thread(target=print).start()\n{RIGHT}",
        "memory bomb": f"held = [bytearray(1 << 20) for n in range(1 << 20)]\n{RIGHT}",
        "endless loop": "while True:\n    pass",
        "stubborn loop": "while True:\n    try:\n        while True: pass\n"
        "    except BaseException: pass",
        "sleep": "time.sleep(1000)",
        "kill the parent": "os.kill(os.getppid(), signal.SIGKILL)",
        "kill all": "os.kill(-1, signal.SIGKILL)\nos.killpg(0, signal.SIGKILL)",
        "overwrite the results": f"for path in {overwritten!r}:\n    try:\n"
        f"        open(path, 'w').write('{forged}')\n    except OSError:\n        pass",
        "exit": "sys.exit(0)",
        "exit at once": "os._exit(0)",
        "equal to everything": "class Same:\n    __eq__ = lambda self, other: True\n"
        "    __hash__ = object.__hash__\nreturn Same()",
        "integer equal to everything": "class Same(int):\n    __eq__ = lambda self, other: True\n"
        "    __hash__ = int.__hash__\nreturn Same()",
        "new builtins": "builtins.all = builtins.len = lambda *a, **k: True\n"
        "builtins.AssertionError = ValueError\ntime.time = lambda: 0\nreturn 0",
        "another encoder": "json.dumps = lambda *a, **k: 'true'",
        "claim to have passed": "for n in range(1, 64):\n    try:\n"
        "        os.write(n, b'ready\\npass\\n0.0\\ttrue\\n{\"correct\": true}\\n' * 9)\n"
        "    except OSError:\n        pass\nos._exit(0)",
        "broken values": "for n in range(3, 64):\n    try:\n"
        '        os.write(n, b\'x\\t{"set": [[1]]}\\ny\\t{"no": 1, "such": 2}\\n\')\n'
        "    except OSError:\n        pass\nos._exit(0)",
        "flood": "for n in range(3, 64):\n    try:\n        while True: os.write(n, b'x' * 9999)\n"
        "    except OSError:\n        pass",
        "crash": "ctypes.string_at(0)",
        "find the solution": "mark = 'double(' + 'sum(numbers' + '))'\n"
        "seen = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]\n"
        "texts = [*sys.argv, *os.environ.values(), *(v for o in seen for v in\n"
        "    (o.values() if isinstance(o, dict) else o) if isinstance(v, str))]\n"
        f"if any(mark in text for text in texts):\n    {RIGHT}",
    }


@pytest.mark.slow
def test_harmful_programs_fail_and_harm_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, secret = Path.home() / f".tlora-{uuid.uuid4()}", tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    work, out = tmp_path / "work", tmp_path / "score.json"
    work.mkdir()
    kept = [work / evalplus.VERDICTS, out, tmp_path / "generations.jsonl"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        bodies = harmful(home, secret, server.getsockname()[1], kept)
        records, names = [], []
        for name, body in bodies.items():
            assert evalplus.program(function(body), evalplus._problem(record(""))) is not None, name
            records += [record(function(body)), record(FUNCTION)]
            names += [name, None]
        records = [{**one, "id": str(at)} for at, one in enumerate(records)]
        write(tmp_path / "generations.jsonl", records)
        before = (tmp_path / "generations.jsonl").read_bytes()
        context = Context(work, {"workers": 2})
        options = {"test_seconds": 0.4, "set_seconds": 1.0, "memory_mib": 512}
        result = score_file("evalplus", tmp_path / "generations.jsonl", out, options, context)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not home.exists()
    assert (tmp_path / "generations.jsonl").read_bytes() == before
    passed = [name for name, item in zip(names, result["items"], strict=True) if item["correct"]]
    assert passed == [None] * len(bodies)
    assert all(item["plus_correct"] for item in result["items"][1::2])
    assert all(item["extracted"] is not None for item in result["items"])


def test_the_same_programs_would_pass_where_they_could_do_it(tmp_path: Path) -> None:
    """So that the test above shows the sandbox at work, and not programs that are wrong anyway."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        bodies = harmful(tmp_path / "home", secret, server.getsockname()[1], [])
        wanted = ("write to home", "read a secret", "open a socket")
        records = [record(function(bodies[name])) for name in wanted]
        assert verdicts(*records, unsafe_no_sandbox=True) == [(True, True)] * 3
    assert (tmp_path / "home").read_text() == "x"


@pytest.mark.slow
def test_limits_are_the_options() -> None:
    busy = "import time\ndef add_all(n):\n    while time.process_time() < 0.4: pass\n"
    busy += "    return 2 * sum(n)"
    assert verdicts(record(busy), options=evalplus.Options(test_seconds=0.2)) == [(False, False)]
    assert verdicts(record(busy), options=evalplus.Options(test_seconds=10.0)) == [(True, True)]
    big = "def add_all(n):\n    held = bytearray(600 << 20)\n    return 2 * sum(n)"
    assert verdicts(record(big), options=evalplus.Options(memory_mib=400)) == [(False, False)]
    assert verdicts(record(big), options=evalplus.Options(memory_mib=2000)) == [(True, True)]


@pytest.mark.slow
def test_time_counts_against_the_reference_solution() -> None:
    slow = "    import time\n    start = time.process_time()\n"
    slow += "    while time.process_time() - start < {}: pass\n    return 2 * sum(numbers)\n"
    problem = {**ADD, "canonical_solution": slow.format(0.1)}
    program = "def add_all(numbers):\n" + slow.format(0.2)
    few = evalplus.Options(test_seconds=0.05, set_seconds=0.5, reference_factor=8.0)
    assert verdicts(record(program, problem), options=few) == [(True, True)]
    few = evalplus.Options(test_seconds=0.05, set_seconds=0.5, reference_factor=1.0)
    assert verdicts(record(program, problem), options=few) == [(False, False)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sanitize": "no"}, "options: sanitize: expected true or false"),
        ({"test_seconds": 0}, "options: test_seconds: expected a number above 0"),
        ({"set_seconds": "60"}, "options: set_seconds: expected a number above 0"),
        ({"reference_factor": math.inf}, "options: reference_factor: expected a number above 0"),
        ({"memory_mib": 10}, "options: memory_mib: expected a whole number, 256 or more"),
        ({"seconds": 1}, "options: .*seconds"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("evalplus").score([record("")], options)


# interruption


LASTING = (
    "import time\ndef add_all(numbers):\n    start = time.process_time()\n"
    "    while time.process_time() - start < 0.15: pass\n    return 2 * sum(numbers)"
)


def attempt(folder: Path, work: Path, out: Path, root: Path) -> subprocess.Popen:
    program = (
        "import sys\nfrom pathlib import Path\nfrom tlora.benchmarks import Context\n"
        "from tlora.stages.score import score_file\n"
        "generations, work, out = map(Path, sys.argv[1:])\n"
        "score_file('evalplus', generations, out, {}, Context(work, {'workers': 2}))"
    )
    arguments = [str(folder / "generations.jsonl"), str(work), str(out)]
    return subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=root)


def left_over(argument: str) -> list[str]:
    """Return the processes, workers among them, that were started with an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument in path.read_text(errors="replace").split("\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_killed_scoring_goes_on_where_it_was(tmp_path: Path, root: Path) -> None:
    programs = [LASTING, "def add_all(numbers):\n    return 6", "", FUNCTION]
    rows = [record(programs[at % 4], ADD, f"HumanEval/{at}") for at in range(16)]
    write(tmp_path / "generations.jsonl", rows)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert attempt(tmp_path, whole, tmp_path / "whole.json", root).wait(300) == 0
    work = tmp_path / "work"
    work.mkdir()
    first = attempt(tmp_path, work, tmp_path / "killed.json", root)
    kept = work / evalplus.VERDICTS
    deadline = time.monotonic() + 120
    while not (kept.exists() and kept.read_text().count("\n") >= 4):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    while left_over(str(work)):
        assert time.monotonic() < deadline, "workers outlive a killed job"
        time.sleep(0.05)
    assert not (tmp_path / "killed.json").exists()
    done = [json.loads(line)["id"] for line in kept.read_text().splitlines() if line[-1:] == "}"]
    assert 4 <= len(done) < len(rows)
    # A line that was being written, and a sign that what is kept is not judged again.
    shutil.copytree(work, tmp_path / "marked")
    marked = tmp_path / "marked" / evalplus.VERDICTS
    lines = [json.loads(line) for line in marked.read_text().splitlines()]
    lines[0]["extracted"] = "kept"
    marked.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "Human')
    assert attempt(tmp_path, work, tmp_path / "again.json", root).wait(300) == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert attempt(tmp_path, marked.parent, tmp_path / "marked.json", root).wait(300) == 0
    items = {i["id"]: i for i in json.loads((tmp_path / "marked.json").read_text())["items"]}
    assert items[lines[0]["id"]]["extracted"] == "kept"
    assert len(items) == len(rows)


# bad references


def broken(**changes: object) -> dict:
    one = record(solution(ADD))
    return {**one, "reference": {**one["reference"], **changes}}


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(json.dumps(value).encode())).decode()


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({**record(""), "reference": "text"}, "reference: 'text': expected an object"),
        (broken(prompt=None), "reference: prompt: None: expected text"),
        (broken(dataset="apps"), "reference: dataset: 'apps': expected humaneval or mbpp"),
        (broken(entry_point="a b"), "reference: entry_point: 'a b': expected a name"),
        (broken(atol="0"), "reference: atol: '0': expected a number, 0 or more"),
        (broken(tests="%"), "reference: tests: .*expected packed lists of calls"),
        (broken(tests=packed([1])), "reference: tests: .*expected packed lists of calls"),
        (broken(tests=packed([[], []])), "reference: tests: no base tests"),
        (broken(canonical_solution="    return 1 / 0"), "canonical_solution: .*: an error"),
    ],
)
def test_bad_reference_is_one_line(one: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evalplus.score([one], QUICK)
    assert "\n" not in str(caught.value)


def test_verdicts_depend_on_the_sandbox_and_what_runs_in_it() -> None:
    from tlora.code import stage_files

    files = {path.name for path in stage_files("score", {"implementation": "evalplus"})}
    assert {"evalplus.py", "recorder.py", "sandbox.py"} <= files


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evalplus.eval", None)
    with pytest.raises(UserError, match=r"evalplus: not installed .*pip install 'tlora\[code\]'"):
        evalplus.score([record("")], QUICK)


# sources


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Small files where EvalPlus' are looked for."""
    write(tmp_path / "code/HumanEvalPlus-v0.1.10.jsonl.gz", list(HUMANEVAL))
    write(tmp_path / "mbpp/test.jsonl", list(MBPP))
    return tmp_path


def test_records_hold_problem_and_tests(data_root: Path) -> None:
    data = source.Data("humaneval")
    records = source.load(data, "test", data_root)
    assert [one["id"] for one in records] == [problem["task_id"] for problem in HUMANEVAL]
    first = records[0]
    assert first["instruction"] == f"Create a Python script for this problem:\n{ADD['prompt']}"
    assert first["response"] == solution(ADD)
    problem = evalplus._problem({**first, "completion": ""})
    assert problem.inputs == {"base": ADD["base_input"], "plus": ADD["plus_input"]}
    assert problem.entry_point == "add_all" and problem.solution == ADD["canonical_solution"]
    path = data_root / "code/HumanEvalPlus-v0.1.10.jsonl.gz"
    assert source.sources(data, "test", data_root) == {path.name: path}
    mbpp = source.load(source.Data("mbpp"), "test", data_root)
    assert [one["response"] for one in mbpp] == [one["canonical_solution"] for one in MBPP]
    # EvalPlus makes tuples of the lists in this problem's file; its plus tests are an object there.
    problem = evalplus._problem({**mbpp[0], "completion": ""})
    assert problem.inputs == {"base": [[(3, 4, 5, 6), (5, 7, 4, 10)]], "plus": []}


def test_wording_of_the_question(data_root: Path) -> None:
    data = source.Data("mbpp", "Write {entry_point}.\n```\n{prompt}```")
    asked = source.load(data, "test", data_root)[1]["instruction"]
    assert asked == f"Write check_str.\n```\n{MATCH['prompt']}```"
    with pytest.raises(ValueError, match=r"instruction: expected a text with \{prompt\}"):
        source.Data("mbpp", "Write it.")
    with pytest.raises(ValueError, match="dataset: expected humaneval or mbpp"):
        source.Data("apps")


def test_bad_files(tmp_path: Path, data_root: Path) -> None:
    data = source.Data("mbpp")
    with pytest.raises(UserError, match="mbpp: split: 'train': expected one of test"):
        source.load(data, "train", data_root)
    (tmp_path / "empty/humaneval").mkdir(parents=True)
    with pytest.raises(UserError, match=r"humaneval: no HumanEvalPlus-v0\.1\.10 or"):
        source.load(source.Data(), "test", tmp_path / "empty")
    write(tmp_path / "mbpp/test.jsonl", [MATCH, {**MATCH, "entry_point": 1}])
    with pytest.raises(UserError, match=r"test\.jsonl:2: entry_point: 1: expected text"):
        source.load(data, "test", data_root)
    write(tmp_path / "mbpp/test.jsonl", [{**MATCH, "atol": "0"}])
    with pytest.raises(UserError, match="task_id: 'Mbpp/737': atol: 0: expected a number"):
        source.load(data, "test", data_root)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> source.Release:
    path = write(tmp_path / "published/MbppPlus.jsonl.gz", list(MBPP))
    content = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    release = source.Release(path.as_uri(), content, ("MbppPlus",))
    monkeypatch.setitem(source.RELEASES, "mbpp", release)
    return release


def test_release_is_fetched_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    release = published(tmp_path, monkeypatch)
    data = source.Data("mbpp")
    assert source.sources(data, "test", None) == {} and source.hub(data, "test") == []
    assert source.web(data, "test") == [(release.url, release.sha256)]
    assert len(source.load(data, "test", None)) == 2
    (tmp_path / "published/MbppPlus.jsonl.gz").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(source.load(data, "test", None)) == 2


def test_release_that_cannot_be_had(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    release = published(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"SHA-256 is [0-9a-f]{64}: expected 0000"):
        web.web_file(release.url, "0" * 64)
    with pytest.raises(UserError, match=r"not loaded: .*No such file"):
        web.web_file("file:///no/such/file.gz", "0" * 64)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: run `tlora download` first"):
        web.web_file(release.url, release.sha256)
    assert not [path for path in cache.rglob("*") if path.is_file()]


# the real files


@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("mbpp", 378)])
def test_real_files(shared_data: Path, name: str, count: int) -> None:
    records = source.load(source.Data(name), "test", shared_data / "data")
    assert len({one["id"] for one in records}) == len(records) == count
    (path,) = source.sources(source.Data(name), "test", shared_data / "data").values()
    content = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    assert content == source.RELEASES[name].sha256


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("humaneval", 12), ("mbpp", 23)])
def test_sample_of_reference_solutions(shared_data: Path, name: str, step: int) -> None:
    """One in 12 of HumanEval+, one in 23 of MBPP+; two wrong programs and no program beside."""
    records = source.load(source.Data(name), "test", shared_data / "data")[::step]
    shown = [f"Here it is:\n```python\n{one['response']}\n```\nDone." for one in records]
    right = [{**one, "completion": text} for one, text in zip(records, shown, strict=True)]
    names = [one["reference"]["entry_point"] for one in records]
    bad = [f"def {name}(*arguments):\n    return 'wrong'" for name in names[:2]]
    wrong = [{**one, "completion": text} for one, text in zip(records, [*bad, ""], strict=False)]
    found = verdicts(*right, *wrong, options=evalplus.Options())
    assert found == [(True, True)] * len(right) + [(False, False)] * 3


def test_harmful_programs_are_real(tmp_path: Path) -> None:
    for name, body in harmful(tmp_path, tmp_path, 1, [tmp_path]).items():
        compile(function(body), name, "exec")


def test_no_generated_code_runs_in_the_scoring_process() -> None:
    """Its process number never is that of the scorer or of a worker's child."""
    program = "import os\ndef add_all(n):\n"
    program += f"    return 2 * sum(n) if os.getpid() < 100 < {os.getpid()} else 0"
    assert verdicts(record(program)) == [(True, True)]
