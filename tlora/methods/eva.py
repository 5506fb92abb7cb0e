"""EVA (Paischer et al., arXiv 2410.07170): A from the principal components of the inputs.

PEFT's `initialize_lora_eva_weights`: incremental SVD of every layer's inputs on batches of
calibration samples until the components stand still; the ranks are shared out by the explained
variance. PEFT goes on without end where they never do; here after `passes` passes it is an error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from tlora.methods import Base, Context

INITIALIZES = True


@dataclass(frozen=True)
class Options:
    """Options of PEFT's EvaConfig, and of the loop.

    rho
        A module's rank is at most rho * r; 1 gives all modules the same.
    tau
        Cosine similarity of successive components that counts as converged.
    batch_size
        Calibration samples a step of the SVD.
    passes
        Passes over the calibration samples at most.
    """

    rho: float = 2.0
    tau: float = 0.99
    batch_size: int = 16
    passes: int = 100

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"rho: {self.rho}: expected at least 1")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau: {self.tau}: expected 0 to 1")
        for key in ("batch_size", "passes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}: expected at least 1")


def reads_batches(options: Options) -> bool:
    """EVA runs the model on the calibration samples."""
    return True


def unfit(options: Options, base: Base) -> str | None:
    """PEFT masks the inputs of all layers by one sequence."""
    if base.seq2seq:
        return "base model: is an encoder-decoder model: expected a causal one"
    return None


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put PEFT's EVA adapter on the model.

    Raises
    ------
    UserError
        Batches with fewer label tokens than components, or components that do not converge.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    batches = grouped(list(context.batches()), options.batch_size)
    components = round(context.rank * options.rho)
    tokens = max(int((batch["labels"] != -100).sum()) for batch in batches)
    if tokens < components:
        raise UserError(
            f"batch_size: {options.batch_size}: {tokens} label tokens a batch: expected at "
            f"least {components}, the components (rank x rho)"
        )
    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=options.rho, tau=options.tau),
    )
    adapted = get_peft_model(model, config)
    left = 1 + options.passes * len(batches)

    def forward(model: Any, inputs: dict[str, Tensor]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(
                f"tau: {options.tau}: not converged after {options.passes} passes over "
                f"{len(batches)} batches: expected a smaller tau or more calibration samples"
            )
        return model(**inputs)

    initialize_lora_eva_weights(
        adapted,
        dataloader=batches,
        forward_fn=forward,
        show_progress_bar=sys.stderr.isatty(),
    )
    return adapted


def grouped(samples: list[dict[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    """Return batches of `size` samples, padded on the right with what no one looks at.

    Parameters
    ----------
    samples
        Dicts of (1, tokens) input_ids, attention_mask and labels.
    size
        Samples a batch; the last one may have fewer.
    """
    import torch

    batches = []
    for start in range(0, len(samples), size):
        chosen = samples[start : start + size]
        width = max(sample["input_ids"].shape[1] for sample in chosen)
        batch = {}
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rows = [
                torch.nn.functional.pad(sample[key], (0, width - sample[key].shape[1]), value=fill)
                for sample in chosen
            ]
            batch[key] = torch.cat(rows)
        batches.append(batch)
    return batches
