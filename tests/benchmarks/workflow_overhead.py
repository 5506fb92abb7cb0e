"""What the workflow itself costs: planning, doing nothing, adding to a finished grid, by jobs.

    python tests/benchmarks/workflow_overhead.py [--jobs 100 1000 10000] [--runs 500]

Real snakemake on presets of the shipped methods and many seeds, in a temporary checkout. Nothing is
trained: a grid is finished by Snakemake's own --touch, with empty files for what is missing. Beside
each dry run stands one of a bare Snakefile that has as many jobs: five rules, a run's chain from
training to score, without parameters, source files and resources. What is left is Snakemake's own.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

import measuring
from checkout import copy_checkout

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("snakemake",)
# Every method of config/methods that has one label of its own, and how many jobs a run is.
METHODS = [path.stem for path in sorted((ROOT / "config/methods").glob("*.yaml"))]
RUN = 5

# Snakemake's executor for --touch waits 0.1 s a job and makes nothing.
FINISH = """
import json, sys
from pathlib import Path
from snakemake.executors.touch import Executor
from snakemake.io import is_flagged
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from tlora.tracking import redact, sqlite_path, tracking_uri

def run_job(self, job):
    for path in job.output:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if is_flagged(path, "directory"):
            Path(path).mkdir(exist_ok=True)
        elif path.endswith("tracked.json"):
            uri = tracking_uri({})
            Path(path).write_text(json.dumps({"reachable": True, "uri": redact(uri)}))
            if sqlite_path(uri):
                Path(sqlite_path(uri)).touch()
        else:
            Path(path).touch()
    info = SubmittedJobInfo(job=job)
    self.report_job_submission(info)
    self.report_job_success(info)

Executor.run_job = run_job
from snakemake.cli import main
main(sys.argv[1:])
"""

BARE = """
RUNS = range({runs})
rule all:
    input: [f"bare/{{run}}/score.json" for run in RUNS]
"""
CHAIN = ["train", "export", "check", "generate", "score"]


def preset(folder: Path, name: str, methods: list[str], seeds: int) -> Path:
    """Write a preset and return its path."""
    path = folder / "config" / f"{name}.yaml"
    path.write_text(
        f"models: [tiny]\ntasks: [arithmetic]\nmethods: [{', '.join(methods)}]\n"
        f"seeds: [{', '.join(map(str, range(1, seeds + 1)))}]\n"
    )
    return path


def bare(folder: Path, jobs: int) -> Path:
    """Write a Snakefile of as many jobs with nothing in them."""
    text = [BARE.format(runs=max(1, jobs // len(CHAIN)))]
    for above, stage in zip([None, *CHAIN], CHAIN, strict=False):
        given = "" if above is None else f'    input: "bare/{{run}}/{above}.json"\n'
        made = f'    output: "bare/{{run}}/{stage}.json"\n'
        text.append(f'rule {stage}:\n{given}{made}    shell: "touch {{output}}"\n')
    path = folder / "Bare"
    path.write_text("\n".join(text))
    return path


def environment(folder: Path) -> dict[str, str]:
    """Return the surroundings of a run: this checkout's package, nothing of the caller's."""
    hidden = ("SNAKEMAKE", "MLFLOW", "PYTHON", "TLORA")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return kept | {"PYTHONPATH": str(folder), "TLORA_FORKS": "off"}


def snakemake(folder: Path, *arguments: object) -> measuring.Child:
    """Run snakemake in a checkout."""
    command = [sys.executable, "-m", "snakemake", "--cores", 2, *arguments]
    return measuring.child(command, cwd=folder, env=environment(folder))


def dry(folder: Path, *arguments: object) -> measuring.Child:
    """Run snakemake's planning alone; jobs are not printed one by one."""
    return snakemake(folder, "--dry-run", "--quiet", "rules", *arguments)


def finish(folder: Path, *arguments: object) -> None:
    """Leave every output of a grid behind, and Snakemake's records of it."""
    # Of one process: it is a part of the preparation, not measured.
    command = [sys.executable, "-c", FINISH, "--cores", 1, "--quiet", "all", "--touch", *arguments]
    measuring.child(command, cwd=folder, env=environment(folder))


