"""How all pictures look: column width, letters of 7 points and more, colours, markers, files.

Colours are Okabe and Ito's, told apart with any colour vision; marker and line style differ as
well. Equal inputs give equal bytes.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tlora.comparison.collect import Row, Section
from tlora.comparison.tables import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
SOFT = "#555555"

WIDTH = 3.3
"""Inches: one column of a two-column page."""

DPI = 300
LETTERS = 62
"""Letters of 7 points that fit the width."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
    "text.usetex": False,
    # labels are what people called things, never formulas
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """One plot: its PNG's path below the plot folder, a title and a text that replaces it.

    The same plot as PDF lies beside it.
    """

    path: str
    task: str
    model: str
    title: str
    description: str

    @property
    def pdf(self) -> str:
        """The path of the PDF."""
        return self.path.removesuffix(".png") + ".pdf"


class Look(NamedTuple):
    """How a method is drawn everywhere in a comparison."""

    colour: str
    marker: str
    line: str


@dataclass(frozen=True)
class Scene:
    """What the pictures of one section are drawn from.

    Attributes
    ----------
    found, spent
        The section's records of table.csv and of its costs, row by row.
    labels
        Of the benchmarks.
    looks
        By the methods' labels.
    folder
        The plot folder.
    """

    section: Section
    found: Sequence[Record]
    spent: Sequence[Record]
    labels: dict[str, str]
    looks: dict[str, Look]
    folder: Path

    def write(
        self, figure: Figure, picture: str, title: str, description: str, method: str = "all"
    ) -> Picture:
        """Write the figure as PNG and PDF and return what it is."""
        section = self.section
        name = f"{section.task}/{picture}__{section.model}__{method}.png"
        save(figure, self.folder / name)
        return Picture(name, section.task, section.model, title, description)

    def method(self, row: Row) -> str:
        """Return the row's name in paths; rows of one method are told apart by their labels."""
        names = [other.method for other in self.section.rows]
        return slug(row.method if names.count(row.method) == 1 else row.label)


def look(index: int) -> Look:
    """Return the look of the method with this number, from 0."""
    # a second round through the colours goes with other markers and lines
    shifted = index + index // len(COLOURS)
    return Look(
        COLOURS[index % len(COLOURS)], MARKERS[shifted % len(MARKERS)], LINES[shifted % len(LINES)]
    )


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the pictures' style, whatever is configured on this machine."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return an empty figure (inches) with one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def caption(figure: Figure, title: str, note: str) -> None:
    """Put the title above and the note below, and make the figure higher by what they need."""
    width, height = figure.get_size_inches()
    letters = int(LETTERS * width / WIDTH)
    head = textwrap.fill(title, int(letters * 0.88))
    foot = textwrap.fill(note, letters)
    figure.suptitle(head, x=0.02, ha="left", fontsize=8)
    figure.supxlabel(foot, x=0.02, ha="left", fontsize=7, color="#444444")
    lines = head.count("\n") + 1 + foot.count("\n") + 1
    figure.set_size_inches(width, height + 0.13 * lines)


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below the axes: it never covers a curve or a point."""
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    handles, labels = axes.get_legend_handles_labels()
    # the marker alone stands for a point with its error bar
    handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    labels = [short(label, 40) for label in labels]
    longest = max((len(label) for label in labels), default=0)
    columns = max(1, min(4, LETTERS // (longest + 8), len(labels)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.15 * -(-len(labels) // columns))
    # below tick labels and axis label, in the middle of the figure
    below = axes.transAxes + ScaledTranslation(0, -0.37, figure.dpi_scale_trans)
    axes.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=blended_transform_factory(figure.transFigure, below),
        frameon=False,
        ncols=columns,
        handlelength=1.8,
        columnspacing=1.0,
        handletextpad=0.5,
        labelspacing=0.3,
        borderaxespad=0.0,
    )


def save(figure: Figure, path: Path) -> None:
    """Write PNG and PDF, without a date or the name of what wrote them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # laid out once for both files
    figure.draw_without_rendering()
    figure.set_layout_engine(None)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    nothing = {"CreationDate": None, "Creator": None, "Producer": None}
    figure.savefig(path.with_suffix(".pdf"), metadata=nothing)


