"""Jobs in forks of one process: they are what they would be as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="servers are for Linux"),
]

# As `tlora` is: what is handed over is run by the same file.
COMMAND = """\
import sys
from tlora.forks import handed_over
status = handed_over()
if status is not None:
    sys.exit(status)
import os, signal, time
{body}
"""

# A server of a process that tells its socket and waits: what snakemake is.
OWNER = """\
import os, sys
from tlora.forks import VARIABLE, begin
begin()
print(os.environ.get(VARIABLE, "none"), flush=True)
sys.stdin.read()
"""

SHOW = """\
import json
shown = {
    "arguments": sys.argv[1:], "folder": os.getcwd(), "extra": os.environ.get("EXTRA"),
    "torch": "torch" in sys.modules, "again": "TLORA_FORKS" in os.environ,
    "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
    "process": os.getpid(),
}
print(json.dumps(shown))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def owner(**environment: str) -> subprocess.Popen[str]:
    """Start a process that has begun a server."""
    kept = {key: value for key, value in os.environ.items() if key != "TLORA_FORKS"}
    return subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=kept | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The socket of a server."""
    with owner() as process:
        yield process.stdout.readline().strip()
        process.communicate()


def start(folder: Path, body: str, socket: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a command that hands itself over."""
    script = folder / "command"
    script.write_text(COMMAND.format(body=body), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "TLORA_FORKS": socket, "EXTRA": "a\nb", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(path: Path) -> str:
    """Wait for what a command writes to a file."""
    for _ in range(600):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def gone(process: int) -> bool:
    """Wait for the end of a process that is no child of this one."""
    for _ in range(100):
        if not Path(f"/proc/{process}").exists():
            return True
        time.sleep(0.1)
    return False


def parent(process: str) -> int:
    """Return the id of a fork's server."""
    status = Path(f"/proc/{process}/status").read_text()
    (found,) = (line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))
    assert int(found) != os.getpid(), "not handed over"
    return int(found)


NOTE = "open('mine', 'w').write(str(os.getpid()))\n"


def test_a_fork_is_what_was_called(server: str, tmp_path: Path) -> None:
    """Arguments, folder, environment, streams and exit status are the caller's."""
    process = start(tmp_path, SHOW, server, "--a", "b c", "")
    output, errors = process.communicate(timeout=120)
    shown = json.loads(output)
    assert process.returncode == 7
    assert errors == "to stderr\n"
    assert shown["process"] != process.pid
    assert shown["torch"] and not shown["again"] and shown["threads"] == 1
    assert shown["arguments"] == ["--a", "b c", ""]
    assert Path(shown["folder"]) == tmp_path
    assert shown["extra"] == "a\nb"


def test_a_fork_loads_the_package_anew(server: str, tmp_path: Path) -> None:
    """Sources of this package may have changed since the server started."""
    package = tmp_path / "tlora"
    package.mkdir()
    (package / "__init__.py").write_text("")
    mine = Path(__file__).parents[2] / "tlora" / "forks.py"
    (package / "forks.py").write_text(mine.read_text(encoding="utf-8"), encoding="utf-8")
    (package / "errors.py").write_text("MARK = 'another'\n")
    body = "from tlora.errors import MARK\nprint(MARK, 'torch' in sys.modules)"
    output, errors = start(tmp_path, body, server).communicate(timeout=120)
    assert (output, errors) == ("another True\n", "")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("raise ValueError('bad')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
        ("pass", 0),
        ("import atexit; atexit.register(print, 'last'); sys.exit(3)", 3),
    ],
)
def test_ends(server: str, tmp_path: Path, body: str, status: int) -> None:
    """The caller ends as the fork does; what is to happen at its end happens."""
    process = start(tmp_path, body, server)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert output == ("last\n" if "atexit" in body else "")
    assert ("ValueError: bad" in errors) == ("ValueError" in body)


LEAVE = """
import atexit, sys, threading, time
from tlora.forks import leave
class Loaded:
    def __del__(self):
        print("taken apart", flush=True)
loaded = Loaded()
def late():
    time.sleep(0.5)
    print("thread")
threading.Thread(target=late).start()
atexit.register(print, "atexit")
print("said")
leave(3)
"""


