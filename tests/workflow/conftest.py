"""A copy of the project, run once for all tests that need a finished grid."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import copy_checkout
from workflow.project import MINI, PRESET, Job, Project, make_tools


@pytest.fixture(scope="session")
def sources(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with a small preset; nothing has run in it. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("sources") / "checkout"
    copy_checkout(root, folder)
    (folder / MINI).write_text(PRESET, encoding="utf-8")
    return Project(folder, make_tools(folder.with_name("tools")))


@pytest.fixture(scope="session")
def finished(sources: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after one complete run of the small preset. Not to be changed: copy it."""
    project = sources.copy(tmp_path_factory.mktemp("finished") / "checkout")
    project.record()
    project.snakemake()
    return project


def _copied(project: Project, folder: Path) -> Iterator[Project]:
    copied = project.copy(folder / "checkout")
    yield copied
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def fresh(sources: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of the project in which nothing has run, to be changed at will."""
    yield from _copied(sources, tmp_path)


@pytest.fixture
def checkout(finished: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of the finished project, to be changed at will."""
    yield from _copied(finished, tmp_path)


@pytest.fixture(scope="session")
def jobs(finished: Project) -> dict[str, Job]:
    """Every job of the small preset, by its label, with its id, inputs and command."""
    return {job.label: job for job in finished.dry("--forceall")}
