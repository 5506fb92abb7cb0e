"""MT-Bench: its files, what the judge is asked, how ratings are read, and a judge that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from judge_server import KEY, Answer, JudgeServer

from tlora.benchmarks import Context, judge, load, mt_bench
from tlora.errors import UserError
from tlora.tasks import mt_bench as task

MODELS = {"claude-3-5-sonnet-20240620": 9.206, "claude-3-opus-20240229": 8.675}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prompt(name: str, template: str) -> dict[str, str]:
    return {"name": name, "system_prompt": f"You are {name}.", "prompt_template": template}


QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write {a} poem.", "Now in prose."]},
    {"question_id": 2, "category": "math", "turns": ["1 + 1?", "Times 3?"], "reference": ["2"]},
    {"question_id": 3, "category": "stem", "turns": ["Why is the sky blue?", "And grass?"]},
]
REFERENCES = [{"question_id": 2, "choices": [{"index": 0, "turns": ["It is 2.", "It is 6."]}]}]
PROMPTS = [
    prompt("single-v1", "Q: {question}\nA: {answer}"),
    prompt("single-math-v1", "Q: {question}\nR: {ref_answer_1}\nA: {answer}"),
    prompt("single-v1-multi-turn", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
    prompt(
        "single-math-v1-multi-turn",
        "{ref_answer_1}|{ref_answer_2}||{question_1}|{answer_1}|{question_2}|{answer_2}",
    ),
]


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Three made-up questions in the format of FastChat's files."""
    root = tmp_path / "data_root"
    for rows, key in ((QUESTIONS, "questions"), (REFERENCES, "references"), (PROMPTS, "prompts")):
        write_lines(root / task.FILES[key], rows)
    return root


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TLORA_JUDGE", "OPENAI_")):
            monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JudgeServer]]:
    """Start a judge that scorers of this process ask."""
    started: list[JudgeServer] = []

    def start(*script: Any) -> JudgeServer:
        server = JudgeServer(*script)
        started.append(server.__enter__())
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        return server

    yield start
    for server in started:
        server.__exit__()


def rows(records: list[dict[str, Any]], say: Callable[[str, int], str]) -> list[dict[str, Any]]:
    """Return the lines of generations.jsonl for these questions."""
    return [
        {
            "id": f"{record['id']}/{turn}",
            "turn": turn,
            "prompt": "...",
            "completion": say(record["id"], turn),
            "finish_reason": "eos",
            "reference": record["reference"],
        }
        for record in records
        for turn in (1, 2)
    ]


def answers(data_root: Path) -> list[dict[str, Any]]:
    records = task.load(task.Data(), "test", data_root)
    return rows(records, lambda question, turn: f"answer {turn} to {question} {{x}}")


