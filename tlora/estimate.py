"""What a preset costs before anyone submits it: jobs, hours, disk and what is fetched, by stage.

An estimate by formulas, printed with what they assume. Where results are there already, their own
figures stand in for assumptions.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import read_json
from tlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tlora.plan import Plan, Unit

GB = 1e9
# Local files up to this size are read, to count their records.
SMALL = 20_000_000
# What differs between training runs that take equally long.
TUNED = (
    *("seed", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("initialize", "model"),
)
CHECKPOINTS = 2
PASSES = 2
"""Runs through the samples that a sketch takes at most: the last is for modules that need it."""
FORMS = 4
"""Models that the adapter gate loads in each number format: base, reloaded, exported, merged."""


def _option(default: float, text: str) -> Any:
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True)
class Assumptions:
    """What is assumed; every field is an option of `tlora plan`.

    Raises
    ------
    UserError
        A number that is not above 0.
    """

    jobs: int = _option(8, "jobs at once; what is temporary on disk is that of so many")
    tflops: float = _option(312, "peak of a GPU in bfloat16, in TFLOP/s (A100 312, H100 989)")
    utilisation: float = _option(0.4, "share of it that training and calibration reach")
    bandwidth: float = _option(1500, "GB/s at which a GPU reads weights and cache in decoding")
    step_ms: float = _option(20, "least milliseconds of a decoding step")
    batch: int = _option(64, "sequences that are decoded together")
    completion: float = _option(0.5, "tokens of a completion as a share of max_new_tokens")
    svd_tflops: float = _option(0.5, "TFLOP/s of a GPU in singular value decompositions")
    cpu_below: float = _option(0.1, "billion parameters below which a model runs on CPU cores")
    cpu_gflops: float = _option(30, "GFLOP/s of a core")
    tokens_per_sample: int = _option(256, "tokens of a prompt with its target, max_length at most")
    train_rows: int = _option(100_000, "training records, where the source does not say")
    test_rows: int = _option(1_000, "test records, where the source does not say")
    prepared: float = _option(1_000, "records a core renders and tokenises in a second")
    scored: float = _option(20, "completions a core judges in a second")
    start: float = _option(30, "seconds of a job before it loads anything")
    load: float = _option(1, "GB/s at which weights are read from disk and written")
    dataset_gb: float = _option(0.4, "GB of a data set of the hub")

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if not 0 < value < math.inf:
                name = one.name.replace("_", "-")
                raise UserError(f"--{name}: {value}: expected a number above 0")


@dataclass
class Cost:
    """What one job takes: GPU- and core-seconds, and bytes."""

    gpu: float = 0.0
    cpu: float = 0.0
    kept: float = 0.0
    temporary: float = 0.0
    transfer: float = 0.0


@dataclass
class Row:
    """A stage: its jobs to do and done, what the former cost, and the temporary bytes of each."""

    stage: str
    todo: int = 0
    done: int = 0
    cost: Cost = field(default_factory=Cost)
    temporary: list[float] = field(default_factory=list)

    def add(self, cost: Cost) -> None:
        """Add a job that is to do."""
        self.todo += 1
        self.temporary.append(cost.temporary)
        for key in ("gpu", "cpu", "kept", "transfer"):
            setattr(self.cost, key, getattr(self.cost, key) + getattr(cost, key))
        self.cost.temporary = max(self.cost.temporary, cost.temporary)


@dataclass(frozen=True)
class Estimate:
    """What is to come, and what was taken from results that are there.

    Attributes
    ----------
    rows
        A stage each, in the order of work. A row's `cost.temporary` is the largest of one job.
    kept, peak
        Bytes: what stays, and with the temporary files of `jobs` jobs at once.
    measured
        How many results of each stage stood in for assumptions.
    assumptions
        What was assumed.
    choices
        How many choices trials have not yet made.
    """

    rows: list[Row]
    kept: float
    peak: float
    measured: dict[str, int]
    assumptions: Assumptions
    choices: int = 0


def cached(item: Mapping[str, Any]) -> bool:
    """Tell whether an item of a download lies whole in the Hugging Face cache.

    Nothing is asked of the hub: a snapshot counts that has its commit's folder, no link to a file
    that is missing, and every part that its index of weights names.
    """
    from huggingface_hub import constants

    if item["kind"] == "web":
        name = item["url"].rpartition("/")[2]
        return (Path(constants.HF_HOME) / "web" / item["sha256"][:12] / name).is_file()
    if item["kind"] not in ("model", "dataset"):
        return False
    folder = f"{item['kind']}s--{item['repo'].replace('/', '--')}"
    snapshot = Path(constants.HF_HUB_CACHE) / folder / "snapshots" / str(item["revision"])
    files = list(snapshot.rglob("*"))
    if not files or not all(path.exists() for path in files):
        return False
    if item["kind"] == "dataset":
        return True
    parts: set[str] = set()
    for index in snapshot.glob("*.safetensors.index.json"):
        parts |= set(read_json(index)["weight_map"].values())
    weights = parts or {"model.safetensors"}
    if all((snapshot / part).is_file() for part in weights):
        return True
    return not parts and any(snapshot.glob("*.bin"))


def rows(source: str, data: Mapping[str, Any], split: str, data_root: str | None) -> int | None:
    """Return how many completions or samples a source gives, without the network.

    Embedded and small local data is read; else it is what the source's own `rows(data, split)`
    says, else `samples` of its options. None where nothing tells.
    """
    return _rows(source, json.dumps(data, sort_keys=True), split, data_root)


@functools.lru_cache(maxsize=4096)
def _rows(source: str, data: str, split: str, data_root: str | None) -> int | None:
    module = importlib.import_module(f"tlora.tasks.{source}")
    options = module.Data(**json.loads(data))
    root = None if data_root is None else Path(data_root)
    try:
        files = module.sources(options, split, root)
        hooks = [getattr(module, name, None) for name in ("hub", "web")]
        fetched = [one for hook in hooks if hook for one in hook(options, split)]
        near = bool(files) or not (fetched or hasattr(module, "fetch"))
        if near and sum(Path(file).stat().st_size for file in files.values()) <= SMALL:
            records = module.load(options, split, root)
            return sum(len(record.get("turns") or [""]) for record in records)
    except (UserError, OSError):
        pass  # the job that needs the data says so
    if hasattr(module, "rows"):
        return module.rows(options, split)
    return getattr(options, "samples", None) if split == "train" else None


class _Estimator:
    """The cost of every job of a plan."""

    def __init__(self, plan: Plan, assumed: Assumptions) -> None:
        self.plan, self.assumed = plan, assumed
        self.measured = {"prepare": 0, "train": 0, "generate": 0}
        self.seconds: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}
        self.models: dict[str, PreTrainedModel] = {}
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.weights: dict[str, int] = {}
        self.used: set[str] = set()
        self.fetched: set[str] = set()
        for unit in (*plan.of("train"), *plan.of("generate")):
            cost = unit.main if unit.stage == "train" else unit.folder / "generate.json"
            if unit.main.is_file() and cost.is_file():
                key = "train_seconds" if unit.stage == "train" else "seconds"
                seconds = read_json(cost).get(key)
                if seconds is not None:
                    self.seconds.setdefault(_like(unit), []).append(seconds)

    def cost(self, unit: Unit) -> Cost:
        """Return what a job takes; a stage without a formula takes its start only."""
        formula = getattr(self, f"_{unit.stage}", None)
        return Cost(cpu=self.assumed.start) if formula is None else formula(unit)

    # -------------------------------------------------------------- models and data

    def _architecture(self, name: str) -> PreTrainedModel:
        from tlora.params import on_meta, source_of

        if name not in self.models:
            model = self.plan.models[name][0]
            source = source_of(name, model, self.plan.library)
            self.models[name] = on_meta(source, model.architecture, model.revision)
        return self.models[name]

    def _weights(self, name: str) -> int:
        if name not in self.weights:
            parameters = self._architecture(name).parameters()
            self.weights[name] = sum(parameter.numel() for parameter in parameters)
        return self.weights[name]

    def _bytes(self, name: str) -> float:
        return self._weights(name) * (2 if self.plan.models[name][0].dtype == "bfloat16" else 4)

    def _targets(self, name: str, target_modules: Any) -> list[tuple[int, ...]]:
        from tlora.weights import match_targets, matrices

        key = json.dumps([name, target_modules])
        if key not in self.shapes:
            parameters = self._architecture(name).named_parameters()
            known = matrices({at: tuple(one.shape) for at, one in parameters})
            found = match_targets(known, target_modules, name, "target_modules")
            self.shapes[key] = list(found.values())
        return self.shapes[key]

    def _trained(self, name: str, spec: Mapping[str, Any]) -> int:
        """Return how many parameters a method trains, counted once for what counts alike."""
        from tlora import methods
        from tlora.params import count

        method = methods.load(spec["implementation"])
        options = method.options(spec["options"])
        # A method that is counted as a plain LoRA is counted as any other such method.
        plain = method.initializes and not hasattr(method.module, "skeleton")
        how = None if plain else [spec["implementation"], spec["options"]]
        key = json.dumps([name, how, spec["rank"], spec["target_modules"]], sort_keys=True)
        if key not in self.counts:
            context = methods.Context(
                spec["rank"], spec["lora_alpha"], spec["target_modules"], seed=0
            )
            model = self._architecture(name)
            self.counts[key] = count(model, method, options, context).trainable
        return self.counts[key]

    def _stored(self, name: str, spec: Mapping[str, Any]) -> int:
        """Return the numbers that an adapter's file holds: A is stored where it is frozen, too."""
        shapes = self._targets(name, spec["target_modules"])
        return max(self._trained(name, spec), spec["rank"] * sum(sum(shape) for shape in shapes))

    def _on_cpu(self, name: str) -> bool:
        return self._weights(name) < self.assumed.cpu_below * 1e9

    def _compute(self, name: str, flops: float, rate: float | None = None) -> Cost:
        """Return the time of FLOPs on the model's device, at `rate` FLOP/s of a GPU."""
        assumed = self.assumed
        if self._on_cpu(name):
            return Cost(cpu=flops / (assumed.cpu_gflops * 1e9))
        return Cost(gpu=flops / (rate or assumed.tflops * assumed.utilisation * 1e12))

    def _started(self, name: str, cost: Cost, devices: int = 1, loads: float = 1) -> Cost:
        """Add the job's start and the loading of weights."""
        spent = self.assumed.start + loads * self._bytes(name) / (self.assumed.load * GB)
        if self._on_cpu(name):
            cost.cpu += spent
        else:
            cost.gpu += devices * spent
        return cost

    def _samples(self, prepare: Unit) -> tuple[float, float]:
        """Return the training records of a `prepare` job and their tokens."""
        if prepare.main.is_file():
            card = read_json(prepare.main)
            if prepare.id not in self.used:
                self.used.add(prepare.id)
                self.measured["prepare"] += 1
            return card["counts"]["train"], card["tokens"]["train"]
        spec = prepare.spec
        found = self._records(spec["source"], spec["data"], "train", prepare.place)
        return found, found * min(self.assumed.tokens_per_sample, spec["max_length"])

    def _records(self, source: str, data: dict, split: str, place: Mapping[str, Any]) -> float:
        if split == "validation":
            return data["validation"]
        found = rows(source, data, split, place.get("data_root"))
        if found is None:
            return self.assumed.test_rows if split == "test" else self.assumed.train_rows
        return found

    def _completions(self, generate: Unit) -> float:
        benchmark = generate.spec["benchmark"]
        split = benchmark.get("split", "test")
        found = self._records(benchmark["source"], benchmark["data"], split, generate.place)
        return min(found, benchmark.get("limit") or found)

    def _taken(self, unit: Unit) -> float | None:
        """Return the mean seconds of equal work that is done."""
        found = self.seconds.get(_like(unit))
        if found is None:
            return None
        if _like(unit) not in self.used:
            self.used.add(_like(unit))
            self.measured[unit.stage] += len(found)
        return sum(found) / len(found)

    # -------------------------------------------------------------- stages

    def _download(self, unit: Unit) -> Cost:
        cost = Cost()
        for item in unit.spec["items"]:
            name = str(item.get("repo") or item.get("url") or item.get("data"))
            if name in self.fetched or cached(item):
                continue
            self.fetched.add(name)
            models = [key for key, one in self.plan.models.items() if one[0].path == name]
            if item["kind"] == "model" and models:
                cost.transfer += self._bytes(models[0])
            elif item["kind"] != "web":
                cost.transfer += self.assumed.dataset_gb * GB
        cost.kept = cost.transfer
        return cost

    def _overlap(self, unit: Unit) -> Cost:
        task = unit.spec["task"]
        found = self._records(task["source"], task["data"], "train", unit.place)
        return Cost(cpu=self.assumed.start + found / self.assumed.prepared)

    def _prepare(self, unit: Unit) -> Cost:
        found, tokens = self._samples(unit)
        # Two columns of ids, packed to about two bytes each.
        return Cost(cpu=self.assumed.start + found / self.assumed.prepared, kept=4 * tokens)

    def _calibrate(self, unit: Unit) -> Cost:
        name, spec = unit.names[0], unit.spec
        found, tokens = self._samples(unit.inputs["prepare"])
        tokens *= min(1, spec["samples"] / found)
        shapes = self._targets(name, spec["target_modules"])
        squares = sum(shape[1] ** 2 for shape in shapes)
        if spec["statistic"] == "covariance":
            cost = self._compute(name, 2 * tokens * (self._weights(name) + squares))
            cost.kept = 4 * squares
        else:
            cost = self._compute(name, 6 * tokens * self._weights(name))
            if spec["statistic"] == "gradient":
                cost.kept = 4 * sum(math.prod(shape) for shape in shapes)
        return self._started(name, cost)

    def _initialize(self, unit: Unit) -> Cost:
        from tlora import methods

        name, spec = unit.names[0], unit.spec
        shapes = self._targets(name, spec["target_modules"])
        method = methods.load(spec["implementation"])
        sketches = getattr(method.module, "sketches", None)
        sketched = sketches is not None and sketches(method.options(spec["options"]))
        tokens, passes = 0.0, 1
        if "prepare" in unit.inputs:
            found, tokens = self._samples(unit.inputs["prepare"])
            tokens *= min(1, (spec["samples"] or found) / found)
        if sketched:
            passes = PASSES
            cost = self._compute(name, _sketch(shapes, spec["rank"], tokens))
        else:
            flops = 10 * sum(math.prod(shape) * min(shape) for shape in shapes)
            cost = self._compute(name, flops, self.assumed.svd_tflops * 1e12)
        forward = self._compute(name, passes * 2 * tokens * self._weights(name))
        cost.cpu, cost.gpu = cost.cpu + forward.cpu, cost.gpu + forward.gpu
        cost.kept = 4 * self._stored(name, spec)
        return self._started(name, cost)

    def _train(self, unit: Unit) -> Cost:
        name, spec = unit.names[0], unit.spec
        weights, devices = self._weights(name), unit.place.get("gpus") or 1
        full = spec["rank"] is None
        trained = weights if full else self._trained(name, spec)
        taken = self._taken(unit)
        if taken is None:
            _, tokens = self._samples(unit.inputs["prepare"])
            passes = 6 * weights if full else 4 * weights + 6 * trained
            cost = self._compute(name, tokens * spec["epochs"] * passes)
        else:
            cost = Cost(cpu=taken) if self._on_cpu(name) else Cost(gpu=taken * devices)
        cost.kept = self._bytes(name) if full else 4 * self._stored(name, spec)
        # Adam's two states are of the weights' type; DeepSpeed has float32 weights besides.
        size = cost.kept / weights if full else 4
        states = 12 if unit.place.get("deepspeed") else 2 * size
        cost.temporary = CHECKPOINTS * (cost.kept + states * trained)
        return self._started(name, cost, devices)

    def _export(self, unit: Unit) -> Cost:
        from tlora import methods

        name, train = unit.names[0], unit.inputs["train"]
        method = methods.load(unit.spec["implementation"])
        cost = Cost(cpu=self.assumed.start)
        if method.merges(method.options(unit.spec["options"])):
            cost.kept = self._bytes(name)
            cost.cpu += 2 * cost.kept / (self.assumed.load * GB)
        elif train.spec["rank"] is not None:
            # One that was initialised from weights or data has twice the rank where B0 is not 0.
            times = 2 if train.spec["initialize"] else 1
            cost.kept = times * 4 * self._stored(name, train.spec)
        return cost

    def _check(self, unit: Unit) -> Cost:
        name = unit.names[0]
        float32 = 4 * self._weights(name) / self._bytes(name)
        each = float32 if float32 == 1 else 1 + float32
        return self._started(name, Cost(), loads=FORMS * each)

    def _generate(self, unit: Unit) -> Cost:
        name, assumed = unit.names[0], self.assumed
        found = self._completions(unit)
        prompt = assumed.tokens_per_sample
        new = assumed.completion * (unit.spec["benchmark"]["max_new_tokens"] or 0)
        taken = self._taken(unit)
        if taken is None:
            beams = unit.spec["benchmark"].get("num_beams") or 1
            cost = self._compute(name, 2 * self._weights(name) * found * prompt)
            if self._on_cpu(name):
                cost.cpu += self._compute(name, 2 * self._weights(name) * found * beams * new).cpu
            else:
                together = min(assumed.batch, found * beams)
                read = self._bytes(name) + together * (prompt + new / 2) * self._cache(name)
                step = max(assumed.step_ms / 1e3, read / (assumed.bandwidth * GB))
                cost.gpu += math.ceil(found * beams / together) * new * step
        else:
            cost = Cost(cpu=taken) if self._on_cpu(name) else Cost(gpu=taken)
        cost.kept = 6 * found * (prompt + new)
        return self._started(name, cost)

    def _cache(self, name: str) -> float:
        """Return the bytes that a token takes in the cache of keys and values."""
        config = self._architecture(name).config
        heads = config.num_attention_heads
        wide = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        size = self._bytes(name) / self._weights(name)
        return 2 * config.num_hidden_layers * kept * wide * size

    def _score(self, unit: Unit) -> Cost:
        found = self._completions(unit.inputs["generate"])
        return Cost(cpu=self.assumed.start + found / self.assumed.scored, kept=200 * found)


