"""Tasks of lm-evaluation-harness (Gao et al., zenodo.org/records/12608602), run by that library.

Its tasks ask for likelihoods as well as for text, so it evaluates the model itself: `evaluate`
gives the lines of generations.jsonl, and tlora/benchmarks/lm_eval.py reads the score off them.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROWS = {"cpu": 8, "cuda": 32}
"""Rows of a batch; half as many where the memory does not suffice."""
SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
"""The library's own defaults: of the examples that a prompt shows, and of sampling."""
NO_ANSWER = "[invalid]"
"""What the library's filters put where they find no answer."""


@dataclass(frozen=True)
class Data:
    """Which task.

    Attributes
    ----------
    task
        A task of the library, a group of tasks that has a score of its own (mmlu), or a task of
        `include_path`.
    num_fewshot
        Examples that a prompt shows; by default what the task says. A task that is defined without
        examples stays without.
    include_path
        A folder with tasks of one's own, in the library's YAML format. The library pins no
        revision of its datasets: a task that includes one of its files can.
    """

    task: str
    num_fewshot: int | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        if not self.task:
            raise ValueError("task: expected the name of a task of lm-evaluation-harness")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError("num_fewshot: expected 0 or more")


def load(data: Data, split: str, data_root: Path | None) -> list[dict[str, Any]]:
    """Refuse: the library makes the prompts, and a benchmark is not trained on.

    Raises
    ------
    UserError
        Always.
    """
    raise UserError(
        f"lm_eval: {data.task}: split {split!r}: expected another source: lm_eval is for benchmarks"
    )


def sources(data: Data, split: str, data_root: Path | None) -> dict[str, Path]:
    """Return all files of `include_path`, by their names in it.

    Raises
    ------
    UserError
        Where there is no such folder.
    """
    if data.include_path is None:
        return {}
    folder = Path(data.include_path)
    if not folder.is_dir():
        raise UserError(f"include_path: {data.include_path!r}: no such folder: expected task YAMLs")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files if path.suffix != ".pyc"}


def hub(data: Data, split: str) -> list[tuple[str, str | None, str, str]]:
    """Return nothing: what a task reads of the hub is known to the library only; see `fetch`."""
    return []


def fetch(data: Data) -> dict[str, Any]:
    """Make the library download what the task needs, while the hub can be reached.

    Returns
    -------
    dict
        `task`, and for every single task its `rows` and `version`.

    Raises
    ------
    UserError
        An unknown task, or a dataset that cannot be had.
    """
    single = _single(_build(_manager(data), data.task))
    return {
        "task": data.task,
        "rows": {name: len(task.eval_docs) for name, task in single.items()},
        "version": {name: task.VERSION for name, task in single.items()},
    }


def evaluate(
    data: Data,
    limit: int | None,
    load_model: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    work: Path,
) -> list[dict[str, Any]]:
    """Evaluate a model.

    Parameters
    ----------
    data
        Which task.
    limit
        First items of every single task only.
    load_model
        Called when the task is known to be there.
    work
        Folder for the model's answers so far: what is in it is not asked again. Answers that are
        sampled are never kept.

    Returns
    -------
    list of dict
        The lines of generations.jsonl: `id` ("task/item"), `prompt`, `completion` (the text, or the
        most likely choice), `reference`, `answers` (by filter, what was read off the text; None:
        nothing) and `metrics` (by metric, a number or what the library aggregates). The first line
        also holds `results`: `metrics` as the library aggregates them, the first of them as
        `metric`, `task`, `n`, `version`, `num_fewshot`, `higher_is_better` and the library's own
        version.

    Raises
    ------
    UserError
        As `fetch`; and for a task that runs the model's code without a sandbox, or needs images.
    """
    import importlib.metadata

    manager = _manager(data)
    found = _build(manager, data.task)
    kinds = {name: task.OUTPUT_TYPE for name, task in _single(found).items()}
    model, tokenizer = load_model()
    results = _run(manager, found, data, limit, model, tokenizer, work)
    rows = [
        _row(name, sample, kinds[name])
        for name, samples in results["samples"].items()
        for sample in _by_item(samples)
    ]
    metrics = _aggregated(data.task, results["results"])
    rows[0]["results"] = {
        "task": data.task,
        "n": len(rows),
        "metric": next(iter(metrics), None),
        "metrics": metrics,
        "version": results["versions"].get(data.task),
        "num_fewshot": results["n-shot"].get(data.task),
        "higher_is_better": dict(results["higher_is_better"].get(data.task) or {}),
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    return rows


def _manager(data: Data) -> TaskManager:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"lm_eval: {data.task}: the library is missing: expected an installation of "
            "tlora[lm_eval]"
        ) from error
    if data.include_path is not None:
        # Reading the library's 14,000 tasks takes some 15 s.
        own = TaskManager(include_path=data.include_path, include_defaults=False)
        entry = own.task_index.get(data.task)
        members = (entry.cfg or {}).get("task") if entry else None
        listed = members if isinstance(members, list) else []
        if entry and all(member in own.all_subtasks for member in listed):
            return own
    return TaskManager(include_path=data.include_path)


