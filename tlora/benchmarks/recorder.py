"""A program that calls a function on inputs and writes down what it returns.

It runs in a sandbox and imports nothing of this package. It never sees what should be returned: a
verdict is reached elsewhere from what is written here, so code that takes this process over can
write down wrong values, but not that they are right.

Standard input: a line of JSON with `code`, `entry_point` and `seconds` (processor time for each
call), then a line for each call with its arguments. Standard output: a line `ready`; then for each
call its processor time, a tab and the value; the first call that fails is the last, without a tab
and a value: `time` or `error`.

Of a large value only a digest is written, which equal values share (one reference solution of MBPP+
returns 128 million texts); not of numbers that are compared with a tolerance.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

WAITING = 10
"""Seconds that a call may take, for each second of processor time it may use."""

LARGE = 1 << 16
"""Size, in bytes as `_room` counts them, above which a value is large."""

_SMALL = 1 << 63
_AS_THEY_ARE = frozenset({type(None), bool, float, str})
_BASES = (int, float, complex, str, bytes, tuple, list, dict, set, frozenset)


class TimeUp(BaseException):
    """A call used up its time. Not an Exception, which code often catches."""


class Opaque:
    """Stands for a value that is no plain data: equal to nothing, and not None."""


class Large:
    """Stands for a large value, and is equal to what that is equal to."""

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def __eq__(self, other: object) -> bool:
        return self.digest == (other.digest if isinstance(other, Large) else digest(other))

    __hash__ = None


class _Int(int):
    """An integer of another type, or a bool."""


class _Float(float):
    pass


class _Complex(complex):
    pass


class _Str(str):
    pass


class _Bytes(bytes):
    pass


class _Tuple(tuple):
    pass


class _List(list):
    pass


class _Dict(dict):
    pass


class _Set(set):
    pass


class _FrozenSet(frozenset):
    pass


_OTHERS = (_Int, _Float, _Complex, _Str, _Bytes, _Tuple, _List, _Dict, _Set, _FrozenSet)
_OTHER = {bool: _Int, **dict(zip(_BASES, _OTHERS, strict=True))}


def encode(value: Any) -> Any:
    """Return a value as JSON's data; what is no plain data keeps only that it is a value.

    A value of a subclass (a Counter, a named tuple) or a scalar of numpy keeps what it is equal to,
    and that it is of another type.
    """
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"int": hex(value)}
    if kind is list:
        return [item if type(item) in _AS_THEY_ARE else encode(item) for item in value]
    if kind is tuple or kind is set or kind is frozenset:
        return {kind.__name__: encode(list(value))}
    if kind is dict:
        return {"dict": [encode(list(value)), encode(list(value.values()))]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    for base in _BASES:
        if isinstance(value, base):
            return {"other": encode(base(value))}
    if (scalar := _scalar(value)) is not value:
        return {"other": encode(scalar)}
    return {"opaque": kind.__name__}


def brief(value: Any) -> Any:
    """Return what `encode` does, of a large value that no tolerance applies to its digest."""
    if _room(value, LARGE) >= 0 or _is_floats(value):
        return encode(value)
    return {"large": digest(value)}


def digest(value: Any) -> str:
    """Return a checksum that equal values share, whatever their types; not a secret."""
    total = hashlib.sha256()
    _feed(value, total.update)
    return total.hexdigest()


def _is_floats(value: Any) -> bool:
    """Tell whether EvalPlus compares with a value like this with a tolerance."""
    return type(value) in (list, tuple) and set(map(type, value)) == {float}


def _room(value: Any, room: int) -> int:
    """Return what is left of a room when a value is in it; equal values need equal room."""
    if isinstance(value, str | bytes):
        return room - len(value)
    if isinstance(value, int):
        return room - max(8, value.bit_length() // 8)
    if isinstance(value, dict):
        return _room(list(value.values()), _room(list(value), room))
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            room = _room(item, room)
            if room < 0:
                break
        return room
    return room - 8


def _feed(value: Any, feed: Callable[[bytes], Any]) -> None:
    """Feed a hash with the same bytes for equal values."""
    value = _scalar(value)
    if isinstance(value, list | tuple):
        feed(b"[" if isinstance(value, list) else b"(")
        for kind, run in _runs(value):
            if kind is str:
                feed(json.dumps(run).encode())
            elif kind is int:
                feed(",".join(map(_number, run)).encode())
            else:
                for item in run:
                    _feed(item, feed)
            feed(b";")
        feed(b"]")
    elif isinstance(value, dict):
        feed(b"d")
        for part in sorted(map(digest, value.items())):
            feed(part.encode())
    elif isinstance(value, set | frozenset):
        feed(b"s")
        for part in sorted(map(digest, value)):
            feed(part.encode())
    elif isinstance(value, str):
        feed(json.dumps(value).encode())
    elif isinstance(value, bytes):
        feed(b"b" + value.hex().encode())
    elif isinstance(value, int | float | complex):
        feed(_number(value).encode())
    else:
        # What is no plain data equals nothing.
        feed(b"null" if value is None else os.urandom(16))


def _runs(values: list[Any] | tuple[Any, ...]) -> list[tuple[type | None, list[Any]]]:
    """Split values into runs of texts, of numbers and of others; alike for equal values."""
    kinds = set(map(type, values))
    if kinds <= {str}:
        return [(str, list(values))]
    if kinds <= {int, float, bool}:
        return [(int, list(values))]
    grouped = itertools.groupby(map(_scalar, values), _kind)
    return [(kind, list(run)) for kind, run in grouped]


def _kind(value: Any) -> type | None:
    if isinstance(value, str):
        return str
    return int if isinstance(value, int | float | complex) else None


def _scalar(value: Any) -> Any:
    """Return numpy's scalars as Python's, and anything else as it is."""
    numpys = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if numpys else value


def _number(value: complex) -> str:
    """Return the same text for equal numbers."""
    if isinstance(value, complex):
        if value.imag:
            return f"{_number(value.real)}j{_number(value.imag)}"
        value = value.real
    whole = isinstance(value, int) or (math.isfinite(value) and value.is_integer())
    return hex(int(value)) if whole else repr(float(value))


def decode(text: str | bytes) -> Any:
    """Return the value of JSON text that holds what `encode` returned.

    Raises
    ------
    Exception
        For text that no value is encoded as, of many types.
    """
    return json.loads(text, object_hook=_revived)


def _revived(encoded: dict[str, Any]) -> Any:
    ((kind, content),) = encoded.items()
    if kind == "int":
        return int(content, 16)
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](content)
    if kind == "dict":
        return dict(zip(*content, strict=True))
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "other":
        return _OTHER[type(content)](content)
    if kind == "large":
        return Large(content)
    if kind == "opaque":
        return Opaque()
    raise ValueError(f"{kind!r}: no kind of value")


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in a block that uses more processor time, or waits too long."""

    def stop(number: int, frame: object) -> None:
        raise TimeUp

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    # Again and again: code that catches everything catches one.
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds / 10)
    signal.setitimer(signal.ITIMER_REAL, seconds * WAITING, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Do what the module's text says."""
    head, *calls = sys.stdin.buffer.read().splitlines()
    task = json.loads(head)
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    print("ready", file=out, flush=True)
    random.seed(0)
    try:
        names: dict[str, Any] = {}
        with limited(max(task["seconds"])):
            exec(task["code"], names)
            function = names[task["entry_point"]]
        for call, seconds in zip(calls, task["seconds"], strict=True):
            arguments = decode(call)
            start = time.process_time()
            with limited(seconds):
                value = function(*arguments)
            used = time.process_time() - start
            print(f"{used:.6f}\t{json.dumps(brief(value))}", file=out, flush=True)
    except BaseException as error:
        print("time" if isinstance(error, TimeUp) else "error", file=out, flush=True)
    # Nothing that the code left behind has a say in how this ends.
    os._exit(0)


if __name__ == "__main__":
    main()
