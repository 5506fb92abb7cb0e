"""Pictures: the values behind them, files in both forms, and all that can be missing."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.grid_tree import PROJECTIONS, labels_of, make_grid, write

from tlora.comparison import collect, plots
from tlora.comparison.plots import loss, modules, pareto, scores, style, subspaces
from tlora.peft_folder import WEIGHTS, Stored, write_tensors


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All pictures of a grid of 2 tasks, 3 methods and 2 seeds, with adapters and verdicts."""
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        grid = make_grid(Path("results"), methods=("lora", "pissa", "tlora"), steps=40, layers=2)
        judge(grid)
        add_adapters(grid)
        return SimpleNamespace(pictures=draw(grid), folder=root / "plots", root=root, grid=grid)


def draw(grid: Path, folder: str = "plots") -> list[plots.Picture]:
    return plots.draw(collect.load(grid, labels_of(grid)), Path(folder))


def edit(path: Path | str, change: Callable[[dict], object]) -> None:
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


def judge(grid: Path, items: int = 60) -> None:
    """Give every score verdicts on single items."""
    for cell in json.loads(grid.read_text())["cells"]:
        for path in cell["scores"].values():
            verdicts = [random.Random(f"{path}{n}").random() < 0.5 for n in range(items)]
            found = [{"id": str(n), "correct": v, "extracted": "x"} for n, v in enumerate(verdicts)]
            value = sum(verdicts) / items
            edit(path, lambda s, f=found, v=value: s.update(n=len(f), value=v, items=f))


def add_adapters(grid: Path, rank: int = 3) -> None:
    """Give every run trained weights, and the same exported."""

    def change(content: dict) -> None:
        for cell in content["cells"]:
            if cell["base"]:
                continue
            draw = np.random.default_rng(cell["seed"])
            tensors = {}
            for layer in range(2):
                for name in PROJECTIONS[:2]:
                    stem = f"base_model.model.model.layers.{layer}.{name}"
                    for side, shape in (("A", (rank, 12)), ("B", (10, rank))):
                        values = draw.standard_normal(shape).astype("<f4")
                        tensors[f"{stem}.lora_{side}.weight"] = Stored.of(values, "F32")
            for folder in (Path(cell["train"]).parent, Path(cell["train"]).parent / "export"):
                (folder / "weights").mkdir(parents=True)
                write_tensors(folder / "weights" / WEIGHTS, tensors)
            cell["export"] = write(folder / "export.json", {"files": {WEIGHTS: ""}})

    edit(grid, change)


def names(pictures: list[plots.Picture], task: str) -> list[str]:
    """Return the pictures of a task: what they show, and of which method."""
    mine = [Path(p.path) for p in pictures if p.task == task]
    assert all(path.parent.name == task for path in mine)
    parts = [path.stem.split("__") for path in mine]
    assert all(model == "tiny" for _, model, _ in parts)
    return sorted(f"{kind} {method}" for kind, _, method in parts)


# ---------------------------------------------------------------- files


@pytest.mark.slow
def test_every_picture_is_written_as_png_and_pdf(demo: SimpleNamespace) -> None:
    first = [
        "accuracy-arithmetic_test all",
        "loss all",
        *(f"pareto-{cost}-arithmetic_test all" for cost in sorted(pareto.COSTS)),
        "ranks tlora",
        "similarity-A all",
        "similarity-B all",
    ]
    second = [name.replace("arithmetic_test", "choice_test") for name in first]
    second += ["overlap-arithmetic tlora", "ranks-minus-arithmetic tlora"]
    second += ["similarity-to-arithmetic all"]
    assert names(demo.pictures, "arithmetic") == first
    assert names(demo.pictures, "choice") == sorted(second)
    written = {p.relative_to(demo.folder).as_posix() for p in demo.folder.rglob("*.*")}
    assert written == {p.path for p in demo.pictures} | {p.pdf for p in demo.pictures}
    for picture in demo.pictures:
        data = (demo.folder / picture.path).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert width == round(3.3 * 300) and height > 300
        pdf = (demo.folder / picture.pdf).read_bytes()
        assert pdf.startswith(b"%PDF") and pdf.rstrip().endswith(b"%%EOF")
        assert b"CreationDate" not in pdf and b"/Type3" not in pdf
        assert picture.title and picture.description.endswith(".")


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("tlora",), steps=5, layers=2)
    for folder in ("one", "other"):
        draw(grid, folder)
    first = sorted(path for path in Path("one").rglob("*.*"))
    assert len(first) >= 12
    for path in first:
        assert path.read_bytes() == Path("other", *path.parts[1:]).read_bytes()


