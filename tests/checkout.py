"""Copies of the project in which its workflow can run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ENTRIES = (
    *("Snakefile", "README.md", "config", "envs", "local", "profiles", "slurm", "tlora"),
    "workflow",
)


def copy_checkout(root: Path, folder: Path) -> None:
    """Copy what a run of the workflow reads into a folder, which may be new."""
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.partial")
    for name in ENTRIES:
        source = root / name
        if source.is_symlink():
            os.symlink(os.readlink(source), folder / name)
        elif source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, folder / name)
