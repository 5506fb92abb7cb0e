"""Running generated programs where they can do no harm.

A program gets an empty scratch folder, the interpreter with its libraries read-only, no network, no
other process in sight and no privilege; the kernel limits its processor time, memory, files and
processes, and everything it started ends with it. Two ways to that, both built on Linux namespaces:

bubblewrap
    As root, or as a user where user namespaces are allowed.
unshare
    The same with the tools of util-linux; as root the program runs as an unprivileged user.

A sandbox is proven before it is used: a program inside tries what it must not be able to do. Not
limited is kernel memory that belongs to no process (System V segments); a job's cgroup does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tlora.errors import UserError

NOBODY = 65534
"""The user that programs run as where the sandbox is made by root."""
SCRATCH = 64 << 20
"""Bytes of the scratch folder."""
MOUNT_POINT = "/sys"
"""Where `unshare` builds the program's file system: a folder that no interpreter lies in."""

_TOOLS = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_ENVIRONMENT = {
    "PATH": _TOOLS,
    "LANG": "C.UTF-8",
    # Equal programs must do the same in every run.
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
_NAMESPACES = ("pid", "net", "ipc", "uts")
# Left to bwrap, a folder above others would be closed to other users than the one that runs it.
_OPEN = ("--perms", "0755", "--dir")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# Runs before the program, which cannot take back a hard limit.
_PRELUDE = """
import json, os, resource, sys
limits, paths = json.loads(sys.argv.pop(1))
for name, value in limits.items():
    resource.setrlimit(getattr(resource, name), (value, value))
sys.path += paths
os.chdir(os.environ["HOME"])
# All around it stands now and dies with the caller. One that was killed before answers nothing.
os.write(1, b"\\n")
os.read(0, 1) or sys.exit(1)
exec(compile(sys.argv.pop(1), "program", "exec"))
"""

_PROBE = """
import json, os, socket, sys
port, secret, folders = json.load(sys.stdin)
done = []

def attempt(what, action):
    try:
        action()
    except OSError:
        return
    done.append(what)

def write(folder):
    path = os.path.join(folder, f".tlora-{os.getpid()}")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    os.unlink(path)

def fork():
    os.fork() or os._exit(0)

def look():
    try:
        os.kill(int(sys.argv[1]), 0)
    except PermissionError:
        pass

# What it must be able to do.
write(".")
open(os.devnull, "r+b").close()
attempt("connect to the network", lambda: socket.create_connection(("127.0.0.1", port), 2).close())
attempt("read a file outside", lambda: open(secret).close())
for folder in folders:
    attempt(f"write to {folder}", lambda: write(folder))
attempt("start a process", fork)
attempt("see another process", look)
attempt("use a privilege", lambda: os.chroot("."))
print(json.dumps(done))
"""

# Arguments: the mount point, the folders to show, "--", links as "target name", "--", the command.
_BUILD = f"""
set -e
root=$1; shift
mount -t tmpfs -o mode=755,size=1m sandbox "$root"
mkdir "$root/dev" "$root/tmp"
# Before the folders: some of them may lie below it.
mount -t tmpfs -o mode=1777,nosuid,nodev,size={SCRATCH} sandbox "$root/tmp"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    mount -o remount,bind,ro,nosuid,nodev "$root$1"
    shift
done
shift
while [ "$1" != -- ]; do ln -s "$1" "$root$2"; shift 2; done
shift
for device in {" ".join(_DEVICES)}; do
    : > "$root$device"
    mount --bind "$device" "$root$device"
done
mount -o remount,bind,ro "$root"
chroot "$root" "$@"
exit $?
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use up.

    Attributes
    ----------
    cpu
        Seconds of processor time.
    wall
        Seconds from start to end.
    memory
        Bytes of address space.
    output
        Bytes it may print.
    """

    cpu: float
    wall: float
    memory: int = 4 << 30
    output: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """A way to run programs.

    Attributes
    ----------
    kind
        "bubblewrap", "unshare", or "none": the program runs as any other.
    command
        What stands before the interpreter's command line.
    """

    kind: str
    command: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended.

    Attributes
    ----------
    output
        What it printed; not all of it unless `ended`.
    ended
        Whether it ended by itself: not for want of time, and without printing too much.
    status
        Its exit status, minus the signal's number where one ended it. Programs can fake it.
    """

    output: bytes
    ended: bool
    status: int


def find(unsafe: bool = False) -> Sandbox:
    """Return a sandbox that was proven on this machine.

    Parameters
    ----------
    unsafe
        Do without one: programs can then do whatever the user can.

    Raises
    ------
    UserError
        Where no sandbox can be had, with the reasons.
    """
    if unsafe:
        return Sandbox("none", ())
    reasons = []
    for kind in KINDS:
        try:
            return prove(KINDS[kind]())
        except UserError as error:
            reasons.append(f"{kind}: {error}")
    raise UserError(
        f"no sandbox for generated programs ({'; '.join(reasons)}): expected bubblewrap where user "
        "namespaces are allowed, or root with CAP_SYS_ADMIN; --unsafe-no-sandbox does without"
    )


def bubblewrap() -> Sandbox:
    """Return a sandbox made by `bwrap`.

    Raises
    ------
    UserError
        When it is not installed.
    """
    root = os.geteuid() == 0
    command = [_tool("bwrap"), "--die-with-parent", "--new-session"]
    command += [f"--unshare-{name}" for name in (*_NAMESPACES, *(() if root else ("user",)))]
    # Before the folders: some of them may lie below it.
    command += ["--perms", "1777", "--size", str(SCRATCH), "--tmpfs", "/tmp"]
    for folder in _shown():
        for above in reversed(Path(folder).parents[:-1]):
            command += [*_OPEN, str(above)]
        command += ["--ro-bind", folder, folder]
    command += [*_OPEN, "/dev"]
    for target, name in _links():
        command += ["--symlink", target, name]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--remount-ro", "/"]
    return Sandbox("bubblewrap", (*command, "--", *_drop(root)))


def unshare() -> Sandbox:
    """Return a sandbox made by `unshare`, `mount`, `chroot` and `setpriv`.

    Raises
    ------
    UserError
        When one of them is not installed.
    """
    root = os.geteuid() == 0
    for name in ("mount", "chroot"):
        _tool(name)
    # Its first process dies with `unshare`, and `unshare` with the caller.
    command = [_tool("setpriv"), "--pdeathsig", "KILL", "--", _tool("unshare"), "--mount"]
    command += [f"--{name}" for name in _NAMESPACES]
    command += [] if root else ["--map-root-user"]
    command += ["--fork", "--kill-child", "--", "/bin/sh", "-c", _BUILD, "sh", MOUNT_POINT]
    command += [*_shown(), "--", *(part for link in _links() for part in link), "--"]
    return Sandbox("unshare", (*command, *_drop(root)))


KINDS = {"bubblewrap": bubblewrap, "unshare": unshare}
"""The ways to make a sandbox, the preferred one first."""


def prove(sandbox: Sandbox) -> Sandbox:
    """Return a sandbox in which a program failed at all it must not do.

    Raises
    ------
    UserError
        When it does not start, or a program in it can do more than it should.
    """
    home = os.path.expanduser("~")
    folders = sorted({"/", "/dev", "/usr", "/var/tmp", home, os.getcwd(), sys.prefix} - {"/tmp"})
    with tempfile.NamedTemporaryFile() as secret, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(secret.name, 0o644)
        question = json.dumps([server.getsockname()[1], secret.name, folders]).encode()
        with tempfile.TemporaryFile() as log:
            try:
                result = run(sandbox, _PROBE, question, Limits(20, 60), [str(os.getpid())], log)
            except OSError as error:
                raise UserError(str(error)) from error
            log.seek(0)
            said = " ".join(log.read(2000).decode(errors="replace").split())
    try:
        done = json.loads(result.output)
    except ValueError:
        raise UserError(said[:200] or f"ended with status {result.status}") from None
    if done:
        raise UserError(f"does not hold: a program in it could {', '.join(done)}")
    return sandbox


def run(
    sandbox: Sandbox,
    program: str,
    data: bytes,
    limits: Limits,
    arguments: list[str] | None = None,
    log: IO[bytes] | None = None,
) -> Result:
    """Run a Python program in a sandbox of its own and wait for its end.

    Parameters
    ----------
    sandbox
        From `find`.
    program
        Source text; the standard library and the packages of this environment can be imported.
    data
        What it reads from standard input.
    limits
        What it may use up. When it ends or exceeds them, all it started is ended too.
    arguments
        Its `sys.argv[1:]`.
    log
        Open file for its standard error, which is thrown away by default.
    """
    hard = {
        "RLIMIT_CPU": max(1, round(limits.cpu)),
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": SCRATCH,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = json.dumps([hard, list(dict.fromkeys(packages))])
    interpreter = [sys.executable, "-s", "-S", "-P", "-B", "-c", _PRELUDE, settings, program]
    with _home(sandbox) as home:
        process = subprocess.Popen(
            [*sandbox.command, *interpreter, *(arguments or [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log or subprocess.DEVNULL,
            env={**_ENVIRONMENT, "HOME": home, "TMPDIR": home},
            cwd="/",
            start_new_session=True,
        )
        end = time.monotonic() + limits.wall
        try:
            output, ended = _exchange(process, data, end, limits.output)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()) if ended else 0)
            ended = ended and process.returncode is not None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
    return Result(output, ended, process.returncode)


def _exchange(
    process: subprocess.Popen[bytes], data: bytes, end: float, most: int
) -> tuple[bytes, bool]:
    """Answer the prelude, write `data` and read what is printed, until the output is closed.

    Returns
    -------
    output : bytes
    closed : bool
        False when the time ran out or more than `most` bytes came.
    """
    received: list[bytes] = []
    waiting, size = memoryview(b"\n" + data), 0
    most += 1  # the prelude's byte
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    try:
                        waiting = waiting[os.write(key.fd, waiting[: 1 << 16]) :]
                    except BrokenPipeError:
                        waiting = waiting[:0]
                    if not waiting:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                chunk = os.read(key.fd, 1 << 20)
                if chunk and not size:
                    selector.register(process.stdin, selectors.EVENT_WRITE)
                received.append(chunk)
                size += len(chunk)
                if not chunk or size > most:
                    return b"".join(received)[1:], size <= most
    return b"".join(received)[1:], False


@contextlib.contextmanager
def _home(sandbox: Sandbox) -> Iterator[str]:
    """Yield the program's home: the scratch folder, or a temporary one without a sandbox."""
    if sandbox.command:
        yield "/tmp"
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield folder


def _drop(root: bool) -> list[str]:
    """Return the command that gives up all privileges for the command after it."""
    command = [_tool("setpriv"), "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    if root:
        command += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*command, "--"]


def _shown() -> list[str]:
    """Return the folders that a program sees: the system's and the interpreter's."""
    system = [f"/{name}" for name in _SYSTEM if os.path.isdir(f"/{name}")]
    system = ["/usr", *(folder for folder in system if not os.path.islink(folder))]
    found: list[str] = []
    for folder in (*system, sys.base_prefix, sys.prefix, os.path.dirname(_interpreter())):
        if not any(Path(folder).is_relative_to(other) for other in found):
            found.append(folder)
    return found


def _links() -> list[tuple[str, str]]:
    """Return the links at the top that the system's programs need: target and name."""
    names = [f"/{name}" for name in _SYSTEM]
    return [(os.readlink(name), name) for name in names if os.path.islink(name)]


_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


def _tool(name: str) -> str:
    """Return the path of a program of the system.

    Raises
    ------
    UserError
        When it is not installed.
    """
    path = shutil.which(name, path=f"{_TOOLS}:{os.environ.get('PATH', '')}")
    if path is None:
        raise UserError(f"{name} is not installed")
    return path