def test_leaving_does_what_is_left_to_do() -> None:
    """Threads, atexit and buffered output, in the interpreter's order; nothing is taken apart."""
    ended = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert ended.stdout.split("\n") == ["said", "thread", "atexit", ""]


@pytest.mark.parametrize(("loaded", "said"), [("torch", ""), ("json", "taken apart\n")])
def test_the_command_line_leaves_where_torch_is_loaded(loaded: str, said: str) -> None:
    code = (
        f"import sys, {loaded}\nfrom tlora import cli\ncli.main = lambda: 4\n"
        "class Loaded:\n    def __del__(self):\n        print('taken apart', flush=True)\n"
        "loaded = Loaded()\nsys.exit(cli.program())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (4, said)


def test_leaving_without_a_reader() -> None:
    """As after `| head`: no traceback."""
    code = "from tlora.forks import leave; print('x' * 10); leave(0)"
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_signals_reach_the_fork(server: str, tmp_path: Path) -> None:
    """A job that is told to stop may still write its checkpoint."""
    body = (
        "def stop(number, _):\n    print('stopped by', number)\n    sys.exit(9)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + NOTE + "time.sleep(60)\n"
    )
    process = start(tmp_path, body, server)
    until(tmp_path / "mine")
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (9, f"stopped by {signal.SIGTERM:d}\n")


def test_a_killed_caller_takes_its_fork_along(server: str, tmp_path: Path) -> None:
    """Nobody would know of a job that went on."""
    process = start(tmp_path, NOTE + "time.sleep(60)", server)
    fork = int(until(tmp_path / "mine"))
    process.kill()
    process.communicate()
    assert gone(fork)


def test_jobs_outlive_a_killed_snakemake(tmp_path: Path) -> None:
    """As they do without a server; nothing is left of it then."""
    with owner() as process:
        socket = process.stdout.readline().strip()
        body = NOTE + "time.sleep(3)\nopen('done', 'w').write('x')\nsys.exit(5)"
        job = start(tmp_path, body, socket)
        until(tmp_path / "mine")
        server = parent(until(tmp_path / "mine"))
        process.kill()
    job.communicate(timeout=60)
    assert job.returncode == 5
    assert (tmp_path / "done").exists()
    assert gone(server)
    assert start(tmp_path, "sys.exit(6)", socket).wait(timeout=60) == 6, "runs by itself"


def test_a_server_that_dies_takes_no_job_for_done(tmp_path: Path) -> None:
    """The job fails, so that snakemake tries again, and does not go on beside the next attempt."""
    with owner() as process:
        job = start(tmp_path, NOTE + "time.sleep(60)", process.stdout.readline().strip())
        fork = until(tmp_path / "mine")
        os.kill(parent(fork), signal.SIGKILL)
        _, errors = job.communicate(timeout=30)
        process.communicate()
    assert job.returncode == 1
    assert "has ended" in errors
    assert gone(int(fork))


def test_none_is_started(tmp_path: Path) -> None:
    """Where it is not wanted, and where there are GPUs."""
    for environment in ({"TLORA_FORKS": "off"}, {"CUDA_VISIBLE_DEVICES": "0"}):
        with owner(**environment) as process:
            output, _ = process.communicate(timeout=60)
        assert output.strip() == environment.get("TLORA_FORKS", "none")
    body = "print('torch' in sys.modules)"
    output, _ = start(tmp_path, body, "off").communicate(timeout=60)
    assert output == "False\n"


def test_another_environment_is_left_alone(server: str, tmp_path: Path) -> None:
    """A job of a conda environment has other libraries than the server."""
    with tempfile.TemporaryDirectory() as folder:
        python = [sys.executable, "-m", "venv", "--without-pip", folder]
        subprocess.run(python, check=True)
        script = tmp_path / "command"
        body = "print(sys.prefix, 'torch' in sys.modules)"
        script.write_text(COMMAND.format(body=body), encoding="utf-8")
        done = subprocess.run(
            [f"{folder}/bin/python", str(script)],
            env={
                **os.environ,
                "TLORA_FORKS": server,
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{folder} False\n"
