"""How alike the subspaces are that adapters read from and write to.

The similarity of two subspaces is the mean squared cosine of their principal angles,

    ||Q1^T Q2||_F^2 / min(dim 1, dim 2)        with orthonormal bases Q1, Q2,

1 where one contains the other and 0 where they are orthogonal (Hu et al. 2021, LoRA, section 7.2).
Two random subspaces of n dimensions have max(dim 1, dim 2) / n on average: the chance level.

The *input subspace* of a module is spanned by the rows of A, the *output subspace* by the columns
of what training made of B, B - B0. Both are taken from trained weights, in which a frozen A is as
it was initialised. Where B0 is not 0 the exported adapter is [B, -B0] [A; A0], which tells it.
Methods that draw A at random draw the same for equal seeds, so runs of different seeds are compared
wherever there are.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tlora.comparison.collect import Row, Run
from tlora.peft_folder import WEIGHTS, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDES = {"A": "input", "B": "output"}

MODULES = 56
"""At most so many modules are compared, evenly spread over the model."""

READABLE = ("F64", "F32", "BF16", "F16")

TOLERANCE = 1e-10
"""Directions whose share of the largest squared singular value is less are rounding."""


def basis(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return an orthonormal basis of the space that the rows span.

    Parameters
    ----------
    matrix
        (rows, n), fewer rows than n as a rule.

    Returns
    -------
    ndarray
        (dimension, n) float64; no row for a matrix of zeros.
    """
    wide = np.asarray(matrix, dtype=np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    kept = values > TOLERANCE * max(values.max(initial=0.0), np.finfo(np.float64).tiny)
    return (vectors[:, kept] / np.sqrt(values[kept])).T @ wide


def similarity(one: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    """Return the mean squared cosine of the principal angles of two bases; None for an empty one.

    >>> float(similarity(np.eye(4)[:2], np.eye(4)[1:3]))
    0.5
    """
    least = min(len(one), len(other))
    return float(((one @ other.T) ** 2).sum()) / least if least else None


class Entry(NamedTuple):
    """A matrix in a safetensors file: its dtype, shape, first byte and the one after its last."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Adapter:
    """The trained adapter of one run, read module by module.

    Attributes
    ----------
    trained, exported
        Weights files.
    entries, exported_entries
        Dtype, shape and place in the file by module and side; none for what is no adapter.
    outputs
        Whether B0 is known.
    """

    seed: int | None
    trained: Path
    exported: Path
    entries: dict[tuple[str, str], Entry]
    exported_entries: dict[tuple[str, str], Entry]
    outputs: bool

    def modules(self, side: str) -> list[str]:
        """Return the modules that have this side."""
        usable = side == "A" or self.outputs
        return [name for name, which in self.entries if which == side] if usable else []

    def basis(self, module: str, side: str) -> NDArray[np.float64]:
        """Return the basis of the input (A) or output (B) subspace of a module."""
        values = _numbers(self.trained, self.entries[module, side]).astype(np.float64)
        if side == "A":
            return basis(values)
        entry, rank = self.exported_entries.get((module, side)), values.shape[1]
        if entry is not None and entry.shape == (len(values), 2 * rank):
            # the second half is -B0
            values += _numbers(self.exported, entry)[:, rank:]
        return basis(values.T)


def adapter(run: Run) -> Adapter | None:
    """Return a run's trained adapter; None where the run failed or has none (any more)."""
    if run.train_path is None or not run.training or "" in run.failures:
        return None
    trained = run.train_path.parent / "weights" / WEIGHTS
    entries = _entries(trained)
    if not entries:
        return None
    exported = (run.export_path or run.train_path).parent / "weights" / WEIGHTS
    exported_entries = _entries(exported) if run.export_path else {}
    # nothing but jobs of initialization makes a B0
    known = bool(exported_entries) or not run.initialization_seconds
    return Adapter(run.seed, trained, exported, entries, exported_entries, known)


def _entries(path: Path) -> dict[tuple[str, str], Entry]:
    """Return where the matrices of a safetensors file lie; {} where there is none to read."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            stem = name.removesuffix(".weight")
            side = stem[-1:]
            if name == "__metadata__" or not stem.endswith((".lora_A", ".lora_B")):
                continue
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            whole = end <= size and entry["dtype"] in READABLE
            if whole and len(entry["shape"]) == 2 and 0 not in entry["shape"]:
                place = stem[: -len(".lora_A")], side
                found[place] = Entry(entry["dtype"], tuple(entry["shape"]), start, end)
        return found
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError):
        # weights are large and may have been deleted to save room: then there is no picture
        return {}


def _numbers(path: Path, entry: Entry) -> NDArray[np.floating]:
    with open(path, "rb") as file:
        file.seek(entry.start)
        return Stored(entry.dtype, entry.shape, file.read(entry.end - entry.start)).numbers()


# ---------------------------------------------------------------- rows, tasks


def adapters(row: Row) -> list[Adapter]:
    """Return the adapters of a row's runs, as far as there."""
    return [found for run in row.runs if (found := adapter(run)) is not None]


def pair(
    ones: Sequence[Adapter], others: Sequence[Adapter], equal: bool
) -> tuple[Adapter, Adapter] | None:
    """Return two adapters to compare, of different seeds where there are.

    `equal`: both are of one row, whose only run is not compared with itself.
    """
    pairs = [(one, other) for one in ones for other in others]
    different = [(one, other) for one, other in pairs if one.seed != other.seed]
    return next(iter(different or ([] if equal else pairs)), None)


def by_module(
    one: Adapter, other: Adapter, side: str, limit: int | None = None
) -> dict[str, float]:
    """Return the similarity of two adapters by module, of those that both have.

    Parameters
    ----------
    one, other
        Of the same base model.
    side
        "A" for the input subspaces, "B" for the output subspaces.
    limit
        At most so many modules, evenly spread; None: all.
    """
    have = set(other.modules(side))
    shared = _spread([name for name in one.modules(side) if name in have], limit)
    found = {}
    for name in shared:
        first, second = one.basis(name, side), other.basis(name, side)
        if first.shape[1] == second.shape[1]:
            value = similarity(first, second)
            if value is not None:
                found[name.removeprefix("base_model.model.")] = value
    return found


def _spread(names: Sequence[str], limit: int | None) -> list[str]:
    if limit is None or len(names) <= limit:
        return list(names)
    # the middle of every one of `limit` equal parts
    return [names[(2 * index + 1) * len(names) // (2 * limit)] for index in range(limit)]


def chance(one: Adapter, other: Adapter, side: str) -> float | None:
    """Return the mean similarity of random subspaces of the same dimensions."""
    axis = 1 if side == "A" else 0
    shares = [
        max(one.entries[name, side].shape[1 - axis], other.entries[name, side].shape[1 - axis])
        / one.entries[name, side].shape[axis]
        for name in one.modules(side)
        if (name, side) in other.entries
    ]
    return math.fsum(shares) / len(shares) if shares else None


def mean(values: Mapping[str, float] | Iterable[float]) -> float | None:
    """Return the mean over modules; None for none."""
    numbers = list(values.values() if isinstance(values, Mapping) else values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def matrix(rows: Sequence[Sequence[Adapter]], side: str) -> list[list[float | None]]:
    """Return the mean similarity of every two rows; the diagonal: of two seeds of one row.

    Parameters
    ----------
    rows
        The adapters of every row.
    side
        "A" or "B".
    """
    found: list[list[float | None]] = [[None] * len(rows) for _ in rows]
    for i, j in _places(len(rows)):
        two = pair(rows[i], rows[j], i == j)
        if two is not None:
            found[i][j] = found[j][i] = mean(by_module(*two, side, MODULES))
    return found


def _places(count: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(count) for j in range(i + 1))
