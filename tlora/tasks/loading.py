"""Reading records: local JSON, JSON lines, gzip and parquet files, and hub datasets."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
SPLITS = ("train", "validation", "test")

Kinds = Mapping[str, type]
Columns = Sequence[str] | Kinds | Callable[[Sequence[str]], "Sequence[str] | Kinds"]
"""The columns of a row: names of text columns, or names with the type that each holds (str, int,
float, bool, list, dict), or a function from the names there are to either."""

HubSplit = tuple[str, str | None, str, str | None]
"""A split of a hub dataset: repository, configuration, split, commit."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def check_split(split: str, where: str, known: Sequence[str] = SPLITS) -> None:
    """Refuse a split that a source does not have.

    Raises
    ------
    UserError
        Naming `where`, the split and those there are.
    """
    if split not in known:
        raise UserError(f"{where}: split: {split!r}: expected one of {', '.join(known)}")


def check_sizes(validation: int, samples: int | None = None) -> None:
    """Refuse options that count records and are too small; `samples` None stands for all.

    Raises
    ------
    ValueError
        Naming the option; the configuration's schema adds file and key.
    """
    if validation < 0:
        raise ValueError("validation: expected 0 or more")
    if samples is not None and samples < 1:
        raise ValueError("samples: expected 1 or more")


def check_revision(revision: str | None) -> None:
    """Refuse a revision that is no commit: a branch or a tag can move.

    Raises
    ------
    ValueError
        The configuration's schema adds file and key.
    """
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise ValueError("revision: expected the 40 hex digits of a commit")


def check_pinned(repo: str, revision: str | None) -> str:
    """Return the commit that a hub dataset is read at.

    Raises
    ------
    UserError
        For no revision, a branch or a tag.
    """
    if revision is None or not _COMMIT.fullmatch(revision):
        raise UserError(
            f"{repo}: revision: {revision!r}: pin the commit: expected its 40 hex digits "
            "as `revision` in `data`, or local files in data_root"
        )
    return revision


def find_file(folder: Path, *stems: str) -> Path:
    """Return the data file in `folder` with one of these names, whatever its format.

    Parameters
    ----------
    folder
        Where it lies.
    stems
        Names without suffix, the preferred one first. Case matters only between files that differ
        in nothing else.

    Raises
    ------
    UserError
        When the folder or the file is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected it to hold {stems[0]}.jsonl")
    present = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    lowered = {name.lower(): path for name, path in present.items()}
    names = [stem + suffix for stem in stems for suffix in SUFFIXES]
    for name in names:
        if name in present:
            return present[name]
    for name in names:
        if name.lower() in lowered:
            return lowered[name.lower()]
    raise UserError(
        f"{folder}: no {' or '.join(stems)} file: "
        f"expected {stems[0]} with one of {', '.join(SUFFIXES)}"
    )


def locate(data_root: Path | None, folder: str, *stems: str) -> Path | None:
    """Return the file of `find_file` in a folder of `data_root`; None where it has no such folder.

    What `data_root` does not hold is read of the hub, so that it may hold some sources only; in a
    folder that is there, everything is expected.
    """
    if data_root is None or not (Path(data_root) / folder).is_dir():
        return None
    return find_file(Path(data_root) / folder, *stems)


def local_sources(path: Path | None, hub: Sequence[HubSplit]) -> dict[str, Path]:
    """Return a local file by its name; nothing where the hub is read, at a commit.

    Raises
    ------
    UserError
        When there is neither a local file nor a commit.
    """
    if path is not None:
        return {path.name: path}
    for repo, _, _, revision in hub:
        check_pinned(repo, revision)
    return {}


def fetch(
    path: Path | None, hub: Sequence[HubSplit], columns: Columns
) -> tuple[str, list[dict[str, Any]]]:
    """Return what names the data in an error, and the rows: of a local file, else of the hub.

    Parameters
    ----------
    path
        The local file, None to read the hub.
    hub
        Read one after the other.
    columns
        As for `read_rows`.
    """
    if path is not None:
        return str(path), read_rows(path, columns)
    rows = [row for one in hub for row in hub_rows(*one, columns)]
    repo, name, split, _ = hub[0]
    return (f"{repo} ({split})" if len(hub) > 1 else f"{repo} ({name or 'default'}, {split})"), rows


def read_rows(path: Path, columns: Columns) -> list[dict[str, Any]]:
    """Read a file of records and keep `columns`.

    Parameters
    ----------
    path
        .json (a list of objects, or one object a line), .jsonl, either with .gz, or .parquet.
    columns
        The columns each row must have, and what they hold.

    Raises
    ------
    UserError
        For a missing file, a suffix that is not known, a broken line (with its number), a row
        that lacks a column or holds something else there (with its line, or its number from 1 in a
        list and in parquet), or no row at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown format: expected one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        return check_rows(_parquet_rows(path, columns), columns, str(path))
    rows, lines = _json_rows(path)
    return _checked(
        rows,
        columns,
        str(path),
        lambda at: f"{path}:{lines[at]}" if lines else f"{path}: row {at + 1}",
    )


