"""HumanEval(+) and MBPP(+): pass@1 of one program an item, judged by EvalPlus (arXiv 2305.01210).

Three steps for an item, so that no generated code runs where verdicts are made:

1. The program is cut out of the completion by EvalPlus' sanitizer.
2. Program and reference solution are called on the tests' inputs, each in a sandbox of its own that
   holds neither solution nor expected values, and what they return is written down
   (`recorder.py`).
3. EvalPlus judges a function that returns what was written down: its comparisons, tolerances and
   special cases, without the program.

The program stands after the problem's prompt, as in the paper's evaluation, so that the prompt's
imports and helper functions are there. `accuracy` counts the base tests, `plus_accuracy` programs
that pass these and the tests that EvalPlus adds.
"""

from __future__ import annotations

import ast
import base64
import binascii
import concurrent.futures
import functools
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora import sandbox
from tlora.artefact import write_text
from tlora.benchmarks import Context, recorder, summarise
from tlora.errors import UserError
from tlora.progress import bar

logger = logging.getLogger(__name__)

CONTEXT = True
DATASETS = ("humaneval", "mbpp")
VERDICTS = "verdicts.jsonl"

EXTRACTION_SECONDS = 60
"""Processor time to cut a program out of a completion; hundredths are needed as a rule."""
REFERENCE_SECONDS = 3600.0
"""Processor time of a reference solution; the longest of MBPP+ needs some 20 seconds."""
REPLAY_SECONDS = 60.0
"""EvalPlus' time limit for what was written down, where only comparing takes time."""
REPLAY_BYTES = 8 << 20
"""What is judged at once, so that the time limit, which EvalPlus cannot lift, is never near."""
OUTPUT_ROOM = 1 << 20
"""A program may return four times the bytes of what is expected, and these."""


