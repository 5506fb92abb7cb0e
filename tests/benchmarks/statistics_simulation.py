"""Errors and coverage of the statistics of the comparison, on simulated verdicts.

    python tests/benchmarks/statistics_simulation.py [--replications 1000 --items 500 ...]

Every replication draws new items and new seeds. An item is right when ease of the item + effect of
the method on the item + quality of the seed + noise is above 0, all normal; the quality is set so
that the accuracy a seed would have on endlessly many items has the stated mean and standard
deviation. Prints Markdown; with --check, exits with 1 where a test of methods with equal seed SDs
has more than 6 % false positives, or an interval covers less than 93 %, beyond the simulation's own
noise.

Columns
-------
false positives
    Two equal methods are called different (5 % level, one comparison); `pooled McNemar`: by
    McNemar's test on the items of all seeds pooled, for comparison.
coverage
    Of the 95 % interval of a method's mean and of a difference; `bootstrap`: of the hierarchical
    percentile bootstrap's interval of the mean.
found
    A difference of the size that `detectable_difference` names (on average) is found.
all ties marked
    No method of a table of equal ones is marked as worse than the best (family-wise).
10 points
    A method 10 points above the others is marked as the best and all others as worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tlora.comparison.statistics import (
    LEVEL,
    analyse,
    bootstrap_intervals,
    detectable_difference,
    difference,
    half_width,
    holm,
    mcnemar,
    seed_effects,
)

ITEM, METHOD, NOISE = 1.0, 0.5, 1.0
"""Standard deviations of an item's ease, of a method's effect on an item, of one answer."""


def draw(
    generator: np.random.Generator,
    accuracies: Sequence[float],
    seed_points: Sequence[float],
    seeds: int,
    items: int,
) -> dict[str, NDArray[np.float64]]:
    """Return verdicts by method, each (seeds, items).

    Parameters
    ----------
    accuracies
        Expected share of right answers of every method.
    seed_points
        Standard deviation of a seed's accuracy in percentage points, of every method.
    """
    ease = ITEM * generator.standard_normal(items, dtype=np.float32)
    total = np.sqrt(ITEM**2 + METHOD**2 + NOISE**2)
    found = {}
    for index, (accuracy, points) in enumerate(zip(accuracies, seed_points, strict=True)):
        quality = accuracy + points / 100 * generator.standard_normal(seeds)
        start = (ndtri(quality.clip(0.001, 0.999)) * total).astype(np.float32)
        taste = METHOD * generator.standard_normal(items, dtype=np.float32)
        noise = NOISE * generator.standard_normal((seeds, items), dtype=np.float32)
        found[f"m{index}"] = (start[:, None] + ease + taste + noise > 0).astype(float)
    return found


def measure(
    seeds: int,
    seed_points: Sequence[float],
    items: int = 500,
    accuracy: float = 0.5,
    replications: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return the share of replications for every question that concerns equal methods.

    The first and the last method are the pair that is compared.
    """
    generator = np.random.default_rng(seed)
    hits = dict.fromkeys(("false", "mcnemar", "first", "last", "difference", "ties"), 0)
    last = f"m{len(seed_points) - 1}"
    for _ in range(replications):
        samples = draw(generator, [accuracy] * len(seed_points), seed_points, seeds, items)
        effects = seed_effects(samples)
        a, b = samples["m0"], samples[last]
        gap = difference(a, b, effects["m0"], effects[last])
        hits["false"] += gap.p < LEVEL
        hits["difference"] += abs(gap.value) <= gap.half_width
        hits["mcnemar"] += mcnemar(a.ravel(), b.ravel()) < LEVEL
        hits["first"] += abs(a.mean() - accuracy) <= half_width(a, effects["m0"])
        hits["last"] += abs(b.mean() - accuracy) <= half_width(b, effects[last])
        hits["ties"] += not _any_worse(samples, effects)
    return {name: hit / replications for name, hit in hits.items()}


def _any_worse(samples: dict[str, NDArray[np.float64]], effects: dict[str, Any]) -> bool:
    best = max(samples, key=lambda name: samples[name].mean())
    others = [name for name in samples if name != best]
    p = [difference(samples[n], samples[best], effects[n], effects[best]).p for n in others]
    # the correction for picking the best only makes p larger, and takes its time
    if min(holm(p)) >= LEVEL:
        return False
    return any(m.mark == "worse" for m in analyse({"": samples})[""].methods.values())


