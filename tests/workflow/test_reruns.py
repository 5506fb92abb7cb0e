"""What a change makes snakemake do again: job sets of real dry runs, compared exactly.

The letters are those of the list of promises: a value, a source, a benchmark, a scorer, what
changes nothing, a new method, swapped values, the allocation, going back, a second preset.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from workflow.project import GRID, MINI, TABLES, Job, Project, ids, labels, run_of

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

METHODS = ("full", "lora", "pissa", "tlora")
EVALUATIONS = [
    f"{stage} tiny/arithmetic/{method}/arithmetic"
    for method in (*METHODS, "base")
    for stage in ("generate", "score")
]


def runs(*methods: str) -> list[str]:
    """Return the labels of the runs of some methods."""
    return [label for method in methods for label in run_of(method)]


def made(jobs: dict[str, Job]) -> set[tuple[str, str]]:
    """Return rule and id of all that the finished project has."""
    return ids(jobs.values())


def touch(folder: Path) -> None:
    """Give every file below a folder a new time of change, in no order."""
    order = random.Random(0)
    now = time.time()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            os.utime(path, (now, now - order.randrange(3600)))


def test_nothing_changed(checkout: Project) -> None:
    """The starting point of all that follows."""
    assert checkout.dry() == []


def test_a_value_of_a_method(checkout: Project, jobs: dict[str, Job]) -> None:
    """a) Only that method's start, runs and evaluations, under new ids, and the tables."""
    checkout.append("config/methods/pissa.yaml", "options: {niter: 4}\n")
    found = checkout.dry()
    assert labels(found) == sorted(["initialize tiny/any/pissa", *runs("pissa"), *GRID])
    assert ids(found).isdisjoint(made(jobs))


def test_b_source_of_a_method(checkout: Project, jobs: dict[str, Job]) -> None:
    """b) The same jobs, under the ids they have: nothing else is computed than before."""
    checkout.append("tlora/methods/pissa.py", "\n# changed\n")
    found = checkout.dry()
    assert labels(found) == sorted(["initialize tiny/any/pissa", *runs("pissa"), *TABLES])
    assert ids(found) <= made(jobs)


def test_c_new_benchmark_of_a_task(checkout: Project, jobs: dict[str, Job]) -> None:
    """c) Its generations and scores for that task's runs; no training."""
    checkout.edit("config/tasks/arithmetic.yaml", "[arithmetic]", "[arithmetic, choice]")
    found = checkout.dry()
    expected = [
        f"{stage} tiny/arithmetic/{method}/choice"
        for method in (*METHODS, "base")
        for stage in ("generate", "score")
    ]
    assert labels(found) == sorted([*expected, "overlap arithmetic/choice", *GRID])
    assert ids(found).isdisjoint(made(jobs))


def test_d_source_of_a_scorer(checkout: Project, jobs: dict[str, Job]) -> None:
    """d) Scores and tables; no generation."""
    checkout.append("tlora/benchmarks/gsm8k.py", "\n# changed\n")
    found = checkout.dry()
    scores = [label for label in EVALUATIONS if label.startswith("score ")]
    assert labels(found) == sorted([*scores, *TABLES])
    assert ids(found) <= made(jobs)


def test_d_source_of_another_scorer(checkout: Project) -> None:
    """d) A scorer that no benchmark of the preset uses."""
    checkout.append("tlora/benchmarks/choice.py", "\n# changed\n")
    assert checkout.dry() == []


def test_e_touched_files(checkout: Project) -> None:
    """e) New times of change everywhere: base model, package, configuration, results."""
    for name in ("config", "tlora", "workflow", "envs", "results"):
        touch(checkout.path(name))
    os.utime(checkout.path("Snakefile"))
    assert checkout.dry() == []


def test_e_fresh_checkout(checkout: Project, tmp_path: Path) -> None:
    """e) Another folder, all files written anew; results and snakemake's records came along."""
    moved = checkout.copy(tmp_path / "elsewhere", copy_function=shutil.copyfile)
    shutil.rmtree(checkout.folder)
    assert moved.dry() == []


