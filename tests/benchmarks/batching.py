"""Micro batches of like length beside the reference recipe's: random ones of 8, padded.

    python tests/benchmarks/batching.py [--batch 8 32 128] [--small]

A Llama with random weights and a tlora adapter is trained twice, on samples whose lengths are like
MetaMathQA's (log-normal, mean 250 tokens, deviation 0.55 of the logarithm, cut at 512): once with
every global batch cut as `tlora.stages.train` cuts it, once in micro batches of 8 as they come.
Both see the same samples in every optimizer step and divide by the same number of targets. The
steps of both are timed in turn; tokens are the samples' own, the ratio is the median of pairs. On
the CPU it is one thread's processor time, so that other work on the machine does not count. A
second row has the largest difference of the loss, relative, over all steps.
"""

from __future__ import annotations

import random
import time
from statistics import median
from typing import Any

import measuring

MICRO = 8
MEAN, DEVIATION, SHORTEST, LONGEST = 250, 0.55, 40, 512
VOCABULARY = 512


def make_samples(count: int) -> list[dict[str, list[int]]]:
    """Return samples of drawn lengths; a third of each is its prompt. Their words repeat."""
    generator = random.Random(0)
    samples = []
    for _ in range(count):
        length = generator.lognormvariate(0, DEVIATION) * MEAN / 2.718281828 ** (DEVIATION**2 / 2)
        length = min(max(round(length), SHORTEST), LONGEST)
        start, stride = generator.randrange(VOCABULARY), generator.choice((1, 3, 7))
        ids = [(start + stride * at) % VOCABULARY for at in range(length)]
        prompt = length // 3
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return samples


def clock() -> float:
    """Return seconds of the wall where a GPU works, else of this process on a processor."""
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


class Run:
    """A model in training."""

    def __init__(self, hidden: int, layers: int, rank: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from tlora import allocate, build_adapter
        from tlora.modules import find_targets

        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden * 43 // 16 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 64),
            use_cache=False,
        )
        model = LlamaForCausalLM(config).to(self.device)
        shapes = {n: tuple(m.weight.shape) for n, m in find_targets(model, "all-linear").items()}
        allocation = allocate(dict.fromkeys(shapes, 1.0), rank, rank, shapes)
        subspaces = {
            name: torch.linalg.qr(torch.randn(shapes[name][1], module.rank)).Q.T
            for name, module in allocation.items()
        }
        self.model = build_adapter(model, allocation, subspaces).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, parts: list[list[dict[str, Any]]]) -> None:
        """Do one optimizer step on these micro batches."""
        import torch

        from tlora.tasks.tokenised import collate

        start = clock()
        targets = sum(label != -100 for part in parts for s in part for label in s["labels"][1:])
        total = torch.zeros((), device=self.device)
        for part in parts:
            batch = {name: value.to(self.device) for name, value in collate(part, 0).items()}
            loss = self.model(**batch, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total.item())
        self.seconds.append(clock() - start)


def padded(parts: list[list[dict[str, Any]]]) -> int:
    """Return the tokens that go through the model."""
    return sum(len(part) * max(len(s["input_ids"]) for s in part) for part in parts)


def compare(batch_size: int, steps: int, hidden: int, layers: int) -> None:
    """Train both ways and print."""
    import torch

    from tlora.stages.train import cut

    samples = make_samples(batch_size * steps)
    batches = [samples[at : at + batch_size] for at in range(0, len(samples), batch_size)]
    micro = min(MICRO, batch_size)
    torch.set_num_threads(1)
    passes, parts = cut(batches, {"micro_batch": micro})
    ours, theirs = (Run(hidden, layers, rank=hidden // 8) for _ in range(2))
    sizes = []
    for number, batch in enumerate(batches):
        mine = parts[number * passes : (number + 1) * passes]
        random_ones = [batch[at : at + micro] for at in range(0, batch_size, micro)]
        ours.step(mine)
        theirs.step(random_ones)
        tokens = sum(len(sample["input_ids"]) for sample in batch)
        sizes.append((tokens, padded(mine), padded(random_ones)))
    # The first step allocates and warms up.
    rates = [
        median(tokens / seconds for (tokens, *_), seconds in zip(sizes[1:], s[1:], strict=True))
        for s in (ours.seconds, theirs.seconds)
    ]
    ratio = median(b / a for a, b in zip(ours.seconds[1:], theirs.seconds[1:], strict=True))
    tokens, mine, random_ones = (sum(column) for column in zip(*sizes, strict=True))
    what = f"batches: global batch {batch_size}, width {hidden}, {layers} layers"
    measuring.row(
        f"{what}: tokens/s ({passes} micro batches, {mine / tokens:.2f} padded tokens a token; "
        f"theirs {batch_size // micro}, {random_ones / tokens:.2f}; fewer: "
        f"{random_ones / mine:.2f}x)",
        rates[0],
        rates[1],
        ratio,
    )
    apart = max(abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True))
    measuring.row(
        f"{what}: loss of {steps} steps, first to last; the largest relative difference",
        f"{ours.losses[0]:.4f} to {ours.losses[-1]:.4f}",
        f"{theirs.losses[0]:.4f} to {theirs.losses[-1]:.4f}",
        f"{apart:.1e} apart",
    )


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--samples", type=int, default=640, help="in all; at most 24 steps")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    if options.small:
        options.batch, options.hidden, options.layers, options.samples = [8], 64, 1, 24
    measuring.header()
    for batch_size in options.batch:
        steps = max(3, min(24, options.samples // batch_size))
        compare(batch_size, steps, options.hidden, options.layers)


if __name__ == "__main__":
    main()
