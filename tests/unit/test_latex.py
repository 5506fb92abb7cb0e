"""LaTeX of tables and methods: that it compiles, and what can be known without a LaTeX."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from unit.recipe_tree import LABELS, PROMPT, change_cells, complete_grid, edit, judge, tune

from tlora.comparison import collect, paragraph, tables

NASTY = r"[50%] & _x_ #1 ~ ^ {a} \b $c$ <d> | ± – “q” α ² × ≥ Łódź naïve 中 *"
SIGNS = [chr(number) for number in range(0xA1, 0x500)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(labels: dict | None = None) -> tuple[str, str]:
    """Return the LaTeX of tables and methods of a grid with all that a table can have."""
    names = ["boolq", "piqa", "siqa", "hella_swag", "winogrande", "arc_e", "arc_c", "obqa"]
    grid = complete_grid(seeds=(1, 2), benchmarks={"choice": names})
    judge(grid, {"full": 0.5, "lora": 0.4, "pissa": 0.4, "tlora": 0.5})
    rates = [1e-3, 3e-3]
    methods = ("full", "lora", "pissa", "tlora")
    tune(grid, dict.fromkeys(methods, rates), dict.fromkeys(methods, 1))
    change_cells(grid, "pissa", lambda cell: cell["settings"].update(batch_size=8))
    change_cells(grid, "full", lambda cell: cell.update(failed="out_of_memory: 50 % & {x}"), 2)
    comparison = collect.load(grid, labels or LABELS)
    found = tables.records(comparison, "lora")
    return tables.to_latex(comparison, found), paragraph.to_latex(comparison, found)


@pytest.fixture(scope="module")
def plain_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """LaTeX of tables and methods with ordinary labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        return written()


@pytest.fixture(scope="module")
def nasty_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """LaTeX of tables and methods with labels full of signs that mean something in LaTeX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("nasty"))
        return nasty()


def nasty() -> tuple[str, str]:
    labels = {kind: dict.fromkeys(names, NASTY) for kind, names in LABELS.items()}
    labels["methods"] = {name: f"{NASTY} {name}" for name in LABELS["methods"]}
    labels["methods"]["tlora"] = "*starred"
    return written(labels)


def compiles(*bodies: str) -> str:
    """Run pdfLaTeX on a document with `bodies`; return its log."""
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-recommended)")
    text = "\n".join(bodies)
    Path("paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        f"{text}\n\\end{{document}}\n",
        encoding="utf-8",
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    log = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, log[-2000:]
    return log


def test_tables_and_methods_compile(here: Path, plain_texts: tuple[str, str]) -> None:
    log = compiles(*plain_texts)
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide", log)]
    assert max(wide, default=0) < 6, log  # points; an eighth of an inch would be seen
    assert "Float too large" not in log


def test_many_rows_go_on_in_further_tables(here: Path) -> None:
    names = [f"benchmark_{number}" for number in range(8)]
    grid = complete_grid(seeds=(1,), benchmarks={"choice": names})
    rows = json.loads(grid.read_text())["cells"]

    def repeat(content: dict) -> None:
        content["cells"] += [{**rows[2], "method": f"lora_{n}"} for n in range(20)]

    edit(grid, repeat)
    comparison = collect.load(grid, LABELS)
    text = tables.to_latex(comparison, tables.records(comparison, "lora"))
    assert text.count("\\begin{table}") > 1 and text.count("(continued)") > 0
    assert text.count("\\label{tab:choice-tiny}") == 1
    assert "Float too large" not in compiles(text)


def test_labels_of_any_sign_compile(here: Path, nasty_texts: tuple[str, str]) -> None:
    compiles(*nasty_texts)


def test_every_sign_compiles(here: Path) -> None:
    compiles("\n\n".join(tables.tex(f"{sign} [x] *") for sign in SIGNS))


# ---------------------------------------------------------------- without a LaTeX


def unescaped(text: str, sign: str) -> int:
    return len(re.findall(r"(?<!\\)(?:\\\\)*" + re.escape(sign), text))


def test_braces_are_balanced(nasty_texts: tuple[str, str]) -> None:
    for text in nasty_texts:
        depth = 0
        for mark in re.findall(r"\\.|[{}]", text, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(mark, 0)
            assert depth >= 0
        assert depth == 0


def test_rows_have_as_many_cells_as_columns(nasty_texts: tuple[str, str]) -> None:
    text, _ = nasty_texts
    found = re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(found) > 1
    for columns, body in found:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) in (2 + 5, 3 + 5)  # one or two lines of titles, units, rows
        for line in lines:
            # a first cell that begins with a bracket or star belongs to the line before
            assert line.startswith("{}")
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1


def test_environments_are_closed(nasty_texts: tuple[str, str]) -> None:
    for text in nasty_texts:
        stack = []
        for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
            if what == "begin":
                stack.append(name)
            else:
                assert stack.pop() == name
        assert stack == []


def test_no_sign_with_a_meaning_is_left(plain_texts: tuple[str, str]) -> None:
    text = tables.tex(NASTY)
    for sign in "%#~":
        assert unescaped(text, sign) == 0
    assert re.sub(r"\$[^$]+\$", "", text.replace(r"\$", "")).count("$") == 0
    assert r"$\alpha$" in text and r"$^2$" in text and "U+4E2D" in text and r"\L{}ó" in text
    _, methods = plain_texts
    assert tables.tex(PROMPT.replace("\n", "\\n")) in methods


def test_every_table_is_booktabs(plain_texts: tuple[str, str]) -> None:
    text, _ = plain_texts
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == text.count("\\begin{tabular}") > 1
    assert "\\hline" not in text and "|" not in re.findall(r"tabular\}\{([^}]*)", text)[0]
    assert text.startswith("% \\usepackage{booktabs}\n")
