"""`snakemake --cores all --profile slurm` on a real cluster, undisturbed, and with a training that
Slurm stops in every way it has.

Each stop comes in the middle of the training. Afterwards all results are there: scores and weights
byte for byte those of the run that nothing disturbed, every checksum right, and each run once in
MLflow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest
from cluster.runs import PATIENCE, Run
from cluster.slurm import gone, wait

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]


def test_grid_runs_through_the_profile(undisturbed: Run) -> None:
    """All jobs run where the profile says and leave their logs; a second call finds nothing."""
    undisturbed.check(undisturbed)
    undisturbed.check_mlflow()
    jobs = json.loads(undisturbed.project.folder.parent.with_suffix(".done").read_text())
    assert len(jobs) >= 19 and all("JobState=COMPLETED" in text for text in jobs.values())
    for rule, partition, gpus in (("train", "gpu", 1), ("score", "cpu", 0)):
        found = [text for text in jobs.values() if f"Comment=rule_{rule}_" in text]
        assert len(found) == (3 if rule == "score" else 2)
        for text in found:
            assert f"Partition={partition}" in text
            assert ("gres/gpu=1" in text or "gres:gpu:1" in text) == bool(gpus)
            assert "Requeue=1" in text
    logs = undisturbed.project.path("logs/slurm")
    assert len(list(logs.glob("rule_train/*/*.log"))) == 2
    assert [undisturbed.card(name)["attempts"] for name in ("lora", "tlora")] == [1, 1]


@dataclass
class Stop:
    """What became of a job: of its process, of the job, and the one that went on from there."""

    process: psutil.Process
    job: str
    state: str
    next: str


@dataclass
class Stopped:
    """The run, its stops by name, what each job asked for, and what snakemake said."""

    run: Run
    stops: dict[str, Stop]
    asked: dict[str, dict[str, int]]
    output: str


def _requeue(run: Run, job: str) -> None:
    run.cluster.run("scontrol", "requeue", job)


def _preempt(run: Run, job: str) -> None:
    """Submit to a partition that goes before."""
    node = run.cluster.node_of(job)
    urgent = ["--partition=urgent", f"--nodelist={node}", "--gpus=1", "--output=/dev/null"]
    run.cluster.run("sbatch", *urgent, "--wrap=sleep 1")


def _crash(run: Run, job: str) -> None:
    """Kill a node without warning: no checkpoint on the way out."""
    node = run.cluster.node_of(job)
    run.cluster.crash(node)
    run.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")
    run.cluster.start(node)


def _scancel(run: Run, job: str) -> None:
    run.cluster.run("scancel", job)


def _time_out(run: Run, job: str) -> None:
    run.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")


STOPS = {
    "requeue": _requeue,
    "preemption": _preempt,
    "crash": _crash,
    "scancel": _scancel,
    "timeout": _time_out,
}


@pytest.fixture(scope="module")
def stopped(undisturbed: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    """A run whose training was stopped in all ways, one after the other."""
    with undisturbed.disturbed(tmp_path_factory.mktemp("stopped")) as run:
        # Warned five minutes before, the training would end before its time is up.
        profile = "workflow/profiles/slurm/config.yaml"
        run.project.edit(profile, "--signal=USR1@300", "--nice=0")
        snakemake, stops, wishes = run.start(), {}, {}
        for name, how in STOPS.items():
            job, process = run.training()
            wishes.setdefault(job, asked(run, job))
            how(run, job)
            wait(lambda: gone(process), PATIENCE, f"end of the training after {name}")  # noqa: B023
            if name in ("scancel", "timeout"):
                run.ended(job)
            else:
                run.requeued(job)
            stops[name] = Stop(process, job, run.jobs("train")[job], "")
        output = run.finish(snakemake)
        jobs = [stop.job for stop in stops.values()] + [max(run.jobs("train"), key=int)]
        for stop, following in zip(stops.values(), jobs[1:], strict=True):
            stop.next = following
        wishes[jobs[-1]] = asked(run, jobs[-1])
        yield Stopped(run, stops, wishes, output)


@pytest.mark.parametrize("name", ["requeue", "preemption", "crash"])
def test_slurm_starts_the_job_again(stopped: Stopped, name: str) -> None:
    """Requeued in mid-training, by an operator, for another job or for a dead node: snakemake
    waits, and the job goes on under its number."""
    stop = stopped.stops[name]
    assert stop.next == stop.job
    assert gone(stop.process)


@pytest.mark.parametrize(("name", "state"), [("scancel", "CANCELLED"), ("timeout", "TIMEOUT")])
def test_snakemake_submits_the_job_again(stopped: Stopped, name: str, state: str) -> None:
    """Killed by scancel, or out of time: once more, with more memory and time."""
    stop = stopped.stops[name]
    assert stop.state == state
    assert int(stop.next) > int(stop.job)
    assert gone(stop.process)
    assert f"SLURM-job '{stop.job}' failed, SLURM status is: '{state}'" in stopped.output
    before, after = stopped.asked[stop.job], stopped.asked[stop.next]
    assert after["memory"] > before["memory"]
    # The second retry would ask for more than the profile's `longest`.
    assert after["minutes"] > before["minutes"] or after["minutes"] == 2880


def asked(run: Run, job: str) -> dict[str, int]:
    """Return a job's memory in MB and its limit in minutes."""
    text = run.cluster.run("scontrol", "--oneliner", "show", "job", job)
    memory = re.search(r"MinMemoryNode=([\d.]+)([MG])", text)
    limit = re.search(r"TimeLimit=(?:(\d+)-)?(\d+):(\d+):", text)
    days, hours, minutes = (int(value or 0) for value in limit.groups())
    return {
        "memory": round(float(memory[1]) * {"M": 1, "G": 1024}[memory[2]]),
        "minutes": (days * 24 + hours) * 60 + minutes,
    }


def test_stops_change_no_result(undisturbed: Run, stopped: Stopped) -> None:
    """Five stops, six attempts, each from the checkpoint of the one before."""
    assert stopped.run.card()["attempts"] == 1 + len(STOPS)
    assert set(stopped.run.jobs("train").values()) == {"CANCELLED", "TIMEOUT", "COMPLETED"}
    stopped.run.check(undisturbed)
    stopped.run.check_mlflow()
