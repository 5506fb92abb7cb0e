"""How time and memory of TLoRA's initialisation grow with width, layers, samples and rank.

    python tests/benchmarks/scaling.py [--plot FILE.png]

One of the four is varied at a time around a small Llama of random weights. Prints seconds of the
sensitivity and of the subspaces, and the sketch's numbers in memory, with the exponent of a power
law fitted to each: cost ~ size^exponent. `tlora plan` counts these powers: passes grow with layers,
samples and width^2; the sketch's products with the weights with layers, rank and width^2.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import measuring
from initialization import build, targets

RANGES = {
    "width": (256, 512, 1024, 2048),
    "layers": (1, 2, 4, 8),
    "samples": (4, 8, 16, 32),
    "rank": (16, 32, 64, 128),
}
SMALL = {"width": (64, 128), "layers": (1, 2), "samples": (2, 4), "rank": (4, 8)}
MIDDLE = {"width": 512, "layers": 2, "samples": 8, "rank": 32}
KINDS = ("sensitivity", "subspaces", "memory")


def cost(options: argparse.Namespace) -> tuple[float, float, int]:
    """Return the seconds of the sensitivity and of the subspaces, and the sketch's bytes."""
    from tlora import input_subspaces, sensitivity
    from tlora.subspace import sketching

    model, samples = build(options)
    ranks = dict.fromkeys(targets(model), options.rank)
    spent = measuring.alternating(
        {
            "sensitivity": lambda: sensitivity(model, samples, "all-linear"),
            "subspaces": lambda: input_subspaces(model, samples, ranks),
        },
        options.repeat,
    )
    with sketching(model, "all-linear", options.rank) as start:
        size = sum(4 * (sketch.test.numel() + sketch.sums.numel()) for sketch in start.values())
    return spent["sensitivity"], spent["subspaces"], size


def exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    x = [math.log(size) for size in sizes]
    y = [math.log(max(cost, 1e-9)) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def draw(found: dict[str, dict[int, tuple]], path: Path) -> None:
    """Draw a curve for each size that was varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(12, 3), layout="constrained")
    for axis, (name, costs) in zip(axes, found.items(), strict=True):
        for index, kind in enumerate(KINDS[:2]):
            seconds = [cost[index] for cost in costs.values()]
            label = f"{kind}: {name}^{exponent(tuple(costs), seconds):.2f}"
            axis.loglog(list(costs), seconds, "o-", label=label)
        axis.set_xlabel(name)
        axis.set_xticks(list(costs), labels=list(map(str, costs)))
        axis.minorticks_off()
        ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        axis.set_yticks(ticks, labels=list(map(str, ticks)))
        axis.set_ylim(
            0.8 * min(min(cost[:2]) for costs in found.values() for cost in costs.values()),
            1.9 * max(max(cost[:2]) for costs in found.values() for cost in costs.values()),
        )
        axis.legend(loc="upper left", fontsize="small")
    axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="where to write a picture of the curves")
    options = parser.parse_args()
    options.vocabulary, options.device, options.dtype = 1024, "cpu", "float32"
    middle, ranges = MIDDLE, RANGES
    if options.small:
        import torch

        torch.set_num_threads(1)
        middle, ranges = {"width": 64, "layers": 1, "samples": 2, "rank": 4}, SMALL
        options.tokens, options.repeat, options.vocabulary = 8, 1, 64
    import transformers

    transformers.logging.set_verbosity_error()
    measuring.header()
    cost(argparse.Namespace(**{**vars(options), **middle, "repeat": 1}))  # warms up
    found: dict[str, dict[int, tuple]] = {}
    for name, sizes in ranges.items():
        points = [argparse.Namespace(**{**vars(options), **middle, name: size}) for size in sizes]
        found[name] = {size: cost(one) for size, one in zip(sizes, points, strict=True)}
        others = ", ".join(f"{key} {value}" for key, value in middle.items() if key != name)
        for index, kind in enumerate(KINDS):
            costs = [values[index] for values in found[name].values()]
            shown = [f"{c / 2**20:.1f}" if kind == "memory" else f"{c:.2f}" for c in costs]
            unit = "MiB" if kind == "memory" else "s"
            what = "G and Y of the sketch" if kind == "memory" else kind
            measuring.row(
                f"{what} against {name} ({others}, {options.tokens} tokens, seed {options.seed})",
                f"{', '.join(shown)} {unit} at {', '.join(map(str, sizes))}",
                "",
                f"{name}^{exponent(sizes, costs):.2f}",
            )
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
