"""The sandbox: what programs in it can and cannot do, on every kind that this machine allows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tlora import sandbox
from tlora.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
# An interpreter that lies below /tmp is seen there, and nothing else.
SHOWN = sorted(
    {
        Path(folder).relative_to("/tmp").parts[0]
        for folder in (sys.prefix, sys.base_prefix)
        if Path(folder).is_relative_to("/tmp")
    }
)
LIMITS = sandbox.Limits(cpu=10, wall=60)


@pytest.fixture(scope="module", params=list(sandbox.KINDS))
def box(request: pytest.FixtureRequest) -> sandbox.Sandbox:
    """A sandbox of each kind; skipped where this machine does not allow it."""
    try:
        return sandbox.prove(sandbox.KINDS[request.param]())
    except UserError as error:
        assert "does not hold" not in str(error)
        pytest.skip(f"{request.param}: {error}")


@pytest.fixture
def marker() -> str:
    """An argument by which a program's processes are told from all others."""
    return f"tlora-test-{uuid.uuid4()}"


def alive(marker: str) -> list[str]:
    """Return the processes that have a marker among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_text(errors="replace"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Ask until it holds. Counted are pauses: a machine may stand still while its clock goes on."""
    for _ in range(round(seconds / 0.02)):
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def gone(marker: str) -> bool:
    """Wait for a killed program's processes to end."""
    return within(20, lambda: not alive(marker))


def answer(box: sandbox.Sandbox, program: str, data: object = None) -> object:
    """Return what a program prints as JSON, given data as JSON."""
    result = sandbox.run(box, program, json.dumps(data).encode(), LIMITS)
    assert result.ended, result
    return json.loads(result.output)


ATTEMPTS = """
import json, os, sys
data = json.load(sys.stdin)
def outcome(action):
    try:
        return ["done", action()]
    except BaseException as error:
        return [type(error).__name__, str(error)]
"""


def test_program_reads_its_input_and_prints(box: sandbox.Sandbox) -> None:
    data = os.urandom(1 << 20) * 5
    program = "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    result = sandbox.run(box, program, data, LIMITS)
    assert result.output.decode().strip() == hashlib.sha256(data).hexdigest()
    assert result.ended and result.status == 0


def test_packages_of_this_environment_are_there(box: sandbox.Sandbox) -> None:
    program = "import json, numpy; print(json.dumps(int(numpy.arange(4).sum())))"
    assert answer(box, program) == 6


