"""Tables: who is better, by how much it must be, and what was tuned."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.recipe_tree import LABELS, complete_grid, edit, judge, loaded, tune

from tlora.comparison import tables


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells_of(markdown: str) -> dict[str, list[str]]:
    """Return the cells of the first table by method."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    found: dict[str, list[str]] = {}
    for line in lines:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        found.setdefault(cells[0], cells)
    return found


def terminal(found: list[dict]) -> str:
    """Return what `tlora table` prints of records."""
    Path("printed").mkdir(exist_ok=True)
    Path("printed/table.csv").write_text(tables.to_csv(found, last=tables.COSTS))
    return tables.text(Path("printed"))


# ---------------------------------------------------------------- planted differences


def planted(levels: dict[str, float], **more) -> tuple[str, dict[str, dict]]:
    grid = complete_grid(seeds=(1, 2, 3), **more)
    judge(grid, levels, items=600, seed_spread=0.004)
    comparison = loaded(grid)
    found = tables.records(comparison, "lora")
    return tables.to_markdown(comparison, found), {r["method"]: r for r in found}


def test_a_planted_tie_is_a_tie_and_ten_points_are_found(here: Path) -> None:
    levels = {"base": 0.05, "full": 0.50, "lora": 0.40, "pissa": 0.40, "tlora": 0.50}
    markdown, rows = planted(levels)
    marks = {method: row["choice_test_mark"] for method, row in rows.items()}
    assert {marks["full"], marks["tlora"]} == {"best", "tie"}
    assert marks["lora"] == marks["pissa"] == "worse" and not marks["base"]
    assert rows["pissa"]["choice_test_p_baseline"] > 0.05
    for method in ("full", "tlora"):
        assert rows[method]["choice_test_p_baseline"] < 0.01
        gap = rows[method]["choice_test_minus_baseline_percent"]
        assert gap == pytest.approx(10, abs=3)
        assert abs(gap) > rows["lora"]["choice_test_detectable_percent"] > 1
    cells = cells_of(markdown)
    assert {cells["Full"][3][:2], cells["TLoRA"][3][:2]} == {"\\*", "= "}
    assert cells["LoRA"][3][0].isdigit()
    least = rows["lora"]["choice_test_detectable_percent"]
    assert f"by one comparison: Choice test {least:.1f}." in markdown


def test_equal_methods_are_all_ties(here: Path) -> None:
    _, rows = planted(dict.fromkeys(("base", "full", "lora", "pissa", "tlora"), 0.45))
    marks = [row["choice_test_mark"] for method, row in rows.items() if method != "base"]
    assert sorted(marks) == ["best", "tie", "tie", "tie"]


def test_p_values_are_corrected_over_all_benchmarks_of_the_table(here: Path) -> None:
    levels = {"base": 0.05, "full": 0.45, "lora": 0.40, "pissa": 0.40, "tlora": 0.45}
    names = {"choice": [f"b{number}" for number in range(6)]}
    _, many = planted(levels, benchmarks=names)
    _, one = planted(levels, benchmarks={"choice": ["b0"]})
    assert one["full"]["b0_minus_baseline_percent"] == many["full"]["b0_minus_baseline_percent"]
    assert one["full"]["b0_p_baseline"] < many["full"]["b0_p_baseline"]


def test_ranks_over_benchmarks_stand_below_the_tables(here: Path) -> None:
    levels = {"base": 0.05, "full": 0.60, "lora": 0.40, "pissa": 0.30, "tlora": 0.50}
    markdown, rows = planted(levels, benchmarks={"choice": ["b0", "b1"]})
    part = markdown.partition("## Ranks")[2]
    order = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("|")]
    assert order[2:] == ["Full", "TLoRA", "LoRA", "PiSSA"]
    assert "ranks" in terminal(list(rows.values()))


# ---------------------------------------------------------------- what was tuned


RATES = [3e-3, 1e-2, 3e-2]
ALL = dict.fromkeys(("full", "lora", "pissa", "tlora"), RATES)


def tuned(winners: dict[str, int], tried: dict = ALL) -> tuple[Path, str, list[dict]]:
    grid = complete_grid()
    tune(grid, tried, winners)
    comparison = loaded(grid)
    found = tables.records(comparison, "lora")
    return grid, tables.to_markdown(comparison, found), found


