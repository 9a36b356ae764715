"""Runs single kernels of the native runtime on numpy arrays, through the library of runtime/test/kernel_shim.cpp.

The library is built on first use, into build/test-kernels: from the kernels that `make setup` compiled, where they are
newer than their sources. The environment variable POCKC_KERNEL_SHIM names another one, such as a build with sanitizers.
Operands live in malloc'ed blocks of exactly their size, so that a sanitizer sees every access outside them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pockc.artifact_writer import DTYPE_CODES, flatten
from pockc.ir import DTYPES, NUMPY_DTYPES, Array, TensorType, dtype_of
from pockc.ops import complete_attributes

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "build" / "test-kernels"
OK, INVALID_ARGUMENT, NOT_FOUND, BAD_FILE, UNSUPPORTED = 0, 1, 2, 4, 6
ENTRY_ENDS = 15  # of a gate, and never seen outside of the runtime
WORKSPACE_BYTES = 1 << 24  # enough for every sample
# Behind scratch memory, and looked at after each call; a sanitizer sees writes to what is not allocated.
GUARD_BYTES = 0 if "POCKC_KERNEL_SHIM" in os.environ else 1 << 14
GUARD = 0xA5


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("ints", ctypes.POINTER(ctypes.c_int64)),
        ("floats", ctypes.POINTER(ctypes.c_double)),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("int_count", ctypes.c_int32),
        ("float_count", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("threads", ctypes.c_int32),
        ("check_only", ctypes.c_int32),
    )


class Block:
    """Memory at a multiple of 64 bytes, as every tensor of an arena; owned, freed with the object."""

    def __init__(self, nbytes: int) -> None:
        self._address = ctypes.c_void_p()
        self._free = _libc().free
        if _libc().posix_memalign(ctypes.byref(self._address), ctypes.c_size_t(64), ctypes.c_size_t(nbytes)) != 0:
            raise MemoryError(nbytes)
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))

    @property
    def address(self) -> int:
        assert self._address.value is not None
        return self._address.value

    def __del__(self) -> None:
        self._free(self._address)

    def view(self, type_: TensorType) -> Array:
        """The block as an array of that type."""
        array: Array = self.bytes.view(NUMPY_DTYPES[type_.dtype]).reshape(type_.shape)
        return array


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


@cache
def _shim() -> ctypes.CDLL:
    path = os.environ.get("POCKC_KERNEL_SHIM") or str(_build())
    return ctypes.CDLL(path)


def _build() -> Path:
    kernels = installed("libpockrt_static.a")
    if kernels is None:
        return build_target("kernel_shim").parent / "test" / "libkernel_shim.so"
    source, library = ROOT / "runtime" / "test" / "kernel_shim.cpp", SHARED / "libkernel_shim.so"
    folders = [word for name in ("include", "src", "kernels") for word in ("-I", str(ROOT / "runtime" / name))]
    with _alone():
        if not library.exists() or library.stat().st_mtime < max(kernels.stat().st_mtime, source.stat().st_mtime):
            flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
            _command("c++", *flags, *folders, "-o", f"{library}.new", str(source), str(kernels))
            Path(f"{library}.new").replace(library)
    return library


def installed(name: str) -> Path | None:
    """A file of the build that was installed, if there is one that is newer than all sources of the runtime."""
    sources = (path for path in (ROOT / "runtime").rglob("*") if path.is_file() and "test" not in path.parts)
    newest = max(path.stat().st_mtime for path in sources)
    found = (path for path in (ROOT / "build").glob(f"py3-none-*/{name}") if path.stat().st_mtime > newest)
    return next(found, None)


@contextmanager
def _alone() -> Iterator[None]:
    """Parallel test processes wait for each other."""
    SHARED.mkdir(parents=True, exist_ok=True)
    with (SHARED / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_target(name: str, *options: str) -> Path:
    """Build a target of the runtime where it is out of date.

    Returns:
        Where a program of that name is.
    """
    with _alone():
        _command("cmake", "-S", str(ROOT / "runtime"), "-B", str(SHARED), "-DCMAKE_BUILD_TYPE=Release", *options)
        _command("cmake", "--build", str(SHARED), "--target", name, "-j", "2")
    return SHARED / name


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def _tensors(types: Sequence[TensorType], blocks: Sequence[Block] | None) -> Any:
    array = (_Tensor * max(1, len(types)))()
    for i, type_ in enumerate(types):
        array[i].dtype = DTYPE_CODES.index(type_.dtype)
        array[i].rank = len(type_.shape)
        array[i].dims[: min(8, len(type_.shape))] = type_.shape[:8]
        array[i].data = blocks[i].address if blocks is not None else None
    return array


def _record(
    types: tuple[Sequence[TensorType], Sequence[TensorType]],
    attributes: tuple[Sequence[int], Sequence[float]],
    blocks: tuple[Sequence[Block], Sequence[Block]] | None,
    workspace: Block | None,
    workspace_bytes: int,
    threads: int,
) -> _Call:
    """The arguments of the shim; without blocks the call is only checked."""
    (inputs, outputs), (ints, floats) = types, attributes
    return _Call(
        inputs=_tensors(inputs, blocks[0] if blocks else None),
        outputs=_tensors(outputs, blocks[1] if blocks else None),
        ints=(ctypes.c_int64 * max(1, len(ints)))(*ints),
        floats=(ctypes.c_double * max(1, len(floats)))(*floats),
        input_count=len(inputs),
        output_count=len(outputs),
        int_count=len(ints),
        float_count=len(floats),
        workspace=workspace.address if workspace else None,
        workspace_bytes=workspace_bytes,
        threads=threads,
        check_only=blocks is None,
    )


def call(
    op: str,
    provider: str,
    inputs: Sequence[TensorType],
    outputs: Sequence[TensorType],
    ints: Sequence[int],
    floats: Sequence[float],
    blocks: tuple[Sequence[Block], Sequence[Block]] | None = None,
    threads: int = 1,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> int:
    """The status of one kernel call with attributes as a program file holds them; without blocks it is only checked.

    ``provider`` is "ref" or "simd", the best of this CPU.

    Raises:
        AssertionError: The kernel writes behind its scratch memory.
    """
    workspace = Block(max(1, workspace_bytes) + GUARD_BYTES) if blocks else None
    if workspace is not None:
        workspace.bytes[workspace_bytes:] = GUARD
    arguments = _record((inputs, outputs), (ints, floats), blocks, workspace, workspace_bytes, threads)
    status = int(_shim().kernel_shim_run(op.encode(), provider.encode(), ctypes.byref(arguments)))
    if workspace is not None and not np.all(workspace.bytes[workspace_bytes:] == GUARD):
        raise AssertionError(f"{op} ({provider}) writes behind its {workspace_bytes} bytes of scratch memory")
    return status


class Prepared:
    """A call on operands of its own that can be repeated, for measurements; calling it gives the kernel's status.

    ``share`` maps outputs to the inputs whose buffer they take.
    """

    def __init__(
        self,
        op: str,
        provider: str,
        inputs: Sequence[Array],
        outputs: Sequence[TensorType],
        attrs: Mapping[str, Any],
        workspace_bytes: int,
        share: Mapping[int, int] | None = None,
    ) -> None:
        ints, floats = flat(op, attrs)
        types = [TensorType(tuple(x.shape), dtype_of(x)) for x in inputs]
        sources = [Block(type_.nbytes) for type_ in types]
        for block, type_, x in zip(sources, types, inputs, strict=True):
            block.view(type_)[...] = x
        shared = share or {}
        results = [sources[shared[i]] if i in shared else Block(type_.nbytes) for i, type_ in enumerate(outputs)]
        workspace = Block(max(1, workspace_bytes))
        placed = sources, results
        arguments = _record((types, outputs), (ints, floats), placed, workspace, workspace_bytes, threads=1)
        self._alive = placed, workspace, arguments
        self._run = _shim().kernel_shim_run
        self._arguments = op.encode(), provider.encode(), ctypes.byref(arguments)

    def __call__(self) -> int:
        return int(self._run(*self._arguments))


def check(
    op: str,
    inputs: Sequence[TensorType],
    outputs: Sequence[TensorType],
    flattened: tuple[Sequence[int], Sequence[float]],
) -> int:
    """The status of the op's check, which is what a program's load asks; attributes as `flat` gives them."""
    return call(op, "ref", inputs, outputs, *flattened)


def flat(op: str, attrs: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Attributes as a program file holds them: integers, floats."""
    return flatten(op, complete_attributes(op, attrs))


