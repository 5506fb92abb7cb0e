"""Similarity of subspaces: closed forms, files, which runs are compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlora.comparison import collect, similarity
from tlora.peft_folder import WEIGHTS, Stored, write_tensors

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def rows(seed: int, count: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width))


def write_weights(folder: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """Write A and B, by `A` or `B` and an optional module's number, as a PEFT adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, values in tensors.items():
        module = MODULE.replace("layers.0", f"layers.{name[1:] or 0}")
        stored[f"{module}.lora_{name[0]}.weight"] = Stored.of(values, dtype)
    write_tensors(folder / WEIGHTS, stored)


def run_of(
    folder: Path,
    trained: dict[str, np.ndarray] | None,
    exported: dict[str, np.ndarray] | None = None,
    seed: int = 1,
    initialised: bool = False,
) -> collect.Run:
    """Return a run with these weights, read from its files."""
    cell = {"model": "m", "task": "t", "method": "x", "seed": seed, "spec_id": "s", "scores": {}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps({"train_seconds": 1.0}))
    cell["train"] = str(folder / "train.json")
    if trained is not None:
        write_weights(folder / "weights", trained)
    if exported is not None:
        write_weights(folder / "export" / "weights", exported)
        (folder / "export" / "export.json").write_text("{}")
        cell["export"] = str(folder / "export" / "export.json")
    if initialised:
        (folder / "adapter_init.json").write_text(json.dumps({"seconds": 2.0}))
        cell["costs"] = [str(folder / "adapter_init.json")]
    return collect.load_run(cell, [])


# ---------------------------------------------------------------- closed forms


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_equal_spaces_are_1_whatever_their_basis(count: int, seed: int) -> None:
    values = rows(seed, count, 9)
    mixed = rows(seed + 1, count, count) @ values
    one, other = similarity.basis(values), similarity.basis(mixed)
    assert one @ one.T == pytest.approx(np.eye(count), abs=1e-6)
    assert similarity.similarity(one, other) == pytest.approx(1.0, abs=1e-5)


def test_orthogonal_spaces_are_0_and_contained_ones_1() -> None:
    space = np.linalg.qr(rows(0, 8, 8))[0]
    first, rest = similarity.basis(space[:3]), similarity.basis(space[3:])
    assert similarity.similarity(first, rest) == pytest.approx(0.0, abs=1e-12)
    assert similarity.similarity(first, similarity.basis(space[:5])) == pytest.approx(1.0)


def test_angles_are_squared_cosines() -> None:
    angles = np.array([0.3, 1.1])
    one = np.eye(4)[:2]
    other = np.stack([[np.cos(a), 0, np.sin(a), 0] for a in angles])
    other[1] = [0, np.cos(1.1), 0, np.sin(1.1)]
    found = similarity.similarity(similarity.basis(one), similarity.basis(7 * other))
    assert found == pytest.approx(np.mean(np.cos(angles) ** 2))


def test_dependent_rows_count_once_and_zeros_span_nothing() -> None:
    values = rows(1, 2, 6)
    assert similarity.basis(np.concatenate([values, values[:1] * 2])).shape == (2, 6)
    nothing = similarity.basis(np.zeros((3, 6)))
    assert nothing.shape == (0, 6)
    assert similarity.similarity(nothing, similarity.basis(values)) is None


def test_random_spaces_are_alike_by_chance(tmp_path: Path) -> None:
    one = run_of(tmp_path / "1", {"A": rows(1, 8, 400), "B": rows(2, 300, 8)})
    other = run_of(tmp_path / "2", {"A": rows(3, 16, 400), "B": rows(4, 300, 16)}, seed=2)
    two = similarity.adapter(one), similarity.adapter(other)
    assert similarity.chance(*two, "A") == pytest.approx(16 / 400)
    assert similarity.chance(*two, "B") == pytest.approx(16 / 300)
    (found,) = similarity.by_module(*two, "A").values()
    assert found == pytest.approx(16 / 400, abs=0.02)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_values_are_read_from_any_dtype(tmp_path: Path, dtype: str) -> None:
    values = np.round(rows(5, 2, 6))
    values[:, 0] += 9
    run = run_of(tmp_path, {"A": values})
    write_weights(tmp_path / "weights", {"A": values, "B": values.T}, dtype)
    found = similarity.adapter(run).basis(MODULE, "A")
    assert similarity.similarity(found, similarity.basis(values)) == pytest.approx(1.0)


