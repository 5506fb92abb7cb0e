"""The comparability gate: what differs between rows is told, or refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from unit.recipe_tree import (
    LABELS,
    MODEL,
    change_cells,
    complete_grid,
    edit,
    loaded,
    tune,
)

from tlora.comparison import collect, fingerprint, tables
from tlora.errors import UserError
from tlora.stages.compare import compare


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of four methods and two seeds whose rows are comparable."""
    monkeypatch.chdir(tmp_path)
    return complete_grid()


def texts(grid: Path, kind: str = fingerprint.UNEQUAL) -> dict[str, list[str]]:
    """Return what a comparison says of every row that differs, by method."""
    section = loaded(grid).sections[0]
    found: dict[str, list[str]] = {}
    for one in fingerprint.differences(section, "lora", LABELS["benchmarks"]):
        if one.kind == kind:
            found.setdefault(section.rows[one.place].method, []).append(one.text)
    return found


def settings(cell: dict, **values) -> None:
    cell["settings"] |= values


def test_equal_recipes_differ_in_nothing_that_counts(grid: Path) -> None:
    section = loaded(grid).sections[0]
    assert fingerprint.differences(section, "lora") == []
    notes = tables.notes(section, tables.records(loaded(grid)), LABELS["benchmarks"])
    (line,) = [note for note in notes if "rows agree" in note]
    assert "base weights and precision; training data and prompt" in line and "tuning" in line
    (line,) = [note for note in notes if "trainable parameters differ" in note]
    assert "34,816 (TLoRA) to 1,048,576 (Full)" in line


def test_another_batch_size_is_a_footnote(grid: Path) -> None:
    change_cells(grid, "pissa", lambda cell: settings(cell, batch_size=8))
    assert texts(grid) == {"pissa": ["batch size 8, others 16"]}
    comparison = loaded(grid)
    found = tables.records(comparison)
    markdown = tables.to_markdown(comparison, found)
    assert "| PiSSA \\[a\\] " in markdown and "| LoRA  " in markdown
    assert "- WARNING: PiSSA \\[a\\]: not comparable: batch size 8, others 16.\n" in markdown
    assert "PiSSA [a]: not comparable: batch size 8" in tables.to_latex(comparison, found)
    Path("out").mkdir()
    Path("out/table.csv").write_text(tables.to_csv(found, last=tables.COSTS))
    text = tables.text(Path("out"))
    assert "PiSSA [a] " in text and "not comparable: batch size 8, others 16" in text


def test_what_follows_from_a_difference_is_told_with_it(grid: Path) -> None:
    def change(cell: dict) -> None:
        settings(cell, batch_size=8)
        edit(Path(cell["train"]), lambda train: train.update(steps=200))

    change_cells(grid, "tlora", change)
    assert texts(grid) == {"tlora": ["batch size 8, others 16", "steps 200, others 2"]}


def test_other_decoding_and_other_items(grid: Path) -> None:
    def change(cell: dict) -> None:
        cell["recipe"]["generate"]["choice_test"]["benchmark"]["max_new_tokens"] = 16
        edit(Path(cell["scores"]["choice_test"]), lambda score: score.update(n=400))

    change_cells(grid, "tlora", change)
    assert texts(grid) == {
        "tlora": [
            "Choice test: max new tokens 16, others 48",
            "Choice test: items 400, others 500",
        ]
    }


def test_the_base_model_is_held_to_decoding_and_weights_only(grid: Path) -> None:
    def change(cell: dict) -> None:
        cell["recipe"]["generate"]["choice_test"]["benchmark"]["num_beams"] = 4

    change_cells(grid, "base", change)
    assert texts(grid) == {"base": ["Choice test: num beams 4, others 1"]}


def test_other_training_data(grid: Path) -> None:
    card = json.loads(grid.read_text())["cells"][1]["card"]
    other = Path("results/prepare/other/card.json")
    other.parent.mkdir(parents=True)
    shutil.copy(card, other)
    edit(other, lambda one: one["sha256"].update({"train.parquet": "ab" * 32}))
    change_cells(grid, "lora", lambda cell: cell.update(card=str(other)))
    usual = json.loads(Path(card).read_text())["sha256"]["train.parquet"][:8]
    text = f"training samples (tokens and loss mask) abababab, others {usual}"
    assert texts(grid) == {"lora": [text]}


def test_missing_seeds(grid: Path) -> None:
    edit(grid, lambda content: content["cells"].pop(2))
    assert texts(grid) == {"full": ["seeds 1, others 1, 2"]}


def test_a_run_without_a_number_is_a_missing_seed(grid: Path) -> None:
    change_cells(grid, "tlora", lambda cell: cell.update(failed="out of memory"), seed=2)
    assert texts(grid) == {"tlora": ["seeds 1, others 1, 2"]}