@dataclass(frozen=True)
class Options:
    """How programs are found, and their limits.

    The limits are in seconds of a program's own processor time: other load decides nothing.

    Attributes
    ----------
    sanitize
        Whether EvalPlus' sanitizer looks for the program in a completion; if not, the completion
        is one. The sanitizer leaves out functions without `return`, helpers too.
    test_seconds, set_seconds
        For one test, and for all of one set (base or plus). EvalPlus' are 1 and 60, of wall clock.
    reference_factor
        So many times as long as the reference solution takes is always allowed (EvalPlus': 4).
    memory_mib
        Address space (EvalPlus': 4096).
    """

    sanitize: bool = True
    test_seconds: float = 4.0
    set_seconds: float = 60.0
    reference_factor: float = 8.0
    memory_mib: int = 4096

    def __post_init__(self) -> None:
        if not isinstance(self.sanitize, bool):
            raise ValueError("sanitize: expected true or false")
        for name in ("test_seconds", "set_seconds", "reference_factor"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{name}: expected a number above 0")
        if not isinstance(self.memory_mib, int) or self.memory_mib < 256:
            raise ValueError("memory_mib: expected a whole number, 256 or more")


@dataclass(frozen=True)
class Problem:
    """What an item's reference holds: a problem in EvalPlus' format."""

    dataset: str
    task_id: str
    entry_point: str
    prompt: str
    solution: str
    atol: float
    inputs: dict[str, list[Any]]


@dataclass(frozen=True)
class Recording:
    """What a function returned.

    Attributes
    ----------
    values
        Encoded, a value for each call, up to the first that failed.
    seconds
        Processor time of each of them, as the function's process says.
    reason
        Why there is not a value for each call; empty where there is.
    """

    values: list[bytes]
    seconds: list[bytes]
    reason: str


def score(
    records: Sequence[Mapping[str, Any]],
    options: Options | None = None,
    context: Context | None = None,
) -> dict[str, Any]:
    """Judge programs by EvalPlus' base and plus tests.

    Parameters
    ----------
    records
        Each with `id`, `completion` and `reference`: a problem as `tlora.tasks.evalplus.pack`
        returns it.
    options
        Limits of a program.
    context
        `workers` programs run at once. `place["unsafe_no_sandbox"]` true runs them without a
        sandbox: they can then do whatever the user can. Verdicts are kept in `work`.

    Returns
    -------
    dict
        Content of score.json. An item's `extracted` is its program; it is None, and the verdict
        wrong, where the sanitizer finds none that defines the function asked for.

    Raises
    ------
    UserError
        Where EvalPlus is not installed or no sandbox can be had; a reference that is no problem, or
        whose own solution does not run.
    """
    options, context = options or Options(), context or Context()
    _require_evalplus()
    for record in records:
        _problem(record)
    box = sandbox.find(bool(context.place.get("unsafe_no_sandbox")))
    done = _kept(context.work)
    waiting = [record for record in records if record["id"] not in done]
    with bar(total=len(records), initial=len(records) - len(waiting), desc="score") as shown:
        for item in _judged(waiting, options, box, context.workers):
            _keep(context.work, item)
            done[item["id"]] = item
            shown.update()
    items = [done[record["id"]] for record in records]
    plus = sum(item["plus_correct"] for item in items) / max(len(items), 1)
    return summarise(items, {"plus_accuracy": plus})


def program(completion: str, problem: Problem, sanitize: bool = True) -> str | None:
    """Return the program in a completion, None where there is none.

    It is looked for in the completion, and, where that does not define the function, in the prompt
    that the completion then continues.
    """
    for text in (completion, f"{problem.prompt}\n{completion}"):
        found = _apart(_program, text, problem.entry_point, sanitize)
        if found is not None:
            return found
    return None


def judge(
    record: Mapping[str, Any], options: Options, box: sandbox.Sandbox
) -> tuple[dict[str, Any], list[str]]:
    """Return the item of score.json for one record, and what there is to say about it.

    Raises
    ------
    UserError
        When the reference solution does not run.
    RuntimeError
        When the sandbox did not work.
    """
    problem = _problem(record)
    code = program(record["completion"], problem, options.sanitize)
    passed, notes = {"base": False, "plus": False}, []
    if code is not None:
        for tests in passed:
            passed[tests], reason = _passes(code, problem, tests, options, box)
            notes += [f"item {record['id']!r}: {tests} tests: {reason}"] if reason else []
            if not passed[tests]:
                break
    item = {
        "id": record["id"],
        "correct": passed["base"],
        "extracted": code,
        "plus_correct": passed["plus"],
    }
    return item, notes


def _passes(
    code: str, problem: Problem, tests: str, options: Options, box: sandbox.Sandbox
) -> tuple[bool, str]:
    """Run a program and the reference solution on a set of tests and let EvalPlus compare.

    Returns
    -------
    passed : bool
    reason : str
        Why the program did not return from all calls.
    """
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS

    inputs = problem.inputs[tests]
    if not inputs:
        return True, ""
    calls = [json.dumps(recorder.encode(list(arguments))).encode() for arguments in inputs]
    runs = (problem, calls, options.memory_mib << 20, box)
    wanted = _record(problem.prompt + problem.solution, [REFERENCE_SECONDS] * len(calls), *runs)
    if wanted.reason:
        raise UserError(
            f"item {problem.task_id!r}: canonical_solution: {tests} tests: {wanted.reason}: "
            "expected a solution that returns from every call"
        )
    needed = [options.reference_factor * float(used) for used in wanted.seconds]
    given = _record(
        f"{problem.prompt}\n{code}",
        [max(options.test_seconds, seconds) for seconds in needed],
        *runs,
        total=options.set_seconds + sum(needed),
        output=4 * sum(map(len, wanted.values)) + OUTPUT_ROOM,
    )
    if given.reason:
        return False, given.reason
    some = problem.dataset == "mbpp" and problem.entry_point in MBPP_OUTPUT_NOT_NONE_TASKS
    expected = _Expected(wanted.values, some)
    parts = _parts(wanted, given)
    return all(_agrees(problem, inputs[at], given.values[at], expected[at]) for at in parts), ""


def _record(
    code: str,
    seconds: list[float],
    problem: Problem,
    calls: list[bytes],
    memory: int,
    box: sandbox.Sandbox,
    total: float = REFERENCE_SECONDS,
    output: int = 1 << 32,
) -> Recording:
    """Call a function in a sandbox and return what it returned.

    Parameters
    ----------
    code
        Defines the function.
    seconds
        Processor time allowed for each call.
    problem, calls
        The function's name, and encoded arguments.
    memory, total, output
        Bytes of address space, processor time in all, and bytes of what is returned.
    box
        Where it runs.

    Raises
    ------
    RuntimeError
        When the sandbox did not work.
    """
    task = {"code": code, "entry_point": problem.entry_point, "seconds": seconds}
    with tempfile.TemporaryFile() as log:
        result = sandbox.run(
            box,
            Path(recorder.__file__).read_text(encoding="utf-8"),
            b"\n".join([json.dumps(task).encode(), *calls]),
            sandbox.Limits(total, recorder.WAITING * total, memory, output),
            log=log,
        )
        log.seek(0)
        said = " ".join(log.read(2000).decode(errors="replace").split())
    head, *lines = result.output.split(b"\n")
    if head != b"ready":
        raise RuntimeError(
            f"the sandbox did not start ({box.kind}, status {result.status}: {said[-200:]}); "
            "start again: the verdicts reached so far are kept"
        )
    # The last one is empty, or cut off where the program was ended.
    *lines, _ = lines or [b""]
    found = [line.partition(b"\t") for line in lines[: len(calls)]]
    values = [value for _, tab, value in found if tab]
    reason = ""
    if len(values) < len(calls):
        last = found[-1][0] if found else b""
        why = {b"error": "an error", b"time": "time used up"}.get(last, "ended by a limit")
        reason = f"call {len(values) + 1} of {len(calls)}: {why}"
    return Recording(values, [used for used, tab, _ in found if tab], reason)


class _Expected(Sequence):
    """What a reference solution returned, decoded when it is asked for.

    Where only that a value was returned is compared (`some`), it holds whether one was.
    """

    def __init__(self, values: list[bytes], some: bool) -> None:
        self.values, self.some = values, some

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return _Expected(self.values[at], self.some)
        value = recorder.decode(self.values[at])
        return value is not None if self.some else value


def _parts(wanted: Recording, given: Recording) -> Iterator[slice]:
    """Split tests so that each part is quickly decoded and compared."""
    start = size = 0
    for at, (one, other) in enumerate(zip(wanted.values, given.values, strict=True)):
        size += len(one) + len(other)
        if size > REPLAY_BYTES:
            yield slice(start, at + 1)
            start, size = at + 1, 0
    if start < len(wanted.values):
        yield slice(start, None)


def _agrees(problem: Problem, inputs: list[Any], given: list[bytes], expected: Sequence) -> bool:
    """Let EvalPlus judge values that were written down."""
    from evalplus.eval import PASS, untrusted_check

    global _played
    _played, name = functools.partial(_replay, iter(given)), problem.entry_point
    if (problem.dataset, name) == ("humaneval", "find_zero"):
        # EvalPlus 0.3.1 asks its oracle about this one, and then counts no test as passed.
        _played, name = functools.partial(_is_zero, iter(given), problem.atol), "is_zero"
        expected = [True] * len(inputs)
    status, _ = untrusted_check(
        problem.dataset,
        # Runs in a process that EvalPlus forks, where this module is loaded already.
        f"from {__name__} import _played as {name}",
        inputs,
        name,
        expected,
        problem.atol,
        [0.0] * len(inputs),
        fast_check=True,
        min_time_limit=REPLAY_SECONDS,
    )
    return status == PASS


_played: Callable[..., Any]
"""What EvalPlus judges instead of a program."""


def _replay(given: Iterator[bytes], *arguments: Any) -> Any:
    """Return the next of the values that were written down."""
    return recorder.decode(next(given))


def _is_zero(given: Iterator[bytes], atol: float, *arguments: Any) -> bool:
    """Tell whether the next of the values is a zero of a polynomial."""
    from evalplus.eval._special_oracle import _poly

    return abs(_poly(*arguments, _replay(given))) <= atol


def _judged(
    records: Sequence[Mapping[str, Any]], options: Options, box: sandbox.Sandbox, workers: int
) -> Iterator[dict[str, Any]]:
    """Yield items as they are finished."""
    if not records:
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(records)), multiprocessing.get_context("fork"), _begin, (os.getpid(),)
    )
    try:
        futures = [pool.submit(judge, record, options, box) for record in records]
        for future in concurrent.futures.as_completed(futures):
            item, notes = future.result()
            for note in notes:
                logger.info(note)
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """Prepare a worker: it ends with its parent, and settings for EvalPlus do not reach it."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    multiprocessing.set_start_method("fork", force=True)
    # EvalPlus cannot compare its time limit with the text of this variable, and its memory limit
    # counts what this process has mapped; the programs have run and have had their limits.
    os.environ.pop("EVALPLUS_TIMEOUT_PER_TASK", None)
    os.environ["EVALPLUS_MAX_MEMORY_BYTES"] = "-1"


def _kept(work: Path | None) -> dict[Any, dict[str, Any]]:
    """Return the verdicts of an earlier attempt, by id; a line that was cut off is dropped."""
    if work is None or not (work / VERDICTS).is_file():
        return {}
    found = {}
    for line in (work / VERDICTS).read_text(encoding="utf-8").split("\n"):
        try:
            item = json.loads(line)
        except ValueError:
            continue
        found[item["id"]] = item
    write_text(work / VERDICTS, "".join(json.dumps(item) + "\n" for item in found.values()))
    return found


def _keep(work: Path | None, item: Mapping[str, Any]) -> None:
    if work is not None:
        with open(work / VERDICTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(item) + "\n")


def _require_evalplus() -> None:
    try:
        import evalplus.eval
        import evalplus.sanitize  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"evalplus: not installed ({error}): expected the extra `code`: "
            "pip install 'tlora[code]', or pip install --no-deps -r envs/code.lock in a checkout"
        ) from error


def _problem(record: Mapping[str, Any]) -> Problem:
    """Return the problem of a record's reference.

    Raises
    ------
    UserError
        Naming the record, the key and what was expected.
    """
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    found, where = record["reference"], f"item {record['id']!r}: reference"
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: {str(found)[:60]!r}: expected an object with a problem")
    texts = ("dataset", "task_id", "entry_point", "prompt", "canonical_solution", "tests")
    for key in texts:
        if not isinstance(found.get(key), str):
            raise UserError(f"{where}: {key}: {str(found.get(key))[:60]}: expected text")
    if found["dataset"] not in DATASETS:
        raise UserError(f"{where}: dataset: {found['dataset']!r}: expected {' or '.join(DATASETS)}")
    if not found["entry_point"].isidentifier():
        raise UserError(f"{where}: entry_point: {found['entry_point']!r}: expected a name")
    atol = found.get("atol")
    if not isinstance(atol, int | float) or isinstance(atol, bool) or not 0 <= atol < math.inf:
        raise UserError(f"{where}: atol: {atol!r}: expected a number, 0 or more")
    try:
        base, plus = json.loads(zlib.decompress(base64.b64decode(found["tests"], validate=True)))
        inputs = {"base": [list(call) for call in base], "plus": [list(call) for call in plus]}
        if found["dataset"] == "mbpp":
            task = found["task_id"]
            inputs = {key: mbpp_deserialize_inputs(task, calls) for key, calls in inputs.items()}
    except (binascii.Error, zlib.error, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: tests: {error}: expected packed lists of calls") from error
    if not inputs["base"]:
        raise UserError(f"{where}: tests: no base tests: expected at least one call")
    return Problem(
        found["dataset"],
        found["task_id"],
        found["entry_point"],
        found["prompt"],
        found["canonical_solution"],
        float(atol),
        inputs,
    )


def _program(text: str, entry_point: str, sanitize: bool) -> str | None:
    """Return a text, or what EvalPlus' sanitizer leaves of it, None where that is no program."""
    if sanitize:
        from evalplus import sanitize as sanitizer

        # Only in this process, which ends with the answer.
        sanitizer.code_extract = longest_code
        text = sanitizer.sanitize(text, entry_point)
    return text if _defines(text, entry_point) else None


