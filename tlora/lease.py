"""One writer a folder, also on shared storage and over several hosts: a lock kept alive.

Who wants a folder creates the next of its numbered claims, `000001`, `000002`, ...; creating a file
exclusively is atomic on local file systems, on NFS from version 3 and on parallel file systems,
where `flock` may be local to a host or missing. The highest number holds; a claim is taken over by
creating the next number, so that of any number of waiters one succeeds, and a number is never used
twice. The owner changes its claim every few seconds. A waiter counts how often it looked and saw
no change: clocks of hosts are compared nowhere, and storage that hangs makes nobody look dead. An
owner that was taken over, or could have been, ends at once.

Source: C. Gray, D. Cheriton: Leases, SOSP 1989.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tlora.artefact import sha256_file, write_json

logger = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between an owner's signs of life."""
LOOK = 1.0
"""Seconds between a waiter's looks."""
PATIENCE = 120
"""Looks without a change after which an owner counts as dead."""
GONE = 12
"""The same for an owner whose process is known to be gone; its children may still write."""

INHERITED = "TLORA_LEASE"
"""Environment variable: the claim that a process above this one holds."""
CONTROLLER = "TLORA_CONTROLLER"
"""Environment variable: the numbered file of the snakemake that submitted this job."""

LENGTH = 512
"""Bytes of a claim: overwritten in place, it needs no space on a full disk."""


class Claim:
    """A folder's lease while it is held.

    Attributes
    ----------
    path
        The numbered file.
    waited
        Whether another one held the folder when this one came.
    """

    def __init__(self, path: Path, waited: bool, inherited: bool) -> None:
        self.path, self.waited, self.inherited = path, waited, inherited
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def start(self) -> None:
        """Begin to show signs of life."""
        self._thread.start()

    def release(self) -> None:
        """Let go; an inherited claim stays with the process above."""
        self._stop.set()
        self._thread.join()
        if not self.inherited:
            with contextlib.suppress(OSError):
                _write(self.path, free=True)

    def _beat(self) -> None:
        count, heard = 0, time.monotonic()
        while not self._stop.wait(BEAT):
            count += 1
            try:
                _write(self.path, beat=count)
                lost = _numbers(self.path.parent)[-1:] != [int(self.path.name)]
                heard = time.monotonic()
            except FileNotFoundError:
                lost = True
            except OSError as error:
                logger.warning("%s: %s", self.path, error.strerror)
                lost = time.monotonic() - heard > 0.75 * PATIENCE * LOOK
            if lost:
                logger.critical("%s: taken over, or could be: this job ends", self.path.parent)
                os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, out: Path, stamp: str) -> None:
        """Write down that the folder's artefact is whole, and what it was made from.

        Parameters
        ----------
        out
            The artefact's folder.
        stamp
            Hash of what decides the result (`stamp_of`).
        """
        record = {
            "claim": int(self.path.name),
            "controller": _newest_controller(),
            "stamp": stamp,
            "files": _sizes(out),
        }
        write_json(self.path.parent / "finished", record)

    def finished_meanwhile(self, out: Path, stamp: Callable[[], str]) -> bool:
        """Tell whether another job made this job's artefact after this one was asked for it.

        That is while this one waited, or since its snakemake began: what was made before then is
        there to be made again.
        """
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads((self.path.parent / "finished").read_text(encoding="utf-8"))
            began = os.environ.get(CONTROLLER)
            later = self.waited and record["claim"] == int(self.path.name) - 1
            later |= bool(began) and (record["controller"] or 0) >= int(Path(began).name)
            present = _sizes(out)
            whole = all(present.get(name) == size for name, size in record["files"].items())
            return later and whole and record["stamp"] == stamp()
        return False


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Claim]:
    """Hold a folder's lease; wait while another process has it.

    A process below one that holds it shares it. SIGTERM and SIGUSR1 end the process orderly while
    it is held, where the main thread has no other use for them.

    Parameters
    ----------
    folder
        Where the claims lie; made where there is none.
    """
    claim = take(folder)
    before = _heed_signals()
    try:
        yield claim
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if not claim.inherited:
            os.environ.pop(INHERITED, None)
        claim.release()


