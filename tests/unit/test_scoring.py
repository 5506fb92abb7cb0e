"""Scorers and the score stage: what counts as an answer, and what broken files get."""

import json
import random
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlora.benchmarks import choice, equivalence, gsm8k
from tlora.errors import UserError
from tlora.stages.score import read_generations, score, score_file

# text after the marker; the strict rule's number; the paper's rule's integer
ANSWERS = [
    ("18", "18", 18),
    ("18.", "18", 18),
    (" 18 dollars.", "18", 18),
    ("$18", "18", 18),
    ("-$5", "-5", 5),
    ("$-5", "-5", -5),
    (r"\$5", "5", 5),
    ("€ 5", "5", 5),
    ("50%", "50", 50),
    ("+7", "7", 7),
    ("1,450,000", "1450000", 1450),
    ("1,450", "1450", 1450),
    ("1,450,000.50", "2900001/2", 1450),
    ("1,45", None, 145),
    ("12,34,567", None, 1234),
    ("1.2.3", None, 1),
    ("3.5", "7/2", 4),
    ("2.5", "5/2", 2),
    (".5", "1/2", 0),
    ("-.5", "-1/2", 0),
    ("1/5", "1/5", 0),
    ("7/2 hours", "7/2", 4),
    ("5/0", None, 5),
    ("/5", "5", None),
    ("5/hour", "5", 5),
    ("5/10/2020", None, 0),
    ("10+John's age", None, 10),
    ("10 + 5", None, 10),
    ("5*10=50", None, 5),
    ("5 x 4", None, 5),
    ("5-10", None, 5),
    ("5-day", "5", 5),
    ("12:30", None, 12),
    ("1e5", None, 1),
    ("3 1/2", None, 3),
    ("12 000", None, 12),
    ("\u22125", "-5", 5),
    (r"\boxed{5}", "5", 5),
    ("**5** dollars", "5", 5),
    ("about 5 apples, or 6", "5", 5),
    ("none", None, None),
    ("", None, None),
    ("\n\n18\nQuestion", "18", 18),
    ("9" * 2000, None, None),
]


@pytest.mark.parametrize(("tail", "strict", "paper"), ANSWERS)
def test_answer_is_extracted(tail: str, strict: str | None, paper: int | None) -> None:
    completion = f"One of 3 steps. The answer is: {tail}"
    assert gsm8k.strict_number(completion) == (None if strict is None else Fraction(strict))
    assert gsm8k.paper_number(completion) == paper


@pytest.mark.parametrize(
    ("completion", "strict", "paper"),
    [
        ("18", None, None),
        ("The answer is 18", None, None),
        ("The answer is: 3\nThe answer is: 4", 4, 4),
        ("The answer is:18", 18, None),
        ("The answer is:\n18", 18, None),
        ("The answer is: 3\nThe answer is: ", None, None),
    ],
)
def test_last_marker_counts(completion: str, strict: int | None, paper: int | None) -> None:
    assert gsm8k.strict_number(completion) == strict
    assert gsm8k.paper_number(completion) == paper


def test_verdicts_of_all_rules() -> None:
    completions = {"a": "The answer is: 3.5", "b": "The answer is: 4.0", "c": "no idea"}
    records = [{"id": i, "completion": c, "reference": 4} for i, c in completions.items()]
    content = gsm8k.score(records)
    assert (content["n"], content["metric"], content["unextracted"]) == (3, "accuracy", 1)
    assert content["value"] == content["metrics"]["accuracy"] == 2 / 3
    assert content["metrics"] == {
        "accuracy": 2 / 3,
        "strict_accuracy": 1 / 3,
        "math_verify_accuracy": 1 / 3,
        "math_verify_unread": 1 / 3,
        "math_verify_undecided": 0.0,
    }
    assert content["items"][0] == {
        "id": "a",
        "correct": True,
        "extracted": "4",
        "strict_correct": False,
        "strict_extracted": "3.5",
        "math_verify_correct": False,
        "math_verify_extracted": "3.5",
    }


