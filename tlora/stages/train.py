"""One fine-tuning run with Hugging Face's Trainer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora import methods
from tlora.artefact import (
    check_files,
    read_json,
    remove,
    sha256_tree,
    staged,
    stamped,
    write_json,
    write_text,
)
from tlora.base_model import (
    load_model,
    load_tokenizer,
    padding_id,
    peak_memory_bytes,
    source_name,
)
from tlora.checkpoints import delete_torn, last_checkpoint, seal, stop_callback
from tlora.distributed import (
    begin,
    check_deepspeed,
    check_installed,
    largest_of_all,
    launch,
    launched,
    processes,
    rank,
    reported,
    split,
    spread,
    whole_state,
    world_size,
)
from tlora.errors import UserError
from tlora.probe import frozen_digests, held_out, probe
from tlora.tasks import tokenised
from tlora.tasks.prompts import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

logger = logging.getLogger(__name__)

CHECKPOINTS = 5
DIVERGED = "diverged.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tlora")


def train(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Train, and write weights/, log.jsonl, train.json and what the adapter gate compares.

    Checkpoints, the log and the time spent so far lie in `place["work"]`, stamped with
    `place["stamp"]`: a run of another spec, input or code starts afresh. With `place["processes"]`
    above 1, or `place["deepspeed"]`, torchrun starts them, and each comes here again.

    A loss that is not finite is a result, and no error: train.json then holds the reason under
    `failed`, and there are no weights. Trials with a high learning rate may end so.

    Raises
    ------
    UserError
        Too few samples for one optimizer step, a batch that does not divide, or a method that
        DeepSpeed's settings do not fit.
    SystemExit
        After SIGTERM or SIGUSR1, with a checkpoint to go on from.
    """
    work = Path(place["work"])
    if launched():
        with reported(work):
            begin(place)
            _train(spec, inputs, out, place)
        return
    samples = tokenised.read(inputs["prepare"].parent / "train.parquet")
    sample_order(len(samples), spec["batch_size"], spec["epochs"], spec["seed"])
    split(spec["batch_size"], place.get("micro_batch"), processes(place))
    if place.get("deepspeed"):
        check_deepspeed(place["deepspeed"], methods.load(spec["implementation"]))
        check_installed()
    stamped(work, place["stamp"])
    delete_torn(work)
    try:
        if processes(place) > 1 or place.get("deepspeed"):
            launch("train", spec, inputs, out, place)
        else:
            _train(spec, inputs, out, place)
    except UserError as error:
        if not (work / DIVERGED).is_file():
            raise
        logger.error("%s", error)
        _write_failed(work, out)
    # Weights of a full model make its checkpoints larger than what is kept.
    remove(work)


