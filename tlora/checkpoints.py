"""Checkpoints of a run under way: finding whole ones, and making one when a signal comes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tlora.artefact import remove, sha256_file, write_json
from tlora.distributed import SIGNALS, largest_of_all, rank, told_to_stop

MANIFEST = "manifest.json"
THREADS = 8


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest whole checkpoint; torn ones are passed over.

    The processes of a job all ask, but only what was looked through by `delete_torn` before they
    started is there: they need not read it again.
    """
    return next((path for path in _newest_first(work) if (path / MANIFEST).is_file()), None)


def delete_torn(work: Path) -> None:
    """Delete checkpoints that a killed process left half written, or that were damaged later."""
    for path in _newest_first(work):
        if not _whole(path):
            remove(path)


def _newest_first(work: Path) -> list[Path]:
    found = work.glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def seal(checkpoint: Path) -> None:
    """Write down what a finished checkpoint holds; every process must call this, after saving."""
    largest_of_all(0)  # all have saved their part
    if rank() == 0:
        write_json(checkpoint / MANIFEST, _content(checkpoint))


def _content(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files = [path for path in files if path != checkpoint / MANIFEST]
    # Optimizer states may take 100 GB, and Slurm waits only so long.
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(sha256_file, files)
    names = [path.relative_to(checkpoint).as_posix() for path in files]
    return dict(zip(names, digests, strict=True))


def _whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is sealed, and as it was when it was."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text("utf-8")) == _content(checkpoint)
    except (OSError, ValueError):
        return False


def stop_callback(work: Path) -> Any:
    """Return a Trainer callback that saves and stops after the step in which a signal came.

    Its `signal` is the signal's number, 0 while none came; `listening()` is a context in which
    signals are heeded. A signal to the process that started this one counts as well.

    Parameters
    ----------
    work
        Folder of the run's partial state.
    """
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        signal = 0
        came = 0

        @contextlib.contextmanager
        def listening(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self._note) for number in SIGNALS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def _note(self, number: int, _frame: Any) -> None:
            self.came = number

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank() == 0 and not self.came:
                self.came = told_to_stop(work)
            # It may have reached one process a step earlier than another: they stop together.
            self.signal = largest_of_all(self.came)
            if self.signal:
                control.should_save = control.should_training_stop = True

    return Stop()
