"""Whether this machine is fit: one line a check, and what to do where it is not.

Every check stands alone: one that raises or hangs is a line like any other.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tlora.errors import UserError

OK, WARN, FAIL = "ok", "warn", "fail"
LEAST_PYTHON = (3, 11)
SECONDS = 9.0
"""How long all checks together may take."""
ANSWER = 3.0
"""How long a server may take to answer."""
LEAST_GB, ENOUGH_GB = 1.0, 50.0
"""Free disk below which nothing runs, and below which only small models do."""

_PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes
    ----------
    name
        Of the check.
    state
        "ok", "warn" (something that some runs need is missing) or "fail".
    text
        What was found.
    advice
        What to do; "" where nothing need be done.
    needed
        Whether every run needs it.
    """

    name: str
    state: str
    text: str
    advice: str = ""
    needed: bool = False


Check = Callable[[], tuple[str, str, str]]


def examine(checks: Mapping[str, Check], seconds: float = SECONDS) -> list[Finding]:
    """Run checks, all at once; returns their findings in the order of the checks.

    Parameters
    ----------
    checks
        `CHECKS`, or some of them, and `of_preset(...)`.
    seconds
        After which a check that has not answered counts as failed.
    """
    answers: dict[str, queue.SimpleQueue] = {}
    for name, check in checks.items():
        answers[name] = queue.SimpleQueue()
        # A thread that hangs must not keep the process from ending.
        threading.Thread(target=_run, args=(check, answers[name]), daemon=True).start()
    deadline = time.monotonic() + seconds
    findings = []
    for name in checks:
        try:
            found = answers[name].get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            found = (FAIL, f"no answer within {seconds:g} s", "look at what it asks, and try again")
        findings.append(Finding(name, *found, needed=name in NEEDED))
    return findings


def report(findings: list[Finding]) -> str:
    """Return a line for every finding."""
    wide = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        advice = f": {finding.advice}" if finding.advice else ""
        line = f"{finding.state:4}  {finding.name:{wide}}  {finding.text}{advice}"
        lines.append(" ".join(line.splitlines()))
    return "\n".join(lines)


def _run(check: Check, answer: queue.SimpleQueue) -> None:
    try:
        answer.put(check())
    except UserError as error:
        answer.put((FAIL, _short(error), ""))
    except Exception as error:
        answer.put((FAIL, f"{type(error).__name__}: {_short(error)}", "the check itself failed"))


def _short(error: object) -> str:
    from tlora.tracking import redact

    return redact(" ".join(str(error).split()))[:300]


# ---------------------------------------------------------------- what every run needs


