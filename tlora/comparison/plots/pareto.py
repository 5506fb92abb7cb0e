"""Scores against what they cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from tlora.comparison.plots.scores import CUT, bars, base_line, interval, limits
from tlora.comparison.plots.style import (
    SOFT,
    Picture,
    Scene,
    caption,
    count_axis,
    dodge,
    legend,
    new_figure,
    score_axis,
)

COSTS = {
    "time": ("training_seconds", "Training (s)", 1),
    "devices": ("model_device_hours", "Tuning, init and training (device-hours)", 1),
    "memory": ("peak_memory_bytes", "Peak memory (GiB)", 2**30),
    "parameters": ("trainable_parameters", "Trainable parameters", 1),
    "size": ("adapter_bytes", "Exported weights (MiB)", 2**20),
}
"""By the picture's name: the column of the costs, the axis's label, and its unit."""


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the points that no other beats: none is at most as dear and better, or vice versa.

    Parameters
    ----------
    costs
        Lower is better.
    scores
        Higher is better; as many.

    Returns
    -------
    list of int
        Places by ascending cost; of equal points all.

    >>> front([1, 2, 2, 3], [5, 4, 6, 6])
    [0, 2]
    """
    points = list(zip(costs, scores, strict=True))
    unbeaten = [
        place
        for place, (cost, score) in enumerate(points)
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    ]
    return sorted(unbeaten, key=lambda place: (costs[place], scores[place], place))


def draw(scene: Scene) -> list[Picture]:
    """Draw every benchmark against every cost that at least one row has."""
    return [
        picture
        for benchmark in scene.section.benchmarks
        for name in COSTS
        for picture in _pareto(scene, benchmark, name)
    ]


def _pareto(scene: Scene, benchmark: str, name: str) -> list[Picture]:
    section, label = scene.section, scene.labels[benchmark]
    key, axis, size = COSTS[name]
    shown, left_out = [], []
    for row, record, cost in zip(section.rows, scene.found, scene.spent, strict=True):
        score = interval(record, benchmark)
        if row.base:
            continue
        if score is None or not cost[key]:
            left_out.append(row.label)
        else:
            shown.append((row, score, cost[key] / size))
    if not shown:
        return []
    figure, axes = new_figure(2.2)
    values = [value for _, _, value in shown]
    span = max(values) / min(values)
    places = dodge(values, step=max(1.0001, span**0.02) if span > 1 else 1.03, most=1.4)
    best = front(values, [score.mean for _, score, _ in shown])
    told = []
    for index, ((row, score, value), place) in enumerate(zip(shown, places, strict=True)):
        look = scene.looks[row.label]
        if score.half_width is not None:
            bar = {"color": look.colour, "capsize": 2, "elinewidth": 0.7, "capthick": 0.7}
            axes.errorbar(place, score.mean, yerr=score.half_width, **bar)
        if score.low is not None and score.high is not None:
            axes.plot([place, place], [score.low, score.high], color=look.colour, linewidth=2.2)
        axes.plot(
            place,
            score.mean,
            marker=look.marker,
            markersize=6 if index in best else 5,
            color=look.colour,
            markerfacecolor=look.colour if index in best else "white",
            linestyle="none",
            label=row.label,
            zorder=3,
        )
        sign = ", on the front" if index in best else ""
        told.append(f"{row.label} {score.mean:.2f} at {value:,.3g}{sign}")
    axes.set_xscale("log")
    low, high = min(places), max(places)
    margin = max(1.12, (high / low) ** 0.08)
    axes.set_xlim(low / margin, high * margin)
    steps = [(places[index], shown[index][1].mean) for index in best]
    axes.plot(
        [*(cost for cost, _ in steps), high * margin],
        [*(mean for _, mean in steps), steps[-1][1]],
        drawstyle="steps-post",
        color=SOFT,
        linewidth=0.9,
        zorder=1,
    )
    *ends, cut = limits([score for _, score, _ in shown], section.share(benchmark))
    base = base_line(scene, axes, benchmark, *ends)
    told = [base, *told] if base else told
    axes.set_ylim(*ends)
    count_axis(axes)
    axes.set_xlabel(f"{axis}, logarithmic")
    axes.set_ylabel(score_axis(section, benchmark, label))
    legend(figure, axes)
    title = f"{label} against {axis[0].lower()}{axis[1:]}, {section.title}"
    notes = [
        "Line and filled: Pareto front of the means",
        bars(scene, benchmark, [score for _, score, _ in shown]).replace("Bars", "bars"),
    ]
    if cut:
        notes.append(CUT)
    if places != values:
        notes.append("nearly equal costs are drawn side by side")
    if name == "devices" and not any(cost["tuning_trials"] for cost in scene.spent):
        notes.append("nothing was tuned")
    if left_out:
        notes.append(f"not known: {', '.join(left_out)}")
    caption(figure, title, "; ".join(notes) + ".")
    return [scene.write(figure, f"pareto-{name}-{benchmark}", title, "; ".join(told) + ".")]
