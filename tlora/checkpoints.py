"""Checkpoints of a run under way: finding whole ones, and making one when a signal comes."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tlora.artefact import remove, sha256_file, write_json
from tlora.distributed import largest_of_all, rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm sends a job that is to end, and what `--signal` asks it to send before."""


MANIFEST = "manifest.json"
LARGE = 2**28
"""Bytes above which a file's content is not hashed."""


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest whole checkpoint; torn ones are passed over."""
    return next((path for path in _newest_first(work) if _whole(path)), None)


def delete_torn(work: Path) -> None:
    """Delete checkpoints that a killed process left half written."""
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


def _content(checkpoint: Path) -> dict[str, list[Any]]:
    """Return size and SHA-256 of every file; large ones by size alone."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            size = path.stat().st_size
            name = path.relative_to(checkpoint).as_posix()
            found[name] = [size, sha256_file(path) if size <= LARGE else None]
    return found


def _whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is sealed, and as it was when it was."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text("utf-8")) == _content(checkpoint)
    except (OSError, ValueError):
        return False


def stop_callback() -> Any:
    """Return a Trainer callback that saves and stops after the step in which a signal came.

    Its `signal` is the signal's number, 0 while none came; `listening()` is a context in which
    signals are heeded.
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
            # It may have reached one process a step earlier than another: they stop together.
            self.signal = largest_of_all(self.came)
            if self.signal:
                control.should_save = control.should_training_stop = True

    return Stop()
