"""Records of every task source, prompts and tokens."""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from record_files import write

from tlora import benchmarks
from tlora.benchmarks import choice as choice_scorer
from tlora.benchmarks import gsm8k as gsm8k_scorer
from tlora.config import Library
from tlora.errors import UserError
from tlora.tasks import (
    arithmetic,
    choice,
    code_feedback,
    commonsense,
    evol_instruct,
    generated,
    glue,
    gsm8k,
    hendrycks_math,
    loading,
    metamath,
    mixture,
    prompts,
)

EMBEDDED = (arithmetic, choice)
FIELDS = {"id", "instruction", "response", "reference"}
ROWS = [{"question": f"q{i}", "answer": f"It is {i}.\n#### {i}"} for i in range(10)]


# GSM8K


def test_gsm8k_target() -> None:
    answer = "He pays 2*1000=$<<2*1000=2000>>2,000.\nSo 2,000.\n#### 2,000"
    record = gsm8k.record("train-0", "How much?", answer, "t")
    assert record["response"] == "He pays 2*1000=$2,000.\nSo 2,000.\nThe answer is: 2000"
    assert record["reference"] == answer
    assert gsm8k.record("a", "q", "#### -3", "t")["response"] == "The answer is: -3"


@pytest.mark.parametrize("answer", ["no mark", "text ####", "#### "])
def test_gsm8k_answer_without_number(tmp_path: Path, answer: str) -> None:
    write(tmp_path / "gsm8k" / "test.jsonl", [ROWS[0], {"question": "q", "answer": answer}])
    with pytest.raises(UserError, match="row 2: answer: expected"):
        gsm8k.load(gsm8k.Data(), "test", tmp_path)


def test_real_gsm8k(shared_data: Path) -> None:
    root = shared_data / "data"
    for split, count in (("train", 7473), ("test", 1319)):
        records = gsm8k.load(gsm8k.Data(), split, root)
        assert len(records) == len({record["id"] for record in records}) == count
        assert not any("<<" in r["response"] or "####" in r["response"] for r in records)
        # The gold targets are right by both rules.
        score = gsm8k_scorer.score([{**r, "completion": r["response"]} for r in records])
        assert score["value"] == score["metrics"]["strict_accuracy"] == 1.0
        assert score["unextracted"] == 0


# instruction sets for training


INSTRUCTIONS = {
    metamath: ("metamath", "MetaMathQA-395K.json", "original_question"),
    code_feedback: ("code_feedback", "CodeFeedback-Filtered-Instruction.jsonl", None),
    evol_instruct: ("evol_instruct", "WizardLM_evol_instruct_V2_143k.json", None),
}


