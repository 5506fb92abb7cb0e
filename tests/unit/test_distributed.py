"""Several processes for one job: how a batch is split, what is refused, whose GPUs are whose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlora import devices, methods
from tlora.distributed import (
    check_deepspeed,
    check_installed,
    launch,
    processes,
    split,
    told_to_stop,
    zero_stage,
)
from tlora.errors import UserError
from tlora.plan import Plan

ROOT = Path(__file__).resolve().parents[2]

# -- the batch -------------------------------------------------------------------------------------


@given(batch=st.integers(1, 64), micro=st.none() | st.integers(1, 64), count=st.integers(1, 16))
def test_split_takes_the_whole_batch_or_names_what_would_do(
    batch: int, micro: int | None, count: int
) -> None:
    """What it returns multiplies to the batch; the sizes that it names are taken."""
    try:
        samples, passes = split(batch, micro, count)
    except UserError as error:
        key, _, near = str(error).partition("nearest: ")
        for size in map(int, near.split(", ")):
            if key.startswith("batch_size"):
                assert size % count == 0 and abs(size - batch) < count
            else:
                split(batch, size, count)
        return
    assert samples * passes * count == batch
    assert samples <= (micro or batch)


def test_split_names_the_nearest() -> None:
    """Below and above; of the micro batch the two nearest."""
    with pytest.raises(UserError, match=r"batch_size: 30: .*of the 4 processes; nearest: 28, 32"):
        split(30, None, 4)
    with pytest.raises(UserError, match=r"batch_size: 3: .*nearest: 4$"):
        split(3, None, 4)
    with pytest.raises(UserError, match=r"micro_batch: 5: expected a divisor of 8.*nearest: 4, 8"):
        split(32, 5, 4)
    assert split(32, 3, 16) == (2, 1)
    assert split(32, None, 1) == (32, 1)


PRESET = """\
models: [tiny]
tasks: [arithmetic]
methods: [{method}]
seeds: [1]
set: {{batch_size: {batch}}}
"""


def preset(folder: Path, model: str = "", batch: int = 8, method: str = "lora") -> Path:
    """Write a configuration tree whose model has more keys, and a preset."""
    import shutil

    shutil.copytree(ROOT / "config", folder / "config")
    path = folder / "config/models/tiny.yaml"
    kept = path.read_text().replace("workflow/", f"{ROOT}/workflow/")
    lines = [line for line in kept.splitlines() if not line.startswith("micro_batch")]
    path.write_text("\n".join(lines) + f"\n{model}")
    path = folder / "config/several.yaml"
    path.write_text(PRESET.format(batch=batch, method=method))
    return path


def test_batch_that_does_not_divide_is_refused_before_any_job(tmp_path: Path) -> None:
    """With the line of the key, and by the stage as well."""
    from tlora.stages.train import train
    from tlora.tasks import tokenised

    with pytest.raises(UserError, match=r"batch_size: 10: .*4 processes; nearest: 8, 12"):
        Plan([preset(tmp_path / "1", "gpus: 4\n", batch=10)])
    with pytest.raises(UserError, match=r"tiny\.yaml:\d+: micro_batch: 3: .*nearest: 2, 4"):
        Plan([preset(tmp_path / "2", "processes: 2\nmicro_batch: 3\n")])
    (train_unit,) = Plan([preset(tmp_path / "3", "processes: 2\nmicro_batch: 2\n")]).of("train")
    samples = [{"id": str(n), "input_ids": [1, 2], "labels": [1, 2]} for n in range(9)]
    tokenised.write(tmp_path / "train.parquet", samples)
    place = {**train_unit.placement, "processes": 3, "work": str(tmp_path / "work"), "stamp": "x"}
    with pytest.raises(UserError, match="3 processes; nearest: 6, 9"):
        train(train_unit.spec, {"prepare": tmp_path / "card.json"}, tmp_path / "out", place)
    assert not (tmp_path / "work").exists()


def test_number_of_processes_is_no_part_of_what_is_computed(tmp_path: Path) -> None:
    """The same ids; the job is told where and how."""
    one = Plan([preset(tmp_path / "1")]).of("train")[0]
    four = Plan([preset(tmp_path / "2", "gpus: 4\ndeepspeed: zero2\n")]).of("train")[0]
    assert one.id == four.id
    assert processes(one.placement) == 1 and processes(four.placement) == 4
    assert zero_stage(four.placement["deepspeed"]) == 2


# -- DeepSpeed's settings --------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "config/deepspeed").glob("*.json")), ids=str)
def test_settings_of_the_project(path: Path) -> None:
    """Each says its stage by its name, and offloads nothing."""
    assert zero_stage(path) == int(path.stem[-1])
    assert "offload" not in path.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer: expected none"),
        ({"scheduler": {}}, "scheduler: expected none"),
        ({"fp16": {"enabled": True}}, "fp16: expected none"),
        ({"train_batch_size": 8}, 'train_batch_size: 8: expected "auto"'),
        ({"gradient_clipping": 1.0}, 'gradient_clipping: 1.0: expected "auto"'),
        ({"zero_optimization": {}}, "zero_optimization.stage: None: expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: 0: expected 1, 2 or 3"),
    ],
)
def test_settings_say_nothing_that_the_task_says(
    tmp_path: Path, changes: dict, message: str
) -> None:
    """They would change results without changing ids."""
    settings = json.loads((ROOT / "config/deepspeed/zero2.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings | changes))
    with pytest.raises(UserError) as caught:
        zero_stage(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_method_that_does_not_work_with_a_stage_is_named() -> None:
    """AdaLoRA and LoRA-FA with ZeRO-3."""
    zero2, zero3 = (ROOT / f"config/deepspeed/zero{stage}.json" for stage in (2, 3))
    for name in ("adalora", "lora_fa"):
        check_deepspeed(zero2, methods.load(name))
        with pytest.raises(UserError, match=f"zero3.json: .*stage: 3: .*2 at most.* {name}$"):
            check_deepspeed(zero3, methods.load(name))
    check_deepspeed(zero3, methods.load("lora"))


def test_missing_deepspeed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^deepspeed: not installed here: expected .*tlora\[deepspeed\]"
    ):
        check_installed()


# -- starting processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process of several says it to the one that started it."""
    from tlora.tasks import tokenised

    tokenised.write(tmp_path / "train.parquet", [{"id": "1", "input_ids": [1], "labels": [1]}])
    (tmp_path / "card.json").write_text("{}")
    work = tmp_path / "work"
    work.mkdir()
    (work / "stop").write_text("15")  # an earlier attempt's
    spec = {"batch_size": 8, "epochs": 1.0, "seed": 1}
    place = {"processes": 1, "work": str(work)}
    with pytest.raises(UserError, match=r"^batch_size: 8: expected at most 1"):
        launch("train", spec, {"prepare": tmp_path / "card.json"}, tmp_path / "out", place)
    assert told_to_stop(work) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_stop_is_told_by_a_file(tmp_path: Path) -> None:
    """No file, or one that is just being written, says nothing."""
    assert told_to_stop(tmp_path) == 0
    (tmp_path / "stop").write_text("")
    assert told_to_stop(tmp_path) == 0
    (tmp_path / "stop").write_text("15")
    assert told_to_stop(tmp_path) == 15