@pytest.mark.slow
def test_letters_are_7_points_or_more(demo: SimpleNamespace, monkeypatch) -> None:
    """Of every text in every picture, at a column's width."""
    from matplotlib.text import Text

    sizes = []

    def look(figure, path: Path) -> None:
        figure.draw_without_rendering()
        sizes.extend(t.get_fontsize() for t in figure.findobj(Text) if t.get_text())
        assert figure.get_size_inches()[0] == style.WIDTH

    monkeypatch.chdir(demo.root)
    monkeypatch.setattr(style, "save", look)
    draw(demo.grid)
    assert len(sizes) > 300 and min(sizes) >= 7


# ---------------------------------------------------------------- what may be missing


@pytest.mark.slow
def test_one_seed_and_no_tlora(here: Path) -> None:
    grid = make_grid(Path("results"), methods=("full", "lora"), seeds=(1,), steps=3)
    judge(grid)
    found = names(draw(grid), "choice")
    assert "loss all" in found and "accuracy-choice_test all" in found
    assert not [name for name in found if name.startswith(("ranks", "similarity", "overlap"))]


@pytest.mark.slow
def test_failed_rows_and_missing_artefacts(here: Path) -> None:
    """Each in turn, down to nothing at all."""
    grid = make_grid(Path("results"), tasks=("choice",), steps=3, layers=2)
    add_adapters(grid)
    cells = {c["method"]: c for c in json.loads(grid.read_text())["cells"] if c["seed"] != 2}
    edit(grid, lambda g: [c.update(failed="no memory") for c in g["cells"] if c["seed"] == 2])
    pissa = cells["pissa"]
    Path(pissa["train"]).parent.joinpath("weights", WEIGHTS).write_bytes(b"torn")
    Path(cells["full"]["train"]).parent.joinpath("log.jsonl").unlink()
    (accuracy,) = [p for p in draw(grid) if "accuracy" in p.path]
    assert "TLoRA" in accuracy.description
    Path(cells["lora"]["scores"]["choice_test"]).unlink()
    Path(cells["tlora"]["allocation"]).unlink()
    pictures = draw(grid)
    (accuracy,) = [p for p in pictures if "accuracy" in p.path]
    assert "LoRA: none" in accuracy.description
    assert not [p for p in pictures if "ranks" in p.path]
    shutil.rmtree("results/score")
    assert not [p for p in draw(grid) if "accuracy" in p.path or "pareto" in p.path]
    shutil.rmtree("results/train")
    assert draw(grid) == []


@pytest.mark.slow
def test_labels_of_any_kind(here: Path) -> None:
    nasty = r"50% & _x_ $1 \b {a}"
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "tlora"), steps=3)
    kinds = {"models": "tiny", "tasks": "choice", "methods": "tlora", "benchmarks": "choice_test"}
    labels = {kind: {name: nasty * 3} for kind, name in kinds.items()}
    assert plots.draw(collect.load(grid, labels), Path("plots"))


@pytest.mark.slow
def test_rows_of_one_method_have_files_of_their_own(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("tlora",), layers=2, steps=3)

    def change(content: dict) -> None:
        for cell in content["cells"][2:]:
            copy = Path(cell["allocation"]).with_name("other.json")
            shutil.copy(cell["allocation"], copy)
            edit(copy, lambda a: a["modules"]["model.layers.0.self_attn.q_proj"].update(rank=99))
            cell.update(label="TLoRA, 16/x", seed=1, allocation=str(copy))

    edit(grid, change)
    found = [name for name in names(draw(grid), "choice") if name.startswith("ranks")]
    assert found == ["ranks TLoRA", "ranks TLoRA,-16-x"]


# ---------------------------------------------------------------- the values


def test_pareto_front_of_known_points() -> None:
    costs_, values = [1, 2, 3, 4, 5], [10, 30, 20, 30, 40]
    assert pareto.front(costs_, values) == [0, 1, 4]
    assert pareto.front([2, 2, 1], [5, 5, 5]) == [2]
    assert pareto.front([1, 1], [5, 5]) == [0, 1]
    assert pareto.front([], []) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_no_point_of_the_front_is_beaten_and_every_other_is(points) -> None:
    costs_, values = zip(*points, strict=True)
    front = pareto.front(costs_, values)
    assert front

    def beaten(place: int) -> bool:
        own = points[place]
        return any(c <= own[0] and v >= own[1] and (c, v) != own for c, v in points)

    assert sorted(front) == [place for place in range(len(points)) if not beaten(place)]


