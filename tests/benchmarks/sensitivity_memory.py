"""Peak memory of `tlora.sensitivity` beside a backward pass that keeps all weight gradients.

    python tests/benchmarks/sensitivity_memory.py [--hidden 512 --layers 8 ...]

Counts the bytes of all live tensors: on a GPU by torch's own statistics, elsewhere by watching
every storage that an operation returns. The model itself is subtracted. Prints both peaks, the
largest weight gradient and the ratio; with --check, exits with 1 where the ratio is above it.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from tlora import sensitivity
from tlora.modules import find_targets


class Watch(TorchDispatchMode):
    """Keeps the sum of bytes of the storages alive that operations returned, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[], object], model: torch.nn.Module) -> int:
    """Return the peak of bytes in tensors that `run` makes beside the model."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    watch = Watch()
    watch.known = {p.untyped_storage()._cdata for p in model.parameters()}
    with watch:
        run()
    return watch.peak


def naive(model: LlamaForCausalLM, samples: list[dict]) -> None:
    """Run backward as usual: every parameter's gradient is there at the end."""
    targets = find_targets(model, "all-linear").values()
    for sample in samples:
        model.zero_grad(set_to_none=True)
        model(**{k: v.to(model.device) for k, v in sample.items()}).loss.backward()
        for module in targets:
            (module.weight.detach() * module.weight.grad).abs().mean().item()
    model.zero_grad(set_to_none=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--check", type=float, default=None, help="largest ratio allowed")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device, getattr(torch, options.dtype)).eval()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1024, (options.samples, options.tokens))
    samples = [{"input_ids": row[None], "labels": row[None]} for row in ids]

    ours = peak_bytes(lambda: sensitivity(model, samples, "all-linear"), model)
    theirs = peak_bytes(lambda: naive(model, samples), model)
    weights = [m.weight for m in find_targets(model, "all-linear").values()]
    mib = 1 << 20
    print(f"model                  {sum(p.nbytes for p in model.parameters()) / mib:9.1f} MiB")
    print(f"all weight gradients   {sum(w.nbytes for w in weights) / mib:9.1f} MiB")
    print(f"largest one            {max(w.nbytes for w in weights) / mib:9.1f} MiB")
    print(f"peak, tlora            {ours / mib:9.1f} MiB beside the model")
    print(f"peak, naive backward   {theirs / mib:9.1f} MiB beside the model")
    print(f"ratio                  {ours / theirs:9.3f}")
    if options.check is not None and ours / theirs > options.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