def run(
    op: str,
    provider: str,
    inputs: Sequence[Array],
    outputs: Sequence[TensorType],
    attrs: Mapping[str, Any],
    share: Mapping[int, int] | None = None,
    threads: int = 1,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[int, list[Array]]:
    """The status and the outputs of one kernel; ``share`` maps outputs to the inputs whose buffer they take."""
    types = [TensorType(tuple(x.shape), dtype_of(x)) for x in inputs]
    return run_typed(op, provider, inputs, types, outputs, attrs, threads, workspace_bytes, share)


def run_typed(
    op: str,
    provider: str,
    inputs: Sequence[Array],
    types: Sequence[TensorType],
    outputs: Sequence[TensorType],
    attrs: Mapping[str, Any],
    threads: int = 1,
    workspace_bytes: int = WORKSPACE_BYTES,
    share: Mapping[int, int] | None = None,
) -> tuple[int, list[Array]]:
    """As `run`, for arrays whose dtype does not say what they are: b16 is stored as uint16."""
    ints, floats = flat(op, attrs)
    sources = [Block(type_.nbytes) for type_ in types]
    for block, type_, x in zip(sources, types, inputs, strict=True):
        block.view(type_)[...] = x
    shared = share or {}
    results = [sources[shared[i]] if i in shared else _garbage(type_) for i, type_ in enumerate(outputs)]
    status = call(op, provider, types, outputs, ints, floats, (sources, results), threads, workspace_bytes)
    return status, [block.view(type_).copy() for block, type_ in zip(results, outputs, strict=True)]


def _garbage(type_: TensorType) -> Block:
    """What an output holds before a call: NaN as f32, so that an element that is not written shows."""
    block = Block(prod(type_.shape) * DTYPES[type_.dtype])
    block.bytes[...] = 0xFF
    return block