@pytest.mark.slow
def test_pareto_pictures_show_the_costs(demo: SimpleNamespace) -> None:
    mine = [p for p in demo.pictures if p.task == "choice" and "pareto" in p.path]
    told = {Path(p.path).stem.split("-")[1]: p.description for p in mine}
    assert "TLoRA" in told["parameters"] and "at 3.48e+04" in told["parameters"]
    assert "on the front" in told["time"]


def test_axes_of_scores_end_where_shares_do() -> None:
    wide = scores.Interval(50.0, 245.0, 40.0, 60.0)
    narrow = scores.Interval(55.0, 3.0, None, None)
    low, high, cut = scores.limits([wide, narrow], True)
    assert cut and -10 < low <= 0 and 100 <= high < 110
    low, high, cut = scores.limits([narrow], True)
    assert not cut and low == pytest.approx(52 - 0.24) and high == pytest.approx(58.24)
    low, high, cut = scores.limits([scores.Interval(7.0, 100.0, 6.0, 8.0)], False)
    assert cut and low < 6 and high > 8 and high - low < 20


def row_of(method: str, **settings) -> collect.Row:
    run = SimpleNamespace(settings=settings)
    return collect.Row("m", "t", method, method, False, (run,))


def test_rows_that_differ_in_one_setting_make_a_curve() -> None:
    rows = [
        row_of("lora", rank=8, calibration_samples=32, lr=1),
        row_of("tlora(rank=16)", rank=16, lora_alpha=16, calibration_samples=32, lr=1),
        row_of("tlora(rank=8)", rank=8, lora_alpha=8, calibration_samples=32, lr=1),
        row_of("tlora(rank=4,lr=2)", rank=4, lora_alpha=4, calibration_samples=32, lr=2),
        row_of("tlora(calibration_samples=2)", rank=8, lora_alpha=8, calibration_samples=2, lr=1),
    ]
    assert scores.varied(rows, "rank") == [[(8, 2), (16, 1)]]
    assert scores.varied(rows, "calibration_samples") == [[(2, 4), (32, 2)]]
    assert scores.varied(rows[:1], "rank") == []


def test_tuned_settings_may_differ_along_a_curve() -> None:
    choice = collect.Choice("accuracy", True, (), ({"lr": 1}, {"lr": 2}), (0.1, 0.2), 1, {})
    rows = [row_of("tlora(rank=8)", rank=8, lr=1), row_of("tlora(rank=16)", rank=16, lr=2)]
    assert scores.varied(rows, "rank") == []
    tuned = [collect.Row(*("m", "t", r.method, "", False), r.runs, choice) for r in rows]
    assert scores.varied(tuned, "rank") == [[(8, 0), (16, 1)]]


def test_ablations_are_drawn(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "tlora"), steps=3)

    def change(content: dict) -> None:
        for method, place in (("lora", 0), ("tlora", 1)):
            mine = [c for c in content["cells"] if c["method"] == method]
            for cell, rank in zip(mine, (4, 8), strict=True):
                settings = cell["settings"] | {"rank": rank, "calibration_samples": 32 * place}
                cell.update(method=f"{method}(rank={rank})", seed=1, settings=settings)
                cell.update(label=f"{method.upper()} (rank = {rank})")

    edit(grid, change)
    (picture,) = [p for p in draw(grid) if "ablation" in p.path]
    assert Path(picture.path).name == "ablation-rank-choice_test__tiny__all.png"
    assert {part.partition(":")[0] for part in picture.description.split("; ")} == {"LORA", "TLORA"}


def test_smoothing_is_centred_and_keeps_lines() -> None:
    line = [float(value) for value in range(10)]
    assert loss.smooth(line, 5) == line
    assert loss.smooth([0.0, 3.0, 0.0], 3) == [0.0, 1.0, 0.0]


