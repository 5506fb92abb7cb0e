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
    """Stands for a large value: equal to what stands for an equal one."""

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Large) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


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
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return {"other": encode(value.item())}
    return {"opaque": kind.__name__}


def brief(value: Any) -> Any:
    """Return what `encode` does, of a large value that no tolerance applies to its digest."""
    if _room(value, LARGE) >= 0 or _is_floats(value):
        return encode(value)
    digest = hashlib.sha256()
    _digest(value, digest.update)
    return {"large": digest.hexdigest()}


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


def _digest(value: Any, feed: Callable[[bytes], Any]) -> None:
    """Feed a hash with the same bytes for equal values."""
    if isinstance(value, list | tuple):
        feed(b"[" if isinstance(value, list) else b"(")
        kinds = set(map(type, value))
        if kinds == {str}:
            feed(json.dumps(value).encode())
        elif kinds <= {int, float, bool}:
            feed(",".join(map(_number, value)).encode())
        else:
            for item in value:
                _digest(item, feed)
                feed(b",")
        feed(b"]")
    elif isinstance(value, dict | set | frozenset):
        feed(b"d" if isinstance(value, dict) else b"s")
        for part in sorted(map(_own_digest, value.items() if isinstance(value, dict) else value)):
            feed(part)
    elif isinstance(value, str):
        feed(json.dumps(value).encode())
    elif isinstance(value, bytes):
        feed(b"b" + value.hex().encode())
    elif isinstance(value, complex) and value.imag:
        feed(f"{_number(value.real)}j{_number(value.imag)}".encode())
    elif isinstance(value, int | float | complex):
        feed(_number(value.real).encode())
    elif value is None:
        feed(b"null")
    else:
        plain = encode(value)
        # What is no plain data equals nothing.
        opaque = isinstance(plain, dict) and "opaque" in plain
        feed(os.urandom(16)) if opaque else _digest(plain["other"], feed)


def _own_digest(value: Any) -> bytes:
    digest = hashlib.sha256()
    _digest(value, digest.update)
    return digest.digest()


def _number(value: int | float) -> str:
    """Return the same text for equal numbers."""
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
