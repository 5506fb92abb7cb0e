"""track: make MLflow equal to the files, as often as one likes.

One run a cell, in an experiment a model and task; one run a preset with its tables, in the
experiment `comparison`. A run is known by its tags (the cell's names, seed and spec id). One that
agrees with the files is left alone; where none does, a new one is written and then the others are
deleted, because MLflow's parameters cannot be changed and its metrics cannot be removed.

A store that cannot be reached fails nothing: tracked.json then says `"reachable": false` and why,
and `tlora.tracking.outdated` tells the workflow to try again next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora import tracking
from tlora.artefact import read_json, sha256_file, write_json
from tlora.comparison import collect
from tlora.progress import bar

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

TABLES = ("*.csv", "*.md", "*.tex", "fingerprints.json", "table.html", "plots/*/*.png")
COPIED = 100_000_000
"""Bytes up to which the weights of a logged model are copied into the store."""

METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100
"""What MLflow takes in one call."""


@dataclass(frozen=True)
class Point:
    """One value of a metric; `moment` in milliseconds since the epoch."""

    key: str
    value: float
    step: int
    moment: int


@dataclass(frozen=True)
class Wanted:
    """What the files say a run should be.

    Attributes
    ----------
    identity
        The tags by which the run is known.
    artifacts
        Files by their path in the run, `folder/name` or `name`; they keep their names.
    parent
        The identity of the run that this one is nested in; it must have been made before.
    datasets
        What was trained on: name, digest, where it lies.
    model
        export.json of what was trained, with the weights beside it.
    begin, end
        Milliseconds since the epoch.
    """

    experiment: str
    name: str
    identity: dict[str, str]
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    artifacts: dict[str, Path] = field(default_factory=dict)
    status: str = "FINISHED"
    begin: int = 0
    end: int = 0
    parent: dict[str, str] | None = None
    datasets: tuple[tuple[str, str, str], ...] = ()
    model: Path | None = None

    @property
    def all_tags(self) -> dict[str, str]:
        """All tags, with one that stands for the content of the artifacts."""
        sums = {name: sha256_file(path) for name, path in sorted(self.artifacts.items())}
        digest = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
        known = {**self.identity, **self.tags, "tlora.artifacts_sha256": digest}
        if self.model is not None:
            known["tlora.model_sha256"] = sha256_file(self.model)
        return known


def track(spec: dict[str, Any], inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Reconcile MLflow with the runs of one preset and write tracked.json.

    Parameters
    ----------
    spec
        Not used.
    inputs
        `grid`: grid.json, with paths relative to the working directory.
    out
        The preset's comparison folder. Its tables become artifacts; tracked.json is written there:
        `{"reachable", "uri", "reason" or "runs", "created", "kept", "deleted"}`.
    place
        `tracking_uri` (default: MLFLOW_TRACKING_URI, else sqlite:///results/mlflow.db).
    """
    uri = tracking.tracking_uri(place)
    known: dict[str, Any] = {"uri": tracking.redact(uri)}
    reason = tracking.unreachable(uri)
    if reason is None:
        tracking.bound_waiting()
        wanted = [*_cells(Path(inputs["grid"])), *_tables(Path(inputs["grid"]), Path(out))]
        preset = read_json(inputs["grid"])["preset"]
        try:
            known |= reconcile(uri, wanted, preset)
        except _store_errors() as error:
            reason = tracking.redact(" ".join(str(error).split()))[:500]
    if reason is not None:
        known |= {"reason": reason}
        logger.warning(
            "MLflow at %s: %s; the tables are complete, run the workflow again to track them",
            known["uri"],
            reason,
        )
    write_json(Path(out) / "tracked.json", {**known, "reachable": reason is None})


