"""AdaLoRA (Zhang et al., arXiv 2303.10512): B E A with a diagonal E, pruned during training.

The adapter, the orthogonality term and the allocation are PEFT's own. What PEFT leaves to its user
is here: the call after every optimizer step, the term once per optimizer step however many micro
batches it has, and checkpoints that hold the whole of training. PEFT saves pruned tensors, which
do not fit the model that is to go on, and neither importances nor pattern.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora import zero
from tlora.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.adalora import RankAllocator
    from torch import Tensor
    from transformers import PreTrainedModel

    from tlora.methods import Base, Context

ZERO = 2
"""PEFT's orthogonality term gathers weights in its own way, which confuses ZeRO-3."""

_IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_STATE, _PATTERN = "adalora.safetensors", "adalora.json"
# Keys of an AdaLoRA configuration that LoRA's does not have.
_OWN_KEYS = (
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
)


@dataclass(frozen=True)
class Options:
    """Options of AdaLoRA. The task's rank is the initial one, so parameters count as LoRA's.

    budget_ratio
        Initial over final mean rank.
    initial, final
        Shares of the optimizer steps before pruning begins and after it has ended.
    interval
        Optimizer steps between two prunings.
    orthogonality
        Weight gamma of the term ||P^T P - I|| + ||Q Q^T - I||.
    beta1, beta2
        Smoothing of the importance and of its uncertainty.
    """

    budget_ratio: float = 1.5
    initial: float = 0.13
    final: float = 0.48
    interval: int = 10
    orthogonality: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if self.budget_ratio <= 1:
            raise ValueError(f"budget_ratio: {self.budget_ratio}: expected more than 1")
        if self.initial < 0 or self.final <= 0 or self.initial + self.final >= 1:
            raise ValueError(
                f"initial: {self.initial}, final: {self.final}: expected shares below 1 together"
            )
        if self.interval < 1:
            raise ValueError(f"interval: {self.interval}: expected at least 1")
        if self.orthogonality < 0:
            raise ValueError(f"orthogonality: {self.orthogonality}: expected at least 0")
        for key in ("beta1", "beta2"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}: expected above 0 and below 1")


def unfit(options: Options, base: Base) -> str | None:
    """A small rank leaves nothing to prune."""
    if base.rank is not None and _final_rank(base.rank, options) >= base.rank:
        ratio = options.budget_ratio
        return f"rank: {base.rank}: expected a larger one, {ratio} times the final rank"
    return None


def _final_rank(rank: int, options: Options) -> int:
    return max(1, round(rank / options.budget_ratio))


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's AdaLoRA on the model; A and B are drawn by the run's seed, E is 0."""
    from peft import AdaLoraConfig, get_peft_model

    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    config = AdaLoraConfig(
        # PEFT adds the orthogonality term only for a model with a task.
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        init_r=context.rank,
        target_r=_final_rank(context.rank, options),
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        deltaT=options.interval,
        beta1=options.beta1,
        beta2=options.beta2,
        orth_reg_weight=options.orthogonality,
        total_step=1,  # known at the start of training
    )
    return get_peft_model(model, config)


def schedule(options: Options, steps: int) -> tuple[int, int]:
    """Return PEFT's `tinit` and `tfinal`: steps before pruning begins, and after it has ended.

    Raises
    ------
    UserError
        Fewer than 2 steps.
    """
    if steps < 2:
        raise UserError(f"{steps} optimizer steps: expected at least 2")
    final = min(max(1, round(options.final * steps)), steps - 1)
    return min(round(options.initial * steps), steps - final - 1), final


def trainer(model: PeftModel, options: Options, context: dict[str, Any]) -> dict[str, Any]:
    """Set the schedule; return PEFT's call after every optimizer step, and a Trainer mixin."""
    from transformers import TrainerCallback

    config = model.peft_config["default"]
    config.total_step = context["steps"]
    config.tinit, config.tfinal = schedule(options, context["steps"])

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = [parameter for name, parameter in trained.items() if ".lora_E." in name]

    class Allocate(TrainerCallback):
        def __init__(self) -> None:
            self.gradients: list[Tensor] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            def take() -> None:
                # The importances of later steps are not asked for.
                wanted = state.global_step <= config.total_step - config.tfinal
                self.gradients = zero.gradients_of([*trained.values()]) if wanted else []

            if args.deepspeed_plugin is not None:
                zero.before_step(kwargs["optimizer"].optimizer, take)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            block: Any = contextlib.nullcontext()
            if args.deepspeed_plugin is not None:
                gradients, self.gradients = self.gradients, []
                block = zero.around([*trained.values()], values, gradients, args.max_grad_norm)
            with block:
                # Steps from 0, weights after the step and gradients before it, as PEFT has it.
                model.base_model.update_and_allocate(state.global_step)

    class AdaLora:
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # A loss that is divided by the tokens of the whole step is not divided by the number of
            # micro batches or processes again: PEFT's term then counts once for each. That of an
            # encoder-decoder is weighted, its term with it, by its share of those tokens.
            items = kwargs.get("num_items_in_batch")
            whole = self.model_accepts_loss_kwargs and items is not None
            whole = whole and not self.model.config.is_encoder_decoder
            micro_batches = self.current_gradient_accumulation_steps
            parts = micro_batches * self.accelerator.num_processes if whole else 1
            config.orth_reg_weight = options.orthogonality / parts
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                config.orth_reg_weight = options.orthogonality

        def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
            pattern, config.rank_pattern = config.rank_pattern, None
            try:
                super()._save(output_dir, state_dict)
            finally:
                config.rank_pattern = pattern
            if self.args.should_save:
                save_state(model.base_model.rankallocator, pattern, Path(output_dir))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                allocator = self.model.base_model.rankallocator
                config.rank_pattern = load_state(allocator, Path(checkpoint), self.model.device)

    return {"callbacks": [Allocate()], "mixin": AdaLora}