def test_curves_and_bands_use_the_steps_that_all_seeds_have() -> None:
    curves = [([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [4.0, 5.0, 6.0])]
    assert loss.mean_curve(curves) == ([2, 3], [3.0, 4.0])
    assert loss.band(curves) == ([2, 3], [2.0, 3.0], [4.0, 5.0])


@given(st.lists(st.sampled_from([10.0, 10.2, 500.0]), min_size=1, max_size=14))
def test_dodging_separates_without_going_far(values: list[float]) -> None:
    moved = style.dodge(values)
    assert len(set(moved)) == len(moved)
    assert all(1 / 1.3 < new / old < 1.3 for new, old in zip(moved, values, strict=True))


# ---------------------------------------------------------------- modules


def test_ranks_by_layer_and_projection() -> None:
    ranks = {
        f"model.layers.{layer}.{name}": layer + place
        for layer in (0, 2, 10)
        for place, name in enumerate(PROJECTIONS)
    }
    ranks["lm_head"] = 5
    layers, projections, values = modules.rank_grid(ranks)
    assert layers == ["0", "2", "10", "other"]
    assert projections == [*(name.split(".")[1] for name in PROJECTIONS), "lm_head"]
    assert values[2][:7] == [10, 11, 12, 13, 14, 15, 16] and values[2][7] is None
    assert values[3] == [None] * 7 + [5]


def test_ranks_of_an_encoder_and_decoder() -> None:
    ranks = {
        "encoder.block.0.layer.0.SelfAttention.q": 1,
        "decoder.block.0.layer.0.SelfAttention.q": 2,
        "decoder.block.0.layer.1.EncDecAttention.q": 3,
        "decoder.block.0.layer.2.DenseReluDense.wi": 4,
    }
    layers, projections, values = modules.rank_grid(ranks)
    assert layers == ["decoder 0", "encoder 0"]
    assert projections == ["SelfAttention.q", "EncDecAttention.q", "DenseReluDense.wi"]
    assert values == [[2, 3, 4], [1, None, None]]


def test_ranks_of_varying_calibrations_are_averaged(tmp_path: Path) -> None:
    runs = []
    for seed, rank in ((1, 4), (2, 7)):
        path = tmp_path / str(seed) / "allocation.json"
        write(path, {"modules": {"layers.0.q": {"rank": rank}}})
        cell = {"model": "m", "task": "t", "method": "tlora", "seed": seed, "spec_id": str(seed)}
        cell |= {"scores": {}, "allocation": str(path), "train": None}
        runs.append(collect.load_run(cell, []))
    row = collect.Row("m", "t", "tlora", "TLoRA", False, tuple(runs))
    assert modules.module_means(row) == ({"layers.0.q": 5.5}, 2)


@pytest.mark.slow
def test_differences_are_this_task_minus_the_first(demo: SimpleNamespace) -> None:
    """In the made-up allocations the second task's ranks are 13 higher, modulo 32."""
    (picture,) = [p for p in demo.pictures if "ranks-minus" in p.path]
    assert picture.path.startswith("choice/")
    values = [float(v) for v in _numbers(picture.description)]
    assert len(values) == 14 and set(values) == {13.0, -19.0}


def _numbers(description: str) -> list[str]:
    lines = [line.partition(": ")[2] for line in description.rstrip(".").split("; ")]
    return [part.rpartition(" ")[2] for line in lines for part in line.split(", ")]


@pytest.mark.slow
def test_equal_allocations_need_no_picture(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("tlora",), steps=3, layers=2)
    path = json.loads(grid.read_text())["cells"][1]["allocation"]
    edit(path, lambda a: [m.update(rank=8) for m in a["modules"].values()])
    assert not [p for p in draw(grid) if "ranks" in p.path or "sensitivity" in p.path]
    other = {"rank": 0, "scaling": 3.0, "sensitivity": 0.01}
    edit(path, lambda a: a["modules"]["model.layers.0.mlp.up_proj"].update(other))
    found = names(draw(grid), "choice")
    assert {"ranks tlora", "scalings tlora", "sensitivity tlora"} <= set(found)


# ---------------------------------------------------------------- subspaces


@pytest.mark.slow
def test_similarities_of_the_made_up_adapters(demo: SimpleNamespace) -> None:
    """Equal seeds have equal adapters there, so only the compared seeds matter."""
    told = {p.path: p.description for p in demo.pictures}
    matrix = dict(
        part.rsplit(" ", 1)
        for part in told["arithmetic/similarity-A__tiny__all.png"].rstrip(".").split("; ")
    )
    assert len(matrix) == 6 and len(set(matrix.values())) == 1
    assert 0.1 < float(matrix["TLoRA and LoRA"]) < 0.5
    between = told["choice/similarity-to-arithmetic__tiny__all.png"]
    assert matrix["TLoRA and TLoRA"] in between
    overlap = told["choice/overlap-arithmetic__tiny__tlora.png"]
    assert len(overlap.split("; ")) == 4


def test_one_seed_compares_equal_seeds_and_says_so(here: Path, monkeypatch) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "pissa"), seeds=(1,))
    add_adapters(grid)
    notes = []
    monkeypatch.setattr(subspaces, "caption", lambda figure, title, note: notes.append(note))
    (picture,) = [p for p in draw(grid) if "similarity-A" in p.path]
    assert picture.description == "PiSSA and LoRA 1.000."
    assert "one seed" in notes[0]
