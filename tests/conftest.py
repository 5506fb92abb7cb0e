"""Fixtures of the whole suite."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("tlora", deadline=None)
settings.load_profile("tlora")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the workflow start first: they share a grid that takes long to make."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/workflow/"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests, whole files go to one, the workflow's all to one."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "workflow" if path.startswith("tests/workflow/") else path

    return Files(config, log)


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
