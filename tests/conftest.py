"""Fixtures of the whole suite."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, whole files go to one of them.

    Those of the workflow stay together: they share a grid that takes long to make, so they start
    first.
    """

    def group(item: pytest.Item) -> str:
        parts = item.path.relative_to(ROOT).parts
        return parts[1] if parts[1] == "workflow" else "/".join(parts)

    items.sort(key=lambda item: group(item) != "workflow")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's top level."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference data beside the checkout; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"{SHARED} is absent: it holds real benchmark files and golden results")
    return SHARED
