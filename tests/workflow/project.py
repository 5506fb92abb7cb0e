"""Checkouts of the project in folders of their own, and what snakemake says about them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MINI = "config/mini.yaml"

# The smallest grid that has every stage: one task cut to a few samples, one seed.
PRESET = """\
models: [tiny]
tasks: [arithmetic]
methods: [full, lora, pissa, tlora]
seeds: [1]
set:
  data.train: 42
  data.validation: 4
  data.test: 8
  batch_size: 4
  calibration_samples: 4
overrides:
  - {benchmarks: [arithmetic], set: {data.test: 8, max_new_tokens: 4}}
"""

# `tlora` of the shell commands: the checkout's own, noting what it was asked for and loaded.
COMMAND = """\
import json, os, sys
sys.path[0] = os.getcwd()
from tlora.cli import main
status = main()
if "TLORA_TEST_CALLS" in os.environ:
    heavy = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "tlora")
    call = {"arguments": sys.argv[1:], "status": status, "loaded": loaded, "heavy": heavy}
    with open(os.environ["TLORA_TEST_CALLS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\\n")
sys.exit(status)
"""

# A logger plugin of snakemake that writes down every job it is told of.
PLUGIN = """\
import json, os
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent


class LogHandler(LogHandlerBase):
    writes_to_stream = writes_to_file = needs_rulegraph = False
    has_filter = has_formatter = True

    def emit(self, record):
        if getattr(record, "event", None) != LogEvent.JOB_INFO:
            return
        job = {
            "rule": record.rule_name,
            "wildcards": dict(record.wildcards or {}),
            "input": [str(path) for path in record.input],
            "command": record.shellcmd,
        }
        with open(os.environ["TLORA_TEST_JOBS"], "a", encoding="utf-8") as file:
            file.write(json.dumps(job) + "\\n")
"""


class Job(NamedTuple):
    """A job as a dry run announces it."""

    rule: str
    names: str
    id: str
    input: tuple[str, ...]
    command: str | None

    @property
    def label(self) -> str:
        """The rule and the readable names, without the id."""
        return f"{self.rule} {self.names}".strip()

    @property
    def arguments(self) -> list[str]:
        """The words of the job's shell command, without `tlora` itself."""
        return shlex.split(self.command or "")[1:]


def labels(jobs: Iterable[Job]) -> list[str]:
    """Return the jobs' labels, sorted; equal ones (seeds) stay apart."""
    return sorted(job.label for job in jobs)


def ids(jobs: Iterable[Job]) -> set[tuple[str, str]]:
    """Return rule and id of the jobs that have one."""
    return {(job.rule, job.id) for job in jobs if job.id}


def run_of(method: str, task: str = "arithmetic", benchmarks: Iterable[str] = ()) -> list[str]:
    """Return the labels of a run's jobs, from training to scores."""
    at = f"tiny/{task}/{method}"
    evaluated = [f"{at}/{benchmark}" for benchmark in benchmarks or [task]]
    return [
        f"train {at}",
        f"export {at}",
        f"check {at}",
        *(f"generate {name}" for name in evaluated),
        *(f"score {name}" for name in evaluated),
    ]


# What is announced when the tables are built again, and when the grid itself is another.
TABLES = ["compare", "index", "track", "all"]
GRID = ["grid", *TABLES]


@dataclass
class Project:
    """A checkout in a folder of its own, with the tools that run it."""

    folder: Path
    tools: Path
    environment: dict[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return a path below the checkout."""
        return self.folder / name

    def _environment(self) -> dict[str, str]:
        hidden = ("SNAKEMAKE", "MLFLOW", "PYTHON", "TLORA", "COV_CORE")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        return kept | {
            "PATH": os.pathsep.join(
                [str(self.tools), str(Path(sys.executable).parent), kept["PATH"]]
            ),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(self.tools)]),
            # Sources change between runs, faster than the resolution of a file's time.
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command in the checkout."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, command: list[str], status: int | None = 0) -> str:
        """Run a command in the checkout; return what it wrote to stdout and stderr."""
        process = self.start(command)
        output, _ = process.communicate(timeout=800)
        if status is not None and process.returncode != status:
            pytest.fail(f"{shlex.join(command)[:300]}: exit status {process.returncode}\n{output}")
        return output

    def snakemake(self, *arguments: str, preset: str = MINI, status: int | None = 0) -> str:
        """Run snakemake on a preset."""
        return self.run(self.snakemake_command(*arguments, preset=preset), status)

    def snakemake_command(self, *arguments: str, preset: str = MINI) -> list[str]:
        """Return the command that runs snakemake on a preset."""
        command = [sys.executable, "-m", "snakemake", "--configfile", preset]
        cores = [] if "--cores" in arguments else ["--cores", "2"]
        return [*command, *cores, *arguments]

    def dry(self, *arguments: str, preset: str = MINI) -> list[Job]:
        """Return the jobs that `snakemake --dry-run` announces."""
        record = self.tools / f"jobs-{time.monotonic_ns()}"
        self.environment["TLORA_TEST_JOBS"] = str(record)
        output = self.snakemake("--dry-run", "--logger", "jobs", *arguments, preset=preset)
        jobs = []
        for line in record.read_text().splitlines() if record.is_file() else []:
            entry = json.loads(line)
            names = dict(entry["wildcards"])
            identity = names.pop("id", "")
            jobs.append(
                Job(
                    entry["rule"],
                    "/".join(names.values()),
                    identity,
                    tuple(entry["input"]),
                    entry["command"],
                )
            )
        # The plugin must not be what makes a test pass: snakemake says itself that it has nothing.
        assert bool(jobs) != ("Nothing to be done" in output), output
        return jobs

    def tlora(self, *arguments: str, status: int | None = 0) -> str:
        """Run the checkout's `tlora`."""
        return self.run([str(self.tools / "tlora"), *arguments], status)

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls of `tlora` since recording was switched on by `record`."""
        path = Path(self.environment["TLORA_TEST_CALLS"])
        return (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )

    def record(self) -> None:
        """Note every call of `tlora` from here on, each in a process of its own."""
        self.environment["TLORA_FORKS"] = "off"
        self.environment["TLORA_TEST_CALLS"] = str(self.tools / f"calls-{time.monotonic_ns()}")

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text that stands once in a file of the checkout."""
        text = self.path(name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name}: {old!r} stands {text.count(old)} times"
        self.path(name).write_text(text.replace(old, new), encoding="utf-8")

    def append(self, name: str, text: str) -> None:
        """Add a text at the end of a file of the checkout."""
        with open(self.path(name), "a", encoding="utf-8") as file:
            file.write(text)

    def state(self, folder: str = "results") -> dict[str, tuple[int, int]]:
        """Return size and time of change of every file below a folder, but for who holds it."""
        files = {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.path(folder).rglob("*"))
            if path.is_file() and ".lease" not in path.parts
        }
        stats = {name: path.stat() for name, path in files.items()}
        return {name: (one.st_size, one.st_mtime_ns) for name, one in stats.items()}

    def copy(self, folder: Path, **options: Any) -> Project:
        """Copy the checkout with all it has made."""
        shutil.copytree(self.folder, folder, symlinks=True, **options)
        tools = make_tools(folder.with_name(f"{folder.name}-tools"))
        return Project(folder, tools)


def make_tools(folder: Path) -> Path:
    """Write the command `tlora` and the logger plugin into a folder."""
    (folder / "snakemake_logger_plugin_jobs").mkdir(parents=True)
    (folder / "snakemake_logger_plugin_jobs" / "__init__.py").write_text(PLUGIN)
    (folder / "command.py").write_text(COMMAND)
    command = folder / "tlora"
    words = shlex.join([sys.executable, str(folder / "command.py")])
    command.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return folder
