"""The input subspace that A is frozen to: top right singular vectors of W C, C = sum X^T X / N.

`exact` accumulates C. `sketch` never forms it: with a test matrix G of few rows, random at first,
it streams Y = G C and rebuilds C from Y and G (Nystrom), for C is symmetric and positive
semidefinite. Whenever the number of samples has quadrupled, G is turned towards the subspace seen
so far and Y is carried over to the new G: within the same run and memory this brings most of what
another run through the samples would. A few random rows beside are not turned: by them it is
estimated what is missed, and modules that miss more than is tolerated get a further run. Its G is
the left singular vectors of W C as found so far, times W, and what it shows adds to what the first
run did: C is rebuilt from both. All that is as wide as the inputs goes through matrix products and
triangular solves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tlora.errors import UserError
from tlora.grouping import group, on_trial, stack
from tlora.modules import (
    ALL_LINEAR,
    calibrating,
    find_layers,
    find_targets,
    in_backward,
    read_samples,
    weight_matrix,
)
from tlora.progress import bar

if TYPE_CHECKING:
    from torch import Tensor, nn

ALGORITHMS = ("sketch", "exact")
# How many times the rows it started with a module may need without a second further run.
_GROWTH = 1.25
# Rows of a first test matrix, its last ones, that only tell what the others miss.
_PROBES = 8
# So many times the estimate of what is missed must be tolerable.
_SAFETY = 2
# A sketch of so many times the rows that it has seen tokens is not turned.
_FEW = 4
# Tokens a row from which on a sketch turns towards W C, where a further run may follow.
_WEIGHTED = 8
# Of the Gram matrix of a factor, relative: its rank may be less than its rows.
_RIDGE = 1e-13
_TINY = 1e-300
# Squared singular values that are rounding, relative.
_NONE = 1e-14
# Numbers of a float64 copy that is made at a time.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}
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
    tolerance: float = 1e-4,
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
        Further runs through the samples at most, 0 to 2: each makes the sketch a step of subspace
        iteration better. "exact" needs none.
    start
        What `sketching` gave while these samples went through the model: it is the sketch's first
        run, with the same `center`. Ranks above its rows take a further run, whatever `passes`
        says. It is emptied, to free what is used up.
    tolerance
        Of a module's energy ||W C A^T||^2: where the sketch may miss more, by an estimate, it goes
        into a further run.

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
        found = _sketch(model, samples, active, ranks, center, seed, passes, start, tolerance)
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


class _Call(NamedTuple):
    """A call of the model: how many samples went before it and how many go in it.

    Where some of its tokens are padding, `mask` is (samples, tokens) bool, False for those, and
    `tokens` holds the places of the others in its flat form.
    """

    before: int = 0
    size: int = 0
    mask: Tensor | None = None
    tokens: Tensor | None = None

    def next(self, mask: Tensor | None) -> _Call:
        """Return the call after this one, which has this attention mask."""
        before = self.before + self.size
        if mask is None or mask.dim() != 2 or len(mask) == 1:
            return _Call(before, 1)
        tokens = mask.flatten().nonzero().flatten()
        if len(tokens) == mask.numel():
            return _Call(before, len(mask))
        return _Call(before, len(mask), mask != 0, tokens)

    def rows(self, inputs: Tensor, center: bool) -> Tensor:
        """Return a layer's input as (tokens, in_features) float32, without padding."""
        mask = self.mask if self.mask is not None and inputs.shape[:-1] == self.mask.shape else None
        if center:
            each = inputs.reshape(self.size, -1, inputs.shape[-1]).float()
            if mask is None:
                inputs = each - each.mean(dim=1, keepdim=True)
            else:
                count = mask.sum(dim=1)[:, None, None]
                inputs = each - (each * mask[..., None]).sum(dim=1, keepdim=True) / count
        rows = inputs.reshape(-1, inputs.shape[-1])
        return (rows if mask is None else rows[self.tokens]).float()


