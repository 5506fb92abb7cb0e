"""Tasks of lm-evaluation-harness: its results are ours, item by item, and an attempt goes on."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tlora.benchmarks import load
from tlora.errors import UserError
from tlora.tasks import lm_eval

pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")

CHOICE = """
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
metadata: {version: 3.0}
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{answer}}"
num_fewshot: 2
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "([0-9]{2})"}, {function: take_first}]
  - {name: loose, filter: [{function: remove_whitespace}, {function: take_first}]}
  - name: never
    filter: [{function: regex, regex_pattern: "(no such word)"}, {function: take_first}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_other]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
METRICS = {
    "tiny_choice": ["acc", "mcc", "acc_norm"],
    "tiny_generate": ["exact_match,strict", "exact_match,loose", "exact_match,never"],
    "tiny_text": ["word_perplexity"],
}


def write_tasks(folder: Path, items: int = 12) -> Path:
    """Write tasks with local data."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for split in ("test", "train"):
        rows = []
        for _ in range(items):
            a, b = rng.randint(2, 40), rng.randint(2, 9)
            choices = rng.sample([str(a + b), str(a + b + 3), str(abs(a - b))], 3)
            gold = choices.index(str(a + b))
            question = f"What is {a} + {b}?"
            rows.append({"question": question, "choices": choices, "gold": gold})
            rows[-1]["answer"] = str(a + b)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    files = {split: str(folder / f"{split}.jsonl") for split in ("test", "train")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder.parent / "cache")},
        "test_split": "test",
        "training_split": "train",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    for name, text in (
        ("tiny_choice", CHOICE),
        (
            "tiny_other",
            CHOICE.replace("metric: mcc", "metric: acc_mutual_info").replace(
                "matthews_corrcoef", "mean"
            ),
        ),
        ("tiny_generate", GENERATE),
        ("tiny_text", TEXT),
    ):
        task = {"task": name, "tag": ["tiny_tag"], **shared, **yaml.safe_load(text)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    (folder / "tiny_group.yaml").write_text(GROUP, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks."""
    return write_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


@pytest.fixture(scope="module")
def tiny(root: Path) -> Callable[[], tuple[Any, Any]]:
    """What loads the embedded base model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = root / "workflow" / "resources" / "tiny"
    return lambda: (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


Lines = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lines(
    tasks: Path, tiny: Callable[[], tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Lines:
    """The lines of a task for the embedded model, made once."""
    made: dict[str, list[dict[str, Any]]] = {}

    def of(task: str) -> list[dict[str, Any]]:
        if task not in made:
            data = lm_eval.Data(task, include_path=str(tasks))
            work = tmp_path_factory.mktemp("work")
            made[task] = lm_eval.evaluate(data, None, tiny, work)
        return json.loads(json.dumps(made[task], allow_nan=False))

    return of


def score(records: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return load("lm_eval").score(records, options)


def own_results(root: Path, tasks: Path, names: list[str]) -> dict[str, Any]:
    """Return what the library says of the embedded model, as its own command line runs it."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        "hf",
        model_args={"pretrained": str(root / "workflow/resources/tiny"), "device": "cpu"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
    )


@pytest.mark.slow
def test_scores_are_the_librarys_own(root: Path, tasks: Path, lines: Lines) -> None:
    theirs = own_results(root, tasks, list(METRICS))
    for task, metrics in METRICS.items():
        content = score(lines(task))
        assert content["metric"] == metrics[0]
        assert list(content["metrics"]) == metrics
        for metric in metrics:
            key = metric if "," in metric else f"{metric},none"
            assert content["metrics"][metric] == pytest.approx(theirs["results"][task][key])
        samples = {(s["doc_id"], s["filter"]): s for s in theirs["samples"][task]}
        for record in lines(task):
            number = int(record["id"].removeprefix(f"{task}/"))
            for metric, value in record["metrics"].items():
                name, _, chosen = metric.partition(",")
                other = samples[number, chosen or "none"]
                assert value == pytest.approx(json.loads(json.dumps(other[name], default=int)))
                assert record["prompt"] == other["arguments"][0][0]


