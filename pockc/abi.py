"""The runtime's C ABI (runtime/include/pockc/runtime.h) through ctypes: types, signatures, finding the library."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pockc.errors import InternalError, UserError
from pockc.halves import is_half
from pockc.ir import DTYPES, NUMPY_DTYPES, Array

MAX_RANK = 8
INPUT, OUTPUT, STATE = 0, 1, 2  # pk_role
NOT_FOUND, INTERNAL = 2, 9  # pk_status
DTYPE_NAMES = tuple(name for name in DTYPES if not is_half(name))  # index: pk_dtype


class Tensor(ctypes.Structure):
    """``pk_tensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * MAX_RANK),
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions in use."""
        return tuple(self.dims[: self.rank])

    @property
    def numpy_dtype(self) -> Any:
        """The element type as numpy calls it."""
        return np.dtype(NUMPY_DTYPES[DTYPE_NAMES[self.dtype]])

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """A view of a contiguous array, which must outlive it."""
        code = [np.dtype(NUMPY_DTYPES[name]) for name in DTYPE_NAMES].index(array.dtype)
        dims = (ctypes.c_int64 * MAX_RANK)(*array.shape)
        return cls(array.ctypes.data, code, array.ndim, dims)


class Options(ctypes.Structure):
    """``pk_session_options``."""

    _fields_ = (("threads", ctypes.c_int32), ("use_ref_only", ctypes.c_int32))


class Memory(ctypes.Structure):
    """``pk_memory``."""

    _fields_ = (
        ("arena_bytes", ctypes.c_uint64),
        ("state_bytes", ctypes.c_uint64),
        ("mapped_bytes", ctypes.c_uint64),
        ("used_peak_bytes", ctypes.c_uint64),
    )


_TEXT, _HANDLE, _INT = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32
_NAMES, _TENSORS = ctypes.POINTER(_TEXT), ctypes.POINTER(Tensor)
_SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "pk_version": (_TEXT, ()),
    "pk_status_string": (_TEXT, (ctypes.c_int,)),
    "pk_last_error": (_TEXT, ()),
    "pk_program_load": (ctypes.c_int, (_TEXT, ctypes.POINTER(_HANDLE))),
    "pk_program_free": (None, (_HANDLE,)),
    "pk_program_metadata": (_TEXT, (_HANDLE,)),
    "pk_program_tensor": (ctypes.c_int, (_HANDLE, _TEXT, ctypes.c_int, _INT, ctypes.POINTER(_TEXT), _TENSORS)),
    "pk_session_create": (ctypes.c_int, (_HANDLE, ctypes.POINTER(Options), ctypes.POINTER(_HANDLE))),
    "pk_session_free": (None, (_HANDLE,)),
    "pk_session_input": (ctypes.c_int, (_HANDLE, _TEXT, _TEXT, _TENSORS)),
    "pk_session_run": (ctypes.c_int, (_HANDLE, _TEXT, _NAMES, _TENSORS, _INT, _NAMES, _TENSORS, _INT)),
    "pk_session_read_state": (ctypes.c_int, (_HANDLE, _TEXT, _TENSORS)),
    "pk_session_write_state": (ctypes.c_int, (_HANDLE, _TEXT, _TENSORS)),
    "pk_session_save": (ctypes.c_int, (_HANDLE, _TEXT, _TEXT)),
    "pk_session_load": (ctypes.c_int, (_HANDLE, _TEXT, ctypes.POINTER(_TEXT))),
    "pk_session_memory": (ctypes.c_int, (_HANDLE, ctypes.POINTER(Memory))),
}


def runtime_file(name: str) -> Path:
    """Where a file of the built runtime (``libpockrt.so``, ``pock-run``) is.

    An installed package has it in ``pockc/_lib``; an editable one in the same folder of site-packages, or in the build
    folder of the clone.

    Raises:
        UserError: the runtime has not been built.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "_lib" / name]
    candidates += [Path(entry) / "pockc" / "_lib" / name for entry in sys.path if entry]
    built = sorted((package.parent / "build").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, reverse=True)
    candidates += [path for path in built if path.parent.name != "asan"]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(
            f"the compiled runtime ({name}) is not there",
            instead="Build it with `make setup` in a clone, or install pockc with a C++17 compiler at hand.",
        )
    return found


@cache
def library() -> ctypes.CDLL:
    """The runtime, loaded once. Raises UserError where it is missing or does not fit this machine."""
    path = runtime_file("libpockrt.so")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            f"cannot load {path}: {error}", instead="Build it again on this machine: `make setup`."
        ) from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def text(raw: bytes | None) -> str:
    """A string of the runtime, which may quote bytes of a damaged file."""
    return (raw or b"").decode(errors="backslashreplace")


def check(status: int) -> None:
    """Turn a status into an error that has the runtime's sentence."""
    if status == 0:
        return
    message = text(library().pk_last_error()) or text(library().pk_status_string(status))
    if status == INTERNAL:
        raise InternalError(f"the runtime failed: {message}")
    raise UserError(message)


def names(values: Sequence[str]) -> Any:
    """A ``const char* const*``."""
    return (_TEXT * len(values))(*(value.encode() for value in values))


def tensors(arrays: Sequence[Array]) -> Any:
    """A ``const pk_tensor*``; the arrays must outlive it."""
    return (Tensor * len(arrays))(*map(Tensor.of, arrays))