def instruction_rows(task, count: int = 60) -> list[dict]:
    """Return made-up rows in the schema that the hub has."""
    asked, answered = [f"Ask {i}?" for i in range(count)], [f"Said {i}." for i in range(count)]
    if task is metamath:
        return [
            {"query": q, "response": a, "original_question": f"o{i // 3}", "type": "GSM_SV"}
            for i, (q, a) in enumerate(zip(asked, answered, strict=True))
        ]
    if task is code_feedback:
        pairs = zip(asked, answered, strict=True)
        return [{"query": q, "answer": a, "lang": "python"} for q, a in pairs]
    return [
        {"idx": q, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in zip(asked, answered, strict=True)
    ]


@pytest.mark.parametrize("task", INSTRUCTIONS)
def test_instruction_sets(task, tmp_path: Path) -> None:
    folder, published, group = INSTRUCTIONS[task]
    path = write(tmp_path / folder / published, instruction_rows(task))
    assert task.sources(task.Data(), "train", tmp_path) == {published: path}
    everything = task.load(task.Data(), "train", tmp_path)
    assert everything[7] == {
        "id": "train-7",
        "instruction": "Ask 7?",
        "response": "Said 7.",
        "reference": "Said 7.",
    }
    assert len({record["id"] for record in everything}) == len(everything) == 60
    assert task.load(task.Data(samples=20), "train", tmp_path) == everything[:20]
    assert task.load(task.Data(), "validation", tmp_path) == []
    drawn = task.Data(samples=20, subset_seed=3, validation=6)
    parts = {split: task.load(drawn, split, tmp_path) for split in ("train", "validation")}
    assert parts["train"] == task.load(drawn, "train", tmp_path)
    assert len(parts["train"]) + len(parts["validation"]) == 20
    assert all(record in everything for part in parts.values() for record in part)
    identifiers = {split: {int(r["id"][6:]) for r in part} for split, part in parts.items()}
    assert len(identifiers["train"] | identifiers["validation"]) == 20
    assert max(identifiers["train"]) > 20 and identifiers["validation"]
    if group:
        origins = [{i // 3 for i in part} for part in identifiers.values()]
        assert not origins[0] & origins[1]
    write(tmp_path / folder / "train.parquet", instruction_rows(task, 5))
    assert task.load(task.Data(), "train", tmp_path) == everything[:5]


@pytest.mark.parametrize("task", INSTRUCTIONS)
def test_instruction_sets_refuse(task, tmp_path: Path) -> None:
    folder, published, _ = INSTRUCTIONS[task]
    for split in ("test", "dev"):
        with pytest.raises(UserError, match=f"split: '{split}': expected one of train, validation"):
            task.load(task.Data(), split, tmp_path)
    write(tmp_path / folder / published, instruction_rows(task))
    with pytest.raises(UserError, match="samples: 61: expected at most the 60 rows"):
        task.load(task.Data(samples=61), "train", tmp_path)
    for key, value in (("samples", 0), ("validation", -1), ("revision", "main")):
        with pytest.raises(ValueError, match=f"{key}: expected"):
            task.Data(**{key: value})
    with pytest.raises(UserError, match="pin the commit"):
        task.sources(task.Data(revision=None), "train", None)
    assert task.sources(task.Data(), "train", None) == {}
    [(repo, name, split, revision)] = task.hub(task.Data(), "validation")
    assert repo.count("/") == 1 and name is None and split == "train"
    assert re.fullmatch("[0-9a-f]{40}", revision)


def test_instructions_of_either_form(tmp_path: Path) -> None:
    rows = [{"instruction": "Ask?", "output": "Said.", "type": "conversation"}]
    write(tmp_path / "evol_instruct" / "train.json", rows)
    [record] = evol_instruct.load(evol_instruct.Data(), "train", tmp_path)
    assert (record["instruction"], record["response"]) == ("Ask?", "Said.")
    write(tmp_path / "evol_instruct" / "train.json", [{"text": "x"}])
    with pytest.raises(UserError, match="row 1: column 'instruction' is missing"):
        evol_instruct.load(evol_instruct.Data(), "train", tmp_path)


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [{"from": "human", "value": "Ask?"}],
        [{"from": "gpt", "value": "Said."}, {"from": "human", "value": "Ask?"}],
        [{"from": "human", "value": "Ask?"}, {"from": "gpt"}],
        ["Ask?", "Said."],
    ],
)
def test_conversations_begin_with_question_and_answer(tmp_path: Path, turns: list) -> None:
    good = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": good}, {"conversations": turns}]
    write(tmp_path / "evol_instruct" / "train.jsonl", rows)
    with pytest.raises(UserError, match=r"row 2: conversations: expected it to begin"):
        evol_instruct.load(evol_instruct.Data(), "train", tmp_path)


# MATH


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So $\boxed{2}$ then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{\text{a {b} c}}$ is it", r"\text{a {b} c}"),
        (r"$x = \fbox{7}$", "7"),
        (r"our answer is $\boxed 9$.", "9"),
        (r"$\boxed{}$", ""),
        (r"$\boxed{1$", None),
        ("nothing", None),
    ],
)
def test_boxed(solution: str, answer: str | None) -> None:
    assert hendrycks_math.boxed(solution) == answer


def test_hendrycks_math_record(tmp_path: Path) -> None:
    row = {
        "problem": "1+1?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"It is \boxed{2}.",
    }
    path = write(tmp_path / "math" / "test.jsonl", [row])
    data = hendrycks_math.Data()
    assert hendrycks_math.load(data, "test", tmp_path) == [
        {
            "id": "test-0",
            "instruction": "1+1?",
            "response": "It is \\boxed{2}.\nThe answer is: 2",
            "reference": {key: row[key] for key in ("solution", "level", "type")},
        }
    ]
    assert hendrycks_math.sources(data, "test", tmp_path) == {"test.jsonl": path}
    assert len(hendrycks_math.hub(data, "test")) == 7
    assert {split for _, _, split, _ in hendrycks_math.hub(data, "validation")} == {"train"}
    write(tmp_path / "math" / "train.jsonl", [{"problem": "p", "solution": "none"}] * 2)
    with pytest.raises(UserError, match=r"row 1: solution: expected its answer in .boxed"):
        hendrycks_math.load(data, "train", tmp_path)
    with pytest.raises(UserError, match="split: 'dev'"):
        hendrycks_math.load(data, "dev", tmp_path)


