"""Fetching from a hub on this machine, then reading what was fetched with the hub gone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import serving

from tlora.errors import UserError
from tlora.stages.download import fetch
from tlora.tasks import code_feedback, evol_instruct, glue, gsm8k, hendrycks_math, metamath

OLD, NEW, NEVER = "a" * 40, "b" * 40, "c" * 40
README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
---
"""
ROWS = {
    OLD: [{"question": "old", "answer": "#### 1"}],
    NEW: [{"question": "new", "answer": "#### 2"}, {"question": "q", "answer": "#### 3"}],
}
# The library reads its environment when it is imported: so each side is a process of its own.
PROGRAM = """
import json, sys
from pathlib import Path
from tlora.errors import UserError
from tlora.stages.download import download
from tlora.tasks import gsm8k
results = {}
for name, items in json.loads(sys.argv[1]).items():
    out = Path(sys.argv[2]) / name
    try:
        download({"items": items}, {}, out, {})
        results[name] = (out / "download.json").read_text()
    except UserError as error:
        results[name] = str(error)
        assert not (out / "download.json").exists()
if sys.argv[3] == "offline":
    from tlora.base_model import load_model, load_tokenizer
    for revision in ("a" * 40, "b" * 40, "c" * 40):
        try:
            data = gsm8k.Data(repo="o/data", revision=revision)
            results[revision] = gsm8k.load(data, "train", None)
        except UserError as error:
            results[revision] = str(error)
    place = {"model": "o/model", "revision": "a" * 40}
    results["vocabulary"] = len(load_tokenizer(place))
    identity = {"dtype": "float32", "architecture": "causal"}
    results["parameters"] = load_model(identity, place).num_parameters()
print(json.dumps(results))
"""


def item(kind: str, repo: str, revision: str | None, **other: Any) -> dict[str, Any]:
    """Return an item for `fetch`."""
    further = {"name": "main", "split": "train"} if kind == "dataset" else {}
    return {"kind": kind, "repo": repo, "revision": revision, **further, **other}


A_TXT = hashlib.sha256(b"a file").hexdigest()
ASKED = {
    "old": [item("dataset", "o/data", OLD)],
    "both": [item("dataset", "o/data", OLD), item("dataset", "o/data", NEW)] * 2,
    "json": [item("dataset", "o/lines", OLD, name=None)],
    "split": [item("dataset", "o/data", OLD, split="test")],
    "model": [item("model", "o/model", OLD)],
    "pickled": [item("model", "o/pickled", OLD)],
    "nowhere": [item("model", "o/nowhere", OLD)],
    "file": [{"kind": "web", "url": "HUB/o/model/resolve/" + OLD + "/a.txt", "sha256": A_TXT}],
    "nothing": [],
}


