"""The input subspace that A is frozen to: top right singular vectors of W C, C = sum X^T X / N.

`exact` accumulates C. `sketch` never forms it: with a test matrix G of few rows, random at first,
it streams Y = G C and rebuilds C from Y and G (Nystrom), for C is symmetric
and positive semidefinite. Whenever the number of samples has quadrupled, G is turned towards the
subspace seen so far and Y is carried over to the new G: within the same run and memory this brings
most of what another run through the samples would. A further run starts with G turned towards that
of W C. All that is as wide as the inputs goes through matrix products and triangular solves.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError
from tlora.modules import (
    ALL_LINEAR,
    calibrating,
    find_layers,
    find_targets,
    in_backward,
    model_inputs,
    read_samples,
    weight_matrix,
)
from tlora.progress import bar

if TYPE_CHECKING:
    from torch import Tensor, nn

ALGORITHMS = ("sketch", "exact")
# How many times the rows it started with a module may need without a further run.
_GROWTH = 1.25
# Elements of a weight that are turned into float32 at a time.
_CHUNK = 1 << 24


def input_subspaces(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ranks: Mapping[str, int],
    algorithm: str = "sketch",
    center: bool = False,
    seed: int = 0,
    passes: int = 1,
    start: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return, for every module, the top right singular vectors of W C as orthonormal rows.

    X holds the inputs of W, one row a token; padding does not count. C is the mean over samples of
    X^T X.

    Parameters
    ----------
    model
        A causal or encoder-decoder model without adapters; it is left as it was.
    batches
        Dicts of `input_ids` and, as available, `attention_mask` and `labels`. Read once.
    ranks
        Number of vectors by full module name; at most min(out_features, in_features).
    algorithm
        "sketch": 2 `sketch_rows` x in_features numbers a module and one run through the samples per
        pass. "exact": in_features^2 numbers for every distinct input.
    center
        Take the mean over a sample's tokens off its X before (the authors' code does, the
        paper does not).
    seed
        Of the sketch's test matrices.
    passes
        Further runs through the samples, 0 to 2: each makes the sketch a step of subspace iteration
        better. On the project's tiny base model the energy ||W C A^T||^2 is above 0.9999 of the
        exact one's without a further run and above 0.99998 with one. "exact" needs none.
    start
        What `sketching` gave while these samples went through the model: it is the sketch's first
        run, with the same `center`; at least one of its own follows. It is emptied, to free what
        is used up.

    Returns
    -------
    dict of str to Tensor
        (rank, in_features) float32 on the CPU, orthonormal rows by falling singular value; the
        largest entry of a row is positive. Modules of rank 0 get a tensor without rows.

    Raises
    ------
    UserError
        For unknown or quantised modules, ranks that do not fit, no samples, modules that get no
        input, and NaN (naming the module).

    References
    ----------
    arXiv 2604.18124, Algorithm 1; the Nystrom reconstruction: Tropp et al., arXiv 1706.05736.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"algorithm: {algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    if passes not in (0, 1, 2):
        raise UserError(f"passes: {passes!r}: expected 0, 1 or 2")
    layers = find_layers(model, ranks)
    for name, layer in layers.items():
        _check_rank(name, ranks[name], weight_matrix(layer))
    samples = read_samples(batches)
    active = {name: layer for name, layer in layers.items() if ranks[name] > 0}
    if algorithm == "sketch":
        found = _sketch(model, samples, active, ranks, center, seed, passes, start)
    else:
        found = _exact(active, ranks, *_covariances(model, samples, active, center))
    return {name: found[name] if name in found else _no_rows(layers[name]) for name in ranks}


def covariances(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target_modules: str | Iterable[str] = ALL_LINEAR,
    center: bool = False,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the mean over samples of X^T X for every distinct input of the target layers.

    Parameters
    ----------
    model, batches, center
        As in `input_subspaces`.
    target_modules
        As in `tlora.sensitivity`.

    Returns
    -------
    matrices : dict of str to Tensor
        (in_features, in_features) float32 on the layer's device, by the first module that has
        this input.
    alias : dict of str to str
        Every target module -> the name under which `matrices` holds its input's.
    """
    targets = find_targets(model, target_modules)
    return _covariances(model, read_samples(batches), targets, center)


