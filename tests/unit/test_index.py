"""The index page: what it says, that its parts are there, and that no text becomes markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from unit.grid_tree import labels_of, make_grid, write
from unit.index_tree import HOSTILE, make_items, make_plots, write_lines

from tlora.comparison import collect, index_items, tables
from tlora.comparison import index as pages
from tlora.errors import UserError
from tlora.stages.index import index

VOID = ("meta", "img", "link", "br", "input")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a page of 2 tasks, 4 methods, 2 seeds and 60 items."""
    root = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run(make_items(Path("results"), steps=400))
    return root


@pytest.fixture
def demo(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's folder; the working directory is that of the grid."""
    monkeypatch.chdir(made)
    return made / "results/comparison/demo"


def run(grid: Path, labels: dict | None = None, **inputs: Path) -> Path:
    inputs = {"grid": grid, "pictures": make_plots(grid), **inputs}
    index({}, inputs, grid.parent, {"labels": labels or labels_of(grid)})
    return grid.parent


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def part(folder: Path, name: str) -> Any:
    """Return what a script of the page hands over."""
    text = (folder / "index_files" / f"{name}.js").read_text(encoding="ascii")
    match = re.fullmatch(r'tloraData\("([^"]+)",(.*)\);\n', text, re.DOTALL)
    assert match and match[1] == name
    return json.loads(match[2])


def embedded(folder: Path) -> dict[str, Any]:
    """Return the data that stands in the page itself."""
    page = (folder / "index.html").read_text()
    return json.loads(re.search(r'id="page-data">(.*?)</script>', page, re.DOTALL)[1])


class Page(HTMLParser):
    """Collects elements, with the text of table cells, and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.cell: list[str] | None = None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attrs)["id"], [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None

    def all(self, name: str, attribute: str) -> list[str]:
        return [a[attribute] for tag, a in self.found if tag == name and a.get(attribute)]


def read(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the page


def test_tables_say_what_the_comparison_says(demo: Path) -> None:
    page = read(demo)
    comparison = collect.load(demo / "grid.json", labels_of(demo / "grid.json"))
    found = tables.records(comparison, "lora")
    assert len(comparison.sections) == 2
    for number, (section, mine) in enumerate(tables.split(comparison, found)):
        head, *rows = page.tables[f"section-{number}-main"]
        (name,) = section.benchmarks
        column = head.index(f"{comparison.labels[name]}%")
        assert [row[0] for row in rows] == [record["label"] for record in mine]
        for row, record in zip(rows, mine, strict=True):
            assert tables.accuracy_cell(record, name) in row[column]
            low = tables.number(record, name, "bootstrap_low")
            high = tables.number(record, name, "bootstrap_high")
            assert row[column].endswith(f"{low:.1f} to {high:.1f}")
            mark = record[f"{name}_mark"]
            shown = mark if mark in ("best", "tie") else None
            assert row[column].partition(" ")[0] == shown or shown is None
    assert "best" in (demo / "index.html").read_text()


def test_every_link_leads_somewhere(demo: Path) -> None:
    page = read(demo)
    data = embedded(demo)
    anchors = {attributes.get("id") for _, attributes in page.found}
    links = page.all("a", "href")
    for link in links:
        match = re.fullmatch(r"#(run|row)-(\d+)", link)
        if match:
            assert part(demo, f"{match[1]}s/{match[2]}")["blocks"]
        elif link.startswith("#"):
            assert link[1:] in anchors
        else:
            assert (demo / unquote(link)).is_file()
    assert all((demo / unquote(source)).is_file() for source in page.all("img", "src"))
    runs = {int(link[5:]) for link in links if link.startswith("#run-")}
    assert runs == set(range(len(data["runs"]))) and len(runs) == 2 * (1 + 4 * 2)
    rows = {int(link[5:]) for link in links if link.startswith("#row-")}
    assert rows == {n for n, row in enumerate(data["rows"]) if len(row["runs"]) > 1}


def test_every_number_leads_to_its_run(demo: Path) -> None:
    """Also those of details and costs; of one row all lead to the same place."""
    text = (demo / "index.html").read_text()
    found = 0
    for kind in ("main", "details", "costs"):
        table = re.search(rf'<table id="section-0-{kind}".*?</table>', text, re.DOTALL)[0]
        for line in re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)[1:]:
            cells = re.findall(r"<t[dh]( [^>]*)?>(.*?)</t[dh]>", line, re.DOTALL)
            numbers = [c for a, c in cells if 'class="text"' not in a and re.search(r"\d", c)]
            assert all("<a href=" in cell for cell in numbers)
            assert len(set(re.findall(r'href="([^"]+)"', line))) == 1
            found += len(numbers)
    assert found > 100


def test_the_page_needs_nothing_from_elsewhere(demo: Path) -> None:
    text = (demo / "index.html").read_text()
    page = read(demo)
    assert [a for tag, a in page.found if tag in ("link", "iframe", "object", "base")] == []
    sources = [a["src"] for tag, a in page.found if a.get("src")]
    sources += [a["href"] for _, a in page.found if a.get("href")]
    assert sources and not any(re.match(r"[a-z]+:|//", source) for source in sources)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bfetch\(|XMLHttpRequest|innerHTML|eval\(|@import|url\(", text)


def test_the_page_is_marked_up_for_everyone(demo: Path) -> None:
    page = read(demo)
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert ("html", {"lang": "en"}) in page.found
    scopes = [a.get("scope") for tag, a in page.found if tag == "th"]
    assert scopes and set(scopes) == {"col", "row"}
    text = (demo / "index.html").read_text()
    assert text.count("<table ") == text.count("<caption ")
    labelled = set(page.all("label", "for"))
    named = {a["id"] for tag, a in page.found if tag in ("input", "select")}
    assert named and named <= labelled
    for attribute in ("aria-labelledby", "for"):
        assert all(a[attribute] in ids for _, a in page.found if a.get(attribute))
    assert all(len(text) > 20 for text in page.all("img", "alt"))
    assert "prefers-color-scheme: dark" in text


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour as the WCAG define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_on_their_grounds(scheme: str) -> None:
    blocks = (pages.ASSETS / "index.css").read_text().split("prefers-color-scheme: dark")
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", blocks[scheme == "dark"]))
    pairs = [
        *((ink, ground) for ink in ("ink", "soft", "link") for ground in ("ground", "band")),
        *[("warn", "ground"), ("bad", "ground"), ("mark-ink", "mark")],
        *[("good", "good-ground"), ("tie", "tie-ground"), ("bad", "bad-ground")],
    ]
    for ink, ground in pairs:
        low, high = sorted(luminance(colours[name]) for name in (ink, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)
    for curve in range(6):
        low, high = sorted(luminance(colours[name]) for name in (f"s{curve}", "ground"))
        assert (high + 0.05) / (low + 0.05) >= 3, curve


def test_a_panel_tells_of_its_run(demo: Path) -> None:
    data = embedded(demo)
    panel = part(demo, f"runs/{data['runs'].index('TLoRA, seed 2')}")
    assert panel["title"] == "TLoRA, seed 2"
    facts = {
        name: value
        for b in panel["blocks"]
        if b["kind"] == "facts"
        for name, value, *_ in b["items"]
    }
    assert facts["Seed"] == "2" and facts["Adapter check"] == "passed"
    assert facts["learning_rate"] == "0.001" and facts["steps"] == "400"
    files = next(b["items"] for b in panel["blocks"] if b["title"] == "Files")
    assert {path.rpartition("/")[2] for _, path, _ in files} >= {
        *("train.json", "log.jsonl", "allocation.json", "generations.jsonl", "score.json"),
        *("check.json", "card.json"),
    }
    for _, path, link in files:
        assert not Path(path).is_absolute() and (demo / link).resolve() == Path(path).resolve()
    (curve,) = (b for b in panel["blocks"] if b["kind"] == "curve")
    (series,) = curve["series"]
    log = Path(next(path for name, path, _ in files if name == "Log")).read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    # 400 steps on at most 300 points: means of two
    assert len(series["points"]) == 200 and series["points"][-1][0] == 400
    assert series["points"][0][1] == pytest.approx((losses[0] + losses[1]) / 2, abs=1e-4)
    (scores,) = (b for b in panel["blocks"] if b["kind"] == "table")
    shown = float(scores["rows"][0][2][0].split()[0])
    assert shown == pytest.approx(
        100
        * json.loads(
            Path(next(path for name, path, _ in files if name.startswith("Score"))).read_text()
        )["value"],
        abs=0.01,
    )
    assert scores["rows"][0][-1][1].startswith("#items?place=0&a=run")


def test_a_row_leads_to_each_of_its_runs(demo: Path) -> None:
    data = embedded(demo)
    number = next(n for n, row in enumerate(data["rows"]) if row["label"] == "TLoRA")
    panel = part(demo, f"rows/{number}")
    lines = panel["blocks"][0]["rows"]
    assert [line[1][1] for line in lines] == [f"#run-{r}" for r in data["rows"][number]["runs"]]
    links = next(b["items"] for b in panel["blocks"] if b["kind"] == "links")
    lora = next(n for n, row in enumerate(data["rows"]) if row["label"] == "LoRA")
    assert f"#items?place=0&a=row{number}&b=row{lora}&filter=better" in [link for _, link in links]
    curve = next(b for b in panel["blocks"] if b["kind"] == "curve")
    assert [one["name"] for one in curve["series"]] == ["seed 1", "seed 2"]


def test_equal_files_give_equal_bytes(here: Path) -> None:
    grid = make_items(Path("results"), items=5, steps=5)
    once = {p: p.read_bytes() for p in run(grid).rglob("*") if p.is_file()}
    again = {p: p.read_bytes() for p in run(grid).rglob("*") if p.is_file()}
    assert once == again


# ---------------------------------------------------------------- items


def test_all_items_stand_in_pages(here: Path) -> None:
    count = 2 * index_items.PAGE + 50
    folder = run(make_items(Path("results"), items=count, tasks=("choice",), seeds=(1,), steps=5))
    data = embedded(folder)
    (place,) = data["places"]
    assert place["items"] == count and place["share"] and len(place["runs"]) == 5
    known = part(folder, "items/0/verdicts")
    assert known["ids"] == [f"test-{index}" for index in range(count)]
    asked = [one for page in range(3) for one in part(folder, f"items/0/prompts/{page}")]
    assert len(asked) == count and "aardvark" in asked[7][0] and asked[9][1].endswith("#### 63")
    assert not (folder / "index_files/items/0/prompts/3.js").exists()
    for place_run in place["runs"]:
        pages_of = [part(folder, f"items/0/{place_run}/{page}") for page in range(3)]
        assert [len(page) for page in pages_of] == [index_items.PAGE] * 2 + [50]
    lora = data["runs"].index("LoRA, seed 1")
    answers = [one for page in range(3) for one in part(folder, f"items/0/{lora}/{page}")]
    cells = json.loads((folder / "grid.json").read_text())["cells"]
    path = next(c["scores"]["choice_test"] for c in cells if c["method"] == "lora")
    items = json.loads(Path(path).read_text())["items"]
    for at, item in enumerate(items):
        text, extracted, finish, tokens, further = answers[at]
        assert extracted == item["extracted"] and tokens == 10
        assert known["verdicts"][str(lora)][at] == str(int(item["correct"]))
        assert (at in known["unread"][str(lora)]) == (item["extracted"] is None)
        assert dict(zip(known["fields"], further, strict=True)) == {
            "strict_correct": item["correct"]
        }
        assert finish == ("length" if item["extracted"] is None else "eos") and text
    assert answers[5][0] == HOSTILE and answers[9][0].startswith("A wombat.")


def place_of(folder: Path, **runs: tuple[list[dict], list[dict]]) -> int:
    """Write completions and verdicts of some runs and the files of their place."""
    sources = []
    for number, (rows, items) in enumerate(runs.values()):
        write_lines(folder / f"{number}.jsonl", rows)
        write(folder / f"{number}.json", {"items": items})
        source = index_items.Source(number, folder / f"{number}.jsonl", folder / f"{number}.json")
        sources.append(source)
    return index_items.write_place(folder / "index_files", 0, sources)


def test_ratings_of_turns_stay_numbers(tmp_path: Path) -> None:
    rows = [
        {"id": "8/1", "turn": 1, "prompt": "Hi", "completion": "a", "reference": {"k": [1]}},
        {"id": "8/2", "turn": 2, "prompt": "Hi a then", "completion": "b", "reference": None},
    ]
    items = [
        {"id": "8/1", "turn": 1, "correct": None, "value": 7.5, "extracted": "7.5"},
        {"id": "8/2", "turn": 2, "correct": None, "value": None, "extracted": None},
    ]
    other = [rows[0], {**rows[1], "prompt": "Hi c then"}]
    count = place_of(tmp_path, a=(rows, items), b=(other, items))
    assert count == 2
    known = part(tmp_path, "items/0/verdicts")
    assert known["verdicts"]["0"] == [7.5, None] and known["unread"]["0"] == [1]
    assert part(tmp_path, "items/0/prompts/0") == [
        ["Hi", '{\n "k": [\n  1\n ]\n}'],
        ["Hi a then", ""],
    ]
    first, second = part(tmp_path, "items/0/1/0")
    # only what a run was asked otherwise is repeated
    assert len(first) == 5 and second[5] == ["Hi c then", ""]


def test_runs_with_unequal_items(tmp_path: Path) -> None:
    def row(name: str) -> dict[str, Any]:
        return {"id": name, "prompt": name, "completion": f"said of {name}"}

    right = {"correct": True, "extracted": "x", "further": float("nan"), "more": {"a": 1}}
    one = ([row("a"), row("b")], [{"id": "a", **right}])
    two = ([row("c"), row("b")], [{"id": "c", **right}, {"id": "b", **right}])
    assert place_of(tmp_path, one=one, two=two) == 3
    known = part(tmp_path, "items/0/verdicts")
    assert known["ids"] == ["a", "b", "c"]
    assert known["verdicts"] == {"0": "1--", "1": "-11"}
    assert part(tmp_path, "items/0/0/0")[1][1:3] == [None, ""]
    answers = part(tmp_path, "items/0/1/0")
    assert answers[0] == 0 and answers[2][0] == "said of c"
    assert dict(zip(known["fields"], answers[2][4], strict=True)) == {
        "further": "NaN",
        "more": '{\n "a": 1\n}',
    }


def test_half_a_surrogate_pair_and_line_separators_survive(tmp_path: Path) -> None:
    said = "\ud83d \u2028 \u2029 </script> \x00 é"
    place_of(tmp_path, a=([{"id": "a", "prompt": said, "completion": said}], []))
    assert part(tmp_path, "items/0/0/0")[0][0] == said


@pytest.mark.parametrize(
    ("line", "message"), [("{broken", ":2: not valid JSON"), ('{"ID": 1}', ":2: id: expected")]
)
def test_a_broken_line_is_named(here: Path, line: str, message: str) -> None:
    grid = make_items(Path("results"), items=3, steps=5)
    path = Path(json.loads(grid.read_text())["cells"][1]["generations"]["arithmetic_test"])
    path = path.with_name("generations.jsonl")
    path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")):
        run(grid)
    assert not (grid.parent / "index_files").exists() and not (grid.parent / "index.html").exists()


def test_without_completions_there_are_no_items(here: Path) -> None:
    folder = run(make_grid(Path("results"), steps=5))
    page = read(folder)
    assert embedded(folder)["places"] == [] and not (folder / "index_files/items").exists()
    assert "#items" not in page.all("a", "href")


# ---------------------------------------------------------------- hostile, failed, tuned


def test_no_text_becomes_markup(here: Path) -> None:
    grid = make_items(Path("results"), items=6, steps=5, tasks=("arithmetic",))
    labels = labels_of(grid)
    for kind in labels.values():
        kind.update({name: f"{label} {HOSTILE}" for name, label in kind.items()})
    cells = json.loads(grid.read_text())["cells"]
    edit(Path(cells[0]["card"]), lambda card: card.update(prompt=HOSTILE, source=HOSTILE))
    edit(Path(cells[1]["train"]), lambda train: train["versions"].update({HOSTILE: HOSTILE}))
    edit(Path(cells[1]["check"]), lambda c: c.update(passed=False, reasons=[HOSTILE]))
    edit(grid, lambda g: g["cells"][2].update(failed=HOSTILE))
    folder = run(grid, labels)
    text = (folder / "index.html").read_text()
    page = read(folder)
    assert "<img src=x" not in text and "window.ran='script'</script>" not in text
    assert [tag for tag, _ in page.found].count("script") == 2
    assert not [a for _, a in page.found if any(name.startswith("on") for name in a)]
    assert text.count("&lt;img src=x") > 10
    for path in (folder / "index_files").rglob("*.js"):
        part(folder, path.relative_to(folder / "index_files").with_suffix("").as_posix())


def test_failures_are_told(here: Path) -> None:
    grid = make_items(Path("results"), items=6, steps=5, tasks=("arithmetic",))
    reason = {"passed": False, "reasons": ["merged: 3e-1 of logits"]}

    def change(content: dict) -> None:
        content["cells"][1]["failed"] = "out of memory"
        write(Path(content["cells"][2]["check"]), reason)
        Path(content["cells"][3]["scores"]["arithmetic_test"]).unlink()

    edit(grid, change)
    folder = run(grid)
    status = [row[-1] for row in read(folder).tables["all-runs"][1:]]
    assert status[1] == "failed: out of memory" and status[2] == "ok"
    assert status[3].startswith("failed: ") and status[3].endswith("score.json is missing")
    first = part(folder, "runs/1")["blocks"][0]
    assert first == {"kind": "warning", "text": "Failed: out of memory"}
    facts = next(b["items"] for b in part(folder, "runs/2")["blocks"] if b["kind"] == "facts")
    assert ["Adapter check", "FAILED: merged: 3e-1 of logits"] in facts
    text = (folder / "index.html").read_text()
    warnings = re.search(r'<ul class="notes warning">(.*?)</ul>', text, re.DOTALL)[1]
    assert "<li>Failed: Full fine-tuning, seed 1: out of memory.</li>" in warnings


def test_tuning_is_shown_with_its_edge(here: Path) -> None:
    grid = make_items(Path("results"), items=6, steps=5, tasks=("arithmetic",))

    def change(content: dict) -> None:
        cell = next(c for c in content["cells"] if c["method"] == "lora")
        trials, tried = [], []
        for number, rate in enumerate((1e-4, 1e-3, 1e-2)):
            spec = f"aaaaaaaaaa{number:02d}"
            folder = Path("results/trial") / spec
            train = json.loads(Path(cell["train"]).read_text())
            score = {"n": 40, "metric": "accuracy", "value": number / 8, "items": []}
            trial = {**cell, "spec_id": spec, "seed": 0, "generations": {}}
            trial["settings"] = {"learning_rate": rate}
            trial["train"] = write(folder / "train.json", train)
            trial["scores"] = {"validation": write(folder / "score.json", score)}
            trials.append(trial)
            tried.append({"settings": {"learning_rate": rate}, "score": spec, "value": number / 8})
        chosen = {"metric": "accuracy", "higher_is_better": True, "n": 40, "trials": tried}
        chosen |= {"winner": 2, "settings": {"learning_rate": 1e-2}}
        chosen |= {"edges": {"learning_rate": "upper"}}
        entry = {"model": "tiny", "task": "arithmetic", "method": "lora", "trials": trials}
        content["choices"] = [entry | {"chosen": write(Path("results/chosen.json"), chosen)}]

    edit(grid, change)
    folder = run(grid)
    page = read(folder)
    rows = page.tables["trials"][1:]
    assert [row[3] for row in rows] == [
        f"learning_rate = {v}" for v in ("1.0e-4", "1.0e-3", "1.0e-2")
    ]
    assert [row[5] for row in rows] == ["0.0000", "0.1250", "0.2500"]
    assert [row[6] for row in rows] == ["", "", "chosen, at the upper edge of learning_rate"]
    text = (folder / "index.html").read_text()
    warning = "WARNING: learning_rate 1.0e-2 is the highest tried: add 0.1."
    assert warning in text
    data = embedded(folder)
    number = data["runs"].index("LoRA, seed 0, trial with learning_rate = 1.0e-2")
    trial = part(folder, f"runs/{number}")
    assert {b.get("title") for b in trial["blocks"]} >= {"Scores", "Settings", "Files"}
    row = next(n for n, row in enumerate(data["rows"]) if row["label"] == "LoRA")
    (table,) = (b for b in part(folder, f"rows/{row}")["blocks"] if b["title"].startswith("Tuning"))
    assert [line[-1] for line in table["rows"]] == ["", "", "chosen"]
    assert table["rows"][2][1] == ["0.2500", f"#run-{number}"] and warning in table["note"]
    assert number not in [run for row in data["rows"] for run in row["runs"]]


def test_versions_and_published_numbers(here: Path) -> None:
    grid = make_items(Path("results"), items=6, steps=5, tasks=("arithmetic",))
    path = json.loads(grid.read_text())["cells"][1]["train"]
    edit(Path(path), lambda train: train["versions"].update(torch="2.99"))
    head = (
        "document,table,model,task,method,settings,benchmark,metric,value,unit,n_items,seeds,notes"
    )
    line = "paper,1,tiny,arithmetic,lora,rank=8,arithmetic_test,accuracy,61.234,%,500,1,"
    Path("paper.csv").write_text(f"{head}\n{line}\n")
    folder = run(grid, **{"published.paper": Path("paper.csv")})
    page = read(folder)
    (row,) = page.tables["ledger"][1:]
    assert row[1] == "LoRA" and "61.23" in row[4] and "rank: 16, published 8" in row[6]
    assert page.tables["versions"][1:] == [
        ["torch", "2.13.0", "7 of 8: " + row_names(folder)],
        ["torch", "2.99", "1 of 8: Full fine-tuning, seed 1"],
    ]


def row_names(folder: Path) -> str:
    skipped = ("Base model", "Full fine-tuning, seed 1")
    return "; ".join(name for name in embedded(folder)["runs"] if name not in skipped)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        *[("12.34 ± 0.56", 12.34), ("1,048,576", 1048576), ("< 0.001", 0.001), ("–", None)],
        *[("+1.20 ± 0.4", 1.2), ("-3.5 ± 1", -3.5), ("failed", None), ("12.00 (1/3 failed)", 12)],
    ],
)
def test_sort_keys(text: str, key: float | None) -> None:
    assert pages.sort_key(text) == key


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; import tlora.stages.index;"
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'jinja2')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
