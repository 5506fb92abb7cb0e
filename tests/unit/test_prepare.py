"""Tokenised splits with their data card, and whether test records stand in the training data."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from record_files import write

from tlora.errors import UserError
from tlora.stages.overlap import overlap as overlap_stage
from tlora.stages.prepare import prepare
from tlora.tasks import commonsense, gsm8k, hendrycks_math, tokenised
from tlora.tasks.overlap import overlap, text_of

PROMPT = "Q: {instruction}\nA:"
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


# the overlap of texts


def found(test: list[str], train: list[str]) -> dict[str, list[str]]:
    """Return the overlap of texts that are named by their index."""
    return overlap([(str(i), text) for i, text in enumerate(test)], iter(train))


def test_exact_but_for_case_and_white_space() -> None:
    result = found(["How many?", "how  MANY?\n", "How many", "Other?"], ["x", " HOW many? "])
    assert result == {"exact": ["0", "1"], "ngram": []}


def test_thirteen_words_in_a_row() -> None:
    """Whatever stands between them, and wherever in either text."""
    train = [f"Before. {LONG.replace(' ', ', ').upper()}! After."]
    twelve = LONG.rsplit(" ", 1)[0]
    gap = LONG.replace("seven", "seven and")
    test = [f"It says {LONG} or so", LONG, twelve, gap, f"{gap} {LONG}", f"{twelve} thirteenth"]
    assert found(test, train) == {"exact": [], "ngram": ["0", "1", "4"]}
    assert found(test, []) == found([], train) == {"exact": [], "ngram": []}


def test_several_records_share_a_run() -> None:
    assert found([LONG, f"{LONG} a", "b"], ["c", f"{LONG} d", LONG])["ngram"] == ["0", "1"]


def test_agrees_with_plain_counting() -> None:
    """On random texts of few words, against every run of every pair."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=rng.randint(1, 30))) for _ in range(300)]
    test, train = texts[:100], texts[100:]

    def runs(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}

    everything = set().union(*map(runs, train))
    expected = [str(i) for i, text in enumerate(test) if runs(text) & everything]
    result = overlap([(str(i), text) for i, text in enumerate(test)], train, run=8)
    assert result["ngram"] == expected and 0 < len(expected) < 100
    assert result["exact"] == [str(i) for i, text in enumerate(test) if text in train]


def test_what_a_record_asks() -> None:
    assert text_of({"instruction": "Please do: x"}) == "Please do: x"
    assert text_of({"instruction": "Please do: x", "question": "x"}) == "x"
    assert text_of({"instruction": "a", "turns": ["a", "b"]}) == "a\nb"


@pytest.mark.slow
def test_large_training_sets_take_seconds(shared_data: Path) -> None:
    """A hundred thousand training texts against MATH's 5,000 problems."""
    root = shared_data / "data"
    test = [(r["id"], text_of(r)) for r in hendrycks_math.load(hendrycks_math.Data(), "test", root)]
    train = [text_of(r) for r in hendrycks_math.load(hendrycks_math.Data(), "train", root)]
    start = time.process_time()
    result = overlap(test, (f"{text} variant {i}" for i in range(14) for text in train))
    assert time.process_time() - start < 30
    assert len(result["exact"]) == 0 and len(result["ngram"]) == 586


# the stage


def stage(tmp_path: Path, task: tuple[str, dict], benchmark: tuple[str, dict], root: Path) -> dict:
    """Run the stage and return overlap.json."""
    sides = {"task": task, "benchmark": benchmark}
    spec = {side: {"source": s, "data": d, "files": {}} for side, (s, d) in sides.items()}
    overlap_stage(spec, {}, tmp_path / "out", {"data_root": str(root)})
    return json.loads((tmp_path / "out" / "overlap.json").read_text())


def test_stage_checks_one_source_against_another(tmp_path: Path) -> None:
    """Only the rows that are trained on count."""
    asked = ["First?", LONG, "Third?", "Fourth?"]
    rows = [{"query": q, "response": "r", "original_question": q} for q in asked]
    write(tmp_path / "metamath" / "train.json", rows)
    tests = [{"question": q, "answer": "#### 1"} for q in ("first?", f"{LONG} more", "Fourth?")]
    write(tmp_path / "gsm8k" / "test.jsonl", tests)
    for samples, exact in ((3, ["test-0"]), (4, ["test-0", "test-2"])):
        result = stage(tmp_path, ("metamath", {"samples": samples}), ("gsm8k", {}), tmp_path)
        assert result == {
            "n": 3,
            "train": samples,
            "exact": len(exact),
            "exact_ids": exact,
            "ngram13": 1,
            "ngram13_ids": ["test-1"],
        }


def test_stage_names_the_first_hundred(tmp_path: Path) -> None:
    rows = [{"question": f"Is it {i}?", "answer": "#### 1"} for i in range(150)]
    for split in ("train", "test"):
        write(tmp_path / "gsm8k" / f"{split}.jsonl", rows)
    result = stage(tmp_path, ("gsm8k", {}), ("gsm8k", {}), tmp_path)
    assert result["exact"] == result["n"] == 150
    assert result["exact_ids"] == [f"test-{i}" for i in range(100)]