def test_e_labels_readme_and_resources(checkout: Project) -> None:
    """e) What is for people, and where jobs run."""
    checkout.edit("config/methods/pissa.yaml", "label: PiSSA", "label: Another name")
    checkout.edit("config/tasks/arithmetic.yaml", "label: Arithmetic", "label: Sums")
    checkout.edit("config/benchmarks/arithmetic.yaml", "label: Arithmetic", "label: Sums")
    checkout.edit("config/models/tiny.yaml", "label: Tiny", "label: Small")
    checkout.append("config/methods/lora.yaml", "# a note\n")
    checkout.append("README.md", "\nA note.\n")
    checkout.append("workflow/resources/tiny/README.md", "A note.\n")
    profile = checkout.path("workflow/profiles/slurm/config.yaml")
    profile.write_text(profile.read_text().replace("mem_mb: 64000", "mem_mb: 32000"))
    checkout.append("envs/core.yaml", "# a note\n")
    assert checkout.dry() == []


def test_e_placement(checkout: Project) -> None:
    """e) How many samples go through the model at once decides no result."""
    checkout.edit("config/models/tiny.yaml", "micro_batch: ", "micro_batch: 2  # ")
    assert checkout.dry() == []


def test_e_model_at_another_path(checkout: Project) -> None:
    """e) A model is what its files hold, wherever they lie."""
    checkout.path("workflow/resources/tiny").rename(checkout.path("workflow/resources/moved"))
    checkout.edit("config/models/tiny.yaml", "resources/tiny", "resources/moved")
    assert checkout.dry() == []


def test_changed_model(checkout: Project, jobs: dict[str, Job]) -> None:
    """The counterpart: one other byte in the base model, and everything is another thing."""
    weights = checkout.path("workflow/resources/tiny/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = checkout.dry()
    # All but what is about data alone.
    assert labels(found) == sorted(label for label in jobs if not label.startswith("overlap "))
    assert ids(found).isdisjoint(made(jobs))


def test_f_new_method(checkout: Project, jobs: dict[str, Job]) -> None:
    """f) A YAML and its name in the preset: only its jobs, sharing data and sensitivity."""
    checkout.path("config/methods/our_own.yaml").write_text(
        "extends: tlora\noptions: {variant: released}\n"
    )
    checkout.edit(MINI, "pissa, tlora]", "pissa, tlora, our_own]")
    found = checkout.dry()
    expected = ["allocate tiny/arithmetic/tlora", "initialize tiny/arithmetic/tlora"]
    assert labels(found) == sorted([*expected, *runs("our_own"), *GRID])
    assert ids(found).isdisjoint(made(jobs))


def test_f_method_left_out(checkout: Project) -> None:
    """f) The other way round: only the tables."""
    checkout.edit(MINI, "pissa, tlora]", "pissa]")
    assert labels(checkout.dry()) == sorted(GRID)


def test_g_two_values_swapped(checkout: Project, jobs: dict[str, Job]) -> None:
    """g) The same values under exchanged names are other runs."""
    checkout.edit("config/tasks/arithmetic.yaml", "warmup_ratio: ", "warmup_ratio: 0.5  # ")
    checkout.edit("config/tasks/arithmetic.yaml", "weight_decay: 0.0", "weight_decay: 0.25")
    first = checkout.dry()
    checkout.edit("config/tasks/arithmetic.yaml", "warmup_ratio: 0.5", "warmup_ratio: 0.25")
    checkout.edit("config/tasks/arithmetic.yaml", "weight_decay: 0.25", "weight_decay: 0.5")
    swapped = checkout.dry()
    assert labels(first) == labels(swapped) == sorted([*runs(*METHODS), *GRID])
    assert ids(first).isdisjoint(ids(swapped))
    assert (ids(first) | ids(swapped)).isdisjoint(made(jobs))


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("allocation.py", "allocate"),
        ("sensitivity.py", "calibrate"),
        ("methods/tlora.py", "initialize"),
    ],
)
def test_h_sources_of_one_method(
    checkout: Project, jobs: dict[str, Job], source: str, first: str
) -> None:
    """h) The allocation: only the method that allocates and what follows; its other parts alike."""
    checkout.append(f"tlora/{source}", "\n# changed\n")
    found = checkout.dry()
    chain = [
        "calibrate tiny/arithmetic/sensitivity",
        "allocate tiny/arithmetic/tlora",
        "initialize tiny/arithmetic/tlora",
    ]
    while not chain[0].startswith(first):
        del chain[0]
    assert labels(found) == sorted([*chain, *runs("tlora"), *TABLES])
    assert ids(found) <= made(jobs)


