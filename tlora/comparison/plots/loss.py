"""Training loss against optimizer step, with a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from tlora.comparison.collect import Run
from tlora.comparison.plots.style import Picture, Scene, caption, legend, new_figure
from tlora.comparison.statistics import summarise

Curve = tuple[list[int], list[float]]


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


def loss_curve(run: Run) -> Curve:
    """Return steps and training losses of a run's log."""
    rows = [row for row in run.log if isinstance(row.get("loss"), int | float)]
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over curves at the steps that all of them have logged."""
    steps, tables = _common(curves)
    return steps, [sum(table[step] for table in tables) / len(tables) for step in steps]


def band(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Return the least and the largest value over curves at the steps that all of them have."""
    steps, tables = _common(curves)
    low = [min(table[step] for table in tables) for step in steps]
    return steps, low, [max(table[step] for table in tables) for step in steps]


def _common(curves: Sequence[Curve]) -> tuple[list[int], list[dict[int, float]]]:
    steps = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    return steps, [dict(zip(*curve, strict=True)) for curve in curves]


def draw(scene: Scene) -> list[Picture]:
    """Draw the section's losses; nothing where no run has logged any."""
    section = scene.section
    curves = {
        row.label: [curve for run in row.runs if len((curve := loss_curve(run))[0])]
        for row in section.rows
    }
    curves = {label: found for label, found in curves.items() if found}
    if not curves:
        return []
    figure, axes = new_figure(2.2)
    longest = max(len(steps) for found in curves.values() for steps, _ in found)
    # about a twentieth of the run, odd, so that the average stands over its centre
    window = max(1, longest // 20) // 2 * 2 + 1
    for label, found in curves.items():
        colour, _, line = scene.looks[label]
        smoothed = [(steps, smooth(losses, window)) for steps, losses in found]
        if len(found) > 1:
            axes.fill_between(*band(smoothed), color=colour, alpha=0.2, linewidth=0)
        axes.plot(*mean_curve(smoothed), color=colour, linestyle=line, label=label)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel("Training loss (nats per token)")
    legend(figure, axes)
    several = any(len(found) > 1 for found in curves.values())
    who = "Line: mean over seeds; band: lowest to highest seed" if several else "One seed each"
    over = f"moving average of {window} logged steps" if window > 1 else "not smoothed"
    title = f"Training loss, {section.title}"
    caption(figure, title, f"{who}; {over}.")
    finals = {label: summarise([c[1][-1] for c in found]).mean for label, found in curves.items()}
    values = ", ".join(f"{label} {value:.3f}" for label, value in finals.items())
    told = f"Training loss against optimizer step. Last logged loss, mean: {values}."
    return [scene.write(figure, "loss", title, told)]
