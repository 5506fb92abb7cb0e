"""A headless Chromium; the tests are skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.chromium import ITEMS, chromium, missing, start
from unit.grid_tree import labels_of
from unit.index_tree import make_items, make_plots

from tlora.stages.index import index


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """The browser."""
    if missing():
        pytest.skip(missing())
    found = start(chromium())
    yield found
    found.quit()


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a page; options are those of `make_items`, `labels` of the stage."""

    def made(
        change: Callable[[dict, dict], None] = lambda grid, labels: None, **options: Any
    ) -> Path:
        root = tmp_path_factory.mktemp("page")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            grid = make_items(Path("results"), steps=60, **options)
            content, labels = json.loads(grid.read_text()), labels_of(grid)
            change(content, labels)
            grid.write_text(json.dumps(content))
            inputs = {"grid": grid, "pictures": make_plots(grid)}
            index({}, inputs, grid.parent, {"labels": labels})
        return root / grid.parent / "index.html"

    return made


@pytest.fixture(scope="session")
def demo(build: Callable[..., Path]) -> Path:
    """A page of 2 tasks, 4 methods, 2 seeds and items in three files a run."""
    return build(items=ITEMS)
