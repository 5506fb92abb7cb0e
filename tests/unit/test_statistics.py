"""Statistics over seeds and items: against scipy, against hand-made cases, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks import statistics_simulation as simulation
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tlora.comparison.statistics import (
    NO_SEED,
    analyse,
    bootstrap_intervals,
    detectable_difference,
    difference,
    half_width,
    holm,
    mcnemar,
    mean_ranks,
    seed_effects,
    wilson_half_width,
)


def verdicts(seed: int, share: float, runs: int = 3, items: int = 200) -> np.ndarray:
    return (np.random.default_rng(seed).random((runs, items)) < share).astype(float)


def compared(a: np.ndarray, b: np.ndarray):
    effects = seed_effects({"a": a, "b": b})
    return difference(a, b, effects["a"], effects["b"])


# ---------------------------------------------------------------- against known tests


def test_equal_runs_leave_the_paired_t_test_over_items() -> None:
    a, b = verdicts(1, 0.6, runs=1), verdicts(2, 0.45, runs=1)
    gap = compared(np.repeat(a, 3, axis=0), np.repeat(b, 3, axis=0))
    known = stats.ttest_rel(a[0], b[0])
    assert gap.test == "crossed"
    assert gap.p == pytest.approx(known.pvalue)
    assert gap.half_width == pytest.approx(known.confidence_interval().high - gap.value)


def test_equal_items_leave_the_t_test_over_runs() -> None:
    # every item is as hard for both methods, and a run moves all of them alike
    ease = np.random.default_rng(0).normal(size=5000)
    a = np.array([1.0, 2.0, 3.5])[:, None] + ease
    b = np.array([2.5, 3.5, 5.0])[:, None] + ease
    gap = compared(a, b)
    known = stats.ttest_ind(a.mean(axis=1), b.mean(axis=1), equal_var=False)
    assert gap.value == pytest.approx(-1.5)
    assert gap.p == pytest.approx(known.pvalue, rel=1e-4)
    assert gap.df == pytest.approx(4, rel=1e-4)


def test_the_parts_of_the_variance_add_up() -> None:
    """The formula once more, written down with loops."""
    runs, items = 3, 40
    samples = {"a": verdicts(1, 0.7, runs, items), "b": verdicts(2, 0.4, runs, items)}
    spreads, residuals = [], []
    for values in samples.values():
        rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
        spreads.append(sum((row - mean) ** 2 for row in rows) / (runs - 1))
        square = sum(
            (values[r, i] - rows[r] - columns[i] + mean) ** 2
            for r in range(runs)
            for i in range(items)
        )
        residuals.append(square / ((runs - 1) * (items - 1)) / items)
    shared = sum(spreads) / 2
    gaps = samples["a"].mean(axis=0) - samples["b"].mean(axis=0)
    of_items = sum((gap - gaps.mean()) ** 2 for gap in gaps) / (items - 1) / items
    parts = [max(spread, shared) / runs for spread in spreads]
    excess = [max(0.0, p - e / runs) for p, e in zip(parts, residuals, strict=True)]
    variance = of_items + sum(excess)
    own = [runs - 1 if spread > shared else 2 * (runs - 1) for spread in spreads]
    squares = sum(p**2 / df for p, df in zip(parts, own, strict=True))
    df = variance**2 / (squares + of_items**2 / (items - 1))
    gap = compared(samples["a"], samples["b"])
    t = gaps.mean() / math.sqrt(variance)
    assert gap.df == pytest.approx(df)
    assert gap.t == pytest.approx(t)
    assert gap.p == pytest.approx(2 * stats.t.sf(abs(t), df))


def test_a_small_seed_variance_is_raised_to_the_mean_over_methods() -> None:
    def sample(*shares: float) -> np.ndarray:
        return np.array([np.arange(1000) < 1000 * share for share in shares], dtype=float)

    samples = {"steady": sample(0.5, 0.5, 0.5), "shaky": sample(0.4, 0.5, 0.6)}
    effects = seed_effects(samples)
    assert effects["shaky"].spread == pytest.approx(0.01 / 3)
    assert effects["steady"].spread == pytest.approx(0.005 / 3)
    assert effects["shaky"].df == pytest.approx(2) and effects["steady"].df == 4
    # what the others bear out has their degrees of freedom: a quarter
    third = seed_effects(samples | {"third": sample(0.36, 0.5, 0.64)})["third"]
    borne = 0.005 / 0.0196
    assert third.df == pytest.approx(1 / (borne / 4 + (1 - borne) / 2))
    # a single run has the mean over methods, undivided
    assert seed_effects(samples | {"one": sample(0.5)})["one"].spread == pytest.approx(0.005)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_mcnemar_is_the_exact_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    more, less = int((a > b).sum()), int((a < b).sum())
    expected = stats.binomtest(more, more + less).pvalue if more + less else 1.0
    assert mcnemar(a, b) == pytest.approx(expected)


def test_single_runs_are_compared_by_items_only() -> None:
    a, b = verdicts(1, 0.6, runs=1), verdicts(2, 0.4, runs=1)
    gap = compared(a, b)
    assert (gap.test, gap.p) == ("mcnemar", mcnemar(a[0], b[0]))
    ratings = np.random.default_rng(3).normal(5, 1, size=(2, 1, 80))
    gap = compared(*ratings)
    assert gap.test == "items"
    assert gap.p == pytest.approx(stats.ttest_rel(ratings[0, 0], ratings[1, 0]).pvalue)


def test_one_run_beside_several_is_charged_for_its_seed() -> None:
    a, b, c = verdicts(1, 0.6, runs=1), verdicts(2, 0.5), verdicts(3, 0.5)
    effects = seed_effects({"a": a, "b": b, "c": c})
    gap = difference(a, b, effects["a"], effects["b"])
    assert gap.test == "crossed"
    assert gap.p > mcnemar(a[0], b[0])


def test_holm_steps_down() -> None:
    assert holm([0.03, 0.01, 0.015]) == pytest.approx([0.03, 0.03, 0.03])
    assert holm([0.5, 0.02, 0.01]) == pytest.approx([0.5, 0.04, 0.03])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_while_p_stays_below_its_share(p: list[float]) -> None:
    corrected = holm(p)
    order = sorted(range(len(p)), key=p.__getitem__)
    assert corrected[order[0]] == pytest.approx(min(1.0, len(p) * min(p)))
    # rejected where this and all smaller p-values stay below their own shares of the level
    level = 0.05
    rejected = 0
    while rejected < len(p) and p[order[rejected]] * (len(p) - rejected) < level:
        rejected += 1
    assert [corrected[index] < level for index in order] == [
        rank < rejected for rank in range(len(p))
    ]


# ---------------------------------------------------------------- intervals


def test_interval_of_one_run_is_wilsons() -> None:
    values = verdicts(1, 0.3, runs=1)
    share = float(values.mean())
    assert half_width(values, NO_SEED) == wilson_half_width(share, 200)
    assert half_width(values, None) == wilson_half_width(share, 200)


def test_interval_does_not_vanish_where_all_is_wrong() -> None:
    nothing = np.zeros((3, 200))
    effects = seed_effects({"a": nothing})
    assert half_width(nothing, effects["a"]) == pytest.approx(wilson_half_width(0, 200), rel=0.02)


def test_all_items_right_against_all_wrong_is_a_difference() -> None:
    gap = compared(np.ones((2, 50)), np.zeros((2, 50)))
    assert gap.value == 1 and gap.p < 1e-6
    assert compared(np.ones((2, 50)), np.ones((2, 50))).p == 1


def test_more_seeds_and_items_narrow_the_interval_and_what_is_detectable() -> None:
    generator = np.random.default_rng(0)

    def at(seeds: int, items: int) -> tuple[float, float]:
        widths, least = [], []
        for _ in range(40):
            samples = simulation.draw(generator, [0.5] * 4, [1.0] * 4, seeds, items)
            effects = seed_effects(samples)
            widths += [half_width(values, effects[name]) for name, values in samples.items()]
            least.append(detectable_difference(samples))
        return float(np.median(widths)), float(np.median(least))

    few, more_seeds, more_items = at(3, 200), at(6, 200), at(3, 800)
    for index in range(2):
        assert more_seeds[index] < few[index] and more_items[index] < few[index]


def test_detectable_difference_needs_two_methods_and_items() -> None:
    assert detectable_difference({"a": verdicts(1, 0.5)}) is None
    assert detectable_difference({"a": np.ones((2, 1)), "b": np.ones((2, 1))}) is None
    # one run each: the textbook's number for a paired test
    samples = {"a": verdicts(1, 0.5, 1, 400), "b": verdicts(2, 0.5, 1, 400)}
    error = math.sqrt((samples["a"] - samples["b"]).var(ddof=1) / 400)
    assert detectable_difference(samples) == pytest.approx((1.960 + 0.842) * error, rel=0.01)


def test_bootstrap_knows_items_and_seeds_and_repeats_itself() -> None:
    steady = np.repeat(verdicts(1, 0.5, runs=1, items=400), 4, axis=0)
    shaky = np.array([np.arange(400) < count for count in (120, 180, 220, 280)], dtype=float)
    found = bootstrap_intervals({"steady": steady, "shaky": shaky})
    assert found == bootstrap_intervals({"steady": steady, "shaky": shaky})
    low, high = found["steady"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    assert np.diff(found["shaky"]) > 1.4 * np.diff(found["steady"])


# ---------------------------------------------------------------- a table


def test_a_planted_tie_is_a_tie_and_ten_points_are_found() -> None:
    generator = np.random.default_rng(5)
    accuracies = [0.5, 0.5, 0.6, 0.6]
    samples = simulation.draw(generator, accuracies, [1.0] * 4, 3, 500)
    samples["base"] = verdicts(9, 0.02, runs=1, items=500)
    (found,) = analyse({"gsm8k": samples}, baseline="m0", unseeded=["base"]).values()
    marks = {name: row.mark for name, row in found.methods.items()}
    assert sorted((marks.pop("m2"), marks.pop("m3"))) == ["best", "tie"]
    assert marks == {"m0": "worse", "m1": "worse", "base": ""}
    assert found.methods["m1"].p_baseline > 0.05
    assert found.methods["m2"].p_baseline < 0.01 and found.methods["m3"].p_baseline < 0.01
    assert found.methods["m0"].baseline is None
    assert found.methods["base"].half_width > 0 and found.methods["base"].best is None


def test_the_family_is_the_table() -> None:
    generator = np.random.default_rng(2)
    one = simulation.draw(generator, [0.5, 0.53, 0.55], [1.0] * 3, 3, 500)
    other = simulation.draw(generator, [0.5, 0.5, 0.5], [1.0] * 3, 3, 500)
    alone = analyse({"a": one}, "m0")["a"].methods
    together = analyse({"a": one, "b": other}, "m0")["a"].methods
    assert together["m2"].p_baseline > alone["m2"].p_baseline > alone["m2"].baseline.p
    # two comparisons with a baseline: twice the smaller p-value
    smaller = min(alone["m1"].baseline.p, alone["m2"].baseline.p)
    assert alone["m2"].p_baseline == pytest.approx(2 * smaller)


def test_picking_the_best_of_many_costs_more_than_picking_it_of_two() -> None:
    generator = np.random.default_rng(4)
    samples = simulation.draw(generator, [0.5, 0.5, 0.4], [1.0] * 3, 5, 300)
    gaps = [row for row in analyse({"": samples})[""].methods.values() if row.best]
    worst = min(gaps, key=lambda row: row.best.p)
    known = stats.studentized_range.sf(abs(worst.best.t) * math.sqrt(2), 3, worst.best.df)
    assert 1e-6 < worst.p_best < 0.05
    assert worst.p_best == pytest.approx(known, rel=1e-6)
    # more than Holm's factor for two comparisons: it might have been any of three
    assert worst.p_best > 2.5 * worst.best.p


@given(st.permutations(range(60)))
def test_the_order_of_items_does_not_matter_and_signs_turn(order: list[int]) -> None:
    a, b = verdicts(1, 0.6, items=60), verdicts(2, 0.5, items=60)
    gap, turned = compared(a, b), compared(b[:, order], a[:, order])
    assert turned.value == pytest.approx(-gap.value)
    assert turned.p == pytest.approx(gap.p) and turned.df == pytest.approx(gap.df)


def test_unequal_items_are_refused() -> None:
    with pytest.raises(ValueError, match="50 and 40 items: expected the same items"):
        compared(np.ones((2, 50)), np.ones((2, 40)))


def test_ranks_need_a_number_everywhere() -> None:
    means = {"a": {"x": 3.0, "y": 2.0, "z": 1.0}, "b": {"y": 1.0, "x": 1.0, "w": 9.0}}
    assert mean_ranks(means) == {"x": (1.25, [1.0, 1.5]), "y": (1.75, [2.0, 1.5])}
    assert mean_ranks({}) == {}


# ---------------------------------------------------------------- simulation

REPLICATIONS = 250


def no_more_than(share: float) -> float:
    """What a simulation of a test with this rate shows in all but one of 10,000 cases, at most."""
    return stats.binom.ppf(0.9999, REPLICATIONS, share) / REPLICATIONS


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("points", [0.0, 1.5, 3.0])
def test_errors_and_coverage(seeds: int, points: float) -> None:
    """A fast version of tests/benchmarks/statistics_simulation.py."""
    found = simulation.measure(seeds, [points] * 3, items=300, replications=REPLICATIONS)
    assert found["false"] <= no_more_than(0.06)
    assert 1 - found["ties"] <= no_more_than(0.06)
    for interval in ("first", "last", "difference"):
        assert 1 - found[interval] <= no_more_than(0.07)


def test_the_simulation_tells_a_bad_test() -> None:
    """McNemar's test on pooled items calls a quarter of equal methods different."""
    found = simulation.measure(3, [3.0] * 2, items=300, replications=REPLICATIONS)
    assert found["mcnemar"] > no_more_than(0.06)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_detectable_difference_is_found(seeds: int) -> None:
    share = simulation.found_share(seeds, [1.5] * 3, items=300, replications=150)
    assert share > 0.68