def test_real_math(shared_data: Path) -> None:
    root = shared_data / "data"
    for split, count in (("train", 7500), ("test", 5000)):
        records = hendrycks_math.load(hendrycks_math.Data(), split, root)
        assert len(records) == len({record["id"] for record in records}) == count
        assert {r["reference"]["level"] for r in records} >= {f"Level {i}" for i in range(1, 6)}
        assert len({record["reference"]["type"] for record in records}) == 7
    # The gold targets are right by the paper's rule, but for one answer that ends with a full
    # stop inside its box: the rule cuts that off the completion and not off the gold.
    golds = [{**r, "completion": r["response"]} for r in records]
    score = benchmarks.load("hendrycks_math").score(golds)
    assert [item["id"] for item in score["items"] if not item["correct"]] == ["test-2269"]
    assert score["unextracted"] == 0


# GLUE


def glue_rows(task: str, count: int = 20) -> list[dict]:
    """Return made-up rows in GLUE's schema."""
    texts = glue.TASKS[task][1]
    return [{**{t: f"{t} {i}" for t in texts}, "label": i % 2, "idx": i} for i in range(count)]


@pytest.mark.parametrize("task", glue.TASKS)
def test_glue_tests_on_its_validation_set(task: str, tmp_path: Path) -> None:
    name, texts, words = glue.TASKS[task]
    for split, count in (("train", 20), ("validation", 6)):
        write(tmp_path / "glue" / f"{name}_{split}.jsonl", glue_rows(task, count))
    data = glue.Data(task, validation=4)
    parts = {split: glue.load(data, split, tmp_path) for split in loading.SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 16,
        "validation": 4,
        "test": 6,
    }
    assert parts["test"][1] == {
        "id": "validation-1",
        "instruction": "\n".join(f"{text} 1" for text in texts),
        "response": words[1],
        "reference": words[1],
    }
    assert len({record["id"] for record in parts["train"] + parts["validation"]}) == 20
    assert list(glue.sources(data, "test", tmp_path)) == [f"{name}_validation.jsonl"]
    assert list(glue.sources(data, "validation", tmp_path)) == [f"{name}_train.jsonl"]
    assert glue.hub(data, "test")[0][:3] == ("nyu-mll/glue", task, "validation")
    golds = [{**record, "completion": record["response"]} for record in parts["train"]]
    assert benchmarks.load("glue").score(golds)["value"] == 1.0


def test_glue_labels_are_named_as_on_the_hub() -> None:
    """The `class_label` names in the data set's card, in order."""
    assert {task: words for task, (_, _, words) in glue.TASKS.items()} == {
        "mrpc": ("not_equivalent", "equivalent"),
        "cola": ("unacceptable", "acceptable"),
        "rte": ("entailment", "not_entailment"),
        "sst2": ("negative", "positive"),
        "qnli": ("entailment", "not_entailment"),
    }


def test_glue_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task: expected one of mrpc, cola"):
        glue.Data("sst-2")
    path = tmp_path / "glue" / "SST2_validation.jsonl"
    for label, message in ((-1, "label: -1: expected 0 or 1"), ("1", "expected a whole number")):
        write(path, [*glue_rows("sst2", 2), {"sentence": "s", "label": label}])
        with pytest.raises(UserError, match=rf"SST2_validation\.jsonl:( row )?3: .*{message}"):
            glue.load(glue.Data("sst2"), "test", tmp_path)


@pytest.mark.parametrize(("task", "count"), [("mrpc", 408), ("rte", 277), ("sst2", 872)])
def test_real_glue(shared_data: Path, task: str, count: int) -> None:
    records = glue.load(glue.Data(task), "test", shared_data / "data")
    assert len(records) == len({record["id"] for record in records}) == count
    assert {record["reference"] for record in records} == set(glue.TASKS[task][2])
    golds = [{**record, "completion": record["response"]} for record in records]
    assert benchmarks.load("glue").score(golds)["value"] == 1.0