def curve(folder: Path, sizes: list[int], repeat: int) -> None:
    """Print a row for each size: the dry run of a grid that has not begun."""
    versions = measuring.machine(*PACKAGES)
    times: dict[int, tuple[float, float]] = {}
    for jobs in sizes:
        seeds = max(1, round(jobs / len(METHODS) / RUN))
        grid = preset(folder, f"grid{jobs}", METHODS, seeds)
        other = bare(folder, seeds * len(METHODS) * RUN)
        pairs = []
        for _ in range(repeat if jobs <= 1000 else 1):
            ours = dry(folder, "--configfile", grid)
            theirs = dry(folder, "--snakefile", other)
            pairs.append((ours, theirs))
        ours, theirs = ([one.seconds for one in side] for side in zip(*pairs, strict=True))
        times[jobs] = statistics.median(ours), statistics.median(theirs)
        mine, bare_one = times[jobs]
        peaks = [max(one.peak for one in side) / 2**20 for side in zip(*pairs, strict=True)]
        measuring.row(
            f"dry run of {len(METHODS)} methods x {seeds} seeds: {seeds * len(METHODS) * RUN:,} "
            "jobs of runs",
            f"{mine:.1f} s, {peaks[0]:,.0f} MiB",
            f"{bare_one:.1f} s, {peaks[1]:,.0f} MiB (as many jobs of a bare Snakefile)",
            mine / bare_one,
            versions,
        )
    first, last = min(sizes), max(sizes)
    if last > first:
        per_job = [
            1000 * (end - start) / (last - first)
            for start, end in zip(times[first], times[last], strict=True)
        ]
        measuring.row(
            f"each further job, {first:,} to {last:,}",
            f"{per_job[0]:.1f} ms",
            f"{per_job[1]:.1f} ms",
            per_job[0] / per_job[1] if per_job[1] else None,
            versions,
        )


def demo(folder: Path, repeat: int) -> None:
    """Print the row of a rerun of the finished demo, which does nothing."""
    finish(folder)
    found = [snakemake(folder) for _ in range(repeat)]
    assert all("Nothing to be done" in one.output for one in found), found[0].output
    measuring.row(
        "rerun of the finished demo, nothing to be done",
        f"{statistics.median(one.seconds for one in found):.1f} s",
        "target: 10 s",
        versions=measuring.machine(*PACKAGES),
    )


def added(folder: Path, runs: int, repeat: int) -> None:
    """Print the row of the dry run that plans one more method in a finished grid."""
    methods = METHODS[: min(len(METHODS) - 1, runs)]
    methods = methods[: max(1, len(methods) // 5 * 5)] if len(methods) >= 5 else methods
    seeds = max(1, runs // len(methods))
    finish(folder, "--configfile", preset(folder, "grid", methods, seeds))
    finished = dry(folder, "--configfile", folder / "config/grid.yaml")
    grid = preset(folder, "grid", [*methods, METHODS[len(methods)]], seeds)
    found = [dry(folder, "--configfile", grid) for _ in range(repeat)]
    measuring.row(
        f"{len(methods) * seeds} finished runs: a dry run that finds nothing to do",
        f"{finished.seconds:.1f} s, {finished.peak / 2**20:,.0f} MiB",
        versions=measuring.machine(*PACKAGES),
    )
    measuring.row(
        f"{len(methods) * seeds} finished runs: planning one more method ({seeds} runs)",
        f"{statistics.median(one.seconds for one in found):.1f} s, "
        f"{max(one.peak for one in found) / 2**20:,.0f} MiB",
        "target: 15 s",
        versions=measuring.machine(*PACKAGES),
    )


def main() -> None:
    """Measure and print the rows."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--jobs", type=int, nargs="*", default=[100, 1000, 10000])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.small:
        options.jobs, options.runs, options.repeat = [100], 5, 1
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        copy_checkout(ROOT, folder)
        measuring.header()
        demo(folder, options.repeat)
        if options.runs:
            added(folder, options.runs, options.repeat)
        if options.jobs:
            curve(folder, options.jobs, options.repeat)


if __name__ == "__main__":
    main()
