"""One task of every family end to end on the embedded model, with real files where there are any.

Commonsense, math, code, chat, GLUE and GSM8K: from `data_root` through training and generation to
verdicts, a judge's ratings, and a table a task. What is not beside the checkout is made up, in the
format of the real files.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from judge_server import KEY, Answer, JudgeServer
from record_files import write
from workflow.project import Project

from tlora import sandbox
from tlora.errors import UserError
from tlora.tasks import mt_bench

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

FAMILIES = {
    "commonsense": ("boolq", "winogrande"),
    "math": ("gsm8k", "math"),
    "code": ("humaneval", "mbpp"),
    "chat": ("mt_bench",),
    "mrpc": ("mrpc",),
    "gsm8k": ("gsm8k",),
}
PAIRS = [(task, benchmark) for task, benchmarks in FAMILIES.items() for benchmark in benchmarks]
LABELS = {
    "commonsense": "Commonsense",
    "math": "Math",
    "code": "Code",
    "chat": "Chat",
    "mrpc": "MRPC",
    "gsm8k": "GSM8K",
}
METHODS = ("base", "lora")
SAMPLES, ITEMS, TOKENS = 16, 4, 8
# The embedded model has learned to answer problems like GSM8K's, if it may speak out.
LONG_ITEMS, LONG_TOKENS = 8, 48
TURNS, RATING = 2, 7
PRESET = """\
models: [tiny]
tasks: [{tasks}]
methods: [lora]
seeds: [1]
data_root: {root}
set:
  {{rank: 2, lora_alpha: 4, target_modules: [q_proj, v_proj], learning_rate: 1.0e-3, batch_size: 8}}
overrides:
  - {{tasks: [{sampled}], set: {{data.samples: {samples}}}}}
  - {{benchmarks: [{benchmarks}], set: {{limit: {items}, max_new_tokens: {tokens}}}}}
  - {{benchmarks: [gsm8k], set: {{limit: {long_items}, max_new_tokens: {long_tokens}}}}}
"""
# Of HumanEval and MBPP the numbers and names: EvalPlus knows by them what to compare.
HUMANEVAL = {
    "task_id": "HumanEval/9000",
    "entry_point": "double",
    "prompt": 'def double(number):\n    """Return the double of a number."""\n',
    "canonical_solution": "    return 2 * number\n",
    "atol": 0,
    "base_input": [[1], [0]],
    "plus_input": [[-5]],
}
MBPP = {
    "task_id": "Mbpp/9000",
    "entry_point": "largest",
    "prompt": '"""\nWrite a function to find the largest.\nassert largest([1, 3]) == 3\n"""\n',
    "canonical_solution": "def largest(numbers):\n    return max(numbers)\n",
    "atol": 0,
    "base_input": [[[1, 3]]],
    "plus_input": [[[-2, -1]]],
}
PROMPTS = {
    "single-v1": "{question} {answer}",
    "single-math-v1": "{question} {ref_answer_1} {answer}",
    "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
    "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} {question_1} {answer_1} "
    "{question_2} {answer_2}",
}


@dataclass
class Finished:
    """The finished grid, and who was asked for ratings."""

    project: Project
    judge: JudgeServer
    preset: str = "families"

    def path(self, name: str) -> Path:
        """Return a file of the comparison."""
        return self.project.path(f"results/comparison/{self.preset}/{name}")

    def json(self, path: str | Path) -> dict[str, Any]:
        """Read a JSON file of the checkout."""
        return json.loads((self.project.folder / path).read_text(encoding="utf-8"))

    @property
    def grid(self) -> dict[str, Any]:
        """What the grid consists of: ids and paths."""
        return self.json(self.path("grid.json"))

    def cell(self, task: str, method: str) -> dict[str, Any]:
        """Return the paths of a run's artefacts."""
        names = {"task": task, "method": method}
        (cell,) = (one for one in self.grid["cells"] if names.items() <= one.items())
        return cell


def unjudged() -> str | None:
    """Return why programs cannot be judged here, None where they can."""
    if importlib.util.find_spec("evalplus") is None:
        return "evalplus is not installed (the extra `code`)"
    try:
        sandbox.find()
    except UserError as error:
        return str(error)
    return None


