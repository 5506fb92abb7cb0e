"""Reading rows from files, and choosing the training rows among them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from record_files import write

from tlora.errors import UserError
from tlora.tasks import loading

ROWS = [{"question": f"q{i}", "answer": f"It is {i}.\n#### {i}"} for i in range(10)]
TEXTS = ("question", "answer")


# formats


@pytest.mark.parametrize("suffix", loading.SUFFIXES)
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix}", [{**row, "extra": 1} for row in ROWS])
    assert loading.find_file(tmp_path, "train") == path
    assert loading.read_rows(path, TEXTS) == ROWS


def test_json_file_with_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    assert loading.read_rows(path, TEXTS) == ROWS


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [{"question": "a\u2028b\x85c", "answer": "#### 1"}]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")
    assert loading.read_rows(path, TEXTS) == rows


def test_columns_may_hold_more_than_text_and_follow_the_file(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1, "turns": ["x"]}, {"text": "b", "label": 0, "turns": []}]
    kinds = {"label": int, "turns": list}
    for suffix in loading.SUFFIXES:
        path = write(tmp_path / f"t{suffix}", rows)
        expected = [{"label": 1, "turns": ["x"]}, {"label": 0, "turns": []}]
        assert loading.read_rows(path, kinds) == expected
        by_name = loading.read_rows(path, lambda present: [n for n in present if n == "text"])
        assert by_name == [{"text": "a"}, {"text": "b"}]


# what is refused, and where it stands


@pytest.mark.parametrize(
    ("name", "place"),
    [("t.jsonl", r"t\.jsonl:4"), ("t.jsonl.gz", r"t\.jsonl\.gz:4"), ("t.json", r"t\.json: row 2")],
)
def test_missing_column_names_the_line(tmp_path: Path, name: str, place: str) -> None:
    rows = [ROWS[0], {"question": "q", "text": "t"}]
    text = json.dumps(rows) if name == "t.json" else "\n\n\n".join(map(json.dumps, rows))
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=rf"{place}: column 'answer' is missing.*question, text"):
        loading.read_rows(tmp_path / name, TEXTS)


def test_missing_column_of_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [{"question": "q"}])
    with pytest.raises(UserError, match=r"t\.parquet: column 'answer' is missing"):
        loading.read_rows(path, TEXTS)
    path = write(tmp_path / "t.parquet", [{"question": "q"}, {"question": None}])
    with pytest.raises(UserError, match=r"t\.parquet: row 2: question: None: expected text"):
        loading.read_rows(path, ("question",))


GZIPPED = gzip.compress(b'{"question": "a"}\n' * 2000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"question": "a"}\n\n{"question": ', r"t\.jsonl:3: not valid JSON"),
        ("t.json", b'[{"question": "a"},\n {]', r"t\.json:2: not valid JSON"),
        ("t.jsonl", b'{"question": 3}', r"t\.jsonl:1: question: 3: expected text"),
        ("t.jsonl", b'\n{"question": null}', r"t\.jsonl:2: question: None: expected text"),
        ("t.jsonl", b"[1, 2]", r"t\.jsonl:1: \[1, 2\]: expected an object"),
        ("t.json", b"[1, 2]", r"t\.json: row 1: 1: expected an object"),
        ("t.jsonl", b"\n\n", "no rows"),
        ("t.json", b"[]", "no rows"),
        ("t.jsonl", b"\xff\xfe", "not readable as UTF-8"),
        ("t.jsonl.gz", b"no gzip", "not readable"),
        ("t.jsonl.gz", GZIPPED[:-9], "not readable"),
        ("t.jsonl.gz", GZIPPED[:14] + b"\xff" * 20 + GZIPPED[34:], "not readable"),
        ("t.parquet", b"no parquet", "not a parquet file"),
        ("t.csv", b"question\na", "unknown format"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        loading.read_rows(tmp_path / name, ("question",))
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("value", [True, "1", 1.0, None])
def test_a_number_is_a_number(tmp_path: Path, value: object) -> None:
    path = write(tmp_path / "t.jsonl", [{"label": value}])
    with pytest.raises(UserError, match=r"label: .*: expected a whole number"):
        loading.read_rows(path, {"label": int})


def test_unknown_split() -> None:
    with pytest.raises(UserError, match=r"gsm: split: 'dev': expected one of train, valid"):
        loading.check_split("dev", "gsm")


# finding files


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        loading.read_rows(tmp_path / "t.jsonl", ("question",))
    with pytest.raises(UserError, match=r"no such folder: expected it to hold test\.jsonl"):
        loading.find_file(tmp_path / "gsm8k", "test")
    # What a data_root has no folder of is read of the hub.
    assert loading.locate(tmp_path, "gsm8k", "test") is None
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(UserError, match="no test or other file"):
        loading.locate(tmp_path, "gsm8k", "test", "other")
    assert loading.locate(None, "gsm8k", "test") is None


def test_preferred_name_then_case(tmp_path: Path) -> None:
    second = write(tmp_path / "Published-395K.json", ROWS)
    assert loading.find_file(tmp_path, "train", "Published-395K") == second
    assert loading.find_file(tmp_path, "train", "published-395k") == second
    first = write(tmp_path / "train.jsonl.gz", ROWS)
    assert loading.find_file(tmp_path, "train", "Published-395K") == first


# the hub's commits


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "a" * 39, "A" * 40])
def test_hub_needs_a_commit(revision: str | None) -> None:
    message = rf"o/d: revision: {re.escape(repr(revision))}: pin the commit"
    with pytest.raises(UserError, match=message) as caught:
        loading.hub_rows("o/d", None, "train", revision, TEXTS)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        loading.local_sources(None, [("o/d", None, "train", revision)])
    if revision is not None:
        with pytest.raises(ValueError, match="revision: expected the 40 hex digits"):
            loading.check_revision(revision)


# choosing rows


def test_subset_takes_the_first_or_draws() -> None:
    rows = [{"question": f"q{i}"} for i in range(1000)]
    assert loading.subset(rows, None, None, "x") == list(enumerate(rows))
    assert loading.subset(rows, 3, None, "x") == list(enumerate(rows[:3]))
    drawn = loading.subset(rows, 100, 1, "x")
    assert drawn == loading.subset(rows, 100, 1, "x") != loading.subset(rows, 100, 2, "x")
    at = [index for index, _ in drawn]
    assert at == sorted(set(at)) and len(at) == 100 and at[-1] > 500
    assert all(rows[index] is row for index, row in drawn)
    # The same rows on every machine and with every Python.
    assert at[:5] == FIRST_DRAWN
    with pytest.raises(UserError, match="samples: 1001: expected at most the 1000 rows"):
        loading.subset(rows, 1001, None, "x")


FIRST_DRAWN = [2, 9, 22, 26, 29]


@pytest.mark.parametrize("seed", [None, 0])
def test_training_rows_split_the_subset(seed: int | None) -> None:
    rows = [{"text": f"{i}", "origin": f"{i // 3}"} for i in range(300)]
    train, validation = (
        loading.training_rows(rows, 100, seed, 10, "origin", split, "x")
        for split in ("train", "validation")
    )
    assert len(train) + len(validation) == 100 and 8 <= len(validation) <= 10
    both = sorted(train + validation, key=lambda pair: pair[0])
    assert both == loading.subset(rows, 100, seed, "x")
    assert not {row["origin"] for _, row in train} & {row["origin"] for _, row in validation}


def test_equal_rows_stay_on_one_side() -> None:
    rows = [{"question": f"q{i // 2}", "answer": "#### 1"} for i in range(40)]
    for key in ("question", lambda row: row["question"].upper()):
        parts = [loading.carve(rows, 9, key, s, "x") for s in ("train", "validation")]
        texts = [{row["question"] for _, row in part} for part in parts]
        assert not texts[0] & texts[1]
        assert [len(part) for part in parts] == [32, 8]


@pytest.mark.parametrize("count", [10, 11, -1])
def test_validation_larger_than_train(count: int) -> None:
    with pytest.raises(UserError, match=f"validation: {count}: expected 0 to 9"):
        loading.carve(ROWS, count, "question", "train", "x")
    with pytest.raises(UserError, match="split: 'test': expected one of train, validation"):
        loading.carve(ROWS, 1, "question", "test", "x")