# commonsense

ASKED = "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b"


def commonsense_row(i: int = 0, **other: str) -> dict[str, str]:
    """Return a made-up row in the schema of LLM-Adapters."""
    return {
        "instruction": f"{ASKED} {i}\n\nAnswer format: answer1/answer2",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
        **other,
    }


def test_commonsense_records(tmp_path: Path) -> None:
    data = commonsense.Data(test="ARC-Easy", validation=2)
    folder = tmp_path / "commonsense"
    path = write(folder / "ARC-Easy" / "test.json", [commonsense_row()])
    write(folder / "commonsense_170k.json", [commonsense_row(i) for i in range(10)])
    assert commonsense.load(data, "test", tmp_path) == [
        {
            "id": "ARC-Easy-0",
            "instruction": commonsense_row()["instruction"],
            "response": "the correct answer is answer2",
            "reference": "answer2",
            "question": "Why?\n\nAnswer1: a Answer2: b 0",
        }
    ]
    assert commonsense.sources(data, "test", tmp_path) == {"ARC-Easy/test.json": path}
    sizes = [len(commonsense.load(data, split, tmp_path)) for split in ("train", "validation")]
    assert sizes == [8, 2]
    write(folder / "ARC-Easy" / "test.json", [commonsense_row(), commonsense_row(input="more")])
    with pytest.raises(UserError, match="row 2: input: 'more': expected no text"):
        commonsense.load(data, "test", tmp_path)


