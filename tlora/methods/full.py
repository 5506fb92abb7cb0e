"""Full fine-tuning: every weight of the model is trained."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tlora.methods import Context

ADAPTER = False


@dataclass(frozen=True)
class Options:
    """Full fine-tuning has no options."""


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PreTrainedModel:
    """Make every weight trainable."""
    return model.requires_grad_(True)


def export(trained: Path, initial: Path | None, out: Path, options: Options) -> str:
    """Link the trained model: the same bytes are not kept twice where the disk allows it."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    # the workflow's own marks in the folder are no part of the model
    shutil.copytree(trained, out, copy_function=link, ignore=shutil.ignore_patterns(".*"))
    return "model"