@pytest.mark.parametrize(
    "reference", [2125, 2125.0, "2125", "2,125", "so 7 <<3+4=7>>\n#### 2,125", "$2,125"]
)
def test_reference_is_a_number_or_a_raw_answer(reference: object) -> None:
    assert gsm8k.reference_number(reference, "x") == 2125
    assert gsm8k.reference_number(1e22, "x") == 10**22
    assert gsm8k.reference_number(0.1, "x") == Fraction(1, 10)


@pytest.mark.parametrize(
    "reference", ["", "none", "#### ", None, True, [4], float("nan"), float("inf")]
)
def test_reference_without_a_number_is_named(reference: object) -> None:
    with pytest.raises(UserError, match=r"item 'x': reference: .* expected a number"):
        gsm8k.reference_number(reference, "x")


@pytest.mark.parametrize(("model", "correct"), [("6b_finetuning", 286), ("175b_finetuning", 458)])
def test_verdicts_of_others_agree(shared_data: Path, model: str, correct: int) -> None:
    path = shared_data / "data" / "graded" / "gsm8k_openai_solutions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [
        {
            "id": number,
            "completion": row[model]["solution"],
            "reference": row["ground_truth"].rpartition("A: ")[2],
        }
        for number, row in enumerate(rows)
    ]
    items = gsm8k.score(records, gsm8k.Options(marker="A: "))["items"]
    for rule in ("strict", "math_verify"):
        verdicts = [item[f"{rule}_correct"] for item in items]
        assert sum(verdicts) == correct
        assert verdicts == [row[model]["is_correct"] for row in rows]


@pytest.mark.parametrize(
    ("split", "n", "lost"), [("test", 1319, ["test-611"]), ("train", 7473, None)]
)
def test_gold_targets_score_full(shared_data: Path, split: str, n: int, lost: list | None) -> None:
    from tlora.tasks import gsm8k as task

    records = task.load(task.Data(), split, shared_data / "data")
    content = gsm8k.score([{**r, "completion": r["response"]} for r in records])
    assert (content["n"], content["unextracted"]) == (n, 0)
    assert set(content["metrics"].values()) == {1.0, 0.0}
    for rule in ("accuracy", "strict_accuracy", "math_verify_accuracy"):
        assert content["metrics"][rule] == 1.0

    # With thousands commas, as they stand in the files, the paper's rule loses golds of a million.
    raw = [
        {**r, "completion": f"The answer is: {r['reference'].rpartition('#### ')[2]}"}
        for r in records
    ]
    content = gsm8k.score(raw)
    wrong = [item["id"] for item in content["items"] if not item["correct"]]
    assert content["metrics"]["strict_accuracy"] == 1.0
    assert content["metrics"]["math_verify_accuracy"] == 1.0
    assert wrong == lost if lost else len(wrong) == 5


NUMBERS = st.decimals(-(10**12), 10**12, allow_nan=False, allow_infinity=False, places=2)


@given(NUMBERS, st.sampled_from(["{}", "{:,}"]), st.sampled_from(["", "$"]), st.booleans())
def test_strict_reads_back_every_number(
    number: Decimal, form: str, currency: str, ended: bool
) -> None:
    sign = "-" if number < 0 else ""
    text = f"{sign}{currency}{form.format(abs(number))}{' units.' if ended else ''}"
    assert gsm8k.strict_number(f"x = 1\nThe answer is: {text}") == Fraction(number)


@given(st.integers(-(10**15), 10**15))
def test_paper_reads_back_integers(number: int) -> None:
    assert gsm8k.paper_number(f"The answer is: {number}") == number


