"""Scores with 95 % intervals, and their curves over a varied setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tlora.comparison.collect import Row
from tlora.comparison.plots.style import (
    SOFT,
    Picture,
    Scene,
    caption,
    legend,
    new_figure,
    score_axis,
    short,
)
from tlora.comparison.tables import Record, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIED = {
    "calibration_samples": ("Calibration samples", ()),
    "rank": ("Rank r", ("lora_alpha",)),
}
"""Settings with a curve of their own: the axis's label, and what may change with them."""


CUT = "thin bars without an end go on"


class Interval(NamedTuple):
    """A score with its 95 % intervals, in percent or in the benchmark's own unit.

    `low` and `high` are the hierarchical bootstrap's, None without verdicts on single items.
    """

    mean: float
    half_width: float | None
    low: float | None
    high: float | None


def interval(record: Record, benchmark: str) -> Interval | None:
    """Return the score and intervals of a record; None where it has no score."""
    mean = number(record, benchmark, "mean")
    if mean is None:
        return None
    names = ("ci95", "bootstrap_low", "bootstrap_high")
    return Interval(mean, *(number(record, benchmark, name) for name in names))


def bars(scene: Scene, benchmark: str, shown: Sequence[Interval]) -> str:
    """Say what the bars of a picture are."""
    if all(one.low is None for one in shown):
        return "Bars: 95 % intervals, of the items alone"
    several = any(record[f"{benchmark}_compared_by"] == "crossed" for record in scene.found)
    thin = "Student's t over seeds and items" if several else "of the items alone"
    return f"Bars: 95 % intervals (thick: hierarchical bootstrap, thin: {thin})"


def limits(shown: Sequence[Interval], share: bool) -> tuple[float, float, bool]:
    """Return the ends of an axis for scores, and whether it cuts thin bars off.

    With two seeds Student's t can give bars that would leave no room for anything else: they end
    where a share does, or at three times the span of all else.
    """
    firm = [v for one in shown for v in (one.mean, one.low, one.high) if v is not None]
    low, high = min(firm), max(firm)
    room = 3 * (high - low) or 1.0
    least, most = (0.0, 100.0) if share else (low - room, high + room)
    widths = [(one.mean, one.half_width) for one in shown if one.half_width is not None]
    ends = [(mean - width, mean + width) for mean, width in widths]
    low = min([low, *(max(least, end) for end, _ in ends)])
    high = max([high, *(min(most, end) for _, end in ends)])
    margin = 0.04 * (high - low) or 0.5
    cut = any(end < low - margin for end, _ in ends) or any(end > high + margin for _, end in ends)
    return low - margin, high + margin, cut


def base_line(scene: Scene, axes: Axes, benchmark: str, low: float, high: float) -> str | None:
    """Draw the base model's score if it lies between the ends of the axis, and tell it."""
    told = None
    for row, record in zip(scene.section.rows, scene.found, strict=True):
        base = interval(record, benchmark) if row.base else None
        if base is not None:
            told = f"{row.label} {base.mean:.2f}"
            if low < base.mean < high:
                line = {"color": SOFT, "linestyle": "--", "linewidth": 0.8}
                axes.axhline(base.mean, label=row.label, **line)
    return told


def draw(scene: Scene) -> list[Picture]:
    """Draw the scores of every benchmark, and the curves of what a preset varies."""
    pictures = []
    for benchmark in scene.section.benchmarks:
        if any(interval(record, benchmark) for record in scene.found):
            pictures.append(_scores(scene, benchmark))
        for key in VARIED:
            pictures += _ablation(scene, benchmark, key)
    return pictures


