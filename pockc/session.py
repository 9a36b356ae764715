"""Run a compiled program from Python: the same C ABI, and so the same code, as on the device."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pockc import abi
from pockc.artifact import read
from pockc.base_session import LEARNING_RATE as LEARNING_RATE
from pockc.base_session import BaseSession, Types
from pockc.base_session import Memory as Memory
from pockc.errors import UserError
from pockc.ir import Array


class Session(BaseSession):
    """A running program: its parameters, optimizer state and arena.

    Inputs are numpy arrays, or whatever ``numpy.asarray`` takes (CPU tensors of PyTorch among them), by the names that
    the model gives them. Integers are widened, float64 is rounded to float32; nothing else is converted.
    One thread at a time may use a session.

    Args:
        path: A .pock file.
        threads: At most what the program was planned for.
        reference_kernels: Run the plain kernels only, to compare against.

    Raises:
        UserError: the file is missing or corrupt, or this build of the runtime cannot run it.
    """

    def __init__(self, path: str | Path, threads: int = 1, *, reference_kernels: bool = False) -> None:
        self.path = Path(path)
        self._library = abi.library()
        self._program, self._session = ctypes.c_void_p(), ctypes.c_void_p()
        abi.check(self._library.pk_program_load(str(path).encode(), ctypes.byref(self._program)))
        try:
            self.metadata = json.loads(self._library.pk_program_metadata(self._program) or b"{}")
            options = abi.Options(threads, int(reference_kernels))
            created = self._library.pk_session_create(self._program, options, ctypes.byref(self._session))
            abi.check(created)
        except ValueError:
            self.close()
            raise UserError(f"{path} is corrupt: its metadata is not JSON", instead="Build it again.") from None
        except UserError:
            self.close()
            raise
        self.states = self._tensors("", abi.STATE)
        self._signatures: dict[str, tuple[Types, Types]] = {}

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _execute(self, entry: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        status = self._library.pk_session_run(
            self._handle(),
            entry.encode(),
            abi.names(list(inputs)),
            abi.tensors(list(inputs.values())),
            len(inputs),
            abi.names(list(outputs)),
            abi.tensors(list(outputs.values())),
            len(outputs),
        )
        abi.check(status)

    def input_buffer(self, entry: str, name: str) -> Array:
        """The session's own memory of an input, as an array: a batch that is made there is not copied by `run`.

        The contents are lost in every run of any entry, so fill it before each; with gradient accumulation ask for the
        buffer again as well. The array must not be used after `close`.

        Raises:
            UserError: no such entry, or it has no such input.
        """
        tensor = abi.Tensor()
        status = self._library.pk_session_input(self._handle(), entry.encode(), name.encode(), ctypes.byref(tensor))
        abi.check(status)
        nbytes = prod(tensor.shape) * tensor.numpy_dtype.itemsize
        memory = (ctypes.c_uint8 * nbytes).from_address(tensor.data) if nbytes else bytearray()
        return np.frombuffer(memory, tensor.numpy_dtype).reshape(tensor.shape)

    # --- States -------------------------------------------------------------------------------------------------------

    def _read_state(self, name: str, array: Array) -> None:
        abi.check(self._library.pk_session_read_state(self._handle(), name.encode(), abi.Tensor.of(array)))

    def _write_state(self, name: str, array: Array) -> None:
        abi.check(self._library.pk_session_write_state(self._handle(), name.encode(), abi.Tensor.of(array)))

    def save_checkpoint(self, path: str | Path, *, cursor: Any = None) -> None:
        """Write every updated state, crash-safe. ``cursor``, any JSON value, comes back from `load_checkpoint`."""
        text = None if cursor is None else json.dumps(cursor).encode()
        abi.check(self._library.pk_session_save(self._handle(), str(path).encode(), text))

    def load_checkpoint(self, path: str | Path) -> Any:
        """Continue from a checkpoint of this program; returns its cursor, or None.

        Raises:
            UserError: the file is corrupt or of another program; the session is then unchanged.
        """
        cursor = ctypes.c_char_p()
        abi.check(self._library.pk_session_load(self._handle(), str(path).encode(), ctypes.byref(cursor)))
        return json.loads(cursor.value) if cursor.value else None

    @property
    def memory(self) -> Memory:
        """What the runtime allocated and used so far, in bytes."""
        memory = abi.Memory()
        abi.check(self._library.pk_session_memory(self._handle(), ctypes.byref(memory)))
        return Memory(memory.arena_bytes, memory.state_bytes, memory.mapped_bytes, memory.used_peak_bytes)

    # --- Lifetime -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the arena and unmap the file. Using the session afterwards is an error."""
        if self._session:
            self._library.pk_session_free(self._session)
        if self._program:
            self._library.pk_program_free(self._program)
        self._session, self._program = ctypes.c_void_p(), ctypes.c_void_p()

    def __del__(self) -> None:
        # An __init__ that failed early has no handles; at interpreter exit modules may be gone already.
        if getattr(self, "_session", None) is not None:
            self.close()

    def _handle(self) -> ctypes.c_void_p:
        if not self._session:
            raise UserError("this session is closed", instead="Make a new one: pockc.Session(path).")
        return self._session

    def _require_open(self) -> None:
        self._handle()

    # --- Signatures ---------------------------------------------------------------------------------------------------

    def _tensors(self, entry: str, role: int) -> dict[str, abi.Tensor]:
        found: dict[str, abi.Tensor] = {}
        name = ctypes.c_char_p()
        while True:
            tensor = abi.Tensor()
            status = self._library.pk_program_tensor(
                self._program, entry.encode(), role, len(found), ctypes.byref(name), ctypes.byref(tensor)
            )
            if status == abi.NOT_FOUND:
                return found
            abi.check(status)
            found[abi.text(name.value)] = tensor

    def _arguments(self, entry: str) -> tuple[Types, Types]:
        if entry not in self._signatures:
            self._signatures[entry] = self._tensors(entry, abi.INPUT), self._tensors(entry, abi.OUTPUT)
        return self._signatures[entry]


def open_session(path: str | Path, threads: int = 1, *, reference_kernels: bool = False) -> BaseSession:
    """A session of a program, with what its target runs it with.

    Raises:
        UserError: as for `Session`; or the package of the target is not installed.
    """
    if read(path).metadata.get("target", "native") == "native":
        return Session(path, threads, reference_kernels=reference_kernels)
    try:
        from pockc.targets.onnxruntime.runner import ModelSession  # its package is an extra
    except ImportError:
        raise UserError(
            f"{path} is a program for ONNX Runtime, which is not installed", instead='pip install "pockc[onnxruntime]"'
        ) from None
    return ModelSession(path, threads)