@pytest.mark.slow
def test_lines_of_choices(tasks: Path, lines: Lines) -> None:
    records = lines("tiny_choice")
    choices = [json.loads(text)["choices"] for text in (tasks / "test.jsonl").open()]
    assert [record["id"] for record in records] == [f"tiny_choice/{i}" for i in range(12)]
    assert "results" in records[0] and not any("results" in record for record in records[1:])
    content = score(records)
    assert content["value"] == sum(item["correct"] for item in content["items"]) / 12
    assert content["value"] == sum(record["metrics"]["acc"] for record in records) / 12
    assert (content["n"], content["unextracted"]) == (12, 0)
    for record, listed in zip(records, choices, strict=True):
        assert record["prompt"].startswith("Q: What is") and record["prompt"].endswith("A:")
        gold, chosen = record["metrics"]["mcc"]
        assert record["completion"] == f" {listed[chosen]}"
        assert record["reference"] == gold
        assert (gold == chosen) == bool(record["metrics"]["acc"])
    assert content["lm_eval"]["version"] == 3.0
    assert content["lm_eval"]["higher_is_better"]["acc"] is True


@pytest.mark.slow
def test_lines_of_texts_and_what_filters_do_not_find(lines: Lines) -> None:
    records = lines("tiny_generate")
    assert records[0]["prompt"].count("Q: What is") == 3
    content = score(records)
    for record, item in zip(records, content["items"], strict=True):
        found = re.search("[0-9]{2}", record["completion"])
        assert item["extracted"] == record["answers"]["strict"] == (found and found[0])
        assert record["answers"]["loose"] == record["completion"].replace(" ", "")
    assert score(records, metric="exact_match,never")["unextracted"] == 12
    loose = score(records, metric="exact_match,loose")
    assert loose["value"] == content["metrics"]["exact_match,loose"]
    assert (loose["metric"], loose["unextracted"]) == ("exact_match,loose", 0)
    assert loose["metrics"] == content["metrics"]


@pytest.mark.slow
def test_a_group_has_the_score_that_the_library_gives_it(lines: Lines) -> None:
    records = lines("tiny_group")
    assert [r["id"].partition("/")[0] for r in records] == ["tiny_choice"] * 12 + [
        "tiny_other"
    ] * 12
    content = score(records)
    both = [record["metrics"]["acc"] for record in records]
    # The second task also rates its choices without their question.
    assert "acc_mutual_info" in records[12]["metrics"]
    assert [r["completion"] for r in records[:12]] == [r["completion"] for r in records[12:]]
    assert content["value"] == pytest.approx(sum(both) / 24)
    alone = score(lines("tiny_choice"))["metrics"]
    assert content["metrics"]["tiny_choice/acc_norm"] == pytest.approx(alone["acc_norm"])


@pytest.mark.slow
def test_options_of_the_data(
    tasks: Path, tiny: Callable[[], tuple[Any, Any]], tmp_path: Path
) -> None:
    data = lm_eval.Data("tiny_generate", num_fewshot=1, include_path=str(tasks))
    records = lm_eval.evaluate(data, 3, tiny, tmp_path / "one")
    assert [record["id"] for record in records] == [f"tiny_generate/{i}" for i in range(3)]
    assert records[0]["prompt"].count("Q: What is") == 2
    assert records[0]["results"]["num_fewshot"] == 1
    again = lm_eval.evaluate(data, 3, tiny, tmp_path / "two")
    assert again == records


@pytest.mark.slow
def test_the_stages_make_them(root: Path, tasks: Path, tmp_path: Path, lines: Lines) -> None:
    from tlora.stages.generate import generate
    from tlora.stages.score import score_file

    spec = {
        "model": {"dtype": "float32", "architecture": "causal"},
        "export": None,
        "prompt": "{instruction}",
        "benchmark": {
            "source": "lm_eval",
            "data": {"task": "tiny_choice", "num_fewshot": None, "include_path": str(tasks)},
            "limit": None,
        },
    }
    place = {"model": str(root / "workflow/resources/tiny"), "work": str(tmp_path / "work")}
    generate(spec, {}, tmp_path, {**place, "stamp": "0"})
    content = score_file("lm_eval", tmp_path / "generations.jsonl", tmp_path / "score.json")
    assert content == score(lines("tiny_choice"))
    assert not (tmp_path / "work").exists()


