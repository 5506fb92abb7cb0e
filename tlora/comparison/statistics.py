"""The few statistics that a table of runs needs, on plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


class Summary(NamedTuple):
    """Mean and spread of one number over runs.

    Attributes
    ----------
    mean
        Arithmetic mean; None where there is no run.
    std
        Sample standard deviation (n - 1); None with fewer than two runs.
    count
        The number of runs.
    """

    mean: float | None
    std: float | None
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation of `values`, independent of their order.

    >>> summarise([0.2, 0.4])
    Summary(mean=0.30000000000000004, std=0.14142135623730953, count=2)
    >>> summarise([0.5])
    Summary(mean=0.5, std=None, count=1)
    """
    count = len(values)
    if count == 0:
        return Summary(None, None, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Summary(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Summary(mean, math.sqrt(variance), count)


def wilson_half_width(share: float, n: int, z: float = Z95) -> float:
    """Half the width of the Wilson score interval of a share seen on `n` items.

    It says how far the share of correct answers of one run may lie from what the same run would
    reach on endlessly many items of this kind; it knows nothing of seeds. Unlike the normal
    approximation it does not vanish at 0 and 1.

    Parameters
    ----------
    share
        Between 0 and 1.
    n
        Number of items, at least 1.
    z
        Normal quantile; the default gives 95 %.

    Raises
    ------
    ValueError
        When `share` or `n` is out of range.

    References
    ----------
    E. B. Wilson (1927), Probable inference, the law of succession, and statistical inference.

    >>> round(wilson_half_width(0.5, 164), 3)
    0.076
    """
    if not 0.0 <= share <= 1.0 or n < 1:
        raise ValueError(f"share {share!r} of {n!r} items: expected 0 <= share <= 1 and n >= 1")
    spread = math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return z / (1 + z * z / n) * spread