# -- devices ---------------------------------------------------------------------------------------

LISTED = """\
GPU 0: NVIDIA H200 (UUID: GPU-1a)
GPU 1: NVIDIA H200 (UUID: GPU-2b)
  MIG 1g.18gb     Device  0: (UUID: MIG-3c)
  MIG 1g.18gb     Device  1: (UUID: MIG-4d)
GPU 10: NVIDIA H200 (UUID: GPU-5e)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for locks on a machine with four GPUs, as far as nvidia-smi tells."""
    lines = "\n".join(f"echo 'GPU {number}: A GPU (UUID: GPU-{number})'" for number in range(4))
    script = tmp_path / "bin/nvidia-smi"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n{lines}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "_held", [])
    return tmp_path / "locks"


def claimed(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    """Claim as a job would, and leave the environment as it was."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", environment := dict(os.environ))
        found = devices.claim(*arguments)
    if found:
        assert environment["CUDA_VISIBLE_DEVICES"] == ",".join(found)
        assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    return found


JOB = """
import sys, time, pathlib
from tlora import devices
devices.SECONDS = 0.02
mine = devices.claim("train", {"gpus": 2}, pathlib.Path(sys.argv[1]))
assert "torch" not in sys.modules
for name in mine:
    (pathlib.Path(sys.argv[2]) / name).touch(exist_ok=False)  # another one has it: this fails
print(",".join(mine), flush=True)
time.sleep(0.5)
for name in mine:
    (pathlib.Path(sys.argv[2]) / name).unlink()
"""


def test_jobs_share_no_device(machine: Path, tmp_path: Path) -> None:
    """Three jobs of two GPUs on four: two run, the third waits, even for one that was killed."""
    used = tmp_path / "used"
    used.mkdir()
    command = [sys.executable, "-c", JOB, str(machine), str(used)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [job.communicate(timeout=60)[0].strip() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert set(found) <= {"0,1", "2,3", "0,2", "0,3", "1,2", "1,3"} and len(set(found)) >= 2
    last = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert last.stdout.readline().strip() == "0,1"
    last.kill()
    last.communicate()
    for path in used.iterdir():
        path.unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.stdout.strip() == "0,1"


def test_who_wants_how_many(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training what the YAML says, other stages one, stages without a model none."""
    assert claimed(monkeypatch, "score", {}, machine) == []
    assert claimed(monkeypatch, "generate", {"gpus": 4}, machine) == ["0"]
    assert claimed(monkeypatch, "train", {"processes": 2}, machine) == ["1", "2"]
    assert claimed(monkeypatch, "train", {}, machine) == ["3"]
    with pytest.raises(UserError, match="gpus: 5: expected at most 4"):
        devices.claim("train", {"gpus": 5}, machine)


def test_what_is_given_is_respected(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several visible ones a job takes its share; without any, in Slurm, or below: nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert claimed(monkeypatch, "check", {}, machine) == ["2"]
    assert claimed(monkeypatch, "check", {}, machine) == ["3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert claimed(monkeypatch, "check", {}, machine) == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert claimed(monkeypatch, "train", {"gpus": 2}, machine) == []
    assert claimed(monkeypatch, "check", {}, machine) == ["0"], "two jobs in one allocation"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert claimed(monkeypatch, "check", {}, machine) == []


def test_machine_without_gpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No nvidia-smi, or one that finds no driver: nothing happens, and no folder is made."""
    script = machine.parent / "bin/nvidia-smi"
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert devices.claim("train", {"gpus": 1}, machine) == []
    monkeypatch.setenv("PATH", str(machine))
    assert devices.claim("train", {"gpus": 1}, machine) == []
    assert not machine.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_parts_of_a_gpu_are_devices() -> None:
    """Where MIG is on, the GPU itself is none."""
    assert devices._listed(LISTED) == ["0", "MIG-3c", "MIG-4d", "10"]
    assert devices._listed("No devices found\n") == []
