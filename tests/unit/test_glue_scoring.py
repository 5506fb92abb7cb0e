"""GLUE: a label word and nothing else; Matthews correlation against scikit-learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, matthews_corrcoef

from tlora import cli
from tlora.benchmarks import glue
from tlora.errors import UserError


def score(pairs: list[tuple[str, str]]) -> dict:
    """Score pairs of a reference and a completion."""
    return glue.score(
        [{"id": i, "completion": c, "reference": r} for i, (r, c) in enumerate(pairs)]
    )


@pytest.mark.parametrize("words", glue.LABELS)
def test_label_words_of_every_task(words: tuple[str, str]) -> None:
    pairs = [(label, said) for label in words for said in words]
    content = score(pairs)
    assert content["items"] == [
        {"id": i, "correct": label == said, "extracted": said}
        for i, (label, said) in enumerate(pairs)
    ]
    assert (content["value"], content["unextracted"]) == (0.5, 0)
    assert ("matthews_correlation" in content["metrics"]) == ("acceptable" in words)


@pytest.mark.parametrize(
    ("completion", "extracted"),
    [
        ("entailment", "entailment"),
        (" entailment \n", "entailment"),
        ("not_entailment", "not_entailment"),
        ("Entailment", None),
        ("entailment.", None),
        ("entailment entailment", None),
        ("not entailment", None),
        ("equivalent", None),
        ("True", None),
        ("", None),
    ],
)
def test_only_the_exact_word_counts(completion: str, extracted: str | None) -> None:
    content = score([("entailment", completion)])
    assert content["items"][0]["extracted"] == extracted
    assert content["items"][0]["correct"] is (extracted == "entailment")
    assert content["unextracted"] == (extracted is None)


WORDS = st.sampled_from(["acceptable", "unacceptable"])


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(st.lists(st.tuples(WORDS, WORDS | st.just("none")), min_size=1, max_size=30))
def test_matthews_correlation_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    references, said = zip(*pairs, strict=True)
    metrics = score(pairs)["metrics"]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(references, said))
    expected = matthews_corrcoef(references, said)
    assert metrics["matthews_correlation"] == pytest.approx(expected, abs=1e-12)


@given(*[st.integers(0, 40)] * 4)
def test_matthews_correlation_is_the_closed_form(tp: int, tn: int, fp: int, fn: int) -> None:
    pairs = [("y", "y")] * tp + [("n", "n")] * tn + [("n", "y")] * fp + [("y", "n")] * fn
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0
    found = glue.matthews_correlation([a for a, _ in pairs], [b for _, b in pairs])
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reference", ["yes", 1, None, ["positive"]])
def test_unknown_references_are_named(reference: object) -> None:
    with pytest.raises(UserError, match=r"item 0: reference: .*expected one of not_equivalent"):
        score([(reference, "positive")])


def test_references_of_two_tasks_are_refused() -> None:
    with pytest.raises(UserError, match=r"item 1: reference: 'acceptable': expected one of neg"):
        score([("positive", "positive"), ("acceptable", "acceptable")])
    with pytest.raises(UserError, match="no items"):
        score([])


@pytest.mark.parametrize(("task", "n"), [("mrpc", 408), ("rte", 277), ("sst2", 872)])
def test_gold_targets_score_full(shared_data: Path, task: str, n: int) -> None:
    from tlora.tasks import glue as source

    records = source.load(source.Data(task=task), "test", shared_data / "data")
    content = glue.score([{**record, "completion": record["response"]} for record in records])
    assert (content["n"], content["value"], content["unextracted"]) == (n, 1.0, 0)
    content = glue.score([{**record, "completion": record["instruction"]} for record in records])
    assert (content["value"], content["unextracted"]) == (0.0, n)


@pytest.mark.parametrize("benchmark", ["mrpc", "cola", "rte", "sst2", "qnli"])
def test_command_scores_a_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark: str
) -> None:
    from tlora.tasks.glue import TASKS

    words = TASKS[benchmark][2]
    rows = [
        {"id": "a", "completion": f" {words[1]}", "reference": words[1]},
        {"id": "b", "completion": words[0], "reference": words[1]},
        {"id": "c", "completion": "?", "reference": words[0]},
    ]
    path, out = tmp_path / "generations.jsonl", tmp_path / "score.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(root)
    assert cli.main(["score", benchmark, str(path), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert (content["value"], content["unextracted"]) == (1 / 3, 1)
