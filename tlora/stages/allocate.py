"""Ranks and scalings from a sensitivity."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tlora.allocation import allocate as allocate_ranks
from tlora.artefact import check_files, read_json, write_json

logger = logging.getLogger(__name__)


def allocate(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write allocation.json."""
    from safetensors.numpy import load_file

    card = read_json(inputs["calibrate"])
    check_files(inputs["calibrate"].parent, card["files"])
    values = load_file(inputs["calibrate"].parent / "calibration.safetensors")
    allocation = allocate_ranks(
        {name: float(value) for name, value in values.items()},
        r=spec["rank"],
        lora_alpha=spec["lora_alpha"],
        shapes={name: tuple(shape) for name, shape in card["shapes"].items()},
        **spec["options"],
    )
    logger.info("allocated %d modules", len(allocation))
    write_json(out / "allocation.json", allocation.to_json())
