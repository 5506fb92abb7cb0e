"""Time and memory of TLoRA's initialisation beside the paper's own way and beside PEFT's methods.

    python tests/benchmarks/initialization.py                     4 layers of width 2048, 32 x 64
    python tests/benchmarks/initialization.py --tokens 512 --layers 1
    python tests/benchmarks/initialization.py --layer-7b          one decoder layer of Llama-2-7B
    python tests/benchmarks/initialization.py --peft              CorDA, EVA and LoRA-GA of PEFT
    python tests/benchmarks/initialization.py --profile           where the time goes, and the floor
    python tests/benchmarks/initialization.py --disk              bytes of artefacts, from shapes
    python tests/benchmarks/initialization.py --7b                the whole 7B shape in bf16, CUDA

"Theirs" is, where nothing else is said, the paper's way: a float32 covariance for every module by
forward hooks, then torch.linalg.svd(W C). "covariance + SVD" is without the forward passes: the
inputs of the layers are recorded once and replayed to both. Of SVDs, one a shape is timed and
multiplied by the number of modules of that shape. The total holds the sensitivity's passes and all
forward passes: theirs as in Algorithm 1, where sensitivity and covariance share them, and with a
plain backward pass, after which mean |W * grad| is read module by module.

Models are Llama's architecture with random weights (normal, SD 0.02). Such a model with random
tokens has inputs of an almost flat spectrum, which no trained model has. So embeddings are low-rank
plus noise: the covariance's eigenvalues fall as j^-1.5, with noise of 1 % beside, and tokens follow
Zipf's law. Both stand for the kind of inputs that trained models have; no model was measured. The
energy ||W C A^T||^2 over the exact one's is printed for these and for plain embeddings with uniform
tokens, the worst case. The rank is the paper's share of the width, 128 of 4096.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import measuring

RATIO = 11008 / 4096
LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(options: argparse.Namespace, structured: bool = True):
    """Return a random Llama in evaluation mode and its samples, by `options.seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=round(RATIO * options.width),
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 128),
        max_position_embeddings=max(512, options.tokens),
    )
    with torch.device(options.device):
        torch.set_default_dtype(getattr(torch, options.dtype))
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(options.seed)
    words = torch.ones(options.vocabulary)
    if structured:
        words = 1 / torch.arange(1, options.vocabulary + 1)
        falling = torch.arange(1, options.width + 1) ** -0.75
        rotation = torch.linalg.qr(torch.randn(options.width, options.width, generator=generator)).Q
        drawn = torch.randn(options.vocabulary, options.width, generator=generator)
        embedding = (drawn * falling) @ rotation
        embedding /= embedding.pow(2).mean().sqrt()
        embedding += 0.01 * torch.randn(embedding.shape, generator=generator)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(embedding)
    shape = (options.samples, options.tokens)
    drawn = torch.multinomial(words, math.prod(shape), replacement=True, generator=generator)
    ids = drawn.reshape(shape)
    return model, [{"input_ids": row[None], "labels": row[None]} for row in ids]


def targets(model) -> dict:
    """Return the target layers by name."""
    from tlora.modules import find_targets

    return find_targets(model, "all-linear")


def record(model, samples: list[dict], names: list[str]):
    """Return a model that hands the layers the inputs they get from `model`, and its samples.

    It computes nothing itself, so that a run through it costs what the hooks cost.
    """
    import torch

    rows: list[dict] = []

    class Replay(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            for name, inputs in rows[int(input_ids[0, 0])].items():
                self.get_submodule(name)(inputs)

    replay = Replay()
    replay.config = model.config
    layers = {name: layer for name, layer in targets(model).items() if name in names}
    for name, layer in layers.items():
        at = replay
        *path, last = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        copy = torch.nn.Linear(1, 1, device="meta")
        copy.weight, copy.bias = layer.weight, None
        copy.forward = lambda inputs: None
        at.add_module(last, copy)

    def keep(name):
        return lambda module, arguments: rows[-1].__setitem__(name, arguments[0])

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for sample in samples:
            rows.append({})
            model.model(sample["input_ids"].to(model.device))
    for handle in handles:
        handle.remove()
    return replay, [{"input_ids": torch.tensor([[index]])} for index in range(len(rows))]


def full_covariances(model, samples: list[dict], layers: dict) -> dict:
    """Return the mean of X^T X for every module, one matrix each, by forward hooks."""
    import torch

    found = {}

    def hook(name):
        def receive(module, arguments, output):
            rows = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            if name not in found:
                found[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            found[name].addmm_(rows.T, rows, alpha=1 / len(samples))

        return receive

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for sample in samples:
            model(sample["input_ids"].to(next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return found


def full_svd(weight, covariance, rank: int):
    """Return the top right singular vectors of W C by a full decomposition."""
    import torch

    product = weight.float() @ covariance
    return torch.linalg.svd(product, full_matrices=False).Vh[:rank]


def energies(layers: dict, covariances: dict, found: list[dict], exact: dict) -> list[float]:
    """Return each one's ||W C A^T||^2 over the largest possible, the least of all modules.

    The largest is that of `exact` where it holds a module of this rank, else what a block iteration
    on W C comes to that starts from the found rows and random ones.
    """
    import torch

    from tlora.subspace import _orthonormal_rows

    least = [math.inf] * len(found)
    for name, layer in layers.items():
        product = layer.weight.detach().float() @ covariances[name].to(layer.weight.device)
        product /= product.abs().max()
        sides = [one[name].to(product) for one in found if name in one]
        if not sides:
            continue
        block = max(sides, key=len)
        block = torch.cat([block, torch.randn(64, block.shape[1]).to(block)])
        for _ in range(3):
            block = _orthonormal_rows((block @ product.T) @ product)
        image = (block @ product.T).double()
        values = torch.linalg.eigvalsh(image @ image.T)
        for index, one in enumerate(found):
            if name not in one:
                continue
            best = values[-len(one[name]) :].sum()
            if name in exact and len(exact[name]) == len(one[name]):
                best = torch.maximum(best, (exact[name] @ product.T).double().pow(2).sum())
            captured = (one[name].to(product) @ product.T).double().pow(2).sum()
            least[index] = min(least[index], (captured / best).item())
    return least


def rate(device: str, dtype: str) -> float:
    """Return the FLOP/s of a matrix product, the best of five."""
    import torch

    a = torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def operations(layers: dict, options: argparse.Namespace, further: bool) -> dict[str, float]:
    """Return the FLOPs that are needed by the passes and by the sketch.

    `further`: whether the sketch has a run of its own beside the sensitivity's passes.
    """
    from tlora.subspace import further_rows, sketch_rows

    tokens = options.samples * options.tokens
    weights = sum(layer.weight.numel() for layer in layers.values())
    head = options.vocabulary * options.width
    streamed = product = 0
    for layer in layers.values():
        shape = layer.weight.shape
        first = sketch_rows(*shape, options.rank)
        again = further * further_rows(*shape, options.rank)
        streamed += (first + again) * shape[1]
        product += (first + 2 * again) * layer.weight.numel()
    return {
        "sensitivity's passes": tokens * (6 * weights + 4 * head),
        "the sketch's own forward pass": further * tokens * 2 * weights,
        "streaming the sketch": tokens * 4 * streamed,
        "products of the sketch with the weights": 2 * product,
    }


def floor_of(run: Callable[[], object], device: str) -> float:
    """Return the seconds of a run's matrix products alone, each at its number format's rate."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counted: Counter = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm_"):
                left, right = args[-2:]
                counted[str(left.dtype)[6:]] += 2 * math.prod(left.shape) * right.shape[1]
            return function(*args, **(kwargs or {}))

    with Counting():
        run()
    return sum(count / rate(device, dtype) for dtype, count in counted.items())


def label(options: argparse.Namespace) -> str:
    """Return the sizes of a run in words."""
    layers = "1 layer" if options.layers == 1 else f"{options.layers} layers"
    return (
        f"{layers} of width {options.width}/{round(RATIO * options.width)}, rank {options.rank}, "
        f"{options.samples} samples x {options.tokens} tokens, seed {options.seed}"
    )


def compare(options: argparse.Namespace, names: tuple[str, ...] = ()) -> None:
    """Print the rows of `ours` beside the paper's way; `names`: of these modules only."""
    from tlora import input_subspaces

    model, samples = build(options)
    layers = {n: m for n, m in targets(model).items() if not names or n.endswith(names)}
    ranks = dict.fromkeys(layers, options.rank)
    replay, indices = record(model, samples, list(layers))
    replayed = {name: replay.get_submodule(name) for name in layers}
    kept: dict[str, dict] = {}
    input_subspaces(replay, indices[:1], ranks)  # warms up
    streams = measuring.alternating(
        {
            "full": lambda: kept.update(full=full_covariances(replay, indices, replayed)),
            "ours": lambda: kept.update(ours=input_subspaces(replay, indices, ranks)),
        },
        options.repeat,
    )
    shapes = Counter(tuple(layer.weight.shape) for layer in layers.values())
    decompositions, exact = 0.0, {}
    for shape, count in shapes.items():
        name = next(n for n, layer in layers.items() if tuple(layer.weight.shape) == shape)
        start = time.perf_counter()
        weight = layers[name].weight.detach()
        exact[name] = full_svd(weight, kept["full"][name], options.rank)
        seconds = time.perf_counter() - start
        decompositions += count * seconds
        print(f"SVD of W C of {shape}: {seconds:.1f} s", file=sys.stderr, flush=True)
    what = label(options)
    modules = f" ({', '.join(names)})" if names else ""
    theirs = streams["full"] + decompositions
    least = floor_of(lambda: input_subspaces(replay, indices, ranks), options.device)
    measuring.row(
        f"covariance + SVD{modules}, {what}; one SVD a shape, times {sum(shapes.values())} modules",
        f"{streams['ours']:.1f} s (its matrix products at the rate of one of 2048: {least:.1f} s)",
        f"{theirs:.0f} s ({streams['full']:.1f} + {decompositions:.0f})",
        f"{theirs / streams['ours']:.1f} x faster",
    )
    found, titles = [kept["ours"]], [f"captured energy{modules}"]
    if not names:
        replay = None
        found.append(in_all(options, model, samples, theirs))
        ranks = [len(rows) for rows in found[1].values()]
        titles.append(
            f"the same where the sensitivity's passes are shared, ranks {min(ranks)} to "
            f"{max(ranks)} as allocated"
        )
    for title, least in zip(titles, energies(layers, kept["full"], found, exact), strict=True):
        text = f"{title}, least of {len(layers)} modules, {what}"
        measuring.row(text, f"{least:.7f}", "1 (exact)")


def plain_sensitivity(model, samples: list[dict], layers: dict) -> dict[str, float]:
    """Return mean |W * grad W| of every module, from gradients of all weights at a time."""
    totals = dict.fromkeys(layers, 0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for sample in samples:
        model(**{k: v.to(model.device) for k, v in sample.items()}, use_cache=False).loss.backward()
        for name, layer in layers.items():
            totals[name] += (layer.weight * layer.weight.grad).abs().mean().item() / len(samples)
            layer.weight.grad = None
    return totals


def in_all(options: argparse.Namespace, model, samples: list[dict], decomposed: float) -> dict:
    """Print the row of the whole initialisation and return the subspaces.

    `decomposed`: seconds of covariance and SVD.
    """
    from tlora import allocate, input_subspaces, sensitivity, subspace
    from tlora.modules import module_shapes
    from tlora.subspace import sketching

    layers, kept, runs = targets(model), {}, []

    def ours() -> None:
        runs.clear()
        with sketching(model, "all-linear", options.rank) as start:
            scores = sensitivity(model, samples, "all-linear")
        ranks = allocate(scores, options.rank, options.rank, module_shapes(model)).ranks
        ranks = {name: rank for name, rank in ranks.items() if rank}
        kept.update(input_subspaces(model, samples, ranks, start=start))

    stream = subspace._stream
    subspace._stream = lambda *args: (runs.append(1), stream(*args))
    spent = measuring.alternating(
        {
            "ours": ours,
            "passes": lambda: plain_sensitivity(model, samples, layers),
            "sensitivity": lambda: sensitivity(model, samples, "all-linear"),
        },
        max(1, options.repeat - 2),
    )
    subspace._stream = stream
    theirs = spent["passes"] + decomposed
    floor = sum(operations(layers, options, bool(runs)).values()) / rate(
        options.device, options.dtype
    )
    what = label(options)
    measuring.row(
        f"initialisation in all (of it the sensitivity, its passes shared; {len(runs)} further run "
        f"of the sketch), {what}",
        f"{spent['ours']:.1f} s ({spent['sensitivity']:.1f}), floor {floor:.1f} s",
        f"{theirs:.0f} s ({spent['passes']:.1f})",
        f"{theirs / spent['ours']:.1f} x faster",
    )
    return kept


def flat(options: argparse.Namespace) -> None:
    """Print the energy on plain embeddings and uniform tokens."""
    from tlora import input_subspaces

    options = argparse.Namespace(**{**vars(options), "layers": 1})
    model, samples = build(options, structured=False)
    layers = targets(model)
    found = input_subspaces(model, samples, dict.fromkeys(layers, options.rank))
    (least,) = energies(layers, full_covariances(model, samples, layers), [found], {})
    measuring.row(
        f"captured energy on plain embeddings and uniform tokens (flat spectrum, worst case), "
        f"least of {len(layers)} modules, {label(options)}",
        f"{least:.5f}",
        "1 (exact)",
    )


def memory(options: argparse.Namespace) -> None:
    """Print the row of the memory beside the model; each side is a process of its own."""
    peaks = {}
    for side in ("ours", "full"):
        flags = ["--width", options.width, "--layers", options.layers, "--rank", options.rank]
        flags += ["--tokens", options.tokens, "--vocabulary", options.vocabulary]
        output = measuring.child([sys.executable, __file__, "--side", side, *flags]).output
        peaks[side] = float(output.splitlines()[-1])
    measuring.row(
        f"memory beside model and tokens (resident, highest), {label(options)}",
        f"{peaks['ours'] / 2**20:,.0f} MiB",
        f"{peaks['full'] / 2**20:,.0f} MiB",
        f"{peaks['full'] / peaks['ours']:.1f} x less",
    )


def side(options: argparse.Namespace) -> None:
    """Print the memory that one way takes beside the model, in bytes."""
    from tlora import input_subspaces

    options.samples = 2
    model, samples = build(options)
    layers = targets(model)
    # what a first run through the model takes is not the method's
    input_subspaces(model, samples[:1], {next(iter(layers)): 1}, passes=0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if options.side == "ours":
        input_subspaces(model, samples, dict.fromkeys(layers, options.rank))
    else:
        found = full_covariances(model, samples, layers)
        name = next(n for n in layers if n.endswith("down_proj"))
        full_svd(layers[name].weight.detach(), found[name], options.rank)
    print(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peft_methods(options: argparse.Namespace) -> None:
    """Print a row for each of PEFT's initialisations from data, on the same samples."""
    from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    from tlora import get_tlora_model

    names = list(targets(build(options)[0]))
    common = {"r": options.rank, "lora_alpha": options.rank, "target_modules": names}

    def ours(model, samples):
        get_tlora_model(model, samples, r=options.rank)

    def corda(model, samples):
        config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(), **common)
        preprocess_corda(model, config, lambda: [model(s["input_ids"]) for s in samples])
        get_peft_model(model, config)

    def eva(model, samples):
        config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), **common)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        full = [s | {"attention_mask": s["input_ids"] * 0 + 1} for s in samples]
        initialize_lora_eva_weights(adapted, full, show_progress_bar=False)

    def lora_ga(model, samples):
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **common)
        preprocess_loraga(model, config, lambda: [model(**s).loss.backward() for s in samples])
        get_peft_model(model, config)

    times: dict[str, list[float]] = {}
    for _ in range(max(1, options.repeat - 1)):
        for run in (ours, corda, lora_ga) if options.small else (ours, corda, eva, lora_ga):
            model, samples = build(options)
            start = time.perf_counter()
            run(model, samples)
            times.setdefault(run.__name__, []).append(time.perf_counter() - start)
    found = {name: statistics.median(values) for name, values in times.items()}
    names = {"corda": "CorDA", "eva": "EVA", "lora_ga": "LoRA-GA"}
    for key, name in ((key, name) for key, name in names.items() if key in found):
        measuring.row(
            f"get_tlora_model beside PEFT's {name}, in all, {label(options)}",
            f"{found['ours']:.1f} s",
            f"{found[key]:.1f} s",
            f"{found[key] / found['ours']:.1f} x",
        )


def disk(options: argparse.Namespace) -> None:
    """Print the bytes of calibration artefacts of Llama-2-7B, from shapes."""
    from tlora.subspace import _PROBES, sketch_rows

    inputs = [4096] * 6 + [11008]
    outputs = [4096] * 4 + [11008] * 2 + [4096]
    layers, rank = 32, 128
    kept = 4 * layers * sum(inputs) * rank
    each = 4 * layers * sum(size**2 for size in inputs)
    shared = 4 * layers * (3 * 4096**2 + 11008**2)
    measuring.row(
        f"files of an initialisation of Llama-2-7B, mean rank {rank}, from shapes: A and the "
        "sensitivities, beside float32 covariances (one a distinct input; one a module)",
        f"{(kept + 8 * layers * len(inputs)) / 1e9:.2f} GB",
        f"{shared / 1e9:.1f} GB; {each / 1e9:.1f} GB",
        f"{shared / kept:.0f} x; {each / kept:.0f} x less",
    )
    sizes = [sketch_rows(m, n, rank) + _PROBES for m, n in zip(outputs, inputs, strict=True)]
    sketch = 2 * 4 * layers * sum(size * n for size, n in zip(sizes, inputs, strict=True))
    measuring.row(
        f"the same in memory: sketch (G and Y, {min(sizes)} to {max(sizes)} rows each) beside "
        "the covariances",
        f"{sketch / 1e9:.1f} GB",
        f"{shared / 1e9:.1f} GB; {each / 1e9:.1f} GB",
        f"{shared / sketch:.1f} x; {each / sketch:.1f} x less",
    )


def profile(options: argparse.Namespace) -> None:
    """Print where the time goes, and the least that the operations would take."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from tlora import input_subspaces, sensitivity

    model, samples = build(options)
    layers = targets(model)
    activities = [ProfilerActivity.CPU]
    cuda = options.device == "cuda"
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    for name, run in {
        "sensitivity": lambda: sensitivity(model, samples, "all-linear"),
        "input_subspaces": lambda: input_subspaces(
            model, samples, dict.fromkeys(layers, options.rank)
        ),
    }.items():
        with profiler(activities=activities) as found:
            run()
        print(f"\n{name}, {label(options)}\n")
        sort = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(found.key_averages().table(sort_by=sort, row_limit=14, max_name_column_width=40))
    speed = rate(options.device, options.dtype)
    print(f"floor at {speed / 1e9:,.0f} GFLOP/s, what a matrix product of 2048 reaches here:")
    for name, needed in operations(layers, options, True).items():
        print(f"  {name}: {needed / 1e12:.2f} TFLOP, {needed / speed:.2f} s")


def whole(options: argparse.Namespace) -> None:
    """Print time and memory of the whole initialisation of the 7B shape on a GPU."""
    import torch

    from tlora import get_tlora_model

    if not torch.cuda.is_available():
        sys.exit("--7b: no GPU: expected one with 20 GiB free")
    options.width, options.layers, options.vocabulary, options.rank = 4096, 32, 32000, 128
    options.device, options.dtype = "cuda", "bfloat16"
    model, samples = build(options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    get_tlora_model(model, samples, r=options.rank)
    torch.cuda.synchronize()
    spent = time.perf_counter() - start
    beside = torch.cuda.max_memory_allocated() - before
    measuring.row(
        f"initialisation in all, the paper's 232 s on an A800 and 17.1 GB, bf16, {label(options)}",
        f"{spent:.1f} s; weights + {beside / 2**30:.1f} GiB",
        "232 s",
        f"{232 / spent:.0f} x faster",
    )


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layer-7b", action="store_true")
    parser.add_argument("--7b", dest="whole", action="store_true")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--only", choices=["compare", "flat", "memory"], help="one part alone")
    parser.add_argument("--side", choices=["ours", "full"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        options.width, options.layers, options.samples, options.tokens = 128, 2, 4, 16
        options.rank, options.vocabulary, options.repeat = 8, 256, 1
        import torch

        torch.set_num_threads(1)
    if options.side:
        side(options)
        return
    import transformers

    transformers.logging.set_verbosity_error()
    if options.profile:
        profile(options)
        return
    measuring.header()
    if options.whole:
        whole(options)
    elif options.layer_7b:
        options.width, options.layers, options.rank = 4096, 1, 128
        compare(options, LAYER)
    elif options.peft:
        peft_methods(options)
    elif options.disk:
        disk(options)
    else:
        parts = {"compare": compare, "flat": flat, "memory": memory}
        for name in (options.only,) if options.only else parts:
            parts[name](options)
        if options.small:
            peft_methods(options)
            disk(options)


if __name__ == "__main__":
    main()
