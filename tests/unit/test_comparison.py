"""The comparison: numbers against hand-made ones, failures, forms, plots."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist, mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.grid_tree import labels_of, make_grid

from tlora.comparison import collect, statistics, tables
from tlora.errors import UserError
from tlora.stages.compare import compare


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison folder of a grid of 2 tasks, 4 methods and 2 seeds."""
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        grid = make_grid(Path("results"), steps=40)
        run(grid)
    return root / grid.parent


def rows_of(folder: Path, name: str = "table.csv") -> list[dict[str, str]]:
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def edit(grid: Path, change) -> None:
    content = json.loads(grid.read_text())
    change(content)
    grid.write_text(json.dumps(content))


def judge(grid: Path, levels: dict[str, float], items: int = 400) -> None:
    """Give every score verdicts on single items: right where ease and luck exceed the level."""

    def change(content: dict) -> None:
        for cell in content["cells"]:
            for benchmark, path in cell["scores"].items():
                ease, luck = random.Random(benchmark), random.Random(f"{cell['method']}{path}")
                right = NormalDist(0, 2**0.5).inv_cdf(levels[cell["method"]])
                verdicts = [ease.gauss(0, 1) + luck.gauss(0, 1) < right for _ in range(items)]
                value = sum(verdicts) / items
                found = [
                    {"id": f"{index}", "correct": verdict, "extracted": "x"}
                    for index, verdict in enumerate(verdicts)
                ]
                metrics = {"accuracy": value, "strict": 0.9 * value}
                edit(
                    Path(path),
                    lambda score, n=items, v=value, m=metrics, f=found: score.update(
                        n=n, value=v, metrics=m, items=f
                    ),
                )

    edit(grid, change)


LEVELS = {"base": 0.02, "full": 0.55, "lora": 0.40, "pissa": 0.40, "tlora": 0.55}


def run(grid: Path, labels: dict | None = None) -> Path:
    compare({}, {"grid": grid}, grid.parent, {"labels": labels or labels_of(grid)})
    return grid.parent


# ---------------------------------------------------------------- statistics


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_summary_equals_the_standard_library(values: list[float]) -> None:
    summary = statistics.summarise(values)
    assert math.isclose(summary.mean, mean(values), abs_tol=1e-12)
    assert math.isclose(summary.std, stdev(values), abs_tol=1e-9)


def test_summary_of_one_and_of_none() -> None:
    assert statistics.summarise([0.25]) == (0.25, None, 1)
    assert statistics.summarise([]) == (None, None, 0)


def test_wilson_half_width() -> None:
    # the interval of 10 successes in 20 trials: 0.299 to 0.701
    assert statistics.wilson_half_width(0.5, 20) == pytest.approx((0.7007 - 0.2993) / 2, abs=1e-4)
    assert statistics.wilson_half_width(0.0, 100) > 0.01
    with pytest.raises(ValueError, match="expected 0 <= share"):
        statistics.wilson_half_width(0.5, 0)


# ---------------------------------------------------------------- the table


def test_a_row_says_what_the_artefacts_say(demo: Path) -> None:
    rows = rows_of(demo)
    assert [row["method"] for row in rows] == ["base", "full", "lora", "pissa", "tlora"] * 2
    (row,) = [r for r in rows if (r["task"], r["method"]) == ("choice", "tlora")]
    entries = [
        entry
        for entry in rows_of(demo, "ledger.csv")
        if (entry["task"], entry["method"]) == ("choice", "tlora")
    ]
    values = [float(entry["value"]) for entry in entries]
    assert len(values) == 2
    assert float(row["choice_test_mean_percent"]) == pytest.approx(100 * mean(values), abs=1e-5)
    assert float(row["choice_test_std_percent"]) == pytest.approx(100 * stdev(values), abs=1e-5)
    assert row["choice_test_n"] == "500"
    assert row["trainable_parameters"] == "34816"
    # calibration 11.25 s and initialization 2.5 s, shared by both seeds; allocation has no seconds
    assert float(row["initialization_seconds"]) == 13.75
    assert float(row["training_seconds"]) == pytest.approx((47.1 + 47.2) / 2)
    assert int(row["peak_memory_bytes"]) == 802 * 2**20
    assert row["arithmetic_test_mean_percent"] == ""


