"""MATH: the paper's rule as its authors describe it, and math-verify as a second judge."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlora import cli
from tlora.benchmarks import Context, equivalence, equivalence_worker, hendrycks_math
from tlora.benchmarks.equivalence import UNREAD, Verdict, last_boxed, stated_answer
from tlora.errors import UserError

# Two answers, and whether their normal forms are equal by the description of the rule.
CASES = [
    # the same text, and text alone
    ("5", "5", True),
    ("5", "6", False),
    ("x+1", "1+x", False),
    ("\\text{east}", "east", False),
    ("(1,2)", "(2,1)", False),
    ("1000", "1,000", False),
    ("1000", "1{,}000", False),
    ("$5$", "5", False),
    ("5.", "5", False),
    ("5.0", "5", False),
    ("X", "x", False),
    # spaces and line breaks
    ("x + 1", "x+1", True),
    ("(1, 2)", "(1,2)", True),
    ("1\n2", "12", True),
    ("10,\\!000", "10,000", True),
    ("a \\text{ or } b", "a", True),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
    ("a\\\\b", "a\\b", True),
    ("1\\,2", "12", False),
    # delimiters
    ("\\left( 1, 2 \\right]", "(1,2]", True),
    ("\\left\\{1\\right\\}", "\\{1\\}", True),
    ("\\bigl(1\\bigr)", "(1)", False),
    # fractions
    ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
    ("\\tfrac{1}{2}", "\\frac{1}{2}", True),
    ("\\cfrac{1}{2}", "\\frac{1}{2}", False),
    ("\\frac12", "\\frac{1}{2}", True),
    ("\\frac1{72}", "\\frac{1}{72}", True),
    ("\\frac{72}1", "\\frac{72}{1}", False),
    ("\\frac 12", "\\frac{1}{2}", True),
    ("\\frac123", "\\frac{1}{2}3", True),
    ("-\\frac12+\\frac34", "-\\frac{1}{2}+\\frac{3}{4}", True),
    ("\\frac1", "\\frac1", True),
    ("1/2", "\\frac{1}{2}", True),
    ("-1/2", "\\frac{-1}{2}", True),
    ("-1/2", "-\\frac{1}{2}", False),
    ("01/2", "\\frac{1}{2}", False),
    ("a/b", "\\frac{a}{b}", False),
    ("1/2/3", "\\frac{1}{2}/3", False),
    ("2/4", "1/2", False),
    # decimals
    ("0.5", "\\frac{1}{2}", True),
    (".5", "0.5", True),
    (".5", "1/2", True),
    ("-.5", "-0.5", False),
    ("x .5", "x0.5", True),
    ("\\sqrt{.3}", "\\sqrt{0.3}", True),
    ("0.25", "\\frac{1}{4}", False),
    ("0.50", "0.5", False),
    # roots
    ("\\sqrt3", "\\sqrt{3}", True),
    ("2\\sqrt 3", "2\\sqrt{ }3", True),
    ("\\sqrt{3}+\\sqrt2", "\\sqrt{3}+\\sqrt{2}", True),
    ("\\sqrt[3]{2}", "\\sqrt{[}3]{2}", True),
    ("\\sqrt12", "\\sqrt{12}", False),
    # degrees, percent, currency, units
    ("36^\\circ", "36", True),
    ("36^{\\circ}", "36", True),
    ("36^ \\circ", "36", False),
    ("50\\%", "50", True),
    ("50%", "50", True),
    ("\\$5", "5", True),
    ("5\\text{ cm}", "5", True),
    ("5 \\text{ cm}^2", "5", True),
    ("5\\text{cm}", "5", False),
    ("5\\mbox{ cm}", "5", False),
    # a left-hand side
    ("x=5", "5", True),
    ("k =5", "5", True),
    ("x = 5", "5", True),
    ("xy=5", "5", True),
    ("f(x)=5", "5", False),
    ("x=y=5", "5", False),
    # where the rule is not defined, both must be the same text
    ("\\frac", "\\frac", True),
    ("\\frac", "\\dfrac", False),
    ("\\sqrt", "\\sqrt ", False),
    ("5\\text{ m}\\text{ cm}", "5\\text{ m}\\text{ cm}", True),
    ("5\\text{ m}\\text{ cm}", "5", False),
    ("", "", True),
]


@pytest.mark.parametrize(("one", "other", "equal"), CASES)
def test_rule_of_the_authors(one: str, other: str, equal: bool) -> None:
    assert hendrycks_math.is_equivalent(one, other) is equal
    assert hendrycks_math.is_equivalent(other, one) is equal


# fmt: off
PIECES = [
    "\\frac", "\\sqrt", "{", "}", "1", "2", "0.5", ".", "=", "x", "k", "\\text{", "\\%", "\\$",
    "\\left", "\\right", "^\\circ", "^{\\circ}", "\\\\", "\\!", "\n", "tfrac", "dfrac", "(", ",",
    "-", "+", "_", "$", "²", " ",
]
# fmt: on


@pytest.mark.slow
def test_rule_agrees_with_the_evaluation_harness() -> None:
    """Their copy of the authors' code, on random pieces; a/b and a bare % are known to differ."""
    theirs = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils", reason="needs lm_eval")
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 7))) for _ in range(40_000)]
    equal = 0
    for one, other in zip(texts, texts[1:] + texts[:1], strict=True):
        for second in (other, one.replace(" ", ""), one.replace("\\left", "")):
            expected = theirs.is_equiv(one, second)
            equal += expected
            assert hendrycks_math.is_equivalent(one, second) is expected, (one, second)
    assert 20_000 < equal < 110_000


