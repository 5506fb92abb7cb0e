"""Records of every task source: files, prompts, tokens and splits."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tlora.benchmarks import choice as choice_scorer
from tlora.benchmarks import gsm8k as gsm8k_scorer
from tlora.errors import UserError
from tlora.tasks import arithmetic, choice, generated, gsm8k, loading, mixture, prompts

EMBEDDED = (arithmetic, choice)
FIELDS = {"id", "instruction", "response", "reference"}
ROWS = [{"question": f"q{i}", "answer": f"It is {i}.\n#### {i}"} for i in range(10)]


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# files


@pytest.mark.parametrize("suffix", loading.SUFFIXES)
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix}", [{**row, "extra": 1} for row in ROWS])
    assert loading.find_file(tmp_path, "train") == path
    assert loading.read_rows(path, ("question", "answer")) == ROWS


def test_json_file_with_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    assert loading.read_rows(path, ("question", "answer")) == ROWS


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [{"question": "a\u2028b\x85c", "answer": "#### 1"}]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")
    assert loading.read_rows(path, ("question", "answer")) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
def test_missing_column_names_the_row(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"t{suffix}", [ROWS[0], {"question": "q", "text": "t"}])
    with pytest.raises(UserError, match=r"row 2: column 'answer' is missing.*question, text"):
        loading.read_rows(path, ("question", "answer"))


def test_missing_column_of_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [{"question": "q"}])
    with pytest.raises(UserError, match="column 'answer' is missing"):
        loading.read_rows(path, ("question", "answer"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"question": "a"}\n\n{"question": ', r"t\.jsonl:3: not valid JSON"),
        ("t.json", b'[{"question": "a"},\n {]', r"t\.json:2: not valid JSON"),
        ("t.jsonl", b'{"question": 3}', "row 1: question: 3: expected text"),
        ("t.jsonl", b'{"question": "a"}\n{"question": null}', "row 2: question: None: expected"),
        ("t.jsonl", b"[1, 2]", r"row 1: \[1, 2\]: expected an object"),
        ("t.jsonl", b"\n\n", "no rows"),
        ("t.json", b"[]", "no rows"),
        ("t.jsonl", b"\xff\xfe", "not readable as UTF-8"),
        ("t.jsonl.gz", b"no gzip", "not readable"),
        ("t.parquet", b"no parquet", "not a parquet file"),
        ("t.csv", b"question\na", "unknown format"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        loading.read_rows(tmp_path / name, ("question",))
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        loading.read_rows(tmp_path / "t.jsonl", ("question",))
    with pytest.raises(UserError, match="no such folder"):
        gsm8k.load(gsm8k.Data(), "test", tmp_path)
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(UserError, match="no test file"):
        gsm8k.load(gsm8k.Data(), "test", tmp_path)


def test_hub_is_asked_for_a_fixed_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load_dataset(repo: str, name: str, split: str, revision: str) -> list[dict]:
        asked.update(repo=repo, name=name, split=split, revision=revision)
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(gsm8k.load(gsm8k.Data(), "test", None)) == 10
    assert asked["repo"] == "openai/gsm8k" and re.fullmatch("[0-9a-f]{40}", asked["revision"])
    assert gsm8k.sources(gsm8k.Data(), "test", None) == {}


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"openai/gsm8k.*no route.*data_root") as caught:
        gsm8k.load(gsm8k.Data(), "train", None)
    assert "\n" not in str(caught.value)


# validation


def test_validation_is_carved_from_train(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", ROWS)
    data = gsm8k.Data(validation=3)
    train, validation = (gsm8k.load(data, split, tmp_path) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (7, 3)
    both = {record["instruction"] for record in train} | {r["instruction"] for r in validation}
    assert len(both) == 10
    assert validation == gsm8k.load(data, "validation", tmp_path)
    assert len({record["id"] for record in train + validation}) == 10
    everything = gsm8k.load(gsm8k.Data(), "train", tmp_path)
    assert [r["instruction"] for r in everything] == [row["question"] for row in ROWS]
    assert gsm8k.load(gsm8k.Data(), "validation", tmp_path) == []
    assert [path.name for path in gsm8k.sources(data, "validation", tmp_path).values()] == [
        "train.jsonl"
    ]


def test_equal_rows_stay_on_one_side() -> None:
    rows = [{"question": f"q{i // 2}", "answer": "#### 1"} for i in range(40)]
    parts = [loading.carve(rows, 9, "question", s, "x") for s in ("train", "validation")]
    texts = [{row["question"] for _, row in part} for part in parts]
    assert not texts[0] & texts[1]
    assert [len(part) for part in parts] == [32, 8]


@pytest.mark.parametrize("count", [10, 11])
def test_validation_larger_than_train(tmp_path: Path, count: int) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=f"validation: {count}: expected 0 to 9"):
        gsm8k.load(gsm8k.Data(validation=count), "train", tmp_path)
    with pytest.raises(ValueError, match="validation"):
        gsm8k.Data(validation=-1)


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


@pytest.mark.parametrize("name", ["arithmetic", "choice", "gsm8k"])
def test_shipped_yaml_fits_the_sources(root: Path, name: str) -> None:
    task = yaml.safe_load((root / "config" / "tasks" / f"{name}.yaml").read_text())
    benchmark = yaml.safe_load((root / "config" / "benchmarks" / f"{name}.yaml").read_text())
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


def test_gsm8k_prompt_is_the_papers(root: Path) -> None:
    task = yaml.safe_load((root / "config" / "tasks" / "gsm8k.yaml").read_text())
    assert task["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    )
    assert task["prompt"] == mixture.ALPACA


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
