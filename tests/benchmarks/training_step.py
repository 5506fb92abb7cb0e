"""One optimizer step of tlora beside PEFT's LoRA: tokens a second, and memory beside the weights.

    python tests/benchmarks/training_step.py [--dtype float32] [--checkpointing] [--small]

Both adapt all linear layers of a Llama with random weights, with the same ranks and scalings, and
train on the same tokens with fused AdamW; ours as `tlora train` does it. Steps of both alternate in
one process; the ratio is the median of pairs. On the CPU it is one thread's processor time, so that
other work on the machine does not count. Memory is of a process each: the peak of three steps
less what it held with model and adapter loaded (a GPU's allocator; else the resident set, with
memory given back as soon as it is free). bfloat16 is mixed precision as PEFT and Trainer do it:
base weights in bfloat16, adapters in float32, autocast. The vocabulary is too small for the chunked
loss; --vocabulary 8000 is to this width what Llama-2's is to its own. The bound counts the adapted
layers' and adapters' multiplications: without A's gradient there are so many times fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measuring

MIB = 1 << 20
SMALL = {"hidden": 64, "layers": 2, "tokens": 32, "samples": 2, "rank": 8, "steps": 2}


def make_model(options: argparse.Namespace) -> Any:
    """Return a Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 43 // 16 // 8 * 8,  # 11008 of 4096
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 128),
        use_cache=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device, getattr(torch, options.dtype))
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def adapted(model: Any, options: argparse.Namespace, freeze: bool) -> Any:
    """Put an adapter on all linear layers: ranks of drawn sensitivities, random orthonormal A."""
    import torch

    from tlora import allocate, build_adapter
    from tlora.modules import find_targets

    shapes = {n: tuple(m.weight.shape) for n, m in find_targets(model, "all-linear").items()}
    generator = random.Random(0)
    sensitivity = {name: generator.lognormvariate(0, 0.5) for name in shapes}
    allocation = allocate(sensitivity, options.rank, options.rank, shapes)
    subspaces = {
        name: torch.linalg.qr(torch.randn(shapes[name][1], module.rank)).Q.T
        for name, module in allocation.items()
        if module.rank
    }
    return build_adapter(model, allocation, subspaces, freeze_a=freeze)


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Run:
    """A model in training: "tlora" as `tlora train` does it, "lora" as PEFT does."""

    def __init__(self, options: argparse.Namespace, adapter: str) -> None:
        import torch

        from tlora.adapter import fused
        from tlora.loss import chunked_loss

        self.model = adapted(make_model(options), options, freeze=adapter == "tlora").train()
        self.device = self.model.device
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.halved = options.dtype == "bfloat16"
        shape = (options.samples, options.tokens)
        self.ids = torch.randint(0, options.vocabulary, shape, device=self.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.context = ExitStack()
        if adapter == "tlora" and not options.stock:
            self.context.enter_context(fused(self.model))
            self.context.enter_context(chunked_loss(self.model))

    def forward(self) -> Any:
        """Return the loss."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.halved):
            return self.model(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> float:
        """Do an optimizer step and return its seconds."""
        import torch

        start = self.clock()
        loss = self.forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock() - start

    def kept(self) -> int:
        """Return the bytes that autograd keeps for the backward pass, weights aside."""
        import torch

        storages = {}
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.forward()
        found = sum(storage.nbytes() for storage in storages.values())
        del loss
        return found


def memory(options: argparse.Namespace) -> dict[str, int]:
    """Return the bytes of a few steps beside the weights, and what they are."""
    import torch

    run = Run(options, options.measure)
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        statm = Path("/proc/self/statm").read_text(encoding="utf-8")
        before = int(statm.split()[1]) * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    with run.context:
        for _ in range(3):
            run.step()
        if cuda:
            peak = torch.cuda.max_memory_allocated()
        else:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        kept = run.kept()
    states = run.optimizer.state.values()
    return {
        "peak": peak - before,
        "kept": kept,
        "gradients": sum(p.nbytes for p in run.trained),
        "optimizer": sum(value.nbytes for state in states for value in state.values()),
    }


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens a second of both, whose steps alternate in this process."""
    import torch

    torch.set_num_threads(1)
    runs = {name: Run(options, name) for name in ("tlora", "lora")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with runs["tlora"].context:
        for _ in range(options.steps + 1):
            for name, run in runs.items():
                seconds[name].append(run.step())
    seconds = {name: found[1:] for name, found in seconds.items()}  # the first allocates
    pairs = zip(seconds["lora"], seconds["tlora"], strict=True)
    linear = sum(
        layer.base_layer.weight.numel()
        for layer in runs["lora"].model.modules()
        if hasattr(layer, "lora_A")
    )
    named = list(runs["lora"].model.named_parameters())
    a, b = (sum(p.numel() for name, p in named if key in name) for key in ("lora_A", "lora_B"))
    theirs = 4 * linear + 6 * (a + b)
    return {
        **{name: runs[name].ids.numel() / statistics.median(seconds[name]) for name in runs},
        "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
        "bound": theirs / (theirs - 2 * a),
        "versions": measuring.machine(),
    }


def main() -> None:
    """Measure ours and theirs in turn, and print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of each sample")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--stock", action="store_true", help="ours by stock code alone")
    parser.add_argument(
        "--measure", choices=["tlora", "lora", "speed"], help="measure this, print JSON"
    )
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    if options.measure:
        found = speed(options) if options.measure == "speed" else memory(options)
        print(json.dumps(found))
        return
    # Memory that is free again must not look used: glibc keeps blocks below this size.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

    def child(what: str, **more: Any) -> dict[str, Any]:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **more)
        return json.loads(done.stdout.splitlines()[-1])

    ours, theirs = (child(what, env=environment) for what in ("tlora", "lora"))
    rates = child("speed")
    what = (
        f"training step: Llama of width {options.hidden}, {options.layers} layers, "
        f"{options.samples} x {options.tokens} tokens, rank {options.rank} on all linear layers, "
        f"{options.dtype}" + (", gradient checkpointing" if options.checkpointing else "")
    )
    measuring.header()
    measuring.row(
        f"{what}: tokens/s (bound by operations: {rates['bound']:.3f}x)",
        rates["tlora"],
        rates["lora"],
        rates["ratio"],
        rates["versions"],
    )
    for key, name in (
        ("peak", "peak memory beside the weights"),
        ("kept", "of it what autograd keeps"),
        ("optimizer", "of it the optimizer's state"),
        ("gradients", "gradients (once autograd's is free)"),
    ):
        one, other = ours[key], theirs[key]
        cells = (f"{one / MIB:.0f} MiB", f"{other / MIB:.0f} MiB", one / other)
        measuring.row(f"{what}: {name}", *cells, rates["versions"])


if __name__ == "__main__":
    main()
