"""MLflow as a view of the files: where the store is, what a run is called, and live logging.

Files are the truth. While a run trains, `LiveLogger` may send its points to an MLflow server so
that people can watch; the stage `track` then makes the store equal to the files. Nothing here can
fail or delay training, and nothing here imports MLflow but `initialise`.

The tracking URI is `place["tracking_uri"]`, else the environment variable MLFLOW_TRACKING_URI, else
sqlite:///results/mlflow.db. A sqlite store is written by `track` alone.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import logging
import os
import queue
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///results/mlflow.db"

METRIC_PREFIX = "train/"
"""What stands before the names of a training curve's metrics."""

CURVES = ("loss", "learning_rate", "grad_norm", "epoch")
"""The columns of log.jsonl that are tracked as curves."""

# ---------------------------------------------------------------- names


def tracking_uri(place: Mapping[str, Any]) -> str:
    """Return the tracking URI that applies; may hold credentials, so log `redact(uri)` only."""
    return place.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def redact(text: str) -> str:
    """Return `text` without the user names, passwords and query strings of the URLs in it."""
    text = re.sub(r"(\w+://)[^/\s@'\"]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)


def is_server(uri: str) -> bool:
    """Tell whether the store is reached over HTTP."""
    return uri.startswith(("http://", "https://"))


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a sqlite URI, None for other stores and in-memory ones."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(urllib.parse.unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def experiment_name(cell: Mapping[str, Any]) -> str:
    """Return the experiment that a cell's run belongs to: one a model and task."""
    return f"{cell['model']}/{cell['task']}"


def identity(cell: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags that say which cell a run is: names, seed and the id of its spec."""
    seed = cell.get("seed")
    return {
        "tlora.kind": "trial" if cell.get("trial") else "cell",
        "tlora.model": cell["model"],
        "tlora.task": cell["task"],
        "tlora.method": cell["method"],
        "tlora.seed": "none" if seed is None else str(seed),
        "tlora.spec_id": cell["spec_id"],
    }


def run_name(cell: Mapping[str, Any]) -> str:
    """Return what people see in MLflow's list of runs."""
    seed = cell.get("seed")
    return cell["method"] if seed is None else f"{cell['method']} seed {seed}"


SECRET = re.compile(r"(^|[._-])(api_?key|passw(or)?d|secret|token|credentials?)$", re.IGNORECASE)


def parameters(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return settings as MLflow takes them: one level, dotted names, text; never a secret.

    Values are cut at 6000 characters, MLflow's limit; entries whose name ends like a secret's
    (token, password, api_key, ...) are left out.
    """
    flat: dict[str, str] = {}
    for name, value in settings.items():
        key = re.sub(r"[^\w./ :-]", "_", f"{above}{name}")[:250]
        if SECRET.search(key):
            continue
        if isinstance(value, Mapping) and value:
            flat |= parameters(value, f"{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            flat[key] = redact(text)[:6000]
    return flat


# ---------------------------------------------------------------- the store


def bound_waiting() -> None:
    """Make MLflow's own client give up within seconds, unless the environment says otherwise."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def unreachable(uri: str, timeout: float = 5.0) -> str | None:
    """Return why the store cannot be reached, None where it can; takes `timeout` seconds at most.

    Any answer of a server counts, also that a login is missing. Other stores than servers are
    taken to be there.
    """
    if not is_server(uri):
        return None
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            _request(uri, "/health", None, timeout)
            answers.put(None)
        except urllib.error.HTTPError:
            answers.put(None)
        except Exception as error:
            answers.put(redact(str(error)))

    # name resolution knows no timeout: wait for it in a thread
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=timeout + 1)
    except queue.Empty:
        return f"no answer within {timeout:g} s"


def initialise(uri: str) -> None:
    """Create the tables of a sqlite store once; no two processes at a time. Servers need nothing.

    Safe to call again and in parallel: without the lock, processes that open a new store at the
    same time fail in its migration.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    bound_waiting()
    with _locked(path.with_name(f".{path.name}.lock")):
        from mlflow.tracking import MlflowClient

        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def artifact_root(uri: str) -> str | None:
    """Return where a new experiment keeps its artifacts; None leaves it to the server."""
    path = sqlite_path(uri)
    return None if path is None else (path.parent / "mlartifacts").resolve().as_uri()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def outdated(tracked: Path, uri: str) -> bool:
    """Tell whether tracked.json must be made anew although no file it was made from changed.

    So it is when the store could not be reached then, was another one than `uri`, or was a sqlite
    file that is gone. False where there is no tracked.json.
    """
    try:
        known = json.loads(Path(tracked).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    path = sqlite_path(uri)
    gone = path is not None and not path.is_file()
    return gone or not known.get("reachable") or known.get("uri") != redact(uri)


# ---------------------------------------------------------------- live logging


class LiveLogger:
    """Send the rows of a training log to an MLflow server while training goes on.

    A daemon thread sends them in batches over MLflow's REST interface. `log` only puts a row into
    a bounded queue; when the server is away rows are kept, the oldest are dropped first, and
    sending is tried again with growing pauses. Nothing raises. What got lost does not matter:
    `track` later replaces the run by one made from the files.

    Parameters
    ----------
    uri
        The tracking URI. Only http and https are served; for others every method does nothing.
    cell
        `model`, `task`, `method`, `seed` and `spec_id`: the identity of the run.
    params
        Effective settings, logged once.
    timeout
        Seconds for one request.
    capacity
        Rows kept while they cannot be sent.
    """

    def __init__(
        self,
        uri: str,
        cell: Mapping[str, Any],
        params: Mapping[str, Any],
        timeout: float = 3.0,
        capacity: int = 5000,
    ) -> None:
        self.enabled = is_server(uri)
        self.dropped = 0
        self._uri, self._cell, self._params = uri, dict(cell), parameters(params)
        self._timeout, self._capacity = timeout, capacity
        self._rows: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._run_id: str | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow-live", daemon=True)
        if self.enabled:
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Take a row of log.jsonl (`step`, `loss`, ...); returns at once."""
        if not self.enabled:
            return
        try:
            self._rows.put_nowait((round(time.time() * 1000), dict(row)))
        except queue.Full:
            self.dropped += 1

    def close(self, patience: float = 5.0) -> None:
        """Send what is left and end the run, within `patience` seconds."""
        self._closing.set()
        if self.enabled and self._thread.is_alive():
            self._thread.join(patience)

    def _work(self) -> None:
        waiting: list[tuple[int, dict[str, Any]]] = []
        pause = 1.0
        while True:
            closing = self._closing.wait(pause)
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._rows.get_nowait())
            self.dropped += max(0, len(waiting) - self._capacity)
            del waiting[: max(0, len(waiting) - self._capacity)]
            try:
                self._send(waiting)
                pause = 1.0
                if closing:
                    self._end()
            except Exception as error:
                self._warn(error)
                pause = min(60.0, 2 * pause)
            if closing:
                return

    def _send(self, waiting: list[tuple[int, dict[str, Any]]]) -> None:
        """Send rows and take out of `waiting` what the server has."""
        if self._run_id is None:
            self._run_id = self._start()
        while waiting:
            batch = waiting[:200]
            metrics = [
                {"key": METRIC_PREFIX + name, "value": row[name], "timestamp": when, "step": step}
                for when, row in batch
                if isinstance(step := row.get("step"), int)
                for name in CURVES
                if isinstance(row.get(name), int | float)
            ]
            if metrics:
                self._call("runs/log-batch", {"run_id": self._run_id, "metrics": metrics})
            del waiting[: len(batch)]

    def _start(self) -> str:
        """Return the id of this cell's live run, or of a new one."""
        name = experiment_name(self._cell)
        query = urllib.parse.urlencode({"experiment_name": name})
        try:
            found = self._call(f"experiments/get-by-name?{query}", None)
            experiment = found["experiment"]["experiment_id"]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            experiment = self._call("experiments/create", {"name": name})["experiment_id"]
        tags = identity(self._cell) | {"tlora.live": "true"}
        conditions = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        known = {"experiment_ids": [experiment], "filter": conditions, "max_results": 1}
        # an attempt that was killed left its run behind
        runs = self._call("runs/search", known).get("runs", [])
        if runs:
            return runs[0]["info"]["run_id"]
        pairs = [{"key": key, "value": value} for key, value in tags.items()]
        new = {
            "experiment_id": experiment,
            "run_name": run_name(self._cell),
            "start_time": round(time.time() * 1000),
            "tags": pairs,
        }
        run_id = self._call("runs/create", new)["run"]["info"]["run_id"]
        entries = [{"key": key, "value": value} for key, value in self._params.items()]
        for start in range(0, len(entries), 100):
            self._call("runs/log-batch", {"run_id": run_id, "params": entries[start : start + 100]})
        return run_id

    def _end(self) -> None:
        status = {"status": "FINISHED", "end_time": round(time.time() * 1000)}
        self._call("runs/update", {"run_id": self._run_id, **status})

    def _call(self, path: str, content: Any) -> Any:
        return _request(self._uri, f"/api/2.0/mlflow/{path}", content, self._timeout)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow at %s: %s; training goes on, `track` completes the run from the files",
                redact(self._uri),
                redact(str(error)),
            )