# What can be wrong


def test_an_own_task_needs_none_of_the_librarys(tasks: Path) -> None:
    data = lm_eval.Data("tiny_choice", include_path=str(tasks))
    found = lm_eval.fetch(data)
    assert found["rows"] == {"tiny_choice": 12}
    assert found["version"] == {"tiny_choice": 3.0}
    assert "arc_easy" not in lm_eval._manager(data).all_tasks


def test_what_has_no_score_of_its_own_is_refused(tasks: Path, tmp_path: Path) -> None:
    message = (
        "task: 'tiny_tag': has no score of its own: expected one of its tasks: tiny_choice, tiny_"
    )
    with pytest.raises(UserError, match=message):
        lm_eval.fetch(lm_eval.Data("tiny_tag", include_path=str(tasks)))
    (tmp_path / "group.yaml").write_text("group: bare\ntask: [bare_task]\n")
    task = yaml.safe_load((tasks / "tiny_choice.yaml").read_text())
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**task, "task": "bare_task"}))
    with pytest.raises(UserError, match=r"'bare': has no score of its own: .* bare_task$"):
        lm_eval.fetch(lm_eval.Data("bare", include_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}},
            "^lm_eval: odd: not loaded: .*no/such.jsonl.*; expected a dataset that is reachable",
        ),
        ({"unsafe_code": True}, "^lm_eval: odd: runs the model's code without a sandbox: refused$"),
        ({"doc_to_image": "image"}, "^lm_eval: odd: needs images or sound"),
    ],
)
def test_tasks_that_cannot_be_run_are_named_before_the_model_is_loaded(
    tasks: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    task = yaml.safe_load((tasks / "tiny_generate.yaml").read_text())
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump({**task, "task": "odd", **changes}))
    with pytest.raises(UserError, match=message) as caught:
        data = lm_eval.Data("odd", include_path=str(tmp_path))
        lm_eval.evaluate(data, None, lambda: pytest.fail("loaded"), tmp_path / "work")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"task: 'arc_eazy': no such task of lm_eval: .*'arc_easy'"):
        lm_eval.fetch(lm_eval.Data("arc_eazy"))


def test_files_of_own_tasks_count(tasks: Path) -> None:
    assert lm_eval.sources(lm_eval.Data("arc_easy"), "test", None) == {}
    found = lm_eval.sources(lm_eval.Data("x", include_path=str(tasks)), "test", None)
    assert found["tiny_choice.yaml"] == tasks / "tiny_choice.yaml"
    assert "test.jsonl" in found
    assert lm_eval.hub(lm_eval.Data("arc_easy"), "test") == []
    with pytest.raises(UserError, match="include_path: '/no/such': no such folder"):
        lm_eval.sources(lm_eval.Data("x", include_path="/no/such"), "test", None)
    with pytest.raises(UserError, match="arc_easy: split 'train': expected another source"):
        lm_eval.load(lm_eval.Data("arc_easy"), "train", None)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"task": ""}, "task: expected"), ({"task": "a", "num_fewshot": -1}, "num_fewshot: expected")],
)
def test_bad_data_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm_eval.Data(**values)


def line(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "id": f"t/{number}",
        "completion": " 4",
        "reference": "4",
        "answers": {"none": "4"},
        "metrics": {"acc": float(number % 2), "bleu": [1, 2]},
    }
    if number == 0:
        results = {"task": "t", "n": 2, "metric": "acc", "metrics": {"acc": 0.5, "bleu": 12.5}}
        record["results"] = {**results, "version": 1}
    return {**record, **changes}