def _build(manager: TaskManager, name: str) -> Task | Group:
    """Return the task, or the group of tasks, with its data.

    Raises
    ------
    UserError
        An unknown name, a tag, data that cannot be had, or a task that is not for this workflow.
    """
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `lm-eval ls tasks`"
        raise UserError(f"lm_eval: task: {name!r}: no such task of lm_eval: {hint}")
    with _quiet():
        try:
            loaded = manager.load([name])
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"lm_eval: {name}: not loaded: {reason[:200]}; expected a dataset that is "
                "reachable or was downloaded before"
            ) from error
    tasks, groups = loaded["tasks"], loaded["groups"]
    found = groups.get(name) or tasks.get(name)
    if found is None or (name in groups and not found.has_aggregation):
        known = ", ".join([*list(tasks)[:6], *(["..."] if len(tasks) > 6 else [])])
        raise UserError(
            f"lm_eval: task: {name!r}: has no score of its own: expected one of its tasks: {known}"
        )
    for one, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"lm_eval: {one}: runs the model's code without a sandbox: refused")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"lm_eval: {one}: needs images or sound: expected a task of text")
    return found


def _single(found: Task | Group) -> dict[str, Task]:
    from lm_eval.api.group import Group

    tasks = found.get_all_tasks() if isinstance(found, Group) else [found]
    return {task.task_name: task for task in tasks}


def _run(
    manager: TaskManager,
    found: Task | Group,
    data: Data,
    limit: int | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
) -> dict[str, Any]:
    """Return the library's results, with fewer rows at once where the memory does not suffice."""
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = ROWS[model.device.type]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows)
    while True:
        try:
            with _quiet():
                return simple_evaluate(
                    lm,
                    tasks=[found],
                    task_manager=manager,
                    num_fewshot=data.num_fewshot,
                    limit=limit,
                    use_cache=str(Path(work) / "answers"),
                    bootstrap_iters=0,
                    **SEEDS,
                )
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        lm.batch_size_per_gpu = rows
        logger.warning("out of memory: going on with %d rows", rows)
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the library's progress bars where nobody watches them; what it logs is logged."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _by_item(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group samples, of which an item has one for every filter, in the order of the items."""
    items: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        items.setdefault(sample["doc_id"], []).append(sample)
    return [items[number] for number in sorted(items)]


def _row(name: str, samples: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the line of an item: its samples differ in the filter only."""
    first = samples[0]
    completion = _completion(first, kind)
    answers, metrics = {}, {}
    for sample in samples:
        # A likelihood is read as it stands; a filter may find nothing in a text.
        read = sample["filtered_resps"][0] if kind == "generate_until" else completion
        answers[sample["filter"]] = None if read == NO_ANSWER else _plain(read)
        for metric in sample["metrics"]:
            metrics[_key(metric, sample["filter"])] = _plain(sample[metric])
    return {
        "id": f"{name}/{first['doc_id']}",
        "prompt": str(first["arguments"][0][0]),
        "completion": completion,
        "reference": _plain(first["target"]),
        "answers": answers,
        "metrics": metrics,
    }


def _completion(sample: dict[str, Any], kind: str) -> str:
    """Return the text, or the choice that is most likely; nothing where a text is only rated."""
    if kind == "generate_until":
        return str(sample["resps"][0][0])
    if kind == "loglikelihood_rolling":
        return ""
    asked = sample["arguments"]
    if "acc_mutual_info" in sample["metrics"]:
        # The choices are rated once more, without their question, after those with it.
        asked = asked[: len(asked) // 2]
    best = max(range(len(asked)), key=lambda at: sample["resps"][at][0][0])
    return str(asked[best][1])


def _aggregated(name: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the task's metrics, and after them those of a group's tasks as "task/metric"."""
    found: dict[str, float] = {}
    for task in [name, *(task for task in results if task != name)]:
        for key, value in results[task].items():
            metric, comma, chosen = key.partition(",")
            number = _plain(value)
            if not comma or metric.endswith("_stderr") or not isinstance(number, int | float):
                continue
            label = _key(metric, chosen)
            found[label if task == name else f"{task}/{label}"] = float(number)
    return found


def _key(metric: str, chosen: str) -> str:
    """Return a metric's name, with its filter where the task has filters."""
    return metric if chosen == "none" else f"{metric},{chosen}"


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it; None for a number that is none, text for the unknown."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value)
