"""From a preset to units of work: ids, shared work, effective values and where they come from."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tlora import spec
from tlora.errors import UserError
from tlora.plan import MAIN, Plan

MODULES = {"q_proj": (32, 32), "v_proj": (16, 32), "down_proj": (32, 48)}
FILES = {
    "models/tiny": {"path": "base", "micro_batch": 8},
    "tasks/sums": {
        "source": "arithmetic",
        "data": {"train": 20, "validation": 2, "test": 5},
        "prompt": "{instruction}",
        "rank": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 0.001,
        "batch_size": 8,
        "benchmarks": ["sums"],
    },
    "methods/full": {"implementation": "full"},
    "methods/lora": {"implementation": "lora", "training": {"learning_rate": 0.5}},
    "methods/pissa": {"implementation": "pissa"},
    "methods/tlora": {"implementation": "tlora"},
    "benchmarks/sums": {
        "source": "arithmetic",
        "data": {"test": 5},
        "implementation": "gsm8k",
        "max_new_tokens": 8,
    },
    "p": {"models": ["tiny"], "tasks": ["sums"], "methods": ["lora", "tlora"], "seeds": [1]},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model's files and a configuration."""
    monkeypatch.chdir(tmp_path)
    base("base")
    for name, values in FILES.items():
        write(name, **values)
    return tmp_path


def base(name: str, content: bytes = b"") -> None:
    """Write what identifies a model: a configuration and the header of its weights."""
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    header = json.dumps(
        {
            f"model.layers.0.{module}.weight": {"dtype": "F32", "shape": shape}
            for module, shape in MODULES.items()
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content)


def write(name: str, drop: tuple[str, ...] = (), **values: Any) -> None:
    """Write a YAML of the configuration: the usual one with some values changed."""
    path = Path("config", f"{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**FILES.get(name, {}), **values}
    for key in drop:
        del merged[key]
    path.write_text(yaml.safe_dump(merged, sort_keys=False))


def plan(**command_line: Any) -> Plan:
    """Plan the preset."""
    return Plan([Path("config/p.yaml")], command_line)


def ids(found: Plan | None = None) -> set[tuple[str, str]]:
    """Return stage and id of every unit."""
    return set((found or plan()).units)


def stages(keys: set[tuple[str, str]]) -> list[str]:
    """Return the stages of some units, sorted."""
    return sorted(stage for stage, _ in keys)


def message(**command_line: Any) -> str:
    """Return the one line that refuses the preset."""
    with pytest.raises(UserError) as caught:
        plan(**command_line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=5))
def test_canonical_text_is_one(content: dict) -> None:
    """The order of keys is no part of it, and it reads back as it was."""
    text = spec.canonical(content)
    turned = dict(reversed(content.items()))
    assert spec.canonical(turned) == text
    assert json.loads(text) == content
    assert spec.canonical(json.loads(text)) == text
    assert spec.spec_id(turned) == spec.spec_id(content)
    assert len(spec.spec_id(content)) == 12


@given(st.dictionaries(st.text(), values, min_size=2, max_size=5), st.data())
def test_two_values_swapped_are_another_id(content: dict, data: st.DataObject) -> None:
    """Names belong to values."""
    one, other = data.draw(st.permutations(sorted(content)))[:2]
    swapped = {**content, one: content[other], other: content[one]}
    equal = spec.canonical(swapped) == spec.canonical(content)
    assert (spec.spec_id(swapped) == spec.spec_id(content)) == equal


def test_numbers_that_json_has_no_words_for_are_refused() -> None:
    """NaN would be another text in another library."""
    with pytest.raises(ValueError, match="JSON"):
        spec.canonical({"a": float("nan")})


def test_units_of_a_small_grid() -> None:
    """One unit for equal work, whatever asks for it."""
    write("p", seeds=[1, 2], methods=["full", "lora", "pissa", "tlora"])
    found = plan()
    count = {stage: len(found.of(stage)) for stage in MAIN}
    assert count == {
        "download": 0,
        "prepare": 1,
        "overlap": 1,
        "calibrate": 1,
        "allocate": 1,
        "initialize": 2,
        "train": 8,
        "export": 8,
        "check": 8,
        "generate": 9,
        "score": 9,
        "choose": 0,
    }
    assert len(found.cells) == 9
    assert [cell.base for cell in found.cells].count(True) == 1


def test_paths_hold_names_and_the_id() -> None:
    """For people: stage, model, task, method; the id says what it is."""
    (train,) = (unit for unit in plan().of("train") if unit.names[-1] == "lora")
    assert train.main == Path("results/train/tiny/sums/lora", train.id, "train.json")
    assert train.id == spec.spec_id({"stage": "train", **train.spec})


def test_specs_are_plain_and_hold_no_names() -> None:
    """Builtins only; neither labels nor paths nor the names of files in config/."""
    write("tasks/sums", label="A label")
    write("p", methods=["full", "lora", "pissa", "tlora"], data_root=None)
    for unit in plan().units.values():
        text = spec.canonical(unit.spec)
        assert json.loads(text) == unit.spec
        for name in ("A label", "base", "config", "results", "tiny", "sums", "micro_batch"):
            assert f'"{name}' not in text.replace('"base"', ""), (unit.stage, name, text)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tasks/sums", {"label": "Another"}),
        ("methods/tlora", {"label": "Another", "paper": "x"}),
        ("models/tiny", {"label": "Another", "micro_batch": 2}),
        ("benchmarks/sums", {"label": "Another"}),
        ("tasks/sums", {"weight_decay": 0.0, "max_grad_norm": 1}),
        ("tasks/sums", {"lora_alpha": 8.0}),
        ("methods/tlora", {"options": {"variant": "paper"}}),
        ("methods/lora", {"training": {"learning_rate": 0.7}}),
    ],
)
def test_what_changes_no_result_changes_no_id(name: str, changes: dict) -> None:
    """Labels, placement, defaults written out, whole numbers as floats, values not in use."""
    before = ids()
    write(name, **changes)
    assert ids() == before