def reconcile(uri: str, wanted: Sequence[Wanted], preset: str) -> dict[str, Any]:
    """Make the store hold exactly one run for each of `wanted`, equal to it.

    Runs of other cells and of earlier settings are not touched, but lose the tag that says they
    belong to `preset`.

    Returns
    -------
    dict
        `runs` (their number), `created`, `kept`, `deleted`.
    """
    from mlflow.tracking import MlflowClient

    tracking.initialise(uri)
    client = MlflowClient(tracking_uri=uri)
    names = list(dict.fromkeys(one.experiment for one in wanted))
    experiments = {name: _experiment(client, name, tracking.artifact_root(uri)) for name in names}
    present: dict[str, list[Run]] = {
        name: _runs(client, experiment) for name, experiment in experiments.items()
    }
    counts = {"created": 0, "kept": 0, "deleted": 0}
    mark = f"tlora.preset.{preset}"
    current = set()
    ids: dict[tuple, str] = {}
    for one in bar(wanted, desc="track", unit="run"):
        if one.parent is not None:
            above = ids[tuple(sorted(one.parent.items()))]
            one = replace(one, parent=None, tags={**one.tags, "mlflow.parentRunId": above})
        same = [r for r in present[one.experiment] if one.identity.items() <= r.data.tags.items()]
        good = next((run for run in same if agrees(client, run, one)), None)
        if good is None:
            run_id = _create(client, experiments[one.experiment], one, mark)
            counts["created"] += 1
        else:
            run_id = good.info.run_id
            counts["kept"] += 1
            if good.data.tags.get(mark) != "true":
                client.set_tag(run_id, mark, "true")
        current.add(run_id)
        ids[tuple(sorted(one.identity.items()))] = run_id
        # only now: a store that fails midway keeps what it had
        for run in same:
            if run.info.run_id != run_id:
                for model in _models(run):
                    client.delete_logged_model(model)
                client.delete_run(run.info.run_id)
                counts["deleted"] += 1
                current.add(run.info.run_id)
    for run in (run for runs in present.values() for run in runs):
        if run.info.run_id not in current and mark in run.data.tags:
            client.delete_tag(run.info.run_id, mark)
    logger.info("MLflow: %(created)d runs created, %(kept)d kept, %(deleted)d deleted", counts)
    return {"runs": len(wanted), **counts}


def agrees(client: MlflowClient, run: Run, wanted: Wanted) -> bool:
    """Tell whether a run says what the files say: status, tags, parameters, points, artifacts."""
    if run.info.status != wanted.status or run.data.params != wanted.params:
        return False
    if not wanted.all_tags.items() <= run.data.tags.items():
        return False
    found = sorted((one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs)
    if found != sorted((name, digest) for name, digest, _ in wanted.datasets):
        return False
    if len(_models(run)) != (wanted.model is not None):
        return False
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in wanted.points:
        curves.setdefault(point.key, []).append((point.step, point.value))
    if run.data.metrics != {key: max(curve)[1] for key, curve in curves.items()}:
        return False
    for key, curve in curves.items():
        # the latest value is known to agree; only a curve needs its history read
        if len(curve) > 1 or key.startswith(tracking.METRIC_PREFIX):
            history = client.get_metric_history(run.info.run_id, key)
            if sorted((point.step, point.value) for point in history) != sorted(curve):
                return False
    sizes = {name: path.stat().st_size for name, path in wanted.artifacts.items()}
    return _listed(client, run.info.run_id) == sizes


def _models(run: Run) -> list[str]:
    """Return the ids of the models that a run has logged."""
    return [model.model_id for model in run.outputs.model_outputs] if run.outputs else []


def _log_model(client: MlflowClient, experiment: str, run_id: str, wanted: Wanted) -> None:
    """Log what was trained; of large weights only what describes them, and where they are."""
    from mlflow.entities import LoggedModelOutput

    card, weights = read_json(wanted.model), wanted.model.parent / "weights"
    model = client.create_logged_model(
        experiment,
        name=re.sub(r"[/:.%\"']", "_", wanted.name),
        source_run_id=run_id,
        model_type=card["form"],
        tags={"tlora.weights": str(weights)}
        | {f"tlora.sha256.{name}": digest for name, digest in sorted(card["files"].items())},
    )
    total = sum((weights / name).stat().st_size for name in card["files"])
    for name in card["files"]:
        if total <= COPIED or name.endswith(".json"):
            client.log_model_artifact(model.model_id, str(weights / name))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])


def _listed(client: MlflowClient, run_id: str, folder: str | None = None) -> dict[str, int]:
    """Return the size of every artifact of a run by its path."""
    sizes = {}
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            sizes |= _listed(client, run_id, entry.path)
        else:
            sizes[entry.path] = int(entry.file_size)
    return sizes


