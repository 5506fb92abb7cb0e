"""What a stage computes: canonical specs and their ids.

A spec holds exactly the fields that change a stage's result, and the ids of what it is made from.
Names, labels, paths, resources and device counts are no part of it. The id is the first 12 hex
digits of the SHA-256 of the canonical JSON.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

ID_DIGITS = 12


def canonical(spec: dict[str, Any]) -> str:
    """Return the one JSON text of a spec: sorted keys, no spaces, no NaN."""
    return json.dumps(
        spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def spec_id(spec: dict[str, Any]) -> str:
    """Return the id of a spec: 12 hex digits."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()[:ID_DIGITS]


@dataclass(frozen=True)
class _Spec:
    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name; what they hold is not copied."""
        return dict(vars(self))


@dataclass(frozen=True)
class Download(_Spec):
    """A repository or file that other jobs read, fetched where the hub can be reached."""

    items: list


@dataclass(frozen=True)
class Overlap(_Spec):
    """Test records of a benchmark that stand in a task's training data."""

    task: dict
    benchmark: dict


@dataclass(frozen=True)
class Prepare(_Spec):
    """Records rendered, tokenised and split."""

    model: dict
    source: str
    data: dict
    files: dict
    prompt: str
    max_length: int


@dataclass(frozen=True)
class Calibrate(_Spec):
    """One statistic of the base model over calibration samples."""

    model: dict
    prepare: str
    statistic: str
    samples: int
    seed: int
    target_modules: str | list
    options: dict


@dataclass(frozen=True)
class Allocate(_Spec):
    """Ranks and scalings from a sensitivity."""

    calibrate: str
    rank: int
    lora_alpha: float
    options: dict


@dataclass(frozen=True)
class Initialize(_Spec):
    """A0 and B0 of an adapter that is initialised from weights or data."""

    model: dict
    implementation: str
    options: dict
    rank: int
    lora_alpha: float
    target_modules: str | list
    allocate: str | None
    statistics: dict
    prepare: str | None
    samples: int | None
    seed: int | None


@dataclass(frozen=True)
class Train(_Spec):
    """One fine-tuning run. The adapter fields are None for full fine-tuning."""

    model: dict
    prepare: str
    implementation: str
    options: dict
    initialize: str | None
    rank: int | None
    lora_alpha: float | None
    target_modules: str | list | None
    learning_rate: float
    schedule: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    batch_size: int
    epochs: float
    seed: int


@dataclass(frozen=True)
class Choose(_Spec):
    """The best of several trials: the values that each sets, and its score's id."""

    trials: list


@dataclass(frozen=True)
class Export(_Spec):
    """The trained weights in the form that others load."""

    train: str
    implementation: str
    options: dict


@dataclass(frozen=True)
class Check(_Spec):
    """The adapter gate: whether every form of the trained weights is the trained model."""

    model: dict
    export: str


@dataclass(frozen=True)
class Generate(_Spec):
    """Completions of one run on one benchmark. `export` is None for the untrained base model."""

    model: dict
    export: str | None
    prompt: str
    benchmark: dict
    files: dict
    backend: str


@dataclass(frozen=True)
class Score(_Spec):
    """Verdicts on completions. `check` is None for the untrained base model."""

    generate: str
    check: str | None
    implementation: str
    options: dict