@pytest.mark.parametrize(
    ("name", "changes", "changed"),
    [
        ("tasks/sums", {"learning_rate": 0.002}, ["train"] * 2),
        ("tasks/sums", {"target_modules": ["q_proj"]}, ["allocate", "calibrate"]),
        ("tasks/sums", {"rank": 2}, ["allocate", "initialize", "train", "train"]),
        (
            "tasks/sums",
            {"calibration_samples": 3},
            ["calibrate", "allocate", "initialize", "train"],
        ),
        ("tasks/sums", {"max_length": 64}, ["prepare", "calibrate", "train", "train"]),
        (
            "methods/tlora",
            {"options": {"variant": "released"}},
            ["allocate", "initialize", "train"],
        ),
        ("benchmarks/sums", {"max_new_tokens": 9}, ["generate"] * 3),
        ("benchmarks/sums", {"implementation": "choice"}, ["score"] * 3),
        ("p", {"calibration_seed": 1}, ["calibrate", "allocate", "initialize", "train"]),
        ("p", {"set": {"seed": 1}}, None),
    ],
)
def test_what_changes_a_result_changes_the_ids_from_there_on(
    name: str, changes: dict, changed: list[str] | None
) -> None:
    """And no others: a stage's id holds the ids of what it is made from."""
    before = ids()
    write(name, **changes)
    if changed is None:
        assert "unknown key" in message()
        return
    new = stages(ids() - before)
    for stage in set(changed):
        assert new.count(stage) >= changed.count(stage), new
    order = list(MAIN)
    first = min(order.index(stage) for stage in changed)
    assert {stage for stage in new if order.index(stage) < first} == set()


def test_swapped_values_are_another_run() -> None:
    """The same values under exchanged names."""
    write("tasks/sums", warmup_ratio=0.5, weight_decay=0.25)
    one = ids()
    write("tasks/sums", warmup_ratio=0.25, weight_decay=0.5)
    assert stages(ids() - one) == sorted(["train", "export", "check", "generate", "score"] * 2)


def test_model_is_its_content() -> None:
    """Another folder, notes beside it: the same. One byte more: another."""
    before = ids()
    Path("base").rename("moved")
    Path("moved/README.md").write_text("a note")
    write("models/tiny", path="moved")
    assert ids() == before
    base("other", b"x")
    write("models/tiny", path="other")
    assert {stage for stage, _ in ids() & before} == {"overlap"}  # about data alone


def test_adding_a_method_or_seed_keeps_all_other_ids() -> None:
    """A grid grows without doing anything again."""
    before = ids()
    write("p", seeds=[1, 2], methods=["lora", "tlora", "pissa"])
    assert ids() > before
    new = stages(ids() - before)
    assert new.count("train") == 4
    assert new.count("initialize") == 1
    assert "prepare" not in new


@pytest.mark.parametrize("methods", [["full"], ["lora", "tlora"]])
def test_runs_of_several_seeds_are_those_of_each_seed_alone(methods: list[str]) -> None:
    """What a row's runs share is worked out once: also places, inputs and the seed of each."""

    def seen(*seeds: int) -> dict[tuple[str, str], tuple]:
        found = plan(methods=methods, seeds=list(seeds))
        assert [c.seed for c in found.cells] == [None, *[s for _ in methods for s in seeds]]
        return {
            key: (unit.placement, unit.names, {name: one.id for name, one in unit.inputs.items()})
            for key, unit in found.units.items()
        }

    assert seen(1, 2, 3) == seen(1) | seen(2) | seen(3)