@settings(max_examples=300)
@given(
    st.text()
    | st.text("0123456789.,/+-$% xeE:\n")
    | st.from_regex(r"[\-+]?\d*[\.,/]?\d+", fullmatch=True)
)
def test_no_text_breaks_the_rules(text: str) -> None:
    completion = f"The answer is: {text}"
    assert isinstance(gsm8k.paper_number(completion), int | None)
    assert isinstance(gsm8k.strict_number(completion), Fraction | None)
    assert isinstance(equivalence.stated_answer(completion, gsm8k.MARKER), str | None)
    choice.score([{"id": "a", "completion": completion, "reference": "answer1"}])


@pytest.mark.slow
def test_no_text_breaks_scoring() -> None:
    """Strange texts go to one process of math-verify, one after the other."""
    rng = random.Random(0)
    pieces = [*"0123456789.,/+-$% xeE:\n{}\\^_²٣\u2028\0\ud800", "\\frac", "\\boxed{", "not"]
    records = [
        {"id": i, "completion": f"The answer is: {''.join(rng.choices(pieces, k=i % 9))}"}
        for i in range(300)
    ]
    content = gsm8k.score([{**record, "reference": 1} for record in records])
    json.dumps(content, allow_nan=False)
    assert content["n"] == 300
    assert content["unextracted"] == sum(i["extracted"] is None for i in content["items"])
    assert content["metrics"]["math_verify_undecided"] == 0


@given(st.lists(st.tuples(st.sampled_from(["1", "2", ""]), st.integers(1, 2)), min_size=1))
def test_value_is_the_share_of_correct_items(pairs: list[tuple[str, int]]) -> None:
    records = [
        {"id": i, "completion": f"The answer is: {text}", "reference": gold}
        for i, (text, gold) in enumerate(pairs)
    ]
    content = gsm8k.score(records)
    assert content["value"] == sum(text == str(gold) for text, gold in pairs) / len(pairs)
    assert [item["id"] for item in content["items"]] == list(range(len(pairs)))
    flipped = gsm8k.score(records[::-1])
    assert flipped["metrics"] == content["metrics"]
    assert flipped["items"] == content["items"][::-1]


@pytest.mark.parametrize(
    ("completion", "reference", "extracted"),
    [
        ("the correct answer is answer2", "answer2", "answer2"),
        ("answer1 or answer2", "answer2", "answer1"),
        ("Answer2", "answer2", None),
        ("answer6", "answer1", None),
        ("answer12", "answer1", "answer1"),
        ("solution2", "answer2", None),
        ("the correct answer is solution2", "solution1", "solution2"),
        ("ending4", "ending4", "ending4"),
        ("option1.", "option1", "option1"),
        ("untrue, so false", "false", "true"),
        ("False", "false", None),
        ("", "true", None),
        ("answer1\n\n### Response:\nanswer2", "answer1", "answer1"),
        ("none\n\n### Instruction:\nx\n\n### Response:\nanswer2", "answer2", None),
        ("### Response: answer3", "answer3", "answer3"),
        ("### Instruction:\nanswer1/answer2\n\n### Response:answer2", "answer2", "answer2"),
        (
            "Below is an instruction answer1\n### Response:answer2### Response:",
            "answer2",
            "answer2",
        ),
        ("Pick answer1 or answer3: answer3", "answer3", "answer3"),
    ],
)
def test_choice_takes_the_first_label(
    completion: str, reference: str, extracted: str | None
) -> None:
    record = {"id": "a", "completion": completion, "reference": reference}
    record["prompt"] = "Pick answer1 or answer3:"
    content = choice.score([record])
    assert content["items"] == [
        {"id": "a", "correct": extracted == reference, "extracted": extracted}
    ]
    assert content["unextracted"] == (extracted is None)


@pytest.mark.parametrize("reference", ["answer6", "yes", 1, None])
def test_choice_refuses_an_unknown_label(reference: object) -> None:
    with pytest.raises(UserError, match=r"item 'a': reference: .*expected one of true, false"):
        choice.score([{"id": "a", "completion": "true", "reference": reference}])