def many(data_root: Path, count: int) -> list[dict[str, Any]]:
    """Return as many questions."""
    records = task.load(task.Data(), "test", data_root) * (count // 3)
    return [{**record, "id": str(number)} for number, record in enumerate(records)]


def score(records: list[dict[str, Any]], kept: Path, workers: int = 1, **options: Any) -> dict:
    context = Context(place={"judgments": str(kept), "workers": workers})
    return load("mt_bench").score(records, options, context)


# The files


def test_records_hold_turns_temperature_and_all_that_judging_needs(data_root: Path) -> None:
    writing, math, stem = task.load(task.Data(), "test", data_root)
    assert [record["id"] for record in (writing, math, stem)] == ["1", "2", "3"]
    assert writing["turns"] == ["Write {a} poem.", "Now in prose."]
    assert writing["instruction"] == "Write {a} poem."
    assert (writing["temperature"], stem["temperature"]) == (0.7, 0.1)
    assert "temperature" not in math
    assert writing["reference"]["answers"] is None
    assert math["reference"]["answers"] == ["It is 2.", "It is 6."]
    names = [prompt["name"] for prompt in math["reference"]["prompts"]]
    assert names == ["single-math-v1", "single-math-v1-multi-turn"]
    assert writing["reference"]["prompts"] == [PROMPTS[0], PROMPTS[2]]
    assert task.sources(task.Data(), "test", data_root) == {
        name: data_root / name for name in task.FILES.values()
    }
    assert task.hub(task.Data(), "test") == []


def test_without_a_data_root_the_folder_data_is_read(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_root.rename(data_root.parent / "data")
    monkeypatch.chdir(data_root.parent)
    assert len(task.load(task.Data(), "test", None)) == 3
    (Path("data") / task.FILES["prompts"]).unlink()
    with pytest.raises(UserError, match=r"^data/mtbench/judge_prompts.jsonl: no such file: expect"):
        task.sources(task.Data(), "test", None)


@pytest.mark.parametrize(
    ("key", "changed", "message"),
    [
        ("questions", [{**QUESTIONS[0], "turns": ["one"]}], r"jsonl:1: turns: \['one'\]: expected"),
        ("questions", [QUESTIONS[0], {**QUESTIONS[1], "question_id": None}], ":2: question_id"),
        ("questions", [{**QUESTIONS[0], "category": 3}], ":1: category: 3: expected text"),
        ("questions", [], "question.jsonl: no lines"),
        ("references", [{**REFERENCES[0], "question_id": 7}], ":2: question_id: 2: no reference"),
        ("references", [{**REFERENCES[0], "choices": []}], ":1: choices: "),
        ("prompts", PROMPTS[1:], "name: 'single-v1': missing"),
        ("prompts", [{**PROMPTS[0], "system_prompt": None}], ":1: system_prompt: None"),
    ],
)
def test_bad_files_are_named_with_their_line(
    data_root: Path, key: str, changed: list[dict[str, Any]], message: str
) -> None:
    write_lines(data_root / task.FILES[key], changed)
    with pytest.raises(UserError, match=message) as caught:
        task.load(task.Data(), "test", data_root)
    assert str(data_root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_json_and_other_splits_are_refused(data_root: Path) -> None:
    path = data_root / task.FILES["questions"]
    path.write_text(path.read_text() + '{"question_id": 4', encoding="utf-8")
    with pytest.raises(UserError, match=":4: not valid JSON"):
        task.load(task.Data(), "test", data_root)
    with pytest.raises(UserError, match="split 'train': expected 'test'"):
        task.load(task.Data(), "train", data_root)


def test_the_real_questions(shared_data: Path) -> None:
    records = task.load(task.Data(), "test", shared_data / "data")
    categories = [record["reference"]["category"] for record in records]
    assert len(records) == 80
    assert {name: categories.count(name) for name in categories} == dict.fromkeys(categories, 10)
    referenced = {r["reference"]["category"] for r in records if r["reference"]["answers"]}
    assert referenced == {"math", "reasoning", "coding"}
    temperatures = {r["reference"]["category"]: r.get("temperature", 0) for r in records}
    assert temperatures == {
        **dict.fromkeys(["writing", "roleplay"], 0.7),
        **dict.fromkeys(["stem", "humanities"], 0.1),
        **dict.fromkeys(["extraction", "math", "coding", "reasoning"], 0),
    }


# Judgments of others


def graded(shared_data: Path, model: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return a model's answers as generations, and GPT-4's judgments by item."""
    folder = shared_data / "data" / "graded" / "mtbench"
    lines = (folder / f"answer_{model}.jsonl").read_text(encoding="utf-8").splitlines()
    said = {str(row["question_id"]): row["choices"][0]["turns"] for row in map(json.loads, lines)}
    lines = (folder / "gpt-4_single.jsonl").read_text(encoding="utf-8").splitlines()
    judged = {
        f"{row['question_id']}/{row['turn']}": row
        for row in map(json.loads, lines)
        if row["model"] == model
    }
    records = task.load(task.Data(), "test", shared_data / "data")
    return rows(records, lambda question, turn: said[question][turn - 1]), judged


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_those_of_others(shared_data: Path, model: str) -> None:
    records, judged = graded(shared_data, model)
    asked = mt_bench.questions(records)
    assert len(asked) == 160
    for record, question in zip(records, asked, strict=True):
        other = judged[record["id"]]
        assert question.user == other["user_prompt"]
        assert other["judge"][1] == record["reference"]["prompts"][record["turn"] - 1]["name"]


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_others(
    shared_data: Path, model: str, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    records, judged = graded(shared_data, model)
    replayed = {row["user_prompt"]: row["judgment"] for row in judged.values()}
    server = served(lambda asked, before: Answer(replayed[asked]))
    content = score(records, tmp_path, workers=4)
    assert round(content["value"] + 1e-9, 3) == MODELS[model]
    assert (content["metric"], content["n"], content["unextracted"]) == ("score", 160, 0)
    assert {i["id"]: i["value"] for i in content["items"]} == {
        name: row["score"] for name, row in judged.items()
    }
    assert len(server.requests) == 160
    assert content["judge"] == {"model": "gpt-4-0613", "answered_as": [server.model]}
    halves = content["metrics"]["turn_1"], content["metrics"]["turn_2"]
    assert sum(halves) / 2 == pytest.approx(content["value"])
    assert len(content["metrics"]) == 1 + 2 + 8


# What is asked, and what is read


def test_the_judge_is_asked_as_fastchat_asks(
    data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    server = served()
    score(answers(data_root), tmp_path / "kept", judge="some-judge")
    assert set(server.paths) == {"/v1/chat/completions"}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert server.requests[0] == {
        "model": "some-judge",
        "messages": [
            {"role": "system", "content": "You are single-v1."},
            {"role": "user", "content": "Q: Write {a} poem.\nA: answer 1 to 1 {x}"},
        ],
        "temperature": 0,
        "max_tokens": 2048,
    }
    asked = [request["messages"][1]["content"] for request in server.requests]
    assert asked[3] == ("It is 2.|It is 6.||1 + 1?|answer 1 to 2 {x}|Times 3?|answer 2 to 2 {x}")


def test_the_endpoint_may_know_the_judge_by_another_name(
    data_root: Path,
    tmp_path: Path,
    served: Callable[..., JudgeServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = served()
    content = score(answers(data_root), tmp_path / "kept")
    monkeypatch.setenv("TLORA_JUDGE_MODEL", "deployment-7")
    assert score(answers(data_root), tmp_path / "kept") == content
    assert score(answers(data_root), tmp_path / "anew") == content
    assert [request["model"] for request in server.requests[5:7]] == ["gpt-4-0613", "deployment-7"]


@pytest.mark.parametrize(
    ("judgment", "expected"),
    [
        ("Good. Rating: [[8]]", 8),
        ("Rating: [[8.5]]", 8.5),
        ("Rating: [[9.]]", 9),
        ("[[3]] then [[7]]", 3),
        ("list[0] is fine. Rating: [[7]]", 7),
        ("Rating: [6]", 6),
        ("Rating: [[rating]]", None),
        ("Rating: 8/10", None),
        ("Rating: [[0]]", None),
        ("Rating: [[10]]", 10),
        ("Rating: [[10.5]]", None),
        (f"Rating: [[{'9' * 500}]]", None),
        ("Rating: [[-3]]", None),
        ("", None),
    ],
)
def test_rating_is_read(judgment: str, expected: float | None) -> None:
    assert mt_bench.rating(judgment) == expected


def test_missing_ratings_are_counted_and_shown(
    data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    said = iter(["[[2]]", "no idea", "[[4]]", "", "[[9]]", "[[11]]"])
    served(lambda asked, before: Answer(next(said)))
    content = score(answers(data_root), tmp_path)
    assert (content["n"], content["unextracted"], content["value"]) == (6, 3, 5.0)
    assert content["metrics"] == {
        "score": 5.0,
        "turn_1": 5.0,
        "math": 4.0,
        "stem": 9.0,
        "writing": 2.0,
    }
    assert [item["value"] for item in content["items"]] == [2, None, 4, None, 9, None]
    assert content["items"][1] == {
        "id": "1/2",
        "correct": None,
        "extracted": None,
        "value": None,
        "turn": 2,
        "category": "writing",
        "prompt": "single-v1-multi-turn",
        "judgment": "no idea",
    }
    json.dumps(content, allow_nan=False)


def test_a_judge_without_any_rating_is_refused(
    data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    served(lambda asked, before: Answer("I cannot say."))
    with pytest.raises(UserError, match=r"^no rating in 6 judgments: expected"):
        score(answers(data_root), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turn": 3}, r"item '2/1': turn: 3: expected 1 or 2"),
        ({"turn": None}, r"item '2/1': turn: None"),
        ({"id": "2"}, r"item '2': turn: 1: expected .* an id that ends with it"),
        ({"reference": "4"}, r"item '2/1': reference: 4: expected the category"),
        ({"reference": {"category": "math"}}, r"item '2/1': reference: .*category"),
        ({"id": "4/1"}, r"item '2/2': turn: expected an answer to turn 1 as well|item '4/1'"),
    ],
)
def test_other_generations_are_refused_before_the_judge_is_asked(
    data_root: Path,
    tmp_path: Path,
    served: Callable[..., JudgeServer],
    change: dict[str, Any],
    message: str,
) -> None:
    server = served()
    records = answers(data_root)
    records[2] |= change
    with pytest.raises(UserError, match=message):
        score(records, tmp_path)
    assert server.requests == []


# A judge that fails


def failing(*first: Answer) -> Callable[[str, int], Answer]:
    """Fail the first times that a question is asked, then rate it by its length."""

    def script(asked: str, before: int) -> Answer:
        return first[before] if before < len(first) else Answer(f"[[{len(asked) % 10 + 1}]]")

    return script


@pytest.mark.parametrize(
    "first",
    [
        [Answer(status=429), Answer(status=429)],
        [Answer(status=500), Answer(status=503)],
        [Answer(drop=True)],
        [Answer(delay=4.0)],
    ],
    ids=["429", "5xx", "dropped", "timeout"],
)
def test_failures_that_pass_change_nothing(
    data_root: Path,
    tmp_path: Path,
    served: Callable[..., JudgeServer],
    monkeypatch: pytest.MonkeyPatch,
    first: list[Answer],
) -> None:
    served(failing())
    expected = score(answers(data_root), tmp_path / "one")
    if first[0].delay:
        monkeypatch.setattr(judge, "TIMEOUT", 2.0)
    server = served(failing(*first))
    assert score(answers(data_root), tmp_path / "two", workers=6) == expected
    assert len(server.requests) == 6 * (1 + len(first))


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        (Answer("overloaded", status=503), "Error code: 503 .*overloaded", 3),
        (Answer(drop=True), "no connection, tried 3 times", 3),
        (Answer(delay=3.0), r"no answer in 1\.5 s, asked 3 times", 3),
        (Answer(f"wrong key {KEY}", status=401), "401: the key was not accepted", 1),
        (Answer(f"no such model for {KEY}", status=404), r"Error code: 404 .*for \*\*\*", 1),
        (Answer("Unsupported parameter", status=400), "Error code: 400 .*Unsupported", 1),
        (Answer(body="<html>hello</html>"), "answered with no chat completion", 1),
        (Answer(body='{"hello": 1}'), "answered with no chat completion", 1),
        (Answer(body='{"choices": []}'), "answered with no chat completion", 1),
    ],
)
def test_a_dead_endpoint_is_one_line_and_keeps_what_was_judged(
    data_root: Path,
    tmp_path: Path,
    served: Callable[..., JudgeServer],
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    message: str,
    requests: int,
) -> None:
    monkeypatch.setattr(judge, "RETRIES", 2)
    monkeypatch.setattr(judge, "TIMEOUT", 1.5 if answer.delay else 60.0)
    good = failing()
    records = answers(data_root)
    server = served(lambda asked, before: answer if len(server.requests) > 3 else good(asked, 0))
    with pytest.raises(UserError, match=message) as caught:
        score(records, tmp_path / "kept")
    line = str(caught.value)
    assert "\n" not in line and KEY not in line
    assert "; 3 of 6 judgments were made and are kept in" in line
    assert re.match(r"judge at 127\.0\.0\.1:\d+: ", line)
    assert len(server.requests) == 3 + requests
    healthy = served(good)
    content = score(records, tmp_path / "kept")
    assert len(healthy.requests) == 3
    served(good)
    assert score(records, tmp_path / "anew") == content


def test_what_the_endpoint_will_not_judge_is_missing(
    data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    refusal = Answer("filtered", status=400, code="content_filter")
    server = served(lambda asked, before: refusal if "sky" in asked else Answer("[[6]]"))
    content = score(answers(data_root), tmp_path)
    assert (content["value"], content["unextracted"]) == (6, 2)
    assert score(answers(data_root), tmp_path) == content
    assert len(server.requests) == 6


# Paying once


def test_a_rerun_pays_nothing_and_needs_no_key(
    data_root: Path,
    tmp_path: Path,
    served: Callable[..., JudgeServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = served(failing())
    content = score(answers(data_root), tmp_path)
    monkeypatch.delenv("TLORA_JUDGE_API_KEY")
    monkeypatch.delenv("TLORA_JUDGE_BASE_URL")
    assert score(answers(data_root), tmp_path) == content
    assert len(server.requests) == 6


def test_only_what_changed_is_asked_again(
    data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    server = served(failing())
    records = answers(data_root)
    score(records, tmp_path)
    score([*records[:5], {**records[5], "completion": "another"}], tmp_path)
    assert len(server.requests) == 7
    score(records, tmp_path, judge="another-judge")
    assert len(server.requests) == 13
    (broken, *_) = sorted(tmp_path.rglob("*.json"))
    broken.write_text('{"request": ', encoding="utf-8")
    score(records, tmp_path)
    score(records, tmp_path, judge="another-judge")
    score([*records[:5], {**records[5], "completion": "another"}], tmp_path)
    assert len(server.requests) == 14


def test_equal_questions_are_asked_once(
    data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    server = served()
    records = answers(data_root)
    twins = [{**r, "id": r["id"].replace("1/", "9/")} for r in records[:2]]
    assert score(records + twins, tmp_path, workers=4)["n"] == 8
    assert len(server.requests) == 6


def test_requests_run_side_by_side_but_no_more_than_asked_for(
    data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    records = many(data_root, 12)
    lines = rows(records, lambda question, turn: f"{question}: {turn}")
    slow = served(lambda asked, before: Answer(delay=0.05))
    one = score(lines, tmp_path / "one", workers=1)
    assert (slow.most, len(slow.requests)) == (1, 24)
    slow = served(lambda asked, before: Answer(delay=0.05))
    assert score(lines, tmp_path / "three", workers=3) == one
    assert (slow.most, len(slow.requests)) == (3, 24)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "^TLORA_JUDGE_BASE_URL: not set: expected the URL .* serves the judge gpt-4-0613"),
        ({"OPENAI_API_KEY": "k"}, "^TLORA_JUDGE_BASE_URL: not set"),
        ({"OPENAI_BASE_URL": "http://a/v1"}, "^OPENAI_API_KEY: not set"),
        (
            {"TLORA_JUDGE_BASE_URL": "http://a/v1", "OPENAI_API_KEY": "of another"},
            "^TLORA_JUDGE_API_KEY: not set",
        ),
        (
            {"TLORA_JUDGE_BASE_URL": "api.openai.com", "TLORA_JUDGE_API_KEY": "k"},
            "^TLORA_JUDGE_BASE_URL: expected a URL such as",
        ),
        ({"TLORA_JUDGE_PRICE_INPUT": "cheap"}, "^TLORA_JUDGE_PRICE_INPUT: 'cheap': expected"),
        ({"TLORA_JUDGE_PRICE_OUTPUT": "nan"}, "^TLORA_JUDGE_PRICE_OUTPUT: 'nan': expected"),
    ],
)
def test_what_is_lacking_is_said_before_any_work(
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        score(answers(data_root), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_cost_is_printed_before_and_after(
    data_root: Path,
    tmp_path: Path,
    served: Callable[..., JudgeServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = served()
    records = answers(data_root)
    score(records, tmp_path)
    before, after = capsys.readouterr().err.splitlines()
    characters = sum(len(m["content"]) for r in server.requests for m in r["messages"])
    read = int(re.search(r"about (\d+) tokens to read and 1,200 to write", before)[1])
    assert read == pytest.approx(characters / 4, abs=6)
    assert "6 judgments, 0 known, 6 to ask" in before
    assert "the price is not known (TLORA_JUDGE_PRICE_INPUT" in before
    assert after == "judge gpt-4-0613: 6 asked: 600 tokens read and 60 written"

    monkeypatch.setenv("TLORA_JUDGE_PRICE_INPUT", "30000")
    monkeypatch.setenv("TLORA_JUDGE_PRICE_OUTPUT", "60000")
    score([*records[:5], {**records[5], "completion": "another"}], tmp_path)
    before, after = capsys.readouterr().err.splitlines()
    assert "6 judgments, 5 known, 1 to ask" in before
    assert re.search(r"200 to write \(at most 2,048\): about 12\.\d\d, at most 123\.\d\d$", before)
    assert after.endswith("1 asked: 100 tokens read and 10 written: 3.60")
    score(records, tmp_path)
    assert capsys.readouterr().err == "judge gpt-4-0613: 6 judgments, 6 known: nothing to ask\n"


# The stages and the command


@pytest.mark.slow
def test_the_embedded_model_answers_both_turns_and_is_judged(
    root: Path, data_root: Path, tmp_path: Path, served: Callable[..., JudgeServer]
) -> None:
    from tlora.stages.generate import generate
    from tlora.stages.score import score as score_stage

    config = yaml.safe_load((root / "config/benchmarks/mt_bench.yaml").read_text())
    benchmark = {
        **{key: config[key] for key in ("source", "turn_prompt", "stop")},
        **{"data": {}, "max_new_tokens": 12, "num_beams": 1, "limit": None},
    }
    spec = {
        "model": {"dtype": "float32", "architecture": "causal"},
        "export": None,
        "prompt": "### Instruction:\n{instruction}\n\n### Response:",
        "benchmark": benchmark,
        "files": {},
    }
    place = {
        "model": str(root / "workflow/resources/tiny"),
        "data_root": str(data_root),
        "work": str(tmp_path / "work"),
        "stamp": "0",
        "judgments": str(tmp_path / "kept"),
    }
    generate(spec, {}, tmp_path, place)
    lines = (tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == ["1/1", "1/2", "2/1", "2/2", "3/1", "3/2"]
    assert records[1]["prompt"].endswith("### Instruction:\nNow in prose.\n\n### Response:")
    server = served(lambda asked, before: Answer(f"[[{len(server.requests) + 1}]]"))
    spec = {"implementation": "mt_bench", "options": {"judge": "some-judge"}}
    score_stage(spec, {"generate": tmp_path / "generations.jsonl"}, tmp_path, place)
    content = json.loads((tmp_path / "score.json").read_text())
    assert content["value"] == 4.5
    asked = [request["messages"][1]["content"] for request in server.requests]
    first, second = QUESTIONS[0]["turns"]
    said = [record["completion"] for record in records]
    assert asked[1] == f"{first}|{said[0]}|{second}|{said[1]}"


def start(folder: Path, server: JudgeServer) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tlora.cli", "score", "mt_bench", "generations.jsonl"),
            *("--out", "score.json", "--log", "score.log", "--place", '{"workers": 2}'),
        ],
        cwd=folder,
        env={**os.environ, **server.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_command_goes_on_and_pays_nothing_twice(data_root: Path, tmp_path: Path) -> None:
    folders = tmp_path / "whole", tmp_path / "killed"
    records = many(data_root, 24)
    for folder in folders:
        lines = rows(records, lambda question, turn: f"{question}: {turn}")
        write_lines(folder / "generations.jsonl", lines)

    def script(asked: str, before: int) -> Answer:
        return Answer(f"[[{len(asked) % 10 + 1}]]", delay=0.05)

    with JudgeServer(script) as server:
        done = start(folders[0], server)
        out, err = done.communicate()
        assert done.returncode == 0, err
        assert "n = 48" in out and "48 judgments, 0 known, 48 to ask" in err
    with JudgeServer(script) as server:
        killed = start(folders[1], server)
        kept = folders[1] / "results" / ".judgments"
        while len(list(kept.rglob("*/*.json"))) < 8:
            assert killed.poll() is None
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert not (folders[1] / "score.json").exists()
        known = {
            json.loads(path.read_text())["request"]["messages"][1]["content"]
            for path in kept.rglob("*/*.json")
        }
        assert 8 <= len(known) < 48
        before = len(server.requests)
        again = start(folders[1], server)
        assert again.wait() == 0
        asked = [request["messages"][1]["content"] for request in server.requests[before:]]
        assert len(asked) == 48 - len(known) and not known & set(asked)
        # What was on its way when the process died, and no more, is asked a second time.
        assert len(server.requests) <= 48 + 2
    scores = [(folder / "score.json").read_bytes() for folder in folders]
    assert scores[0] == scores[1]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_importing_the_scorer_loads_no_client(root: Path) -> None:
    script = (
        "import sys, tlora.benchmarks.mt_bench, tlora.tasks.mt_bench\n"
        "assert not {'openai', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_the_benchmark_is_that_of_the_paper(root: Path) -> None:
    benchmark = yaml.safe_load((root / "config/benchmarks/mt_bench.yaml").read_text())
    assert (benchmark["source"], benchmark["implementation"]) == ("mt_bench", "mt_bench")
    assert mt_bench.Options(**benchmark["options"]) == mt_bench.Options("gpt-4-0613")
    assert benchmark["max_new_tokens"] == 1024
    assert "{instruction}" in benchmark["turn_prompt"]
    with pytest.raises(UserError, match="options: judge: expected the name of a model"):
        load("mt_bench").score([], {"judge": ""})
