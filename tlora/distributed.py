"""Several processes for one training job: torchrun starts them, each runs the same command.

Source: `torch.distributed.run`, which sets RANK, WORLD_SIZE and what else the processes need to
find each other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlora.errors import UserError


def world_size() -> int:
    """Return the number of processes of this training job; 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which of the processes this is, from 0; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def processes(place: Mapping[str, Any]) -> int:
    """Return how many processes a job is to have, over all nodes."""
    return int(place.get("processes") or 1)


def split(batch_size: int, micro_batch: int | None, devices: int) -> tuple[int, int]:
    """Return samples a forward pass, and passes an optimizer step, of each process.

    Parameters
    ----------
    batch_size
        Samples an optimizer step, over all processes.
    micro_batch
        Samples a forward pass at most; None for as many as there are.
    devices
        Processes.

    Raises
    ------
    UserError
        Where the batch does not divide, with the nearest sizes that do.
    """
    if batch_size % devices:
        below = batch_size // devices * devices
        near = [size for size in (below, below + devices) if size]
        raise UserError(
            f"batch_size: {batch_size}: expected a multiple of the {devices} processes; "
            f"nearest: {', '.join(map(str, near))}"
        )
    share = batch_size // devices
    micro = min(micro_batch or share, share)
    if share % micro:
        valid = [size for size in range(1, share + 1) if share % size == 0]
        near = sorted(sorted(valid, key=lambda size: abs(size - micro))[:2])
        raise UserError(
            f"micro_batch: {micro}: expected a divisor of {share}, the batch size {batch_size} "
            f"over {devices} processes; nearest: {', '.join(map(str, near))}"
        )
    return micro, share // micro


def largest_of_all(value: int) -> int:
    """Return the largest value of all processes; every one of them must call this."""
    if world_size() == 1:
        return value
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor)


def whole_state(trainer: Any) -> dict[str, Any] | None:
    """Return the model's weights where they are spread over the processes (ZeRO-3), else None."""
    config = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if config is None or config.zero_stage < 3:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its collectives in shared memory, which only the CPU has.

    That takes a compiler and a minute; without them it uses gloo. Its list of what can be compiled
    is computed when it is first read.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def launch(
    stage: str, spec: dict, inputs: Mapping[str, Path], out: Path, place: Mapping[str, Any]
) -> None:
    """Run a stage in `place["processes"]` processes.

    Inside a Slurm job of several nodes, srun starts one torchrun a node, which meet at the first
    node of the job. After SIGTERM or SIGUSR1 the processes have time for a checkpoint.

    Raises
    ------
    UserError
        When one of the processes failed; what it said stands above on stderr.
    SystemExit
        After a signal.
    """
    count, nodes = processes(place), int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if count % nodes:
        raise UserError(f"processes: {count}: expected a multiple of the {nodes} nodes of the job")
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(count // nodes)]
    if nodes == 1:
        command += ["--standalone"]
    else:
        job = os.environ["SLURM_JOB_ID"]
        # Above the ports that services use, and another one for every job of a node.
        port = 20000 + int(job) % 20000
        command += ["--nnodes", str(nodes), "--rdzv-id", job, "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{_first_node()}:{port}"]
        command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", *command]
    command += ["-m", "tlora.cli", stage, "--spec", json.dumps(spec)]
    command += ["--input", *(f"{name}={path}" for name, path in inputs.items())]
    command += ["--out", str(out), "--place", json.dumps(place)]
    if place.get("log"):
        command += ["--log", place["log"]]
    child = subprocess.Popen(command)
    came = []

    def pass_on(number: int, _frame: Any) -> None:
        came.append(number)
        # torchrun heeds SIGTERM alone; it waits for its processes.
        child.send_signal(signal.SIGTERM)

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
    if came:
        sys.exit(128 + came[0])
    if status:
        raise UserError(f"{stage}: one of {count} processes failed (exit status {status})")


def _first_node() -> str:
    listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()[0]