def test_calibration_is_shared_by_all_methods_of_a_task(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second variant of a method adds no calibration, nor does another seed."""
    monkeypatch.chdir(root)

    def calibrations(methods: list[str], seeds: list[int]) -> list[str]:
        found = Plan(
            [Path("config/all_methods.yaml")], {"methods": methods, "seeds": seeds, "overrides": []}
        )
        return sorted(unit.spec["statistic"] for unit in found.of("calibrate"))

    assert calibrations(["lora", "pissa"], [1]) == []
    assert calibrations(["tlora"], [1]) == ["sensitivity"]
    assert calibrations(["tlora", "tlora_unfrozen", "tlora_rank"], [1, 2]) == ["sensitivity"]
    assert calibrations(["corda", "corda_kpm"], [1, 2]) == ["covariance"]
    library = sorted(path.stem for path in Path("config/methods").glob("*.yaml"))
    assert calibrations(library, [1, 2]) == ["covariance", "gradient", "sensitivity"]


def test_grid_is_without_labels_and_names_every_file() -> None:
    """What `compare` gets changes with the work, not with what things are called."""
    before = plan().grid()
    write("tasks/sums", label="Another")
    write("methods/lora", label="Another")
    assert plan().grid() == before
    assert [cell["method"] for cell in before["cells"]] == ["base", "lora", "tlora"]
    tlora = before["cells"][2]
    assert tlora["train"].startswith("results/train/tiny/sums/tlora/")
    assert tlora["allocation"].endswith("/allocation.json")
    assert set(tlora["scores"]) == {"sums"}
    assert json.loads(json.dumps(before)) == before


# -- effective values and their origin -------------------------------------------------------------


def effective(key: str, method: str = "lora", **command_line: Any) -> tuple[Any, str]:
    """Return a value of a cell and where it comes from."""
    found = plan(**command_line)
    (row,) = (row for row in found.rows if row.name == method)
    setting = found.settings("tiny", "sums", row)[key]
    return setting.value, setting.source


def test_precedence_and_origin() -> None:
    """Task < method (with own) < overrides < set < command line, each with file and line."""
    assert effective("learning_rate") == (0.001, "config/tasks/sums.yaml:12")
    assert effective("weight_decay") == (0.0, "default")
    write("p", hyperparameters="own")
    assert effective("learning_rate") == (0.5, "config/methods/lora.yaml:3")
    override = {"methods": ["lora"], "set": {"learning_rate": 0.25}}
    write("p", hyperparameters="own", overrides=[override])
    value, source = effective("learning_rate")
    assert value == 0.25
    line = Path("config/p.yaml").read_text().splitlines().index("    learning_rate: 0.25") + 1
    assert source == f"config/p.yaml:{line}"
    assert effective("learning_rate", "tlora")[0] == 0.001
    write("p", hyperparameters="own", overrides=[override], set={"learning_rate": 0.125})
    assert effective("learning_rate")[0] == 0.125
    given = {"set": {"learning_rate": 0.1}}
    assert effective("learning_rate", **given) == (0.1, "--config")


def test_options_are_settings_too() -> None:
    """Under `options.`, from the method's file, an override or the default."""
    assert effective("options.variant", "tlora") == ("paper", "default")
    write("methods/tlora", options={"variant": "released"})
    assert effective("options.variant", "tlora") == ("released", "config/methods/tlora.yaml:3")
    write("p", overrides=[{"methods": ["tlora"], "set": {"options.center": True}}])
    assert effective("options.center", "tlora")[0] is True


def test_vary_makes_a_row_of_each_value() -> None:
    """Each is a row of its own, named and labelled by its value; others stay one row."""
    write("p", vary=[{"methods": ["tlora"], "calibration_samples": [2, 4]}])
    found = plan()
    names = ["lora", "tlora(calibration_samples=2)", "tlora(calibration_samples=4)"]
    assert [row.name for row in found.rows] == names
    assert len(found.of("calibrate")) == 2
    assert len({row.label for row in found.rows}) == 3
    assert effective("calibration_samples", names[2])[0] == 4


def test_several_grids_are_one_comparison() -> None:
    """Each with its own lists; what it leaves out is the preset's; a cell stands once."""
    write("tasks/more", **yaml.safe_load(Path("config/tasks/sums.yaml").read_text()))
    write(
        "p",
        drop=("tasks",),
        grids=[
            {"tasks": ["sums", "more"], "methods": ["full", "lora"]},
            {"tasks": ["sums"], "methods": ["lora", "tlora"], "seeds": [1, 2]},
            {"tasks": ["sums"], "vary": [{"methods": ["tlora"], "rank": [2, 4]}]},
        ],
    )
    found = [(cell.task, cell.row.name, cell.seed) for cell in plan().cells]
    assert len(found) == len(set(found))
    sums = {(name, seed) for task, name, seed in found if task == "sums"}
    assert {name for task, name, seed in found if task == "more"} == {"base", "full", "lora"}
    assert {("lora", 1), ("lora", 2), ("tlora", 2), ("tlora(rank=2)", 1)} <= sums
    write("p", grids=[{"methods": ["lor"]}])
    assert "did you mean 'lora'?" in message() and "p.yaml" in message()


def test_data_sizes_are_set_by_the_preset() -> None:
    """`data.*` reaches the task's source, and a benchmark's by an override that names it."""
    override = {"benchmarks": ["sums"], "set": {"data.test": 3, "max_new_tokens": 2}}
    write("p", set={"data.train": 10}, overrides=[override])
    found = plan()
    assert found.of("prepare")[0].spec["data"]["train"] == 10
    benchmark = found.of("generate")[0].spec["benchmark"]
    assert (benchmark["data"]["test"], benchmark["max_new_tokens"]) == (3, 2)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("p", {"methods": ["lroa"]}, "config/p.yaml:6: methods: 'lroa': no method of this name"),
        ("p", {"methods": ["lora", "lora"]}, "config/p.yaml:7: methods: 'lora': stands twice"),
        (
            "p",
            {"set": {"rnk": 1}},
            "config/p.yaml:11: set.rnk: 1: unknown key; did you mean 'rank'?",
        ),
        ("p", {"set": {"rank": "4"}}, "config/p.yaml:11: rank: '4': expected a"),
        ("p", {"set": {"options.variant": "x"}}, "set.options.variant: 'x': unknown key"),
        (
            "p",
            {"overrides": [{"methods": ["tlora"], "set": {"options.variant": "x"}}]},
            "config/p.yaml:14: options.variant: 'x': expected 'paper' or 'released'",
        ),
        (
            "p",
            {"overrides": [{"methods": ["pissa"], "set": {"rank": 1}}]},
            "config/p.yaml:11: methods: 'pissa': not in this preset; known: lora, tlora",
        ),
        (
            "p",
            {"overrides": [{"benchmarks": ["sums"], "set": {"rank": 1}}]},
            "config/p.yaml:14: overrides.0.set.rank: 1: unknown key",
        ),
        (
            "p",
            {"overrides": [{"benchmarks": ["sums"], "set": {"limit": "x"}}]},
            "config/p.yaml:14: limit: 'x': expected a whole number",
        ),
        ("p", {"set": {"data.train": "x"}}, "config/p.yaml:11: data.train: 'x': expected a whole"),
        ("p", {"set": {"data.train": 0}}, "config/p.yaml:11: data.train: 0: expected 1 or more"),
        ("p", {"vary": [{"rank": 4}]}, "config/p.yaml:11: vary.rank: 4: expected a list"),
        ("p", {"data_root": "none"}, "config/p.yaml:10: data_root: 'none': expected a folder"),
        (
            "tasks/sums",
            {"rank": 17},
            "config/tasks/sums.yaml:7: rank: 17: expected at most 16, the",
        ),
        (
            "tasks/sums",
            {"target_modules": ["q_proj", "query"]},
            "config/tasks/sums.yaml:9: target_modules: 'query': no module of base has this name",
        ),
        (
            "models/tiny",
            {"micro_batch": 3},
            "config/models/tiny.yaml:2: micro_batch: 3: expected a",
        ),
        ("models/tiny", {"path": "./none"}, "config/models/tiny.yaml:1: path: './none': expected"),
        ("models/tiny", {"path": "a/b"}, "config/models/tiny.yaml:1: revision: None: expected the"),
        ("benchmarks/sums", {"implementation": "gsm"}, "did you mean 'gsm8k'?"),
        ("methods/tlora", {"options": {"variants": 1}}, "did you mean 'variant'?"),
    ],
)
def test_refused_with_file_line_key_and_value(name: str, changes: dict, expected: str) -> None:
    """Before any job, by whatever reads the preset."""
    write(name, **changes)
    assert expected in message()


def test_rank_is_checked_for_targeted_modules_only() -> None:
    """A small module that gets no adapter does not limit the rank."""
    write("tasks/sums", rank=17, target_modules=["q_proj", "down_proj"])
    assert plan().of("train")
    write("tasks/sums", rank=17, target_modules="all-linear")
    assert "expected at most 16" in message()
