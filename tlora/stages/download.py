"""Everything that later jobs read of the Hugging Face hub, fetched while it can be reached."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlora.artefact import sha256_file, write_json
from tlora.errors import UserError
from tlora.progress import bar
from tlora.tasks import lm_eval
from tlora.tasks.loading import check_pinned, hub_split, snapshot
from tlora.tasks.web import web_file

logger = logging.getLogger(__name__)

KINDS = ("model", "dataset", "web", "lm_eval")
# What no job reads: weights in other formats than the one that is loaded.
OTHER_WEIGHTS = (
    *("*.msgpack", "*.h5", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.gguf"),
    *("*.pth", "*.pt", "onnx/*", "original/*"),
)
PICKLED_WEIGHTS = ("*.bin",)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write download.json: what `fetch` returns for the spec's `items`.

    Parameters
    ----------
    spec
        `items`: mappings as `fetch` takes them.
    inputs, place
        Nothing of them is read.
    out
        Folder of download.json.

    Raises
    ------
    UserError
        What cannot be had, in one line.
    """
    write_json(out / "download.json", {"items": fetch(spec["items"])})


def fetch(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put hub repositories into the local cache, each at its commit.

    What is complete in the cache is not asked for again, so this also works offline then.

    Parameters
    ----------
    items
        Each with `kind` ("model" or "dataset"), `repo` and `revision` (a commit); a dataset also
        with `name` (its configuration or None) and `split`, which is then read once, so that a
        split that cannot be read is known before any job starts. Of kind "web" with `url` and
        `sha256`. Of kind "lm_eval" with `data`, the options of that source, whose library fetches
        what its task needs. Equal items count once.

    Returns
    -------
    list of dict
        The items, with `files` (how many), `bytes` and `sha256` (over the names and checksums of
        all files), a dataset's with `rows`; "web" with `bytes`; of lm_eval what its `fetch`
        returns. It depends on nothing but the items.

    Raises
    ------
    UserError
        For an item of another kind or without a commit, and for what cannot be had.
    """
    wanted = [dict(one) for one in {json.dumps(one, sort_keys=True): one for one in items}.values()]
    for item in wanted:
        if item["kind"] not in KINDS:
            found = f"kind: {item['kind']!r}: expected one of {', '.join(KINDS)}"
            raise UserError(f"download: {item.get('repo')}: {found}")
        if item["kind"] in ("model", "dataset"):
            check_pinned(item["repo"], item["revision"])
    contents: dict[tuple[str, str, str], dict[str, Any]] = {}
    for item in bar(wanted, desc="download", unit="item"):
        kind = item["kind"]
        if kind == "lm_eval":
            item |= lm_eval.fetch(lm_eval.Data(**item["data"]))
            continue
        if kind == "web":
            item["bytes"] = web_file(item["url"], item["sha256"]).stat().st_size
            continue
        at = (kind, item["repo"], item["revision"])
        if at not in contents:
            logger.info("fetching %s %s at %s", *at)
            contents[at] = _model(*at) if kind == "model" else _contents(snapshot(*at))
        item |= contents[at]
        if kind == "dataset":
            repo, revision = item["repo"], item["revision"]
            item["rows"] = len(hub_split(repo, item.get("name"), item["split"], revision))
    return wanted


def _model(kind: str, repo: str, revision: str) -> dict[str, Any]:
    """Fetch a model; pickled weights only where there are no others."""
    ignored = (*OTHER_WEIGHTS, *PICKLED_WEIGHTS)
    folder = snapshot(kind, repo, revision, ignored)
    if not any(folder.rglob("*.safetensors")):
        ignored = OTHER_WEIGHTS
        folder = snapshot(kind, repo, revision, ignored)
    return _contents(folder, ignored)


def _contents(folder: Path, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """Return how many files a folder holds, how large they are, and what tells them apart."""
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kept = list(filter_repo_objects(names, ignore_patterns=list(ignored)))
    digest = hashlib.sha256("".join(f"{n}\0{_sha256(folder / n)}\n" for n in kept).encode())
    return {
        "files": len(kept),
        "bytes": sum((folder / name).stat().st_size for name in kept),
        "sha256": digest.hexdigest(),
    }


def _sha256(path: Path) -> str:
    """Return a file's checksum; the cache names large files by it."""
    name = path.resolve().name
    return name if _SHA256.fullmatch(name) else sha256_file(path)
