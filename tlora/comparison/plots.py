"""The pictures of the comparison, as PNG files.

Files are named `{task}/{picture}__{model}__{method}.png`: `loss`, `accuracy-{benchmark}` (method
`all`) and `ranks`. Colours are Okabe and Ito's, told apart with any colour vision; marker and line
style differ as well. Equal inputs give equal bytes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tlora.artefact import read_json
from tlora.comparison.collect import Comparison, Row, Run, Section
from tlora.comparison.statistics import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
DPI = 150


@dataclass(frozen=True)
class Picture:
    """One written plot: its path below the plot folder, a title and a text that replaces it."""

    path: str
    task: str
    model: str
    title: str
    description: str


class Look(NamedTuple):
    """How a method is drawn everywhere in a comparison."""

    colour: str
    marker: str
    line: str


def _look(index: int) -> Look:
    # a second round through the colours goes with other markers and lines
    shifted = index + index // len(COLOURS)
    return Look(
        COLOURS[index % len(COLOURS)], MARKERS[shifted % len(MARKERS)], LINES[shifted % len(LINES)]
    )


def draw(comparison: Comparison, folder: Path) -> list[Picture]:
    """Write every plot below `folder`, one subfolder a task, and say what was written."""
    trained = dict.fromkeys(row.label for row in comparison.rows if not row.base)
    looks = {label: _look(index) for index, label in enumerate(trained)}
    pictures = []
    for section in comparison.sections:
        (folder / section.task).mkdir(parents=True, exist_ok=True)
        if any(run.log for row in section.rows for run in row.runs):
            pictures.append(_loss(section, looks, folder))
        for benchmark in section.benchmarks:
            label = comparison.labels[benchmark]
            if any(row.scores(benchmark) and row.trainable_parameters for row in section.rows):
                pictures.append(_accuracy(section, benchmark, label, looks, folder))
        names = [row.method for row in section.rows]
        for row in section.rows:
            unique = row.method if names.count(row.method) == 1 else _slug(row.label)
            if any(run.allocation for run in row.runs):
                pictures.append(_ranks(section, row, unique, folder))
    return pictures


# ---------------------------------------------------------------- loss


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centred moving average of `values`; the window shrinks towards both ends.

    Parameters
    ----------
    values
        One value per logged step.
    window
        Odd number of logged steps.
    """
    half = window // 2
    smoothed = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        part = values[index - reach : index + reach + 1]
        smoothed.append(sum(part) / len(part))
    return smoothed


def loss_curve(run: Run) -> tuple[list[int], list[float]]:
    """Return steps and training losses of a run's log."""
    rows = [row for row in run.log if isinstance(row.get("loss"), int | float)]
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]