@given(st.text("\\fracsqrtext{}0123 ./=%$^_\n"))
def test_no_text_breaks_the_rule(text: str) -> None:
    assert hendrycks_math.is_equivalent(text, text)
    hendrycks_math.paper_answer(text, "x")
    stated_answer(text, "x")
    last_boxed(text)


@pytest.mark.parametrize(
    ("tail", "paper", "stated"),
    [
        ("5", "5", "5"),
        ("5.", "5", "5"),
        ("5.\nNext", "5", "5"),
        ("5\nNext", "5\nNext", "5"),
        ("5. I hope so.", "5. I hope so", "5"),
        (" $5$ .", "$5$", "$5$"),
        (".5", ".5", ".5"),
        ("", None, None),
        ("...", "..", ".."),
        (
            "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}\nso",
            "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}\nso",
            "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        ),
        ("\\frac{1}\n{2}", "\\frac{1}\n{2}", "\\frac{1}"),
        ("\\frac{1\n}{2}", "\\frac{1\n}{2}", "\\frac{1 }{2}"),
        ("4\nThe answer is: 5", "5", "5"),
        ("4\nThe answer is:5", "4\nThe answer is:5", "5"),
    ],
)
def test_answer_is_extracted(tail: str, paper: str | None, stated: str | None) -> None:
    completion = f"\\boxed{{7}} is not it. The answer is: {tail}"
    assert hendrycks_math.paper_answer(completion) == paper
    assert stated_answer(completion, "The answer is: ") == stated


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} and \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("$\\boxed 2$.", "2"),
        ("\\fbox{3}", "3"),
        ("\\boxed{4} \\fbox{3}", "4"),
        ("\\boxed{{}}", "{}"),
        ("\\boxed{1", None),
        ("none", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content
    assert hendrycks_math.paper_answer(text) is None
    assert stated_answer(text, "The answer is: ") == content


# Reference and answer, and what math-verify must say of them (None: unreadable).
JUDGED = [
    ("\\frac{1}{2}", "0.5", True),
    ("\\frac{1}{2}", "1/2", True),
    ("\\frac{1}{2}", "\\frac{2}{4}", True),
    ("\\frac{1}{3}", "0.333333", True),
    ("\\frac{1}{3}", "0.33", False),
    ("10,\\!000", "10000", True),
    ("10,000", "$10,\\!000$", True),
    ("5", "$5$", True),
    ("5", "x=5", True),
    ("5", "\\boxed{5}", True),
    ("18", "$18", True),
    ("18", "18 dollars", True),
    ("18", "18 miles per day", True),
    ("18", "-18 dollars", False),
    ("20", "18 dollars and 20 cents", False),
    ("\\{3,5\\}", "3 and 5", True),
    ("18", "\\$18", True),
    ("18", "$18$ and more", True),
    ("36^\\circ", "36", True),
    ("50\\%", "50", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x+1", "(x+2)^2", False),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("\\{1,2\\}", "\\{2,1\\}", True),
    ("(1,2)", "(2,1)", False),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}", True),
    ("\\text{east}", "\\text{west}", False),
    ("\\text{(B)}", "B", True),
    ("5", "6", False),
    ("5", "??", False),
    ("5", "$", None),
]


def test_math_verify_compares_meaning() -> None:
    found = equivalence.ask([(gold, answer) for gold, answer, _ in JUDGED])
    wrong = [
        (case, verdict)
        for case, verdict in zip(JUDGED, found, strict=True)
        if verdict != (UNREAD if case[2] is None else Verdict(case[2], readable=True))
    ]
    assert not wrong


def test_what_is_decided_without_asking_is_what_math_verify_says() -> None:
    numbers = ["0", "1", "-1", "7", "-7", "12", "1000", "123456789012345", "-5"]
    pairs = [(one, other) for one in numbers for other in numbers]
    pairs += [("\\frac{1}{2}", "\\frac{1}{2}"), ("x + 1", "x  + 1"), ("x+1", "x\n+1")]
    decided = [equivalence._decided(*pair) for pair in pairs[:-1]]
    assert None not in decided
    assert decided == equivalence.ask(pairs[:-1])
    assert equivalence._decided(*pairs[-1]) is None


def test_quick_parses_are_the_ones_found_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    import sympy
    from antlr4.atn.ParserATNSimulator import ParserATNSimulator
    from latex2sympy2_extended import latex2sympy2

    parser = importlib.import_module("math_verify.parser")
    texts = {text for gold, answer, _ in JUDGED for text in (gold, answer)}
    # The first needs the context; the others cannot be parsed.
    texts |= {"7x^2 + 25x - 11", "\\frac{1}{", "(-\\infty, 3] \\cup [5, 8", "#x", "2 \\%\\% \\frac"}
    with_context, seen = ParserATNSimulator.execATNWithFullContext, []

    def count(self: object, *arguments: object) -> object:
        seen.append(arguments)
        return with_context(self, *arguments)

    monkeypatch.setattr(ParserATNSimulator, "execATNWithFullContext", count)

    def parses() -> dict[str, list]:
        # math-verify has small caches of its own.
        for cached in (equivalence_worker._parsed, parser.parse_latex_cached, parser.extract_latex):
            cached.cache_clear()
        seen.clear()
        found = {text: equivalence_worker._parsed(text) for text in sorted(texts)}
        return {
            text: [each if isinstance(each, str) else sympy.srepr(each) for each in parsed]
            for text, parsed in found.items()
        }

    slow, used = parses(), len(seen)
    # To be put back.
    before = latex2sympy2._Latex2Sympy.create_parser
    monkeypatch.setattr(latex2sympy2._Latex2Sympy, "create_parser", before)
    equivalence_worker.parse_quickly()
    assert parses() == slow
    assert 0 < len(seen) < used / 2


@pytest.mark.slow
def test_verdicts_depend_neither_on_processes_nor_on_order() -> None:
    pairs = [(gold, answer) for gold, answer, _ in JUDGED] * 2
    alone = equivalence.ask(pairs, 1)
    assert equivalence.ask(pairs, 3) == alone
    assert equivalence.ask(pairs[::-1], 2) == alone[::-1]


@pytest.mark.slow
def test_an_endless_comparison_is_undecided_and_spoils_no_other() -> None:
    """The tower is computed inside C, where no signal handler of Python runs."""
    tower = "9^{9^{9^{9}}}"
    answers = ["\\frac{2}{4}", tower, "0.5", "1+" * 600, "x", "1/2"]
    records = [
        {"id": i, "completion": f"The answer is: {answer}", "reference": "\\frac{1}{2}"}
        for i, answer in enumerate(answers)
    ]
    content = hendrycks_math.score(records, None, Context(place={"workers": 2}))
    verdicts = [item["math_verify_correct"] for item in content["items"]]
    assert verdicts == [True, None, True, False, False, True]
    assert content["items"][1]["math_verify_extracted"] == tower
    assert content["items"][3]["math_verify_extracted"] is None
    assert content["metrics"]["math_verify_undecided"] == 1 / 6
    assert content["metrics"]["math_verify_unread"] == 1 / 6
    assert content["metrics"]["math_verify_accuracy"] == 3 / 6


def test_math_verify_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no math_verify here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = {"id": "a", "completion": "The answer is: x", "reference": "y"}
    with pytest.raises(UserError, match="math-verify: ImportError: no math_verify here") as caught:
        hendrycks_math.score([record])
    assert "\n" not in str(caught.value)
    # nothing is started for what can be decided without
    assert hendrycks_math.score([{**record, "reference": "x"}])["value"] == 1


def test_verdicts_of_both_rules() -> None:
    solution = {"solution": "so $\\boxed{\\frac{1}{2}}$.", "level": "Level 2", "type": "Algebra"}
    other = {**solution, "level": "Level 3", "type": "Counting & Probability"}
    completions = ["The answer is: \\dfrac12.", "The answer is: $1/2$", "$\\boxed{1/2}$", "no"]
    records = [
        {"id": i, "completion": text, "reference": reference}
        for i, (text, reference) in enumerate(
            zip(completions, [solution, solution, other, other], strict=True)
        )
    ]
    content = hendrycks_math.score(records)
    assert [item["correct"] for item in content["items"]] == [True, False, False, False]
    assert [item["extracted"] for item in content["items"]] == ["\\dfrac12", "$1/2$", None, None]
    assert [item["math_verify_correct"] for item in content["items"]] == [True, True, True, False]
    assert content["items"][3]["math_verify_extracted"] is None
    assert (content["n"], content["unextracted"], content["value"]) == (4, 2, 0.25)
    assert content["metrics"] == {
        "accuracy": 0.25,
        "math_verify_accuracy": 0.75,
        "math_verify_unread": 0.25,
        "math_verify_undecided": 0.0,
        "algebra_accuracy": 0.5,
        "counting_and_probability_accuracy": 0.0,
        "level_2_accuracy": 0.5,
        "level_3_accuracy": 0.0,
    }


@pytest.mark.parametrize(
    "reference", ["\\boxed{5}", "5", "$\\boxed 5$.", {"solution": "\\boxed{5}"}, {"answer": "5"}]
)
def test_forms_of_a_reference(reference: object) -> None:
    record = {"id": "a", "completion": "The answer is: 5", "reference": reference}
    content = hendrycks_math.score([record])
    assert content["metrics"]["accuracy"] == content["metrics"]["math_verify_accuracy"] == 1
    assert len(content["metrics"]) == 4


@pytest.mark.parametrize("reference", ["", " ", "\\boxed{5", "\\boxed{}", None, 5, {"level": 1}])
def test_reference_without_an_answer_is_named(reference: object) -> None:
    record = {"id": "a", "completion": "The answer is: 5", "reference": reference}
    with pytest.raises(UserError, match=r"item 'a': reference: .*: expected a solution with"):
        hendrycks_math.score([record])


@pytest.fixture(scope="module")
def problems(shared_data: Path) -> list[dict]:
    """The 5,000 test problems."""
    path = shared_data / "data" / "math" / "test.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_gold_equals_itself_by_math_verify(problems: list[dict]) -> None:
    """Both sides are really parsed and compared; no exception is needed."""
    golds = [last_boxed(row["solution"]) for row in problems]
    assert len(golds) == 5000
    verdicts = equivalence.ask([(gold, gold) for gold in golds], 2)
    assert [gold for gold, v in zip(golds, verdicts, strict=True) if v != (True, True)] == []


def test_gold_answers_score_full(problems: list[dict]) -> None:
    """But for one gold that ends with a full stop, which the paper's rule takes off."""
    records = [
        {
            "id": row["idx"],
            "completion": f"So.\nThe answer is: {last_boxed(row['solution']).rstrip('.')}.\n",
            "reference": {key: row[key] for key in ("solution", "level", "type")},
        }
        for row in problems
    ]
    content = hendrycks_math.score(records)
    assert [item["id"] for item in content["items"] if not item["correct"]] == [2269]
    assert content["value"] == 4999 / 5000
    assert content["unextracted"] == 0
    assert content["metrics"]["math_verify_accuracy"] == 1.0
    assert len(content["metrics"]) == 4 + 5 + 7
    commas = [row for row in problems if ",\\!" in last_boxed(row["solution"])]
    assert not hendrycks_math.is_equivalent(
        last_boxed(commas[0]["solution"]), last_boxed(commas[0]["solution"]).replace(",\\!", "")
    )


def test_command_scores_a_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = [
        {"id": "a", "completion": "The answer is: \\frac12.", "reference": "\\boxed{0.5}"},
        {"id": "b", "completion": "The answer is: 1", "reference": "2"},
    ]
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(root)
    for name in ("math", "hendrycks_math"):
        out = tmp_path / name / "score.json"
        assert cli.main(["score", name, str(path), "--out", str(out)]) == 0
        assert json.loads(out.read_text())["metrics"]["accuracy"] == 0.5
        assert f"{name}: accuracy 50.00%" in capsys.readouterr().out
