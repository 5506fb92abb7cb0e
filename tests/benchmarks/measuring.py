"""What the measurements of this folder share: rows of Markdown, times, memory of processes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# What tests and measurements share lies beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

PACKAGES = ("torch", "transformers", "peft")

# The peak of a process counts what its parent had when it was started; this parent has little.
_WATCHED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
with open(sys.argv[1], "w") as file:
    json.dump([status, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * unit], file)
"""


@functools.cache
def machine(*packages: str) -> str:
    """Return the machine and the versions in a few words.

    Parameters
    ----------
    packages
        Distributions to name; default: torch, transformers, peft. A GPU is named where torch is
        loaded and sees one.
    """
    torch = sys.modules.get("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} cores of {_processor()}"]
    if torch is not None and torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    for name in packages or PACKAGES:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def header() -> str:
    """Print and return the head of the Markdown table."""
    return _print("| what | ours | theirs | ratio | machine, versions |\n|---|---|---|---|---|")


def row(
    what: str,
    ours: object,
    theirs: object = "",
    ratio: float | str | None = None,
    versions: str | None = None,
) -> str:
    """Print and return one row of the Markdown table.

    Parameters
    ----------
    what
        What was measured, with sizes and seeds.
    ours, theirs
        Text with its unit; a float gets three significant digits.
    ratio
        Ours to theirs; None where nothing is compared.
    versions
        Default: `machine()`.
    """
    cells = [what, _cell(ours), _cell(theirs), "" if ratio is None else _cell(ratio)]
    return _print(f"| {' | '.join([*cells, machine() if versions is None else versions])} |")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _print(text: str) -> str:
    print(text, flush=True)
    return text


def seconds(function: Callable[[], object], repeat: int = 1) -> float:
    """Return the median of the seconds that calls of `function` take."""
    return alternating({"": function}, repeat)[""]


def alternating(functions: Mapping[str, Callable[[], object]], repeat: int = 3) -> dict[str, float]:
    """Call each function in turn, `repeat` times, and return the median of each one's seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@dataclasses.dataclass(frozen=True)
class Child:
    """What a process took.

    Attributes
    ----------
    status
        Its exit status.
    seconds, processor_seconds
        Wall time; time on processors, with its children.
    peak
        Bytes of memory of the largest of the process and its children.
    output
        What it wrote to stdout and stderr.
    """

    status: int
    seconds: float
    processor_seconds: float
    peak: int
    output: str


def child(command: Sequence[object], check: bool = True, **options: object) -> Child:
    """Run a process to its end and return what it took.

    Parameters
    ----------
    command
        The program and its arguments.
    check
        Refuse an exit status other than 0.
    options
        For `subprocess.run`: `cwd`, `env`, ...

    Raises
    ------
    RuntimeError
        With `check`, where the process fails; the end of its output is the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        watched = [sys.executable, "-I", "-S", "-c", _WATCHED, report, *command]
        done = subprocess.run(
            list(map(str, watched)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        if not report.is_file():
            raise RuntimeError(f"{' '.join(map(str, command))[:200]}:\n{done.stdout[-3000:]}")
        status, wall, processor, peak = json.loads(report.read_text(encoding="utf-8"))
    if check and status:
        raise RuntimeError(f"{' '.join(map(str, command))[:200]}:\n{done.stdout[-3000:]}")
    return Child(status, wall, processor, peak, done.stdout)


def peak_memory(command: Sequence[object], **options: object) -> int:
    """Return the peak of a process's memory in bytes; `options` are those of `child`."""
    return child(command, **options).peak


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a command line with `--small`, the size that the tests run.

    Parameters
    ----------
    doc
        The script's docstring: what stands above its options.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--small", action="store_true", help="a size that says nothing but works")
    return made