def test_the_scorer_takes_the_librarys_numbers() -> None:
    content = score([line(0), line(1)])
    assert (content["metric"], content["value"], content["n"]) == ("acc", 0.5, 2)
    assert content["metrics"] == {"acc": 0.5, "bleu": 12.5}
    assert [item["correct"] for item in content["items"]] == [False, True]
    assert content["lm_eval"] == {"task": "t", "version": 1}
    content = score([line(0), line(1)], metric="bleu")
    assert (content["metric"], content["value"]) == ("bleu", 12.5)
    assert [item["correct"] for item in content["items"]] == [None, None]
    assert [item["value"] for item in content["items"]] == [None, None]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "^results: expected the results of lm_eval in the first line"),
        ([line(1), line(0)], {}, "^results: expected"),
        ([line(0)], {}, "^n: 2: 1 lines: expected as many"),
        ([line(0), line(1, metrics=3)], {}, "^item 't/1': metrics, answers: expected both"),
        ([line(0), line(1)], {"metric": "f1"}, "metric: 'f1': no such metric of t: .* acc, bleu$"),
    ],
)
def test_other_lines_are_refused(
    records: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        score(records, **options)


# Going on


def counted(load_model: Callable[[], tuple[Any, Any]], asked: list[int], most: int = 10**9) -> Any:
    """Note the rows of every batch; more than `most` rows do not fit."""

    def load_counted() -> tuple[Any, Any]:
        model, tokenizer = load_model()

        def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            rows = (args[0] if args else kwargs["input_ids"]).shape[0]
            if rows > most:
                raise torch.OutOfMemoryError(f"{rows} rows")
            asked.append(rows)

        model.register_forward_pre_hook(note, with_kwargs=True)
        return model, tokenizer

    return load_counted


@pytest.mark.slow
def test_fewer_rows_where_the_memory_does_not_suffice(
    tasks: Path, tiny: Callable[[], tuple[Any, Any]], tmp_path: Path, lines: Lines
) -> None:
    asked: list[int] = []
    data = lm_eval.Data("tiny_choice", include_path=str(tasks))
    records = lm_eval.evaluate(data, None, counted(tiny, asked, most=2), tmp_path)
    assert records == lines("tiny_choice")
    assert max(asked) == 2


KILLED = """
import sys, time
from pathlib import Path
from tlora.tasks import lm_eval

def load():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    model.register_forward_pre_hook(lambda module, args: time.sleep(0.5))
    return model, AutoTokenizer.from_pretrained(sys.argv[1])

lm_eval.ROWS = {"cpu": 1}
data = lm_eval.Data("tiny_choice", include_path=sys.argv[2])
lm_eval.evaluate(data, None, load, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(
    root: Path, tasks: Path, tiny: Callable[[], tuple[Any, Any]], tmp_path: Path, lines: Lines
) -> None:
    import sqlite3

    arguments = [str(root / "workflow/resources/tiny"), str(tasks), str(tmp_path)]
    killed = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=root, env=os.environ)
    answers = tmp_path / "answers_rank0.db"

    def kept() -> int:
        if not answers.is_file():
            return 0
        try:
            with sqlite3.connect(f"file:{answers}?mode=ro", uri=True) as database:
                return database.execute("SELECT count(*) FROM unnamed").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    while kept() < 4:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    known = kept()
    assert 4 <= known < 36
    asked: list[int] = []
    data = lm_eval.Data("tiny_choice", include_path=str(tasks))
    records = lm_eval.evaluate(data, None, counted(tiny, asked), tmp_path)
    assert records == lines("tiny_choice")
    assert 0 < sum(asked) <= 36 - known
    assert lm_eval.evaluate(data, None, counted(tiny, []), tmp_path) == records


def test_importing_it_loads_no_library(root: Path) -> None:
    script = (
        "import sys, tlora.tasks.lm_eval, tlora.benchmarks.lm_eval\n"
        "assert not {'lm_eval', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_the_example_is_a_benchmark(root: Path) -> None:
    example = yaml.safe_load((root / "config/benchmarks/lm_eval_arc_easy.yaml").read_text())
    assert lm_eval.Data(**example["data"]) == lm_eval.Data("arc_easy", num_fewshot=0)
    assert (example["source"], example["implementation"]) == ("lm_eval", "lm_eval")
    assert load("lm_eval").options_type(**example["options"]).metric == "acc_norm"
