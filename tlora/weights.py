"""What can be told about a model from its files alone, without torch."""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlora.artefact import read_json, sha256_file, write_json
from tlora.errors import UserError
from tlora.methods import Base, Method

# What loading a model and its tokenizer reads; notes beside it are no part of its identity.
PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
# Checksums of files above this size are remembered by size and time of change.
LARGE = 50_000_000
CACHE = Path("results/.checksums.json")
ALL_LINEAR = "all-linear"
# Families whose linear layers are transformers' Conv1D.
CONV1D = ("gpt2", "openai-gpt")


def is_local(path: str) -> bool:
    """Tell whether a model's path is a folder rather than a repository of the hub."""
    return Path(path).is_dir() or path.startswith((".", "/", "~")) or path.count("/") != 1


def fingerprint(path: str, revision: str | None, where: str) -> dict[str, str]:
    """Return what identifies a base model's content.

    Parameters
    ----------
    path
        Folder, or repository of the hub.
    revision
        Commit of the repository; no part of a folder's identity.
    where
        File and line that name the model, for the error.

    Returns
    -------
    dict
        {"sha256": ...} over names and contents of a folder's files, or {"hub", "revision"}.

    Raises
    ------
    UserError
        No such folder, no config.json in it, or a repository without a revision.
    """
    if not is_local(path):
        if revision is None:
            raise UserError(
                f"{where}: revision: None: expected the commit of the hub repository {path!r}"
            )
        return {"hub": path, "revision": revision}
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: path: {path!r}: expected a folder that holds config.json")
    return {"sha256": _digest(folder)}


def _digest(folder: Path) -> str:
    import hashlib

    files = sorted({file for pattern in PATTERNS for file in folder.glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{checksum(file)}\n".encode())
    return digest.hexdigest()


def checksum(file: Path) -> str:
    """Return a file's SHA-256; that of a large file is remembered by size and time of change."""
    state = file.stat()
    return _remembered(str(file.resolve()), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _remembered(file: str, size: int, changed: int) -> str:
    if size < LARGE:
        return sha256_file(Path(file))
    known = json.loads(CACHE.read_text()) if CACHE.is_file() else {}
    key = f"{file}\0{size}\0{changed}"
    if key not in known:
        known[key] = sha256_file(Path(file))
        write_json(CACHE, known)
    return known[key]


def shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a local model, from its safetensors headers.

    Source: the safetensors format: 8 bytes of little-endian header length, then JSON.
    """
    return _shapes(Path(path).expanduser().resolve())


@functools.lru_cache(maxsize=64)
def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        found |= {
            name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        }
    return found


def settings(path: str) -> dict[str, Any]:
    """Return a local model's config.json; {} for a repository of the hub."""
    file = Path(path).expanduser() / "config.json"
    return read_json(file) if is_local(path) and file.is_file() else {}


def check_targets(
    path: str, target_modules: str | list[str], rank: int, where: tuple[str, str]
) -> None:
    """Check targets and rank against a local model's weights, before any job starts.

    Parameters
    ----------
    path
        The model; nothing is checked for a repository of the hub or without safetensors.
    target_modules
        Names as PEFT takes them, or "all-linear".
    rank
        Rank per module.
    where
        File and line of the targets and of the rank.

    Raises
    ------
    UserError
        A name that no module has, or a rank above min(in, out) of a targeted module.
    """
    check_rank(_known_targets(path, target_modules, where[0]), rank, where[1])


def _known_targets(
    path: str, target_modules: str | list[str], where: str
) -> dict[str, tuple[int, ...]]:
    """Return the targets that a model's files tell; {} where they do not.

    A regular expression is for the names in memory, which may have a prefix that files leave out.
    """
    weights = matrices(shapes(path)) if is_local(path) else {}
    if not weights or (isinstance(target_modules, str) and target_modules != ALL_LINEAR):
        return {}
    return match_targets(weights, target_modules, path, where)


def matrices(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weight matrices by module name, from those of its tensors."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensors.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def match_targets(
    weights: Mapping[str, tuple[int, ...]], target_modules: str | list[str], model: str, where: str
) -> dict[str, tuple[int, ...]]:
    """Return those of `weights` that `target_modules` names.

    Raises
    ------
    UserError
        A name that no module of `model` has, or a regular expression that matches none.
    """
    if target_modules == ALL_LINEAR:
        embeddings = ("embed_tokens", "lm_head", "shared", "wte", "wpe", "relative_attention_bias")
        return {n: s for n, s in weights.items() if n.rpartition(".")[2] not in embeddings}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise UserError(
                f"{where}: target_modules: {target_modules!r}: no regular expression: {error}"
            ) from error
        matched = {n: s for n, s in weights.items() if pattern.fullmatch(n)}
        if not matched:
            raise UserError(
                f"{where}: target_modules: {target_modules!r}: matches no module of {model}"
            )
        return matched
    matched = {}
    for target in target_modules:
        found = {n: s for n, s in weights.items() if n == target or n.endswith(f".{target}")}
        if not found:
            known = sorted({name.rpartition(".")[2] for name in weights})
            raise UserError(
                f"{where}: target_modules: {target!r}: no module of {model} has this name; "
                f"known: {', '.join(known)}"
            )
        matched |= found
    return matched


def check_rank(targets: Mapping[str, tuple[int, ...]], rank: int, where: str) -> None:
    """Check that a rank is at most min(in, out) of every target.

    Raises
    ------
    UserError
        Naming the first target that is too small.
    """
    for name, shape in targets.items():
        if rank > min(shape):
            raise UserError(
                f"{where}: rank: {rank}: expected at most {min(shape)}, the smaller side of {name}"
            )


def check_fit(
    method: Method,
    options: Any,
    path: str,
    seq2seq: bool,
    target_modules: str | list[str] | None,
    rank: int | None,
    where: str,
) -> None:
    """Ask a method whether it fits a model, before any job starts.

    Parameters
    ----------
    method, options
        The method and its options.
    path
        The model: a folder is looked into; of a repository of the hub nothing is known.
    seq2seq
        Whether it is an encoder-decoder model.
    target_modules, rank
        As the cell has them; None for a method without adapter.
    where
        File, line and name of the method, for the error.

    Raises
    ------
    UserError
        The method's reason.
    """
    config = settings(path)
    base = Base(
        rank=rank,
        targets={} if target_modules is None else _known_targets(path, target_modules, where),
        conv1d=config.get("model_type") in CONV1D,
        seq2seq=seq2seq or bool(config.get("is_encoder_decoder")),
        quantised=quantisation(config),
    )
    reason = method.unfit(options, base)
    if reason is not None:
        raise UserError(f"{where}: {reason}")


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Return how config.json says that the weights are quantised, None where it does not."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    return str(found.get("quant_method", "unnamed")) if isinstance(found, dict) else "unnamed"
