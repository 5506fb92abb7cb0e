"""Splits of generated tasks: disjoint by construction, and checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import Any

Draw = Callable[[random.Random], tuple[Hashable, dict[str, Any]]]


def check_sizes(train: int, validation: int, test: int) -> None:
    """Refuse sizes below zero, and no training or test record at all.

    Raises
    ------
    ValueError
        Naming the size; the configuration's schema adds file and key.
    """
    for name, size, least in (
        ("train", train, 1),
        ("validation", validation, 0),
        ("test", test, 1),
    ):
        if size < least:
            raise ValueError(f"{name}: expected {least} or more")


def splits(draw: Draw, seed: int, sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Draw records with keys that never repeat, and deal them out to the splits in order.

    A split's records depend on the seed and on the sizes of the splits before it only.

    Parameters
    ----------
    draw
        Returns a key and a record. What must not be in two splits must be equal in the key.
    seed
        Of the one generator that all splits are drawn from.
    sizes
        Records of each split, in the order they are dealt.

    Raises
    ------
    ValueError
        When `draw` has too few distinct keys.
    """
    rng = random.Random(seed)
    seen: set[Hashable] = set()
    result: dict[str, list[dict[str, Any]]] = {}
    for split, size in sizes.items():
        records: list[dict[str, Any]] = []
        misses = 0
        while len(records) < size:
            key, record = draw(rng)
            if key in seen:
                misses += 1
                if misses > 50 * size + 1000:
                    raise ValueError(f"{split}: {size}: expected fewer: distinct records ran out")
                continue
            seen.add(key)
            records.append(record)
        result[split] = records
    return result
