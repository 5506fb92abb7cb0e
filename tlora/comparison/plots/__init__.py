"""The pictures of the comparison, each as PNG and as PDF.

Files are named `{task}/{picture}__{model}__{method}.png`, method `all` where a picture shows all:

- `accuracy-{benchmark}`: scores with 95 % intervals; `ablation-{setting}-{benchmark}`: their curve
  over a setting that the preset varies;
- `pareto-{cost}-{benchmark}`: scores against a cost (`tlora.comparison.plots.pareto.COSTS`);
- `loss`: training losses;
- `ranks`, `scalings`, `sensitivity`: of one allocation; `ranks-minus-{task}`,
  `scalings-minus-{task}`: how it differs from the first task's of the same model;
- `similarity-A`, `similarity-B`: of the adapters' subspaces between methods and seeds;
  `similarity-to-{task}`, `overlap-{task}`: between tasks, by method and by module
  (`tlora.comparison.similarity` defines it).

What there is nothing to draw from is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlora.comparison import costs, tables
from tlora.comparison.collect import Comparison
from tlora.comparison.plots import loss, modules, pareto, scores, subspaces
from tlora.comparison.plots.style import Picture, Scene, look, styled

__all__ = ["Picture", "draw"]


def draw(
    comparison: Comparison,
    folder: Path,
    found: Sequence[tables.Record] | None = None,
    spent: Sequence[tables.Record] | None = None,
) -> list[Picture]:
    """Write every picture below `folder`, one subfolder a task, and say what was written.

    Parameters
    ----------
    comparison
        What is shown.
    folder
        Gets the files.
    found
        The records of table.csv; None makes them here.
    spent
        The records of `tlora.comparison.costs`; None makes them here.
    """
    found = tables.records(comparison) if found is None else found
    spent = costs.records(comparison, found) if spent is None else spent
    trained = dict.fromkeys(row.label for row in comparison.rows if not row.base)
    looks = {label: look(index) for index, label in enumerate(trained)}
    parts = zip(
        tables.split(comparison, list(found)), tables.split(comparison, list(spent)), strict=True
    )
    pictures = []
    with styled():
        for (section, mine), (_, priced) in parts:
            scene = Scene(section, mine, priced, comparison.labels, looks, folder)
            (folder / section.task).mkdir(parents=True, exist_ok=True)
            first = next(s for s in comparison.sections if s.model == section.model)
            other = None if first is section else first
            pictures += scores.draw(scene)
            pictures += pareto.draw(scene)
            pictures += loss.draw(scene)
            pictures += modules.draw(scene, other)
            pictures += subspaces.draw(scene, other)
    return pictures
