"""Statistics over seeds and items: intervals, tests, detectable differences, ranks.

A *sample* is the verdicts of one method on one benchmark: one row a run (seed), one column an item,
the same items for all methods. Both seeds and items are random: another training would give another
accuracy, and other items of the same kind would as well. An item is easy or hard for all methods,
so methods are compared item by item; a run is as good or bad as its seed, whatever the other
method's seed was, so the runs of two methods are independent (equal seed numbers are no pairs).

The mean of a method over n runs and m items, and the difference of two, then has the variance

    item variance / m  +  seed variance / n            (the second term once a method)

with the item variance taken over the items' means over runs (or their differences). The seed
variance is the variance of the runs' accuracies less what items alone make of it (the residual mean
square of the two-way table), never below 0. The sum is compared with Student's t distribution at
Satterthwaite's degrees of freedom.

With two or three runs a method's own seed variance is often too small by chance, and its interval
with it. So it is the larger of its own and of the mean over all methods of the benchmark. The mean
has the degrees of freedom of all methods; a larger one those of the others as far as they bear it
out, and its own beyond. `tests/benchmarks/statistics_simulation.py` measures what that gives: at
most 6 % false positives, and intervals that cover 95 % or more, where seeds vary alike.

All functions are pure and take the values' own unit; shares stay shares.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""

LEVEL = 0.05
"""Share of false positives that a test may have; an interval covers the rest."""

POWER = 0.8
"""How often the detectable difference is found."""

SEED_SETS = 1.4
"""Degrees of freedom of the seeds in a comparison to come, in those of one method: 1 where one seed
variance is by far the largest, 2 or more where all are alike; between them by simulation."""


class Summary(NamedTuple):
    """Mean and spread of one number over runs.

    Attributes
    ----------
    mean
        Arithmetic mean; None where there is no run.
    std
        Sample standard deviation (n - 1); None with fewer than two runs.
    count
        The number of runs.
    """

    mean: float | None
    std: float | None
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation of `values`, independent of their order.

    >>> summarise([0.2, 0.4])
    Summary(mean=0.30000000000000004, std=0.14142135623730953, count=2)
    >>> summarise([0.5])
    Summary(mean=0.5, std=None, count=1)
    """
    count = len(values)
    if count == 0:
        return Summary(None, None, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Summary(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Summary(mean, math.sqrt(variance), count)


def wilson_half_width(share: float, n: int, z: float = Z95) -> float:
    """Half the width of the Wilson score interval of a share seen on `n` items.

    It says how far the share of correct answers of one run may lie from what the same run would
    reach on endlessly many items of this kind; it knows nothing of seeds. Unlike the normal
    approximation it does not vanish at 0 and 1.

    Parameters
    ----------
    share
        Between 0 and 1.
    n
        Number of items, at least 1.
    z
        Normal quantile; the default gives 95 %.

    Raises
    ------
    ValueError
        When `share` or `n` is out of range.

    References
    ----------
    E. B. Wilson (1927), Probable inference, the law of succession, and statistical inference.

    >>> round(wilson_half_width(0.5, 164), 3)
    0.076
    """
    if not 0.0 <= share <= 1.0 or n < 1:
        raise ValueError(f"share {share!r} of {n!r} items: expected 0 <= share <= 1 and n >= 1")
    return _wilson(share * (1 - share) / n, n, z, z)


def _wilson(variance: float, n: int, quantile: float, z: float = Z95) -> float:
    # Wilson's form for any variance of a share: it never vanishes
    return quantile / (1 + z * z / n) * math.sqrt(variance + z * z / (4 * n * n))


# ---------------------------------------------------------------- seeds


class SeedEffect(NamedTuple):
    """What the seed adds to the variance of one method's mean.

    Attributes
    ----------
    spread
        Variance of the runs' means, as it is used, over the number of runs.
    excess
        The part of `spread` that items do not explain, at least 0.
    df
        Degrees of freedom of `spread`.
    pooled
        Whether `spread` is the mean over methods and not the method's own.
    """

    spread: float
    excess: float
    df: float
    pooled: bool


NO_SEED = SeedEffect(0.0, 0.0, math.inf, False)
"""Of a row that was not trained: the base model."""


def seed_effects(
    samples: Mapping[str, NDArray[np.float64]], unseeded: Collection[str] = ()
) -> dict[str, SeedEffect | None]:
    """Return the seed effect of every method; None where no method has two runs.

    Parameters
    ----------
    samples
        Verdicts by method, each (runs, items); the items are the same.
    unseeded
        The methods without a seed: nothing is random in how they were made.
    """
    seeded = [name for name in samples if name not in unseeded]
    weights, means, residuals = {}, {}, {}
    for name in seeded:
        values = samples[name]
        runs, items = values.shape
        if runs > 1:
            rows = values.mean(axis=1)
            rest = values - rows[:, None] - values.mean(axis=0) + values.mean()
            weights[name] = runs - 1
            means[name] = float(rows.var(ddof=1))
            # of one run's mean: the part of its variance over seeds that single items make
            residuals[name] = float((rest**2).sum()) / ((runs - 1) * max(1, items - 1) * items)
    found: dict[str, SeedEffect | None] = {name: NO_SEED for name in samples if name in unseeded}
    total = sum(weights.values())
    if total == 0:
        return found | dict.fromkeys(seeded)
    shared = sum(weights[name] * means[name] for name in weights) / total
    noise = sum(weights[name] * residuals[name] for name in weights) / total
    for name in seeded:
        runs = len(samples[name])
        own, residual = means.get(name, 0.0), residuals.get(name, noise)
        # equal variances must not turn on the last digit
        pooled = own <= shared * (1 + 1e-9)
        df = float(total)
        if not pooled:
            freedom = total - weights[name]
            others = (total * shared - weights[name] * own) / freedom
            borne = max(0.0, others) / own
            df = 1 / (borne / freedom + (1 - borne) / weights[name])
        spread = max(own, shared) / runs
        found[name] = SeedEffect(spread, max(0.0, spread - residual / runs), df, pooled)
    return found


def _satterthwaite(items: float, count: int, effects: Sequence[SeedEffect]) -> tuple[float, float]:
    """Return variance and degrees of freedom of a mean from its parts.

    `items`: the variance from `count` items; `effects`: of the methods in it.
    """
    variance = items + sum(effect.excess for effect in effects)
    own = [(effect.spread, effect.df) for effect in effects if not effect.pooled]
    shared = [effect for effect in effects if effect.pooled]
    # the mean over methods is one estimate, however many terms it stands in
    parts = [(items, count - 1.0), *own]
    parts += [(sum(effect.spread for effect in shared), shared[0].df)] if shared else []
    parts = [(value, df) for value, df in parts if value > 0 and math.isfinite(df)]
    if not parts:
        return variance, float(count - 1)
    df = variance**2 / sum(value**2 / df for value, df in parts)
    return variance, max(df, min(df for _, df in parts))


# ---------------------------------------------------------------- one method, two methods


class Difference(NamedTuple):
    """One method minus another.

    Attributes
    ----------
    value
        Difference of the means.
    half_width
        Of its 95 % interval, for this comparison alone.
    p
        Two-sided p-value, for this comparison alone.
    test
        `crossed`: over seeds and items; `mcnemar` (exact) or `items` (paired t): over the items of
        one run each, which says nothing of other seeds.
    t, df
        The statistic and its degrees of freedom; None for McNemar's test.
    """

    value: float
    half_width: float
    p: float
    test: str
    t: float | None = None
    df: float | None = None


def half_width(values: NDArray[np.float64], effect: SeedEffect | None) -> float | None:
    """Return the 95 % half-width of a method's mean over seeds and items.

    Parameters
    ----------
    values
        Verdicts, (runs, items).
    effect
        The method's seed effect. With None, and for a row without seeds, the interval is that of
        the items alone: Wilson's for verdicts of 0 and 1.

    Returns
    -------
    float or None
        None with a single item that is no verdict of 0 and 1.
    """
    items = values.shape[1]
    binary = _binary(values)
    mean = values.mean(axis=0)
    if binary and len(values) == 1 and (effect is None or effect is NO_SEED):
        return wilson_half_width(float(mean.mean()), items)
    if items < 2:
        return None
    variance, df = _satterthwaite(float(mean.var(ddof=1)) / items, items, [effect or NO_SEED])
    quantile = _quantile(df)
    return _wilson(variance, items, quantile) if binary else quantile * math.sqrt(variance)


def difference(
    values: NDArray[np.float64],
    other: NDArray[np.float64],
    effect: SeedEffect | None,
    other_effect: SeedEffect | None,
) -> Difference | None:
    """Compare two methods on the same items.

    The crossed test needs the seed effects of both; without them (no method has a second run) the
    first runs are compared item by item.

    Parameters
    ----------
    values, other
        Verdicts, (runs, items) with the same items.
    effect, other_effect
        The seed effects.

    Returns
    -------
    Difference or None
        None with fewer than two items.

    Raises
    ------
    ValueError
        For unequal numbers of items.
    """
    items = values.shape[1]
    if items != other.shape[1]:
        raise ValueError(f"{items} and {other.shape[1]} items: expected the same items")
    if items < 2:
        return None
    crossed = effect is not None and other_effect is not None
    if not crossed:
        values, other = values[:1], other[:1]
    gap = values.mean(axis=0) - other.mean(axis=0)
    value = float(gap.mean())
    # where every item differs alike, the next one might not: at least one item's worth
    spread = max(float(gap.var(ddof=1)) / items, 0.0 if value == 0 else items**-2.0)
    effects = [effect, other_effect] if crossed else []
    variance, df = _satterthwaite(spread, items, [e for e in effects if e is not None])
    error = math.sqrt(variance)
    width = _quantile(df) * error
    if not crossed and _binary(values) and _binary(other):
        return Difference(value, width, mcnemar(values[0], other[0]), "mcnemar")
    t = value / error if error else 0.0
    return Difference(value, width, _two_sided(t, df), "crossed" if crossed else "items", t, df)


def mcnemar(values: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the p-value of McNemar's exact test for two runs on the same items.

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 1.0]), np.array([0, 0, 0, 0, 0, 0.0]))
    0.03125
    """
    from scipy.special import bdtr

    more, less = int((values > other).sum()), int((values < other).sum())
    return min(1.0, 2 * float(bdtr(min(more, less), more + less, 0.5))) if more + less else 1.0


def _binary(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _quantile(df: float, level: float = LEVEL) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - level / 2))


def _two_sided(t: float, df: float) -> float:
    from scipy.special import stdtr

    return 2 * float(stdtr(df, -abs(t)))


# ---------------------------------------------------------------- a benchmark, a table


@dataclass(frozen=True)
class Compared:
    """One method beside the baseline and the best of its benchmark.

    Attributes
    ----------
    half_width
        95 % half-width of its mean over seeds and items.
    baseline, best
        Its difference from the baseline and from the best; None of these themselves, of rows
        without seeds, and where there is nothing to compare with.
    p_baseline, p_best
        p-values of the two, corrected for all comparisons of this kind in the table (Holm), and
        the latter for the best being picked from the same numbers (studentized range).
    mark
        `best`; `tie`: not distinguishable from the best; `worse`; or empty where untested.
    """

    half_width: float | None
    baseline: Difference | None = None
    best: Difference | None = None
    p_baseline: float | None = None
    p_best: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Analysis:
    """One benchmark: every method, and what the design can show.

    Attributes
    ----------
    methods
        By name.
    detectable
        The least true difference of two methods that a comparison of theirs finds in 80 % of
        cases; None with fewer than two trained methods or two items.
    items
        How many items were compared.
    """

    methods: dict[str, Compared]
    detectable: float | None
    items: int


def analyse(
    benchmarks: Mapping[str, Mapping[str, NDArray[np.float64]]],
    baseline: str | None = None,
    unseeded: Collection[str] = (),
) -> dict[str, Analysis]:
    """Compare all methods of a table with the baseline and with the best of each benchmark.

    Parameters
    ----------
    benchmarks
        For every benchmark the verdicts by method, each (runs, items) with the same items.
    baseline
        The method that all others are compared with.
    unseeded
        Methods without a seed (the base model): they get an interval and take no part in tests.
    """
    found = {
        name: _one_benchmark(samples, baseline, unseeded) for name, samples in benchmarks.items()
    }
    places = [(name, method) for name in found for method in found[name].methods]
    for kind in ("baseline", "best"):
        field = f"p_{kind}"
        family = [
            (name, method)
            for name, method in places
            if getattr(found[name].methods[method], field) is not None
        ]
        raw = [getattr(found[name].methods[method], field) for name, method in family]
        for (name, method), p in zip(family, holm(raw), strict=True):
            old = found[name].methods[method]
            mark = {"mark": "tie" if p >= LEVEL else "worse"} if kind == "best" else {}
            found[name].methods[method] = replace(old, **{field: p}, **mark)
    return found


def _one_benchmark(
    samples: Mapping[str, NDArray[np.float64]], baseline: str | None, unseeded: Collection[str]
) -> Analysis:
    effects = seed_effects(samples, unseeded)
    trained = [name for name in samples if name not in unseeded]
    best = max(trained, key=lambda name: samples[name].mean(), default=None)
    methods = {}
    for name, values in samples.items():
        row = Compared(half_width(values, effects[name]))
        if name in trained and best is not None:
            if baseline in trained and name != baseline:
                gap = difference(values, samples[baseline], effects[name], effects[baseline])
                row = replace(row, baseline=gap, p_baseline=None if gap is None else gap.p)
            if name == best:
                row = replace(row, mark="best" if len(trained) > 1 else "")
            else:
                gap = difference(values, samples[best], effects[name], effects[best])
                p = None if gap is None else _picked(gap, len(trained))
                row = replace(row, best=gap, p_best=p)
        methods[name] = row
    items = next((values.shape[1] for values in samples.values()), 0)
    detectable = detectable_difference({name: samples[name] for name in trained})
    return Analysis(methods, detectable, items)


def _picked(gap: Difference, methods: int) -> float:
    """Return the p-value of a comparison with the best of several, as a part of Holm's family.

    The best is the largest of `methods` means, so a difference from it is large by selection. The
    studentized range (Games and Howell 1976) is the distribution of the largest of all
    differences; its p-value holds for all of a benchmark's comparisons with the best at once, and
    Holm's method gets an equal part of it for each.
    """
    if methods == 2:
        return gap.p
    if gap.t is None or gap.df is None:
        return min(1.0, gap.p * methods / 2)
    from scipy.stats import studentized_range

    together = float(studentized_range.sf(abs(gap.t) * math.sqrt(2), methods, gap.df))
    return max(gap.p, together / (methods - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = least
    return corrected


def detectable_difference(samples: Mapping[str, NDArray[np.float64]]) -> float | None:
    """Return the true difference of two methods that this design finds in 80 % of cases.

    For one comparison at the 5 % level, with the mean item and seed variances of `samples` and the
    least number of runs that one of them has; correcting for many comparisons makes it larger. By
    simulation 75 to 93 % of such differences are found.

    Parameters
    ----------
    samples
        Verdicts of the trained methods, each (runs, items) with the same items.
    """
    from scipy.special import nctdtrinc

    count = len(samples)
    items = next((values.shape[1] for values in samples.values()), 0)
    if count < 2 or items < 2:
        return None
    means = np.stack([values.mean(axis=0) for values in samples.values()])
    # the mean over pairs of the variance of their differences
    squares = means.var(axis=1, ddof=1).sum() * count - means.sum(axis=0).var(ddof=1)
    pairs = count * (count - 1) / 2
    runs = min(len(values) for values in samples.values())
    effects = [effect for effect in seed_effects(samples).values() if effect is not None]
    several = [len(values) - 1 for values in samples.values() if len(values) > 1]
    parts = []
    if effects:
        excess = _pooled_excess(samples)
        df = SEED_SETS * (runs - 1) if runs > 1 else float(sum(several))
        parts = [SeedEffect(2 * excess[0] / runs, 2 * excess[1] / runs, df, False)]
    variance, df = _satterthwaite(float(squares) / pairs / items, items, parts)
    if variance == 0:
        return None
    df = min(df, 1e6)
    return float(nctdtrinc(df, 1 - POWER, _quantile(df))) * math.sqrt(variance)


def _pooled_excess(samples: Mapping[str, NDArray[np.float64]]) -> tuple[float, float]:
    """Return the pooled variance of a run's mean, and its part that items do not explain."""
    # a method of one run has the pooled effect, undivided
    some = next(iter(samples.values()))
    effect = seed_effects({**samples, "": some[:1]})[""]
    assert effect is not None
    return effect.spread, effect.excess


