"""A process that has the libraries loaded and forks for every job of one machine.

Loading torch, transformers and PEFT takes seconds of processor time, which a workflow of many small
jobs would pay once a job. Snakemake starts a server where jobs run on its own machine; `tlora`, as
it is called by a job, hands what it was called with to a fork of the server, which runs the same
command as if it had been started afresh: same arguments, folder, environment, files and modules of
this package. The caller passes signals on and ends as the fork does.

Not used with a GPU: CUDA does not survive a fork once any library has touched it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import NoReturn

VERBS = frozenset({"prepare", "calibrate", "initialize", "train", "export", "check", "generate"})
"""Stages that load what the server has loaded; the others start faster by themselves."""
VARIABLE = "TLORA_FORKS"
"""Environment variable: the server's socket; "off" where none is wanted."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_begun: list[subprocess.Popen[bytes]] = []  # dropping one would close its pipe
_LONGEST = 100  # bytes that the path of a socket may have everywhere


def begin() -> None:
    """Start a server for the jobs of this process, which ends with it.

    Nothing happens where `TLORA_FORKS` is "off", or there is a GPU, or on other systems than Linux.
    """
    import shutil
    import tempfile

    from tlora.devices import devices

    if os.environ.get(VARIABLE) or sys.platform != "linux" or devices():
        return
    folder = tempfile.mkdtemp(prefix="tlora-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = os.path.join(folder, "socket")
    if len(os.fsencode(path)) > _LONGEST:
        return
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(128)  # who calls from now on waits until the server has loaded all
        number = listening.fileno()
        code = f"import sys; sys.path[:] = {sys.path!r}; from tlora.forks import serve"
        # It ends when the pipe is closed, also by the death of this process; a terminal's signals
        # reach jobs by those who called.
        server = subprocess.Popen(
            [sys.executable, "-c", f"{code}; serve({number})"],
            stdin=subprocess.PIPE,
            pass_fds=[number],
            start_new_session=True,
        )
    _begun.append(server)
    os.environ[VARIABLE] = path


def handed_over() -> int | None:
    """Have the server run what this process was called with; None where there is no server.

    Returns
    -------
    int or None
        The exit status; above 128 where a signal ended the fork.
    """
    path = os.environ.get(VARIABLE)
    if not path or path == "off":
        return None
    request = {
        "arguments": sys.argv,
        "folder": os.getcwd(),
        "environment": {key: value for key, value in os.environ.items() if key != VARIABLE},
        "path": sys.path,
        "prefix": sys.prefix,
    }
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
            socket.send_fds(server, [b" "], [0, 1, 2])
            server.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            return None
        answers = server.makefile()
        word, _, child = answers.readline().partition(" ")
        if word != "process":
            return None
        # A signal may be meant for this process alone, so the fork is told; its end is awaited.
        for number in _SIGNALS:
            signal.signal(number, lambda number, _: _tell(int(child), number))
        _, _, status = answers.readline().partition(" ")
    if not status:
        _tell(int(child), signal.SIGKILL)
        print("tlora: the process that jobs are forked from has ended", file=sys.stderr)
    return int(status or 1)


def _tell(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def serve(descriptor: int) -> None:
    """Fork for every request that comes to a listening socket, until stdin is closed.

    Returns when all forks have ended. A fork returns when the command it runs does not exit.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as listening:
        if sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
            _load()
        running: dict[
            int, tuple[int, socket.socket]
        ] = {}  # a fork's descriptor: its id, its caller
        poll = select.poll()
        poll.register(0)
        poll.register(listening, select.POLLIN)
        stopping = False
        while running or not stopping:
            ready = {descriptor for descriptor, _ in poll.poll()}
            for descriptor in running.keys() & ready:
                child, caller = running.pop(descriptor)
                _, status = os.waitpid(child, 0)
                poll.unregister(descriptor)
                poll.unregister(caller)
                os.close(descriptor)
                _end(caller, os.waitstatus_to_exitcode(status))
            for child, caller in running.values():
                if caller.fileno() in ready:  # it is gone, by force
                    _tell(child, signal.SIGKILL)
            if 0 in ready:
                stopping = True
                poll.unregister(0)
                poll.unregister(listening)
            elif listening.fileno() in ready:
                caller, _ = listening.accept()
                child = os.fork()
                if child == 0:
                    listening.close()
                    for descriptor, (_, other) in running.items():
                        os.close(descriptor)
                        other.close()
                    _answer(caller)
                    return
                descriptor = os.pidfd_open(child)
                running[descriptor] = (child, caller)
                poll.register(descriptor, select.POLLIN)
                poll.register(caller, select.POLLRDHUP)


def leave(status: int) -> NoReturn:
    """End this process as the interpreter does, but for taking apart all that was ever loaded.

    With torch and transformers that takes half a second to a second, in a fork the copying of most
    of the server's memory. What is left to do is done: other threads are waited for, functions of
    `atexit` are called, what was printed is written. As `multiprocessing` ends its forks.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = 141
    os._exit(status)


def _end(caller: socket.socket, code: int) -> None:
    with caller, contextlib.suppress(OSError):
        caller.sendall(f"status {code if code >= 0 else 128 - code}\n".encode())


def _load() -> None:
    """Load what most jobs would load."""
    import gc

    import peft  # noqa: F401
    import requests  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it says so otherwise
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  # where it is installed, a Trainer loads it, used or not

    gc.freeze()  # a collection would write to every object's page


def _answer(caller: socket.socket) -> None:
    """Be the command that the caller was called as."""
    import runpy
    import tempfile

    import torch

    _, files, _, _ = socket.recv_fds(caller, 1, 3)
    with caller.makefile() as lines:
        request = json.loads(lines.readline())
    if request["prefix"] != sys.prefix:
        os._exit(0)  # another environment, whose libraries may be others
    caller.sendall(f"process {os.getpid()}\n".encode())
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    caller.close()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if "OMP_NUM_THREADS" in os.environ:  # read when torch is loaded
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tempfile.tempdir = None
    sys.argv, sys.path[:] = request["arguments"], request["path"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tlora"]:
        del sys.modules[name]
    runpy.run_path(sys.argv[0], run_name="__main__")