def _sketch(shapes: list[tuple[int, ...]], rank: int, tokens: float) -> float:
    """Return the FLOPs of a sketch beside its forward passes (tlora/subspace.py).

    Of Y = G C for each token and pass, and of products with the weight: two for each of two turns,
    one for what the first run shows, and two for each further one.
    """
    from tlora.subspace import further_rows, sketch_rows

    total = 0.0
    for shape in shapes:
        streamed, product = 4 * tokens * shape[1], 2 * math.prod(shape)
        total += sketch_rows(*shape, rank) * (streamed + 5 * product)
        total += (PASSES - 1) * further_rows(*shape, rank) * (streamed + 2 * product)
    return total


def _like(unit: Unit) -> str:
    """Return what decides how long a job takes: all but what it is tuned by, or trained from."""
    left = TUNED if unit.stage == "train" else ("export",)
    kept = {key: value for key, value in unit.spec.items() if key not in left}
    return json.dumps([unit.stage, unit.names[0], kept], sort_keys=True)


def estimate(plan: Plan, assumptions: Assumptions) -> Estimate:
    """Estimate what of a plan is still to do.

    Parameters
    ----------
    plan
        Every unit of work; one is done where its main file is there.
    assumptions
        What the formulas take for granted.

    Raises
    ------
    UserError
        A model whose architecture is neither local nor in config/models/architectures, and not
        to be had of the hub.
    """
    from tlora.plan import MAIN

    # What follows from trials that are not done costs the same whichever of them wins.
    open_choices = [choice for choice in plan.choices if not choice.cells]
    for choice in open_choices:
        plan.confirm(choice, choice.trials[0].trial)
    estimator = _Estimator(plan, assumptions)
    stages = {stage: Row(stage) for stage in MAIN}
    for unit in plan.units.values():
        row = stages.setdefault(unit.stage, Row(unit.stage))
        if unit.main.is_file():
            row.done += 1
        else:
            row.add(estimator.cost(unit))
    found = [row for row in stages.values() if row.todo or row.done]
    kept = sum(row.cost.kept for row in found)
    temporary = sorted((size for row in found for size in row.temporary), reverse=True)
    peak = kept + sum(temporary[: assumptions.jobs])
    measured = {stage: count for stage, count in estimator.measured.items() if count}
    return Estimate(found, kept, peak, measured, assumptions, len(open_choices))