def hub_rows(
    repo: str, name: str | None, split: str, revision: str | None, columns: Columns
) -> list[dict[str, Any]]:
    """Read columns of a split of a Hugging Face hub dataset at a fixed revision.

    Raises
    ------
    UserError
        When the hub cannot be reached or the dataset, split or a column does not exist.
    """
    rows = hub_split(repo, name, split, revision)
    wanted = _names(columns, rows.column_names)
    present = [column for column in rows.column_names if column in wanted]
    where = f"{repo} ({name}, {split}, {revision})"
    return check_rows(rows.select_columns(present), columns, where)


def hub_split(repo: str, name: str | None, split: str, revision: str | None) -> Dataset:
    """Return a split of a Hugging Face hub dataset at a fixed revision.

    The snapshot of that commit is in the cache afterwards, and offline only this very commit will
    do: `load_dataset` by the repository's name would take whatever was cached last.

    Raises
    ------
    UserError
        When the hub cannot be reached or the dataset or split does not exist.
    """
    import datasets

    _bars_on_terminals_only(datasets)
    folder = snapshot("dataset", repo, check_pinned(repo, revision))
    try:
        return datasets.load_dataset(str(folder), name, split=split)
    except Exception as error:
        raise UserError(
            f"{repo} ({name}, {split}, {revision}): not loaded: {_first_line(error)}; "
            "expected a dataset of JSON or parquet files with this configuration and split"
        ) from error


def snapshot(kind: str, repo: str, revision: str, ignored: Sequence[str] = ()) -> Path:
    """Return the folder with the files of a hub repository at a commit, fetched where need be.

    Nothing is asked of the hub for a snapshot that is complete in the cache.

    Parameters
    ----------
    kind
        "model" or "dataset".
    repo, revision
        The repository and the commit.
    ignored
        Patterns of files to do without.

    Raises
    ------
    UserError
        When a file is neither in the cache nor to be had.
    """
    import huggingface_hub
    from huggingface_hub import constants, utils

    _bars_on_terminals_only(utils)
    try:
        folder = huggingface_hub.snapshot_download(
            repo, repo_type=kind, revision=revision, ignore_patterns=list(ignored)
        )
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            reason = "not in the cache, and HF_HUB_OFFLINE is set: run `tlora download` without it"
        else:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            reason = f"not loaded from the Hugging Face hub: {said}"
        further = "; or set data_root to a folder of local files" if kind == "dataset" else ""
        raise UserError(f"{repo}: {kind} at {revision}: {reason}{further}") from error
    return Path(folder)


def check_rows(
    rows: Iterable[dict[str, Any]], columns: Columns, where: str
) -> list[dict[str, Any]]:
    """Keep `columns` of every row; a row without one of them, or with another type, is an error.

    Raises
    ------
    UserError
        Naming `where`, the row (from 1), the column and what was found.
    """
    return _checked(rows, columns, where, lambda at: f"{where}: row {at + 1}")


def subset(
    rows: Sequence[dict[str, Any]], samples: int | None, seed: int | None, where: str
) -> list[tuple[int, dict[str, Any]]]:
    """Return some rows with their index, in the original order: training shuffles by its own seed.

    Parameters
    ----------
    rows
        All rows.
    samples
        How many to keep, None for all.
    seed
        None keeps the first ones; a number draws them without replacement.
    where
        Names the data in an error.

    Raises
    ------
    UserError
        For more samples than rows.
    """
    if samples is not None and samples > len(rows):
        raise UserError(f"{where}: samples: {samples}: expected at most the {len(rows)} rows")
    if samples is None or seed is None:
        return list(enumerate(rows[:samples]))
    return [(i, rows[i]) for i in sorted(random.Random(seed).sample(range(len(rows)), samples))]


