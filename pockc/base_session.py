"""What all sessions share, whatever runs their programs: steps, states by name, checks of what is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from pockc.errors import UserError, near_names
from pockc.ir import Array

LEARNING_RATE = "pockc.learning_rate"


class Memory(NamedTuple):
    """Bytes that a session takes: see ``pk_memory`` in runtime.h."""

    arena_bytes: int
    state_bytes: int
    mapped_bytes: int
    used_peak_bytes: int


class TensorType(Protocol):
    """Shape and numpy dtype of an argument or a state."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""
        ...

    @property
    def numpy_dtype(self) -> Any:
        """The element type as numpy calls it."""
        ...


Types = Mapping[str, TensorType]


class BaseSession(ABC):
    """A running program. Subclasses set ``path``, ``metadata`` and ``states`` (types by name), and run entries."""

    path: Path
    metadata: dict[str, Any]
    states: Types

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

    def encode(self, **inputs: Any) -> dict[str, Array]:
        """What a program built with ``cache_prefix`` computes in front of everything trained, by name.

        It never changes. These are inputs of ``train_step_encoded`` and ``eval_step_encoded``, which `run` runs.
        """
        return self.run("encode", **inputs)

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
        self._execute(entry, arrays, outputs)
        return outputs

    @abstractmethod
    def _execute(self, entry: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run an entry on arrays that fit, into arrays that fit."""

    @abstractmethod
    def _arguments(self, entry: str) -> tuple[Types, Types]:
        """The inputs and outputs of an entry; nothing where there is no such entry."""

    # --- States -------------------------------------------------------------------------------------------------------

    def state(self, name: str) -> Array:
        """A copy of a parameter, buffer, optimizer slot or counter, in the layout that the model has it in."""
        tensor = self._state_type(name)
        array = np.empty(tensor.shape, tensor.numpy_dtype)
        self._read_state(name, array)
        return array

    def set_state(self, name: str, value: Any) -> None:
        """Write a state that the program updates. Raises UserError for a frozen one or another shape or dtype."""
        self._write_state(name, _converted(name, value, self._state_type(name), is_input=False))

    @abstractmethod
    def _read_state(self, name: str, array: Array) -> None:
        """Copy a state into an array that fits."""

    @abstractmethod
    def _write_state(self, name: str, array: Array) -> None:
        """Copy an array that fits into a state. Raises UserError for a frozen one."""

    def parameters(self) -> dict[str, Array]:
        """Every parameter in the file by its original names, frozen and tied ones included, as copies.

        A frozen parameter that the build folded into a constant is not in the file: ``metadata["omitted"]`` names it.
        """
        aliases: Mapping[str, str] = self.metadata.get("aliases", {})
        names = [name for name in self.metadata.get("parameters", ()) if name in self.states]
        found = {name: self.state(name) for name in names}
        return found | {other: found[name] for other, name in aliases.items() if name in found}

    def set_learning_rate(self, value: float) -> None:
        """Set the base learning rate, which a schedule scales."""
        if not value >= 0:
            raise UserError(f"a learning rate is a number of at least 0, found {value!r}")
        self.set_state(LEARNING_RATE, np.float32(value))

    @abstractmethod
    def save_checkpoint(self, path: str | Path, *, cursor: Any = None) -> None:
        """Write every updated state, crash-safe. ``cursor``, any JSON value, comes back from `load_checkpoint`."""

    @abstractmethod
    def load_checkpoint(self, path: str | Path) -> Any:
        """Continue from a checkpoint of this program; returns its cursor, or None.

        Raises:
            UserError: the file is corrupt or of another program; the session is then unchanged.
        """

    @property
    @abstractmethod
    def memory(self) -> Memory:
        """What is allocated and used so far, in bytes."""

    # --- Lifetime -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def close(self) -> None:
        """Free what the session holds. Using it afterwards is an error."""

    @abstractmethod
    def _require_open(self) -> None:
        """Raise UserError where the session is closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- Signatures ---------------------------------------------------------------------------------------------------

    def _signature(self, entry: str) -> tuple[Types, Types]:
        self._require_open()
        signature = self._arguments(entry)
        if not any(signature):
            known = ", ".join(self.metadata.get("text", ()))
            hint = "Build it with that entry." if entry in ("eval_step", "infer") else ""
            hint = "Build it with cache_prefix." if entry.startswith("encode") or entry.endswith("_encoded") else hint
            raise UserError(f"the program has no entry {entry!r}", supported=known, instead=hint)
        return signature

    def _state_type(self, name: str) -> TensorType:
        if name in self.states:
            return self.states[name]
        if name in self.metadata.get("aliases", {}):
            raise UserError(f"{name} is tied", instead=f"Ask for {self.metadata['aliases'][name]}.")
        folded = " (no entry reads it as it is)" if name in self.metadata.get("omitted", ()) else ""
        raise UserError(f"the program has no state {name!r}{folded}", instead=near_names(name, self.states))


def _converted(name: str, value: Any, wanted: TensorType, *, is_input: bool) -> Array:
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
