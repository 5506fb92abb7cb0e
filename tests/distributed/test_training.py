"""Several processes train what one trains, with DDP and with DeepSpeed's ZeRO, and go on after
every way of being stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from contract.grid import PRESET, Grid, make_grid

from tlora.artefact import read_json
from tlora.checkpoints import delete_torn, last_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
# 83 samples in batches of 4: 20 steps, 3 samples dropped. A checkpoint every 4 steps.
SAMPLES, BATCH, STEPS = 83, 4, 20
METHODS = ("lora", "tlora", "adalora", "full")
EQUAL = [f"{count} {engine}" for engine in ("ddp", "zero2") for count in (1, 2, 4)]
LOSS = 1e-4
"""Largest difference of a step's loss from one process's, as a share of it."""
WEIGHT = 1e-5
"""Largest difference of any trained weight from one process's; they are of the order of 1."""
OPTIMIZER = 1e-4
"""The same where a method's own optimizer divides by what is small."""

# Beside the methods above. ZeRO-3 spreads the weights too; LoRA+ and LoRA-FA have optimizers of
# their own.
FURTHER = {
    ("lora", "2 zero3"): WEIGHT,
    ("tlora", "2 zero3"): WEIGHT,
    ("full", "2 zero3"): WEIGHT,
    ("lora_plus", "2 zero2"): OPTIMIZER,
    ("lora_fa", "2 ddp"): OPTIMIZER,
    ("lora_fa", "2 zero2"): OPTIMIZER,
}
# AdaLoRA prunes at even steps from 4 to 10, for good from then on.
FAULTS = {
    ("lora", "2 ddp"): [["kill", 7], ["torn", 12]],
    ("lora", "1 ddp"): [["full", 8]],
    ("lora", "2 zero2"): [["torn", 8]],
    ("full", "2 zero3"): [["kill", 6]],
    ("adalora", "2 ddp"): [["kill", 6], ["kill", 11], ["kill", 15]],
    ("adalora", "2 zero2"): [["kill", 10]],
    ("lora_fa", "2 zero2"): [["kill", 7]],
}
HALVED = [("tlora", "2 zero2"), ("full", "2 zero2")]
GATED = [("tlora", "2 zero3"), ("adalora", "2 zero2"), ("full", "2 zero2")]


def needs_deepspeed(how: str) -> list[Any]:
    """Return a mark for what needs DeepSpeed where there is none."""
    missing = "zero" in how and importlib.util.find_spec("deepspeed") is None
    return [pytest.mark.skip("deepspeed is not installed")] if missing else []


def each(cases: Any) -> Any:
    """Parametrize over (method, how)."""
    return pytest.mark.parametrize(
        ("method", "how"), [pytest.param(*case, marks=needs_deepspeed(case[1])) for case in cases]
    )


def preset(methods: str) -> str:
    """Return a preset with as many samples as these tests want, and gradients that are clipped."""
    text = PRESET.replace("{methods}", methods)
    return text.replace("data.train: 40", f"data.train: {SAMPLES}, max_grad_norm: 2.0e-2")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """Methods on a tiny Llama."""
    methods = ", ".join(dict.fromkeys([*METHODS, *(method for method, _ in FURTHER)]))
    return make_grid(ROOT, tmp_path_factory.mktemp("llama"), preset(methods))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """AdaLoRA, whose loss has a term of its own, on a tiny T5."""
    text = preset("lora, adalora").replace(
        "{{rank: 4,", "{{target_modules: [q, k, v, o, wi, wo], rank: 4,"
    )
    return make_grid(ROOT, tmp_path_factory.mktemp("t5"), text, family="t5")


