"""A checkout on the cluster: starting it, disturbing it, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from cluster.slurm import Cluster, wait
from workflow.project import Project

from tlora.artefact import check_files, sha256_file, sha256_tree
from tlora.distributed import die_with_parent

COMMAND = ["snakemake", "--cores", "all", "--profile", "slurm"]
# Stages of a run that hang on its training.
CHAIN = ("train", "export", "check", "generate", "score")
PATIENCE = 900


@dataclass
class Started:
    """A snakemake in the background, and the file it prints to."""

    process: subprocess.Popen
    output: Path


@dataclass
class Run:
    """A checkout and the cluster it runs on.

    Attributes
    ----------
    project
        Its default preset is the small one of conftest.py.
    """

    project: Project
    cluster: Cluster
    started: list[Started] = field(default_factory=list)

    @property
    def results(self) -> Path:
        """Where the artefacts lie."""
        return self.project.path("results")

    def one(self, pattern: str) -> Path:
        """Return the one path below results/ that a pattern fits."""
        (found,) = self.results.glob(pattern)
        return found

    @contextlib.contextmanager
    def disturbed(self, folder: Path, method: str = "lora") -> Iterator[Run]:
        """Give a copy that lacks a method's run, the tables and all that MLflow knew.

        Parameters
        ----------
        folder
            Where the copy is made; nothing of it runs afterwards.
        """
        project = self.project.copy(folder / "checkout")
        results = project.path("results")
        for stage in CHAIN:
            for path in (results / stage).rglob(method):
                shutil.rmtree(path)
        for name in ("table.csv", "tracked.json"):
            (results / "comparison" / "config" / name).unlink()
        # Its runs name files of the checkout that was copied.
        (results / "mlflow.db").unlink()
        shutil.rmtree(results / "mlartifacts")
        shutil.rmtree(project.path("logs"))
        run = Run(project, self.cluster)
        try:
            yield run
        finally:
            run.end()

    # ---------------------------------------------------------------- starting

    def start(self) -> Started:
        """Start snakemake in the background; what it prints goes to a file."""
        path = self.project.tools / f"output-{len(self.started)}"
        with open(path, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                COMMAND,
                cwd=self.project.folder,
                env=self.project._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        self.started.append(Started(process, path))
        return self.started[-1]

    def finish(self, started: Started, status: int | None = 0) -> str:
        """Wait for a snakemake; return what it printed."""
        found = started.process.wait(PATIENCE)
        output = started.output.read_text(encoding="utf-8")
        assert status in (None, found), f"exit status {found}\n{output[-8000:]}"
        return output

    def snakemake(self, status: int | None = 0) -> str:
        """Run `snakemake --cores all --profile slurm` to its end."""
        return self.finish(self.start(), status)

    def end(self) -> None:
        """Kill what is left of this checkout's snakemakes and jobs."""
        for started in self.started:
            started.process.kill()
            started.process.wait()
        for job, state in self.cluster.jobs(self.project.folder).items():
            if state in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED"):
                self.cluster.run("scancel", job, status=None)
        for process in self.processes(""):
            process.kill()

    # ---------------------------------------------------------------- disturbing

    def processes(self, verb: str) -> list[psutil.Process]:
        """Return the running `tlora VERB` of this checkout."""
        found = []
        command = str(self.project.tools / "command.py")
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if command in words and verb in ("", words[words.index(command) + 1]):
                found.append(process)
        return found

    def training(self) -> tuple[str, psutil.Process]:
        """Wait until a training has made a step and has a checkpoint, and stop its process there.

        Returns
        -------
        job : str
            Of Slurm.
        process : psutil.Process
            Does nothing until it gets SIGCONT.
        """
        before = self._attempts()
        wait(lambda: self._attempts() > before, PATIENCE, "training", 0.02)
        (process,) = self.processes("train")
        (log,) = (self.results / ".work" / "train").glob("*/log.jsonl")
        size = log.stat().st_size

        def further() -> bool:
            assert log.exists(), "the training ended"
            return log.stat().st_size > size and any(log.parent.glob("checkpoint-*/manifest.json"))

        wait(further, PATIENCE, "step of a training with a checkpoint", 0.005)
        process.suspend()
        (job,) = [job for job, at in self.jobs("train").items() if at == "RUNNING"]
        return job, process

    def _attempts(self) -> int:
        """Return how often the training under way was started."""
        costs = (self.results / ".work" / "train").glob("*/cost.json")
        return sum(json.loads(path.read_text())["attempts"] for path in costs)

    def jobs(self, rule: str) -> dict[str, str]:
        """Return the states of a rule's jobs, by number."""
        return self.cluster.jobs(self.project.folder, rule)

    def jobs_in_full(self) -> dict[str, str]:
        """Return all that Slurm says of this checkout's jobs, by number."""
        jobs = self.cluster.jobs(self.project.folder)
        return {job: self.cluster.run("scontrol", "show", "job", job) for job in jobs}

    def requeued(self, job: str) -> None:
        """Wait until Slurm has put a training back into its queue, and let it go on at once.

        By itself Slurm waits two minutes.
        """
        wait(lambda: self.jobs("train")[job] == "PENDING", PATIENCE, f"job {job} requeued")
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def ended(self, job: str) -> None:
        """Wait until a job has ended."""
        over = ("CANCELLED", "FAILED", "TIMEOUT", "COMPLETED", "NODE_FAIL")
        wait(lambda: self.jobs("train")[job] in over, PATIENCE, f"end of job {job}")

    # ---------------------------------------------------------------- what must hold

    def check(self, expected: Run) -> None:
        """Compare with a run that nothing disturbed.

        All results are there, scores and weights byte for byte, every checksum holds, MLflow has
        each run once, and nothing is left to do.
        """
        for stage in ("generate", "score"):
            found = {name: sum_ for name, sum_ in sums(self.results / stage).items() if keep(name)}
            wanted = sums(expected.results / stage)
            assert found == {name: sum_ for name, sum_ in wanted.items() if keep(name)}
        for stage in ("train", "export"):
            assert weights(self.results / stage) == weights(expected.results / stage)
        for manifest in self.results.rglob("*.json"):
            if "mlartifacts" in manifest.parts:
                continue
            content = json.loads(manifest.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "files" in content and "spec" not in content:
                within = manifest.parent / "weights"
                check_files(within if within.is_dir() else manifest.parent, content["files"])
        assert not list((self.results / ".work" / "train").glob("*"))
        assert not list(self.results.rglob("*.partial"))
        tracked = json.loads(self.one("comparison/config/tracked.json").read_text())
        assert tracked["reachable"]
        again = self.project.run([*COMMAND, "--dry-run"])
        assert "Nothing to be done" in again, again

    def check_mlflow(self, database: Path | None = None) -> None:
        """Each cell, and the table, is one finished run."""
        found = mlflow_runs(database or self.results / "mlflow.db")
        assert found == {
            ("base", "FINISHED"): 1,
            ("lora", "FINISHED"): 1,
            ("tlora", "FINISHED"): 1,
            ("comparison", "FINISHED"): 1,
        }

    def card(self, method: str = "lora") -> dict:
        """Return a run's train.json."""
        return json.loads(self.one(f"train/tiny/arithmetic/{method}/*/train.json").read_text())


def keep(name: str) -> bool:
    """Tell whether a file's bytes follow from what is computed: costs do not."""
    return not name.endswith("generate.json") and "/.lease/" not in name


def sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    return sha256_tree(folder)


def weights(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all weights below a folder."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }


def mlflow_runs(database: Path) -> Counter[tuple[str, str]]:
    """Count a store's runs by what they are of and their status; deleted ones do not count."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "select runs.run_uuid, runs.status, tags.key, tags.value from runs join tags "
            "on tags.run_uuid = runs.run_uuid where runs.lifecycle_stage = 'active'"
        ).fetchall()
    runs: dict[tuple[str, str], dict[str, str]] = {}
    for run, status, key, value in rows:
        runs.setdefault((run, status), {})[key] = value
    return Counter(
        (tags.get("tlora.method") or tags["tlora.kind"], status)
        for (_, status), tags in runs.items()
    )