def test_tuned_values_stand_in_the_table_and_edges_are_flagged(here: Path) -> None:
    _, markdown, found = tuned({"full": 0, "lora": 2, "pissa": 1, "tlora": 1})
    cells = cells_of(markdown)
    assert cells["Method"][2] == "Learning rate (tuned)"
    shown = {method: cells[method][2] for method in ("Base", "Full", "LoRA", "PiSSA", "TLoRA")}
    assert shown == {
        "Base": "–",
        "Full": "3.0e-3 !",
        "LoRA": "3.0e-2 !",
        "PiSSA": "1.0e-2",
        "TLoRA": "1.0e-2",
    }
    text = markdown.replace("\\", "")
    assert "LoRA: learning_rate 3.0e-2 is the highest tried: add 0.1." in text
    assert "Full: learning_rate 3.0e-3 is the lowest tried: add 1.0e-3." in text
    assert "PiSSA: learning_rate" not in text
    assert (
        "Tuned for every method over learning_rate 3.0e-3, 1.0e-2, 3.0e-2: 3 trials each, one "
        "seed (0), compared by accuracy on the validation split of 40 items, never on test items."
    ) in text
    record = {r["method"]: r for r in found}["lora"]
    assert (record["trials"], json.loads(record["tuned"])) == (3, {"learning_rate": 0.03})
    assert json.loads(record["tuned_edges"]) == {"learning_rate": "upper"}
    printed = terminal(found)
    assert "3.0e-2 !" in printed and "table.md says what to add" in printed


def test_grids_of_single_methods_are_told_apart(here: Path) -> None:
    tried = ALL | {"full": [1e-4, 3e-4, 1e-3]}
    _, markdown, _ = tuned({"full": 1, "lora": 1, "pissa": 1, "tlora": 1}, tried)
    text = markdown.replace("\\", "")
    assert "Tuned for Full over learning_rate 1.0e-4, 3.0e-4, 1.0e-3: 3 trials" in text
    assert "Tuned for LoRA, PiSSA, TLoRA over learning_rate 3.0e-3, 1.0e-2, 3.0e-2" in text
    assert "tried" not in text and "!" not in text.split("### Per")[0]


def test_failed_trials_are_told(here: Path) -> None:
    grid, _, _ = tuned({"full": 1, "lora": 1, "pissa": 1, "tlora": 1})
    path = Path("results/choose/lora/chosen.json")
    edit(path, lambda chosen: chosen["trials"][2].update(value=None, failed="loss: nan"))
    comparison = loaded(grid)
    found = tables.records(comparison, "lora")
    notes = tables.notes(comparison.sections[0], found, LABELS["benchmarks"])
    assert "WARNING: LoRA: 1 of 3 trials failed." in notes
    assert {r["method"]: r for r in found}["lora"]["not_comparable"] == (
        "failed tuning trials 1, others 0"
    )


def test_without_tuning_the_table_says_so(here: Path) -> None:
    grid = complete_grid()
    comparison = loaded(grid)
    found = tables.records(comparison, "lora")
    markdown = tables.to_markdown(comparison, found)
    assert "Nothing was tuned" in markdown and "(tuned)" not in markdown
    with open_csv(found) as rows:
        assert {(row["trials"], row["tuned"]) for row in rows} == {("", "")}


class open_csv:
    """The rows of table.csv."""

    def __init__(self, found: list[dict]) -> None:
        self.text = tables.to_csv(found)

    def __enter__(self) -> list[dict[str, str]]:
        return list(csv.DictReader(self.text.splitlines()))

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("values", "side", "further"),
    [
        ([3e-3, 1e-2, 3e-2], "upper", 0.1),
        ([1e-3, 3e-3, 1e-2], "upper", 0.03),
        ([1e-3, 3e-3, 1e-2], "lower", 3e-4),
        ([1e-2, 1e-3], "lower", 1e-4),
        ([8, 16, 32], "upper", 64),
        ([8, 16], "lower", 4),
        ([1, 2, 4], "lower", None),
        ([0.0, 0.1], "lower", None),
        (["linear", "cosine"], "upper", None),
        ([2e-5], "upper", None),
    ],
)
def test_the_value_to_add_goes_on_as_the_grid_does(values: list, side: str, further) -> None:
    found = tables.beyond(values, side)
    assert found == (None if further is None else pytest.approx(further, rel=1e-9))


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=5, unique=True),
    st.sampled_from(["lower", "upper"]),
)
def test_the_value_to_add_lies_beyond_the_grid(values: list[float], side: str) -> None:
    found = tables.beyond(values, side)
    assert found is None or (found < min(values) if side == "lower" else found > max(values))


@given(st.floats(1e-9, 1e9))
def test_numbers_are_written_as_yaml_reads_them(value: float) -> None:
    import yaml

    read = yaml.safe_load(tables.plain(value))
    assert isinstance(read, float | int) and read == pytest.approx(value, rel=1e-5)
