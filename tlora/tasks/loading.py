"""Reading records: local JSON, JSON lines, gzip and parquet files, and hub datasets."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tlora.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def find_file(folder: Path, stem: str) -> Path:
    """Return the one data file called `stem` in `folder`, whatever its format.

    Raises
    ------
    UserError
        When the folder or the file is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected it to hold {stem}.jsonl")
    for suffix in SUFFIXES:
        path = folder / (stem + suffix)
        if path.is_file():
            return path
    raise UserError(f"{folder}: no {stem} file: expected {stem} with one of {', '.join(SUFFIXES)}")


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read a file of records and keep `columns`, which hold text.

    Parameters
    ----------
    path
        .json (a list of objects, or one object a line), .jsonl, either with .gz, or .parquet.
    columns
        The columns each row must have.

    Raises
    ------
    UserError
        For a missing file, a suffix that is not known, a broken line (with its number), a row
        that lacks a column or holds no text there (with its number, from 1), or no row at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown format: expected one of {', '.join(SUFFIXES)}")
    rows = _parquet_rows(path, columns) if path.suffix == ".parquet" else _json_rows(path)
    return check_rows(rows, columns, str(path))


def hub_rows(
    repo: str, name: str | None, split: str, revision: str, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Read a split of a Hugging Face hub dataset at a fixed revision.

    Raises
    ------
    UserError
        When the hub cannot be reached or the dataset, split or a column does not exist.
    """
    import datasets

    where = f"{repo} ({name}, {split}, {revision})"
    try:
        rows = datasets.load_dataset(repo, name, split=split, revision=revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"{where}: not loaded from the Hugging Face hub: {reason[0]}; "
            "expected a reachable dataset, or a folder of local files in data_root"
        ) from error
    return check_rows(rows, columns, where)


def check_rows(
    rows: Iterable[dict[str, Any]], columns: Sequence[str], where: str
) -> list[dict[str, Any]]:
    """Keep `columns` of every row; a row without one of them, or without text in it, is an error.

    Raises
    ------
    UserError
        Naming `where`, the row (from 1), the column and what was found.
    """
    kept = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{where}: row {number}: {_short(row)}: expected an object")
        for column in columns:
            if column not in row:
                raise UserError(
                    f"{where}: row {number}: column {column!r} is missing: "
                    f"expected {', '.join(columns)}; found {', '.join(map(str, row))}"
                )
            if not isinstance(row[column], str):
                raise UserError(
                    f"{where}: row {number}: {column}: {_short(row[column])}: expected text"
                )
        kept.append({column: row[column] for column in columns})
    if not kept:
        raise UserError(f"{where}: no rows: expected at least one")
    return kept


def carve(
    rows: Sequence[dict[str, Any]], count: int, key: str, split: str, where: str
) -> list[tuple[int, dict[str, Any]]]:
    """Carve a validation split of `count` rows from training rows, always the same ones.

    Rows with equal text in `key` go to the same side, so no validation text is trained on.

    Parameters
    ----------
    rows
        All training rows.
    count
        Rows of the validation split; a group of equal rows that does not fit is passed over.
    key
        The column that tells equal rows.
    split
        "train" or "validation".
    where
        Names the data in an error.

    Returns
    -------
    list of (int, dict)
        The split's rows with their index among all rows, in the original order.
    """
    if not 0 <= count < len(rows):
        raise UserError(
            f"{where}: validation: {count}: expected 0 to {len(rows) - 1}, "
            f"fewer than the {len(rows)} training rows"
        )
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row[key], []).append(index)
    order = list(groups.values())
    random.Random(0).shuffle(order)
    carved: set[int] = set()
    for group in order:
        if len(carved) + len(group) <= count:
            carved.update(group)
    return [(i, row) for i, row in enumerate(rows) if (i in carved) == (split == "validation")]


def _json_rows(path: Path) -> list[Any]:
    """Parse a JSON list, or one JSON value a line; blank lines are passed over."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from error
    if ".jsonl" not in path.name and text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from error
    return rows


def _parquet_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read the wanted columns of a parquet file; the rest is not loaded."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        missing = [column for column in columns if column not in names]
        if missing:
            raise UserError(
                f"{path}: column {missing[0]!r} is missing: "
                f"expected {', '.join(columns)}; found {', '.join(names)}"
            )
        return pyarrow.parquet.read_table(path, columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error


def _short(value: Any) -> str:
    """Show a value in one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
