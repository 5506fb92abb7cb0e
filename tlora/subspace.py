"""The input subspace that A is frozen to: top right singular vectors of W C, C = sum X^T X / N.

`exact` accumulates C. `sketch` never forms it: with a test matrix G of few rows, at first Omega W
with a random Omega, it streams Y = G C and rebuilds C from Y and G (Nystrom), for C is symmetric
and positive semidefinite. Whenever the number of samples has doubled, G is turned towards the
subspace seen so far and Y is carried over to the new G: within the same run and memory this brings
most of what another run through the samples would.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import UserError
from tlora.modules import (
    ALL_LINEAR,
    calibrating,
    find_layers,
    find_targets,
    model_inputs,
    read_samples,
    weight_matrix,
)
from tlora.progress import bar

if TYPE_CHECKING:
    from torch import Tensor, nn

ALGORITHMS = ("sketch", "exact")


def input_subspaces(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ranks: Mapping[str, int],
    algorithm: str = "sketch",
    center: bool = False,
    seed: int = 0,
    passes: int = 1,
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
        "sketch": (rank + max(32, rank / 4)) x in_features numbers a module and one run through
        the samples per pass. "exact": in_features^2 numbers for every distinct input.
    center
        Take the mean over a sample's tokens off its X before (the authors' code does, the
        paper does not).
    seed
        Of the sketch's test matrices.
    passes
        Further runs through the samples, 0 to 2: each makes the sketch a step of subspace iteration
        better. On the project's tiny base model the energy ||W C A^T||^2 is above 0.9999 of the
        exact one's without a further run and above 0.99998 with one. "exact" needs none.

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
        found = _sketch(model, samples, active, ranks, center, seed, passes)
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


def _stream(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    consume: Callable[[str, Tensor, int], None],
    description: str,
) -> None:
    """Run the samples one by one and hand `consume` each layer's input (..., in_features)."""
    import torch

    def hook(name: str) -> Callable[..., None]:
        def receive(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            consume(name, arguments[0] if arguments else next(iter(keywords.values())), finished)
            called.add(name)

        return receive

    called: set[str] = set()
    handles = []
    finished = 0
    with calibrating(model), torch.no_grad():
        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
            for sample in bar(samples, desc=description, unit="sample"):
                model(**model_inputs(model, sample))
                finished += 1
        finally:
            for handle in handles:
                handle.remove()
    for name in layers:
        if name not in called:
            raise UserError(f"{name}: gets no input: remove it from target_modules")


def _rows(inputs: Tensor, center: bool) -> Tensor:
    """Return a layer's input as (tokens, in_features) float32."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows - rows.mean(dim=0) if center else rows


def _check_finite(layers: Mapping[str, nn.Module], sums: Mapping[str, Tensor]) -> None:
    for name in layers:
        if name in sums and not sums[name].isfinite().all():
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


def _sketch(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    center: bool,
    seed: int,
    passes: int,
) -> dict[str, Tensor]:
    tests = {
        name: _first_test(weight_matrix(layer), ranks[name], f"{seed}:{name}")
        for name, layer in layers.items()
    }
    sums = {name: test.new_zeros(test.shape) for name, test in tests.items()}
    turned = dict.fromkeys(layers, 0)

    def first(name: str, inputs: Tensor, index: int) -> None:
        if index.bit_count() == 1 and turned[name] != index:
            weight = weight_matrix(layers[name])
            tests[name], sums[name] = _turn(weight, tests[name], sums[name])
            turned[name] = index
        further(name, inputs, index)

    def further(name: str, inputs: Tensor, index: int) -> None:
        rows = _rows(inputs, center)
        sums[name].addmm_((rows @ tests[name].T).T, rows)

    _stream(model, samples, layers, first, f"sketch, pass 1/{passes + 1}")
    _check_finite(layers, sums)
    for number in range(passes):
        # Y = G C, so this is a step of subspace iteration on (W C)^T (W C): each run through the
        # samples multiplies by C once.
        for name, layer in layers.items():
            tests[name] = _next_test(weight_matrix(layer), sums[name])
            sums[name].zero_()
        _stream(model, samples, layers, further, f"sketch, pass {number + 2}/{passes + 1}")
        _check_finite(layers, sums)
    return {
        name: _nystrom(weight_matrix(layer), tests.pop(name), sums.pop(name), ranks[name])
        for name, layer in layers.items()
    }


def _first_test(weight: Tensor, rank: int, key: str) -> Tensor:
    """Return an orthonormal basis of the rows of Omega W: (rank + oversampling, in_features)."""
    import torch

    size = min(rank + max(32, math.ceil(rank / 4)), *weight.shape)
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    omega = torch.randn(size, weight.shape[0], generator=generator).to(weight.device)
    return _orthonormal_rows((omega @ weight.float()).double())


def _next_test(weight: Tensor, sums: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows of Y W^T W."""
    wide = weight.float()
    return _orthonormal_rows((sums / _largest(sums) @ wide.T @ wide).double())


def _turn(weight: Tensor, test: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next test matrix G' and its Y' = G' C, with C rebuilt from G and Y."""
    if not sums.isfinite().all():
        return test, sums  # reported, with the module's name, at the end of the run
    following = _next_test(weight, sums)
    factor = _factor(test, sums)
    return following, (following.double() @ factor @ factor.T).float()


def _orthonormal_rows(rows: Tensor) -> Tensor:
    import torch

    return torch.linalg.qr(rows.T).Q.T.float().contiguous()


def _largest(values: Tensor) -> Tensor:
    """Return the largest magnitude, at least the smallest number that can be divided by."""
    import torch

    return values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)


def _factor(test: Tensor, sums: Tensor) -> Tensor:
    """Return F of the Nystrom reconstruction C = Y^T (Y G^T)^+ Y = F F^T, in float64."""
    import torch

    test, sums = test.double(), sums.double()
    core = sums @ test.T
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    # Y is a float32 sum: what lies below its rounding is noise, which the inverse would blow up.
    floor = values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float32).eps
    keep = values > floor
    return (sums.T @ vectors[:, keep]) / values[keep].sqrt()


def _nystrom(weight: Tensor, test: Tensor, sums: Tensor, rank: int) -> Tensor:
    """Return the top right singular vectors of W F F^T."""
    import torch

    factor = _factor(test, sums)
    factor /= _largest(factor) if factor.numel() else 1
    basis, small = torch.linalg.qr(factor)
    product = (weight.double() @ factor) @ small.T  # W C = product basis^T
    rows = torch.linalg.svd(torch.linalg.qr(product).R).Vh[:rank] @ basis.T
    if len(rows) < rank:
        # Fewer directions than asked for carry any input: fill up with others.
        rows = torch.linalg.qr(torch.cat([rows, test.double()]).T).Q.T[:rank]
    return _finish(rows)
