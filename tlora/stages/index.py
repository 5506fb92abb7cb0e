"""index: from the finished grid to the page that shows it down to single completions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tlora.artefact import read_json, staged, write_text
from tlora.comparison import collect, published, tables
from tlora.comparison import index as pages

logger = logging.getLogger(__name__)


def index(spec: dict[str, Any], inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write the page of one preset.

    Parameters
    ----------
    spec
        Not used: what is shown stands in the grid.
    inputs
        `grid`: grid.json, with paths relative to the working directory. The scores, completions,
        train.json and so on that it names are read too. `pictures`: pictures.json, beside the
        pictures that it tells of. `published.NAME`: numbers of papers, as CSV.
    out
        Gets index_files/ (items, panels and plots) and, last, index.html.
    place
        `labels`: what people call models, tasks, methods and benchmarks.

    Raises
    ------
    UserError
        For a broken artefact. A missing one, or a cell marked as failed, is shown as failed.
    """
    out = Path(out)
    grid = read_json(inputs["grid"])
    comparison = collect.load(Path(inputs["grid"]), place.get("labels"))
    found = tables.records(comparison, grid["baseline"])
    printed = [path for name, path in sorted(inputs.items()) if name.startswith("published.")]
    numbers = published.ledger(comparison, found, published.read(printed))
    with staged(out / pages.FILES) as folder:
        page = pages.write(comparison, grid, found, numbers, Path(inputs["pictures"]), folder, out)
        logger.info("%d files", sum(path.is_file() for path in folder.rglob("*")))
    write_text(out / "index.html", page)
