"""What an allocation gives every module: ranks, scalings, and the sensitivity they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlora.artefact import read_json
from tlora.comparison.collect import Row, Section
from tlora.comparison.plots.style import (
    COLOURS,
    MARKERS,
    SOFT,
    Picture,
    Scene,
    caption,
    heatmap,
    legend,
    new_figure,
)
from tlora.errors import UserError

KINDS = {"rank": ("ranks", "Rank"), "scaling": ("scalings", "Scaling")}
"""By the key in allocation.json: the picture's name and what its shades say."""


def rank_grid(
    modules: Mapping[str, float],
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Arrange ranks, or other numbers, by layer and projection.

    The first number in a dotted module name is its layer; what stands before it is told only where
    there are several stacks (an encoder and a decoder); the projection is the last word, or the
    words after the layer where that is not unique.

    Parameters
    ----------
    modules
        Number by full module name.

    Returns
    -------
    rows, columns, values
        Labels of the layers (natural order) and of the projections (order of appearance), and
        the numbers; None where a layer has no such module.
    """
    parsed = [(*_place(name), number) for name, number in modules.items()]
    stacks = {stack for stack, layer, _, _ in parsed if layer is not None}
    last = {words: words[-1] for _, _, words, _ in parsed}
    unique = len(set(last.values())) == len(last)
    rows: dict[tuple[str, int], str] = {}
    table: dict[tuple[str, int], dict[str, float]] = {}
    columns: dict[str, None] = {}
    for stack, layer, words, number in parsed:
        column = last[words] if unique else ".".join(words)
        # modules outside the layers (an output head) stand below them
        key = (stack, layer) if layer is not None else ("\uffff", 0)
        known = f"{stack} {layer}" if len(stacks) > 1 else str(layer)
        rows[key] = known if layer is not None else "other"
        columns[column] = None
        table.setdefault(key, {})[column] = number
    order = sorted(rows)
    return (
        [rows[key] for key in order],
        list(columns),
        [[table[key].get(column) for column in columns] for key in order],
    )


def _place(name: str) -> tuple[str, int | None, tuple[str, ...]]:
    words = name.split(".")
    numbers = [index for index, word in enumerate(words) if word.isdigit()]
    if not numbers:
        return "", None, (words[-1],)
    first = numbers[0]
    stack = [word for word in words[:first] if word not in ("model", "base_model", "transformer")]
    rest = tuple(word for word in words[first + 1 :] if not word.isdigit() and word != "layer")
    stack = [word for word in stack if word not in ("layers", "layer", "block", "blocks", "h")]
    return ".".join(stack), int(words[first]), rest or (words[-1],)


def allocations(row: Row) -> list[Path]:
    """Return the row's distinct allocations, in the runs' order."""
    return list(dict.fromkeys(run.allocation for run in row.runs if run.allocation))


def module_means(row: Row, key: str = "rank") -> tuple[dict[str, float], int]:
    """Return a number by module, averaged over the row's distinct allocations, and how many.

    A module that an allocation does not have counts as 0, as one without adapter does.

    Raises
    ------
    UserError
        Where an allocation has no such number.
    """
    found: list[dict[str, Any]] = [_modules(path, key) for path in allocations(row)]
    names = list(dict.fromkeys(name for modules in found for name in modules))
    return {
        name: sum(modules.get(name, {}).get(key) or 0 for modules in found) / len(found)
        for name in names
    }, len(found)


def _modules(path: Path, key: str) -> dict[str, dict[str, Any]]:
    content = read_json(path)
    modules = content.get("modules") if isinstance(content, dict) else None
    if not isinstance(modules, dict) or any(key not in entry for entry in modules.values()):
        raise UserError(f"{path}: modules: expected {key} of every module")
    return modules


def drawn_rows(section: Section) -> dict[str, tuple[Row, list[str]]]:
    """Return the rows with an allocation by method, and the labels of further rows with the same.

    Rows that differ in nothing that the allocation depends on share it, and one picture. Of rows
    that a preset varies the first stands for all.
    """
    found: dict[tuple[Path, ...], tuple[Row, list[str]]] = {}
    varied: set[str] = set()
    for row in section.rows:
        paths = tuple(allocations(row))
        name, _, values = row.method.partition("(")
        if values and paths not in found:
            if name in varied or not paths:
                continue
            varied.add(name)
        if paths and paths not in found:
            found[paths] = (row, [])
        elif paths:
            found[paths][1].append(row.label)
    return {f"{row.method} {row.label}": (row, others) for row, others in found.values()}


def draw(scene: Scene, first: Section | None) -> list[Picture]:
    """Draw the section's allocations, and how they differ from the first task's.

    Parameters
    ----------
    scene
        The section.
    first
        The first section of the same model, None where it is this one.
    """
    pictures = []
    for row, others in drawn_rows(scene.section).values():
        for key in KINDS:
            pictures += _allocated(scene, row, others, key)
            pictures += _differences(scene, row, first, key)
        pictures += _sensitivity(scene, row)
    return pictures


def _allocated(scene: Scene, row: Row, others: Sequence[str], key: str) -> list[Picture]:
    picture, bar = KINDS[key]
    modules, count = module_means(row, key)
    if _constant(modules.values()):
        return []
    note = [f"Sum of ranks: {sum(modules.values()):g}"] if key == "rank" else []
    if key == "scaling":
        note.append("Scaling: what B A is multiplied with, alpha / rank")
    note += [f"mean of {count} allocations"] if count > 1 else []
    note += [f"the same for {', '.join(others)}"] if others else []
    title = f"{bar} per module of {row.label}, {scene.section.title}"
    form = "{:.0f}" if key == "rank" and count == 1 else "{:.2g}"
    return [_grid(scene, row, modules, picture, bar, title, "; ".join(note), form)]


def _constant(values: Iterable[float]) -> bool:
    """Tell whether all modules have the same, which needs no picture."""
    found = list(values)
    return max(found, default=0.0) - min(found, default=0.0) <= 1e-9


def _differences(scene: Scene, row: Row, first: Section | None, key: str) -> list[Picture]:
    others = (
        [r for r in first.rows if (r.method, r.label) == (row.method, row.label)] if first else []
    )
    if first is None or not others or not allocations(others[0]):
        return []
    mine, before = module_means(row, key)[0], module_means(others[0], key)[0]
    modules = {name: mine[name] - before[name] for name in mine if name in before}
    if _constant([0.0, *modules.values()]):
        return []
    picture, bar = KINDS[key]
    section = scene.section
    between = f"{section.task_label} minus {first.task_label}"
    title = f"{bar} of {row.label}: {between}, {section.model_label}"
    whole = all(float(value).is_integer() for value in modules.values())
    form = "{:+.0f}" if whole else "{:+.1f}"
    mean = sum(abs(value) for value in modules.values()) / len(modules)
    note = f"Mean absolute difference: {mean:.3g}; more: violet, less: orange"
    name = f"{picture}-minus-{first.task}"
    return [_grid(scene, row, modules, name, f"{bar}, difference", title, note, form, True)]


def _grid(
    scene: Scene,
    row: Row,
    modules: dict[str, float],
    picture: str,
    bar: str,
    title: str,
    note: str,
    form: str,
    centred: bool = False,
) -> Picture:
    import numpy as np

    layers, projections, values = rank_grid(modules)
    grid = np.array([[np.nan if v is None else v for v in line] for line in values], dtype=float)
    figure, axes = heatmap(grid, layers, projections, bar, form=form, centred=centred)
    axes.set_ylabel("Layer")
    caption(figure, title, f"{note}.")
    lines = [
        f"layer {layer}: "
        + ", ".join(
            f"{p} {v:.4g}" for p, v in zip(projections, numbers, strict=True) if v is not None
        )
        for layer, numbers in zip(layers, values, strict=True)
    ]
    return scene.write(figure, picture, title, "; ".join(lines) + ".", scene.method(row))


def _sensitivity(scene: Scene, row: Row) -> list[Picture]:
    """Draw every module's rank against its share of the sensitivity."""
    content = read_json(allocations(row)[0])
    modules = content["modules"]
    total = sum(entry.get("sensitivity") or 0.0 for entry in modules.values())
    if not total or any(not entry.get("sensitivity") for entry in modules.values()):
        return []
    if any(_constant(entry[key] for entry in modules.values()) for key in ("rank", "sensitivity")):
        return []
    places = {name: _place(name)[2][-1] for name in modules}
    kinds = list(dict.fromkeys(places.values()))
    figure, axes = new_figure(2.2)
    shares = {name: len(modules) * m["sensitivity"] / total for name, m in modules.items()}
    budget = sum(entry["rank"] for entry in modules.values()) / len(modules)
    ends = [min(shares.values()), max(shares.values())]
    line = [ends[0] * (ends[1] / ends[0]) ** (step / 50) for step in range(51)]
    in_proportion = "in proportion"
    axes.plot(
        line, [budget * x for x in line], color=SOFT, linewidth=0.8, label=in_proportion, zorder=1
    )
    for index, kind in enumerate(kinds):
        mine = [name for name in modules if places[name] == kind]
        axes.plot(
            [shares[name] for name in mine],
            [modules[name]["rank"] for name in mine],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            markerfacecolor="none",
            color=COLOURS[index % len(COLOURS)],
            label=kind,
        )
    axes.set_xscale("log")
    if min(entry["rank"] for entry in modules.values()) > 0:
        axes.set_yscale("log", base=2)
    else:
        axes.set_yscale("symlog", base=2, linthresh=1, linscale=0.5)
        axes.set_ylim(bottom=-0.3)
    _plain_ticks(axes)
    axes.set_xlabel("Sensitivity, as a multiple of the mean (logarithmic)")
    axes.set_ylabel("Rank")
    legend(figure, axes)
    title = f"Rank against sensitivity of {row.label}, {scene.section.title}"
    more = "; first of several allocations" if len(allocations(row)) > 1 else ""
    caption(
        figure, title, f"{len(modules)} modules; line: rank in proportion to sensitivity{more}."
    )
    ordered = sorted(modules, key=lambda name: -shares[name])[:10]
    told = ", ".join(f"{n} {shares[n]:.3g}: rank {modules[n]['rank']}" for n in ordered)
    told = f"The most sensitive modules, as multiples of the mean: {told}."
    return [scene.write(figure, "sensitivity", title, told, scene.method(row))]


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = axes.get_xlim()
    steps = [m * 10.0**e for e in range(-6, 7) for m in ((1, 3) if high / low > 30 else (1, 2, 5))]
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(NullLocator())
    top = axes.get_ylim()[1]
    ranks = [0, *(2**power for power in range(14) if 2**power <= top)]
    axes.yaxis.set_major_locator(FixedLocator(ranks))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(NullLocator())
