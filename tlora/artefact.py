"""Reading and writing artefacts: whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tlora.errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` when the block succeeds.

    Works for files and for folders; what stood at `path` before is replaced only then, and nothing
    is left behind when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stamped(folder: Path, stamp: str) -> Path:
    """Return the folder of a job's partial state, emptied first unless it bears this stamp.

    Parameters
    ----------
    folder
        Made where there is none.
    stamp
        Hash of what decides the result: spec, inputs and code.
    """
    mark = folder / "stamp"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != stamp:
        if folder.exists():
            logger.info("%s bears another stamp: starting afresh", folder)
        remove(folder)
        write_text(mark, stamp)
    return folder


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` atomically."""
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically.

    Raises
    ------
    ValueError
        For NaN and infinity, which JSON has no words for.
    """
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a broken one is a `UserError` with the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder`, by relative POSIX path, sorted."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def check_files(folder: Path, expected: dict[str, str]) -> None:
    """Compare files with the checksums their artefact recorded.

    Raises
    ------
    UserError
        Naming the first file that is missing or differs.
    """
    for name, digest in expected.items():
        path = Path(folder) / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though its manifest lists it; delete the folder")
        if sha256_file(path) != digest:
            raise UserError(f"{path}: differs from the checksum in its manifest; delete the folder")