def made_up() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every file that the tasks and benchmarks read, by its path."""
    numbers = range(SAMPLES)
    sums = [(f"Tom has {n} pens and buys {n + 2} more. How many?", 2 * n + 2) for n in numbers]
    yes = "Please answer the following question with true or false, question: is {} more than 5?"
    words = "Please choose the correct answer to fill in the blank to complete the given sentence: "

    def commonsense(question: str, labels: tuple[str, str], right: bool) -> dict[str, str]:
        label = labels[right]
        form = f"\n\nAnswer format: {'/'.join(sorted(labels))}"
        return {
            "instruction": question + form,
            "input": "",
            "output": f"the correct answer is {label}",
            "answer": label,
        }

    def says(who: str, text: str) -> dict[str, str]:
        return {"from": who, "value": text}

    truth = [commonsense(yes.format(n), ("false", "true"), n > 5) for n in numbers]
    blanks = [
        commonsense(
            f"{words}Anna lent Bob {n} books, so _ had none left. Option1: Anna Option2: Bob",
            ("option2", "option1"),
            n % 2 == 0,
        )
        for n in numbers
    ]
    gsm8k = [{"question": asked, "answer": f"{a} pens.\n#### {a}"} for asked, a in sums]
    pairs = [
        {"sentence1": f"He sold {n} cars.", "sentence2": f"{n} cars were sold.", "label": n % 2}
        for n in numbers
    ]
    categories = ("writing", "math", "stem", "roleplay")
    references = [
        {"question_id": n, "choices": [{"index": 0, "turns": ["One.", "Two."]}]}
        for n in range(ITEMS)
    ]
    return {
        "commonsense/commonsense_170k.json": [*truth[: SAMPLES // 2], *blanks[: SAMPLES // 2]],
        "commonsense/boolq/test.json": truth[-ITEMS:],
        "commonsense/winogrande/test.json": blanks[-ITEMS:],
        "metamath/train.jsonl": [
            {"query": f"{asked} Say why.", "response": f"{a}\nThe answer is: {a}", **original}
            for asked, a in sums
            for original in [{"original_question": asked}]
        ],
        "gsm8k/train.jsonl": gsm8k[:LONG_ITEMS] * 2,
        "gsm8k/test.jsonl": gsm8k[LONG_ITEMS:],
        "math/test.jsonl": [
            {"problem": f"What is ${n}+1$?", "solution": f"It is $\\boxed{{{n + 1}}}$."}
            | {"level": "Level 1", "type": "Algebra"}
            for n in range(ITEMS)
        ],
        "code_feedback/train.jsonl": [
            {
                "query": f"Add {n} to a number.",
                "answer": f"```python\ndef f(x): return x + {n}\n```",
            }
            for n in numbers
        ],
        "code/HumanEvalPlus-v0.1.10.jsonl.gz": [
            {**HUMANEVAL, "task_id": f"HumanEval/{9000 + n}"} for n in range(ITEMS)
        ],
        "code/MbppPlus-v0.2.0.jsonl.gz": [
            {**MBPP, "task_id": f"Mbpp/{9000 + n}"} for n in range(ITEMS)
        ],
        "evol_instruct/train.jsonl": [
            {"conversations": [says("human", f"Name {n} fruits."), says("gpt", "Apple, pear.")]}
            for n in numbers
        ],
        mt_bench.FILES["questions"]: [
            {"question_id": n, "category": category, "turns": [f"Question {n}?", f"And {n} again?"]}
            for n, category in enumerate(categories)
        ],
        mt_bench.FILES["references"]: references,
        mt_bench.FILES["prompts"]: [
            {"name": name, "system_prompt": "Rate.", "prompt_template": template}
            for name, template in PROMPTS.items()
        ],
        "glue/MRPC_train.jsonl": pairs,
        "glue/MRPC_validation.jsonl": pairs[:ITEMS],
    }


def lay_out(root: Path, real: Path | None) -> None:
    """Write a `data_root`, with real files as far as they are there.

    One problem of GSM8K's test set is put into its training set.
    """
    files = made_up()
    for name, made in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if real and (real / name).is_file():
            (root / name).symlink_to(real / name)
        else:
            write(root / name, made)
    name = "commonsense/commonsense_170k.json"
    if real and not (root / name).is_symlink():
        parts = [real / f"commonsense/{part}/train.json" for part in ("boolq", "openbookqa")]
        read = [json.loads(path.read_text(encoding="utf-8")) for path in parts if path.is_file()]
        whole = [row for part in read for row in part[: SAMPLES // len(read)]]
        write(root / name, [*whole, *files[name]][:SAMPLES])
    train, test = (root / f"gsm8k/{split}.jsonl" for split in ("train", "test"))
    problems = [*rows(train)[: SAMPLES - 1], rows(test)[0]]
    train.unlink()
    write(train, problems)


def rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def finished(
    sources: Project, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Finished]:
    """A grid of all families, run by snakemake."""
    try:
        real = request.getfixturevalue("shared_data") / "data"
    except pytest.skip.Exception:
        real = None
    folder = tmp_path_factory.mktemp("families")
    lay_out(folder / "data", real)
    tasks = [task for task in FAMILIES if task != "code" or unjudged() is None]
    project = sources.copy(folder / "checkout")
    shown = "benchmarks: [boolq, piqa, siqa, hellaswag, winogrande, arc_e, arc_c, obqa]"
    project.edit("config/tasks/commonsense.yaml", shown, "benchmarks: [boolq, winogrande]")
    preset = PRESET.format(
        tasks=", ".join(tasks),
        root=folder / "data",
        sampled=", ".join(task for task in tasks if task not in ("mrpc", "gsm8k")),
        samples=SAMPLES,
        items=ITEMS,
        tokens=TOKENS,
        long_items=LONG_ITEMS,
        long_tokens=LONG_TOKENS,
        benchmarks=", ".join(sorted({name for task in tasks for name in FAMILIES[task]})),
    )
    project.path("config/families.yaml").write_text(preset, encoding="utf-8")
    unsure = rows(folder / "data" / mt_bench.FILES["questions"])[0]["turns"][1]
    with JudgeServer(
        lambda prompt, before: Answer("No idea." if unsure in prompt else f"[[{RATING}]]")
    ) as judge:
        project.environment |= judge.environment()
        project.snakemake(preset="config/families.yaml")
        yield Finished(project, judge)


@pytest.fixture(params=PAIRS, ids="/".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A task and one of its benchmarks."""
    reason = unjudged()
    if request.param[0] == "code" and reason:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("method", METHODS)
