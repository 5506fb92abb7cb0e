"""Runs the jobs of a workflow in forks of one process that has torch loaded.

`python forks.py SOCKET` waits for requests; a job's `tlora` is then `CLIENT`, which hands over what
it was called with and exits as the fork does. A job that loads torch itself needs seven seconds of
processor time before it begins.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import traceback

CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    socket.send_fds(server, [b" "], [0, 1, 2])
    request = [sys.argv[1:], os.getcwd(), dict(os.environ)]
    server.sendall(json.dumps(request).encode() + b"\\n")
    status = server.recv(1)
sys.exit(status[0] if status else 1)
"""


def serve(path: str) -> None:
    """Fork for every request that comes to a socket."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, reap)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            client, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                answer(client)
            client.close()


def reap(*_: object) -> None:
    """Wait for the forks that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(client: socket.socket) -> None:
    """Be the command that a client was called as, and exit."""
    status = 1
    try:
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        arguments, folder, environment = json.loads(client.makefile().readline())
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.path[0] = ["tlora", *arguments], folder
        from tlora.cli import main

        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(bytes([status]))
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
