"""The methods section says what was done, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.recipe_tree import LABELS, change_cells, complete_grid, edit, judge, loaded, tune

from tlora.comparison import paragraph, tables

METHODS = ("full", "lora", "pissa", "tlora")


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of four methods and two seeds."""
    monkeypatch.chdir(tmp_path)
    return complete_grid()


def told(grid: Path) -> str:
    """Return all paragraphs of a grid of one section."""
    comparison = loaded(grid)
    ((title, texts),) = paragraph.methods(comparison, tables.records(comparison, "lora"))
    assert title == "Choice: Tiny"
    return "\n".join(texts)


def test_what_was_trained_and_on_what(grid: Path) -> None:
    text = told(grid)
    assert (
        "We fine-tuned Tiny (org/base at revision 0123456789ab; bfloat16) on Choice (n = 4,000 "
        "training samples) with Full (1,048,576 trainable parameters); LoRA (65,536 trainable "
        "parameters); PiSSA"
    ) in text
    assert "source choice (seed 0, train 4,000, SHA-256 of the tokenised samples 0a0a0a0a)" in text
    assert "“### Instruction:\\n{instruction}\\n\\n### Response:”" in text
    assert "at most 512 tokens (3 of 4,000 were cut)" in text
    assert "global batch size 16; epochs 1; 2 steps, 4,000 samples, 400,000 tokens a run" in text
    assert "schedule cosine; warm-up over 3% of the steps; weight decay 0;" in text
    assert "rank budget of adapters is 8 a target module, alpha 16" in text
    assert "Full has no adapter." in text
    assert "The ranks of TLoRA differ by module." in text and "scalings" not in text
    assert "Before training, TLoRA read 32 training samples (seed 0)." in text
    assert "Every method was trained with seeds 1, 2." in text
    assert "Software of training: torch 2.13.0." in text


def test_how_it_was_evaluated(grid: Path) -> None:
    text = told(grid)
    assert (
        "We evaluated on Choice test (n = 500, accuracy): the prompt of training, greedy decoding, "
        "at most 48 new tokens, cut at “\\n”, with Hugging Face transformers, scored by choice."
    ) in text
    assert "The base model was evaluated untrained as well." in text
    edit(grid, lambda content: content["cells"].pop(0))
    assert "untrained" not in told(grid)

    def change(cell: dict) -> None:
        recipe = cell["recipe"]["generate"]["choice_test"]
        recipe["prompt"], recipe["backend"] = "{instruction}", "vllm"
        recipe["benchmark"] |= {"num_beams": 4, "limit": 100}

    for method in METHODS:
        change_cells(grid, method, change)
    text = told(grid)
    assert "the prompt “{instruction}”, beam search with 4 beams, at most 48" in text
    assert "with vLLM, the first 100 items" in text and "greedy" not in text


def test_not_tuned_is_said(grid: Path) -> None:
    assert "No setting was tuned; the learning rate was 0.001." in told(grid)

    def own(cell: dict) -> None:
        cell["settings"]["learning_rate"] = 2e-4
        cell["recipe"]["own"] = ["learning_rate"]

    change_cells(grid, "pissa", own)
    text = told(grid)
    assert "the learning rate was 0.001 (0.0002 for PiSSA)." in text
    assert "Settings of their own have PiSSA (learning_rate)." in text


def test_tuning_is_told_with_grid_budget_choice_and_edges(grid: Path) -> None:
    rates = [1e-3, 3e-3, 1e-2]
    tune(grid, dict.fromkeys(METHODS, rates), {"full": 0, "lora": 1, "pissa": 2, "tlora": 1})
    text = told(grid)
    assert "No setting" not in text
    assert (
        "Every method was tuned over learning_rate 1.0e-3, 3.0e-3, 1.0e-2 (3 trials each), one "
        "seed (0), compared by accuracy on the validation split of 40 items, never on test items."
    ) in text
    assert "Chosen were: Full learning_rate 1.0e-3; LoRA learning_rate 3.0e-3;" in text
    assert "Full, learning_rate: lowest; PiSSA, learning_rate: highest." in text
    assert "without a result" not in text
    path = Path("results/choose/lora/chosen.json")
    edit(path, lambda chosen: chosen["trials"][2].update(value=None, failed="loss: nan"))
    assert "Trials without a result: LoRA 1 of 3." in told(grid)
    edit(grid, lambda content: content["choices"].pop(0))
    text = told(grid)
    assert "LoRA, PiSSA and TLoRA were tuned over" in text
    assert "Not tuned: Full." in text


def test_statistics_are_those_of_the_table(grid: Path) -> None:
    assert "compared" not in told(grid)  # nothing to compare: no verdicts
    judge(grid, dict.fromkeys(METHODS, 0.4))
    text = told(grid)
    assert "with LoRA and with the highest mean by t tests over seeds and items" in text
    assert "Holm" in text and "bootstrap (1,000 draws" in text
    found = tables.records(loaded(grid), "lora")
    assert f"Choice test {found[0]['choice_test_detectable_percent']:.1f}." in text


def test_one_run_each_is_not_called_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grid = complete_grid(seeds=(7,))
    judge(grid, dict.fromkeys(METHODS, 0.4))
    text = told(grid)
    assert "Every method was trained with seed 7." in text
    assert "Each method has one run: the spread over seeds is unknown." in text
    assert "McNemar" in text and "t tests" not in text and "deviations" not in text
    assert "from the items alone" in text


def test_what_is_unequal_or_failed_is_said(grid: Path) -> None:
    change_cells(grid, "pissa", lambda cell: cell["settings"].update(batch_size=8))
    change_cells(grid, "tlora", lambda cell: cell.update(failed="out of memory"), 2)
    text = told(grid)
    assert "global batch size 16 (8 for PiSSA)" in text
    assert "PiSSA is not comparable with the others: batch size 8, others 16." in text
    assert "seeds with all their results were 1, 2 for Full, LoRA and PiSSA; 1 for TLoRA." in text
    assert "left out there: TLoRA 1 of 2." in text
    assert "not comparable" not in told_of_equal_rows()


def told_of_equal_rows() -> str:
    return told(complete_grid(preset="other"))


def test_records_of_the_test_set_in_the_training_data(grid: Path) -> None:
    Path("overlap.json").write_text('{"n": 500, "exact": 3, "ngram13": 17}')
    found = {"choice_test": "overlap.json"}
    edit(grid, lambda content: content["tasks"]["choice"].update(overlaps=found))
    assert "stand in the training data: Choice test 3 of 500." in told(grid)


def test_without_recipes_nothing_is_made_up(grid: Path) -> None:
    def strip(content: dict) -> None:
        for cell in content["cells"]:
            del cell["recipe"]

    edit(grid, strip)
    text = told(grid)
    assert text.startswith("We fine-tuned Tiny on Choice")
    assert "We evaluated on Choice test (n = 500, accuracy)." in text
    assert "greedy" not in text and "None" not in text


def test_markdown_has_a_part_for_every_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    comparison = loaded(complete_grid(tasks=("arithmetic", "choice")))
    text = paragraph.to_markdown(comparison, tables.records(comparison, "lora"))
    assert "## arithmetic: Tiny\n" in text and "## Choice: Tiny\n" in text
    assert "\\#\\#\\# Instruction:\\\\n{instruction}" in text
    assert LABELS["methods"]["tlora"] in text