def longest_code(text: str) -> str:
    """Return the lines, next to each other, that parse and hold the most lines that are not blank.

    Equal to EvalPlus' `code_extract`, which parses every run of lines: for 200 equal lines 16
    seconds. Here only those are parsed that would be longer than the longest so far.
    """
    from evalplus.syncheck import syntax_check

    lines = text.split("\n")
    best, longest = (0, 0), 0
    filled = [bool(line.strip()) for line in lines]
    for start in range(len(lines)):
        count = filled[start]
        if sum(filled[start:]) <= longest:
            break
        for end in range(start + 1, len(lines)):
            count += filled[end]
            if count > longest and syntax_check("\n".join(lines[start : end + 1])):
                best, longest = (start, end), count
    return "\n".join(lines[best[0] : best[1] + 1])


def _defines(code: str, name: str) -> bool:
    """Tell whether code gives a name a value other than a function with nothing in it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name and not all(map(_says_nothing, node.body)):
                return True
        elif isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            return True
    return False


def _says_nothing(part: ast.stmt) -> bool:
    docstring = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
    return docstring or isinstance(part, ast.Pass)


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own, None where that breaks down.

    Text that nobody wrote by hand can take a parser hours, or end its process.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def answer() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (EXTRACTION_SECONDS, EXTRACTION_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            sender.send(function(*arguments))
        except Exception:
            sender.send(None)

    process = multiprocessing.get_context("fork").Process(target=answer)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        receiver.close()
        process.join()