def test_base_row_has_scores_and_no_costs(demo: Path) -> None:
    base = rows_of(demo)[0]
    assert base["arithmetic_test_mean_percent"] == "7.0"
    assert base["arithmetic_test_std_percent"] == ""
    assert base["training_seconds"] == base["initialization_seconds"] == ""


def test_ledger_has_every_run_and_benchmark_with_its_file(demo: Path) -> None:
    entries = rows_of(demo, "ledger.csv")
    assert len(entries) == 2 * (1 + 4 * 2)
    for entry in entries:
        content = json.loads((demo.parents[2] / entry["score_file"]).read_text())
        assert float(entry["value"]) == content["value"]
        assert int(entry["correct"]) == round(content["value"] * content["n"])
        assert re.search(r"train\.parquet:[0-9a-f]{64}", entry["data_sha256"])


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "tlora"), steps=10)
    folder = run(grid)

    def content() -> dict[str, bytes]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    before = content()
    shutil.rmtree(folder / "plots")
    run(grid)
    assert content() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_one_seed_warns_and_has_no_spread(here: Path) -> None:
    folder = run(make_grid(Path("results"), tasks=("choice",), methods=("lora",), seeds=(7,)))
    markdown = (folder / "table.md").read_text()
    assert re.search(r"\| LoRA .*\d+\.\d\d ± . \|", markdown)
    assert "WARNING: one seed only for LoRA" in markdown
    assert "one seed" in tables.text(folder)


def test_failures_are_shown_with_their_reason(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "pissa", "tlora"))

    def fail(content: dict) -> None:
        by_method: dict[str, list[dict]] = {}
        for cell in content["cells"]:
            by_method.setdefault(cell["method"], []).append(cell)
        by_method["lora"][0]["failed"] = "out of memory"
        for cell in by_method["pissa"]:
            Path(cell["train"]).unlink()
        Path(by_method["tlora"][1]["scores"]["choice_test"]).unlink()

    edit(grid, fail)
    folder = run(grid)
    rows = {row["method"]: row for row in rows_of(folder)}
    assert len(rows) == 4
    assert (rows["lora"]["failed"], rows["lora"]["choice_test_failed"]) == ("1", "1")
    assert rows["lora"]["seeds"] == "1"
    assert rows["pissa"]["choice_test_mean_percent"] == ""
    assert rows["tlora"]["seeds"] == "2" and rows["tlora"]["choice_test_failed"] == "1"
    markdown = (folder / "table.md").read_text()
    assert "(1/2 failed)" in markdown
    assert re.search(r"\| PiSSA .*\| +failed \|", markdown)
    assert "LoRA, seed 1: out of memory" in markdown
    statuses = [entry["status"] for entry in rows_of(folder, "ledger.csv")]
    assert statuses.count("ok") == 3 and "out of memory" in statuses
    assert "WARNING: some runs failed" in tables.text(folder)
    assert 'class="failed"' in (folder / "table.html").read_text()