def _write_failed(work: Path, out: Path) -> None:
    """Write what is known of a run whose loss was not finite."""
    cost = read_json(work / "cost.json")
    history = (work / "log.jsonl").read_text(encoding="utf-8")
    with staged(out / "weights") as temporary:
        temporary.mkdir(parents=True)
    write_text(out / "probe.safetensors", "")
    write_text(out / "log.jsonl", history)
    write_json(
        out / "train.json",
        {
            "failed": read_json(work / DIVERGED)["reason"],
            "train_seconds": cost["seconds"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
            "attempts": cost["attempts"],
            "files": {},
            "versions": _versions(),
        },
    )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _train(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Train in this process, and in the others where there are more."""
    # Loading these takes seconds, which bad input need not wait for.
    import torch
    from safetensors.torch import save_file
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from tlora.adapter import fused
    from tlora.loss import chunked_loss

    work = Path(place["work"])
    samples = tokenised.read(inputs["prepare"].parent / "train.parquet")
    order, dropped = sample_order(len(samples), spec["batch_size"], spec["epochs"], spec["seed"])
    steps = len(order) // spec["batch_size"]
    batches = [
        [samples[index] for index in order[start : start + spec["batch_size"]]]
        for start in range(0, len(order), spec["batch_size"])
    ]
    alone, on_cpu = world_size() == 1, not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where it is installed it says so otherwise
    deepspeed, halved = place.get("deepspeed"), spec["model"]["dtype"] == "bfloat16"
    set_seed(spec["seed"])
    method = methods.load(spec["implementation"])
    options = method.options(spec["options"])
    # What is trained is held in float32, or small changes are rounded away. Adapters are by PEFT,
    # and DeepSpeed has its own copy.
    widened = halved and not method.adapter and not deepspeed
    model = load_model({**spec["model"], **({"dtype": "float32"} if widened else {})}, place)
    total = sum(parameter.numel() for parameter in model.parameters())
    passes, parts = cut(batches, place, _weighs_tokens(model))
    model = _adapted(method, options, model, spec, inputs)
    if halved and deepspeed:
        _round(model)  # as DeepSpeed will: what is frozen is noted as it will be
    pad = padding_id(load_tokenizer(place))
    log = Log(work, steps, spec["epochs"])
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,  # a micro batch
        gradient_accumulation_steps=passes,
        max_steps=steps,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type=spec["schedule"],
        warmup_steps=math.ceil(spec["warmup_ratio"] * steps),
        weight_decay=spec["weight_decay"],
        max_grad_norm=spec["max_grad_norm"],
        seed=spec["seed"],
        bf16=halved,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and not alone else None,
        ddp_find_unused_parameters=None if alone else False,
        deepspeed=deepspeed,
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / CHECKPOINTS)),
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )

    extra = method.trainer(model, options, {**spec, "steps": steps})
    mixin = extra.pop("mixin", None)
    frozen = frozen_digests(model)

    class InOrder(*([mixin] if mixin else []), Trainer):
        """The micro batches are in the order of training already."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, **kwargs)
            targets = kwargs.get("num_items_in_batch")
            if targets is None or not self.model.config.is_encoder_decoder:
                return found
            # These models divide by the targets of the micro batch, whatever they are told.
            loss, *outputs = found if return_outputs else (found,)
            loss = loss * (inputs["labels"] != IGNORED).sum() / targets
            return (loss, *outputs) if return_outputs else loss

    stop = stop_callback(work)
    callbacks = [_callback(log, place), stop, *extra.get("callbacks", [])]
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=parts,
        data_collator=lambda rows: tokenised.collate(rows[0], pad),
        **{**extra, "callbacks": callbacks},
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(work)
    log.start(checkpoint)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        if not deepspeed:  # which may hold only parts of the weights
            stack.enter_context(fused(model))
            stack.enter_context(chunked_loss(model))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.signal and trainer.state.global_step < steps:
        logger.warning("signal %d: stopped after step %d", stop.signal, trainer.state.global_step)
        sys.exit(128 + stop.signal)

    if widened:
        _round(trainer.model)
    peak = largest_of_all(max(peak_memory_bytes(), log.peak))
    # Where the weights are spread over the processes, the next two need all of them.
    if rank() != 0 and not spread(trainer):
        return
    answers = probe(trainer.model, held_out(inputs["prepare"]))
    state = whole_state(trainer)
    if rank() != 0:
        return
    with staged(out / "weights") as temporary:
        _save(trainer.model, temporary, place, state)
    with staged(out / "probe.safetensors") as temporary:
        save_file(answers, temporary)
    history = (work / "log.jsonl").read_text(encoding="utf-8")
    write_text(out / "log.jsonl", history)
    losses = [json.loads(line)["loss"] for line in history.splitlines()]
    tokens = sum(len(samples[index]["input_ids"]) for index in order)
    seconds = log.seconds()
    write_json(
        out / "train.json",
        {
            "trainable_parameters": sum(
                getattr(parameter, "ds_numel", parameter.numel())
                for parameter in trainer.model.parameters()
                if parameter.requires_grad
            ),
            "total_parameters": total,
            "steps": steps,
            "samples": len(order),
            "dropped_samples": dropped,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "train_seconds": seconds,
            "processes": world_size(),
            "peak_memory_bytes": peak,
            "final_loss": log.last_loss,
            "mean_loss": sum(losses) / len(losses),
            "attempts": log.attempts,
            "frozen": frozen,
            "files": sha256_tree(out / "weights"),
            "versions": _versions(),
        },
    )


def sample_order(count: int, batch_size: int, epochs: float, seed: int) -> tuple[list[int], int]:
    """Return the samples in the order of training, and how many were dropped.

    Every epoch is a permutation of its own, drawn from `seed`, whose ragged last global batch is
    dropped: the order is the same for any number of devices and any micro batch.

    Parameters
    ----------
    count
        Samples there are.
    batch_size
        Samples an optimizer step, over all devices.
    epochs
        May be a fraction.
    seed
        The run's.

    Returns
    -------
    order : list of int
        Indices; a multiple of `batch_size` of them.
    dropped : int
        Samples left out, over all epochs.

    Raises
    ------
    UserError
        When not one batch comes together.
    """
    steps_an_epoch = count // batch_size
    steps = int(steps_an_epoch * epochs)
    if steps == 0:
        raise UserError(
            f"batch_size: {batch_size}: expected at most {int(count * min(epochs, 1))}, "
            f"the samples there are ({count} x {epochs} epochs)"
        )
    order: list[int] = []
    generator = random.Random(f"order {seed}")
    while len(order) < steps * batch_size:
        epoch = list(range(count))
        generator.shuffle(epoch)
        order += epoch[: steps_an_epoch * batch_size]
    full_epochs = math.ceil(steps / steps_an_epoch)
    return order[: steps * batch_size], full_epochs * (count - steps_an_epoch * batch_size)


def _weighs_tokens(model: PreTrainedModel) -> bool:
    """Tell whether a model can be told how many tokens its loss is the mean of, as Trainer asks."""
    if hasattr(model, "accepts_loss_kwargs"):
        return model.accepts_loss_kwargs
    kinds = {one.kind for one in inspect.signature(model.forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def cut(
    batches: list[list[dict]], place: dict[str, Any], free: bool = True
) -> tuple[int, list[list[dict]]]:
    """Cut global batches into micro batches of samples of like length.

    What an optimizer step sees, and how it weighs each token, is the same for any cut.

    Parameters
    ----------
    batches
        Global batches of samples.
    place
        `micro_batch`: so many of the longest samples fit into one pass; `processes`, `deepspeed`.
    free
        Whether there may be more passes than memory asks for. Not for models whose loss is the mean
        over a micro batch: a token would weigh more in a micro batch with few of them.

    Returns
    -------
    passes : int
        Passes of each process for an optimizer step.
    parts : list of lists of samples
        The micro batches in the order of training. Of n processes each takes every n-th.

    Raises
    ------
    UserError
        Where a global batch does not divide.
    """
    devices = processes(place)
    _, least = split(len(batches[0]), place.get("micro_batch"), devices)
    # ZeRO moves weights and gradients between the processes in every pass.
    passes = least
    if free and not place.get("deepspeed"):
        passes = tokenised.passes_that_pay(batches, least, devices)
    count, fits = passes * devices, least * devices
    parts = [part for batch in batches for part in tokenised.micro_batches(batch, count, fits)]
    return passes, parts


class Log:
    """log.jsonl, and the time and memory of a run over all its attempts.

    Parameters
    ----------
    work
        Folder of the run's partial state.
    steps
        Optimizer steps of the whole run.
    epochs
        Epochs of the whole run.
    """

    def __init__(self, work: Path, steps: int, epochs: float) -> None:
        self.path = work / "log.jsonl"
        self.cost = work / "cost.json"
        self.steps, self.epochs = steps, epochs
        self.spent, self.peak, self.attempts = 0.0, 0, 0
        self.last_loss = math.nan
        self.started = time.perf_counter()

    def start(self, checkpoint: Path | None) -> None:
        """Begin an attempt: drop the rows after the checkpoint, take over what was spent."""
        self.started = time.perf_counter()
        if rank() != 0:
            return
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        rows = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # torn by a kill
                if row["step"] <= step:
                    rows.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in rows))
        if self.cost.is_file():
            known = read_json(self.cost)
            self.spent, self.peak = known["seconds"], known["peak_memory_bytes"]
            self.attempts = known["attempts"]
        self.attempts += 1
        self.keep()

    def seconds(self) -> float:
        """Return the seconds of training so far, over all attempts."""
        return self.spent + time.perf_counter() - self.started

    def keep(self) -> None:
        """Write down the cost so far, so that a killed attempt is not free."""
        if rank() != 0:
            return
        self.peak = max(self.peak, peak_memory_bytes())
        cost = {
            "seconds": self.seconds(),
            "peak_memory_bytes": self.peak,
            "attempts": self.attempts,
        }
        write_json(self.cost, cost)

    def row(self, step: int, values: dict[str, float]) -> dict[str, float] | None:
        """Append a row; returns it, or None for what is no training step or another process's.

        Raises
        ------
        UserError
            When the loss is not finite.
        """
        if "loss" not in values:
            return None
        if not math.isfinite(values["loss"]):
            reason = (
                f"loss: {values['loss']} at step {step} of {self.steps}: expected a finite number; "
                "lower the learning rate"
            )
            if rank() == 0:
                self.keep()
                write_json(self.path.with_name(DIVERGED), {"reason": reason})
            raise UserError(reason)
        self.last_loss = float(values["loss"])
        if rank() != 0:
            return None
        norm = float(values.get("grad_norm", math.nan))
        row = {
            "step": step,
            "epoch": step / self.steps * self.epochs,
            "loss": self.last_loss,
            "learning_rate": float(values["learning_rate"]),
            "grad_norm": norm if math.isfinite(norm) else None,
            "seconds": round(self.seconds(), 3),
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def _callback(log: Log, place: dict[str, Any]) -> TrainerCallback:
    from transformers import TrainerCallback

    from tlora.tracking import live_logger

    live = live_logger(place if rank() == 0 else {})

    class Logging(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            row = log.row(state.global_step, logs or {})
            if row is not None:
                live.log(row)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            log.keep()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            live.close()

    return Logging()


def _adapted(
    method: methods.Method,
    options: Any,
    model: PreTrainedModel,
    spec: dict,
    inputs: dict[str, Path],
) -> Any:
    """Return the model with its fresh adapter."""
    if "initialize" in inputs:
        from tlora.adapter import load_initial

        card = read_json(inputs["initialize"])
        check_files(inputs["initialize"].parent, card["files"])
        return load_initial(model, inputs["initialize"].parent, card["frozen"])
    context = methods.Context(
        rank=spec["rank"],
        lora_alpha=spec["lora_alpha"],
        target_modules=spec["target_modules"],
        seed=spec["seed"],
    )
    return method.adapt(model, options, context)


def _round(model: Any) -> None:
    """Round all parameters to bfloat16; buffers, such as rotary frequencies, stay as they are."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _save(model: Any, folder: Path, place: dict[str, Any], state: dict | None) -> None:
    """Save the adapter or the model; equal runs give equal bytes."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder, safe_serialization=True, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)
    if hasattr(model, "peft_config"):
        from tlora.peft_folder import CONFIG, write_config

        write_config(folder, read_json(folder / CONFIG), source_name(place))
