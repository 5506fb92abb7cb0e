"""Bytes that a finished grid wrote per run, by stage: rows of a Markdown table.

    python tests/benchmarks/disk.py RESULTS

RESULTS is a grid's folder of results, which is only read; without it, and with --small, T-LoRA
is trained on a tiny model first. A file counts once, under the first of its names (exports
link to what training wrote). A run is a trained model; what runs share is divided among them. The
last row is what calibration keeps of a model of Llama-2-7B's shape.
"""

from __future__ import annotations

import stat
import tempfile
from collections import Counter
from pathlib import Path

import measuring

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "calibrate", "allocate", "initialize", "train", "export", "check", "generate")
STAGES += ("score", "overlap", "comparison")
OWN = {".lease", ".snakemake_timestamp"}
"""Notes of the workflow, in the folders of all stages."""
METHODS = ("tlora",)


def main() -> None:
    """Print the rows."""
    parser = measuring.parser(__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="a finished grid's folder")
    options = parser.parse_args()
    measuring.header()
    if options.results is None:
        with tempfile.TemporaryDirectory() as folder:
            written(made(Path(folder)), f"{', '.join(METHODS)} on a tiny random model")
    elif not (options.results / "train").is_dir():
        parser.error(f"{options.results}: no folder `train` in it: expected a finished grid's")
    else:
        written(options.results, str(options.results))
    calibration()


def made(folder: Path) -> Path:
    """Run a small grid and return its results."""
    from contract.grid import SMALL, make_grid

    grid = make_grid(ROOT, folder, SMALL, methods=METHODS)
    for stage in STAGES[:-2]:
        for unit in grid.plan.of(stage):
            grid.make(unit)
    return folder / "results"


def sizes(folder: Path) -> tuple[Counter[str], int]:
    """Return the bytes of every stage, and how many files there are."""
    found: Counter[str] = Counter()
    seen = set()
    names = sorted(path.name for path in folder.iterdir())
    for name in [*STAGES, *(name for name in names if name not in STAGES)]:
        top = folder / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            state = path.lstat()
            if not stat.S_ISREG(state.st_mode) or (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            own = OWN & set(path.relative_to(folder).parts)
            found["claims of jobs" if own else name] += state.st_size
    return found, len(seen)


def written(folder: Path, name: str) -> None:
    """Print the row of a grid."""
    found, files = sizes(folder)
    runs = sum(1 for _ in folder.glob("train/**/train.json"))
    each = [(size, stage) for stage, size in found.items() if size >= found.total() / 1000]
    parts = ", ".join(f"{stage} {size / runs / 1e3:,.0f}" for size, stage in sorted(each)[::-1])
    measuring.row(
        f"disk: {name}, {runs} run{'s' * (runs > 1)}, {files:,} files",
        f"{found.total() / runs / 1e6:.2f} MB a run; in kB: {parts}",
        versions=measuring.machine("torch", "mlflow"),
    )


def calibration() -> None:
    """Print what is kept of a calibration of Llama-2-7B's shape, beside float32 covariances."""
    import torch
    from safetensors.torch import save_file

    width, inner, layers = 4096, 11008, 32
    inputs = {"q_proj": width, "k_proj": width, "v_proj": width, "o_proj": width}
    inputs |= {"gate_proj": width, "up_proj": width, "down_proj": inner}
    names = [
        f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        for layer in range(layers)
        for name in inputs
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calibration.safetensors")
        save_file({name: torch.zeros((), dtype=torch.float64) for name in names}, path)
        kept = path.stat().st_size
    every = 4 * layers * sum(size**2 for size in inputs.values())
    # q, k and v read the same vectors, and so do gate and up.
    distinct = 4 * layers * (3 * width**2 + inner**2)
    measuring.row(
        f"disk: calibration for T-LoRA, {len(names)} modules of Llama-2-7B's shape: sensitivities "
        "(the sketch is never written); theirs: covariances in float32, one an input (one a "
        f"module: {every / 1e9:.1f} GB)",
        f"{kept / 1e3:.1f} kB",
        f"{distinct / 1e9:.1f} GB",
        f"1 / {distinct / kept:,.0f}",
        measuring.machine("torch", "safetensors"),
    )


if __name__ == "__main__":
    main()