def test_choice_golds_score_full(shared_data: Path) -> None:
    paths = sorted((shared_data / "data" / "commonsense").glob("*/test.json"))
    assert len(paths) == 7
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ABC 0123456789 .,:/\n"
    for path in paths:
        rows = json.loads(path.read_text(encoding="utf-8"))
        records = [
            {"id": i, "completion": row["output"], "reference": row["answer"]}
            for i, row in enumerate(rows)
        ]
        content = choice.score(records)
        assert (content["value"], content["unextracted"]) == (1.0, 0), path
        noise = [{**r, "completion": "".join(rng.choices(letters, k=80))} for r in records]
        content = choice.score(noise)
        assert (content["value"], content["unextracted"]) == (0.0, len(rows)), path


def row(**changes: object) -> str:
    record = {"id": "a", "completion": "The answer is: 4", "reference": "4", **changes}
    return json.dumps({key: value for key, value in record.items() if value != "absent"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([row(), '{"id": "b", "compl'], r":2: not valid JSON: "),
        ([row(), "", row(id="b"), "[1]"], r":4: \[1\]: expected a JSON object"),
        ([row(), row(id="b", completion="absent")], r":2: completion: missing: expected id, "),
        ([row(id="absent")], r":1: id: missing"),
        ([row(reference="absent")], r":1: reference: missing"),
        ([row(), row(id="b"), row()], r":3: id: 'a': stands in line 1 already"),
        ([row(id=None)], r":1: id: None: expected text or an integer"),
        ([row(completion=4)], r":1: completion: 4: expected text"),
        ([row(reference="four")], r": item 'a': reference: 'four': expected a number"),
        ([], r": no completions: expected at least one line"),
        (["", "  "], r": no completions: expected at least one line"),
    ],
)
def test_broken_files_are_named_with_their_line(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(path)) + message) as caught:
        score_file("gsm8k", path, tmp_path / "score.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "score.json").exists()


def test_unreadable_files_and_unknown_scorers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such scorer: did you mean 'gsm8k'"):
        score_file("gsm8", tmp_path / "g.jsonl", tmp_path / "score.json")
    with pytest.raises(UserError, match="No such file"):
        score_file("gsm8k", tmp_path / "g.jsonl", tmp_path / "score.json")
    (tmp_path / "g.jsonl").write_bytes(row().encode() + b"\n\xff")
    with pytest.raises(UserError, match=":2: not valid UTF-8"):
        score_file("gsm8k", tmp_path / "g.jsonl", tmp_path / "score.json")


def test_line_separators_within_a_text_do_not_split_it(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    text = "one\u2028two\x85 The answer is: 4"
    path.write_text(json.dumps({**json.loads(row()), "completion": text}, ensure_ascii=False))
    assert read_generations(path)[0]["completion"] == text


def test_stage_and_command_write_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_text(row() + "\n" + row(id="b", completion="é The answer is: 5"), encoding="utf-8")
    spec = {"generate": "0123456789ab", "implementation": "gsm8k", "options": {}}
    place = {"work": str(tmp_path / "work"), "stamp": "0", "workers": 2}
    score(spec, {"generate": path}, tmp_path / "stage", place)
    content = score_file("gsm8k", path, tmp_path / "again" / "score.json")
    written = (tmp_path / "stage" / "score.json").read_bytes()
    assert written == (tmp_path / "again" / "score.json").read_bytes()
    assert json.loads(written) == content
    assert content["value"] == 0.5


def test_scoring_loads_no_torch(root: Path, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text(row(), encoding="utf-8")
    script = (
        "import sys; from tlora.stages.score import score_file\n"
        f"score_file('gsm8k', {str(tmp_path / 'g.jsonl')!r}, {str(tmp_path / 's.json')!r})\n"
        "import tlora.benchmarks.choice, tlora.stages.generate, tlora.generation.transformers\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
