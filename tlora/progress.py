"""Progress bars for people at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a tqdm bar on stderr that is silent where stderr is no terminal.

    Parameters
    ----------
    iterable
        What to iterate over; None for a bar moved by hand with `update`.
    options
        Passed to `tqdm.tqdm` (total, desc, unit, ...).
    """
    from tqdm import tqdm

    options.setdefault("dynamic_ncols", True)
    options.setdefault("leave", False)
    return tqdm(iterable, file=sys.stderr, disable=not sys.stderr.isatty(), **options)