def test_other_versions_of_one_run(grid: Path) -> None:
    def change(cell: dict) -> None:
        edit(Path(cell["train"]), lambda train: train["versions"].update(torch="2.14.0"))

    change_cells(grid, "pissa", change, seed=2)
    assert texts(grid) == {"pissa": ["torch 2.13.0 or 2.14.0, others 2.13.0"]}


def test_other_weights_and_precision(grid: Path) -> None:
    def change(cell: dict) -> None:
        other = {**MODEL, "revision": "f" * 40, "dtype": "float32"}
        cell["recipe"]["train"]["model"] = other

    change_cells(grid, "full", change)
    weights, precision = texts(grid)["full"]
    assert weights.startswith("base weights org/base@ffff") and "others org/base@0123" in weights
    assert precision == "precision float32, others bfloat16"


def test_another_rank_and_other_targets(grid: Path) -> None:
    change_cells(grid, "pissa", lambda cell: settings(cell, rank=16, target_modules=["q_proj"]))
    said = texts(grid)["pissa"]
    assert said == ["rank 16, others 8", "target modules q_proj, others q_proj, v_proj"]


def test_full_finetuning_has_no_rank_and_calibration_is_of_who_calibrates(grid: Path) -> None:
    change_cells(grid, "full", lambda cell: settings(cell, rank=64, calibration_samples=8))
    assert texts(grid) == {}
    change_cells(grid, "tlora", lambda cell: settings(cell, calibration_samples=8))
    assert texts(grid) == {}  # nobody else calibrates


def test_tokens_are_compared_seed_by_seed(grid: Path) -> None:
    """Seeds differ in the samples that the last batch leaves out; methods of one seed do not."""
    for method in ("full", "lora", "pissa", "tlora"):
        for seed in (1, 2):
            tokens = 400_000 + seed + (method == "pissa" and seed == 2)
            change_cells(
                grid,
                method,
                lambda cell, n=tokens: edit(Path(cell["train"]), lambda t: t.update(tokens=n)),
                seed,
            )
    assert texts(grid) == {"pissa": ["tokens seen 400,003, others 400,002"]}


def test_on_purpose_is_told_apart(grid: Path) -> None:
    def own(cell: dict) -> None:
        settings(cell, learning_rate=2e-4)
        cell["recipe"]["own"] = ["learning_rate"]

    def varied(cell: dict) -> None:
        settings(cell, epochs=2.0)
        cell["recipe"]["varied"] = ["epochs"]
        edit(Path(cell["train"]), lambda train: train.update(steps=4))

    change_cells(grid, "pissa", own)
    change_cells(grid, "tlora", varied)
    assert texts(grid) == {}
    assert texts(grid, "own") == {"pissa": ["learning rate 0.0002, others 0.001"]}
    assert texts(grid, "varied") == {"tlora": ["epochs 2, others 1", "steps 4, others 2"]}
    record = {r["method"]: r for r in tables.records(loaded(grid))}["pissa"]
    assert record["not_comparable"] == ""
    assert record["by_design"] == "learning rate 0.0002, others 0.001 (the method's own)"
    fingerprint.check(loaded(grid), "lora")


def test_a_learning_rate_by_hand_is_not_on_purpose(grid: Path) -> None:
    change_cells(grid, "tlora", lambda cell: settings(cell, learning_rate=0.01))
    assert texts(grid) == {"tlora": ["learning rate 0.01, others 0.001"]}


def test_tuned_values_may_differ_and_budgets_may_not(grid: Path) -> None:
    rates = [1e-3, 3e-3, 1e-2]
    tried = {"full": rates, "lora": rates, "pissa": rates, "tlora": rates}
    tune(grid, tried, {"full": 0, "lora": 1, "pissa": 2, "tlora": 2})
    assert texts(grid) == {}
    assert set(texts(grid, "tuned")) >= {"full", "lora"}
    tune(grid, tried | {"tlora": rates[:2]}, {"full": 0, "lora": 1, "pissa": 2, "tlora": 1})
    assert texts(grid) == {"tlora": ["tuning trials 2, others 3"]}
    edit(grid, lambda content: content["choices"].pop(0))
    assert texts(grid)["full"][0] == "tuning trials 0, most 3"


def test_of_two_values_the_baseline_has_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = complete_grid(methods=("lora", "tlora"))
    change_cells(grid, "lora", lambda cell: settings(cell, batch_size=8))
    section = loaded(grid).sections[0]
    for baseline, other in (("lora", "tlora"), ("tlora", "lora")):
        (one,) = fingerprint.differences(section, baseline)
        assert section.rows[one.place].method == other