@contextlib.contextmanager
def _listening(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    consume: Callable[[str, Tensor, _Call], None],
) -> Iterator[set[str]]:
    """Hand `consume` each layer's input (..., in_features) with what is known of the model's call.

    Yields the names of the layers that got one.
    """
    import torch

    call = _Call()
    called: set[str] = set()

    def begin(module: nn.Module, arguments: tuple, keywords: dict) -> None:
        nonlocal call
        if not on_trial():
            call = call.next(keywords.get("attention_mask"))

    def hook(name: str) -> Callable[..., None]:
        def receive(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            if not in_backward() and not on_trial():
                inputs = arguments[0] if arguments else next(iter(keywords.values()))
                with torch.no_grad():
                    consume(name, inputs, call)
                called.add(name)

        return receive

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
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
    consume: Callable[[str, Tensor, _Call], None],
    description: str,
    together: bool = False,
) -> None:
    """Run the samples one by one and hand `consume` each layer's input (..., in_features).

    `together`: those that may go together do so.
    """
    import torch

    # The head's work on all tokens but the last is for nothing, where it is no target itself.
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    short = "logits_to_keep" in inspect.signature(model.forward).parameters
    short = short and head not in layers.values()
    more = {"logits_to_keep": 1} if short else {}
    with calibrating(model), torch.no_grad(), _listening(model, layers, consume) as called:
        groups = [[index] for index in range(len(samples))]
        if together:
            groups = group(model, samples, layers)
        progress = bar(total=len(samples), desc=description, unit="sample")
        for indices in groups:
            model(**stack(model, [samples[index] for index in indices]), **more)
            progress.update(len(indices))
    for name in layers:
        if name not in called:
            raise UserError(f"{name}: gets no input: remove it from target_modules")


def _check_finite(layers: Mapping[str, nn.Module], sums: Mapping[str, Tensor]) -> None:
    for name in layers:
        if name in sums and not _largest(sums[name]).isfinite():
            raise UserError(f"{name}: input is NaN or infinite on the calibration samples")


class _Owners:
    """Which layers read the same tensor: the first of them owns it."""

    def __init__(self) -> None:
        self.alias: dict[str, str] = {}
        # The input that each owner saw last. Weak, so that no activation is kept alive; the version
        # tells a tensor that was changed in place since.
        self._latest: dict[str, tuple[weakref.ref, int]] = {}
        self._by_id: dict[int, str] = {}
        self._started: dict[str, int] = {}

    def of(self, name: str, inputs: Tensor, call: _Call) -> str:
        """Return the owner of what a layer reads, which may be itself.

        Raises
        ------
        UserError
            Where it shares its input with another one on some calls only.
        """
        if name not in self.alias:
            owner = self._by_id.get(id(inputs))
            shared = owner is not None and self._started[owner] == call.before
            self.alias[name] = owner if shared and self._same(owner, inputs) else name
            self._started[name] = call.before
        owner = self.alias[name]
        if owner == name:
            self._latest[name] = (weakref.ref(inputs), inputs._version)
            self._by_id[id(inputs)] = name
        elif not self._same(owner, inputs):
            raise UserError(
                f"{name}: shares its input with {owner} on some samples only: calibrate them one "
                "at a time"
            )
        return owner

    def _same(self, owner: str, inputs: Tensor) -> bool:
        reference, version = self._latest[owner]
        return reference() is inputs and inputs._version == version


def _covariances(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    center: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    import torch

    sums: dict[str, Tensor] = {}
    owners = _Owners()

    def consume(name: str, inputs: Tensor, call: _Call) -> None:
        if owners.of(name, inputs, call) != name:
            return
        rows = call.rows(inputs, center)
        if name not in sums:
            sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        sums[name].addmm_(rows.T, rows)

    _stream(model, samples, layers, consume, "covariance")
    _check_finite(layers, sums)
    with torch.no_grad():
        return {n: matrix.div_(len(samples)) for n, matrix in sums.items()}, owners.alias


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
) -> Iterator[dict[str, Sketch]]:
    """Sketch what the target layers read of all that goes through the model inside.

    So the passes that the sensitivity needs are the sketch's first run, too:

        with sketching(model, targets, r) as start:
            scores = sensitivity(model, samples, targets)
        subspaces = input_subspaces(model, samples, ranks, start=start)

    Parameters
    ----------
    model, target_modules
        As in `tlora.sensitivity`. A call of the model is a sample, or as many as its
        `attention_mask` has rows.
    rank
        What is expected of a module: the mean. A much larger one takes a further run.
    center, seed
        As in `input_subspaces`.

    Yields
    ------
    dict
        Module -> its sketch, which fills up while samples go through.
    """
    layers = find_targets(model, target_modules)
    ranks = {name: min(rank, *weight_matrix(layer).shape) for name, layer in layers.items()}
    sketches = {
        name: _begin(weight_matrix(layers[name]), n, f"{seed}:{name}") for name, n in ranks.items()
    }
    with _listening(model, layers, _first_run(layers, sketches, center)):
        yield sketches


