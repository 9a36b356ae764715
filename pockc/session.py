"""Run a compiled program from Python: the same C ABI, and so the same code, as on the device."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from pockc import abi
from pockc.errors import UserError, near_names
from pockc.ir import Array

LEARNING_RATE = "pockc.learning_rate"


class Memory(NamedTuple):
    """Bytes that a session takes: see ``pk_memory`` in runtime.h."""

    arena_bytes: int
    state_bytes: int
    mapped_bytes: int
    used_peak_bytes: int


class Session:
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
            self.metadata: dict[str, Any] = json.loads(self._library.pk_program_metadata(self._program) or b"{}")
            options = abi.Options(threads, int(reference_kernels))
            created = self._library.pk_session_create(self._program, options, ctypes.byref(self._session))
            abi.check(created)
        except ValueError:
            self.close()
            raise UserError(f"{path} is corrupt: its metadata is not JSON", instead="Build it again.") from None
        except UserError:
            self.close()
            raise
        self._states = self._arguments("", abi.STATE)
        self._signatures: dict[str, tuple[dict[str, abi.Tensor], dict[str, abi.Tensor]]] = {}

    # --- Steps --------------------------------------------------------------------------------------------------------

    def train_step(self, **inputs: Any) -> float:
        """One step (one micro-step, where gradients accumulate) on a batch; returns its loss before the update."""
        return float(self.run("train_step", **inputs)["loss"])

    def eval_step(self, **inputs: Any) -> dict[str, Array]:
        """Loss on a batch with labels, and the outputs; nothing is updated.

        Where every token has a label, ``correct`` and ``counted``, per sample, stand in the place of the logits.
        """
        return self.run("eval_step", **inputs)

    def infer(self, **inputs: Any) -> Array | dict[str, Array]:
        """The model's output on a batch; a dict where it has several."""
        outputs = self.run("infer", **inputs)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def run(self, entry: str, /, **inputs: Any) -> dict[str, Array]:
        """Run one entry and return its outputs by name.

        Raises:
            UserError: no such entry; an input is missing, unknown, or of another shape or dtype; an id is out of range.
        """
        wanted, results = self._signature(entry)
        if unknown := [name for name in inputs if name not in wanted]:
            hint = near_names(unknown[0], wanted)
            raise UserError(f"{entry} has no input {unknown[0]!r}", supported=", ".join(wanted), instead=hint)
        if missing := [name for name in wanted if name not in inputs]:
            raise UserError(f"{entry} needs the input {missing[0]!r}", supported=", ".join(wanted))
        arrays = {name: _converted(name, value, wanted[name], is_input=True) for name, value in inputs.items()}
        outputs = {name: np.empty(tensor.shape, tensor.numpy_dtype) for name, tensor in results.items()}
        status = self._library.pk_session_run(
            self._handle(),
            entry.encode(),
            abi.names(list(arrays)),
            abi.tensors(list(arrays.values())),
            len(arrays),
            abi.names(list(outputs)),
            abi.tensors(list(outputs.values())),
            len(outputs),
        )
        abi.check(status)
        return outputs

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

    def state(self, name: str) -> Array:
        """A copy of a parameter, buffer, optimizer slot or counter, in the layout that the model has it in."""
        tensor = self._state_type(name)
        array = np.empty(tensor.shape, tensor.numpy_dtype)
        abi.check(self._library.pk_session_read_state(self._handle(), name.encode(), abi.Tensor.of(array)))
        return array

    def set_state(self, name: str, value: Any) -> None:
        """Write a state that the program updates. Raises UserError for a frozen one or another shape or dtype."""
        array = _converted(name, value, self._state_type(name), is_input=False)
        abi.check(self._library.pk_session_write_state(self._handle(), name.encode(), abi.Tensor.of(array)))

    def parameters(self) -> dict[str, Array]:
        """Every parameter in the file by its original names, frozen and tied ones included, as copies.

        A frozen parameter that the build folded into a constant is not in the file: ``metadata["omitted"]`` names it.
        """
        aliases: Mapping[str, str] = self.metadata.get("aliases", {})
        names = [name for name in self.metadata.get("parameters", ()) if name in self._states]
        found = {name: self.state(name) for name in names}
        return found | {other: found[name] for other, name in aliases.items() if name in found}

    def set_learning_rate(self, value: float) -> None:
        """Set the base learning rate, which a schedule scales."""
        if not value >= 0:
            raise UserError(f"a learning rate is a number of at least 0, found {value!r}")
        self.set_state(LEARNING_RATE, np.float32(value))

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

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An __init__ that failed early has no handles; at interpreter exit modules may be gone already.
        if getattr(self, "_session", None) is not None:
            self.close()

    def _handle(self) -> ctypes.c_void_p:
        if not self._session:
            raise UserError("this session is closed", instead="Make a new one: pockc.Session(path).")
        return self._session

    # --- Signatures ---------------------------------------------------------------------------------------------------

    def _arguments(self, entry: str, role: int) -> dict[str, abi.Tensor]:
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

    def _signature(self, entry: str) -> tuple[dict[str, abi.Tensor], dict[str, abi.Tensor]]:
        self._handle()
        if entry not in self._signatures:
            signature = self._arguments(entry, abi.INPUT), self._arguments(entry, abi.OUTPUT)
            if not any(signature):
                known = ", ".join(self.metadata.get("text", ()))
                hint = "Build it with that entry." if entry in ("eval_step", "infer") else ""
                raise UserError(f"the program has no entry {entry!r}", supported=known, instead=hint)
            self._signatures[entry] = signature
        return self._signatures[entry]

    def _state_type(self, name: str) -> abi.Tensor:
        if name in self._states:
            return self._states[name]
        if name in self.metadata.get("aliases", {}):
            raise UserError(f"{name} is tied", instead=f"Ask for {self.metadata['aliases'][name]}.")
        folded = " (no entry reads it as it is)" if name in self.metadata.get("omitted", ()) else ""
        raise UserError(f"the program has no state {name!r}{folded}", instead=near_names(name, self._states))


def _converted(name: str, value: Any, wanted: abi.Tensor, *, is_input: bool) -> Array:
    """A contiguous array of the wanted dtype and shape. Raises UserError where that would lose more than rounding."""
    array = np.asarray(value)
    target = wanted.numpy_dtype
    widens = np.can_cast(array.dtype, target, "safe") and array.dtype.kind == target.kind
    if not widens and (array.dtype, target) != (np.dtype(np.float64), np.dtype(np.float32)):
        raise UserError(f"{name} has dtype {array.dtype}, the program wants {target}", instead="Convert it first.")
    if array.shape != wanted.shape:
        same_item = is_input and array.shape[1:] == wanted.shape[1:] and array.ndim == len(wanted.shape) > 0
        hint = f"Build with --batch-size {array.shape[0]}, or pad the batch." if same_item else ""
        shapes = f"{name} has shape {list(array.shape)}, the program wants {list(wanted.shape)}"
        raise UserError(shapes, instead=hint)
    return np.asarray(array, target, order="C")
