"""CITATION.cff against the keys and types of its format, version 1.2.0."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

# of the schema's keys those that are in use; what is new must be looked up there
TOP = {"cff-version", "message", "type", "title", "version", "license", "authors", "keywords"}
TOP |= {"references"}
REFERENCE = {"type", "title", "authors", "collection-title", "year", "start", "end", "url"}
REFERENCE |= {"repository-code", "identifiers"}
PERSON, ENTITY = {"family-names", "given-names"}, {"name"}


def read(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))


def check_authors(authors: list[dict[str, str]]) -> None:
    assert authors
    for author in authors:
        assert author.keys() in (PERSON, ENTITY)
        assert all(isinstance(value, str) and value for value in author.values())


def test_the_software_is_described_as_the_project_is(root: Path) -> None:
    found = read(root)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert found.keys() == TOP
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["version"] == project["version"] and found["license"] == project["license"]
    assert isinstance(found["message"], str) and isinstance(found["title"], str)
    assert all(isinstance(word, str) for word in found["keywords"])
    assert set(found["keywords"]) <= set(project["keywords"])
    check_authors(found["authors"])


def test_the_paper_is_a_reference(root: Path) -> None:
    (paper,) = read(root)["references"]
    assert paper.keys() == REFERENCE
    assert paper["type"] == "conference-paper"
    assert paper["title"].startswith("TLoRA: Task-aware Low Rank Adaptation")
    check_authors(paper["authors"])
    assert all(isinstance(paper[key], int) for key in ("year", "start", "end"))
    assert all(re.match("https://.+", paper[key]) for key in ("url", "repository-code"))
    assert "2604.18124" in paper["url"]
    for identifier in paper["identifiers"]:
        assert identifier.keys() == {"type", "value", "description"}
        assert identifier["type"] == "other"