def found_share(
    seeds: int,
    seed_points: Sequence[float],
    items: int = 500,
    accuracy: float = 0.5,
    replications: int = 300,
    seed: int = 0,
) -> float:
    """Return how often a difference is found that is as large as the design is said to find."""
    generator = np.random.default_rng(seed)
    equal = [accuracy] * len(seed_points)
    sizes = [
        detectable_difference(draw(generator, equal, seed_points, seeds, items)) for _ in range(100)
    ]
    gap = float(np.mean(sizes))
    hits = 0
    for _ in range(replications):
        raised = [accuracy + gap] + [accuracy] * (len(seed_points) - 1)
        samples = draw(generator, raised, seed_points, seeds, items)
        effects = seed_effects(samples)
        hits += difference(samples["m0"], samples["m1"], effects["m0"], effects["m1"]).p < LEVEL
    return hits / replications


def planted_share(
    seeds: int,
    seed_points: Sequence[float],
    items: int = 500,
    accuracy: float = 0.5,
    points: float = 10.0,
    replications: int = 60,
    seed: int = 0,
) -> float:
    """Return how often one better method is marked as the best and all others as worse."""
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(replications):
        accuracies = [accuracy + points / 100] + [accuracy] * (len(seed_points) - 1)
        samples = draw(generator, accuracies, seed_points, seeds, items)
        marks = [row.mark for row in analyse({"": samples})[""].methods.values()]
        hits += marks == ["best"] + ["worse"] * (len(seed_points) - 1)
    return hits / replications


def bootstrap_coverage(
    seeds: int,
    points: float,
    items: int = 500,
    accuracy: float = 0.5,
    replications: int = 200,
    seed: int = 0,
) -> float:
    """Return the share of bootstrap intervals that hold the true mean."""
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(replications):
        samples = draw(generator, [accuracy], [points], seeds, items)
        low, high = bootstrap_intervals(samples, draws=400)["m0"]
        hits += low <= accuracy <= high
    return hits / replications


def noise(share: float, replications: int) -> float:
    """Return three standard errors of a simulated share."""
    return 3 * float(np.sqrt(share * (1 - share) / replications))


def table(titles: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    """Print Markdown line by line, as the rows come."""
    print("| " + " | ".join(titles) + " |")
    print("|" + "---:|" * len(titles), flush=True)
    for row in rows:
        cells = [f"{100 * cell:.1f} %" if isinstance(cell, float) else str(cell) for cell in row]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--accuracy", type=float, default=0.5)
    parser.add_argument("--methods", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wrong: list[str] = []
    place = {"items": options.items, "accuracy": options.accuracy}
    same = place | {"replications": options.replications}

    def equal() -> Iterator[Sequence[object]]:
        for methods in options.methods:
            for seeds in (2, 3, 5):
                for points in (0.0, 1.0, 2.0, 3.0):
                    spread = [points] * methods
                    found = measure(seeds, spread, **same)
                    covered = (found["first"] + found["last"]) / 2
                    name = f"{methods} methods, {seeds} seeds, SD {points:g}"
                    if found["false"] > 0.06 + noise(0.06, options.replications):
                        wrong.append(f"{name}: {found['false']:.3f} false positives")
                    least = 0.93 - noise(0.93, options.replications)
                    if min(covered, found["difference"]) < least:
                        wrong.append(f"{name}: covers {min(covered, found['difference']):.3f}")
                    yield (
                        *(methods, seeds, f"{points:g}", found["false"], found["mcnemar"]),
                        *(covered, found["difference"]),
                        bootstrap_coverage(seeds, points, **place),
                        found_share(seeds, spread, **place),
                        found["ties"],
                        planted_share(seeds, spread, **place),
                    )

    def unequal() -> Iterator[Sequence[object]]:
        for seeds in (2, 3, 5):
            for spread in ([0.0, 0.0, 0.0, 3.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 0.0]):
                found = measure(seeds, spread, **same)
                shown = " ".join(f"{points:g}" for points in spread)
                shares = ("false", "first", "last", "difference", "ties")
                yield (seeds, shown, *(found[name] for name in shares))

    print(f"{options.items} items, accuracy {options.accuracy:g}, {options.replications} draws.\n")
    heads = ["methods", "seeds", "seed SD (points)", "false positives", "pooled McNemar"]
    heads += ["coverage, mean", "coverage, difference", "coverage, bootstrap", "found"]
    table([*heads, "all ties marked", "10 points"], equal())
    print("\nUnequal seed SDs; the first and the last method are compared.\n")
    heads = ["seeds", "seed SDs (points)", "false positives", "coverage, first mean"]
    table([*heads, "coverage, last mean", "coverage, difference", "all ties marked"], unequal())
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return int(options.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
