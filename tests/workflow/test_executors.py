"""The same workflow where another program than Slurm starts the jobs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from workflow.project import Project, labels

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

# A scheduler of two commands: the first starts a job in the background and prints its number, the
# second tells what became of it.
SUBMIT = """\
#!/bin/bash
number=$(ls {queue} | wc -l)
touch {queue}/$number
echo "$1 ${{*: -1}}" >> {queue}.submitted
setsid bash -c 'bash "$1" > "$2.log" 2>&1; echo $? > "$2"' - "${{*: -1}}" {queue}/$number \\
    > /dev/null 2>&1 < /dev/null &
echo $number
"""
STATUS = """\
#!/bin/bash
case "$(cat {queue}/$1)" in "") echo running ;; 0) echo success ;; *) echo failed ;; esac
"""


@pytest.fixture
def scheduler(tmp_path: Path) -> list[str]:
    """Arguments that put a scheduler's commands into the shipped profile."""
    queue = tmp_path / "queue"
    queue.mkdir()
    for name, text in (("submit", SUBMIT), ("status", STATUS)):
        path = tmp_path / name
        path.write_text(text.format(queue=queue), encoding="utf-8")
        path.chmod(0o755)
    return [
        *("--profile", "workflow/profiles/generic"),
        *("--cluster-generic-submit-cmd", f"{tmp_path}/submit {{resources.mem_mb}}"),
        *("--cluster-generic-status-cmd", f"{tmp_path}/status"),
    ]


def test_dry_run_by_another_executor(fresh: Project, scheduler: list[str], jobs: dict) -> None:
    """A profile is all that differs; the jobs are the same."""
    announced = fresh.dry(*scheduler, "--cores", "all")
    assert labels(announced) == sorted(jobs)


def test_run_by_another_executor(
    fresh: Project, finished: Project, scheduler: list[str], tmp_path: Path
) -> None:
    """Jobs are submitted with their resources, hold their lease, and make the same scores."""
    scores = sorted(
        path.relative_to(finished.folder)
        for path in finished.path("results").glob("score/*/*/lora/*/*/score.json")
    )
    assert len(scores) == 1
    fresh.environment["TLORA_FORKS"] = "off"
    fresh.snakemake(*scheduler, "--cores", "all", str(scores[0]))
    assert fresh.path(str(scores[0])).read_bytes() == finished.path(str(scores[0])).read_bytes()
    submitted = (tmp_path / "queue.submitted").read_text().split()[::2]
    assert len(submitted) >= 6
    assert sorted(set(submitted)) == ["64000", "8000"], "training asks for more memory"
    train = json.loads(next(fresh.path("results").glob("train/*/*/*/*/train.json")).read_text())
    assert train["attempts"] == 1
    assert os.path.isdir(fresh.path("results/.work"))
    # Nothing is left to do for a local run, and nothing was locked.
    assert not fresh.dry("--cores", "2", str(scores[0]))