def test_output_space_is_what_training_made_of_b(tmp_path: Path) -> None:
    """Of an exported adapter [B, -B0] [A; A0], where B began at B0."""
    a, b0, change = rows(1, 2, 6), rows(2, 5, 2), rows(3, 5, 2)
    exported = {"A": np.concatenate([a, a]), "B": np.concatenate([b0 + change, -b0], axis=1)}
    run = run_of(tmp_path / "1", {"A": a, "B": b0 + change}, exported, initialised=True)
    found = similarity.adapter(run).basis(MODULE, "B")
    assert similarity.similarity(found, similarity.basis(change.T)) == pytest.approx(1, abs=1e-5)
    plain = run_of(tmp_path / "2", {"A": a, "B": change}, {"A": a, "B": change}, initialised=True)
    found = similarity.adapter(plain).basis(MODULE, "B")
    assert similarity.similarity(found, similarity.basis(change.T)) == pytest.approx(1, abs=1e-5)


def test_without_b0_outputs_are_not_compared(tmp_path: Path) -> None:
    values = {"A": rows(1, 2, 6), "B": rows(2, 5, 2)}
    unknown = similarity.adapter(run_of(tmp_path / "1", values, initialised=True))
    zero = similarity.adapter(run_of(tmp_path / "2", values))
    assert unknown.modules("A") == zero.modules("A") == zero.modules("B") == [MODULE]
    assert unknown.modules("B") == []


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 30, b"\x02\0\0\0\0\0\0\0[]", "short"])
def test_broken_or_missing_weights_are_no_adapter(tmp_path: Path, content) -> None:
    run = run_of(tmp_path, {"A": rows(1, 2, 6)} if content == "short" else None)
    path = tmp_path / "weights" / WEIGHTS
    if content == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    assert similarity.adapter(run) is None


def test_adapters_without_common_modules_or_of_other_widths(tmp_path: Path) -> None:
    one = run_of(tmp_path / "1", {"A": rows(1, 2, 6)})
    moved = run_of(tmp_path / "2", {"A1": rows(1, 2, 6)})
    wider = run_of(tmp_path / "3", {"A": rows(1, 2, 7)})
    adapters = [similarity.adapter(run) for run in (one, moved, wider)]
    assert similarity.by_module(adapters[0], adapters[1], "A") == {}
    assert similarity.by_module(adapters[0], adapters[2], "A") == {}
    assert similarity.mean({}) is None


def test_many_modules_are_sampled_evenly(tmp_path: Path) -> None:
    run = run_of(tmp_path, {f"A{index}": rows(index, 2, 6) for index in range(10, 20)})
    two = similarity.adapter(run), similarity.adapter(run)
    found = [int(name.split(".")[2]) for name in similarity.by_module(*two, "A", 3)]
    assert found == [11, 15, 18]
    assert len(similarity.by_module(*two, "A")) == 10


# ---------------------------------------------------------------- who is compared


def test_different_seeds_are_compared_where_there_are(tmp_path: Path) -> None:
    same = rows(0, 2, 40)
    ones = [
        similarity.adapter(run_of(tmp_path / f"a{seed}", {"A": rows(seed, 2, 40)}, seed=seed))
        for seed in (1, 2)
    ]
    others = [
        similarity.adapter(run_of(tmp_path / f"b{seed}", {"A": rows(seed, 2, 40)}, seed=seed))
        for seed in (1, 2)
    ]
    alone = [similarity.adapter(run_of(tmp_path / "c", {"A": same}, seed=1))]
    assert [a.seed for a in similarity.pair(ones, others, False)] == [1, 2]
    assert [a.seed for a in similarity.pair(alone, others[:1], False)] == [1, 1]
    assert similarity.pair(alone, alone, True) is None
    table = similarity.matrix([ones, others, alone], "A")
    assert table[0][0] == pytest.approx(table[0][1], abs=1e-12) and table[0][0] < 0.3
    assert table[2][2] is None
    assert table[0][2] == table[2][0] is not None