def test_commonsense_without_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in ./data, or for training a hub copy at a commit; what lacks is named."""
    monkeypatch.chdir(tmp_path)
    data = commonsense.Data(test="boolq")
    for split, folder in (("train", "ft-training_set"), ("test", "dataset")):
        with pytest.raises(UserError, match=rf"data/commonsense.*LLM-Adapters, below {folder}"):
            commonsense.sources(data, split, None)
    write(Path("data/commonsense/boolq/test.json"), [commonsense_row()])
    assert len(commonsense.load(data, "test", None)) == 1
    assert commonsense.hub(data, "train") == commonsense.hub(data, "test") == []
    pinned = commonsense.Data(revision="a" * 40)
    assert commonsense.sources(pinned, "train", None) == {}
    assert commonsense.hub(pinned, "train") == [
        ("zwhe99/commonsense_170k", None, "train", "a" * 40)
    ]
    with pytest.raises(UserError, match="test: None: expected one of boolq"):
        commonsense.sources(pinned, "test", None)
    with pytest.raises(ValueError, match="test: expected one of boolq"):
        commonsense.Data(test="siqa")


@pytest.mark.parametrize(
    ("instruction", "question"),
    [
        (
            "Please answer the following question with true or false, question: is it: so?"
            "\n\nAnswer format: true/false",
            "is it: so?",
        ),
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            "A _ b.\n\nOption1: x Option2: y Answer format: option1/option2",
            "A _ b.\n\nOption1: x Option2: y",
        ),
        ("Anything else", "Anything else"),
    ],
)
def test_commonsense_question(instruction: str, question: str) -> None:
    assert commonsense.question(instruction) == question


@pytest.mark.parametrize(
    ("test", "count"),
    [
        ("boolq", 3270),
        ("piqa", 1838),
        ("social_i_qa", 1954),
        ("winogrande", 1267),
        ("ARC-Easy", 2376),
        ("ARC-Challenge", 1172),
        ("openbookqa", 500),
    ],
)
def test_real_commonsense(shared_data: Path, test: str, count: int) -> None:
    records = commonsense.load(commonsense.Data(test=test), "test", shared_data / "data")
    assert len(records) == len({record["id"] for record in records}) == count
    assert not any(record["question"].startswith("Please ") for record in records)
    score = choice_scorer.score([{**r, "completion": r["response"]} for r in records])
    assert score["value"] == 1.0 and score["unextracted"] == 0


# embedded tasks


@pytest.mark.parametrize("task", EMBEDDED)
def test_embedded_splits_are_disjoint(task) -> None:
    data = task.Data()
    texts = {}
    for split, size in (("train", data.train), ("validation", data.validation), ("test", 500)):
        records = task.load(data, split, None)
        assert len(records) == size
        assert all(set(record) == FIELDS for record in records)
        assert len({record["id"] for record in records}) == size
        texts[split] = {record["instruction"] for record in records}
        assert len(texts[split]) == size
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert task.sources(data, "train", None) == {}


def essence(task, instruction: str) -> object:
    """Return what two splits must not share: the numbers in their story, or question + options."""
    if task is arithmetic:
        story = re.sub(
            "|".join(arithmetic.NAMES + arithmetic.THINGS + arithmetic.DAYS), "_", instruction
        )
        return story
    asked, listed, _ = instruction.split("\n\n")
    return asked, frozenset(re.findall(r"Answer\d: (\S+)", listed))


@pytest.mark.parametrize("task", EMBEDDED)
def test_no_test_problem_is_a_training_problem_in_other_words(task) -> None:
    train, validation, test = (
        {essence(task, record["instruction"]) for record in task.load(task.Data(), split, None)}
        for split in ("train", "validation", "test")
    )
    assert len(test) == task.Data().test and len(train) == task.Data().train
    assert not train & test and not train & validation and not validation & test


@pytest.mark.parametrize("task", EMBEDDED)
def test_embedded_tasks_follow_the_seed(task) -> None:
    first = task.load(task.Data(), "test", None)
    assert first == task.load(task.Data(train=7, validation=0), "test", None)
    assert first[:5] == task.load(task.Data(test=5), "test", None)
    assert first != task.load(task.Data(seed=1), "test", None)
    longer = task.load(task.Data(train=1600), "train", None)
    assert longer[: task.Data().train] == task.load(task.Data(), "train", None)


@pytest.mark.parametrize("task", EMBEDDED)
@pytest.mark.parametrize("size", [{"train": 0}, {"test": 0}, {"validation": -1}])
def test_embedded_sizes_are_checked(task, size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(size))}: expected"):
        task.Data(**size)


def test_too_few_distinct_records() -> None:
    with pytest.raises(ValueError, match="train: 7: expected fewer"):
        generated.splits(lambda rng: (rng.randint(0, 9), {}), 0, {"test": 5, "train": 7})


def test_arithmetic_answers_are_right() -> None:
    for record in arithmetic.load(arithmetic.Data(), "test", None):
        steps = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", record["reference"])
        assert len(steps) == 2
        for left, sign, right, result, shown in steps:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b}[sign] == int(result) == int(shown) > 0
        assert record["reference"].endswith(f"#### {steps[-1][3]}")
        assert record["response"].endswith(f"The answer is: {steps[-1][3]}")
        for number in re.findall(r"\d+", record["instruction"]):
            assert int(number) < 100


def test_choice_answers_are_right() -> None:
    for record in choice.load(choice.Data(), "test", None):
        asked, listed, form = record["instruction"].split("\n\n")
        options = re.findall(r"Answer\d: (\S+)", listed)
        assert len(set(options)) == choice.OPTIONS
        right = options[int(record["reference"][-1]) - 1]
        assert form == "Answer format: answer1/answer2/answer3/answer4"
        assert record["response"] == f"the correct answer is {record['reference']}"
        if "largest" in asked or "smallest" in asked:
            assert int(right) == (max if "largest" in asked else min)(map(int, options))
        elif "+" in asked:
            assert int(right) == sum(map(int, re.findall(r"\d+", asked)))
        elif "opposite" in asked:
            word = asked.split()[-1][:-1]
            assert [o for o in options if {o, word} in map(set, choice.OPPOSITES)] == [right]
        else:
            category = asked.split()[-1][:-1]
            members = choice.members(category)
            assert [o for o in options if (o in members) != ("not" in asked)] == [right]


def test_choice_answers_are_balanced() -> None:
    references = [record["reference"] for record in choice.load(choice.Data(), "test", None)]
    assert all(references.count(f"answer{i}") > 90 for i in range(1, 5))


def test_words_belong_to_one_category() -> None:
    words = [word for category in choice.CATEGORIES for word in choice.members(category)]
    words += [word for pair in choice.OPPOSITES for word in pair]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(("task", "scorer"), [(arithmetic, gsm8k_scorer), (choice, choice_scorer)])
def test_gold_targets_score_one(task, scorer) -> None:
    records = task.load(task.Data(), "test", None)
    score = scorer.score([{**record, "completion": record["response"]} for record in records])
    assert score["value"] == 1.0 and score["unextracted"] == 0


def test_mixture_is_deterministic_and_shows_no_test_problem() -> None:
    documents = list(itertools.islice(mixture.documents(5), 3000))
    assert documents == list(itertools.islice(mixture.documents(5), 3000))
    assert documents != list(itertools.islice(mixture.documents(6), 3000))
    tests = {r["instruction"] for task in EMBEDDED for r in task.load(task.Data(), "test", None)}
    texts = ["".join(document) for document in documents]
    assert not any(test in text for text in texts for test in tests)


def test_mixture_gives_and_teaches_in_turn() -> None:
    for document in itertools.islice(mixture.documents(0), 500):
        assert len(document) >= 2 and len(document) % 2 == 0
        assert all(document[1::2])


# configuration


def module(source: str):
    """Return a source by name."""
    return importlib.import_module(f"tlora.tasks.{source}")


def shipped(root: Path, kind: str) -> dict[str, dict]:
    """Return the YAML files of a kind by name."""
    return {p.stem: yaml.safe_load(p.read_text()) for p in (root / "config" / kind).glob("*.yaml")}


@pytest.mark.parametrize("name", ["arithmetic", "choice", "gsm8k"])
def test_shipped_yaml_fits_the_sources(root: Path, name: str) -> None:
    task, benchmark = shipped(root, "tasks")[name], shipped(root, "benchmarks")[name]
    module = {"arithmetic": arithmetic, "choice": choice, "gsm8k": gsm8k}[name]
    assert task["source"] == benchmark["source"] == name
    module.Data(**task["data"])
    module.Data(**benchmark.get("data", {}))
    assert isinstance(task["learning_rate"], float)
    assert name in task["benchmarks"]
    if module in EMBEDDED:
        # What is tested must not be trained on: the same seed deals both splits.
        assert task["data"] == {**task["data"], **benchmark["data"]}
        assert benchmark["data"]["test"] >= 500


# Table "Setups" of the paper's appendix C: rank = alpha, rate, schedule, batch, epochs, benchmarks.
CHOICES = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"]
PAPER = {
    "commonsense": (32, 1e-4, "linear", 32, 1, CHOICES),
    "math": (128, 2e-5, "cosine", 128, 1, ["gsm8k", "math"]),
    "code": (128, 2e-5, "cosine", 128, 1, ["humaneval", "mbpp"]),
    "chat": (128, 2e-5, "cosine", 128, 1, ["mt_bench"]),
    **{task: (32, 3e-4, "cosine", 32, 3, [task]) for task in glue.TASKS},
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(root: Path, name: str) -> None:
    task = Library(root / "config").task(name)[0]
    shared = (task.schedule, task.batch_size, task.epochs, task.benchmarks)
    assert (task.rank, task.learning_rate, *shared) == PAPER[name]
    assert task.lora_alpha == task.rank and task.max_length == 512
    assert task.warmup_ratio == 0.03 and task.calibration_samples == 32
    targets = "q k v o wi wo" if name in glue.TASKS else TARGETS
    assert task.target_modules == targets.split()
    data = module(task.source).Data(**task.data)
    assert getattr(data, "samples", None) == (100_000 if name in ("math", "code", "chat") else None)


TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
DECODING = {
    "math": (1024, 1),
    **dict.fromkeys(CHOICES, (32, 4)),
    **dict.fromkeys(glue.TASKS, (16, 1)),
}


@pytest.mark.parametrize("name", DECODING)
def test_benchmarks_of_the_paper(root: Path, name: str) -> None:
    benchmark = Library(root / "config").benchmark(name)[0]
    assert (benchmark.max_new_tokens, benchmark.num_beams) == DECODING[name]
    assert benchmark.implementation in benchmarks.names() and benchmark.prompt is None
    module(benchmark.source).Data(**benchmark.data)
    if name in CHOICES:
        assert benchmark.implementation == "choice"
    same = Library(root / "config").benchmark("gsm8k")[0].stop
    assert benchmark.stop == (same if name == "math" else [])


def test_every_commonsense_test_set_is_a_benchmark(root: Path) -> None:
    sets = [shipped(root, "benchmarks")[name]["data"]["test"] for name in CHOICES]
    assert tuple(sets) == commonsense.TESTS


def test_commonsense_prompt_is_llm_adapters(root: Path) -> None:
    """Their evaluation's template is an indented f-string: the indentation is part of it."""
    prompt = shipped(root, "tasks")["commonsense"]["prompt"]
    assert prompts.render(prompt, {"instruction": "{instruction} of it"}) == (
        """Below is an instruction that describes a task. Write a response that appropriately """
        """completes the request.\x20

                ### Instruction:
                {instruction} of it

                ### Response:
                """
    )


