"""Every run on every benchmark, one line each, with the file its number comes from."""

from __future__ import annotations

import json
from typing import Any

from tlora.comparison.collect import Comparison, Run

TRAINING = (
    "trainable_parameters",
    "total_parameters",
    "steps",
    "samples",
    "dropped_samples",
    "tokens",
    "tokens_per_second",
    "train_seconds",
    "peak_memory_bytes",
    "final_loss",
    "attempts",
)
"""What is taken over from train.json."""


def entries(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one entry per run and benchmark, in the order of the sections, rows and seeds.

    `value` and the metrics are as in score.json: shares (0 to 1), or in the benchmark's own unit;
    `correct` is the number of items that a share stands for; `status` is `ok` or the reason why
    there is no number.
    """
    found = []
    for section in comparison.sections:
        names = {b: ["value", *section.metrics(b)] for b in section.benchmarks}
        data = " ".join(f"{k}:{v}" for k, v in sorted((section.card.get("sha256") or {}).items()))
        for row in section.rows:
            for run in row.runs:
                for benchmark in section.benchmarks:
                    entry = _entry(run, benchmark, names[benchmark])
                    found.append(entry | {"data_sha256": data})
    return found


def _entry(run: Run, benchmark: str, metrics: list[str]) -> dict[str, Any]:
    score = run.scores.get(benchmark)
    failure = run.failure(benchmark)
    cost = run.evaluation.get(benchmark, {})
    training = run.training or {}
    entry: dict[str, Any] = {
        "model": run.model,
        "task": run.task,
        "method": run.method,
        "label": run.label,
        "seed": run.seed,
        "spec_id": run.spec_id,
        "benchmark": benchmark,
        "status": failure or "ok",
        "metric": score.metric if score else None,
        "value": score.value if score else None,
        "n": score.n if score else None,
        "correct": round(score.value * score.n) if score and score.share else None,
        "unextracted": score.unextracted if score else None,
    }
    if score:
        # as JSON: benchmarks differ in their metrics, and a ledger is read by programs
        further = {name: score.metrics[name] for name in metrics if name in score.metrics}
        entry["further_metrics"] = json.dumps(further, sort_keys=True)
    else:
        entry["further_metrics"] = None
    return entry | {
        "initialization_seconds": _rounded(run.initialization_seconds),
        "initialization_peak_memory_bytes": run.initialization_memory,
        **{name: _rounded(training.get(name)) for name in TRAINING},
        "generation_seconds": _rounded(cost.get("seconds")),
        "generated_tokens": cost.get("tokens"),
        "score_file": score.path if score else None,
    }


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if isinstance(value, float) else value
