"""How alike the adapters' subspaces are: between methods, seeds and tasks."""

from __future__ import annotations

from collections.abc import Sequence

from tlora.comparison import similarity
from tlora.comparison.collect import Row, Section
from tlora.comparison.plots.modules import allocations, rank_grid
from tlora.comparison.plots.style import (
    COLOURS,
    SOFT,
    Picture,
    Scene,
    caption,
    heatmap,
    legend,
    new_figure,
    short,
)
from tlora.comparison.similarity import Adapter

WHAT = {"A": "input subspaces (rows of A)", "B": "output subspaces (columns of B - B0)"}

MEASURE = "mean squared cosine of the principal angles, mean over modules"


def draw(scene: Scene, first: Section | None) -> list[Picture]:
    """Draw the similarities within the section, and with the first task of the same model.

    Nothing where trained adapters are not there (any more): full fine-tuning has none.
    """
    loaded = [(row, similarity.adapters(row)) for row in scene.section.rows if not row.base]
    found = [(row, adapters) for row, adapters in loaded if adapters]
    if not found:
        return []
    pictures = [picture for side in WHAT for picture in _methods(scene, found, side)]
    if first is not None:
        pictures += _tasks(scene, found, first)
        for row, adapters in found:
            if allocations(row):
                pictures += _by_module(scene, row, adapters, first)
    return pictures


def _methods(scene: Scene, found: Sequence[tuple[Row, list[Adapter]]], side: str) -> list[Picture]:
    import numpy as np

    usable = [(row, [a for a in mine if a.modules(side)]) for row, mine in found]
    usable = [(row, mine) for row, mine in usable if mine]
    values = similarity.matrix([mine for _, mine in usable], side)
    grid = np.array([[np.nan if v is None else v for v in line] for line in values], dtype=float)
    if not np.isfinite(grid).any():
        return []
    names = [short(row.label, 18) for row, _ in usable]
    figure, _ = heatmap(grid, names, names, "Similarity", form="{:.2f}", limits=(0.0, 1.0))
    title = f"Similarity of {WHAT[side]}, {scene.section.title}"
    note = f"{MEASURE.capitalize()}; diagonal: two seeds of one method"
    limits = [similarity.chance(a[0], b[0], side) for _, a in usable for _, b in usable]
    by_chance = similarity.mean([value for value in limits if value is not None])
    note += f"; by chance about {by_chance:.2f}" if by_chance is not None else ""
    if len({a.seed for _, mine in usable for a in mine}) < 2:
        note += "; one seed: what is drawn at random is the same for all methods"
    caption(figure, title, f"{note}.")
    told = [
        f"{names[i]} and {names[j]} {values[i][j]:.3f}"
        for i in range(len(names))
        for j in range(i + 1)
        if values[i][j] is not None
    ]
    return [scene.write(figure, f"similarity-{side}", title, "; ".join(told) + ".")]


def _same(row: Row, section: Section) -> list[Adapter]:
    """Return the adapters of the same method in another section."""
    others = [r for r in section.rows if (r.method, r.label) == (row.method, row.label)]
    return similarity.adapters(others[0]) if others else []


def _tasks(
    scene: Scene, found: Sequence[tuple[Row, list[Adapter]]], first: Section
) -> list[Picture]:
    """Draw for every method how alike two tasks are, beside how alike two seeds are."""
    kinds = {("A", "tasks"): ("o", COLOURS[0]), ("B", "tasks"): ("s", COLOURS[1])}
    kinds |= {("A", "seeds"): ("^", COLOURS[0]), ("B", "seeds"): ("D", COLOURS[1])}
    values: list[dict[tuple[str, str], float | None]] = []
    for row, mine in found:
        pairs = {"seeds": similarity.pair(mine, mine, True)}
        pairs["tasks"] = similarity.pair(mine, _same(row, first), False)
        values.append(
            {
                (side, kind): similarity.mean(
                    similarity.by_module(*two, side, similarity.MODULES) if two else {}
                )
                for side, kind in kinds
                for two in (pairs[kind],)
            }
        )
    if all(one[side, "tasks"] is None for one in values for side in WHAT):
        return []
    figure, axes = new_figure(0.55 + 0.2 * len(found))
    for (side, kind), (marker, colour) in kinds.items():
        shown = [(one[side, kind], place) for place, one in enumerate(values)]
        shown = [(value, place) for value, place in shown if value is not None]
        if shown:
            axes.plot(
                [value for value, _ in shown],
                [place for _, place in shown],
                linestyle="none",
                marker=marker,
                color=colour,
                markerfacecolor=colour if kind == "tasks" else "white",
                markersize=5,
                label=f"{side}, between {kind}",
            )
    axes.set_yticks(range(len(found)), [short(row.label) for row, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Similarity")
    axes.spines["left"].set_color(SOFT)
    legend(figure, axes)
    section = scene.section
    between = f"{section.task_label} and {first.task_label}"
    title = f"Similarity of subspaces between {between}, {section.model_label}"
    note = f"{MEASURE.capitalize()}; A: input, B: output subspaces; seeds: of {section.task_label}"
    caption(figure, title, f"{note}.")
    told = [
        f"{row.label}: "
        + ", ".join(f"{side} between {kind} {v:.3f}" for (side, kind), v in one.items() if v)
        for (row, _), one in zip(found, values, strict=True)
    ]
    return [scene.write(figure, f"similarity-to-{first.task}", title, "; ".join(told) + ".")]


def _by_module(scene: Scene, row: Row, mine: list[Adapter], first: Section) -> list[Picture]:
    import numpy as np

    two = similarity.pair(mine, _same(row, first), False)
    modules = similarity.by_module(*two, "A") if two else {}
    if not modules:
        return []
    layers, projections, values = rank_grid(modules)
    grid = np.array([[np.nan if v is None else v for v in line] for line in values], dtype=float)
    figure, axes = heatmap(
        grid, layers, projections, "Similarity", form="{:.2f}", limits=(0.0, 1.0)
    )
    axes.set_ylabel("Layer")
    section = scene.section
    between = f"{section.task_label} and {first.task_label}"
    title = f"Similarity of A of {row.label} between {between}, {section.model_label}"
    by_chance = similarity.chance(*two, "A") if two else None
    note = "Mean squared cosine of the principal angles of the input subspaces"
    note += f"; by chance about {by_chance:.2f}" if by_chance is not None else ""
    caption(figure, title, f"{note}; mean {similarity.mean(modules):.2f}.")
    told = "; ".join(f"{name} {value:.3f}" for name, value in modules.items())
    picture = f"overlap-{first.task}"
    return [scene.write(figure, picture, title, told + ".", scene.method(row))]