def _sketch(
    model: nn.Module,
    samples: list[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    center: bool,
    seed: int,
    passes: int,
    start: dict[str, Sketch] | None,
    tolerance: float,
) -> dict[str, Tensor]:
    weights = {name: weight_matrix(layer) for name, layer in layers.items()}
    if start is None:
        sketches = {n: _begin(w, ranks[n], f"{seed}:{n}") for n, w in weights.items()}
        receive = _first_run(layers, sketches, center, _WEIGHTED if passes else 0)
        _stream(model, samples, layers, receive, f"sketch, pass 1/{passes + 1}", True)
    else:
        if missing := [name for name in layers if name not in start]:
            raise UserError(f"{missing[0]}: is no target of the sketch to start with")
        sketches = {name: start[name] for name in layers}
        start.clear()
    runs = _runs(weights, ranks, sketches, passes)
    images: dict[str, _Image] = {}
    found: dict[str, Tensor] = {}
    for number in range(runs + 1):
        _check_finite(layers, {name: sketch.sums for name, sketch in sketches.items()})
        for name in list(sketches):
            before = images.pop(name, None)
            probed = number < runs or number == 0
            factor = sketches.pop(name).factor(probed, before and before.factor)
            image = _Image(weights[name], ranks[name], factor, before)
            enough = len(factor.rows) >= ranks[name]
            if number == runs or (enough and _SAFETY * image.missed() <= tolerance):
                found[name] = image.subspace()
                continue
            test = image.aim(f"{seed}:{name}:")
            if number + 1 < runs:
                test = _probed(test, f"{seed}:{name}:{number + 1}")
            sketches[name], images[name] = Sketch(test), image
        del image, factor, before
        if not sketches:
            break

        def receive(name: str, inputs: Tensor, call: _Call) -> None:
            sketches[name].add(call.rows(inputs, center))

        left = {name: layers[name] for name in sketches}
        _stream(model, samples, left, receive, f"sketch, pass {number + 2}/{runs + 1}", True)
    return {name: found[name] for name in layers}


def _runs(
    weights: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    sketches: Mapping[str, Sketch],
    passes: int,
) -> int:
    """Return how many further runs there may be.

    Vectors that a module needs beyond the rows of its start take a run, for which nothing is known
    of where to aim; where they are many, another one makes them as good as the others.
    """
    rows = {name: len(sketch.test) - _PROBES for name, sketch in sketches.items()}
    short = any(ranks[name] > rows[name] for name in rows)
    much = any(
        further_rows(*weights[name].shape, ranks[name]) > _GROWTH * rows[name] for name in rows
    )
    return max(passes, int(short)) + int(short and much)


def _first_run(
    layers: Mapping[str, nn.Module],
    sketches: Mapping[str, Sketch],
    center: bool,
    weighted: int = _WEIGHTED,
) -> Callable[[str, Tensor, _Call], None]:
    """Return what adds an input to its sketch, which turns after 1, 4, 16, ... samples.

    Towards W C where it has seen `weighted` times as many tokens as it has rows: products of all
    rows with W cost what 2 tokens a row do in the model. Towards C before.
    """
    turned: Counter[str] = Counter()

    def receive(name: str, inputs: Tensor, call: _Call) -> None:
        stage = (call.before.bit_length() + 1) // 2  # as many of 1, 4, 16, ... went before
        if stage > turned[name]:
            sketch, turned[name] = sketches[name], stage
            heavy = sketch.tokens >= weighted * len(sketch.test)
            sketch.turn(weight_matrix(layers[name]) if heavy else None)
        sketches[name].add(call.rows(inputs, center))

    return receive


def _begin(weight: Tensor, rank: int, key: str) -> Sketch:
    return Sketch(_probed(_first_test(weight, rank, key), key))


class Sketch:
    """A test matrix G and Y = G C of what was added.

    Parameters
    ----------
    test
        G, (rows, in_features) float32 on the device of what will be added; its last `_PROBES` rows
        may be probes.
    """

    def __init__(self, test: Tensor) -> None:
        self.test, self.sums = test, test.new_zeros(test.shape)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add inputs, (tokens, in_features) float32."""
        self.sums.addmm_((rows @ self.test.T).T, rows)
        self.tokens += len(rows)

    def turn(self, weight: Tensor | None) -> None:
        """Replace G and Y, but for their probes, by G' and Y' = G' C, with C rebuilt from both.

        G' is an orthonormal basis of the rows of Y, or of Y W^T W where a weight is given. Very few
        tokens say too little.
        """
        test, sums = self.test[:-_PROBES], self.sums[:-_PROBES]
        if _FEW * self.tokens < len(test):
            return
        scale = _largest(sums)
        if not scale.isfinite():
            return  # reported, with the module's name, at the end of the run
        sums.div_(scale)
        shift = _root(test, sums, _noise(sums))  # Y is F^T from here on
        if weight is None:
            lower, _ = _cholesky(_product(sums, sums))
            # F^T = L G' with orthonormal G': G' F F^T = L^T F^T
            _combine(_inverse(lower), sums, out=test)
            _combine(lower.T, sums, out=sums)
        else:
            test.copy_(_orthonormal_rows(_times(_times(sums, weight.T), weight)))
            _combine(_product(test, sums), sums, out=sums)
        sums.addcmul_(test, -shift.float()).mul_(scale)

    def factor(self, probed: bool, before: _Factor | None = None) -> _Factor:
        """Return C as the sketch shows it; Y is overwritten.

        Parameters
        ----------
        probed
            Whether the last rows are probes.
        before
            What was known of C: the sketch adds to it.
        """
        import torch

        test, sums = self.test, self.sums
        kept = len(test) - _PROBES if probed else len(test)
        scale = _largest(sums[:kept]) if before is None else before.scale
        sums.div_(scale)
        noise = _noise(sums[:kept])
        if before is not None:  # what is new beside C = F F^T
            sums -= _combine(_product(test, before.rows), before.rows)
        _root(test[:kept], sums[:kept], noise)
        rows = sums[:kept]
        if probed:
            sums[kept:] -= _combine(_product(test[kept:], rows), rows)
        gram = _product(rows, rows)
        if before is not None:
            across = _product(before.rows, rows)
            gram = _bordered(before.gram, across, gram)
            rows = torch.cat([before.rows, rows])
        return _Factor(rows, gram, scale, sums, kept)


class _Factor(NamedTuple):
    """C / scale as F F^T.

    `rows` is F^T and `gram` F^T F in float64. `shown` holds the `new` rows that came last and below
    them what the probes see of C / scale and F F^T does not hold.
    """

    rows: Tensor
    gram: Tensor
    scale: Tensor
    shown: Tensor
    new: int


def _probed(test: Tensor, key: str) -> Tensor:
    """Return a test matrix with further rows that nothing is aimed by: they tell what it misses."""
    import torch

    return torch.cat([test, _random(_PROBES, test.shape[1], f"{key}:probes").to(test)])


def _random(rows: int, columns: int, key: str) -> Tensor:
    """Return normal numbers that the key determines."""
    import torch

    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(rows, columns, generator=generator)


def sketch_rows(out_features: int, in_features: int, rank: int) -> int:
    """Return the rows of a sketch: the rank and an oversampling.

    It is the larger where the input is wide, as that of an MLP's last layer, for its spectrum falls
    the slower over these rows.
    """
    wide = max(1.0, in_features / out_features)
    return min(rank + max(32, math.ceil(wide * rank)), out_features, in_features)


def further_rows(out_features: int, in_features: int, rank: int) -> int:
    """Return the rows of a further run, which is aimed: the rank and a smaller oversampling."""
    return min(rank + max(32, math.ceil(rank / 4)), out_features, in_features)


def _first_test(weight: Tensor, rank: int, key: str) -> Tensor:
    """Return orthonormal random rows: (rank + oversampling, in_features)."""
    rows = _random(sketch_rows(*weight.shape, rank), weight.shape[1], key)
    return _orthonormal_rows(rows.to(weight.device))


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    with _one_thread():
        return torch.linalg.cholesky_ex(matrix)


def _inverse(lower: Tensor) -> Tensor:
    import torch

    return torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)


def _doubled(*matrices: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield columns and their float64 copies, a block at a time that stays in a processor's cache.

    The copies are written to the same memory again and again: fresh memory takes longer than what
    is done with them.
    """
    import torch

    columns = matrices[0].shape[1]
    height = max(len(matrix) for matrix in matrices)
    size = _BLOCK.get(matrices[0].device.type, _BLOCK["cuda"])
    step = min(columns, max(1, size // max(1, height)))
    spaces = [matrix.new_empty(len(matrix) * step, dtype=torch.float64) for matrix in matrices]
    for start in range(0, columns, step):
        block = slice(start, min(start + step, columns))
        shapes = [(len(matrix), block.stop - start) for matrix in matrices]
        copies = [
            space[: math.prod(shape)].view(shape)
            for space, shape in zip(spaces, shapes, strict=True)
        ]
        for copy, matrix in zip(copies, matrices, strict=True):
            copy.copy_(matrix[:, block])
        yield block, copies


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Return one other^T in float64 of float32 rows, without float64 copies of them whole."""
    import torch

    found = one.new_zeros(len(one), len(other), dtype=torch.float64)
    for _, copies in _doubled(one) if other is one else _doubled(one, other):
        found.addmm_(copies[0], copies[-1].T)
    return found


def _combine(factors: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Return factors rows, computed in float64 and rounded to float32; `out` may be `rows`."""
    import torch

    if out is None:
        out = rows.new_empty(len(factors), rows.shape[1])
    space = None
    for block, (copy,) in _doubled(rows):
        if space is None or space.shape[1] != copy.shape[1]:
            space = copy.new_empty(len(factors), copy.shape[1])
        out[:, block] = torch.mm(factors, copy, out=space)
    return out


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
    """Return an orthonormal basis of float32 rows, by matrix products where they allow."""
    import torch

    lower, failed = _cholesky(_product(rows, rows))
    diagonal = lower.diagonal()
    if failed or not diagonal.min() > 1e-6 * diagonal.max():
        return torch.linalg.qr(rows.double().T).Q.T.float().contiguous()
    return _combine(_inverse(lower), rows, out=rows)


def _largest(values: Tensor) -> Tensor:
    """Return the largest magnitude, at least the smallest number that can be divided by."""
    import torch

    return torch.linalg.vector_norm(values, torch.inf).clamp_min(torch.finfo(values.dtype).tiny)


def _bordered(matrix: Tensor, across: Tensor, last: Tensor) -> Tensor:
    """Return the symmetric matrix of these blocks."""
    import torch

    return torch.cat([torch.cat([matrix, across], 1), torch.cat([across.T, last], 1)])


def _noise(sums: Tensor) -> Tensor:
    """Return what lies below the rounding of float32 sums."""
    import torch

    tiny = torch.finfo(torch.float32).tiny
    return (torch.finfo(torch.float32).eps * sums.norm()).clamp_min(tiny).double()


def _root(test: Tensor, sums: Tensor, noise: Tensor) -> Tensor:
    """Write F^T of the Nystrom reconstruction C + v = Y^T (Y G^T)^-1 Y = F F^T over Y; return v.

    Y is a float32 sum: what lies below its rounding is noise, which the inverse would blow up. So C
    is shifted by that much: Y becomes Y + v G.
    """
    import torch

    core = _product(sums, test)
    core = (core + core.T) / 2
    shift = noise
    while True:
        # G's rows are orthonormal to float32: v G G^T = v
        lower, failed = _cholesky(core + shift * torch.eye(len(core)).to(core))
        if not failed:
            break
        shift = 4 * shift
    inverse = _inverse(lower)
    for block, (shifted, also) in _doubled(sums, test):
        shifted.addcmul_(also, shift)
        sums[:, block] = torch.mm(inverse, shifted, out=also)
    return shift


class _Image:
    """W C as a sketch shows it: W F F^T, with F^T F and W F at hand.

    Parameters
    ----------
    weight
        (out_features, in_features).
    rank
        Number of vectors that are asked for.
    factor
        Of C.
    before
        The image of what was known before; `aim` dropped it, and it is made again where it is
        needed, for another further run.
    """

    def __init__(
        self, weight: Tensor, rank: int, factor: _Factor, before: _Image | None = None
    ) -> None:
        import torch

        self.weight, self.rank, self.factor = weight, rank, factor
        shown = _times(factor.shown, weight.T)
        self.image, self.thrown = shown[: factor.new], shown[factor.new :]
        self.core = _product(self.image, self.image)
        if before is not None:
            across = _product(before.factor.rows, _times(self.image, weight))
            self.core = _bordered(before.core, across, self.core)
            if len(self.thrown):
                self.image = torch.cat([_times(before.factor.rows, weight.T), self.image])

    @functools.cached_property
    def right(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return L of F^T F = L L^T, the squared singular values of W F F^T, falling, and its right
        singular vectors V in the basis L^-1 F^T, which is orthonormal.

        W F F^T = (L^T F^T W^T)^T (L^-1 F^T): they are those of a small matrix.
        """
        import torch

        gram = self.factor.gram
        ridge = (_RIDGE * gram.diagonal().max()).clamp_min(torch.finfo(gram.dtype).tiny)
        lower, _ = _cholesky(gram + ridge * torch.eye(len(gram)).to(gram))
        # on the host, where small matrices take the least time
        small = (lower.T @ self.core @ lower).cpu()
        with _one_thread():
            values, vectors = torch.linalg.eigh(small / _largest(small))
        values = values.flip(0).clamp_min(0) * _largest(small)
        return lower, values.to(lower.device), vectors.flip(1).to(lower.device)

    def subspace(self) -> Tensor:
        """Return the top right singular vectors as `input_subspaces` does."""
        import torch

        lower, _, vectors = self.right
        turn = torch.linalg.solve_triangular(lower.T, vectors[:, : self.rank], upper=True)
        return _finish(_orthonormal_rows(_combine(turn.T, self.factor.rows)))

    @functools.cached_property
    def left(self) -> Tensor:
        """Return the top left singular vectors as rows, (`further_rows`, out_features) float64.

        Those of no strength are zero; there are no more than rows of the factor.
        """
        import torch

        lower, values, vectors = self.right
        count = further_rows(*self.weight.shape, self.rank)
        values = values[:count]
        scale = torch.where(values > _NONE * values[0], values.rsqrt(), 0)
        return (lower @ (vectors[:, :count] * scale)).T @ self.image.double()

    def missed(self) -> float:
        """Return an estimate of the share of the energy ||W C A^T||^2 that is missed.

        With E = C - F F^T and U the left singular vectors that were found, perturbation theory
        gives a loss of about ||U^T W E||^2, to second order. Beside it counts what W E holds
        elsewhere, where single directions of it are stronger than the weakest that were found: U
        is blind to them. Both are means over the probes, normal rows. On spectra that fall it was
        half to nine tenths of what was missed, on flat ones at least a third.
        """
        import torch

        values = self.right[1][: self.rank]
        left = self.left[: self.rank].T
        thrown = self.thrown.double()
        inside = thrown @ left
        elsewhere = thrown - inside @ left.T
        strengths = torch.linalg.eigvalsh((elsewhere @ elsewhere.T).cpu())
        # what all probes see about alike is the sum of many weak directions: nothing stands out as
        # far above the middle as this reaches, twice what the least lies below it
        middle = strengths.median()
        strong = (strengths - middle - 2 * (middle - strengths[0])).flip(0) / len(thrown)
        weakest = values.flip(0)[: len(strong)].cpu()
        swapped = (strong[: len(weakest)] - weakest).clamp_min(0).sum()
        lost = inside.pow(2).sum().cpu() / len(thrown) + swapped
        return (lost / values.sum().cpu().clamp_min(_TINY)).item()

    def aim(self, key: str) -> Tensor:
        """Return the next run's test matrix G: an orthonormal basis of U^T W and of random rows.

        U holds the top left singular vectors, a few more than are asked for, and what the probes
        see beyond: of the true ones, G C would hold the right singular vectors of W C. As many as
        are asked for and were not found take random rows. What the next run does not build on is
        dropped: it would wait for it in memory.
        """
        import torch

        count = further_rows(*self.weight.shape, self.rank)
        left = self.left.float()
        if self.thrown.any() and count + len(self.thrown) <= min(self.weight.shape):
            left = torch.cat([left, torch.nn.functional.normalize(self.thrown, eps=1e-30)])
        test = _times(left, self.weight)
        if (fresh := count - len(self.left)) > 0:
            random = _random(fresh, test.shape[1], key).to(test)
            test = torch.cat([test, random * (test.norm() / random.norm())])
        del self.image, self.thrown, self.left, self.right
        return _orthonormal_rows(test)
