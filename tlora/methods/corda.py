"""CorDA (Yang et al., arXiv 2406.05223): A and B from the singular triplets of W C.

SVD(W C) = U S V^T with the covariance C of the layer's inputs; B0 = U_r sqrt(S_r / s) and
A0 = sqrt(S_r / s) V_r^T C^-1, with the r largest triplets (instruction-previewed mode) or the
smallest (knowledge-preserved mode). Decomposition and adapter are PEFT's own.

The covariance is PEFT's too, the mean over samples of X^T X where every X is divided by its largest
entry, as in the authors' code. The scale matters: it shifts weight between A0 and B0, whose product
does not depend on it. It is calibrated once for both modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tlora.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Context

INITIALIZES = True


@dataclass(frozen=True)
class Options:
    """`mode`: "ipm" trains the largest triplets, "kpm" the smallest."""

    mode: Literal["ipm", "kpm"] = "ipm"


def statistics(options: Options) -> dict[str, dict]:
    """The covariance of normalised inputs, the same for both modes."""
    return {"covariance": {"normalize": True}}


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Decompose layer by layer and put PEFT's CorDA adapter on the model.

    Raises
    ------
    UserError
        A target without covariance.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer
    from safetensors import safe_open

    from tlora.artefact import read_json
    from tlora.modules import find_targets
    from tlora.progress import bar

    rank, path = context.rank, context.statistics["covariance"]
    config = LoraConfig(
        r=rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=options.mode),
    )
    chosen = slice(None, rank) if options.mode == "ipm" else slice(-rank, None)
    alias = read_json(path)["alias"]
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
        stored = set(file.keys())
        targets = find_targets(model, context.target_modules)
        for name, module in bar(targets.items(), desc="decomposition", unit="module"):
            owner = alias.get(name, name)
            if owner not in stored:
                raise UserError(f"{path}: {name}: no covariance of this module")
            device = module.weight.device
            module.covariance_matrix = file.get_tensor(owner).to(device)
            found = collect_eigens_for_layer(module, config)
            del module.covariance_matrix
            # Cropped at once: the whole factors of all layers are twice the model.
            module.eigens = CordaEigens(
                S_WC=found.S_WC[chosen].clone().to(device),
                U_WC=found.U_WC[:, chosen].clone().to(device),
                V_WC=found.V_WC[:, chosen].clone().to(device),
            )
    return get_peft_model(model, config)
