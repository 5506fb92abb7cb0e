"""Several processes for one training job: torchrun starts them, each runs the same command.

Source: `torch.distributed.run`, which sets RANK, WORLD_SIZE and what else the processes need to
find each other. `python -m tlora.distributed` is torchrun for these processes: they are told to
stop by a file, because torchrun kills what has not ended 30 seconds after a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlora.artefact import read_json, write_text
from tlora.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm sends a job that is to end, and what `--signal` asks it to send before."""

_STOP, _ERROR = "stop", "error"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
_TASKS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
"""Keys of a DeepSpeed configuration that follow from the task."""


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
        near = [max(s for s in valid if s < micro), min(s for s in valid if s > micro)]
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


def spread(trainer: Any) -> bool:
    """Tell whether a Trainer's weights are spread over the processes (ZeRO-3)."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def whole_state(trainer: Any) -> dict[str, Any] | None:
    """Return weights that are spread over the processes, on the first; None where they are not."""
    if not spread(trainer):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def zero_stage(path: str | Path) -> int:
    """Return the stage of ZeRO in a DeepSpeed configuration.

    Raises
    ------
    UserError
        Where the configuration says what the task, the method or the model says.
    """
    values = read_json(Path(path))
    for key in ("optimizer", "scheduler", "fp16"):
        if key in values:
            raise UserError(f"{path}: {key}: expected none: it follows from task and method")
    for key in _TASKS:
        if values.get(key, "auto") != "auto":
            raise UserError(f'{path}: {key}: {values[key]}: expected "auto": the task says it')
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage: {stage}: expected 1, 2 or 3")
    return stage


def check_deepspeed(path: str | Path, method: Any) -> None:
    """Refuse a stage of ZeRO that a method does not work with.

    Parameters
    ----------
    path
        A DeepSpeed configuration.
    method
        `tlora.methods.Method`; its module's `ZERO` is the highest stage.

    Raises
    ------
    UserError
        Naming the configuration and the method.
    """
    stage, highest = zero_stage(path), getattr(method.module, "ZERO", 3)
    if stage > highest:
        raise UserError(
            f"{path}: zero_optimization.stage: {stage}: expected {highest} at most for the method "
            f"{method.name}"
        )


def check_installed() -> None:
    """Refuse to train with DeepSpeed where there is none.

    Raises
    ------
    UserError
        Saying how to install it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "deepspeed: not installed here: expected what envs/train.lock lists (pip install "
            "'tlora[deepspeed]'), or a model without `deepspeed:`"
        )


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its collectives in shared memory, which only the CPU has.

    That takes a compiler and a minute; without them it uses gloo. Its list of what can be compiled
    is computed when it is first read.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def begin(place: Mapping[str, Any]) -> None:
    """Make this process one of several: it dies with the one that started it, and has its GPU."""
    die_with_parent()
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif place.get("deepspeed"):
        compile_nothing()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, where the kernel can (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def told_to_stop(work: Path) -> int:
    """Return the signal that came to the process that started this one, 0 where none came."""
    with contextlib.suppress(OSError, ValueError):
        return int((work / _STOP).read_text())
    return 0


@contextlib.contextmanager
def reported(work: Path) -> Iterator[None]:
    """Leave what is wrong with a run where the process that started this one says it once."""
    try:
        yield
    except UserError as error:
        write_text(work / _ERROR, str(error))
        raise


def launch(
    stage: str, spec: dict, inputs: Mapping[str, Path], out: Path, place: Mapping[str, Any]
) -> None:
    """Run a stage in `place["processes"]` processes.

    Inside a Slurm job of several nodes, srun starts one torchrun a node, which meet at the first
    node of the job. After SIGTERM or SIGUSR1 the processes have as long as they need for the step
    they are in and a checkpoint.

    Raises
    ------
    UserError
        When one of the processes failed: with what it said is wrong, else it stands on stderr.
    SystemExit
        After a signal.
    """
    count, nodes = processes(place), int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if count % nodes:
        raise UserError(f"processes: {count}: expected a multiple of the {nodes} nodes of the job")
    command = [sys.executable, "-m", "tlora.distributed", "--nproc-per-node", str(count // nodes)]
    if nodes == 1:
        command += ["--standalone"]
    else:
        job = os.environ["SLURM_JOB_ID"]
        # Above the ports of services, below those that the kernel hands out.
        port = 20000 + int(job) % 12000
        command += ["--nnodes", str(nodes), "--rdzv-id", job, "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{_first_node()}:{port}"]
        # The step that this process is in holds the job's resources.
        srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        command = [*srun, *command]
    # Without the dashes torchrun would look for options of its own in what follows.
    command += ["-m", "--", "tlora.cli", stage, "--spec", json.dumps(spec)]
    command += ["--input", *(f"{name}={path}" for name, path in inputs.items())]
    command += ["--out", str(out), "--place", json.dumps(place)]
    if place.get("log"):
        command += ["--log", place["log"]]
    work = Path(place["work"])
    for name in (_STOP, _ERROR):
        (work / name).unlink(missing_ok=True)
    came = []

    def pass_on(number: int, _frame: Any) -> None:
        came.append(number)
        write_text(work / _STOP, str(number))

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    child = subprocess.Popen(command)
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
    if status and came:
        sys.exit(128 + came[0])
    if status:
        error = work / _ERROR
        if error.is_file():
            raise UserError(error.read_text(encoding="utf-8"))
        raise UserError(f"{stage}: one of {count} processes failed (exit status {status})")


def _first_node() -> str:
    listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()[0]


def _torchrun(arguments: Sequence[str]) -> None:
    """Be torchrun, deaf to the signals that the processes are told of by a file."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as error:
        # What happened was said by the process that it happened to.
        sys.exit(max([1, *(failure.exitcode for failure in error.failures.values())]))


if __name__ == "__main__":
    _torchrun(sys.argv[1:])