def test_unequal_items_are_marked(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",))
    path = Path(json.loads(grid.read_text())["cells"][1]["scores"]["choice_test"])
    edit(path, lambda score: score.update(n=400))
    assert "400 or 500 items" in (run(grid) / "table.md").read_text()


def test_rows_with_one_method_but_other_settings(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("tlora",), seeds=(1, 2))

    def vary(content: dict) -> None:
        for cell in content["cells"][2:]:
            cell.update(label="TLoRA, 16 samples", seed=1)

    edit(grid, vary)
    folder = run(grid)
    assert [row["label"] for row in rows_of(folder)] == ["Base model", "TLoRA", "TLoRA, 16 samples"]
    # they share an allocation, and its picture
    assert len(list((folder / "plots/choice").glob("ranks__*.png"))) == 1
    edit(grid, lambda content: [c.update(label="TLoRA") for c in content["cells"] if c["seed"]])
    with pytest.raises(UserError, match="seed 1: expected one run a seed"):
        run(grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"value": 1.5}, "value: 1.5"), ({"value": None}, "value: None"), ({"n": 0}, "n: 0")],
)
def test_a_score_out_of_range_is_refused(here: Path, change: dict, message: str) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",))
    path = Path(json.loads(grid.read_text())["cells"][1]["scores"]["choice_test"])
    edit(path, lambda score: score.update(change))
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
        run(grid)
    assert not (grid.parent / "table.csv").exists()


def test_a_broken_log_line_is_named(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",), steps=3)
    log = Path(json.loads(grid.read_text())["cells"][1]["train"]).parent / "log.jsonl"
    log.write_text(log.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"log\.jsonl:4: not valid JSON"):
        run(grid)


def test_steps_logged_again_after_a_resume_count_once(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.9}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["loss"] for row in collect.read_log(tmp_path)] == [3.0, 1.9]


# ---------------------------------------------------------------- who is better


def judged_rows(here: Path, **given) -> tuple[Path, dict[str, dict[str, str]]]:
    grid = make_grid(Path("results"), **{"tasks": ("choice",), "steps": 2} | given)
    judge(grid, LEVELS)
    folder = run(grid)
    return folder, {row["method"]: row for row in rows_of(folder)}


def test_the_best_and_what_is_not_distinguishable_are_marked(here: Path) -> None:
    folder, rows = judged_rows(here, seeds=(1, 2, 3))
    marks = {method: row["choice_test_mark"] for method, row in rows.items()}
    assert sorted((marks.pop("full"), marks.pop("tlora"))) == ["best", "tie"]
    assert marks == {"base": "", "lora": "worse", "pissa": "worse"}
    lora, pissa, full = rows["lora"], rows["pissa"], rows["full"]
    assert [row["baseline"] for row in rows.values()] == ["0", "0", "1", "0", "0"]
    assert lora["choice_test_p_baseline"] == "" and float(pissa["choice_test_p_baseline"]) > 0.05
    assert float(full["choice_test_p_baseline"]) < 0.001
    gap = float(full["choice_test_mean_percent"]) - float(lora["choice_test_mean_percent"])
    assert float(full["choice_test_minus_baseline_percent"]) == pytest.approx(gap, abs=1e-4)
    assert rows["full"]["choice_test_compared_by"] == "crossed"
    low, high = (float(full[f"choice_test_bootstrap_{side}_percent"]) for side in ("low", "high"))
    assert low < float(full["choice_test_mean_percent"]) < high
    lines = (folder / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    shown = {line[0]: line[3] for line in cells if len(line) == 8}
    assert {shown["Full fine-tuning"][:2], shown["TLoRA"][:2]} == {"\\*", "= "}
    assert shown["LoRA"][0].isdigit() and shown["Base model"][0].isdigit()
    text = tables.text(folder)
    assert re.search(r"[*=] \d\d\.\d\d ± \d\.\d\d +\d\.\d\d", text)
    assert "not distinguishable" in text and "detectable difference" in text


def test_one_run_each_is_compared_by_items_and_says_so(here: Path) -> None:
    folder, rows = judged_rows(here, seeds=(1,))
    assert rows["full"]["choice_test_compared_by"] == "mcnemar"
    assert rows["lora"]["choice_test_mark"] == "worse"
    width = 100 * statistics.wilson_half_width(
        float(rows["lora"]["choice_test_mean_percent"]) / 100, 400
    )
    assert float(rows["lora"]["choice_test_ci95_percent"]) == pytest.approx(width, abs=1e-5)
    assert "this says nothing of other seeds" in (folder / "table.md").read_text()
    assert "compared by items" in tables.text(folder)


def test_only_items_that_all_runs_have_are_compared(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), steps=2)
    judge(grid, LEVELS)
    path = Path(json.loads(grid.read_text())["cells"][1]["scores"]["choice_test"])
    edit(path, lambda score: score.update(n=300, items=score["items"][100:]))
    folder = run(grid)
    assert {row["choice_test_compared_n"] for row in rows_of(folder)} == {"300"}
    note = "rest on the 300 of up to 400 items that all runs have a verdict on"
    assert note in (folder / "table.md").read_text()