def _create(client: MlflowClient, experiment: str, wanted: Wanted, mark: str) -> str:
    """Write a run; its status stays RUNNING until all of it is there."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    tags = {**wanted.all_tags, mark: "true"}
    run = client.create_run(
        experiment, start_time=wanted.begin or None, tags=tags, run_name=wanted.name
    )
    run_id = run.info.run_id
    params = [Param(key, value) for key, value in wanted.params.items()]
    for part in _chunks(params, PARAMS_AT_ONCE):
        client.log_batch(run_id, params=part)
    metrics = [Metric(p.key, p.value, p.moment, p.step) for p in wanted.points]
    for part in _chunks(metrics, METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=part)
    if wanted.datasets:
        context = [InputTag("mlflow.data.context", "training")]
        inputs = [
            DatasetInput(Dataset(name, digest, "local", json.dumps({"uri": source})), context)
            for name, digest, source in wanted.datasets
        ]
        client.log_inputs(run_id, inputs)
    if wanted.model is not None:
        _log_model(client, experiment, run_id, wanted)
    for name, path in wanted.artifacts.items():
        client.log_artifact(run_id, str(path), name.rpartition("/")[0] or None)
    client.set_terminated(run_id, wanted.status, wanted.end or None)
    return run_id


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Return the id of an experiment, made or brought back from the deleted ones if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # another process may be faster
        with contextlib.suppress(MlflowException):
            place = f"{artifacts}/{name}" if artifacts else None
            return client.create_experiment(name, artifact_location=place)
        found = client.get_experiment_by_name(name)
        if found is None:
            raise MlflowException(f"experiment {name} can be neither found nor created")
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _runs(client: MlflowClient, experiment: str) -> list[Run]:
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _store_errors() -> tuple[type[Exception], ...]:
    """Return what a store that is away, or broken, makes MLflow raise."""
    from mlflow.exceptions import MlflowException

    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return (MlflowException, OSError)
    return (MlflowException, OSError, SQLAlchemyError)


# ---------------------------------------------------------------- what the files say


def _cells(grid: Path) -> list[Wanted]:
    comparison = collect.load(grid)
    chosen = {
        (one["model"], one["task"], one["method"]): Path(one["chosen"])
        for one in read_json(grid).get("choices", [])
    }
    wanted: list[Wanted] = []
    for section in comparison.sections:
        for row in section.rows:
            wanted += [_cell(run, section.card) for run in row.runs]
            if row.choice is not None:
                path = chosen[row.model, row.task, row.method]
                parent = _tuning(row, path)
                trials = zip(row.choice.trials, row.choice.tried, strict=True)
                wanted.append(parent)
                wanted += [_trial(run, tried, section.card, parent) for run, tried in trials]
    return wanted


def _tuning(row: collect.Row, path: Path) -> Wanted:
    """Return the run that a method's trials are nested in: what they found."""
    choice, known = row.choice, read_json(path)
    names = {"model": row.model, "task": row.task, "method": row.method}
    end = round(1000 * path.stat().st_mtime)
    value = choice.values[choice.winner]
    return Wanted(
        experiment=tracking.experiment_name(names),
        name=f"{row.method} tuning",
        identity={
            "tlora.kind": "tuning",
            **{f"tlora.{key}": value for key, value in names.items()},
            "tlora.spec_id": path.parent.name,
        },
        tags={f"tlora.edge.{key}": edge for key, edge in choice.edges.items()},
        params=tracking.parameters(known["settings"]) | tracking.parameters(names),
        points=(
            Point(f"validation/{choice.metric}", float(value), 0, end),
            Point("trials", float(len(choice.trials)), 0, end),
        ),
        artifacts={"chosen.json": path},
        begin=end,
        end=end,
    )


def _trial(run: collect.Run, tried: dict[str, Any], card: dict[str, Any], parent: Wanted) -> Wanted:
    """Return a trial's run: an ordinary one, nested and named after what it tries."""
    shown = ", ".join(f"{key}={value}" for key, value in tried.items())
    ordinary = _cell(run, card)
    return replace(
        ordinary,
        name=f"{run.method} {shown}",
        identity={**ordinary.identity, "tlora.kind": "trial"},
        parent=parent.identity,
        model=None,
    )