def take(folder: Path) -> Claim:
    """Return a folder's lease as soon as no other has it; the caller releases it."""
    folder = folder.resolve()
    above = os.environ.get(INHERITED)
    if above and Path(above).parent == folder:
        claim = Claim(Path(above), waited=False, inherited=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        claim = _take(folder)
        os.environ[INHERITED] = str(claim.path)
    claim.start()
    return claim


def _take(folder: Path) -> Claim:
    waited, looks, seen = False, 0, None
    while True:
        numbers = _numbers(folder)
        number = numbers[-1] if numbers else 0
        content = _read(_name(folder, number)) if number else b""
        state = _parse(content)
        looks, seen = (looks + 1 if (number, content) == seen else 0), (number, content)
        dead = looks >= (GONE if _gone(state) else PATIENCE)
        if number == 0 or state.get("free") or dead:
            if dead:
                logger.warning("%s: no sign of life from %s: taken over", folder, _who(state))
            claim = _create(folder, number + 1)
            if claim is not None:
                return Claim(claim, waited, inherited=False)
        if not waited:
            waited = True
            logger.warning("waiting for %s, which %s holds", folder, _who(state))
        time.sleep(LOOK)


def _create(folder: Path, number: int) -> Path | None:
    """Create a claim; None where another was faster."""
    path = _name(folder, number)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o664))
    except FileExistsError:
        return None
    try:
        _write(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    numbers = _numbers(folder)
    if numbers[-1] != number:
        # The list of claims that this one followed was old.
        path.unlink(missing_ok=True)
        return None
    for old in numbers[:-1]:
        _name(folder, old).unlink(missing_ok=True)
    return path


def _name(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def _numbers(folder: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _parse(content: bytes) -> dict[str, Any]:
    """Return a claim's content; nothing for one that is just being written."""
    try:
        return json.loads(content)
    except ValueError:
        return {}


def _write(path: Path, **state: Any) -> None:
    """Overwrite a claim in place; `FileNotFoundError` where it is gone."""
    known = {
        "job": os.environ.get("SLURM_JOB_ID"),
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "birth": _birth(os.getpid()),
    }
    content = json.dumps(known | state).encode().ljust(LENGTH)
    handle = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(handle, content, 0)
        os.fsync(handle)
    finally:
        os.close(handle)


def _machine() -> str | None:
    """Return what two processes share that can see each other in /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _birth(pid: int) -> str | None:
    """Return when a process began, None where there is none; a zombie is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _gone(state: Mapping[str, Any]) -> bool:
    """Tell whether the process that wrote a claim last is known to be gone."""
    machine = _machine()
    if machine is None or state.get("machine") != machine:
        return False
    return _birth(state["pid"]) != state["birth"]


def _who(state: Mapping[str, Any]) -> str:
    if not state:
        return "another process"
    job = f"Slurm job {state['job']}, " if state.get("job") else ""
    return f"{job}process {state['pid']} on {state['host']}"


def _heed_signals() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGUSR1)
        if signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN)
    ]
    return {number: signal.signal(number, end) for number in numbers}


# ---------------------------------------------------------------- what a job would make


def lease_folder(stage: str, out: Path) -> Path:
    """Return where the claims on a stage's output lie.

    Parameters
    ----------
    out
        The artefact's folder. All presets are tracked in one store, one at a time.
    """
    return (out.parent if stage == "track" else out) / ".lease" / stage


def stamp_of(stage: str, spec: Mapping[str, Any], inputs: Mapping[str, Path]) -> str:
    """Return what decides a job's result: a hash of the spec, the inputs' content and the code's.

    Parameters
    ----------
    inputs
        Main file of every artefact that is read; each vouches for what lies beside it.
    """
    from tlora.code import stage_files
    from tlora.spec import canonical

    parts = [canonical(spec)]
    parts += [f"{name} {sha256_file(path)}" for name, path in sorted(inputs.items())]
    parts += [f"{path.name} {sha256_file(path)}" for path in stage_files(stage, spec)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sizes(out: Path) -> dict[str, int]:
    """Return the size of every file of an artefact; hidden ones are no part of it."""
    return {
        name: path.stat().st_size
        for path in sorted(out.rglob("*"))
        if path.is_file() and not (name := path.relative_to(out).as_posix()).startswith(".")
    }


def new_controller(folder: Path) -> None:
    """Number this snakemake, so that its jobs know what was made after it began.

    Parameters
    ----------
    folder
        Where the numbers lie, shared by all that work on the same results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = _numbers(folder)
        path = _name(folder.resolve(), numbers[-1] + 1 if numbers else 1)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o664))
            break
    for old in numbers:
        _name(folder, old).unlink(missing_ok=True)
    os.environ[CONTROLLER] = str(path)


def _newest_controller() -> int | None:
    began = os.environ.get(CONTROLLER)
    return max(_numbers(Path(began).parent), default=None) if began else None