def live_logger(place: Mapping[str, Any]) -> LiveLogger:
    """Return the logger of the run that `place` describes.

    `place["cell"]` has the identity of the run and, under `settings`, its effective settings.
    Without it, or without a server, the logger does nothing.
    """
    cell = place.get("cell")
    if not cell:
        return LiveLogger("", {}, {})
    return LiveLogger(tracking_uri(place), cell, cell.get("settings", {}))


def _request(uri: str, path: str, content: Any, timeout: float) -> Any:
    """Send JSON (None: a GET) and return the JSON of the answer, None where it is none."""
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}{path}"
    headers = {"Content-Type": "application/json", **_authorization(parts)}
    data = None if content is None else json.dumps(content).encode("utf-8")
    request = urllib.request.Request(url, data=data, headers=headers)
    context = None
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        context = ssl._create_unverified_context()
    with urllib.request.urlopen(request, timeout=timeout, context=context) as answer:
        body = answer.read()
    try:
        return json.loads(body)
    except ValueError:
        return None


def _authorization(parts: urllib.parse.SplitResult) -> dict[str, str]:
    user, password = parts.username, parts.password
    if user is not None:
        user, password = urllib.parse.unquote(user), urllib.parse.unquote(password or "")
    else:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME")
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if user:
        pair = base64.b64encode(f"{user}:{password}".encode()).decode("ascii")
        return {"Authorization": f"Basic {pair}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}