def test_other_prompts(root: Path) -> None:
    tasks = shipped(root, "tasks")
    for name in ("gsm8k", "math", "code", "chat"):
        assert tasks[name]["prompt"] == mixture.ALPACA
    for name in glue.TASKS:
        assert re.fullmatch(
            r"classify the [a-z ]+: \{instruction\}\nresult: ", tasks[name]["prompt"]
        )
    assert "sentiment of the text" in tasks["sst2"]["prompt"]


def test_alpaca_prompt_is_the_papers() -> None:
    assert mixture.ALPACA == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    )


# prompts


def test_render_fills_fields_once() -> None:
    record = {"instruction": "{id} costs {3}", "id": "7"}
    assert prompts.render("{id}: {instruction} {} {0 x}", record) == "7: {id} costs {3} {} {0 x}"
    with pytest.raises(UserError, match=r"\{question\}: expected one of .*instruction"):
        prompts.render("{question}", record)


def tokenizer(root: Path, bos: bool = True):
    """Return the shipped tokenizer; without bos it is like GPT-2's and Qwen's."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(root / "workflow" / "resources" / "tiny")
    if not bos:
        from tokenizers.processors import ByteLevel

        loaded.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return loaded


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("response", ["19", "s are", " left", "\n\nThe", "é中\u2028"])
def test_generation_prompt_is_a_prefix_of_training(root: Path, bos: bool, response: str) -> None:
    loaded = tokenizer(root, bos)
    for prompt in ("How many apple", "### Response:", "ends \n", ""):
        head = prompts.encode_prompt(loaded, prompt)
        ids, labels, truncated = prompts.encode(loaded, prompt, response, 999)
        assert ids[: len(head)] == head and not truncated
        assert head[:1] == [loaded.bos_token_id] if bos else loaded.bos_token_id not in ids
        assert loaded.eos_token_id not in head
        assert labels[: len(head)] == [prompts.IGNORED] * len(head)
        assert labels[len(head) :] == ids[len(head) :]
        assert ids[-1] == loaded.eos_token_id and ids.count(loaded.eos_token_id) == 1
        assert loaded.decode(ids[len(head) : -1]) == response + "\n"


def test_encode_truncates_from_the_right(root: Path) -> None:
    loaded = tokenizer(root)
    ids, labels, truncated = prompts.encode(loaded, "How many?", "It is 12.", 999)
    head = len(prompts.encode_prompt(loaded, "How many?"))
    assert not truncated and len(ids) > head + 2
    short, cut, truncated = prompts.encode(loaded, "How many?", "It is 12.", head + 2)
    assert truncated and short == ids[: head + 2] and cut == labels[: head + 2]
    none = prompts.encode(loaded, "How many?", "It is 12.", head)
    assert none[2] and set(none[1]) == {prompts.IGNORED}
    exact = prompts.encode(loaded, "How many?", "It is 12.", len(ids))
    assert not exact[2] and exact[0] == ids


def test_encode_needs_an_end_token(root: Path) -> None:
    loaded = tokenizer(root)
    loaded.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        prompts.encode(loaded, "a", "b", 9)


@pytest.mark.parametrize("module", [p.stem for p in Path(loading.__file__).parent.glob("*.py")])
def test_task_modules_load_no_torch(module: str) -> None:
    name = "tlora.tasks" if module == "__init__" else f"tlora.tasks.{module}"
    code = (
        f"import sys, {name}; heavy = {{'torch', 'transformers', 'datasets', 'pandas'}}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
