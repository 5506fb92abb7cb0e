"""Which GPUs a job computes on: no two jobs of a machine share one by accident.

Snakemake counts GPUs but assigns none. A job therefore claims as many as it needs by locks, which
the kernel releases when its process ends, however it ends. Source of the number: `nvidia-smi -L`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tlora.distributed import launched, processes
from tlora.errors import UserError

logger = logging.getLogger(__name__)

STAGES = frozenset({"calibrate", "initialize", "train", "check", "generate"})
"""Stages that compute on a GPU where there is one; all but training on one."""
LOCKS = Path("results/.work/devices")
SECONDS = 0.5

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[IO[str]] = []  # open files: closing one would give its GPU back


def wanted(stage: str, place: Mapping[str, Any]) -> int:
    """Return how many GPUs of this machine a job computes on where there are GPUs."""
    if stage not in STAGES:
        return 0
    if stage != "train":
        return 1
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    return max(place.get("gpus") or 1, processes(place)) // nodes


def claim(stage: str, place: Mapping[str, Any], locks: Path = LOCKS) -> list[str]:
    """Give this process GPUs of its own, waiting until they are free; set what CUDA sees.

    To be called before torch is imported. Nothing happens without a GPU, in a process that
    torchrun started, and where another program, such as Slurm, gave no more than is wanted.

    Parameters
    ----------
    stage, place
        The job's.
    locks
        Folder that all jobs of the machine share.

    Returns
    -------
    list of str
        What `CUDA_VISIBLE_DEVICES` names; [] where nothing happened.

    Raises
    ------
    UserError
        Where the job wants more GPUs than there are.
    """
    count = wanted(stage, place)
    known = [] if launched() or not count else devices()
    job = os.environ.get("SLURM_JOB_ID")
    # Inside Slurm the numbers mean this job's GPUs, whatever other jobs of the node call theirs.
    if not known or (job and len(known) <= count):
        return []
    if count > len(known):
        raise UserError(f"gpus: {count}: expected at most {len(known)}, the GPUs of this machine")
    locks.mkdir(parents=True, exist_ok=True)
    prefix = platform.node() + (f".{job}" if job else "")
    mine = _wait(count, known, locks, prefix)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's
    os.environ[_VISIBLE] = ",".join(mine)
    logger.info("GPUs: %s", ", ".join(mine))
    return mine


def devices() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    given = os.environ.get(_VISIBLE)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # Without a driver it fails, and says so on stdout.
    return _listed(done.stdout) if done.returncode == 0 else []


def _listed(text: str) -> list[str]:
    """Return the GPUs of `nvidia-smi -L`: numbers, and names of what MIG made of a GPU."""
    found: list[str] = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            found.append(gpu[1])
        elif part := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line):
            if found and found[-1].isdigit():
                found.pop()
            found.append(part[1])
    return found


def _wait(count: int, known: list[str], locks: Path, prefix: str) -> list[str]:
    """Lock as many devices as wanted; one job at a time collects, so that none waits for ever."""
    mine: list[str] = []
    with open(locks / f"{prefix}.queue", "w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        said = False
        while True:
            for name in known:
                if len(mine) == count:
                    return mine
                if name not in mine and _lock(locks / f"{prefix}.{name.replace('/', '-')}"):
                    mine.append(name)
            if len(mine) == count:
                return mine
            if not said:
                logger.warning("waiting for %d of %d GPUs", count - len(mine), len(known))
                said = True
            time.sleep(SECONDS)


def _lock(path: Path) -> bool:
    """Lock a file until this process ends; False where another process has it."""
    file = open(path, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _held.append(file)
    return True