def bootstrap_intervals(
    samples: Mapping[str, NDArray[np.float64]], draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the hierarchical percentile bootstrap's 95 % interval of every method's mean.

    Runs are drawn with replacement, then items (the same ones for all methods). It is told beside
    the other interval because it is widely used and need not be symmetric; with two or three runs
    it covers too little where seeds vary.

    Parameters
    ----------
    samples
        Verdicts by method, each (runs, items) with the same items.
    draws
        Number of resamples.
    seed
        Of the generator: equal input gives equal bounds.
    """
    generator = np.random.default_rng(seed)
    means: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(draws):
        weights = None
        for name, values in samples.items():
            runs, items = values.shape
            if weights is None:
                weights = np.bincount(generator.integers(0, items, items), minlength=items) / items
            means[name].append(float((values @ weights)[generator.integers(0, runs, runs)].mean()))
    tails = [LEVEL / 2, 1 - LEVEL / 2]
    bounds = {name: np.quantile(found, tails) for name, found in means.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def mean_ranks(means: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, list[float]]]:
    """Rank methods on every benchmark (1: highest mean; equal means share their mean rank).

    Parameters
    ----------
    means
        Mean by benchmark and method.

    Returns
    -------
    dict
        By method its mean rank and its rank on each benchmark, best mean rank first; only methods
        that have a mean on every benchmark, ranked among themselves.

    >>> mean_ranks({"a": {"x": 3.0, "y": 2.0}, "b": {"x": 1.0, "y": 1.0, "z": 5.0}})
    {'x': (1.25, [1.0, 1.5]), 'y': (1.75, [2.0, 1.5])}
    """
    columns = list(means.values())
    names = [n for n in (columns[0] if columns else ()) if all(n in column for column in columns)]
    ranks: dict[str, list[float]] = {name: [] for name in names}
    for column in columns:
        for name in names:
            above = sum(column[other] > column[name] for other in names)
            equal = sum(column[other] == column[name] for other in names)
            ranks[name].append(above + (equal + 1) / 2)
    found = {name: (math.fsum(places) / len(places), places) for name, places in ranks.items()}
    return dict(sorted(found.items(), key=lambda item: item[1][0]))
