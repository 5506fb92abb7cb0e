"""Runs training jobs of several processes one after the other: `python forked.py JOBS.json`.

Every process of a job is a fork of this one, which has imported everything: starting them from
nothing takes ten seconds each. What torchrun would tell them, they are told here; torchrun itself
is tested with few jobs.

JOBS.json: a list of {"spec", "inputs", "out", "place"} of the stage `train`, and "faults": what
happens to the attempts before the last one, each [what, step]:

kill    all processes are killed when they log the step
torn    all processes are killed half-way through saving the step's checkpoint
full    the disk is full for the optimizer's state of the step's checkpoint

Of a job that fails otherwise, the output has its processes' tracebacks; the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKERS = 2
PATIENCE = 30
"""Seconds that processes may go on when another one of their job has failed."""
STATUS = {"kill": signal.SIGKILL, "torn": signal.SIGKILL, "full": 1 << 8, None: 0}


class Ended(Exception):
    """The processes ended otherwise than well."""


def run(function: Callable[[], None], processes: int, alone: bool) -> list[int]:
    """Run a function in forks of this process; return their wait statuses."""
    if alone:
        return [os.waitpid(fork(function), 0)[1]]
    meeting, port = meeting_point()
    told = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    children = [
        fork(function, {**told, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(processes)
    ]
    try:
        return ended(children)
    finally:
        os.kill(meeting, signal.SIGKILL)
        os.waitpid(meeting, 0)


def meeting_point() -> tuple[int, int]:
    """Start the process where others meet, as torchrun's agent is; return its id and port.

    It listens from the start: a port that is free when looked for may be taken when used.
    """
    reading, writing = os.pipe()

    def listen() -> None:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        os.close(writing)
        signal.pause()

    child = fork(listen)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return child, int(pipe.read())


def ended(children: list[int]) -> list[int]:
    """Return the wait statuses; what still runs a while after one has failed is killed."""
    statuses: dict[int, int] = {}
    end = None
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = status
        if any(statuses.values()):
            end = end or time.monotonic() + PATIENCE
            if time.monotonic() > end:
                for child in set(children) - set(statuses):
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def fork(function: Callable[[], None], environment: dict[str, str] | None = None) -> int:
    """Run a function in a fork of this process, with more in its environment; return its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= environment or {}
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def plant(stage: Any, what: str, step: int, work: Path) -> None:
    """Make a fault happen in this process."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    from transformers import Trainer

    row, save = stage.Log.row, Trainer._save_rng_state

    def logging(log: Any, at: int, values: dict[str, float]) -> Any:
        if at == step and what == "kill":
            kill()
        if at == step and what == "full" and os.environ.get("RANK", "0") == "0":
            folder = work / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "optimizer.pt").symlink_to("/dev/full")
        return row(log, at, values)

    def saving(trainer: Any, folder: str) -> None:
        if what == "torn" and trainer.state.global_step == step:
            kill()
        save(trainer, folder)

    stage.Log.row, Trainer._save_rng_state = logging, saving


def attempt(job: dict[str, Any], what: str | None, step: int) -> None:
    """Train once; return where it succeeded, or ended as it was to end.

    Raises
    ------
    Ended
        Otherwise.
    """
    from tlora.stages import train as stage

    place, inputs = job["place"], {name: Path(path) for name, path in job["inputs"].items()}

    def train() -> None:
        if what is not None:
            plant(stage, what, step, Path(place["work"]))
        stage.train(job["spec"], inputs, Path(job["out"]), place)

    def launch(*_: Any) -> None:
        statuses.extend(run(train, place["processes"], alone=False))
        if any(statuses):
            raise Ended

    statuses: list[int] = []
    if place["processes"] == 1 and not place.get("deepspeed"):
        statuses.extend(run(train, 1, alone=True))
    else:
        # What a job does before it starts its processes, they, and what it does afterwards.
        stage.launch = launch
        with contextlib.suppress(Ended):
            stage.train(job["spec"], inputs, Path(job["out"]), place)
    if statuses != [STATUS[what]] * place["processes"]:
        raise Ended(f"{job['out']}: wait statuses {statuses}: expected {STATUS[what]}")


def prepare(jobs: list[dict[str, Any]]) -> None:
    """Import what the processes will import, and fill caches of theirs."""
    import torch

    torch.set_num_threads(1)
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers

    for kind, path in {(j["spec"]["model"]["architecture"], j["place"]["model"]) for j in jobs}:
        name = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}[kind]
        getattr(transformers, name).from_pretrained(path)
    transformers.Trainer  # noqa: B018
    if any(job["place"].get("deepspeed") for job in jobs):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  (compiles: imports much)
    gc.freeze()


def main(jobs: list[dict[str, Any]]) -> int:
    """Run all jobs, some at a time; return 0 where this itself went well."""
    prepare(jobs)

    def work() -> None:
        for job in jobs[len(workers) :: WORKERS]:
            try:
                for what, step in [*job.get("faults", []), (None, 0)]:
                    attempt(job, what, step)
            except Exception:
                traceback.print_exc()

    workers: list[int] = []
    while len(workers) < WORKERS:
        workers.append(fork(work))
    return max(os.waitpid(worker, 0)[1] for worker in workers)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
