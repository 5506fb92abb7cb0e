"""From sensitivities to the rank and the scaling of every module (Eqs. 6 and 7); torch-free."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from tlora.errors import UserError

logger = logging.getLogger(__name__)

VARIANTS = ("paper", "released")


@dataclass(frozen=True)
class ModuleAllocation:
    """What one module gets.

    Parameters
    ----------
    rank
        Rank of the adapter; 0 means no adapter.
    alpha
        The method's alpha: Eq. 7 in the variant "paper"; a_i in the variant "released", which
        divides it by the configured r and not by the rank.
    scaling
        What B A is multiplied with in the forward pass.
    shape
        (out_features, in_features).
    sensitivity
        S the module was given.
    """

    rank: int
    alpha: float
    scaling: float
    shape: tuple[int, int]
    sensitivity: float

    @property
    def peft_alpha(self) -> float:
        """PEFT's `lora_alpha` of this module: it divides it by the rank to get the scaling."""
        return self.scaling * self.rank


@dataclass(frozen=True)
class Allocation(Mapping[str, ModuleAllocation]):
    """Rank, alpha and scaling of every target module, by full module name."""

    variant: str
    r: int
    lora_alpha: float
    modules: dict[str, ModuleAllocation]

    def __getitem__(self, name: str) -> ModuleAllocation:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name, zeros included."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def budget(self) -> dict[str, int]:
        """Counts of what was asked for and given.

        `rank_budget` is modules * r, `rank_sum` what the modules got, `unplaced` what no module
        could hold because every rank is at its cap; `parameters_*` count A and B of all adapters.
        """
        given = list(self.modules.values())
        capacity = sum(min(module.shape) for module in given)
        a = sum(module.rank * module.shape[1] for module in given)
        b = sum(module.rank * module.shape[0] for module in given)
        return {
            "modules": len(given),
            "adapted_modules": sum(module.rank > 0 for module in given),
            "rank_budget": len(given) * self.r,
            "rank_sum": sum(module.rank for module in given),
            "unplaced": max(0, len(given) * self.r - capacity),
            "parameters_a": a,
            "parameters_b": b,
            "parameters_with_a": a + b,
            "parameters_without_a": b,
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain builtins; `from_json` reads them back to an equal allocation."""
        modules = {name: asdict(module) for name, module in self.modules.items()}
        for module in modules.values():
            module["shape"] = list(module["shape"])
        return {
            "variant": self.variant,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "modules": modules,
            "budget": self.budget,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Allocation:
        """Build the allocation that `to_json` wrote."""
        try:
            modules = {
                name: ModuleAllocation(**{**module, "shape": tuple(module["shape"])})
                for name, module in value["modules"].items()
            }
            return cls(value["variant"], value["r"], value["lora_alpha"], modules)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"allocation: not written by this version: {error}") from error


def allocate(
    sensitivity: Mapping[str, float],
    r: int,
    lora_alpha: float,
    shapes: Mapping[str, tuple[int, int]],
    variant: str = "paper",
    rank: bool = True,
    scale: bool = True,
) -> Allocation:
    """Share out the rank budget L * r and the scalings by sensitivity.

    With share_i = S_i / sum S over L modules, the variant "paper" gives

        rank_i = round(L r share_i),  alpha_i = rank_i (L alpha / r) share_i

    so that the scaling alpha_i / rank_i is (alpha / r) S_i / mean S whatever the rank. The variant
    "released" moves the module of the largest rank (among equals the most sensitive one) one by
    one until the ranks sum to L r, and has alpha_i = max(alpha, round(L alpha share_i)) with the
    scaling alpha_i / r. Halves are rounded to even in exact arithmetic. Afterwards every rank
    is capped at min(out, in); what is over goes to the most sensitive module that has room, then to
    the next one. Where every module is full the rest is dropped: see `Allocation.budget`.

    Parameters
    ----------
    sensitivity
        S by module name, finite and not negative.
    r, lora_alpha
        Mean rank and its alpha, as one would give them to LoRA.
    shapes
        (out_features, in_features) of the same modules.
    variant
        "paper" or "released".
    rank
        False gives every module the rank r (the scaling alone is allocated).
    scale
        False gives every module the scaling lora_alpha / r (the rank alone is allocated).

    Raises
    ------
    UserError
        For values out of range, NaN, sensitivities that are all 0, or shapes of other modules.

    References
    ----------
    arXiv 2604.18124, Eqs. 6 and 7; the repository Rambo-Yi/TLoRA at e3463ae.
    """
    _check(sensitivity, r, lora_alpha, shapes, variant)
    count = len(sensitivity)
    exact = {name: Fraction(float(value)) for name, value in sensitivity.items()}
    total = sum(exact.values())
    # Times the number of modules: 1 is the mean sensitivity.
    relative = {name: count * value / total for name, value in exact.items()}
    by_sensitivity = sorted(exact, key=exact.__getitem__, reverse=True)

    ranks = {name: round(r * share) if rank else r for name, share in relative.items()}
    if rank and variant == "released":
        _settle(ranks, count * r, by_sensitivity)
    _cap(ranks, {name: min(shapes[name]) for name in ranks}, by_sensitivity)

    modules = {}
    for name, share in relative.items():
        if variant == "paper":
            factor = float(share) if scale else 1.0
            scaling = lora_alpha / r * factor
            alpha = scaling * ranks[name]
            # What PEFT will compute, to the last bit.
            scaling = alpha / ranks[name] if ranks[name] else scaling
        else:
            alpha = max(lora_alpha, round(Fraction(lora_alpha) * share)) if scale else lora_alpha
            scaling = alpha / r
        modules[name] = ModuleAllocation(
            rank=ranks[name],
            alpha=alpha,
            scaling=scaling,
            shape=tuple(int(size) for size in shapes[name]),
            sensitivity=float(sensitivity[name]),
        )
    allocation = Allocation(variant, r, lora_alpha, modules)
    if allocation.budget["unplaced"]:
        logger.warning(
            "r=%d asks for a rank sum of %d; the modules can hold %d",
            r,
            allocation.budget["rank_budget"],
            allocation.budget["rank_sum"],
        )
    return allocation


def _check(
    sensitivity: Mapping[str, float],
    r: int,
    lora_alpha: float,
    shapes: Mapping[str, tuple[int, int]],
    variant: str,
) -> None:
    if variant not in VARIANTS:
        raise UserError(f"variant: {variant!r}: expected one of {', '.join(VARIANTS)}")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UserError(f"r: {r!r}: expected a whole number of at least 1")
    if not isinstance(lora_alpha, (int, float)) or not 0 < lora_alpha < math.inf:
        raise UserError(f"lora_alpha: {lora_alpha!r}: expected a number above 0")
    if not sensitivity:
        raise UserError("sensitivity: empty: expected at least one module")
    if sensitivity.keys() != shapes.keys():
        name = sorted(sensitivity.keys() ^ shapes.keys())[0]
        raise UserError(f"{name}: expected it in both the sensitivities and the shapes")
    for name, value in sensitivity.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name}: sensitivity {value}: expected a finite number, at least 0")
    if not any(sensitivity.values()):
        raise UserError("sensitivity: 0 for every module: nothing to share the ranks by")


def _settle(ranks: dict[str, int], budget: int, by_sensitivity: list[str]) -> None:
    """Move the largest rank one by one until the sum is `budget`."""
    while (missing := budget - sum(ranks.values())) != 0:
        # max() keeps the first of equals: the most sensitive.
        largest = max(by_sensitivity, key=ranks.__getitem__)
        ranks[largest] += 1 if missing > 0 else -1


def _cap(ranks: dict[str, int], caps: dict[str, int], by_sensitivity: list[str]) -> None:
    """Cut ranks to their caps and hand what is over down the list."""
    excess = 0
    for name, cap in caps.items():
        excess += max(0, ranks[name] - cap)
        ranks[name] = min(ranks[name], cap)
    for name in by_sensitivity:
        given = min(excess, caps[name] - ranks[name])
        ranks[name] += given
        excess -= given