def _scores(scene: Scene, benchmark: str) -> Picture:
    section, label = scene.section, scene.labels[benchmark]
    share = section.share(benchmark)
    scale = 100 if share else 1
    figure, axes = new_figure(0.55 + 0.17 * len(section.rows))
    told = []
    for place, (row, record) in enumerate(zip(section.rows, scene.found, strict=True)):
        found = interval(record, benchmark)
        if found is None:
            axes.annotate(
                "failed" if record[f"{benchmark}_failed"] else "no score",
                (0.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                color=SOFT,
                backgroundcolor="white",
            )
            told.append(f"{row.label}: none")
            continue
        look = scene.looks.get(row.label)
        colour, marker = (look.colour, look.marker) if look else (SOFT, "|")
        if found.half_width is not None:
            axes.errorbar(
                found.mean, place, xerr=found.half_width, color=colour, capsize=2, elinewidth=0.8
            )
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2.6)
        seeds = [scale * score.value for score in row.scores(benchmark)]
        if len(seeds) > 1:
            # below the bars, so that all can be seen
            axes.plot(seeds, [place + 0.3] * len(seeds), "|", color=colour, markersize=3.5)
        hollow = record[f"{benchmark}_mark"] == "worse"
        axes.plot(
            found.mean,
            place,
            marker=marker,
            markersize=5.5,
            markerfacecolor="white" if hollow else colour,
            markeredgecolor=colour,
            linestyle="none",
            zorder=3,
        )
        bounds = "" if found.half_width is None else f" ± {found.half_width:.2f}"
        told.append(f"{row.label} {found.mean:.2f}{bounds}")
        if row.base:
            axes.axvline(found.mean, color=SOFT, linestyle="--", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(section.rows)), [short(row.label) for row in section.rows])
    axes.set_ylim(len(section.rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel(score_axis(section, benchmark, label))
    shown = [one for record in scene.found if (one := interval(record, benchmark)) is not None]
    low, high, cut = limits(shown, share)
    axes.set_xlim(low, high)
    notes = [bars(scene, benchmark, shown)]
    if cut:
        notes.append(CUT)
    if any(len(row.scores(benchmark)) > 1 for row in section.rows):
        notes.append("strokes below: seeds")
    if any(record[f"{benchmark}_mark"] == "worse" for record in scene.found):
        notes.append("hollow: lower than the best")
    title = f"{label} with 95 % intervals, {section.title}"
    caption(figure, title, "; ".join(notes) + ".")
    return scene.write(figure, f"accuracy-{benchmark}", title, "; ".join(told) + ".")


# ---------------------------------------------------------------- ablations


def varied(rows: Sequence[Row], key: str) -> list[list[tuple[float, int]]]:
    """Group the rows that differ in one setting only.

    Parameters
    ----------
    rows
        Of one section.
    key
        A key of `VARIED`. Settings that a row was tuned for may differ as well.

    Returns
    -------
    list
        One entry a curve: value and place of each of its rows, by ascending value; at least two
        different values.
    """
    groups: dict[str, dict[float, int]] = {}
    for place, row in enumerate(rows):
        settings = row.runs[0].settings if row.runs else {}
        value = settings.get(key)
        if row.base or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        free = {key, *VARIED[key][1]}
        free |= set(row.choice.tried[0]) if row.choice and row.choice.tried else set()
        rest = {name: setting for name, setting in settings.items() if name not in free}
        name = json.dumps([row.method.partition("(")[0], rest], sort_keys=True, default=str)
        # of rows with equal settings the first counts
        groups.setdefault(name, {}).setdefault(value, place)
    return [sorted(group.items()) for group in groups.values() if len(group) > 1]


def _ablation(scene: Scene, benchmark: str, key: str) -> list[Picture]:
    section, label = scene.section, scene.labels[benchmark]
    curves = []
    for group in varied(section.rows, key):
        found = [(value, place, interval(scene.found[place], benchmark)) for value, place in group]
        points = [(value, place, one) for value, place, one in found if one is not None]
        if len(points) > 1:
            curves.append(points)
    if not curves:
        return []
    figure, axes = new_figure(2.1)
    told, ticks = [], set()
    for index, points in enumerate(curves):
        row = section.rows[points[0][1]]
        # the label of a varied row is the method's with " (key = value)"
        name = row.label.rpartition(" (")[0] if "(" in row.method else ""
        name = name or row.label
        look = scene.looks[row.label]
        values = [value for value, _, _ in points]
        # curves over the same values side by side
        places = [value * 1.03 ** (index - (len(curves) - 1) / 2) for value in values]
        means = [one.mean for _, _, one in points]
        axes.plot(
            places, means, color=look.colour, marker=look.marker, linestyle=look.line, label=name
        )
        for place, (_, _, one) in zip(places, points, strict=True):
            bar = {"color": look.colour, "capsize": 2, "elinewidth": 0.8}
            if one.half_width is not None:
                axes.errorbar(place, one.mean, yerr=one.half_width, **bar)
            if one.low is not None and one.high is not None:
                axes.plot([place, place], [one.low, one.high], color=look.colour, linewidth=2.4)
        ticks |= set(values)
        pairs = ", ".join(f"{v:g}: {m:.2f}" for v, m in zip(values, means, strict=True))
        told.append(f"{name}: {pairs}")
    if min(ticks) > 0:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.set_xlabel(VARIED[key][0])
    axes.set_ylabel(score_axis(section, benchmark, label))
    drawn = [one for points in curves for _, _, one in points]
    *ends, cut = limits(drawn, section.share(benchmark))
    base_line(scene, axes, benchmark, *ends)
    axes.set_ylim(*ends)
    legend(figure, axes)
    title = f"{label} by {VARIED[key][0].lower()}, {section.title}"
    note = bars(scene, benchmark, drawn)
    caption(figure, title, note + (f"; {CUT}." if cut else "."))
    return [scene.write(figure, f"ablation-{key}-{benchmark}", title, "; ".join(told) + ".")]