def table(found: Estimate) -> str:
    """Return the estimate as text: a row a stage, the disk it needs, and what was assumed."""
    head = ["Stage", "To do", "Done", "GPU-hours", "CPU-hours"]
    head += ["Kept (GB)", "Temporary (GB)", "Transfer (GB)"]
    lines = [head]
    for row in found.rows:
        cost = row.cost
        hours = [_shown(cost.gpu / 3600), _shown(cost.cpu / 3600)]
        sizes = [_shown(size / GB) for size in (cost.kept, cost.temporary, cost.transfer)]
        lines.append([row.stage, f"{row.todo:,}", f"{row.done:,}", *hours, *sizes])
    total = [
        "total",
        f"{sum(row.todo for row in found.rows):,}",
        f"{sum(row.done for row in found.rows):,}",
        _shown(sum(row.cost.gpu for row in found.rows) / 3600),
        _shown(sum(row.cost.cpu for row in found.rows) / 3600),
        _shown(found.kept / GB),
        _shown((found.peak - found.kept) / GB),
        _shown(sum(row.cost.transfer for row in found.rows) / GB),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, total, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    text = [_line(head, widths), rule, *(_line(line, widths) for line in lines[1:]), rule]
    assumed = found.assumptions
    jobs = f"{assumed.jobs} jobs" if assumed.jobs > 1 else "one job"
    text += [
        _line(total, widths),
        "",
        f"Disk at its peak: {found.peak / GB:,.1f} GB, with {jobs} at once.",
        "Hours and sizes are of the jobs to do. A stage's temporary files are those of its largest",
        f"job, the total's those of the largest {assumed.jobs}. What is fetched is kept in the",
        "Hugging Face cache; the rest lies in results/.",
    ]
    if found.measured:
        names = {"prepare": "data cards", "train": "training runs", "generate": "generations"}
        said = ", ".join(f"{count} {names[stage]}" for stage, count in found.measured.items())
        text += [f"Taken from results that are there: {said}."]
    if found.choices:
        text.append(
            f"Choices that trials have yet to make: {found.choices}. The runs that follow them are "
            "counted with the first trial's values."
        )
    text += [
        "",
        "Assumed, N parameters of the model, A trained ones:",
        "  training: 6 N FLOP a token for all weights, 4 N + 6 A for adapters",
        "  calibration: 6 N FLOP a token, covariances 2 N and 2 in^2 a target",
        "  initialisation: 10 m n min(m, n) FLOP a target, at most; 2 N a token it reads; a sketch",
        "  6 k m n + 8 k n a token with k = r + max(32, r, r n / m) rows a target, and 4 N a token",
        "  generation: 2 N FLOP a token of the prompt; a step reads all weights and the cache",
        "  the adapter gate: four models loaded in each number format",
        "  adapters float32, twice the rank after an initialisation, at most; all weights in the",
        "  model's number format, merged ones too; two checkpoints of weights and Adam's states;",
        "  a GPU job's own CPU cores are not counted",
        "",
    ]
    options = [
        (f"--{one.name.replace('_', '-')}", f"{getattr(assumed, one.name):,}", one.metadata["text"])
        for one in dataclasses.fields(Assumptions)
    ]
    wide = [max(len(option[at]) for option in options) for at in (0, 1)]
    text += [f"  {name:{wide[0]}}  {value:>{wide[1]}}  {said}" for name, value, said in options]
    return "\n".join(text)


def _shown(value: float) -> str:
    return f"{value:,.1f}" if value else "–"


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(wide) for cell, wide in others)])