def test_i_back_to_an_earlier_setting(checkout: Project) -> None:
    """i) Nothing was run in between: nothing to do."""
    preset = checkout.path(MINI).read_text()
    checkout.append("config/methods/pissa.yaml", "options: {niter: 4}\n")
    checkout.append(MINI, "hyperparameters: own\n")
    assert checkout.dry() != []
    checkout.edit("config/methods/pissa.yaml", "options: {niter: 4}\n", "")
    checkout.path(MINI).write_text(preset)
    assert checkout.dry() == []


@pytest.mark.slow
def test_i_back_after_a_run_of_another_setting(checkout: Project, jobs: dict[str, Job]) -> None:
    """i) Both settings' work lies side by side; only the table, which shows one, is built again."""
    before = checkout.state()
    checkout.edit(MINI, "max_new_tokens: 4", "max_new_tokens: 3")
    checkout.edit(MINI, "[full, lora, pissa, tlora]", "[lora]")
    evaluations = [
        f"{stage} tiny/arithmetic/{method}/arithmetic"
        for method in ("lora", "base")
        for stage in ("generate", "score")
    ]
    assert labels(checkout.dry()) == sorted([*evaluations, *GRID])
    checkout.snakemake()
    assert checkout.dry() == []

    checkout.edit(MINI, "max_new_tokens: 3", "max_new_tokens: 4")
    checkout.edit(MINI, "[lora]", "[full, lora, pissa, tlora]")
    assert labels(checkout.dry()) == sorted(GRID)
    work = {name: state for name, state in before.items() if name.split("/")[1] in STAGES}
    after = checkout.state()
    assert {name: after.get(name) for name in work} == work


STAGES = (
    *("prepare", "overlap", "calibrate", "allocate", "initialize", "train", "export"),
    *("check", "generate", "score"),
)


@pytest.mark.slow
def test_j_second_preset(checkout: Project, jobs: dict[str, Job]) -> None:
    """j) Equal work is shared, the first preset's results stay as they are, byte and time."""
    text = checkout.path(MINI).read_text()
    second = text.replace("[full, lora, pissa, tlora]", "[tlora, lora]")
    checkout.path("config/second.yaml").write_text(second)
    assert labels(checkout.dry(preset="config/second.yaml")) == sorted(GRID)
    before = checkout.state()
    checkout.snakemake(preset="config/second.yaml")
    after = checkout.state()
    shared = {name for name in before if name.split("/")[1] in (*STAGES, "comparison")}
    assert {name: after.get(name) for name in shared} == {name: before[name] for name in shared}
    new = {name.rsplit("/", 1)[0].split("/plots")[0] for name in set(after) - set(before)}
    assert "results/comparison/second" in new
    assert all(name.split("/")[1] not in STAGES for name in new)
    assert checkout.dry(preset="config/second.yaml") == []
    assert checkout.dry() == []


def test_jobs_are_named_for_people_and_identified_by_content(
    finished: Project, jobs: dict[str, Job]
) -> None:
    """The specs in the commands are canonical JSON without names, labels and paths."""
    for job in jobs.values():
        if job.id:
            text = job.arguments[job.arguments.index("--spec") + 1]
            spec = json.loads(text)
            assert json.dumps(spec, sort_keys=True, separators=(",", ":")) == text
            assert "resources/tiny" not in text
            assert "label" not in text
