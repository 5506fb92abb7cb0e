"""What every method of a comparison cost: time, device-hours, memory, parameters, bytes.

Columns of the records
----------------------
One row per model, task and method. Times are means over the runs (seeds) that did not fail:

- `initialization_seconds` (calibration, allocation, initialization), `training_seconds`,
  `evaluation_seconds` (generation, over all benchmarks) of one run; `devices`: processes that
  trained it;
- `tuning_trials`, `tuning_failed`: the trials whose values the run has, and those without a score;
  `tuning_seconds`: of all of them, one after the other: their training and their evaluation on the
  validation split, and their jobs before training as far as the run does not need them anyway. A
  job that several trials share counts once. What a failed trial cost is known as far as it got;
- `{part}_device_hours`: seconds times devices; all but training has one;
- `model_device_hours`: tuning, initialization and training, which is what a tuned model costs;
  `total_device_hours`: with the evaluation;
- `all_device_hours`: what all runs of the row cost with its tuning, shared jobs once;
- `initialization_peak_memory_bytes`, `training_peak_memory_bytes` and, the larger of the two,
  `peak_memory_bytes`: the maximum over runs;
- `trainable_parameters`; `adapter_bytes`: the size of the exported weights on disk: an adapter
  with what is frozen of it, or a whole model where the method exports one.

For every benchmark B, `B_reaches_baseline` says whether the final mean is `higher` than the
baseline's, `lower`, or `not distinguishable` from it (5 % level, Holm; see `tlora.comparison.
tables`), and `B_cost_ratio` what a model cost, as a multiple of the baseline's, unless it is lower.
Accuracy is known at the end of training only, so this is no time at which the baseline's accuracy
was passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from tlora.artefact import read_json
from tlora.comparison import tables
from tlora.comparison.collect import Comparison, Row, Run, Section
from tlora.comparison.statistics import LEVEL, summarise
from tlora.comparison.tables import DASH, Column, Record

PARTS = ("initialization", "tuning", "training", "evaluation")

WEIGHTS = (".safetensors", ".bin")


def records(comparison: Comparison, found: Sequence[Record]) -> list[Record]:
    """Return the costs of every row; `tlora.comparison.tables.to_csv` writes them.

    Parameters
    ----------
    comparison
        Its rows, in their order, are those of the result.
    found
        The records of table.csv, which say who reaches the baseline.
    """
    costs = []
    for section, mine in tables.split(comparison, list(found)):
        own = [_identity(row) | row_costs(row) for row in section.rows]
        baseline = next((c for c, r in zip(own, mine, strict=True) if r["baseline"]), None)
        for cost, record in zip(own, mine, strict=True):
            for name in section.benchmarks:
                cost |= _reached(name, record, cost, baseline)
            costs.append(cost)
    return costs


def _identity(row: Row) -> Record:
    names = {"model": row.model, "task": row.task, "method": row.method, "label": row.label}
    return names | {"base": int(row.base), "runs": len(row.runs), "seeds": len(row.seeds)}


def row_costs(row: Row) -> Record:
    """Return the costs of one row; None for what is not known or does not apply.

    Seconds of wall time, hours of one device, bytes.
    """
    good = [run for run in row.runs if "" not in run.failures]
    trials = row.choice.trials if row.choice else ()
    devices = max((_devices(run) for run in good if run.training), default=None)
    record: Record = {"devices": devices, "tuning_trials": len(trials) if row.choice else None}
    failed = [value for value in row.choice.values if value is None] if row.choice else []
    record["tuning_failed"] = len(failed) if row.choice else None
    initial = summarise([s for run in good if (s := run.initialization_seconds) is not None]).mean
    trained = summarise([s for run in good if (s := _trained(run)) is not None]).mean
    on_devices = summarise(
        [s * _devices(run) for run in good if (s := _trained(run)) is not None]
    ).mean
    evaluated = summarise([_evaluated(run) for run in good if run.evaluation]).mean
    shared = good[0].jobs if good else {}
    before = math.fsum(s for path, s in _union(trials).items() if path not in shared)
    tuned = before + math.fsum((_trained(t) or 0) + _evaluated(t) for t in trials)
    tuned_devices = before + math.fsum(_device_seconds(trial) for trial in trials)
    seconds = {
        "initialization": initial,
        "tuning": tuned if row.choice else None,
        "training": trained,
        "evaluation": evaluated,
    }
    record |= {f"{part}_seconds": _rounded(seconds[part]) for part in PARTS}
    hours = seconds | {"training": on_devices, "tuning": tuned_devices if row.choice else None}
    hours = {part: None if s is None else s / 3600 for part, s in hours.items()}
    record |= {f"{part}_device_hours": _rounded(hours[part], 9) for part in PARTS}
    model = None
    if hours["training"] is not None:
        model = math.fsum(hours[part] or 0 for part in ("initialization", "tuning", "training"))
    total = None if model is None else model + (hours["evaluation"] or 0)
    # a run that failed has cost what it cost
    everything = math.fsum(_union([*row.runs, *trials]).values())
    everything += math.fsum(_device_seconds(run) for run in [*row.runs, *trials])
    record |= {
        "model_device_hours": _rounded(model, 9),
        "total_device_hours": _rounded(total, 9),
        "all_device_hours": _rounded(everything / 3600, 9) if everything else None,
    }
    memory = [run.initialization_memory for run in good if run.initialization_memory]
    peaks = {"initialization": max(memory, default=None), "training": row.peak_memory_bytes}
    record |= {f"{part}_peak_memory_bytes": value for part, value in peaks.items()}
    largest = max((value for value in peaks.values() if value is not None), default=None)
    record["peak_memory_bytes"] = None if peaks["training"] is None else largest
    record["trainable_parameters"] = row.trainable_parameters
    sizes = [size for run in good if (size := weight_bytes(run)) is not None]
    record["adapter_bytes"] = max(sizes, default=None)
    return record


def _union(runs: Iterable[Run]) -> dict[str, float]:
    return {path: seconds for run in runs for path, seconds in run.jobs.items()}


def _trained(run: Run) -> float | None:
    return (run.training or {}).get("train_seconds")


def _devices(run: Run) -> int:
    # runs of before processes were recorded had one
    return int((run.training or {}).get("processes") or 1)


def _evaluated(run: Run) -> float:
    return math.fsum(cost.get("seconds") or 0.0 for cost in run.evaluation.values())


def _device_seconds(run: Run) -> float:
    """Training and evaluation, times their devices."""
    return (_trained(run) or 0.0) * _devices(run) + _evaluated(run)


def weight_bytes(run: Run) -> int | None:
    """Return the size of a run's exported weights on disk, None where they are not there."""
    card = run.export_path
    if card is None or not card.is_file():
        return None
    names = [name for name in read_json(card).get("files") or {} if name.endswith(WEIGHTS)]
    paths = [card.parent / "weights" / name for name in names]
    if not paths or not all(path.is_file() for path in paths):
        return None
    return sum(path.stat().st_size for path in paths)


