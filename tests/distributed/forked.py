"""Runs training jobs of several processes one after the other: `python forked.py JOBS.json`.

Every process of a job is a fork of this one, which has imported everything: starting them from
nothing takes ten seconds each. What torchrun would tell them, they are told here; torchrun itself
is tested with few jobs.

JOBS.json: a list of {"spec", "inputs", "out", "place"} of the stage `train`, and "kill": steps,
at each of which all processes kill themselves before one more attempt. Of a job that fails, the
output ends with its processes' tracebacks; the others go on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(function: Callable[[], None], processes: int, alone: bool) -> list[int]:
    """Run a function in forks of this process; return their wait statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if not alone:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "test",
                }
            status = 1
            try:
                function()
                status = 0
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def attempt(job: dict[str, Any], kill: int | None) -> None:
    """Train once; return where it succeeded, or was killed as it was to be.

    Raises
    ------
    RuntimeError
        Otherwise.
    """
    from tlora.stages import train as stage

    place, inputs = job["place"], {name: Path(path) for name, path in job["inputs"].items()}
    row = stage.Log.row

    def killing(log: Any, at: int, values: dict[str, float]) -> Any:
        if at == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return row(log, at, values)

    def train() -> None:
        stage.Log.row = killing
        stage.train(job["spec"], inputs, Path(job["out"]), place)

    def launch(*_: Any) -> None:
        statuses.extend(run(train, place["processes"], alone=False))

    statuses: list[int] = []
    alone = place["processes"] == 1 and not place.get("deepspeed")
    if alone:
        statuses.extend(run(train, 1, alone=True))
    else:
        # What a job does before it starts its processes, and then they.
        stage.launch = launch
        stage.train(job["spec"], inputs, Path(job["out"]), place)
    expected = 0 if kill is None else signal.SIGKILL
    if statuses != [expected] * place["processes"]:
        raise RuntimeError(f"wait statuses {statuses}: expected {expected}")


def main(jobs: list[dict[str, Any]]) -> int:
    """Run all jobs; return how many failed."""
    import torch

    torch.set_num_threads(1)
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import transformers

    transformers.Trainer  # noqa: B018
    if any(job["place"].get("deepspeed") for job in jobs):
        import deepspeed  # noqa: F401
    failed = 0
    for job in jobs:
        try:
            for kill in [*job.get("kill", []), None]:
                attempt(job, kill)
        except Exception:
            failed += 1
            print(f"failed: {job['out']}", file=sys.stderr)
            traceback.print_exc()
    return failed


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
