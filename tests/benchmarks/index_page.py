"""What the index page of a large comparison costs, as a row of a Markdown table.

    python tests/benchmarks/index_page.py [--items 5000 --seeds 15 --words 60]

The grid is made up: 4 methods with so many seeds, and the base model, on one benchmark. Opening is
the time until the page has been laid out and drawn in a headless Chromium; a filter compares the
verdicts of all seeds of two methods and shows the first items; a search reads every completion of
two runs. Without a browser only the making is measured.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser.chromium import chromium, missing, start
from unit.index_tree import make_items, make_plots

from tlora.stages.index import index

DRAWN = "requestAnimationFrame(() => requestAnimationFrame(arguments[arguments.length - 1]))"
COUNTED = """
const done = arguments[arguments.length - 1];
(function look() {
  const text = document.getElementById("item-count").textContent;
  if (/^(Items|None)/.test(text)) done(text); else setTimeout(look, 10);
})();
"""


def main() -> None:
    """Make a page, open it and print the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--words", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)
        seeds = tuple(range(1, options.seeds + 1))
        grid = make_items(
            Path("results"), options.items, options.words, tasks=("arithmetic",), seeds=seeds
        )
        inputs = {"grid": grid, "pictures": make_plots(grid)}
        before = time.perf_counter()
        index({}, inputs, grid.parent, {})
        made = time.perf_counter() - before
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        files = [path for path in (grid.parent / "index_files").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        page = grid.parent.resolve() / "index.html"
        cells = [f"{4 * options.seeds + 1} x {options.items}", f"{made:.1f}", f"{memory:,.0f}"]
        cells += [f"{page.stat().st_size / 1e6:.2f}", f"{size:.0f} in {len(files)}"]
        cells += measured(page.as_uri())
        os.chdir("/")
    titles = ["runs x items", "made (s)", "memory (MiB)", "page (MB)", "files (MB)"]
    titles += ["opened (s)", "filtered (s)", "searched (s)"]
    print(f"| {' | '.join(titles)} |\n|{'---:|' * len(titles)}\n| {' | '.join(cells)} |")


def measured(page: str) -> list[str]:
    """Return the seconds of opening, filtering and searching."""
    if missing():
        return ["", "", ""]
    driver = start(chromium())
    driver.set_script_timeout(120)
    times = []
    try:
        better = "#items?place=0&a=row4&b=row2&filter=better"
        search = "#items?place=0&a=run46&b=run16&text=wombat"
        for address, script in (("", DRAWN), (better, COUNTED), (search, COUNTED)):
            driver.get("about:blank")
            before = time.perf_counter()
            driver.get(page + address)
            driver.execute_async_script(script)
            times.append(f"{time.perf_counter() - before:.2f}")
    finally:
        driver.quit()
    return times


if __name__ == "__main__":
    main()