def _python() -> tuple[str, str, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < LEAST_PYTHON:
        return FAIL, version, "3.11 or newer is needed: make PYTHON=python3.11"
    kind = "in a virtual environment"
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        kind = "in no environment of its own"
    return OK, f"{version}, {kind}", ""


def _locks() -> Path | None:
    """Return the folder with the locks: of this checkout, or of the one the package lies in."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (folder / "envs" / "core.lock").is_file():
            return folder / "envs"
    return None


def _pins(lock: Path) -> dict[str, str]:
    if not lock.is_file():
        return {}
    lines = lock.read_text(encoding="utf-8").splitlines()
    matches = [_PIN.fullmatch(line.strip()) for line in lines]
    return {match[1]: match[2] for match in matches if match}


def _differing(pins: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the packages that are missing, and those of another version than pinned."""
    missing, others = [], []
    for name, version in pins.items():
        try:
            # A CUDA build of torch is called 2.13.0+cu130, say.
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != version:
            others.append(f"{name} {found}, not {version}")
    return missing, others


def _packages() -> tuple[str, str, str]:
    folder = _locks()
    if folder is None:
        return WARN, "no envs/core.lock to compare with", "start this in a checkout"
    pins = _pins(folder / "core.lock")
    missing, others = _differing(pins)
    if missing:
        return FAIL, f"missing: {_few(missing)}", "make demo installs them into .venv"
    if others:
        return WARN, f"other than in envs/core.lock: {_few(others)}", "make demo installs the lock"
    return OK, f"{len(pins)} as in envs/core.lock", ""


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _disk() -> tuple[str, str, str]:
    folder = Path("results")
    while not folder.exists():
        folder = folder.absolute().parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tlora-") as file:
            file.write(bytes(65536))
            file.flush()
    except OSError as error:
        return FAIL, f"{folder}: {error.strerror}", "results/ must lie where files can be written"
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{free:,.1f} GB free for results/"
    if free < LEAST_GB:
        return FAIL, text, f"at least {LEAST_GB:g} GB is needed"
    if free < ENOUGH_GB:
        return WARN, text, "`tlora plan PRESET` says how much a preset takes"
    return OK, text, ""


# ---------------------------------------------------------------- device and libraries


def _driver() -> str | None:
    """Return NVIDIA's driver version, None where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = _command(query)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


def _command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=5, check=False, stdin=subprocess.DEVNULL
    )


def _torch() -> tuple[str, str, str]:
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found = f"{torch.__version__}, CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
        return OK, f"{found}, {count} x {name} ({memory:.0f} GiB)", ""
    if driver is None:
        advice = "models of billions of parameters need a GPU; the demo does not"
        return WARN, f"{torch.__version__}, no GPU", advice
    if torch.version.cuda is None:
        advice = "make clean and make demo install a CUDA build, unless pip is told otherwise"
        return FAIL, f"{torch.__version__} is built without CUDA; driver {driver}", advice
    advice = "update the driver, or look at CUDA_VISIBLE_DEVICES"
    return FAIL, f"{torch.__version__}, CUDA {torch.version.cuda} and driver {driver}", advice


def _bf16() -> tuple[str, str, str]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return WARN, "not supported by this GPU", "`dtype: float32` in the model's YAML"
    one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    if float((one @ one).float().sum()) != 512:
        return FAIL, f"a product on {device} is wrong", "`dtype: float32` in the model's YAML"
    return OK, "on the GPU" if device == "cuda" else "on the CPU, where it is slow", ""


def _further(package: str, lock: str, purpose: str) -> tuple[str, str, str]:
    """Check a package of another lock than core's."""
    folder = _locks()
    pinned = _pins(folder / f"{lock}.lock").get(package) if folder else None
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if lock == "vllm":
            advice = "it has an environment of its own, envs/vllm.lock"
        else:
            advice = f"python -m pip install --no-deps -r envs/{lock}.lock"
        return WARN, f"not installed; {purpose} needs it", advice
    if pinned is not None and found.partition("+")[0] != pinned:
        return WARN, f"{found}, not {pinned} as in envs/{lock}.lock", f"only {purpose} needs it"
    return OK, found, ""


def _sandbox() -> tuple[str, str, str]:
    from tlora import sandbox

    try:
        return OK, f"{sandbox.find().kind}, proven", ""
    except UserError as error:
        return WARN, _short(error), "only HumanEval and MBPP run generated programs"


# ---------------------------------------------------------------- programs and servers


def _snakemake() -> tuple[str, str, str]:
    found = shutil.which("snakemake")
    if found is None:
        return WARN, "not on PATH", "source .venv/bin/activate"
    if Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        return WARN, "another environment's is first on PATH", "source .venv/bin/activate"
    return OK, importlib.metadata.version("snakemake"), ""


def _slurm() -> tuple[str, str, str]:
    missing = [name for name in ("sinfo", "squeue", "sbatch") if shutil.which(name) is None]
    if missing:
        return WARN, f"no {', '.join(missing)} on PATH", "only `--profile slurm` needs them"
    for arguments in (["sinfo", "--noheader", "--format=%P"], ["squeue", "--noheader", "--me"]):
        try:
            done = _command(arguments)
        except subprocess.TimeoutExpired:
            return WARN, f"{arguments[0]}: no answer within 5 s", "is the controller up?"
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            return WARN, _short(said), "only `--profile slurm` needs it"
        if arguments[0] == "sinfo":
            partitions = " ".join(sorted(set(done.stdout.replace("*", "").split())))
    advice = "" if partitions else "the profile needs one"
    return OK if partitions else WARN, f"partitions: {partitions or 'none'}", advice


def _apptainer() -> tuple[str, str, str]:
    for name in ("apptainer", "singularity"):
        if shutil.which(name):
            done = _command([name, "--version"])
            return OK, done.stdout.strip() or name, ""
    return WARN, "not on PATH", "only envs/tlora.def needs it"


def _mlflow() -> tuple[str, str, str]:
    from tlora.tracking import is_server, redact, tracking_uri, unreachable

    uri = tracking_uri({})
    if not is_server(uri):
        return OK, f"{redact(uri)}, no server", ""
    reason = unreachable(uri, ANSWER)
    if reason is None:
        return OK, redact(uri), ""
    advice = "runs go on without it, and a later `snakemake` catches up"
    return WARN, f"{redact(uri)}: {_short(reason)}", advice


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _hub() -> tuple[str, str, str]:
    from huggingface_hub import constants

    from tlora.tracking import redact, unreachable

    if _offline():
        return OK, "HF_HUB_OFFLINE is set: nothing is fetched", ""
    uri = constants.ENDPOINT
    reason = unreachable(uri, ANSWER)
    if reason is None:
        return OK, f"{redact(uri)} answers{'' if _token() else '; no login'}", ""
    advice = "`tlora download PRESET` where it can be reached, or local files in data_root"
    return WARN, f"{redact(uri)}: {_short(reason)}", advice


def _token() -> bool:
    """Tell whether there is a login for the hub; the token itself goes nowhere."""
    from huggingface_hub import get_token

    return get_token() is not None


def of_preset(build: Callable[[], Any]) -> Check:
    """Return the check whether what a preset reads of the hub is in the cache.

    Parameters
    ----------
    build
        Returns the preset's `Plan`.
    """

    def check() -> tuple[str, str, str]:
        from tlora.estimate import cached

        items = [item for unit in build().of("download") for item in unit.spec["items"]]
        found = {str(item.get("repo") or item.get("url") or item["data"]): item for item in items}
        missing = [name for name, item in found.items() if not cached(item)]
        if not found:
            return OK, "all that it reads is local or embedded", ""
        if not missing:
            return OK, f"all {len(found)} repositories and files that it reads are in the cache", ""
        text = f"{len(missing)} of {len(found)} not in the cache: {_few(missing)}"
        if _offline():
            return FAIL, text, "HF_HUB_OFFLINE is set: run `tlora download PRESET` without it"
        gated = any(found[name]["kind"] == "model" for name in missing) and not _token()
        login = "; gated models need `hf auth login`" if gated else ""
        return WARN, text, f"`tlora download PRESET` fetches them{login}"

    return check


CHECKS: dict[str, Check] = {
    "python": _python,
    "packages": _packages,
    "disk": _disk,
    "torch": _torch,
    "bf16": _bf16,
    "deepspeed": lambda: _further("deepspeed", "train", "training on several GPUs"),
    "vllm": lambda: _further("vllm", "vllm", "generation with `backend: vllm`"),
    "sandbox": _sandbox,
    "snakemake": _snakemake,
    "slurm": _slurm,
    "apptainer": _apptainer,
    "mlflow": _mlflow,
    "hub": _hub,
}
NEEDED = ("python", "packages", "disk")
"""What every run needs."""