def _reached(name: str, record: Record, cost: Record, baseline: Record | None) -> Record:
    """Say whether a row reaches the baseline's accuracy, and at how many times its cost."""
    state, ratio = None, None
    gap, p = tables.number(record, name, "minus_baseline"), record[f"{name}_p_baseline"]
    if record["baseline"]:
        state = "baseline"
    elif gap is not None and p is not None:
        state = "not distinguishable" if p >= LEVEL else "higher" if gap > 0 else "lower"
    if state not in (None, "lower") and baseline is not None:
        own, other = cost["model_device_hours"], baseline["model_device_hours"]
        ratio = round(own / other, 4) if own is not None and other else None
    return {f"{name}_reaches_baseline": state, f"{name}_cost_ratio": ratio}


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


# ---------------------------------------------------------------- for people


def columns(section: Section, spent: Sequence[Record], labels: Mapping[str, str]) -> list[Column]:
    """Return the table of a section's costs.

    Parameters
    ----------
    section
        What the costs are of.
    spent
        The section's records.
    labels
        Of the benchmarks.
    """
    shown = [Column("Method", "", tuple(row["label"] for row in spent), numeric=False)]
    for part in PARTS:
        if any(row[f"{part}_seconds"] is not None for row in spent):
            title = {"initialization": "Init"}.get(part, part.capitalize())
            shown.append(Column(title, "s", _cells(spent, f"{part}_seconds", "{:,.1f}")))
    shown += [
        Column("Devices", "", _cells(spent, "devices", "{:d}")),
        Column("A model", "device-hours", tuple(_hours(r["model_device_hours"]) for r in spent)),
        Column("All runs", "device-hours", tuple(_hours(r["all_device_hours"]) for r in spent)),
    ]
    for part in ("initialization", "training"):
        values = [row[f"{part}_peak_memory_bytes"] for row in spent]
        title = {"initialization": "Memory, init"}.get(part, "Memory, training")
        shown.append(_bytes_column(title, values))
    shown.append(
        Column("Trainable", "parameters", _cells(spent, "trainable_parameters", "{:,.0f}"))
    )
    shown.append(_bytes_column("Weights", [row["adapter_bytes"] for row in spent]))
    for name in section.benchmarks:
        if any(row[f"{name}_reaches_baseline"] not in (None, "baseline") for row in spent):
            cells = tuple(_reached_cell(row, name) for row in spent)
            shown.append(Column(f"Reaches baseline, {labels[name]}", "cost ratio", cells))
    return shown


