import functools
import gc
import inspect
import json
import os
import re
import sys
from pathlib import Path

from tlora import forks
from tlora.artefact import write_json
from tlora.code import PACKAGE, stage_files
from tlora.devices import wanted
from tlora.errors import UserError
from tlora.lease import lease_folder, new_controller, stamp_of, take
from tlora.plan import MAIN, RESULTS, Plan
from tlora.selection import VALIDATION
from tlora.spec import canonical, spec_id
from tlora.tracking import outdated, tracking_uri

# A DAG is many objects that stay: to look among them for garbage as often as Python does by default
# takes a tenth of the time of planning.
gc.set_threshold(100_000, 20)

# Everything that can be known to be wrong is said here, in one line, before any job starts.
try:
    PLAN = Plan(workflow.configfiles, workflow.config_settings.config)
except UserError as error:
    sys.exit(f"tlora: error: {error}")

COMPARISON = PLAN.comparison

# Snakemake's cache between workflows; where its folder is not named, a cached job would not run.
CACHED = bool(os.environ.get("SNAKEMAKE_OUTPUT_CACHE"))


# What every job of a cell is handed.
ARGUMENTS = (
    "--spec {params.spec:q} --place {params.place:q} "
    "--input {params.inputs:q} --out {params.out:q} --log {log:q}"
)


def described(function):
    """Note a function's parameters where `inspect` finds them at once: Snakemake asks for them
    some 20 times a job."""
    function.__signature__ = inspect.signature(function)
    return function


@functools.cache
def relative(path):
    """Return a path as seen from the working directory, where that is possible."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def pattern(stage, *names):
    """Return an artefact's folder with wildcards; the id alone says what it is."""
    return RESULTS.joinpath(stage, *(f"{{{name}}}" for name in names), "{id}").as_posix()


def unit(stage, wildcards):
    return PLAN.units[stage, wildcards.id]


def code(stage):
    """Input function: the package's files that the job depends on, read off its imports."""
    return described(lambda wildcards: [relative(path) for path in unit(stage, wildcards).code()])


def artefact(stage, name):
    """Input function: the main file of an upstream artefact, nothing where there is none."""

    def find(wildcards):
        upstream = unit(stage, wildcards).inputs.get(name)
        return [] if upstream is None else str(upstream.main)

    return described(find)


def after(stage):
    """Input function: what must have been fetched before. Only that it is there counts: what it is
    stands in the spec."""
    return described(lambda wildcards: [str(one.main) for one in unit(stage, wildcards).after])


def spec(stage):
    """Params function: the canonical spec, the only thing whose change reruns the job."""
    return described(lambda wildcards: canonical(unit(stage, wildcards).spec))


def place(stage):
    """Params function: where and how to compute. Snakemake leaves functions of `threads` out of
    what it compares, so that nothing in here reruns a job."""

    def find(wildcards, threads):
        return json.dumps(unit(stage, wildcards).placement, sort_keys=True)

    return described(find)


def gpus(stage):
    """Resources function: the GPUs that a job computes on where there are any. Snakemake counts
    them where a profile says how many there are; on Slurm the job asks for them."""
    return described(lambda wildcards: wanted(stage, unit(stage, wildcards).placement))


@described
def inputs(wildcards, input):
    """Params function: the upstream artefacts as NAME=PATH."""
    beside = ("code", "after")
    return [f"{name}={path}" for name, path in input.items() if path and name not in beside]


@described
def folder(wildcards, output):
    """Params function: the artefact's folder."""
    return os.path.dirname(output[0])


def printed(wildcards, input):
    """Params function: the numbers that papers print, as NAME=PATH."""
    return [f"published.{Path(path).stem}={path}" for path in input.published]


def labels(wildcards, input):
    """Params function: what people call things. Changing a label reruns nothing; the next table
    that is built shows it."""
    return json.dumps({"labels": PLAN.labels()}, sort_keys=True)


def confirmed(choice):
    """Input function: what the runs leave that the choice's outcome asks for."""
    model, task, method = choice.unit.names

    def find(wildcards):
        checkpoints.choose.get(model=model, task=task, method=method, id=choice.unit.id)
        cells = PLAN.confirm(choice)
        return [
            *(str(cell.units["train"].main) for cell in cells),
            *(str(score.main) for cell in cells for score in cell.scores.values()),
        ]

    return find


wildcard_constraints:
    model="|".join(map(re.escape, PLAN.models)),
    task="|".join([*map(re.escape, PLAN.tasks), "any"]),
    method="[^/]+",
    benchmark="|".join(map(re.escape, [*PLAN.benchmarks, VALIDATION])),
    statistic="[a-z_]+",
    kind="[a-z_]+",
    repository="[^/]+",
    id="[0-9a-f]{12}",
