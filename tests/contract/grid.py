"""A grid of every method on a tiny random model, run stage by stage in this process."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tlora import methods
from tlora.artefact import read_json
from tlora.plan import Cell, Plan, Unit

SMALL = """\
models: [random]
tasks: [arithmetic]
methods: [{methods}]
seeds: [1]
set: {{data.train: 40, data.validation: 8, data.test: 8, batch_size: 4, calibration_samples: 8}}
"""
PRESET = (
    SMALL
    + """\
overrides:
  - set: {{rank: 4, lora_alpha: 4, learning_rate: 1.0e-2}}
  - {{methods: [adalora], set: {{options.interval: 2, lora_alpha: 64}}}}
"""
)


@dataclass
class Trained:
    """What a run left in memory."""

    model: Any
    before: dict[str, Any]
    trainable: set[str]


@dataclass
class Grid:
    """The plan of the grid, and its artefacts below `folder`."""

    folder: Path
    plan: Plan
    trained: dict[str, Trained] = field(default_factory=dict)

    def cell(self, method: str) -> Cell:
        """Return the one run of a method."""
        (cell,) = [cell for cell in self.plan.cells if not cell.base and cell.row.method == method]
        return cell

    def path(self, unit: Unit) -> Path:
        """Return the main file of a unit."""
        return self.folder / unit.main

    def inputs(self, unit: Unit) -> dict[str, Path]:
        """Make what a unit reads."""
        return {name: self.make(other) for name, other in unit.inputs.items()}

    def make(self, unit: Unit, out: Path | None = None) -> Path:
        """Run a unit's stage, unless its artefact is there."""
        target = self.folder / unit.folder if out is None else out
        main = target / unit.main.name
        if not main.is_file():
            target.mkdir(parents=True, exist_ok=True)
            inputs = self.inputs(unit)
            place = unit.placement | {"stamp": unit.id}
            if "work" in place:
                place["work"] = str(target) + ".work"
            stage = importlib.import_module(f"tlora.stages.{unit.stage}")
            getattr(stage, unit.stage)(unit.spec, inputs, target, place)
        return main

    def base(self) -> Any:
        """Load the untrained base model."""
        from tlora.base_model import load_model

        model = self.plan.models["random"][0]
        identity = {"dtype": model.dtype, "architecture": model.architecture}
        return load_model(identity, {"model": model.path})

    def fresh(self, method: str) -> Any:
        """Return the model as training starts with it."""
        from transformers import set_seed

        from tlora.stages import train

        unit = self.cell(method).units["train"]
        module = methods.load(unit.spec["implementation"])
        options = module.options(unit.spec["options"])
        set_seed(unit.spec["seed"])
        model = train._adapted(module, options, self.base(), unit.spec, self.inputs(unit))
        module.trainer(model, options, {**unit.spec, "steps": 10})
        return model

    def train(self, method: str) -> Trained:
        """Train a method once, and keep the model that was trained."""
        from tlora.stages import train

        if method in self.trained:
            return self.trained[method]
        seen: dict[str, Any] = {}
        adapted, start = train._adapted, train.Log.start

        def noting_model(*arguments: Any) -> Any:
            seen["model"] = adapted(*arguments)
            return seen["model"]

        def noting_start(*arguments: Any) -> None:
            parameters = dict(seen["model"].named_parameters())
            seen["trainable"] = {n for n, p in parameters.items() if p.requires_grad}
            seen["before"] = {n: p.detach().clone() for n, p in parameters.items()}
            start(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "_adapted", noting_model)
            patch.setattr(train.Log, "start", noting_start)
            self.make(self.cell(method).units["train"])
        seen["model"].eval()
        self.trained[method] = Trained(seen["model"], seen["before"], seen["trainable"])
        return self.trained[method]

    def interrupted(self, method: str, steps: tuple[int, ...], out: Path) -> Path:
        """Train a method into `out`, killed by SIGKILL while it writes the log of each of `steps`.

        A fork of this process trains: it need not load everything again.
        """
        unit = self.cell(method).units["train"]
        self.inputs(unit)
        for step in steps:
            child = os.fork()
            if child == 0:
                self._train_until(unit, out, step)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        main = self.make(unit, out)
        assert read_json(main)["attempts"] == len(steps) + 1
        return main

    def _train_until(self, unit: Unit, out: Path, last: int) -> None:
        """Train in a child process, and kill it at a step; never returns."""
        from tlora.stages import train

        row = train.Log.row

        def stop(log: Any, at: int, values: dict) -> Any:
            if at == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return row(log, at, values)

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train.Log, "row", stop)
                self.make(unit, out)
        finally:
            os._exit(1)

    def logits(self, model: Any, count: int = 4) -> list[Any]:
        """Return the logits of some training samples, each (tokens, vocabulary)."""
        import torch

        with torch.no_grad():
            model.eval()
            # Without labels: PEFT's AdaLoRA cannot compute a loss outside training.
            return [
                model(input_ids=sample["input_ids"]).logits[0] for sample in self.samples(count)
            ]

    def loss(self, model: Any) -> float:
        """Return the mean loss over training samples, from the logits: AdaLoRA's adds its term."""
        import torch

        losses = [
            torch.nn.functional.cross_entropy(logits[:-1], sample["labels"][0, 1:])
            for logits, sample in zip(self.logits(model, 32), self.samples(32), strict=True)
        ]
        return float(torch.stack(losses).mean())

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Return training samples as batches of one."""
        from tlora.tasks import tokenised

        unit = self.plan.of("prepare")[0]
        path = self.make(unit).parent / "train.parquet"
        return list(tokenised.calibration_batches(path, count, 3, 0, "cpu"))


def _random_model(family: str) -> Any:
    """Return a small random model of the Llama or the T5 family, with logits far from uniform."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    tokens = {"vocab_size": 1024, "pad_token_id": 0, "eos_token_id": 2}
    if family == "t5":
        config = T5Config(
            **tokens,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
        return T5ForConditionalGeneration(config)
    config = LlamaConfig(
        **tokens,
        bos_token_id=1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def every_method(root: Path) -> list[str]:
    """Return the names of the project's methods, ablations with them."""
    return sorted(path.stem for path in (root / "config/methods").glob("*.yaml"))


def make_grid(
    root: Path,
    folder: Path,
    preset: str = PRESET,
    micro_batch: int = 2,
    dtype: str = "float32",
    family: str = "llama",
    methods: Sequence[str] | None = None,
) -> Grid:
    """Write a configuration tree, and plan a preset with the methods: without them, with all."""
    import shutil

    from transformers import AutoTokenizer

    model = folder / "model"
    AutoTokenizer.from_pretrained(root / "workflow/resources/tiny").save_pretrained(model)
    _random_model(family).save_pretrained(model)
    for kind in ("tasks", "methods", "benchmarks"):
        shutil.copytree(root / "config" / kind, folder / "config" / kind)
    (folder / "config/models").mkdir()
    (folder / "config/models/random.yaml").write_text(
        f"path: {model}\nmicro_batch: {micro_batch}\ndtype: {dtype}\n"
        f"architecture: {'seq2seq' if family == 't5' else 'causal'}\n"
    )
    names = every_method(root) if methods is None else methods
    path = folder / "config/contract.yaml"
    path.write_text(preset.format(methods=", ".join(names)))
    return Grid(folder, Plan([path]))
