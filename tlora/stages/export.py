"""The trained weights in the form that others load: a plain adapter, or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tlora import methods
from tlora.artefact import check_files, read_json, sha256_tree, staged, write_json


def export(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write weights/ and export.json.

    Raises
    ------
    UserError
        Trained weights that are not what train.json vouches for.
    """
    method = methods.load(spec["implementation"])
    card = read_json(inputs["train"])
    if "failed" in card:
        with staged(out / "weights") as temporary:
            temporary.mkdir(parents=True)
        write_json(out / "export.json", {"failed": card["failed"], "form": None, "files": {}})
        return
    trained = inputs["train"].parent / "weights"
    check_files(trained, card["files"])
    initial = inputs["initialize"].parent if "initialize" in inputs else None
    with staged(out / "weights") as temporary:
        options = method.options(spec["options"])
        if method.merges(options):
            form = _merge(trained, temporary, place)
        else:
            form = method.export(trained, initial, temporary, options)
    write_json(out / "export.json", {"form": form, "files": sha256_tree(out / "weights")})


def _merge(trained: Path, out: Path, place: dict[str, Any]) -> str:
    """Write the base model with the trained adapter merged into its weights."""
    from peft import PeftModel

    from tlora.base_model import load_model

    model = PeftModel.from_pretrained(load_model(place["base"], place), str(trained))
    model.merge_and_unload(safe_merge=True).save_pretrained(out, safe_serialization=True)
    return "model"
