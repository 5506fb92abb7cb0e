"""Exported adapters in the form that serving engines take."""

from __future__ import annotations

from pathlib import Path

from tlora.artefact import check_files, read_json, staged
from tlora.errors import UserError
from tlora.peft_folder import CONFIG, fold_scaling, read_config

# The ranks that vLLM allocates for (vllm/config/lora.py, MaxLoRARanks).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def for_vllm(folder: Path, out: Path) -> int:
    """Write an exported adapter with all scaling in B, which PEFT and vLLM read alike.

    Parameters
    ----------
    folder
        An export artefact (results/export/.../ID), its weights/, or any saved LoRA adapter on an
        unmodified base model.
    out
        Gets the adapter; may not be there yet.

    Returns
    -------
    int
        The `max_lora_rank` that vLLM needs.

    Raises
    ------
    UserError
        A merged model, an adapter that is not on the unmodified base model, one that cannot be
        folded, a rank that vLLM does not take, or `out` in use.
    """
    if (folder / "export.json").is_file():
        check_files(folder / "weights", read_json(folder / "export.json")["files"])
        folder = folder / "weights"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected an exported adapter")
    for made in (folder, folder.parent):
        for card in ("train.json", "adapter_init.json"):
            # Its base weights may have lost a residual that only the export gives back.
            if (made / card).is_file():
                raise UserError(f"{folder}: not exported yet: expected results/export/.../ID")
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: is a merged model already: serve {folder}")
    if out.exists():
        raise UserError(f"{out}: is there already: expected a new folder")
    with staged(out) as temporary:
        fold_scaling(folder, temporary)
        rank = read_config(temporary)["r"]
        if rank > VLLM_RANKS[-1]:
            raise UserError(
                f"{folder / CONFIG}: rank: {rank}: expected at most {VLLM_RANKS[-1]}, vLLM's "
                "largest: merge the adapter into its base model"
            )
    return next(allowed for allowed in VLLM_RANKS if rank <= allowed)