def _reached_cell(row: Record, name: str) -> str:
    state, ratio = row[f"{name}_reaches_baseline"], row[f"{name}_cost_ratio"]
    if state in (None, "lower"):
        return DASH if state is None else "no"
    # the mark of the main table: not distinguishable
    sign = {"not distinguishable": "= "}.get(state, "")
    return sign + (DASH if ratio is None else f"{ratio:.2f}")


def _cells(spent: Sequence[Record], key: str, form: str) -> tuple[str, ...]:
    return tuple(DASH if row[key] is None else form.format(row[key]) for row in spent)


def _hours(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _bytes_column(title: str, values: Sequence[int | None]) -> Column:
    unit, size, digits = "MiB", 2**20, 1
    if max((value or 0 for value in values), default=0) >= 2**30:
        unit, size, digits = "GiB", 2**30, 2
    cells = tuple(DASH if v is None else f"{v / size:,.{digits}f}" for v in values)
    return Column(title, unit, cells)


def notes(section: Section, spent: Sequence[Record]) -> list[str]:
    """Return the footnotes of a section's table of costs."""
    lines = [
        "Seconds: means over seeds of one run; evaluation is generation, over all benchmarks. "
        "A device is a process of the training job; all else counts one.",
        "A model: initialization and training of one run"
        + (
            ", with all trials of the tuning and their validation"
            if any(row["tuning_trials"] for row in spent)
            else "; nothing was tuned"
        )
        + ". All runs: all seeds, their evaluation and the tuning; a job that several of them "
        "share counts once.",
        "Memory: peak of one process, maximum over seeds. Weights: the exported ones on disk, an "
        "adapter with what is frozen of it, or a whole model.",
    ]
    if any(row[f"{n}_reaches_baseline"] == "baseline" for row in spent for n in section.benchmarks):
        lines.append(
            "Reaches baseline: what a model cost as a multiple of the baseline's, where the final "
            "mean is higher, or (=) not distinguishable from the baseline's; no: lower. Accuracy "
            "is measured at the end of training only; how small a difference could be told, see "
            "Detectable."
        )
    failed = [row["label"] for row in spent if row["tuning_failed"]]
    if failed:
        lines.append(f"Failed trials: {', '.join(failed)}: counted as far as they got.")
    alike = {row["tuning_trials"] for row in spent if row["tuning_trials"] is not None}
    if len(alike) > 1:
        lines.append("WARNING: the methods were tuned with unequal numbers of trials.")
    return lines


def to_markdown(comparison: Comparison, spent: Sequence[Record]) -> str:
    """Return the costs of all sections as Markdown: a table and footnotes each."""
    lines = ["# Costs", ""]
    for section, mine in tables.split(comparison, list(spent)):
        lines += [f"## {tables.md(section.title)}", ""]
        lines += tables.markdown_table(columns(section, mine, comparison.labels))
        lines += ["", *(f"- {tables.md(note)}" for note in notes(section, mine)), ""]
    return "\n".join(lines)