def test_real_test_sets_are_not_in_the_training_sets(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "data"
    math = stage(tmp_path, ("hendrycks_math", {}), ("hendrycks_math", {}), root)
    assert (math["n"], math["train"], math["exact"], math["ngram13"]) == (5000, 7500, 1, 586)
    grade_school = stage(tmp_path, ("gsm8k", {}), ("gsm8k", {}), root)
    assert (grade_school["exact"], grade_school["ngram13"]) == (0, 3)
    crossed = stage(tmp_path, ("gsm8k", {}), ("hendrycks_math", {}), root)
    assert (crossed["exact"], crossed["ngram13"]) == (0, 0)


def test_what_all_questions_share_makes_none_suspect(shared_data: Path) -> None:
    """Half of BoolQ's instructions share 13 words with a training one, their questions none."""
    root = shared_data / "data"
    test = commonsense.load(commonsense.Data(test="boolq"), "test", root)
    train = json.loads((root / "commonsense" / "boolq" / "train.json").read_text())
    texts = [row["instruction"] for row in train]
    whole = overlap([(r["id"], r["instruction"]) for r in test], texts)
    assert len(whole["ngram"]) == 1503
    own = overlap([(r["id"], text_of(r)) for r in test], map(commonsense.question, texts))
    assert own == {"exact": [], "ngram": []}


# prepare


def prepared(root: Path, tmp_path: Path, **other: object) -> dict:
    """Prepare GSM8K's rows in tmp_path for the shipped model; return the card."""
    spec = {
        "model": {"architecture": "causal"},
        "source": "gsm8k",
        "data": {"validation": 2},
        "files": {"train.jsonl": "0" * 64},
        "prompt": PROMPT,
        "max_length": 40,
        **other,
    }
    place = {"model": str(root / "workflow" / "resources" / "tiny"), "data_root": str(tmp_path)}
    prepare(spec, {}, tmp_path / "out", place)
    return json.loads((tmp_path / "out" / "card.json").read_text())


def gsm8k_rows(count: int = 8) -> list[dict]:
    """Return made-up problems; the last one is long."""
    rows = [{"question": f"{i} apples?", "answer": f"It is {i}.\n#### {i}"} for i in range(count)]
    rows[-1]["answer"] = f"{LONG} {LONG} {LONG}\n#### 9"
    return rows


def test_card_counts_and_masks(root: Path, tmp_path: Path) -> None:
    """No test file is needed: the test splits are the benchmarks'."""
    from tlora.base_model import load_tokenizer
    from tlora.tasks.prompts import IGNORED, encode_prompt, render

    write(tmp_path / "gsm8k" / "train.jsonl", gsm8k_rows())
    card = prepared(root, tmp_path)
    assert card["counts"] == {"train": 6, "validation": 2}
    assert card["truncated"]["train"] + card["truncated"]["validation"] == 1
    assert card["without_target"] == {"train": 0, "validation": 0}
    assert (card["source"], card["data"], card["prompt"]) == ("gsm8k", {"validation": 2}, PROMPT)
    assert card["overlap"] == {"validation": {"n": 2, "exact": 0, "ngram13": 0}}
    tokenizer = load_tokenizer({"model": str(root / "workflow" / "resources" / "tiny")})
    records = {
        record["id"]: record
        for split in ("train", "validation")
        for record in gsm8k.load(gsm8k.Data(validation=2), split, tmp_path)
    }
    assert len(records) == 8
    for split in ("train", "validation"):
        samples = tokenised.read(tmp_path / "out" / f"{split}.parquet")
        assert len(samples) == card["counts"][split]
        assert sum(len(sample["input_ids"]) for sample in samples) == card["tokens"][split]
        for sample in samples:
            record = records[sample["id"]]
            head = encode_prompt(tokenizer, render(PROMPT, record))
            assert sample["input_ids"][: len(head)] == head
            assert sample["labels"][: len(head)] == [IGNORED] * len(head)
            assert IGNORED not in sample["labels"][len(head) :]
            text = tokenizer.decode(sample["input_ids"][len(head) :], skip_special_tokens=True)
            assert (record["response"] + "\n").startswith(text)
            assert len(sample["input_ids"]) <= 40


def test_validation_records_in_train_are_counted(root: Path, tmp_path: Path) -> None:
    """Equal texts stay on one side, so what is left differs in case alone, or shares 13 words."""
    rows = [{"question": f"{LONG} {i}", "answer": "#### 1"} for i in range(4)]
    rows += [{"question": text, "answer": "#### 1"} for text in ("so?", "SO?", "So?")]
    write(tmp_path / "gsm8k" / "train.jsonl", rows)
    card = prepared(root, tmp_path, data={"validation": 5}, max_length=80)
    counted = card["overlap"]["validation"]
    assert counted["n"] == 5
    texts = {
        split: [r["instruction"] for r in gsm8k.load(gsm8k.Data(validation=5), split, tmp_path)]
        for split in ("train", "validation")
    }
    lowered = {text.lower() for text in texts["train"]}
    assert counted["exact"] == sum(text.lower() in lowered for text in texts["validation"])
    long_train = any(text.startswith(LONG) for text in texts["train"])
    long_validation = sum(text.startswith(LONG) for text in texts["validation"])
    assert counted["ngram13"] == (long_validation if long_train else 0)
    assert counted["exact"] + counted["ngram13"] > 0


def test_no_target_left(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", gsm8k_rows())
    with pytest.raises(UserError, match=r"max_length: 3: no training sample has a target left"):
        prepared(root, tmp_path, max_length=3)
    assert not (tmp_path / "out" / "card.json").exists()