def mean_curve(curves: Sequence[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """Return the mean over curves at the steps that all of them have logged."""
    common = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    return common, [sum(table[step] for table in tables) / len(tables) for step in common]


def _loss(section: Section, looks: dict[str, Look], folder: Path) -> Picture:
    figure, axes = _figure(7.2, 4.2)
    longest = max(len(run.log) for row in section.rows for run in row.runs)
    # about a twentieth of the run, odd, so that the average stands over its centre
    window = max(1, longest // 20) // 2 * 2 + 1
    several = False
    for row in section.rows:
        curves = [curve for run in row.runs if len((curve := loss_curve(run))[0])]
        if not curves:
            continue
        colour, _, line = looks[row.label]
        several = several or len(curves) > 1
        for steps, losses in curves:
            axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.3)
        steps, losses = mean_curve(curves)
        style = {"color": colour, "linestyle": line, "linewidth": 2}
        axes.plot(steps, smooth(losses, window), label=row.label, **style)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel("Training loss (nats per token)")
    who = "thick: mean over seeds" if several else "thick: the one seed"
    over = f"smoothed (moving average of {window} logged steps)" if window > 1 else "not smoothed"
    _legend(figure, axes)
    title = f"Training loss, {section.title}"
    _title(figure, title, f"Thin: each seed as logged; {who}, {over}.")
    name = f"{section.task}/loss__{section.model}__all.png"
    _save(figure, folder / name)
    finals = {
        row.label: summarise([c[1][-1] for r in row.runs if (c := loss_curve(r))[1]]).mean
        for row in section.rows
    }
    values = ", ".join(f"{k} {v:.3f}" for k, v in finals.items() if v is not None)
    return Picture(
        path=name,
        task=section.task,
        model=section.model,
        title=title,
        description=f"Training loss against optimizer step. Last logged loss, mean: {values}.",
    )


# ---------------------------------------------------------------- accuracy


def dodge(values: Sequence[float], step: float = 1.06, most: float = 1.4) -> list[float]:
    """Move equal or nearly equal values apart, symmetrically, by factors of `step`.

    For points that would cover each other on a logarithmic axis. A crowd is packed closer, so that
    its ends are no more than the factor `most` further apart than they were.

    >>> [round(value) for value in dodge([100.0, 5.0, 100.0], step=1.44, most=2.0)]
    [83, 5, 120]
    """
    moved = list(values)
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    groups: list[list[int]] = []
    for index in order:
        if groups and values[index] <= values[groups[-1][0]] * step:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        factor = min(step, most ** (1 / max(1, len(group) - 1)))
        for place, index in enumerate(group):
            moved[index] = values[index] * factor ** (place - (len(group) - 1) / 2)
    return moved


def _accuracy(
    section: Section, benchmark: str, label: str, looks: dict[str, Look], folder: Path
) -> Picture:
    figure, axes = _figure(7.2, 4.2)
    scale, unit = (100, " %") if section.share(benchmark) else (1, "")
    shown = [r for r in section.rows if r.trainable_parameters and r.scores(benchmark)]
    sizes = [float(row.trainable_parameters or 0) for row in shown]
    places = dodge(sizes)
    told = []
    for row, place in zip(shown, places, strict=True):
        accuracy = row.accuracy(benchmark)
        look = looks[row.label]
        mean, std = scale * (accuracy.mean or 0), accuracy.std
        axes.errorbar(
            place,
            mean,
            yerr=None if std is None else scale * std,
            color=look.colour,
            marker=look.marker,
            markersize=8,
            markeredgecolor="white",
            linestyle="none",
            elinewidth=1.5,
            capsize=4,
            label=row.label,
        )
        told.append(f"{row.label} {mean:.2f}{unit} with {row.trainable_parameters:,} parameters")
    for row in section.rows:
        mean = row.accuracy(benchmark).mean
        if row.base and mean is not None:
            line = {"color": "#555555", "linestyle": "--", "linewidth": 1.2}
            axes.axhline(scale * mean, label=row.label, **line)
            told.insert(0, f"{row.label} {scale * mean:.2f}{unit}")
    axes.set_xscale("log")
    low, high = min(places), max(places)
    margin = max(1.5, (high / low) ** 0.1)
    axes.set_xlim(low / margin, high * margin)
    _count_axis(axes)
    axes.set_xlabel("Trainable parameters (logarithmic)")
    axes.set_ylabel(f"{label} (%)" if unit else f"{label} (points)")
    bars = any(row.accuracy(benchmark).std is not None for row in shown)
    first = "Bars: ± one standard deviation over seeds" if bars else "One seed: no error bars"
    apart = "; nearly equal counts are drawn side by side" if places != sizes else ""
    _legend(figure, axes)
    title = f"{label} against trainable parameters, {section.title}"
    _title(figure, title, f"{first}{apart}.")
    name = f"{section.task}/accuracy-{benchmark}__{section.model}__all.png"
    _save(figure, folder / name)
    return Picture(
        path=name,
        task=section.task,
        model=section.model,
        title=title,
        description="; ".join(told) + ".",
    )


def _count_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def compact(value: float, _: int) -> str:
        for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if value >= size:
                return f"{value / size:g}{sign}"
        return f"{value:g}"

    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    axes.xaxis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------- ranks


def rank_grid(modules: dict[str, float]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Arrange ranks by layer and projection.

    The first number in a dotted module name is its layer; what stands before it is told only where
    there are several stacks (an encoder and a decoder); the projection is the last word, or the
    words after the layer where that is not unique.

    Parameters
    ----------
    modules
        Rank by full module name.

    Returns
    -------
    rows, columns, values
        Labels of the layers (natural order) and of the projections (order of appearance), and
        the ranks; None where a layer has no such module.
    """
    parsed = [(*_place(name), rank) for name, rank in modules.items()]
    stacks = {stack for stack, layer, _, _ in parsed if layer is not None}
    last = {words: words[-1] for _, _, words, _ in parsed}
    unique = len(set(last.values())) == len(last)
    rows: dict[tuple[str, int], str] = {}
    table: dict[tuple[str, int], dict[str, float]] = {}
    columns: dict[str, None] = {}
    for stack, layer, words, rank in parsed:
        column = last[words] if unique else ".".join(words)
        # modules outside the layers (an output head) stand below them
        key = (stack, layer) if layer is not None else ("\uffff", 0)
        known = f"{stack} {layer}" if len(stacks) > 1 else str(layer)
        rows[key] = known if layer is not None else "other"
        columns[column] = None
        table.setdefault(key, {})[column] = rank
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


def mean_ranks(row: Row) -> tuple[dict[str, float], int]:
    """Return rank by module, averaged over the row's distinct allocations, and their number."""
    paths = list(dict.fromkeys(run.allocation for run in row.runs if run.allocation))
    found: list[dict[str, Any]] = [read_json(path)["modules"] for path in paths]
    names = list(dict.fromkeys(name for modules in found for name in modules))
    return {
        name: sum(modules.get(name, {}).get("rank", 0) for modules in found) / len(found)
        for name in names
    }, len(paths)


def _ranks(section: Section, row: Row, name: str, folder: Path) -> Picture:
    import numpy as np
    from matplotlib import colormaps

    modules, count = mean_ranks(row)
    layers, projections, values = rank_grid(modules)
    grid = np.array([[np.nan if v is None else v for v in line] for line in values], dtype=float)
    width = min(1.2, max(0.75, 0.11 * max(len(column) for column in projections)))
    figure, axes = _figure(max(6.0, 2.2 + width * len(projections)), 1.9 + 0.34 * len(layers))
    shades = colormaps["YlGnBu"].with_extremes(bad="#E5E5E5")
    high = float(np.nanmax(grid)) if np.isfinite(grid).any() else 1.0
    image = axes.imshow(grid, cmap=shades, aspect="auto", vmin=0, vmax=max(high, 1.0))
    for (i, j), value in np.ndenumerate(grid):
        known = np.isfinite(value)
        text = f"{value:.0f}" if known and float(value).is_integer() else f"{value:.1f}"
        red, green, blue, _ = shades(value / max(high, 1.0)) if known else (1.0, 1.0, 1.0, 1.0)
        colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(j, i, text if known else "–", ha="center", va="center", color=colour, fontsize=8)
    slanted = max(len(column) for column in projections) > 12
    turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(projections)), projections, **turned)
    axes.set_yticks(range(len(layers)), layers)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_ylabel("Layer")
    axes.set_xlabel("Projection")
    figure.colorbar(image, ax=axes, label="Rank", shrink=0.9)
    over = f"; mean of {count} allocations" if count > 1 else ""
    title = f"Rank per module of {row.label}, {section.title}"
    _title(figure, title, f"Sum of ranks: {sum(modules.values()):g}{over}.")
    path = f"{section.task}/ranks__{section.model}__{name}.png"
    _save(figure, folder / path)
    lines = [
        f"layer {layer}: "
        + ", ".join(f"{p} {v:g}" for p, v in zip(projections, ranks, strict=True) if v is not None)
        for layer, ranks in zip(layers, values, strict=True)
    ]
    return Picture(
        path=path,
        task=section.task,
        model=section.model,
        title=title,
        description="; ".join(lines) + ".",
    )


# ---------------------------------------------------------------- shared


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _title(figure: Figure, title: str, note: str) -> None:
    size = figure.get_size_inches()[0]
    figure.suptitle(textwrap.fill(title, int(size * 12)), x=0.01, ha="left", fontsize=11)
    wrapped = textwrap.fill(note, int(size * 14))
    figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=8, color="#444444")


def _legend(figure: Figure, axes: Axes) -> None:
    # beside the axes: it never covers a curve or a point, however many methods there are
    handles, labels = axes.get_legend_handles_labels()
    # the marker alone stands for a point with its error bar
    handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    columns = 1 if len(labels) <= 16 else 2
    where = "outside right center"
    figure.legend(handles, labels, loc=where, frameon=False, ncols=columns, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-") or "row"