def job(grid: Grid, method: str, how: str, kind: str = "", **place: Any) -> dict[str, Any]:
    """Return a job for forked.py."""
    unit = grid.cell(method).units["train"]
    count, engine = how.split()
    name = f"{kind} {method} {how}".strip()
    spec = dict(unit.spec)
    if kind == "halved":
        spec["model"] = {**spec["model"], "dtype": "bfloat16"}
    config = ROOT / "config" / "deepspeed" / f"{engine}.json"
    return {
        "spec": spec,
        "inputs": {key: str(path) for key, path in grid.inputs(unit).items()},
        "out": str(grid.folder / "runs" / name),
        "place": {
            **unit.placement,
            "stamp": name,
            "work": str(grid.folder / "work" / name),
            "processes": int(count),
            "deepspeed": None if engine == "ddp" else str(config),
            **place,
        },
        "faults": FAULTS[method, how] if kind == "disturbed" else [],
    }


@pytest.fixture(scope="module")
def runs(grid: Grid, t5: Grid, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every run of this module by name: the folder with its results."""
    equal = [(method, how) for method in METHODS for how in EQUAL]
    further = [*FURTHER, ("lora_plus", "1 ddp"), ("lora_fa", "1 ddp")]
    jobs = [job(grid, *case) for case in [*equal, *further]]
    jobs += [job(grid, *case, kind="disturbed") for case in FAULTS]
    jobs += [job(grid, *case, kind="halved") for case in HALVED]
    jobs += [job(t5, "adalora", "1 ddp", "t5", micro_batch=4)]
    jobs += [job(t5, "adalora", how, "t5", micro_batch=1) for how in ("2 ddp", "2 zero2")]
    if importlib.util.find_spec("deepspeed") is None:
        jobs = [one for one in jobs if not one["place"]["deepspeed"]]
    path = tmp_path_factory.mktemp("jobs") / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(HERE / "forked.py"), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-2000:], done.stderr[-20000:])  # shown where a test fails
    return {Path(one["out"]).name: Path(one["out"]) for one in jobs}


def losses(folder: Path) -> list[float]:
    """Return the loss of every step."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def weights(folder: Path) -> dict[str, Any]:
    """Return the trained weights."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted((folder / "weights").glob("*.safetensors")):
        found |= load_file(path)
    assert found
    return found


def largest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference of weights; those of pruned modules are empty."""
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in expected.items()}
    pairs = [(found[key], expected[key]) for key in expected if expected[key].numel()]
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs)


def agree(folder: Path, reference: Path, bound: float) -> None:
    """Compare a run with one process's."""
    assert losses(folder) == pytest.approx(losses(reference), rel=LOSS)
    assert largest(weights(folder), weights(reference)) <= bound
    one, other = read_json(folder / "train.json"), read_json(reference / "train.json")
    for key in ("steps", "samples", "dropped_samples", "tokens", "trainable_parameters"):
        assert one[key] == other[key], key
    assert one["total_parameters"] == other["total_parameters"]


@each([(method, how) for method in METHODS for how in EQUAL])
def test_number_of_processes_changes_no_result(
    runs: dict[str, Path], method: str, how: str
) -> None:
    """Losses of 20 steps within 1e-4 of one process's, weights within 1e-5; 3 samples dropped."""
    folder, reference = runs[f"{method} {how}"], runs[f"{method} 1 ddp"]
    card = read_json(folder / "train.json")
    assert (card["steps"], card["samples"], card["dropped_samples"]) == (STEPS, 80, 3)
    assert card["processes"] == int(how[0])
    agree(folder, reference, WEIGHT)
    assert losses(folder)[-1] < losses(folder)[0]