def save_state(allocator: RankAllocator, pattern: dict | None, folder: Path) -> None:
    """Write the importances and which triplets are kept."""
    from safetensors.torch import save_file

    from tlora.artefact import write_json

    tensors = {
        f"{kind}/{name}": tensor.detach().cpu().contiguous()
        for kind in _IMPORTANCES
        for name, tensor in getattr(allocator, kind).items()
    }
    save_file(tensors, folder / _STATE)
    write_json(folder / _PATTERN, pattern)


def load_state(allocator: RankAllocator, folder: Path, device: Any = "cpu") -> dict | None:
    """Give the allocator its importances back; return which triplets are kept."""
    from safetensors.torch import load_file

    from tlora.artefact import read_json

    allocator.reset_ipt()
    for key, tensor in load_file(folder / _STATE, device=str(device)).items():
        kind, _, name = key.partition("/")
        getattr(allocator, kind)[name] = tensor
    return read_json(folder / _PATTERN)


def export(trained: Path, initial: Path | None, out: Path, options: Options) -> str:
    """Write the kept triplets as plain LoRA: A' = E A, B' = B, alpha / (initial rank + 1e-5).

    The constant is PEFT's.
    """
    import re

    import numpy as np

    from tlora.artefact import read_json
    from tlora.peft_folder import (
        CONFIG,
        WEIGHTS,
        Stored,
        read_tensors,
        write_config,
        write_tensors,
    )

    config = read_json(trained / CONFIG)
    if config.get("peft_type") != "ADALORA":
        raise UserError(f"{trained / CONFIG}: peft_type: expected ADALORA")
    scaling = config["lora_alpha"] / (config["init_r"] + 1e-5)
    stored = read_tensors(trained / WEIGHTS)
    tensors: dict[str, Stored] = {}
    ranks: dict[str, int] = {}
    for stem in sorted(n.removesuffix(".lora_E") for n in stored if n.endswith(".lora_E")):
        a, b, e = (stored[f"{stem}.lora_{part}"].numbers() for part in "ABE")
        kept = np.flatnonzero(e[:, 0])
        if not len(kept):
            continue
        ranks[stem.removeprefix("base_model.model.")] = len(kept)
        tensors[f"{stem}.lora_A.weight"] = Stored.of(a[kept] * e[kept], "F32")
        tensors[f"{stem}.lora_B.weight"] = Stored.of(b[:, kept], "F32")
    if not ranks:
        raise UserError(f"{trained / WEIGHTS}: every triplet is pruned: expected one at least")
    pattern = {"^" + re.escape(name): rank for name, rank in ranks.items()}
    plain = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    plain |= {
        "peft_type": "LORA",
        "task_type": None,
        "r": max(ranks.values()),
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": {key: scaling * rank for key, rank in pattern.items()},
    }
    plain["lora_alpha"] = scaling * plain["r"]
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, tensors)
    write_config(out, plain)
    return "adapter"
