"""One writer a folder, whatever happens to the processes that want it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlora import lease

# A process that notes when it has the lease, with the patience of a test.
WORKER = """\
import os, sys, time
from pathlib import Path
from tlora import lease
lease.BEAT, lease.LOOK, lease.PATIENCE, lease.GONE = 0.05, 0.02, {patience}, {gone}
folder, note, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
print("ready", flush=True)
with lease.held(folder) as claim:
    with open(note, "a") as file:
        file.write(f"+{{os.getpid()}}\\n")
    print("has it", flush=True)
    time.sleep(seconds)
    with open(note, "a") as file:
        file.write(f"-{{os.getpid()}}\\n")
print("done", flush=True)
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path):
    """Start a process that takes the lease and keeps it for some seconds."""
    running = []

    def begin(seconds: float, patience: int = 20, gone: int = 5) -> subprocess.Popen:
        program = WORKER.format(patience=patience, gone=gone)
        words = [sys.executable, "-c", program, str(tmp_path / "lease"), str(tmp_path / "notes")]
        environment = {k: v for k, v in os.environ.items() if k != lease.INHERITED}
        process = subprocess.Popen(
            [*words, str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen, word: str) -> None:
    """Wait until a worker said a word."""
    assert process.stdout.readline().strip() == word, process.stderr.read()


def notes(folder: Path) -> list[str]:
    """Return who had the lease and who let go, in order."""
    return (folder / "notes").read_text().split()


def alternate(found: list[str]) -> bool:
    """Tell whether everyone let go before the next one had it."""
    begins, ends = found[::2], found[1::2]
    return [f"-{name[1:]}" for name in begins] == ends and all(n[0] == "+" for n in begins)


@pytest.mark.slow
def test_two_processes_race_twenty_times(tmp_path: Path, start: Start) -> None:
    """Never both at once; each gets it in the end."""
    for _ in range(20):
        (tmp_path / "notes").unlink(missing_ok=True)
        pair = [start(0.05), start(0.05)]
        for process in pair:
            output, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
            assert "has it" in output
        found = notes(tmp_path)
        assert len(found) == 4
        assert alternate(found), found


@pytest.mark.slow
def test_eight_waiters_after_a_kill_are_one_at_a_time(tmp_path: Path, start: Start) -> None:
    """All see the same dead owner; one of them takes over, then the next."""
    first = start(60)
    says(first, "ready")
    says(first, "has it")
    first.kill()
    first.communicate()
    crowd = [start(0.02) for _ in range(8)]
    for process in crowd:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    found = notes(tmp_path)[1:]
    assert len(found) == 16
    assert alternate(found), found


def test_owner_that_lives_is_waited_for(tmp_path: Path, start: Start) -> None:
    """Far longer than the patience, because it shows signs of life."""
    first = start(2.0)
    says(first, "ready")
    says(first, "has it")
    second = start(0)
    _, error = second.communicate(timeout=60)
    assert "waiting for" in error and f"process {first.pid} on" in error
    assert first.wait(10) == 0
    assert alternate(notes(tmp_path))


def test_killed_owner_is_taken_over(tmp_path: Path, start: Start) -> None:
    """Its process is known to be gone, which shortens the wait."""
    first = start(60)
    says(first, "ready")
    says(first, "has it")
    first.kill()
    first.communicate()
    _, error = start(0, patience=10**6).communicate(timeout=60)
    assert "no sign of life" in error
    assert len(notes(tmp_path)) == 3


def test_owner_elsewhere_is_taken_over_after_the_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known of another machine's processes but what they write."""
    folder = tmp_path / "lease"
    folder.mkdir()
    state = {"job": "17", "host": "node3", "machine": "other", "pid": 1, "birth": "0"}
    (folder / "000007").write_text(json.dumps(state))
    looks = []
    monkeypatch.setattr(lease, "LOOK", 0.001)
    monkeypatch.setattr(lease.time, "sleep", looks.append)
    with lease.held(folder) as claim:
        assert claim.path.name == "000008"
        assert claim.waited
        assert [path.name for path in folder.iterdir()] == ["000008"]
    assert looks == [0.001] * lease.PATIENCE


def test_stopped_owner_that_was_taken_over_dies_on_waking(tmp_path: Path, start: Start) -> None:
    """It may not go on writing where another writes."""
    first = start(60)
    says(first, "ready")
    says(first, "has it")
    os.kill(first.pid, signal.SIGSTOP)
    second = start(0.5)
    says(second, "ready")
    says(second, "has it")
    os.kill(first.pid, signal.SIGCONT)
    _, error = first.communicate(timeout=10)
    assert first.returncode == -signal.SIGKILL
    assert "taken over" in error
    second.communicate(timeout=10)
    assert second.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_lets_go_at_once(tmp_path: Path, start: Start, number: int) -> None:
    """The next one need not wait for a process that was told to end."""
    first = start(60)
    says(first, "ready")
    says(first, "has it")
    first.send_signal(number)
    first.communicate(timeout=10)
    assert first.returncode == 128 + number
    _, error = start(0).communicate(timeout=10)
    assert "waiting" not in error


def test_process_below_the_owner_shares_its_lease(tmp_path: Path) -> None:
    """Not waiting for itself; afterwards the owner still has it."""
    folder = tmp_path / "lease"
    program = (
        "import sys\nfrom pathlib import Path\nfrom tlora import lease\n"
        "with lease.held(Path(sys.argv[1])) as claim:\n    print(claim.path.name)"
    )
    with lease.held(folder) as claim:
        below = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        assert below.stdout.strip() == claim.path.name == "000001"
        assert "free" not in json.loads(claim.path.read_bytes())
    assert json.loads((folder / "000001").read_bytes())["free"]
    assert lease.INHERITED not in os.environ


def test_claim_made_after_an_old_listing_is_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who created a number below the owner's holds nothing."""
    (tmp_path / "000005").write_text("{}")
    assert lease._create(tmp_path, 5) is None
    assert lease._create(tmp_path, 4) is None
    assert [path.name for path in tmp_path.iterdir()] == ["000005"]
    assert lease._create(tmp_path, 6) == tmp_path / "000006"
    assert [path.name for path in tmp_path.iterdir()] == ["000006"]


def test_claims_that_cannot_be_refreshed_end_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a waiter's patience is over."""
    claim = lease.take(tmp_path / "lease")
    claim.release()
    ended = []

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(lease, "BEAT", 0.01)
    monkeypatch.setattr(lease, "LOOK", 0.001)
    monkeypatch.setattr(lease, "_write", broken)

    def kill(pid: int, number: int) -> None:
        ended.append((pid, number, time.monotonic()))
        raise SystemExit

    monkeypatch.setattr(lease.os, "kill", kill)
    started = time.monotonic()
    claim._stop.clear()
    with pytest.raises(SystemExit):
        claim._beat()
    monkeypatch.delenv(lease.INHERITED, raising=False)
    assert ended[0][:2] == (os.getpid(), signal.SIGKILL)
    assert ended[0][2] - started >= 0.75 * lease.PATIENCE * 0.001


def test_full_disk_keeps_the_lease(tmp_path: Path) -> None:
    """A sign of life overwrites in place: the claim's size never changes."""
    with lease.held(tmp_path) as claim:
        before = claim.path.stat()
        lease._write(claim.path, beat=10**9)
        after = claim.path.stat()
        assert (after.st_ino, after.st_size) == (before.st_ino, lease.LENGTH)


# -- what another job made meanwhile ---------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artefact that another job made, whose lease is free."""
    monkeypatch.delenv(lease.CONTROLLER, raising=False)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model").write_text("1234")
    (tmp_path / "train.json").write_text("{}")
    with lease.held(lease.lease_folder("train", tmp_path)) as claim:
        claim.finish(tmp_path, "stamp")
    return tmp_path


def again(out: Path, stamp: str = "stamp", waited: bool = True) -> bool:
    """Return what the next job says."""
    with lease.held(lease.lease_folder("train", out)) as claim:
        claim.waited = waited
        return claim.finished_meanwhile(out, lambda: stamp)


def test_what_was_made_while_waiting_is_not_made_again(made: Path) -> None:
    """Only by the job that was waited for."""
    assert again(made)
    assert not again(made), "the one before has made nothing"


@pytest.mark.parametrize("change", ["stamp", "missing", "torn", "no wait", "broken record"])
def test_anything_else_is_made_again(made: Path, change: str) -> None:
    """Other inputs, files that are not whole, and what was there already."""
    if change == "missing":
        (made / "weights" / "model").unlink()
    if change == "torn":
        (made / "weights" / "model").write_text("12")
    if change == "broken record":
        (made / ".lease" / "train" / "finished").write_text("{")
    stamp = "other" if change == "stamp" else "stamp"
    assert not again(made, stamp, waited=change != "no wait")


def test_jobs_know_what_was_made_after_their_snakemake_began(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that starts late finds what a killed snakemake's job made; a forced rerun does not."""
    numbers = tmp_path / ".work" / "controllers"
    lease.new_controller(numbers)
    first = os.environ[lease.CONTROLLER]
    assert not again(made, waited=False), "made before the first snakemake"
    lease.new_controller(numbers)
    second = os.environ[lease.CONTROLLER]
    assert first != second
    monkeypatch.setenv(lease.CONTROLLER, first)
    with lease.held(lease.lease_folder("train", made)) as claim:
        claim.finish(made, "stamp")
    assert again(made, waited=False)
    monkeypatch.setenv(lease.CONTROLLER, second)
    assert again(made, waited=False), "the first one's job ended after the second had begun"
    lease.new_controller(numbers)
    assert not again(made, waited=False), "a third one asks for it anew"


def test_all_presets_are_tracked_one_at_a_time(tmp_path: Path) -> None:
    """They share runs in one store."""
    folders = {lease.lease_folder("track", tmp_path / name) for name in ("one", "two")}
    assert len(folders) == 1
    assert lease.lease_folder("compare", tmp_path / "one") not in folders