def carve(
    rows: Sequence[dict[str, Any]],
    count: int,
    key: str | Callable[[dict[str, Any]], str],
    split: str,
    where: str,
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
        The column that tells equal rows, or a function of the row.
    split
        "train" or "validation".
    where
        Names the data in an error.

    Returns
    -------
    list of (int, dict)
        The split's rows with their index among all rows, in the original order.

    Raises
    ------
    UserError
        For another split, or when no training row would be left.
    """
    check_split(split, where, ("train", "validation"))
    if not 0 <= count < len(rows):
        raise UserError(
            f"{where}: validation: {count}: expected 0 to {len(rows) - 1}, "
            f"fewer than the {len(rows)} training rows"
        )
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(key(row) if callable(key) else row[key], []).append(index)
    order = list(groups.values())
    random.Random(0).shuffle(order)
    carved: set[int] = set()
    for group in order:
        if len(carved) + len(group) <= count:
            carved.update(group)
    return [(i, row) for i, row in enumerate(rows) if (i in carved) == (split == "validation")]


def known_rows(total: int, data: Any, split: str) -> int:
    """Return how many records a split has of `total` published ones, for estimates.

    Train and validation together are `data.samples` of them, where the source has that option.
    """
    kept = min(getattr(data, "samples", None) or total, total)
    return data.validation if split == "validation" else kept - data.validation


def training_rows(
    rows: Sequence[dict[str, Any]],
    samples: int | None,
    seed: int | None,
    validation: int,
    key: str | Callable[[dict[str, Any]], str],
    split: str,
    where: str,
) -> list[tuple[int, dict[str, Any]]]:
    """Return "train" or "validation" of a subset, each row with its index among all rows.

    Both are carved from the `samples` rows of `subset`: together they are as many.
    """
    kept = subset(rows, samples, seed, where)
    carved = carve([row for _, row in kept], validation, key, split, where)
    return [(kept[at][0], row) for at, row in carved]


def _names(columns: Columns, present: Sequence[str]) -> Kinds:
    """Return the wanted columns with their types."""
    wanted = columns(present) if callable(columns) else columns
    return wanted if isinstance(wanted, Mapping) else dict.fromkeys(wanted, str)


def _checked(
    rows: Iterable[Any], columns: Columns, where: str, place: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Do what `check_rows` does; `place` names a row by its index."""
    kept: list[dict[str, Any]] = []
    kinds: Kinds | None = None
    for at, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{place(at)}: {_short(row)}: expected an object")
        if kinds is None:
            kinds = _names(columns, list(row))
        for column, kind in kinds.items():
            if column not in row:
                raise UserError(
                    f"{place(at)}: column {column!r} is missing: "
                    f"expected {', '.join(kinds)}; found {', '.join(map(str, row))}"
                )
            value = row[column]
            # True is an int to Python, not to a person.
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise UserError(
                    f"{place(at)}: {column}: {_short(value)}: "
                    f"expected {_NAMES.get(kind, kind.__name__)}"
                )
        kept.append({column: row[column] for column in kinds})
    if not kept:
        raise UserError(f"{where}: no rows: expected at least one")
    return kept


def _json_rows(path: Path) -> tuple[list[Any], list[int]]:
    """Parse a JSON list, or one JSON value a line; blank lines are passed over.

    Returns
    -------
    rows, lines
        The values and, where each stands on a line of its own, the numbers of the lines.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from error
    if ".jsonl" not in path.name and text.lstrip().startswith("["):
        try:
            return json.loads(text), []
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from error
            lines.append(number)
    return rows, lines


def _parquet_rows(path: Path, columns: Columns) -> list[dict[str, Any]]:
    """Read the wanted columns of a parquet file; the rest is not loaded."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        wanted = _names(columns, names)
        missing = [column for column in wanted if column not in names]
        if missing:
            raise UserError(
                f"{path}: column {missing[0]!r} is missing: "
                f"expected {', '.join(wanted)}; found {', '.join(names)}"
            )
        return pyarrow.parquet.read_table(path, columns=list(wanted)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {_first_line(error)}") from error


def _bars_on_terminals_only(library: ModuleType) -> None:
    if not sys.stderr.isatty():
        library.disable_progress_bars()


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _short(value: Any) -> str:
    """Show a value in one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