def slug(label: str) -> str:
    """Return a label as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._(),=+-]+", "-", label).replace("__", "_").strip("-") or "row"


def short(label: str, limit: int = 28) -> str:
    """Return a label that fits beside the axes, with its end, where varied values stand.

    >>> short("TLoRA (calibration_samples = 128)", 20)
    'TLoRA (ca…les = 128)'
    """
    tail = limit // 2
    return label if len(label) <= limit else f"{label[: limit - tail - 1]}…{label[-tail:]}"


def count_axis(axes: Axes, which: str = "x") -> None:
    """Make an axis logarithmic, with whole numbers in k, M and B."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    span = high / low
    subs = (1.0, 2.0, 5.0) if span < 100 else (1.0, 3.0) if span < 1e4 else (1.0,)
    if span < 4:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axis.set_minor_formatter(NullFormatter())


def compact(value: float) -> str:
    """Return a number in few letters.

    >>> compact(1_500_000), compact(20_000.0), compact(0.003)
    ('1.5M', '20k', '0.003')
    """
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


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


def score_axis(section: Section, benchmark: str, label: str) -> str:
    """Return what stands at an axis of the benchmark's scores."""
    return f"{label} ({'%' if section.share(benchmark) else 'points'})"


def heatmap(
    grid: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    bar: str,
    *,
    form: str = "{:.0f}",
    limits: tuple[float, float] | None = None,
    centred: bool = False,
) -> tuple[Figure, Axes]:
    """Draw a table of numbers as shades; NaN is grey with a dash.

    Parameters
    ----------
    grid
        (rows, columns) of float.
    rows, columns
        Labels.
    bar
        What the shades say.
    form
        Of a cell's number, left out where cells are too narrow for it.
    limits
        Of the shades; None takes those of the numbers.
    centred
        Whether white is 0, with one colour on either side.
    """
    import numpy as np
    from matplotlib import colormaps

    known = grid[np.isfinite(grid)]
    low, high = limits or (min(0.0, known.min(initial=0.0)), known.max(initial=0.0))
    if centred:
        high = max(abs(low), abs(high), 1e-12)
        low = -high
    high = high if high > low else low + 1.0
    left = 0.062 * max((len(name) for name in rows), default=0)
    room = (WIDTH - 0.95 - left) / max(1, len(columns))
    crowded = room < 0.14
    if crowded and list(rows) == list(columns):
        # names would cover each other: the rows tell the numbers
        columns = [str(place + 1) for place in range(len(rows))]
        rows = [f"{name} {place + 1}" for place, name in enumerate(rows)]
    turned = crowded or max((len(name) for name in columns), default=0) * len(columns) > 40
    height = 0.75 + 0.145 * len(rows)
    height += 0.055 * max((len(name) for name in columns), default=0) if turned else 0
    figure, axes = new_figure(height)
    # orange and blue stay apart with any colour vision, also in grey by their signs' text
    shades = colormaps["PuOr" if centred else "YlGnBu"].with_extremes(bad="#E5E5E5")
    image = axes.imshow(grid, cmap=shades, aspect="auto", vmin=low, vmax=high)
    texts = [_cell(value, form) for value in known] or ["0"]
    if room > 0.062 * max(map(len, texts)):
        for (i, j), value in np.ndenumerate(grid):
            shade = shades((value - low) / (high - low)) if np.isfinite(value) else (1, 1, 1, 1)
            dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
            text = _cell(value, form) if np.isfinite(value) else "–"
            colour = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
    extra = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    extra = {"rotation": 90} if crowded else extra
    every = range(0, len(columns), max(1, math.ceil(0.12 / room)))
    axes.set_xticks(every, [columns[place] for place in every], **extra)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.grid(False)
    colourbar = figure.colorbar(image, ax=axes, label=bar, shrink=0.9, pad=0.02, aspect=25)
    colourbar.outline.set_linewidth(0.4)
    return figure, axes


def _cell(value: float, form: str) -> str:
    text = form.format(value)
    # no sign before nothing
    return text if float(text) else form.replace("+", "").format(0.0)
