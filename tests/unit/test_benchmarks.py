"""The measurements of tests/benchmarks run; no time is asserted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import measuring

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = [
    path.stem for path in sorted(FOLDER.glob("*.py")) if "import measuring" in path.read_text()
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_small(name, tmp_path):
    """Every script prints rows of five cells at its smallest size."""
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--small"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[0] == "| what | ours | theirs | ratio | machine, versions |"
    assert len(rows) > 2
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 6, row
    assert not list(tmp_path.iterdir()), "it left files behind"


def test_child_peak():
    """The peak of a process is its own, whatever memory this one has."""
    held = bytearray(300 << 20)
    small = measuring.child([sys.executable, "-c", "print('done')"])
    large = measuring.child([sys.executable, "-c", "x = bytearray(200 << 20)"])
    assert small.output == "done\n" and small.status == 0
    assert small.peak < 100 << 20 < 200 << 20 < large.peak < 300 << 20 == len(held)


def test_child_failure():
    """A process that fails says why; `check=False` returns it."""
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(RuntimeError, match="no such thing"):
        measuring.child(command)
    assert measuring.child(command, check=False).status == 1


def test_alternating():
    """Functions are called in turn."""
    calls = []
    found = measuring.alternating({name: lambda n=name: calls.append(n) for name in "ab"}, 2)
    assert calls == ["a", "b", "a", "b"] and set(found) == {"a", "b"}


def test_row(capsys):
    """A row has five cells, floats three digits; the machine is named without loading torch."""
    measuring.header()
    measuring.row("train, seed 0", "1.0 s", 2.34567, 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| train, seed 0 | 1.0 s | 2.35 | 0.5 | ")
    assert "torch" in lines[-1] and "Python" in lines[-1]