def parquet(rows: list[dict]) -> bytes:
    """Return rows as the bytes of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def run(cwd: Path, home: Path, out: Path, mode: str, asked: dict, **environment: str) -> dict:
    """Run the program; return what it found."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked), str(out), mode],
        cwd=cwd,
        env={**kept, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr and "%|" not in done.stderr, "a bar without a terminal"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def seen(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is found with the hub, without it, and what was asked of it."""
    tiny = root / "workflow" / "resources" / "tiny"
    model = {path.name: path.read_bytes() for path in tiny.iterdir()}
    repositories = {
        **{
            ("dataset", "o/data", revision): {
                "README.md": README.encode(),
                "main/train-00000-of-00001.parquet": parquet(rows),
            }
            for revision, rows in ROWS.items()
        },
        ("dataset", "o/lines", OLD): {"train.jsonl": b'{"q": "x"}\n{"q": "y"}\n'},
        ("model", "o/model", OLD): {
            **{**model, "model.bin": b"1", "tf_model.h5": b"2"},
            "a.txt": b"a file",
        },
        ("model", "o/pickled", OLD): {"config.json": b"{}", "model.bin": b"1", "x.h5": b"2"},
    }
    work = tmp_path_factory.mktemp("hub")
    home = work / "home"
    with serving(repositories) as (address, asked):
        wanted = json.loads(json.dumps(ASKED).replace("HUB", address))
        found = run(root, home, work / "on", "online", wanted, HF_ENDPOINT=address)
    wanted["missing"] = [item("dataset", "o/data", NEVER)]
    gone = run(root, home, work / "off", "offline", wanted, HF_HUB_OFFLINE="1")
    return {"on": found, "off": gone, "asked": asked}


@pytest.mark.slow
def test_what_was_fetched_is_written(seen: dict[str, Any]) -> None:
    found = seen["on"]
    [entry] = json.loads(found["old"])["items"]
    assert entry["rows"] == 1 and entry["files"] == 2 and len(entry["sha256"]) == 64
    both = json.loads(found["both"])["items"]
    assert [(one["revision"], one["rows"]) for one in both] == [(OLD, 1), (NEW, 2)]
    assert both[0]["sha256"] != both[1]["sha256"] and both[0] == entry
    assert json.loads(found["json"])["items"][0]["rows"] == 2
    assert json.loads(found["file"])["items"][0]["bytes"] == 6
    assert json.loads(found["nothing"]) == {"items": []}


@pytest.mark.slow
def test_only_weights_that_are_loaded_are_fetched(seen: dict[str, Any]) -> None:
    got = {line for line in seen["asked"] if line.startswith("GET")}
    names = {line.rpartition("/")[2] for line in got if "o/model/resolve" in line}
    assert {"model.safetensors", "tokenizer.json"} <= names
    assert not names & {"model.bin", "tf_model.h5"}
    pickled = {line.rpartition("/")[2] for line in got if "o/pickled/resolve" in line}
    assert pickled == {"config.json", "model.bin"}


@pytest.mark.slow
def test_the_same_is_found_without_the_hub(seen: dict[str, Any]) -> None:
    """The record depends on nothing but the items, so that no later job is run again for it."""
    for name in ("old", "both", "json", "model", "pickled", "file", "nothing"):
        assert seen["on"][name] == seen["off"][name]
    assert seen["off"]["parameters"] == 935_040 and seen["off"]["vocabulary"] == 1024


@pytest.mark.slow
def test_a_source_reads_its_commit_and_no_other(seen: dict[str, Any]) -> None:
    for revision, rows in ROWS.items():
        asked = [record["instruction"] for record in seen["off"][revision]]
        assert asked == [row["question"] for row in rows]
    assert NEVER in seen["off"][NEVER] and "run `tlora download` without" in seen["off"][NEVER]


@pytest.mark.slow
def test_what_cannot_be_had_is_one_line(seen: dict[str, Any]) -> None:
    for side, name, message in (
        ("on", "nowhere", "o/nowhere: model at aaaa"),
        ("on", "nowhere", "not loaded from the Hugging Face hub"),
        ("off", "nowhere", "HF_HUB_OFFLINE is set: run `tlora download` without"),
        ("off", "missing", "or set data_root to a folder of local files"),
        ("on", "split", "o/data (main, test, aaaa"),
        ("off", "split", "expected a dataset of JSON or parquet files"),
    ):
        assert message in seen[side][name] and "\n" not in seen[side][name]


def test_items_are_checked_before_anything_is_fetched() -> None:
    with pytest.raises(UserError, match="o/d: kind: 'space': expected one of model, dataset"):
        fetch([item("model", "o/d", OLD), item("space", "o/d", OLD)])
    for revision in (None, "main"):
        with pytest.raises(UserError, match=r"o/d: revision: .*: pin the commit"):
            fetch([item("model", "o/d", OLD), item("dataset", "o/d", revision)])
    assert fetch([]) == []


def test_every_source_names_its_hub_splits() -> None:
    """Repository, configuration, split and a commit: what `download` is given."""
    for module, data in (
        (gsm8k, gsm8k.Data()),
        (hendrycks_math, hendrycks_math.Data()),
        (metamath, metamath.Data()),
        (code_feedback, code_feedback.Data()),
        (evol_instruct, evol_instruct.Data()),
        *((glue, glue.Data(task)) for task in glue.TASKS),
    ):
        for split in ("train", "validation"):
            for repo, name, read, revision in module.hub(data, split):
                assert repo.count("/") == 1 and (name is None or name.isidentifier())
                assert read == "train" and len(revision) == 40
