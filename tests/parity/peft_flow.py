"""PEFT's documented flow for each method in a plain training loop; nothing of this project."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import AutoModelForCausalLM, get_scheduler, set_seed


def padded(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return a batch, padded on the right."""
    width = max(len(sample["input_ids"]) for sample in samples)

    def rows(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([s[key] + [fill] * (width - len(s[key])) for s in samples])

    mask = [[1] * len(s["input_ids"]) + [0] * (width - len(s["input_ids"])) for s in samples]
    return {
        "input_ids": rows("input_ids", 0),
        "attention_mask": torch.tensor(mask),
        "labels": rows("labels", -100),
    }


def adapted(job: dict[str, Any]) -> Any:
    """Return the model with its adapter, as PEFT's documentation makes it."""
    set_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    shared = {
        "r": job["rank"],
        "lora_alpha": job["alpha"],
        "target_modules": job["targets"],
        "task_type": "CAUSAL_LM",
    }
    calibration = [padded([sample]) for sample in job["calibration"]]
    method = job["method"]
    if method == "adalora":
        del shared["r"]
        config = AdaLoraConfig(
            init_r=job["rank"],
            target_r=3,
            tinit=3,
            tfinal=10,
            deltaT=2,
            orth_reg_weight=0.1,
            total_step=len(job["batches"]),
            **shared,
        )
    elif method in ("corda", "corda_kpm"):
        mode = "kpm" if method == "corda_kpm" else "ipm"
        config = LoraConfig(
            init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode), **shared
        )

        def run_model() -> None:
            for batch in calibration:
                model(**batch)

        preprocess_corda(model, config, run_model=run_model)
    elif method == "lora_ga":
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **shared)

        def train_step() -> None:
            for batch in calibration:
                model(**batch).loss.backward()

        preprocess_loraga(model, config, train_step)
    else:
        special = {
            "rslora": {"use_rslora": True},
            "dora": {"use_dora": True},
            "pissa": {"init_lora_weights": "pissa"},
            "olora": {"init_lora_weights": "olora"},
            "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        }
        config = LoraConfig(**special.get(method, {}), **shared)
    model = get_peft_model(model, config)
    if method == "eva":
        chunks = [job["calibration"][i : i + 16] for i in range(0, len(job["calibration"]), 16)]
        batches = [padded(chunk) for chunk in chunks]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def losses(model: Any, job: dict[str, Any]) -> list[float]:
    """Train and return the loss of every step."""
    rate = job["learning_rate"]
    if job["method"] == "lora_plus":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16.0
        )
    elif job["method"] == "lora_fa":
        optimizer = create_lorafa_optimizer(model, job["rank"], job["alpha"], lr=rate)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    steps = len(job["batches"])
    scheduler = get_scheduler("cosine", optimizer, job["warmup"], steps)
    model.train()
    found = []
    for step, samples in enumerate(job["batches"]):
        loss = model(**padded(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if job["method"] == "adalora":
            model.base_model.update_and_allocate(step)
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
