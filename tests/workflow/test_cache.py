"""Snakemake's cache between checkouts: what was calibrated once is not calibrated again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from workflow.project import Project, labels

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

CACHED = ["allocate", "calibrate", "initialize"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the checkouts share."""
    return tmp_path_factory.mktemp("cache")


def initialized(project: Project, cache: Path) -> dict[str, bytes]:
    """Build TLoRA's start in a checkout with the cache; return the artefact's files."""
    project.environment["SNAKEMAKE_OUTPUT_CACHE"] = str(cache)
    (job,) = (one for one in project.dry() if one.label == "initialize tiny/arithmetic/tlora")
    out = job.arguments[job.arguments.index("--out") + 1]
    project.record()
    project.snakemake(f"{out}/adapter_init.json")
    return {path.name: path.read_bytes() for path in sorted(project.path(out).glob("[!.]*"))}


def verbs(project: Project) -> list[str]:
    """Return the stages that were really computed."""
    return sorted(call["arguments"][0] for call in project.calls())


@pytest.fixture(scope="module")
def first(sources: Project, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The first checkout, and what it made with the cache switched on."""
    project = sources.copy(tmp_path_factory.mktemp("first") / "checkout")
    yield project, initialized(project, cache)


def test_first_checkout_computes_and_stores(first: tuple[Project, dict], cache: Path) -> None:
    """All four stages run; the cache holds calibration, allocation and initialisation."""
    project, files = first
    assert verbs(project) == sorted(["prepare", *CACHED])
    assert set(files) == {"adapter_init.json", "adapter_config.json", "adapter_model.safetensors"}
    stored = [path for path in cache.iterdir() if path.is_file()]
    assert len(stored) == 2 + 1 + 3, [path.name for path in stored]


def test_second_checkout_computes_none_of_them_again(
    first: tuple[Project, dict], fresh: Project, cache: Path
) -> None:
    """Only the data, which is not cached, is prepared; the rest comes from the cache, and stays."""
    files = initialized(fresh, cache)
    assert verbs(fresh) == ["prepare"]
    assert files == first[1]
    made = {
        "prepare tiny/arithmetic",
        "calibrate tiny/arithmetic/sensitivity",
        "allocate tiny/arithmetic/tlora",
        "initialize tiny/arithmetic/tlora",
    }
    assert made.isdisjoint(labels(fresh.dry())), "what came from the cache is made again"


def test_changed_source_misses(first: tuple[Project, dict], fresh: Project, cache: Path) -> None:
    """The package's files are inputs, so another subspace.py is another entry of the cache."""
    fresh.append("tlora/subspace.py", "# changed\n")
    initialized(fresh, cache)
    assert "initialize" in verbs(fresh)


def test_without_a_cache_folder_nothing_is_cached(checkout: Project) -> None:
    """The default: results are plain files, and no run complains about a missing cache."""
    output = checkout.snakemake("--dry-run")
    assert "SNAKEMAKE_OUTPUT_CACHE" not in output
    assert not [path for path in checkout.path("results").rglob("*") if path.is_symlink()]
