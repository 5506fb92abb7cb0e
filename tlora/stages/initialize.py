"""A0 and B0 of an adapter that is initialised from weights or data."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any

from tlora import methods
from tlora.artefact import sha256_file, write_json
from tlora.base_model import load_model, peak_memory_bytes
from tlora.calibration import calibration_sample

logger = logging.getLogger(__name__)


def initialize(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write the fresh adapter as a PEFT folder, and adapter_init.json."""
    import torch

    from tlora.adapter import save_initial

    started = time.perf_counter()
    method = methods.load(spec["implementation"])
    torch.manual_seed(spec["seed"] or 0)
    model = load_model(spec["model"], place)
    context = methods.Context(
        rank=spec["rank"],
        lora_alpha=spec["lora_alpha"],
        target_modules=spec["target_modules"],
        seed=spec["seed"] or 0,
        allocation=inputs.get("allocate"),
        statistics={name: inputs[name] for name in spec["statistics"] if name in inputs},
        batches=(
            functools.partial(calibration_sample, spec, inputs["prepare"], model, place)
            if "prepare" in inputs
            else None
        ),
    )
    adapted = method.adapt(model, method.options(spec["options"]), context)
    frozen = save_initial(adapted, out)
    card = {
        "frozen": frozen,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "files": {
            name: sha256_file(out / name)
            for name in ("adapter_config.json", "adapter_model.safetensors")
        },
    }
    logger.info("initialised %s in %.1f s", spec["implementation"], card["seconds"])
    write_json(out / "adapter_init.json", card)
