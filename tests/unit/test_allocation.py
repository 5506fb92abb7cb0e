"""Properties of the allocation, and the paper's formulas in float64."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tlora.allocation import Allocation, allocate
from tlora.errors import UserError

HUGE = (1 << 20, 1 << 20)
scores = st.floats(1e-9, 1e3, allow_nan=False)
sensitivities = st.lists(scores, min_size=1, max_size=30).map(
    lambda values: {f"m{i}": value for i, value in enumerate(values)}
)
ranks = st.integers(1, 256)
alphas = st.one_of(st.integers(1, 512), st.floats(0.5, 512))
variants = st.sampled_from(["paper", "released"])
sizes = st.tuples(st.integers(1, 64), st.integers(1, 64))


def uncapped(values):
    return dict.fromkeys(values, HUGE)


@given(sensitivities, ranks, alphas)
def test_paper_follows_equations_6_and_7(values, r, alpha):
    found = allocate(values, r, alpha, uncapped(values))
    count, total = len(values), math.fsum(values.values())
    for name, score in values.items():
        share = score / total
        raw = count * r * share
        # A float64 half may fall on either side of the exact one.
        assume(abs(raw % 1 - 0.5) > 1e-9)
        assert found[name].rank == round(raw)
        expected = found[name].rank * (count * alpha / r) * share
        assert found[name].alpha == pytest.approx(expected, rel=1e-12)
        scaling = alpha / r * score / (total / count)
        assert found[name].scaling == pytest.approx(scaling, rel=1e-12)


@given(sensitivities, ranks, alphas)
def test_paper_sum_is_within_half_a_rank_a_module(values, r, alpha):
    found = allocate(values, r, alpha, uncapped(values))
    assert abs(sum(found.ranks.values()) - len(values) * r) <= len(values) / 2


@given(sensitivities, ranks, alphas)
def test_released_sum_is_exact(values, r, alpha):
    found = allocate(values, r, alpha, uncapped(values), "released")
    assert sum(found.ranks.values()) == len(values) * r
    assert min(found.ranks.values()) >= 0


@given(sensitivities, ranks, st.integers(1, 512))
def test_released_alpha_and_scaling(values, r, alpha):
    found = allocate(values, r, alpha, uncapped(values), "released")
    count, total = len(values), math.fsum(values.values())
    for name, score in values.items():
        raw = count * alpha * score / total
        assume(abs(raw % 1 - 0.5) > 1e-9)
        assert found[name].alpha == max(alpha, round(raw))
        assert found[name].scaling == found[name].alpha / r


def test_released_puts_the_remainder_on_the_largest_rank():
    # 4 * 3 / sum = 1: raw ranks 5.4, 4.4, 1.1, 1.1 round to 11 of 12.
    values = {"a": 4.4, "b": 5.4, "c": 1.1, "d": 1.1}
    assert allocate(values, 3, 3, uncapped(values), "released").ranks == {
        "a": 4,
        "b": 6,
        "c": 1,
        "d": 1,
    }
    assert allocate(values, 3, 3, uncapped(values)).ranks["b"] == 5
    # Raw ranks 2.6, 2.6, 2.6, 0.2 round to 9 of 8: the excess comes off the first of the largest.
    values = {"a": 2.6, "b": 2.6, "c": 2.6, "d": 0.2}
    assert allocate(values, 2, 2, uncapped(values), "released").ranks == {
        "a": 2,
        "b": 3,
        "c": 3,
        "d": 0,
    }


def test_halves_are_rounded_to_even():
    values = {"a": 0.5, "b": 1.5, "c": 2.5, "d": 3.5}
    assert list(allocate(values, 2, 2, uncapped(values)).ranks.values()) == [0, 2, 2, 4]


@given(sensitivities, ranks, alphas, variants)
def test_monotone(values, r, alpha, variant):
    found = allocate(values, r, alpha, uncapped(values), variant)
    slack = 1 if variant == "released" else 0
    ordered = sorted(values, key=values.__getitem__)
    for index, low in enumerate(ordered):
        for high in ordered[index + 1 :]:
            if values[low] == values[high]:
                # The variant "released" puts the whole remainder on one of two equals.
                continue
            assert found[low].rank <= found[high].rank + slack
            assert found[low].scaling <= found[high].scaling * (1 + 1e-12)


@given(sensitivities, ranks, alphas, variants, st.integers(-40, 40))
def test_scale_invariant(values, r, alpha, variant, exponent):
    scaled = {name: value * 2.0**exponent for name, value in values.items()}
    first = allocate(values, r, alpha, uncapped(values), variant)
    second = allocate(scaled, r, alpha, uncapped(values), variant)
    for name in values:
        assert (first[name].rank, first[name].alpha) == (second[name].rank, second[name].alpha)


@given(st.lists(st.tuples(scores, sizes), min_size=1, max_size=20), ranks, alphas, variants)
def test_caps_hold_and_the_rest_goes_on_in_descending_sensitivity(modules, r, alpha, variant):
    values = {f"m{i}": score for i, (score, _) in enumerate(modules)}
    shapes = {f"m{i}": shape for i, (_, shape) in enumerate(modules)}
    free = allocate(values, r, alpha, uncapped(values), variant).ranks
    found = allocate(values, r, alpha, shapes, variant)
    caps = {name: min(shape) for name, shape in shapes.items()}
    assert all(0 <= found[name].rank <= caps[name] for name in values)
    assert sum(found.ranks.values()) == min(sum(free.values()), sum(caps.values()))
    # Who got more than its own rank: everyone more sensitive is full.
    ordered = sorted(values, key=values.__getitem__, reverse=True)
    gained = [found[name].rank > min(free[name], caps[name]) for name in ordered]
    for index, name in enumerate(ordered):
        if any(gained[index + 1 :]):
            assert found[name].rank == caps[name]
    # Caps change no scaling.
    whole = allocate(values, r, alpha, uncapped(values), variant)
    for name in values:
        assert found[name].scaling == pytest.approx(whole[name].scaling, rel=1e-12)


def test_excess_over_a_cap_goes_to_the_next_module():
    values = {"a": 1.0, "b": 6.0, "c": 3.0, "d": 2.0}
    shapes = {"a": (64, 64), "b": (4, 64), "c": (64, 7), "d": (64, 64)}
    found = allocate(values, 3, 3, shapes)
    # Raw 1, 6, 3, 2: b keeps 4, its 2 go to c.
    assert found.ranks == {"a": 1, "b": 4, "c": 5, "d": 2}
    found = allocate(values, 6, 3, shapes)
    # Raw 2, 12, 6, 4: b keeps 4; of its 8, c takes 1 and d the other 7.
    assert found.ranks == {"a": 2, "b": 4, "c": 7, "d": 11}


def test_more_than_all_modules_hold_is_dropped_and_reported(caplog):
    found = allocate({"a": 1.0, "b": 3.0}, 8, 8, {"a": (4, 9), "b": (9, 4)})
    assert found.ranks == {"a": 4, "b": 4}
    assert found.budget["rank_budget"] == 16
    assert found.budget["rank_sum"] == 8
    assert found.budget["unplaced"] == 8
    assert "r=8 asks for a rank sum of 16; the modules can hold 8" in caplog.text


@given(sensitivities, ranks, alphas, variants, st.booleans(), st.booleans())
def test_peft_reproduces_the_scaling(values, r, alpha, variant, rank, scale):
    found = allocate(values, r, alpha, uncapped(values), variant, rank, scale)
    for module in found.values():
        if module.rank:
            assert module.peft_alpha / module.rank == pytest.approx(module.scaling, rel=1e-15)
            if variant == "paper":
                assert module.alpha / module.rank == module.scaling


@given(sensitivities, ranks, alphas, variants)
def test_ablations(values, r, alpha, variant):
    both = allocate(values, r, alpha, uncapped(values), variant)
    rank_only = allocate(values, r, alpha, uncapped(values), variant, scale=False)
    scale_only = allocate(values, r, alpha, uncapped(values), variant, rank=False)
    neither = allocate(values, r, alpha, uncapped(values), variant, rank=False, scale=False)
    assert rank_only.ranks == both.ranks
    assert set(scale_only.ranks.values()) == set(neither.ranks.values()) == {r}
    for name in values:
        assert rank_only[name].scaling == pytest.approx(alpha / r, rel=1e-15)
        assert neither[name].scaling == pytest.approx(alpha / r, rel=1e-15)
        assert scale_only[name].scaling == pytest.approx(both[name].scaling, rel=1e-12)


def test_equal_sensitivities_give_lora():
    found = allocate(dict.fromkeys("abcdefg", 0.1), 8, 16, dict.fromkeys("abcdefg", (64, 32)))
    assert {(m.rank, m.alpha, m.scaling) for m in found.values()} == {(8, 16.0, 2.0)}


def test_budget_counts_parameters():
    found = allocate({"a": 1.0, "b": 3.0, "c": 0.0}, 4, 4, dict.fromkeys("abc", (100, 10)))
    assert found.ranks == {"a": 3, "b": 9, "c": 0}
    assert found.budget == {
        "modules": 3,
        "adapted_modules": 2,
        "rank_budget": 12,
        "rank_sum": 12,
        "unplaced": 0,
        "parameters_a": 12 * 10,
        "parameters_b": 12 * 100,
        "parameters_with_a": 12 * 110,
        "parameters_without_a": 12 * 100,
    }


@given(sensitivities, ranks, alphas, variants)
def test_json_round_trip(values, r, alpha, variant):
    found = allocate(values, r, alpha, uncapped(values), variant)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Allocation.from_json(json.loads(text)) == found


def test_json_form():
    found = allocate({"a": 1.0, "b": 3.0}, 4, 8, {"a": (10, 20), "b": (30, 40)}).to_json()
    assert found["modules"]["b"] == {
        "rank": 6,
        "alpha": 18.0,
        "scaling": 3.0,
        "shape": [30, 40],
        "sensitivity": 3.0,
    }
    assert (found["variant"], found["r"], found["lora_alpha"]) == ("paper", 4, 8)
    assert found["budget"]["rank_sum"] == 8


def test_is_a_mapping():
    found = allocate({"a": 1.0, "b": 3.0}, 4, 8, {"a": (10, 20), "b": (30, 40)})
    assert list(found) == ["a", "b"]
    assert len(found) == 2
    assert dict(found.items())["b"].rank == found["b"].rank == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "best"}, "variant: 'best'"),
        ({"r": 0}, "r: 0"),
        ({"r": 2.5}, "r: 2.5"),
        ({"lora_alpha": 0}, "lora_alpha: 0"),
        ({"lora_alpha": math.nan}, "lora_alpha: nan"),
        ({"sensitivity": {}, "shapes": {}}, "empty"),
        ({"sensitivity": {"a": math.nan, "b": 1.0}}, "a: sensitivity nan"),
        ({"sensitivity": {"a": 1.0, "b": math.inf}}, "b: sensitivity inf"),
        ({"sensitivity": {"a": 1.0, "b": -1.0}}, "b: sensitivity -1.0"),
        ({"sensitivity": {"a": 0.0, "b": 0.0}}, "0 for every module"),
        ({"shapes": {"a": (4, 4)}}, "b: expected it in both"),
    ],
)
def test_bad_input(change, message):
    good = {
        "sensitivity": {"a": 1.0, "b": 2.0},
        "r": 4,
        "lora_alpha": 4,
        "shapes": {"a": (8, 8), "b": (8, 8)},
    }
    with pytest.raises(UserError, match=message):
        allocate(**{**good, **change})


def test_broken_json_is_a_user_error():
    with pytest.raises(UserError, match="allocation"):
        Allocation.from_json({"variant": "paper", "r": 1, "lora_alpha": 1})


def test_imports_no_torch():
    code = "import sys, tlora.allocation; assert not {'torch', 'peft', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
