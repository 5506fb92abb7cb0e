"""Seconds of a whole workflow whose jobs are forks of one process beside one process a job.

    python tests/benchmarks/forks.py [PRESET]

Runs snakemake on a preset (config/config.yaml: the demo), once a way, in copies of this checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import measuring
from checkout import copy_checkout

ROOT = Path(__file__).resolve().parents[2]

# Two runs of the demo's first task that hold every stage.
SMALL = """\
models: [tiny]
tasks: [arithmetic]
methods: [lora]
seeds: [1]
set: {data.train: 8, data.validation: 4, data.test: 4, batch_size: 4}
overrides: [{benchmarks: [arithmetic], set: {data.test: 4, max_new_tokens: 2}}]
"""


def run(folder: Path, preset: str, forks: bool) -> None:
    """Run a preset in a folder; raise where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "TLORA_FORKS"}
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", preset],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder)} | ({} if forks else {"TLORA_FORKS": "off"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])


def main() -> None:
    """Run both and print their row."""
    parser = measuring.parser(__doc__)
    parser.add_argument("preset", nargs="?", default="config/config.yaml")
    options = parser.parse_args()
    seconds = {}
    for forks in (True, False):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "checkout")
            copy_checkout(ROOT, folder)
            if options.small:
                (folder / "config" / "small.yaml").write_text(SMALL, encoding="utf-8")
                options.preset = "config/small.yaml"
            target = (folder, options.preset, forks)
            seconds[forks] = measuring.seconds(lambda target=target: run(*target))
    measuring.header()
    measuring.row(
        f"{options.preset} from nothing, 2 jobs at a time",
        f"forks of one process: {seconds[True]:.0f} s",
        f"a process a job: {seconds[False]:.0f} s",
        seconds[True] / seconds[False],
    )


if __name__ == "__main__":
    main()