def test_what_a_program_sees(
    box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TLORA_SECRET", "in the environment")
    planted = tmp_path / "secret"
    planted.write_text("in a file")
    planted.chmod(0o644)
    seen = answer(
        box,
        ATTEMPTS
        + """
print(json.dumps({
    "environment": dict(os.environ),
    "user": os.geteuid(),
    "root": sorted(os.listdir("/")),
    "devices": sorted(os.listdir("/dev")),
    "here": [os.getcwd(), os.listdir(".")],
    "secret": outcome(lambda: open(data).read())[0],
    "descriptors": [n for n in range(3, 64) if outcome(lambda: os.fstat(n))[0] == "done"],
}))
""",
        str(planted),
    )
    assert "TLORA_SECRET" not in seen["environment"]
    assert seen["environment"]["HOME"] == "/tmp"
    assert seen["here"] == ["/tmp", SHOWN]
    assert seen["devices"] == ["null", "urandom", "zero"]
    assert not {"home", "etc", "proc", "sys", "var"} & set(seen["root"])
    assert seen["secret"] == "FileNotFoundError"
    assert seen["descriptors"] == []
    if os.geteuid() == 0:
        assert seen["user"] == sandbox.NOBODY


def test_nothing_outside_the_scratch_folder_is_written(
    box: sandbox.Sandbox, tmp_path: Path
) -> None:
    name = f"tlora-{uuid.uuid4()}"
    folders = [
        *("/", "/dev", "/usr", "/usr/bin", "/var/tmp", "/root", "/home", "/etc"),
        *(str(Path.home()), os.getcwd(), str(tmp_path), sys.prefix, sys.base_prefix),
    ]
    program = ATTEMPTS + (
        "write = lambda folder: open(os.path.join(folder, data[0]), 'w').write('x')\n"
        "print(json.dumps([outcome(lambda: write(folder))[0] for folder in data[1]]))"
    )
    assert "done" not in answer(box, program, [name, folders])
    assert answer(box, program, [name, ["/tmp"]]) == ["done"]
    for folder in (*folders, "/tmp"):
        assert not (Path(folder) / name).exists()


def test_scratch_folder_is_small_and_new_each_time(box: sandbox.Sandbox) -> None:
    program = ATTEMPTS + (
        "before = os.listdir('.')\n"
        "def fill():\n"
        "    for n in range(50):\n"
        "        open(str(n), 'wb').write(bytes(10 << 20))\n"
        "ended = outcome(fill)[0]\n"
        "files = filter(os.path.isfile, os.listdir())\n"
        "print(json.dumps([before, ended, sum(map(os.path.getsize, files))]))"
    )
    for _ in range(2):
        before, ended, size = answer(box, program)
        assert before == SHOWN
        assert ended == "OSError"
        assert size <= sandbox.SCRATCH


def test_no_network(box: sandbox.Sandbox) -> None:
    reached = []
    name = f"\0tlora-{uuid.uuid4()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind(name)
        local.listen()
        for listener in (server, local):
            listener.settimeout(30)
            threading.Thread(target=lambda one: reached.append(one.accept()), args=(listener,))
        program = ATTEMPTS + (
            "import socket\n"
            "port, name = data\n"
            "def abstract():\n"
            "    socket.socket(socket.AF_UNIX).connect(name)\n"
            "print(json.dumps([\n"
            "    outcome(lambda: socket.create_connection(('127.0.0.1', port), 3))[0],\n"
            "    outcome(lambda: socket.create_connection(('192.0.2.1', 80), 3))[0],\n"
            "    outcome(lambda: socket.create_connection(('example.org', 80), 3))[0],\n"
            "    outcome(abstract)[0],\n"
            "]))"
        )
        outcomes = answer(box, program, [server.getsockname()[1], name])
        assert "done" not in outcomes
    assert not reached


def test_no_other_process_is_started(box: sandbox.Sandbox) -> None:
    program = ATTEMPTS + (
        "import subprocess, threading\n"
        "def bomb():\n"
        "    while True:\n"
        "        os.fork()\n"
        "print(json.dumps([\n"
        "    outcome(bomb)[0],\n"
        "    outcome(lambda: subprocess.run(['/bin/sleep', '100']))[0],\n"
        "    outcome(threading.Thread(target=print).start)[0],\n"
        "]), flush=True)"
    )
    assert answer(box, program) == ["BlockingIOError", "BlockingIOError", "RuntimeError"]


def test_other_processes_are_out_of_reach(box: sandbox.Sandbox) -> None:
    program = ATTEMPTS + (
        "import signal\n"
        "for target in (os.getppid(), data, -1, 1):\n"
        "    outcome(lambda: os.kill(target, signal.SIGKILL))\n"
        "print(json.dumps(outcome(lambda: os.kill(data, 0))[0]))"
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert answer(box, program, other.pid) == "ProcessLookupError"
        assert other.poll() is None
    assert answer(box, "print(1)") == 1


def test_no_privilege_is_left_or_gained(box: sandbox.Sandbox) -> None:
    program = ATTEMPTS + (
        "import ctypes, resource\n"
        "libc = ctypes.CDLL(None)\n"
        "print(json.dumps([\n"
        "    outcome(lambda: os.chroot('.'))[0],\n"
        "    outcome(lambda: os.setgroups([0]))[0],\n"
        "    outcome(lambda: os.setuid(1))[0],\n"
        "    outcome(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9, 9)))[0],\n"
        "    libc.mount(b'x', b'/tmp', b'tmpfs', 0, None),\n"
        "    libc.unshare(0x10000000),\n"  # a user namespace, where it would be root
        "    libc.prctl(39, 0, 0, 0, 0),\n"  # PR_GET_NO_NEW_PRIVS
        "]))"
    )
    *refused, mounted, unshared, locked = answer(box, program)
    assert refused == ["PermissionError", "PermissionError", "PermissionError", "ValueError"]
    assert mounted == -1
    # A new user namespace is no gain where the limit on processes forbids what needs one.
    assert unshared in (0, -1)
    assert locked == 1


def test_memory_is_limited(box: sandbox.Sandbox) -> None:
    limits = sandbox.Limits(cpu=10, wall=60, memory=512 << 20)
    program = (
        "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('refused')\n"
        "held = []\nwhile True:\n    held.append(bytearray(10 << 20))"
    )
    result = sandbox.run(box, program, b"", limits)
    assert result.output == b"refused\n"
    assert result.ended and result.status != 0


def test_endless_loop_is_ended_by_its_processor_time(box: sandbox.Sandbox, marker: str) -> None:
    program = (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    )
    result = sandbox.run(box, program, b"", sandbox.Limits(cpu=1, wall=60), [marker])
    assert result.ended and result.status in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert gone(marker)


def test_sleeper_is_ended_by_the_clock(box: sandbox.Sandbox, marker: str) -> None:
    program = "import os, time\nos.close(1)\nwhile True: time.sleep(100)"
    start = time.monotonic()
    result = sandbox.run(box, program, b"x" * 100_000, sandbox.Limits(cpu=5, wall=1.5), [marker])
    assert time.monotonic() - start < 30
    assert not result.ended
    assert gone(marker)


def test_output_is_limited(box: sandbox.Sandbox, marker: str) -> None:
    limits = sandbox.Limits(cpu=20, wall=60, output=100_000)
    result = sandbox.run(box, "while True: print('x' * 1000)", b"", limits, [marker])
    assert not result.ended
    assert 100_000 < len(result.output) < 3_000_000
    assert gone(marker)


@pytest.mark.parametrize("later", [0, 0.004, 0.008, 0.012, 0.016, 0.5])
def test_nothing_outlives_the_caller(
    box: sandbox.Sandbox, marker: str, root: Path, later: float
) -> None:
    """A killed scoring job leaves no program behind, whenever it was killed."""
    caller = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys\nfrom tlora import sandbox\n"
            "box = sandbox.KINDS[sys.argv[1]]()\n"
            "limits = sandbox.Limits(60, 60)\n"
            "sandbox.run(box, 'import time; time.sleep(600)', b'', limits, [sys.argv[2]])",
            *(box.kind, marker),
        ],
        cwd=root,
    )
    assert within(30, lambda: len(alive(marker)) >= 2)
    time.sleep(later)
    caller.kill()
    caller.wait()
    assert gone(marker)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("kind", list(sandbox.KINDS))
