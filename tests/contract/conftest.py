"""One grid of all methods for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.grid import Grid, make_grid


@pytest.fixture(scope="session")
def grid(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The grid in float32."""
    return make_grid(root, tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="session")
def halved(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The grid in bfloat16."""
    return make_grid(root, tmp_path_factory.mktemp("bfloat16"), dtype="bfloat16")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Compute with one thread: a fork has no more, and sums depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
