"""Saved PEFT LoRA folders, rewritten without torch or PEFT: residuals undone, scaling folded.

Tensors are read and written as safetensors bytes, because numpy has no bfloat16: numbers are
widened to float32, which holds every bfloat16 and float16 exactly, and narrowed back.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlora.artefact import read_json, staged, write_json
from tlora.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a safetensors file: dtype name, shape, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> np.ndarray:
        """Return the values as float32 (float64 stays)."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
        if self.dtype not in kinds:
            raise UserError(f"adapter: dtype {self.dtype}: expected one of {sorted(_SIZES)}")
        array = np.frombuffer(self.data, kinds[self.dtype]).reshape(self.shape)
        return array.astype("<f4") if self.dtype == "F16" else array

    @classmethod
    def of(cls, array: np.ndarray, dtype: str) -> Stored:
        """Store values that `dtype` holds exactly."""
        if dtype == "BF16":
            data = (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            data = array.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        return cls(dtype, array.shape, data)


def read_tensors(path: Path) -> dict[str, Stored]:
    """Read a safetensors file.

    Raises
    ------
    UserError
        Where the file is missing, cut short, or of another format.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > len(raw):
                raise ValueError("cut short")
            tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), raw[start:end])
        return tensors
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no safetensors file: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file atomically; equal tensors give equal bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide types first: safetensors wants every tensor aligned to its dtype.
    names = sorted(tensors, key=lambda name: (-_SIZES.get(tensors[name].dtype, 1), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with staged(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].data)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter's configuration.

    Raises
    ------
    UserError
        Where there is none, or it is not LoRA's.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: {CONFIG} is missing: expected a saved PEFT adapter")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type: expected LORA")
    return config


def write_config(folder: Path, config: Mapping[str, Any], base_model: str | None = None) -> None:
    """Write an adapter configuration that never re-initialises and names no local path.

    Parameters
    ----------
    folder
        Where `adapter_config.json` goes.
    config
        PEFT's configuration as a dict; sets are written sorted.
    base_model
        `base_model_name_or_path`; None keeps the one in `config` unless it is a path.
    """
    name = config.get("base_model_name_or_path") if base_model is None else base_model
    neutral = {
        **config,
        "base_model_name_or_path": public_name(name),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    # Settings of initialisations that have happened; they would be asked for again on loading.
    for key in ("corda_config", "eva_config", "loftq_config", "lora_ga_config"):
        if neutral.get(key):
            neutral[key] = {} if key == "loftq_config" else None
    for key, value in neutral.items():
        if isinstance(value, (set, frozenset)):
            neutral[key] = sorted(value)
    if isinstance(neutral.get("target_modules"), list):
        neutral["target_modules"] = sorted(neutral["target_modules"])
    write_json(Path(folder) / CONFIG, neutral)


def public_name(name: str | os.PathLike | None) -> str:
    """Return the base model's name, "" where it is a path of this machine."""
    text = "" if name is None else str(name)
    local = os.path.isabs(text) or text.startswith((".", "~")) or os.path.isdir(text)
    return "" if local else text


def scaling(config: Mapping[str, Any], module: str) -> float:
    """Return what PEFT multiplies B A of a module with (its full name in the base model)."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    for key in ("use_dora", "lora_bias", "modules_to_save", "target_parameters"):
        if config.get(key):
            raise UserError(f"{Path(folder) / CONFIG}: {key}: {config[key]!r}: merge this adapter")


def _pairs(folder: Path, tensors: Mapping[str, Stored]) -> list[str]:
    """Return the keys of the modules, without the ending of A or B."""
    stems = sorted(name.removesuffix(_A) for name in tensors if name.endswith(_A))
    for name in tensors:
        if not name.endswith((_A, _B)) or name[: -len(_A)] not in stems:
            raise UserError(f"{Path(folder) / WEIGHTS}: {name}: expected pairs of A and B only")
    for stem in stems:
        if stem + _B not in tensors:
            raise UserError(f"{Path(folder) / WEIGHTS}: {stem}: has A but no B")
    return stems


def fold_scaling(adapter_dir: Path | str, out_dir: Path | str) -> None:
    """Write an adapter with all scaling in B, which PEFT and vLLM read alike.

    vLLM takes one scaling, lora_alpha / r, for all modules. Here B' = scaling * B in float32, r and
    lora_alpha are the largest rank and `alpha_pattern` equals `rank_pattern`: 1 in both.

    Parameters
    ----------
    adapter_dir
        A saved PEFT LoRA folder.
    out_dir
        Gets `adapter_config.json` and `adapter_model.safetensors`; may not be `adapter_dir`.

    Raises
    ------
    UserError
        Where the folder is no plain LoRA adapter (DoRA, saved modules, biases).
    """
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    if adapter_dir.resolve() == out_dir.resolve():
        raise UserError(f"{out_dir}: expected another folder than the adapter's own")
    config = read_config(adapter_dir)
    _check_plain(adapter_dir, config)
    tensors = read_tensors(adapter_dir / WEIGHTS)
    ranks = {}
    folded = dict(tensors)
    for stem in _pairs(adapter_dir, tensors):
        module = stem.removeprefix(_PREFIX)
        ranks[module] = tensors[stem + _A].shape[0]
        values = tensors[stem + _B].numbers().astype("<f8") * scaling(config, module)
        folded[stem + _B] = Stored.of(values, "F32")
    largest = max(ranks.values())
    pattern = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config |= {"r": largest, "lora_alpha": largest, "use_rslora": False}
    config |= {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(out_dir / WEIGHTS, folded)
    write_config(out_dir, config)


def export_adapter(
    trained_dir: Path | str, init_dir: Path | str | None, out_dir: Path | str
) -> None:
    """Write a trained adapter as plain LoRA on the unmodified base model.

    Where B0 is not 0, training began by subtracting s B0 A0 from the base weights. On the
    unmodified ones the same function is [B, -B0] [A; A0] with the same scaling and twice the rank.

    Parameters
    ----------
    trained_dir
        The trained adapter.
    init_dir
        The initial one, None where nothing was subtracted.
    out_dir
        Gets `adapter_config.json` and `adapter_model.safetensors`.

    Raises
    ------
    UserError
        Where the two folders do not fit, or the form cannot be doubled (DoRA).
    """
    trained_dir, out_dir = Path(trained_dir), Path(out_dir)
    config = read_config(trained_dir)
    tensors = read_tensors(trained_dir / WEIGHTS)
    initial = {} if init_dir is None else read_tensors(Path(init_dir) / WEIGHTS)
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(t.numbers().any() for name, t in initial.items() if name.endswith(_B)):
        _check_plain(trained_dir, config)
        tensors = _with_residual(trained_dir, tensors, Path(init_dir or ""), initial)
        # alpha / r stays; with rank-stabilised scaling alpha / sqrt(r) does.
        factor = math.sqrt(2) if config.get("use_rslora") else 2
        config["r"] *= 2
        config["lora_alpha"] *= factor
        config["rank_pattern"] = {k: 2 * v for k, v in (config["rank_pattern"] or {}).items()}
        config["alpha_pattern"] = {
            k: factor * v for k, v in (config["alpha_pattern"] or {}).items()
        }
    write_tensors(out_dir / WEIGHTS, tensors)
    write_config(out_dir, config)


def _with_residual(
    trained_dir: Path,
    trained: Mapping[str, Stored],
    init_dir: Path,
    initial: Mapping[str, Stored],
) -> dict[str, Stored]:
    stems = _pairs(trained_dir, trained)
    if stems != _pairs(init_dir, initial):
        raise UserError(f"{init_dir}: has other modules than {trained_dir}")
    doubled = {}
    for stem in stems:
        for ending, axis in ((_A, 0), (_B, 1)):
            now, before = trained[stem + ending], initial[stem + ending]
            if now.shape != before.shape:
                raise UserError(
                    f"{init_dir}: {stem}: shape {before.shape}: expected {now.shape} as trained"
                )
            dtype = now.dtype if now.dtype == before.dtype else "F32"
            start = before.numbers() if ending == _A else -before.numbers()
            values = np.concatenate([now.numbers(), start], axis=axis)
            doubled[stem + ending] = Stored.of(values, dtype)
    return doubled