def test_an_ordinary_user_gets_a_sandbox_too(kind: str, root: Path, tmp_path: Path) -> None:
    user = [shutil.which("setpriv"), "--reuid=12345", "--regid=12345", "--clear-groups", "--"]
    place = tmp_path / "code"
    (place / "tlora").mkdir(parents=True)
    for name in ("sandbox.py", "errors.py"):
        shutil.copy(root / "tlora" / name, place / "tlora" / name)
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    program = (
        "import sys\nfrom tlora import sandbox\n"
        "try:\n    print(sandbox.prove(sandbox.KINDS[sys.argv[1]]()).kind)\n"
        "except sandbox.UserError as error:\n    print('refused:', error)"
    )
    said = []
    # The first may lie where only its owner can read.
    for interpreter in (sys.executable, "/usr/bin/python3"):
        done = subprocess.run(
            [*user, interpreter, "-B", "-c", program, kind],
            env={"PYTHONPATH": str(place), "HOME": "/nonexistent", "PATH": "/usr/bin:/bin"},
            cwd="/",
            capture_output=True,
            text=True,
        )
        if done.stdout.strip() == kind:
            return
        said.append(f"{interpreter}: {done.stdout or done.stderr}")
    assert "does not hold" not in str(said)
    pytest.skip("; ".join(said))


def test_programs_get_nothing_random(box: sandbox.Sandbox) -> None:
    program = "import json; print(json.dumps(list({str(n) for n in range(50)})))"
    assert answer(box, program) == answer(box, program)


# finding one


def without(box: sandbox.Sandbox, *options: str) -> sandbox.Sandbox:
    """A sandbox with a hole."""
    command = [part for part in box.command if part not in options]
    assert len(command) < len(box.command)
    return sandbox.Sandbox(box.kind, tuple(command))


def test_a_sandbox_with_the_network_is_refused(box: sandbox.Sandbox) -> None:
    with pytest.raises(UserError, match=r"could connect to the network$"):
        sandbox.prove(without(box, "--unshare-net", "--net"))


def test_a_sandbox_with_other_processes_is_refused(box: sandbox.Sandbox) -> None:
    with pytest.raises(UserError, match=r"could see another process$"):
        sandbox.prove(without(box, "--unshare-pid", "--pid", "--kill-child"))


def test_no_sandbox_is_no_sandbox() -> None:
    with pytest.raises(UserError, match="could connect to the network, read a file outside, write"):
        sandbox.prove(sandbox.find(unsafe=True))


def test_a_sandbox_that_does_not_start_is_refused() -> None:
    with pytest.raises(UserError, match="No such file"):
        sandbox.prove(sandbox.Sandbox("gone", ("/no/such/program",)))
    with pytest.raises(UserError, match=r"setpriv: no$"):
        sandbox.prove(sandbox.Sandbox("broken", ("/bin/sh", "-c", "echo setpriv: no >&2; exit 3")))


def test_refusal_is_one_line_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> sandbox.Sandbox:
        raise UserError("bwrap is not installed")

    kinds = {"bubblewrap": missing, "unshare": lambda: sandbox.Sandbox("unshare", ())}
    monkeypatch.setattr(sandbox, "KINDS", kinds)
    with pytest.raises(UserError) as caught:
        sandbox.find()
    message = str(caught.value)
    assert "\n" not in message
    assert "bubblewrap: bwrap is not installed" in message
    assert "unshare: does not hold" in message
    assert "--unsafe-no-sandbox" in message


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name, path: None)
    for kind in sandbox.KINDS.values():
        with pytest.raises(UserError, match="is not installed"):
            kind()


def test_without_a_sandbox_limits_and_a_folder_of_its_own_remain() -> None:
    box = sandbox.find(unsafe=True)
    where = answer(box, "import json, os; print(json.dumps([os.getcwd(), os.environ['HOME']]))")
    assert where[0] == where[1]
    assert not Path(where[0]).exists()
    result = sandbox.run(box, "while True: pass", b"", sandbox.Limits(cpu=1, wall=60))
    assert result.ended and result.status == -signal.SIGKILL