def subspace_from_covariance(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Return the top right singular vectors of W C.

    An eigendecomposition in float64 of the smaller of (W C)^T (W C) and (W C) (W C)^T, so that the
    left singular vectors of a wide or the large factor of a tall matrix are never computed.

    Parameters
    ----------
    weight
        (out_features, in_features).
    covariance
        (in_features, in_features), symmetric.
    rank
        At most min(out_features, in_features).

    Returns
    -------
    Tensor
        (rank, in_features) float32 on the CPU, as in `input_subspaces`.
    """
    import torch

    weight = weight.detach()
    product = weight.double() @ covariance.to(weight.device).double()
    # Squares of small numbers must not underflow; the vectors do not depend on the scale.
    product /= _largest(product)
    if product.shape[1] <= product.shape[0]:
        vectors = torch.linalg.eigh(product.T @ product).eigenvectors.flip(1)[:, :rank]
    else:
        left = torch.linalg.eigh(product @ product.T).eigenvectors.flip(1)[:, :rank]
        # QR keeps the order and stays orthonormal where singular values are 0.
        vectors = torch.linalg.qr(product.T @ left).Q
    return _finish(vectors.T)


def subspaces_from_file(
    model: nn.Module, calibration: Path, ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the subspaces from covariances on disk, read one at a time.

    Parameters
    ----------
    model
        The base model.
    calibration
        `calibration.json` with an "alias" map; the matrices lie in `calibration.safetensors` beside
        it.
    ranks
        As in `input_subspaces`.
    """
    from safetensors import safe_open

    from tlora.artefact import read_json

    alias = read_json(calibration)["alias"]
    layers = find_layers(model, ranks)
    found = {}
    with safe_open(Path(calibration).with_suffix(".safetensors"), framework="pt") as file:
        stored = set(file.keys())
        for name, layer in bar(layers.items(), desc="subspaces", unit="module"):
            _check_rank(name, ranks[name], weight_matrix(layer))
            if ranks[name] == 0:
                found[name] = _no_rows(layer)
                continue
            if alias.get(name, name) not in stored:
                raise UserError(f"{calibration}: {name}: no covariance of this module")
            matrix = file.get_tensor(alias.get(name, name))
            found[name] = subspace_from_covariance(weight_matrix(layer), matrix, ranks[name])
    return {name: found[name] for name in ranks}


def _check_rank(name: str, rank: int, weight: Tensor) -> None:
    if not 0 <= rank <= min(weight.shape):
        raise UserError(f"{name}: rank {rank}: expected 0 to {min(weight.shape)}")


def _no_rows(layer: nn.Module) -> Tensor:
    import torch

    return torch.zeros(0, weight_matrix(layer).shape[1])


def _finish(rows: Tensor) -> Tensor:
    """Fix the signs: the largest entry of each row is positive."""
    import torch

    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return (rows * torch.where(largest < 0, -1.0, 1.0)).float().cpu().contiguous()


@contextlib.contextmanager
def _listening(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    consume: Callable[[str, Tensor, int], None],
) -> Iterator[set[str]]:
    """Hand `consume` each layer's input (..., in_features) with the number of the model's call.

    Yields the names of the layers that got one.
    """
    import torch

    calls = itertools.count()
    index = -1
    called: set[str] = set()

    def begin(module: nn.Module, arguments: tuple) -> None:
        nonlocal index
        index = next(calls)

    def hook(name: str) -> Callable[..., None]:
        def receive(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            if not in_backward():
                inputs = arguments[0] if arguments else next(iter(keywords.values()))
                with torch.no_grad():
                    consume(name, inputs, index)
                called.add(name)

        return receive

    handles = [model.register_forward_pre_hook(begin)]
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _stream(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    consume: Callable[[str, Tensor, int], None],
    description: str,
) -> None:
    """Run the samples one by one and hand `consume` each layer's input (..., in_features)."""
    import torch

    # The head's work on all tokens but the last is for nothing, where it is no target itself.
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    short = "logits_to_keep" in inspect.signature(model.forward).parameters
    short = short and head not in layers.values()
    more = {"logits_to_keep": 1} if short else {}
    with calibrating(model), torch.no_grad(), _listening(model, layers, consume) as called:
        for sample in bar(samples, desc=description, unit="sample"):
            model(**model_inputs(model, sample), **more)
    for name in layers:
        if name not in called:
            raise UserError(f"{name}: gets no input: remove it from target_modules")


def _rows(inputs: Tensor, center: bool) -> Tensor:
    """Return a layer's input as (tokens, in_features) float32."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows - rows.mean(dim=0) if center else rows


def _check_finite(layers: Mapping[str, nn.Module], sums: Mapping[str, Tensor]) -> None:
    for name in layers:
        if name in sums and not _largest(sums[name]).isfinite():
            raise UserError(f"{name}: input is NaN or infinite on the calibration samples")


def _covariances(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    center: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    import torch

    sums: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    # The input that each owner of a matrix saw last. Weak, so that no activation is kept alive;
    # the version tells a tensor that was changed in place since.
    latest: dict[str, tuple[weakref.ref, int]] = {}
    by_id: dict[int, str] = {}
    started: dict[str, int] = {}

    def same(owner: str, inputs: Tensor) -> bool:
        reference, version = latest[owner]
        return reference() is inputs and inputs._version == version

    def consume(name: str, inputs: Tensor, index: int) -> None:
        owner = by_id.get(id(inputs))
        if name not in alias:
            shared = owner is not None and started[owner] == index and same(owner, inputs)
            alias[name] = owner if shared else name
            started[name] = index
        if alias[name] != name:
            if not same(alias[name], inputs):
                raise UserError(
                    f"{name}: shares its input with {alias[name]} on some samples only: calibrate "
                    "them one at a time"
                )
            return
        rows = _rows(inputs, center)
        if name not in sums:
            sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        sums[name].addmm_(rows.T, rows)
        latest[name] = (weakref.ref(inputs), inputs._version)
        by_id[id(inputs)] = name

    _stream(model, samples, layers, consume, "covariance")
    _check_finite(layers, sums)
    with torch.no_grad():
        return {name: matrix.div_(len(samples)) for name, matrix in sums.items()}, alias


def _exact(
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    matrices: Mapping[str, Tensor],
    alias: Mapping[str, str],
) -> dict[str, Tensor]:
    return {
        name: subspace_from_covariance(weight_matrix(layer), matrices[alias[name]], ranks[name])
        for name, layer in bar(layers.items(), desc="subspaces", unit="module")
    }


@contextlib.contextmanager
def sketching(
    model: nn.Module,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    rank: int = 8,
    center: bool = False,
    seed: int = 0,
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Sketch what the target layers read of all that goes through the model inside.

    So the passes that the sensitivity needs are the sketch's first run, too:

        with sketching(model, targets, r) as start:
            scores = sensitivity(model, samples, targets)
        subspaces = input_subspaces(model, samples, ranks, start=start)

    Parameters
    ----------
    model, target_modules
        As in `tlora.sensitivity`. A call of the model is a sample, without padding.
    rank
        What is expected of a module: the mean. Where a larger one is asked for afterwards, rows are
        added; more than twice of it takes a further run.
    center, seed
        As in `input_subspaces`.

    Yields
    ------
    dict
        Module -> test matrix G and Y = G C, each (rank + oversampling, in_features) float32 on the
        layer's device; it fills up while samples go through.
    """
    layers = find_targets(model, target_modules)
    sketches = {
        name: _begin(weight_matrix(layer), min(rank, *weight_matrix(layer).shape), f"{seed}:{name}")
        for name, layer in layers.items()
    }
    with _listening(model, layers, _turning(layers, sketches, center)):
        yield sketches


def _sketch(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    center: bool,
    seed: int,
    passes: int,
    start: dict[str, tuple[Tensor, Tensor]] | None,
) -> dict[str, Tensor]:
    weights = {name: weight_matrix(layer) for name, layer in layers.items()}
    sizes: dict[str, int] = {}
    if start is None:
        sketches = {n: _begin(w, ranks[n], f"{seed}:{n}") for n, w in weights.items()}
        receive = _turning(layers, sketches, center, weighted=passes == 0)
        _stream(model, samples, layers, receive, f"sketch, pass 1/{passes + 1}")
    else:
        if missing := [name for name in layers if name not in start]:
            raise UserError(f"{missing[0]}: is no target of the sketch to start with")
        sizes = {name: _least(weight, ranks[name]) for name, weight in weights.items()}
        sketches = {name: start.pop(name) for name in layers}
        start.clear()
    _check_finite(layers, {name: sums for name, (_, sums) in sketches.items()})
    # Rows that a module needs beyond those of its start are fresh ones in the next run; many more
    # need one run more to become as good as the others.
    lacking = {name: size / len(sketches[name][0]) for name, size in sizes.items()}
    runs = max(passes, 1 if sizes else 0) + int(max(lacking.values(), default=0) > _GROWTH)
    for number in range(runs):
        # Y = G C, so this is a step of subspace iteration on (W C)^T (W C): each run through the
        # samples multiplies by C once.
        for name, weight in weights.items():
            test = _aim(weight, *sketches[name])
            if lacking.get(name, 0) > 1 and number == 0:
                test = _grow(weight, test, ranks[name], f"{seed}:{name}:")
            sketches[name] = test, test.new_zeros(test.shape)
        receive = _turning({}, sketches, center)
        _stream(model, samples, layers, receive, f"sketch, pass {number + 2}/{runs + 1}")
        _check_finite(layers, {name: sums for name, (_, sums) in sketches.items()})
    return {n: _nystrom(weights[n], *sketches.pop(n), ranks[n]) for n in layers}


def _turning(
    layers: Mapping[str, nn.Module],
    sketches: dict[str, tuple[Tensor, Tensor]],
    center: bool,
    weighted: bool = False,
) -> Callable[[str, Tensor, int], None]:
    """Return what adds an input to its sketch; those of `layers` turn after 1, 4, 16, ... samples.

    Towards C alone, which costs no product with the weight: the next pass aims at W C. `weighted`
    turns towards W C, for a sketch that no further pass follows. Turning twice as often gains
    little.
    """
    turned: dict[str, int] = {}

    def receive(name: str, inputs: Tensor, index: int) -> None:
        due = index.bit_count() == 1 and index.bit_length() % 2 == 1
        if due and name in layers and turned.get(name) != index:
            weight = weight_matrix(layers[name]) if weighted else None
            sketches[name] = _turn(weight, *sketches[name])
            turned[name] = index
        test, sums = sketches[name]
        rows = _rows(inputs, center)
        sums.addmm_((rows @ test.T).T, rows)

    return receive


def _begin(weight: Tensor, rank: int, key: str) -> tuple[Tensor, Tensor]:
    test = _first_test(weight, rank, key)
    return test, test.new_zeros(test.shape)


def _grow(weight: Tensor, test: Tensor, rank: int, key: str) -> Tensor:
    """Return a test matrix with fresh rows besides, as many as this rank takes."""
    import torch

    fresh = _first_test(weight, rank, key)[: _least(weight, rank) - len(test)]
    return _orthonormal_rows(torch.cat([test, fresh]).double()).float()


def sketch_rows(out_features: int, in_features: int, rank: int) -> int:
    """Return the rows of a sketch: the rank and an oversampling.

    It is the larger where the input is wide, as that of an MLP's last layer, for its spectrum falls
    the slower over these rows.
    """
    wide = max(1.0, in_features / out_features)
    return min(rank + max(32, math.ceil(wide * rank)), out_features, in_features)


def _least(weight: Tensor, rank: int) -> int:
    """Return the rows that a sketch needs which began with another rank."""
    return min(rank + max(32, math.ceil(rank / 4)), *weight.shape)


def _first_test(weight: Tensor, rank: int, key: str) -> Tensor:
    """Return orthonormal random rows: (rank + oversampling, in_features)."""
    import torch

    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    rows = torch.randn(sketch_rows(*weight.shape, rank), weight.shape[1], generator=generator)
    return _orthonormal_rows(rows.to(weight.device).double()).float()


def _turn(weight: Tensor | None, test: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next test matrix G' and Y' = G' C, with C rebuilt from G and Y.

    G' is an orthonormal basis of the rows of Y, or of Y W^T W where a weight is given.
    """
    import torch

    scale = _largest(sums)
    if not scale.isfinite():
        return test, sums  # reported, with the module's name, at the end of the run
    factor, shift = _factor(test, sums / scale)
    if weight is None:
        lower, _ = _cholesky(factor @ factor.T)
        # F^T = L G' with orthonormal G': G' F F^T = L^T F^T
        following = torch.linalg.solve_triangular(lower, factor, upper=False).float()
        carried = lower.T.float() @ factor.float()
    else:
        short = factor.float()
        following = _orthonormal_rows(_times(_times(short, weight.T), weight).double()).float()
        carried = ((following.double() @ factor.T) @ factor).float()
    return following, (carried - shift.float() * following) * scale


def _aim(weight: Tensor, test: Tensor, sums: Tensor) -> Tensor:
    """Return the next pass's test matrix, an orthonormal basis of the rows of Y W^T W.

    They are those of F^T W^T W, whose condition is only the root of it.
    """
    factor, _ = _factor(test, sums / _largest(sums))
    return _orthonormal_rows(_times(_times(factor.float(), weight.T), weight).double()).float()


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    with _one_thread():
        return torch.linalg.cholesky_ex(matrix)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: for a small matrix, to meet others takes longer than the work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows W in float32 without a copy of a large W in another number format."""
    import torch

    if weight.dtype == torch.float32:
        return rows @ weight
    out = rows.new_zeros(len(rows), weight.shape[1])
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        out.addmm_(rows[:, start : start + step], weight[start : start + step].float())
    return out


def _orthonormal_rows(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows, in float64, by matrix products where they allow."""
    import torch

    lower, failed = _cholesky(rows @ rows.T)
    diagonal = lower.diagonal()
    if failed or not diagonal.min() > 1e-6 * diagonal.max():
        return torch.linalg.qr(rows.T).Q.T.contiguous()
    return torch.linalg.solve_triangular(lower, rows, upper=False)


def _largest(values: Tensor) -> Tensor:
    """Return the largest magnitude, at least the smallest number that can be divided by."""
    import torch

    return torch.linalg.vector_norm(values, torch.inf).clamp_min(torch.finfo(values.dtype).tiny)


def _factor(test: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return F^T and v of the Nystrom reconstruction C + v = Y^T (Y G^T)^-1 Y = F F^T, in float64.

    Y is a float32 sum: what lies below its rounding is noise, which the inverse would blow up. So
    C is shifted by that much: Y becomes Y + v G.
    """
    import torch

    shifted, test = sums.double(), test.double()
    core = shifted @ test.T
    core = (core + core.T) / 2
    tiny = torch.finfo(torch.float32).tiny
    shift = (torch.finfo(torch.float32).eps * sums.norm()).clamp_min(tiny).double()
    while True:
        # G's rows are orthonormal to float32: v G G^T = v
        lower, failed = _cholesky(core + shift * torch.eye(len(core)).to(core))
        if not failed:
            break
        shift = 4 * shift
    shifted.addcmul_(test, shift)
    return torch.linalg.solve_triangular(lower, shifted, upper=False), shift


def _nystrom(weight: Tensor, test: Tensor, sums: Tensor, rank: int) -> Tensor:
    """Return the top right singular vectors of W F F^T."""
    import torch

    factor, _ = _factor(test, sums / _largest(sums))
    factor /= _largest(factor)
    image = _times(factor.float(), weight.T).double()
    basis = _orthonormal_rows(factor)
    # W F F^T = image^T (factor basis^T) basis: its right singular vectors are those of a small
    # matrix, turned by the basis.
    small = (image @ image.T) / _largest(image) ** 2
    turn = factor @ basis.T
    # on the host, where small matrices take the least time
    small = (turn.T @ small @ turn).cpu()
    with _one_thread():
        vectors = torch.linalg.eigh(small).eigenvectors
    top = vectors.flip(1)[:, :rank].T.to(basis.device)
    return _finish(top @ basis)
