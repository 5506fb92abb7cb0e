"""What can be told about a model from its files alone, without torch."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path

from tlora.artefact import sha256_file, write_json
from tlora.errors import UserError

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


@functools.lru_cache(maxsize=64)
def shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a local model, from its safetensors headers.

    Source: the safetensors format: 8 bytes of little-endian header length, then JSON.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(path).expanduser().glob("*.safetensors")):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        found |= {
            name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        }
    return found


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
    if not is_local(path):
        return
    weights = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes(path).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    if not weights:
        return
    if isinstance(target_modules, str):
        if target_modules != "all-linear":
            return  # a regular expression: PEFT's matter
        embeddings = ("embed_tokens", "lm_head", "shared", "wte", "wpe", "relative_attention_bias")
        targets = {n: s for n, s in weights.items() if n.rpartition(".")[2] not in embeddings}
    else:
        targets = {}
        for target in target_modules:
            matches = {n: s for n, s in weights.items() if n == target or n.endswith(f".{target}")}
            if not matches:
                known = sorted({name.rpartition(".")[2] for name in weights})
                raise UserError(
                    f"{where[0]}: target_modules: {target!r}: no module of {path} has this name; "
                    f"known: {', '.join(known)}"
                )
            targets |= matches
    for name, shape in targets.items():
        if rank > min(shape):
            raise UserError(
                f"{where[1]}: rank: {rank}: expected at most {min(shape)}, "
                f"the smaller side of {name}"
            )
