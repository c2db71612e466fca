"""Pickles of pixels and labels, as strangers hand them out: read without running anything they name."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

WAY_OUT = "unpack the official archive again"


class DataError(ValueError):
    """A data folder that cannot be used: one line with the path, what is wrong and the way out."""


def read_inert(path: Path, content: bytes) -> Any:
    """What the pickle at `path` holds: containers and numbers; arrays for `bytes_of`. Raises DataError for others."""
    try:
        _refuse_bombs(content)
        return _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    # A damaged or hostile stream can raise anything: KeyError, TypeError, MemoryError and more.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path}: not a pickle that can be read safely ({reason}); {WAY_OUT}") from error


def bytes_of(array: Any) -> tuple[Any, bytes | bytearray]:
    """The shape that a uint8 array in C order claims, and its bytes; None and none for anything else."""
    match array:
        # As ndarray.__reduce__ writes it, protocols 0 to 4: (version, shape, dtype, is Fortran ordered, bytes).
        case _Inert("_reconstruct", _, (int(), shape, _Inert("dtype", ("u1" | b"u1", *_)), False, bytes(pixels))):
            return shape, pixels
        # The same for protocol 5.
        case _Inert("_frombuffer", (bytes() | bytearray() as pixels, _Inert("dtype", ("u1", *_)), shape, "C")):
            return shape, pixels
    return None, b""


def _refuse_bombs(content: bytes) -> None:
    """An unpickler sets aside as much memory as a few bytes of a stream say: here they must not exceed the stream.

    Walking through the operations reads their arguments only as far as there are any, and sets nothing aside.
    """
    for operation, argument, _ in pickletools.genops(content):
        if "PUT" in operation.name and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {argument} in {len(content)} bytes")


class _InertUnpickler(pickle.Unpickler):
    """Reads plain containers and numbers; the names that a numpy array needs become inert records of their use.

    NumPy itself is never called: its `__setstate__` methods trust their input, which here is a stranger's.
    """

    def find_class(self, module: str, name: str) -> _Inert:
        if f"{module}.{name}" not in ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it names the forbidden global {f'{module}.{name}'!r}")
        return _Inert(name)


ARRAY_GLOBALS = {
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
}


class _Inert:
    """Stands where a pickle names a global: keeps the arguments of a call and the state that is set, runs nothing.

    The exception is `_codecs.encode(text, "latin1")`, how Python 3 writes bytes into the pickles of protocols 0 to 2.
    """

    __slots__ = __match_args__ = ("name", "args", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args, self.state = name, args, None

    def __call__(self, *args: Any) -> bytes | _Inert:
        return args[0].encode("latin1") if self.name == "encode" else _Inert(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state