def test_another_baseline(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), steps=2)
    judge(grid, LEVELS)
    comparison = collect.load(grid)
    found = {record["method"]: record for record in tables.records(comparison, "pissa")}
    assert found["pissa"]["baseline"] == 1 and found["pissa"]["choice_test_p_baseline"] is None
    assert found["lora"]["choice_test_p_baseline"] > 0.05
    absent = tables.records(comparison, "dora")
    assert all(record["choice_test_p_baseline"] is None for record in absent)


def test_ratings_are_no_percentages_and_conversations_count_once(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora", "tlora"), steps=2)

    def change(content: dict) -> None:
        for cell in content["cells"]:
            draw = random.Random(cell["spec_id"])
            shift = {"base": -3, "lora": 0, "tlora": 2}[cell["method"]]
            items = [
                {"id": f"q{q}/{turn}", "turn": turn, "correct": None, "value": value}
                for q in range(80)
                for turn, value in ((1, 5 + shift + draw.random()), (2, 4 + shift + draw.random()))
            ]
            items[0]["value"] = None  # the judge gave no rating
            value = mean(i["value"] for i in items if i["value"] is not None)
            score = {"n": 160, "metric": "score", "value": value, "items": items}
            edit(
                Path(cell["scores"]["choice_test"]),
                lambda old, s=score: old.update(s, metrics={"score": s["value"], "turn_1": 5.0}),
            )

    edit(grid, change)
    folder = run(grid)
    lora, tlora = rows_of(folder)[1:]
    assert float(lora["choice_test_mean"]) == pytest.approx(5.0, abs=0.1)
    assert "choice_test_mean_percent" not in lora
    assert lora["choice_test_compared_n"] == "80"
    assert (lora["choice_test_mark"], tlora["choice_test_mark"]) == ("worse", "best")
    assert re.search(r"\* [67]\.\d\d ± 0\.\d\d", tables.text(folder))
    assert {entry["correct"] for entry in rows_of(folder, "ledger.csv")} == {""}
    assert "Choice test (points)" in (folder / "table.md").read_text()
    assert "5.00 ± 0.00" in (folder / "table.md").read_text()


def test_ranks_over_benchmarks(demo: Path) -> None:
    part = (demo / "table.md").read_text().partition("## Ranks")[2]
    ranks = {
        line.split("|")[1].strip(): [float(cell) for cell in line.split("|")[2:-1]]
        for line in part.splitlines()
        if line.startswith("|") and line.split("|")[2].strip()[0].isdigit()
    }
    means = {
        (row["task"], row["label"]): float(row[f"{row['task']}_test_mean_percent"])
        for row in rows_of(demo)
        if row["base"] == "0"
    }
    assert set(ranks) == {label for _, label in means}
    for label, (average, *places) in ranks.items():
        for task, place in zip(("arithmetic", "choice"), places, strict=True):
            better = [m for (t, _), m in means.items() if t == task and m > means[task, label]]
            assert place == 1 + len(better)
        assert average == pytest.approx(mean(places), abs=0.005)
    assert "ranks" in tables.text(demo)


# ---------------------------------------------------------------- the forms


@pytest.mark.slow
def test_text_fits_a_terminal_also_with_many_benchmarks(here: Path) -> None:
    names = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"]
    grid = make_grid(
        Path("results"), tasks=("choice",), steps=2, benchmarks={"choice": names}, seeds=(1, 2)
    )
    text = tables.text(run(grid))
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(name in text for name in names)
    assert text.count("TLoRA") >= 3  # every block names the method


NASTY = r"50% & _x_ #1 ~ ^ {a} \b $c$ <d> | ± –"


def nasty_run() -> Path:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",), steps=4)
    kinds = {"models": "tiny", "methods": "lora", "benchmarks": "choice_test"}
    return run(grid, {kind: {name: NASTY} for kind, name in kinds.items()})


def test_without_labels_names_stand(here: Path) -> None:
    grid = make_grid(Path("results"), tasks=("choice",), methods=("lora",), steps=4)
    compare({}, {"grid": grid}, grid.parent, {})
    markdown = (grid.parent / "table.md").read_text()
    assert "## choice: tiny" in markdown and "| lora " in markdown


def test_markdown_and_html_escape_labels(here: Path) -> None:
    folder = nasty_run()
    table = [ln for ln in (folder / "table.md").read_text().splitlines() if ln.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]}
    assert len(counts) == 1
    page = (folder / "table.html").read_text()
    assert "<d>" not in page and "&lt;d&gt;" in page