def test_another_prompt_than_in_training_is_told_and_not_refused(grid: Path) -> None:
    def change(cell: dict) -> None:
        cell["recipe"]["generate"]["choice_test"]["prompt"] = "{instruction}"

    for method in ("base", "full", "lora", "pissa", "tlora"):
        change_cells(grid, method, change)
    comparison = loaded(grid)
    notes = fingerprint.remarks(comparison.sections[0], LABELS["benchmarks"])
    assert "Choice test: the prompt is not that of training: it has its own." in notes
    fingerprint.check(comparison, "lora")


def test_other_machines_concern_the_costs_only(grid: Path) -> None:
    def change(cell: dict) -> None:
        edit(Path(cell["train"]), lambda train: train.update(processes=4))

    for method in ("full", "lora", "pissa"):
        change_cells(
            grid,
            method,
            lambda c: edit(Path(c["train"]), lambda train: train.update(processes=1)),
        )
    change_cells(grid, "tlora", change)
    notes = fingerprint.remarks(loaded(grid).sections[0], {})
    assert "Costs of TLoRA are from another machine: processes 4, others 1." in notes
    assert texts(grid) == {}


def run(grid: Path) -> Path:
    compare({}, {"grid": grid}, grid.parent, {"labels": LABELS})
    return grid.parent


def test_strict_refuses_with_one_line(grid: Path) -> None:
    change_cells(grid, "pissa", lambda cell: settings(cell, batch_size=8))
    change_cells(grid, "tlora", lambda cell: settings(cell, schedule="linear"))
    edit(grid, lambda content: content.update(strict=True))
    with pytest.raises(UserError) as caught:
        run(grid)
    assert str(caught.value) == (
        "strict: tiny/choice/pissa: training/batch_size: 8: expected 16, as the other rows have; "
        "1 more"
    )
    assert not (grid.parent / "table.csv").exists()


@pytest.mark.slow
def test_what_compare_writes(grid: Path) -> None:
    change_cells(grid, "pissa", lambda cell: settings(cell, batch_size=8))
    folder = run(grid)
    written = json.loads((folder / "fingerprints.json").read_text())
    rows = {row["method"]: row for row in written["sections"][0]["rows"]}
    (one,) = rows["pissa"]["differences"]
    assert (one["key"], one["own"], one["others"]) == ("training/batch_size", "8", "16")
    digests = {m: {run["digest"] for run in row["runs"]} for m, row in rows.items()}
    assert len(digests["lora"]) == 1 and digests["lora"].isdisjoint(digests["pissa"])
    assert "not comparable: batch size 8, others 16" in (folder / "table.html").read_text()
    with open(folder / "table.csv", newline="") as file:
        marked = {row["method"]: row["not_comparable"] for row in csv.DictReader(file)}
    assert marked.pop("pissa") == "batch size 8, others 16" and set(marked.values()) == {""}
    assert (folder / "methods.md").is_file() and (folder / "methods.tex").is_file()


def test_digests_are_of_what_must_be_equal(grid: Path) -> None:
    def digests(labels: dict = LABELS) -> dict[str, set[str]]:
        rows = fingerprint.to_json(collect.load(grid, labels))["sections"][0]["rows"]
        return {row["method"]: {run["digest"] for run in row["runs"]} for row in rows}

    before = digests()
    assert before["lora"] == before["pissa"] and len(before["lora"]) == 1
    assert digests({}) == before
    change_cells(grid, "pissa", lambda cell: settings(cell, epochs=2.0))
    after = digests()
    assert after["lora"] == before["lora"] and after["pissa"] != before["pissa"]


def test_a_plan_says_what_a_fingerprint_needs(root: Path) -> None:
    from tlora.plan import Plan

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        grid = Plan([Path("config/config.yaml")], {"hyperparameters": "own"}).grid()
    assert grid["strict"] is False
    for cell in grid["cells"]:
        run_ = fingerprint.fingerprint(
            loaded_run(cell, list(cell["scores"]))  # none of its artefacts is there
        )
        assert run_["base"].keys() == {"weights", "precision"}
        for name in cell["scores"]:
            assert {"max_new_tokens", "prompt", "source", "scorer"} <= run_["evaluation"][
                name
            ].keys()
        if not cell["base"]:
            assert ("rank" in run_["training"]) == (cell["method"] != "full")
            calibrates = cell["method"] == "tlora"
            assert ("calibration_samples" in run_["training"]) == calibrates


def loaded_run(cell: dict, benchmarks: list[str]):
    from tlora.comparison.collect import load_run

    return load_run(cell, benchmarks)
