"""compare: from the finished grid to tables, plots and one page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tlora.artefact import read_json, staged, write_json, write_text
from tlora.comparison import (
    collect,
    costs,
    fingerprint,
    ledger,
    page,
    paragraph,
    plots,
    published,
    tables,
)


def compare(
    spec: dict[str, Any], inputs: dict[str, Path], out: Path, place: dict[str, Any]
) -> None:
    """Write the comparison of one preset.

    Parameters
    ----------
    spec
        Not used: what is compared stands in the grid.
    inputs
        `grid`: grid.json, with paths relative to the working directory. The scores, train.json and
        so on that it names are read too. `published.NAME`: numbers of papers, as CSV.
    out
        Gets plots/{task}/*.png and *.pdf, costs.csv and costs.md, ledger.csv (runs), published.csv
        (papers' numbers beside ours),
        fingerprints.json (what every run was made with), methods.md and methods.tex (a methods
        section), table.md, table.tex, table.html and, last, table.csv.
    place
        `labels`: what people call models, tasks, methods and benchmarks.

    Raises
    ------
    UserError
        For a broken artefact, and with the grid's `strict` for rows that are not comparable. A
        missing artefact, or a cell marked as failed, is shown as failed.
    """
    comparison = collect.load(Path(inputs["grid"]), place.get("labels"))
    grid = read_json(inputs["grid"])
    baseline = grid["baseline"]
    if grid.get("strict"):
        fingerprint.check(comparison, baseline)
    found = tables.records(comparison, baseline)
    spent = costs.records(comparison, found)
    printed = [path for name, path in sorted(inputs.items()) if name.startswith("published.")]
    numbers = published.ledger(comparison, found, published.read(printed))
    with staged(out / "plots") as folder:
        folder.mkdir(parents=True)
        pictures = plots.draw(comparison, folder, found, spent)
        write_json(folder / "pictures.json", [dataclasses.asdict(one) for one in pictures])
    write_text(out / "costs.csv", tables.to_csv(spent))
    write_text(out / "costs.md", costs.to_markdown(comparison, spent))
    write_text(out / "ledger.csv", tables.to_csv(ledger.entries(comparison)))
    write_text(out / "published.csv", tables.to_csv(list(numbers.rows)))
    write_json(out / "fingerprints.json", fingerprint.to_json(comparison, baseline))
    write_text(out / "methods.md", paragraph.to_markdown(comparison, found))
    write_text(out / "methods.tex", paragraph.to_latex(comparison, found))
    write_text(out / "table.md", tables.to_markdown(comparison, found, numbers))
    write_text(out / "table.tex", tables.to_latex(comparison, found))
    write_text(
        out / "table.html", page.to_html(comparison, found, pictures, out / "plots", numbers)
    )
    write_text(out / "table.csv", tables.to_csv(found, last=tables.COSTS))