def test_losses_side_by_side(
    runs: dict[str, Path], grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of losses, step by step; adapters are pruned alike."""
    columns = [how for how in EQUAL if f"lora {how}" in runs]
    lines = []
    for method in METHODS:
        table = {how: losses(runs[f"{method} {how}"]) for how in columns}
        reference = weights(runs[f"{method} 1 ddp"])
        lines += ["", f"{method:7}  " + "  ".join(f"{how:>8}" for how in columns)]
        for step in range(STEPS):
            row = "  ".join(f"{table[how][step]:8.5f}" for how in columns)
            lines.append(f"step {step + 1:2}  {row}")
        for what, value in (
            ("loss", lambda how: max(share(table[how], table["1 ddp"]))),  # noqa: B023
            ("weight", lambda how: largest(weights(runs[f"{method} {how}"]), reference)),  # noqa: B023
        ):
            lines.append(f"{what:7}  " + "  ".join(f"{value(how):8.1e}" for how in columns))
    lines += ["", "loss, weight: largest difference from one process, relative and absolute"]
    with capsys.disabled():
        print("\n".join(lines))
    patterns = [
        read_json(runs[f"adalora {how}"] / "weights/adapter_config.json")["rank_pattern"]
        for how in columns
    ]
    assert patterns[0] and all(pattern == patterns[0] for pattern in patterns)


def share(found: list[float], expected: list[float]) -> list[float]:
    """Return relative differences."""
    return [abs(one - other) / other for one, other in zip(found, expected, strict=True)]


@each(FURTHER)
def test_zero3_and_own_optimizers_change_no_result(
    runs: dict[str, Path], method: str, how: str
) -> None:
    agree(runs[f"{method} {how}"], runs[f"{method} 1 ddp"], FURTHER[method, how])


@each([("adalora", "2 ddp"), ("adalora", "2 zero2")])
def test_encoder_decoder_weighs_every_target_alike(
    runs: dict[str, Path], method: str, how: str
) -> None:
    """Micro batches of 4 in one process, of 1 in two: targets differ in length."""
    agree(runs[f"t5 {method} {how}"], runs[f"t5 {method} 1 ddp"], WEIGHT)


@each(FAULTS)
def test_resumed_is_the_same_as_uninterrupted(runs: dict[str, Path], method: str, how: str) -> None:
    """Killed, killed while a checkpoint was saved, or out of disk: the same weights."""
    folder, reference = runs[f"disturbed {method} {how}"], runs[f"{method} {how}"]
    assert losses(folder) == losses(reference)
    found, expected = weights(folder), weights(reference)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    card = read_json(folder / "train.json")
    assert card["attempts"] == len(FAULTS[method, how]) + 1
    assert card["mean_loss"] == read_json(reference / "train.json")["mean_loss"]
    work = folder.parent.parent / "work" / folder.name
    assert not work.exists()


@each(HALVED)
def test_bfloat16_follows_float32(runs: dict[str, Path], grid: Grid, method: str, how: str) -> None:
    """What is saved is bfloat16, frozen weights as they were frozen, and passes the gate."""
    folder = runs[f"halved {method} {how}"]
    assert losses(folder) == pytest.approx(losses(runs[f"{method} 1 ddp"]), rel=0.02)
    import torch

    kinds = {tensor.dtype for tensor in weights(folder).values()}
    assert kinds == {torch.bfloat16}
    assert gate(grid, method, folder, "bfloat16") == []


@each(GATED)
def test_gate_accepts_what_several_processes_trained(
    runs: dict[str, Path], grid: Grid, method: str, how: str
) -> None:
    """Exported and reloaded, it is the model that was trained."""
    assert gate(grid, method, runs[f"{method} {how}"], "float32") == []


# -- the command itself, with torchrun -------------------------------------------------------------


class Command:
    """`tlora train` as a process, and what it left."""

    def __init__(self, grid: Grid, method: str, how: str) -> None:
        self.job = job(grid, method, how, "command")
        self.work, self.out = Path(self.job["place"]["work"]), Path(self.job["out"])
        self.out.parent.mkdir(exist_ok=True)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """Start it, with more in its environment."""
        words = [sys.executable, "-m", "tlora.cli", "train", "--spec", json.dumps(self.job["spec"])]
        words += ["--input", *(f"{name}={path}" for name, path in self.job["inputs"].items())]
        words += ["--out", str(self.out), "--place", json.dumps(self.job["place"])]
        words += ["--log", str(self.out.with_suffix(".log"))]
        told = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
        return subprocess.Popen(words, env=os.environ | told, stderr=subprocess.PIPE, text=True)

    def rows(self) -> list[str]:
        """Return the lines of the log of steps."""
        path = self.work / "log.jsonl"
        return path.read_text().splitlines() if path.is_file() else []

    def stop(self, number: int) -> tuple[int, list[int]]:
        """Start it, signal it after two steps; return its exit status and its processes' ids."""
        done = len(self.rows())
        process = self.start()
        while len(self.rows()) < done + 2:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(number)
        process.communicate(timeout=300)
        return process.returncode, children

    def finish(self, **environment: str) -> None:
        """Run it to its end."""
        process = self.start(**environment)
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors


def test_signal_makes_a_checkpoint_to_go_on_from(runs: dict[str, Path], grid: Grid) -> None:
    """One process: it ends after the step it is in, with a status that says so."""
    command = Command(grid, "lora", "1 ddp")
    assert command.stop(signal.SIGTERM)[0] == 128 + signal.SIGTERM
    rows = stopped(command)
    command.finish()
    finished(command, rows, runs["lora 1 ddp"], attempts=2)


SCRIPTS = {
    # Two hosts that are one, and a step of a job on both.
    "scontrol": "hostname; echo another",
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@" & one=$!; "$@" && wait $one',
}


def test_several_processes_stop_together(runs: dict[str, Path], grid: Grid, tmp_path: Path) -> None:
    """After a signal with a checkpoint; after SIGKILL, which reaches no handler, at once: two runs
    in one folder would be the end of both. In the end they are two nodes' with one torchrun each.
    """
    how = "2 zero2" if "lora 2 zero2" in runs else "2 ddp"
    command = Command(grid, "lora", how)
    assert command.stop(signal.SIGUSR1)[0] == 128 + signal.SIGUSR1
    rows = stopped(command)
    status, children = command.stop(signal.SIGKILL)
    assert status == -signal.SIGKILL and len(children) == 3  # torchrun and two processes
    left = [psutil.Process(child) for child in children if psutil.pid_exists(child)]
    assert not psutil.wait_procs(left, timeout=60)[1]
    assert len(command.rows()) < STEPS and not (command.out / "train.json").exists()
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x"}
    command.finish(PATH=f"{tmp_path}:{os.environ['PATH']}", **job)
    finished(command, rows, runs[f"lora {how}"], attempts=3)


def stopped(command: Command) -> list[str]:
    """Return the log of a run that a signal stopped; its checkpoint is of the last step there."""
    rows = command.rows()
    assert 2 <= len(rows) < STEPS - 2
    last = last_checkpoint(command.work)
    assert last == command.work / f"checkpoint-{len(rows)}"
    delete_torn(command.work)
    assert last.is_dir()
    return rows


def finished(command: Command, rows: list[str], reference: Path, attempts: int) -> None:
    """Compare a run with one that nothing stopped: no step of `rows` was done again."""
    after = (command.out / "log.jsonl").read_text().splitlines()
    assert after[: len(rows)] == rows  # the time of each as well
    assert losses(command.out) == losses(reference)
    assert largest(weights(command.out), weights(reference)) == 0
    assert read_json(command.out / "train.json")["attempts"] == attempts


def gate(grid: Grid, method: str, folder: Path, dtype: str) -> list[str]:
    """Export and check a run; return why it fails."""
    from tlora.stages.check import check
    from tlora.stages.export import export

    units = grid.cell(method).units
    train = folder / "train.json"
    inputs = {name: grid.path(unit) for name, unit in units["check"].inputs.items()}
    place, exported = units["check"].placement, folder / "exported"
    exported.mkdir()
    export_inputs = {name: inputs[name] for name in units["export"].inputs} | {"train": train}
    export(units["export"].spec, export_inputs, exported, units["export"].placement)
    inputs |= {"train": train, "export": exported / "export.json"}
    spec = units["check"].spec
    spec = {**spec, "model": {**spec["model"], "dtype": dtype}}
    check(spec, inputs, folder, place)
    return read_json(folder / "check.json")["reasons"]