def test_latex_compiles(here: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-recommended)")
    folder = nasty_run()
    document = (
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
        f"\\input{{{folder}/table.tex}}\\end{{document}}"
    )
    (here / "paper.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


def test_latex_escapes_every_special_sign(here: Path) -> None:
    text = (nasty_run() / "table.tex").read_text()
    line = next(line for line in text.splitlines() if line.startswith("\\caption"))
    assert r"50\% \& \_x\_ \#1 \textasciitilde{} \textasciicircum{} \{a\}" in line
    assert r"\textbackslash{}b \$c\$ \textless{}d\textgreater{}" in line


class Page(HTMLParser):
    """Collects the elements and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_self_contained_and_accessible(demo: Path) -> None:
    text = (demo / "table.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "<title>Comparison demo</title>" in text and '<html lang="en">' in text
    assert "http://" not in text and "https://" not in text and "<script" not in text
    images = [attributes for tag, attributes in page.found if tag == "img"]
    assert len(images) == len(list((demo / "plots").rglob("*.png"))) >= 2 * 3
    assert all(i["src"].startswith("data:image/png") and len(i["alt"]) > 40 for i in images)
    links = [attributes["href"] for tag, attributes in page.found if tag == "a"]
    targets = [link for link in links if not link.startswith("#")]
    assert all((demo / target).is_file() for target in targets)
    anchors = {attributes.get("id") for _, attributes in page.found}
    assert all(link[1:] in anchors for link in links if link.startswith("#"))
    for tag, attributes in page.found:
        assert tag != "th" or attributes.get("scope") in ("col", "row")
    assert text.count("<table>") == text.count("<caption>")
    assert "0a" * 32 in text  # the whole checksum of the data


# ---------------------------------------------------------------- what else


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import tlora.stages.compare, tlora.stages.track, tlora.tracking;"
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'mlflow')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_test_records_in_the_training_data_are_a_footnote(here: Path) -> None:
    """Of every benchmark of the task, by its label."""
    grid = make_grid(Path("results"), steps=10)
    found = {"n": 500, "exact": 3, "ngram13": 17}
    Path("overlap.json").write_text(json.dumps(found))

    def change(content: dict) -> None:
        task = content["cells"][0]["task"]
        name = content["tasks"][task]["benchmarks"][0]
        content["tasks"][task]["overlaps"] = {name: "overlap.json", "absent": "none.json"}

    edit(grid, change)
    run(grid)
    text = (grid.parent / "table.md").read_text()
    line = "of 500 test records 3 stand in the training data, 17 share 13 words in a row with it."
    assert text.count(line) == 1
