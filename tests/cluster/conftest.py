"""A throw-away Slurm, and a checkout whose grid ran through it undisturbed."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import copy_checkout
from cluster.runs import Run
from cluster.slurm import SYSTEM, Cluster, running, taken, why_not
from workflow.project import Project, make_tools

CLONE_NEWNS = 0x00020000

# The demo in small: enough steps to be disturbed in between.
PRESET = """\
models: [tiny]
tasks: [arithmetic]
methods: [lora, tlora]
seeds: [1]
set:
  data.train: 244
  data.validation: 4
  data.test: 8
  batch_size: 4
  calibration_samples: 4
overrides:
  - {benchmarks: [arithmetic], set: {data.test: 8, max_new_tokens: 4}}
"""

# Seconds that a test need not wait: for slow shared storage, and before the first look at a job.
QUICK = {
    "latency-wait: 60": "latency-wait: 10",
    "slurm-init-seconds-before-status-checks: 20": "slurm-init-seconds-before-status-checks: 1",
}
# The executor looks at its jobs ever more rarely while none succeeds: ten seconds later each time.
LOOKS = """

import asyncio

from snakemake_executor_plugin_slurm import Executor

Executor.sleep = lambda executor: asyncio.sleep(2)
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.slow)


def _own_system_folder() -> bool:
    """Give this process and those below it an /etc/slurm of their own, where that is allowed."""
    SYSTEM.mkdir(parents=True, exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return False
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(SYSTEM)], check=True)
    return True


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster; the test is skipped, with the reason, where there can be none."""
    with open(Path(tempfile.gettempdir()) / "throwaway-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if reason := why_not():
            pytest.skip(reason)
        if _own_system_folder():
            # Other processes of pytest have clusters of their own.
            fcntl.flock(lock, fcntl.LOCK_UN)
        elif reason := taken():
            pytest.skip(reason)
        with running() as started:
            yield started


def _checkout(root: Path, folder: Path) -> Project:
    """Copy the project; its default preset is the small one."""
    copy_checkout(root, folder)
    (folder / "config" / "config.yaml").write_text(PRESET, encoding="utf-8")
    project = Project(folder, make_tools(folder.with_name("tools")))
    for old, new in QUICK.items():
        project.edit("workflow/profiles/slurm/config.yaml", old, new)
    project.append("Snakefile", LOOKS)
    return project


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small grid after one run of `snakemake --cores all --profile slurm`.

    Not to be changed: copy it. Made once for all processes of pytest; beside it lies, in
    `undisturbed.done`, what Slurm said of its jobs.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / "undisturbed" / "checkout", base / "undisturbed.done"
    with open(base / "undisturbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.is_file():
            return Run(Project(folder, folder.with_name("tools")), cluster)
        assert not folder.exists(), "the undisturbed run failed"
        run = Run(_checkout(root, folder), cluster)
        output = run.snakemake()
        assert re.search(r"(\d+) of \1 steps \(100%\) done", output), output[-2000:]
        # The cluster, which ends with this process, will not be there to be asked.
        done.write_text(json.dumps(run.jobs_in_full()), encoding="utf-8")
        return run


@pytest.fixture
def disturbed(undisturbed: Run, tmp_path: Path) -> Iterator[Run]:
    """A copy of the finished checkout that lacks one run, to be disturbed at will."""
    with undisturbed.disturbed(tmp_path) as run:
        yield run