def _cell(run: collect.Run, card: dict[str, Any]) -> Wanted:
    cell = {
        "model": run.model,
        "task": run.task,
        "method": run.method,
        "seed": run.seed,
        "spec_id": run.spec_id,
    }
    names = {"model": run.model, "task": run.task, "method": run.method, "seed": run.seed}
    artifacts = {"train.json": run.train_path, "allocation.json": run.allocation}
    files = {name: path for name, path in artifacts.items() if path and path.is_file()}
    files |= {f"{name}/score.json": Path(score.path) for name, score in run.scores.items()}
    files |= {f"{name}/generations.jsonl": path for name, path in run.generations.items()}
    begin, end = _times(run)
    trained = not run.base and "" not in run.failures
    tags = {"tlora.base": str(run.base).lower()}
    for name, digest in sorted((card.get("sha256") or {}).items()):
        tags[f"tlora.data_sha256.{name}"] = digest
    for place, reason in run.failures.items():
        tags[f"tlora.failed.{place or 'run'}"] = reason
    return Wanted(
        experiment=tracking.experiment_name(cell),
        name=tracking.run_name(cell),
        identity=tracking.identity(cell),
        tags=tags,
        params=tracking.parameters(run.settings) | tracking.parameters(names),
        points=tuple(_points(run, begin, end)),
        artifacts=files,
        status="FAILED" if run.failures else "FINISHED",
        begin=begin,
        end=end,
        datasets=() if run.base else _datasets(run.task, card),
        model=run.export_path if trained and _has_weights(run.export_path) else None,
    )


def _datasets(task: str, card: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Return the training data, known by the start of its SHA-256: MLflow allows 36 characters."""
    digest = (card.get("sha256") or {}).get("train.parquet")
    return () if digest is None else ((task, digest[:36], str(card.get("source", task))),)


def _has_weights(export: Path | None) -> bool:
    return export is not None and export.is_file() and bool(read_json(export).get("files"))


def _points(run: collect.Run, begin: int, end: int) -> Iterable[Point]:
    for row in run.log:
        moment = begin + round(1000 * (row.get("seconds") or 0.0))
        for name in tracking.CURVES:
            if isinstance(row.get(name), int | float):
                key = tracking.METRIC_PREFIX + name
                yield Point(key, float(row[name]), int(row["step"]), moment)
    finals: dict[str, Any] = {"cost/initialization_seconds": run.initialization_seconds}
    for name, value in (run.training or {}).items():
        finals[f"cost/{name}"] = value
    for benchmark, score in run.scores.items():
        finals |= {f"{benchmark}/{name}": value for name, value in score.metrics.items()}
        finals[f"{benchmark}/{score.metric}"] = score.value
        finals[f"{benchmark}/n"] = score.n
        finals[f"{benchmark}/unextracted"] = score.unextracted
    for benchmark, cost in run.evaluation.items():
        finals[f"{benchmark}/generation_seconds"] = cost.get("seconds")
    for key, value in finals.items():
        if isinstance(value, int | float):
            yield Point(key, float(value), 0, end)


def _times(run: collect.Run) -> tuple[int, int]:
    """Return begin and end of the training (the base model: of nothing) in milliseconds."""
    paths = [run.train_path] if run.train_path else [Path(s.path) for s in run.scores.values()]
    ends = [path.stat().st_mtime for path in paths if path.is_file()]
    if not ends:
        return 0, 0
    end = max(ends)
    seconds = (run.training or {}).get("train_seconds") or 0.0
    return round(1000 * (end - seconds)), round(1000 * end)


def _tables(grid: Path, folder: Path) -> list[Wanted]:
    """Return the run that carries the preset's tables; none where there are no tables yet."""
    preset = read_json(grid)["preset"]
    paths = sorted(path for pattern in TABLES for path in folder.glob(pattern))
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    if not files:
        return []
    return [
        Wanted(
            experiment="comparison",
            name=preset,
            identity={"tlora.kind": "comparison", "tlora.preset": preset},
            tags={},
            artifacts=files,
            end=round(1000 * max(path.stat().st_mtime for path in files.values())),
        )
    ]
