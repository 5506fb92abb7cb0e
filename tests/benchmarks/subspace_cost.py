"""Seconds, numbers kept and captured energy of the sketch beside the exact subspaces.

    python tests/benchmarks/subspace_cost.py MODEL_FOLDER TEXT_FILE [--rank 8 --samples 32 ...]

MODEL_FOLDER is a causal model on disk; every line of TEXT_FILE is a calibration sample. The energy
is ||W C A^T||^2 over that of the exact A; the least over all modules is printed.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora import input_subspaces
from tlora.modules import find_targets, weight_matrix
from tlora.subspace import covariances, sketch_rows


def main() -> None:
    """Measure and print one row a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.text, encoding="utf-8") as file:
        lines = [line for line in file if line.strip()][: options.samples]
    samples = [{"input_ids": [tokenizer(line)["input_ids"][: options.tokens]]} for line in lines]

    weights = {n: weight_matrix(m) for n, m in find_targets(model, "all-linear").items()}
    ranks = {name: min(options.rank, *weight.shape) for name, weight in weights.items()}
    matrices, alias = covariances(model, samples, "all-linear")

    def energy(name: str, rows: torch.Tensor) -> float:
        product = weights[name].double() @ matrices[alias[name]].double()
        return ((product @ rows.to(product.device).double().T).norm() ** 2).item()

    exact = {}
    print("algorithm  passes   seconds   numbers kept   least energy")
    for algorithm, passes in (("exact", 0), ("sketch", 0), ("sketch", 1), ("sketch", 2)):
        start = time.perf_counter()
        found = input_subspaces(model, samples, ranks, algorithm, passes=passes)
        seconds = time.perf_counter() - start
        kept = sum(matrix.numel() for matrix in matrices.values())
        if algorithm == "exact":
            exact = {name: energy(name, rows) for name, rows in found.items()}
        else:
            shapes = {name: weight.shape for name, weight in weights.items()}
            kept = 2 * sum(sketch_rows(*s, ranks[n]) * s[1] for n, s in shapes.items())
        least = min(energy(name, rows) / exact[name] for name, rows in found.items())
        print(f"{algorithm:9}  {passes:6}  {seconds:8.2f}  {kept:13}  {least:13.7f}")


if __name__ == "__main__":
    main()