def test_every_item_has_a_verdict(finished: Finished, pair: tuple[str, str], method: str) -> None:
    """As many as asked for, in the order of the completions; answers that are none are counted."""
    task, benchmark = pair
    cell = finished.cell(task, method)
    score = finished.json(cell["scores"][benchmark])
    made = finished.project.path(cell["generations"][benchmark]).with_name("generations.jsonl")
    completions = rows(made)
    count = {"gsm8k": LONG_ITEMS, "mt_bench": ITEMS * TURNS}.get(benchmark, ITEMS)
    tokens = LONG_TOKENS if benchmark == "gsm8k" else TOKENS
    assert score["n"] == len(score["items"]) == count
    assert [item["id"] for item in score["items"]] == [line["id"] for line in completions]
    assert all(0 < line["completion_tokens"] <= tokens for line in completions)
    none = [item for item in score["items"] if item["extracted"] is None]
    assert score["unextracted"] == len(none)
    if benchmark != "mt_bench":
        assert not any(item["correct"] for item in none)
        assert score["value"] == sum(item["correct"] for item in score["items"]) / count
    if benchmark == "gsm8k":
        assert len(none) < count


@pytest.mark.parametrize("method", METHODS)
def test_chat_is_rated_by_the_judge(finished: Finished, method: str) -> None:
    """The mean of what the judge said; the turn that it did not rate is counted, not dropped."""
    score = finished.json(finished.cell("chat", method)["scores"]["mt_bench"])
    assert score["value"] == RATING
    assert score["unextracted"] == 1
    assert [item["extracted"] for item in score["items"]] == [RATING, None, *[RATING] * 6]
    assert score["judge"]["answered_as"] == [finished.judge.model]
    assert set(finished.judge.keys) == {f"Bearer {KEY}"}
    files = [path for path in finished.project.path("results").rglob("*") if path.is_file()]
    logs = [path for path in finished.project.path("logs").rglob("*") if path.is_file()]
    assert not [path for path in (*files, *logs) if KEY.encode() in path.read_bytes()]


def test_data_cards_count_what_was_trained_on(finished: Finished, pair: tuple[str, str]) -> None:
    """All samples of the task, those cut off among them."""
    card = finished.json(finished.cell(pair[0], "lora")["card"])
    assert card["counts"]["train"] + card["without_target"]["train"] == SAMPLES
    assert card["without_target"]["train"] <= card["truncated"]["train"] < SAMPLES


def test_overlap_of_training_and_test_data(finished: Finished, pair: tuple[str, str]) -> None:
    """Every test set is looked for; the problem put into GSM8K's training data is found."""
    task, benchmark = pair
    overlap = finished.json(finished.grid["tasks"][task]["overlaps"][benchmark])
    assert overlap["train"] == SAMPLES
    assert overlap["n"] >= ITEMS
    if task == "gsm8k":
        assert overlap["exact_ids"] == ["test-0"]


def test_a_section_a_task(finished: Finished, pair: tuple[str, str]) -> None:
    """Both rows of the task have the score, and each format of the table has the task."""
    task, benchmark = pair
    table = list(csv.DictReader(finished.path("table.csv").open(encoding="utf-8")))
    found = {row["method"]: row for row in table if row["task"] == task}
    assert set(found) == set(METHODS)
    for method, row in found.items():
        score = finished.json(finished.cell(task, method)["scores"][benchmark])
        assert int(row[f"{benchmark}_n"]) == score["n"]
    for name in ("table.md", "table.tex", "table.html"):
        assert LABELS[task] in finished.path(name).read_text(encoding="utf-8"), name


def test_equal_work_is_done_once(finished: Finished) -> None:
    """GSM8K of the base model is the same whichever task asks for it."""
    scores = {finished.cell(task, "base")["scores"]["gsm8k"] for task in ("math", "gsm8k")}
    assert len(scores) == 1
