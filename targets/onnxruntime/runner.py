"""Runs the models of a program in ONNX Runtime, with the interface of `pockc.Session`.

As on the device, states, inputs and outputs live in one arena at the offsets that the .pock gives, and the models are
bound to those places once: a new value that may take the place of the old one is written there by ONNX Runtime itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pockc.artifact import Artifact, Entry, Tensor, read
from pockc.base_session import BaseSession, Memory, Types
from pockc.checkpoint import read_position, write_checkpoint
from pockc.errors import UserError
from pockc.ir import Array
from pockc.passes.memory import ALIGNMENT
from pockc.targets.onnxruntime.container import HASH, OP
from pockc.timeline import mapped_bytes


@dataclass(frozen=True, slots=True)
class _Model:
    """An entry, ready to run: its session, bound to the arena, and the copies of states behind it."""

    session: Any
    binding: Any
    copies: tuple[tuple[Array, Array], ...]


class ModelSession(BaseSession):
    """A running program of the target onnxruntime; arguments and errors as for `pockc.Session`."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path = Path(path)
        self._artifact: Artifact | None = read(path)
        self.metadata = self._artifact.metadata
        self.states = {state.name: state.tensor for state in self._artifact.states}
        self._threads = threads
        self._models: dict[str, _Model] = {}
        self._micro_step = 0
        memory = np.zeros(self._artifact.arena_bytes + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self._arena = memory[start : start + self._artifact.arena_bytes]
        for state in self._artifact.states:
            if state.mutable:
                self._place(state.tensor)[...] = self._artifact.contents(state)

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _execute(self, entry: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        accumulation = self._open().accumulation
        if accumulation > 1 and entry == "accumulate":
            raise UserError("run train_step: it takes care of accumulate")
        steps = accumulation > 1 and entry == "train_step"
        chosen = "accumulate" if steps and self._micro_step + 1 < accumulation else entry
        record, model = self._open().entry(chosen), self._model(chosen)
        for name, array in inputs.items():
            self._place(record.inputs[name])[...] = array
        try:
            model.session.run_with_iobinding(model.binding)
        except Exception as error:  # its exceptions have no base class of their own
            raise UserError(f"ONNX Runtime failed in {chosen}: {error}") from None
        for new, state in model.copies:
            state[...] = new
        for name, array in outputs.items():
            array[...] = self._place(record.outputs[name])
        self._micro_step = (self._micro_step + 1) % accumulation if steps else self._micro_step

    def _arguments(self, entry: str) -> tuple[Types, Types]:
        record = self._open().entries.get(entry)
        return (record.inputs, record.outputs) if record else ({}, {})

    def _model(self, entry: str) -> _Model:
        if entry not in self._models:
            self._models[entry] = self._load(entry, self._open().entry(entry))
        return self._models[entry]

    def _load(self, name: str, entry: Entry) -> _Model:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors alone
        file = self.path.parent / f"{name}.onnx"
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {file}: {error}",
                supported="version 1.20 and later",
                instead="Copy the .onnx files and the .pock together, or build them again.",
            ) from None
        call, *copies = entry.calls
        if call.op != OP or any(copy.op != "copy" for copy in copies):
            raise UserError(f"{self.path} is not a program for ONNX Runtime", instead="Open it with pockc.Session.")
        if session.get_modelmeta().custom_metadata_map.get(HASH) != self._open().model_hash:
            raise UserError(
                f"{file} and {self.path} are not of one build", instead="Copy all files of a build together."
            )
        binding = session.io_binding()
        for argument, tensor in zip(session.get_inputs(), call.inputs, strict=True):
            binding.bind_input(argument.name, *self._bound(tensor))
        for argument, tensor in zip(session.get_outputs(), call.outputs, strict=True):
            binding.bind_output(argument.name, *self._bound(tensor))
        pairs = ((self._place(copy.inputs[0]), self._place(copy.outputs[0])) for copy in copies)
        return _Model(session, binding, tuple(pairs))

    def _bound(self, tensor: Tensor) -> tuple[Any, ...]:
        """Device, element type, shape and address, as bindings take them."""
        return "cpu", 0, tensor.numpy_dtype, tensor.shape, self._place(tensor).ctypes.data

    # --- States -------------------------------------------------------------------------------------------------------

    def _place(self, tensor: Tensor) -> Array:
        """A tensor of the arena."""
        raw = self._arena[tensor.offset : tensor.offset + tensor.nbytes]
        array: Array = raw.view(tensor.numpy_dtype).reshape(tensor.shape)
        return array

    def _read_state(self, name: str, array: Array) -> None:
        state = self._open().state_by_name[name]
        array[...] = self._place(state.tensor) if state.mutable else self._open().contents(state)

    def _write_state(self, name: str, array: Array) -> None:
        state = self._open().state_by_name[name]
        if not state.mutable:
            raise UserError(f"state `{name}` is frozen in this program and cannot be written")
        self._place(state.tensor)[...] = array

    def save_checkpoint(self, path: str | Path, *, cursor: Any = None) -> None:
        """As `pockc.Session.save_checkpoint`, and the same file."""
        states = {state.name: self._place(state.tensor) for state in self._open().states if state.mutable}
        write_checkpoint(path, self._open(), states, self._micro_step, json.dumps(cursor))

    def load_checkpoint(self, path: str | Path) -> Any:
        """As `pockc.Session.load_checkpoint`."""
        artifact = self._open()
        tensors, metadata = read_position(path, artifact)
        mutable = [state for state in artifact.states if state.mutable]
        for state in mutable:
            found = tensors.get(state.name)
            if found is None or (found.shape, found.dtype) != (state.tensor.shape, state.tensor.numpy_dtype):
                raise UserError(f"{path} lacks the state {state.name}, or has another type of it")
        for state in mutable:
            self._place(state.tensor)[...] = tensors[state.name]
        self._micro_step = int(metadata.get("micro_step", "0"))
        return json.loads(metadata.get("cursor", "null"))

    @property
    def memory(self) -> Memory:
        """States, inputs and outputs alone: what ONNX Runtime allocates beside them only it knows."""
        arena, artifact = len(self._arena), self._open()
        return Memory(arena, artifact.state_bytes, mapped_bytes(artifact), arena)

    # --- Lifetime -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the models and the arena."""
        self._models.clear()
        self._artifact = None
        self._arena = np.zeros(0, np.uint8)

    def _require_open(self) -> None:
        self._open()

    def _open(self) -> Artifact:
        if self._artifact is None:
            raise UserError("this session is closed", instead="Make a new one.")
        return self._artifact
