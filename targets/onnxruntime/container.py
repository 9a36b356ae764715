"""The files of a program for ONNX Runtime: an .onnx for each entry, and the .pock that they take their weights from.

The .pock is a program of the native format, so that checkpoints, exports and the command line on the device are the
same code. Each of its entries is one call of the op ``onnxruntime``, of all arguments of the ONNX graph in their order,
which stands for "run the model of this entry"; a `copy` follows for each state whose new value may not be written over
the old one. Large initializers of the models lie in its DATA section, each once for all entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pockc.artifact import read
from pockc.artifact_writer import Tables, entry_row, write_tables
from pockc.errors import UserError
from pockc.ir import Array, Graph, State, Value
from pockc.passes.memory import aligned
from pockc.program import Program
from pockc.targets.onnxruntime.entry import Argument, OnnxEntry, make_entry, stored_type

OP = "onnxruntime"  # of the call; its one attribute is the position of the entry in `ENTRIES`
ENTRIES = ("train_step", "accumulate", "eval_step", "infer")
HASH = "pockc.model_hash"  # the property of a model that tells its .pock from others
SMALLEST_EXTERNAL = 1024  # bytes of an initializer that does not go into the model itself


def write_models(program: Program, path: Path, golden: bytes = b"") -> list[Path]:
    """Write the .pock to ``path`` and ``<entry>.onnx`` beside it; returns all files, the .pock first.

    ``golden`` are the contents of the optional GOLDEN section.

    Raises:
        UserError: the package `onnx` is not installed, or the system refuses the write.
    """
    try:
        from pockc.targets.onnxruntime.model import make_model, write_model
    except ImportError:
        raise UserError(
            "the target onnxruntime needs the package onnx", instead='pip install "pockc[onnxruntime]"'
        ) from None
    entries = {name: make_entry(name, graph, program.state_offset) for name, graph in program.entries.items()}
    tables = ModelTables(program, entries)
    start = write_tables(tables, path, {**program.metadata, "target": program.target}, golden)
    model_hash = read(path).model_hash

    def offset_of(array: Array) -> int | None:
        return None if array.nbytes < SMALLEST_EXTERNAL else start + tables.data.add(array)

    files = [path]
    for name, entry in entries.items():
        described = {**properties(program, entry), HASH: model_hash}
        model = make_model(entry, described, path.name, offset_of)
        write_model(model, file := path.parent / f"{name}.onnx")
        files.append(file)
    return files


def properties(program: Program, entry: OnnxEntry) -> dict[str, str]:
    """What a model says of itself: its program, and which of its arguments are states."""
    described = {key: value for key, value in program.metadata.items() if key not in ("passes", "memory_plan")}
    states = [
        {"name": argument.name, "input": argument.tensor, "type": str(argument.type)} for argument in entry.states
    ]
    updates = [
        {"name": argument.name, "output": argument.tensor, "in_place": argument.name in entry.in_place}
        for argument in entry.updates
    ]
    return {
        "pockc.entry": entry.name,
        "pockc.entries": json.dumps(list(program.entries)),
        "pockc.program": json.dumps(described, ensure_ascii=False),
        "pockc.states": json.dumps(states),
        "pockc.updates": json.dumps(updates),
    }


class ModelTables(Tables):
    """The tables of the .pock: states in the user's layout, and each entry as one call of its model."""

    def __init__(self, program: Program, entries: Mapping[str, OnnxEntry]) -> None:
        super().__init__(program)
        self.models = entries
        self.states = {name: _in_users_layout(*found) for name, found in self.states.items()}
        for entry in entries.values():
            for array in entry.constants.values():
                if array.nbytes >= SMALLEST_EXTERNAL:
                    self.data.add(array)

    def entry(self, name: str, graph: Graph) -> bytes:
        """The entry's model as a call, and the copies behind it."""
        model = self.models[name]
        top = self.program.state_bytes

        def placed(argument: Argument) -> int:
            nonlocal top
            row = self.tensor(Value(argument.name, argument.type), top, in_data=False)
            top += aligned(argument.type.nbytes)
            return row

        def home(argument: Argument) -> int:
            offset = self.program.state_offset[argument.name]
            return self.tensor(Value(argument.name, argument.type), offset, in_data=False)

        inputs = {argument.name: placed(argument) for argument in model.inputs}
        outputs = {argument.name: placed(argument) for argument in model.outputs}
        states = [home(argument) for argument in model.states]
        updates = [home(a) if a.name in model.in_place else placed(a) for a in model.updates]
        operands, results = [*inputs.values(), *states], [*outputs.values(), *updates]
        calls = [self.call(OP, f"<{name}>", operands, results, ([ENTRIES.index(name)], ()))]
        calls += [
            self.call("copy", f"{argument.name} [update]", [new], [home(argument)])
            for argument, new in zip(model.updates, updates, strict=True)
            if argument.name not in model.in_place
        ]
        self.arena_bytes = max(self.arena_bytes, top)
        return entry_row(name, inputs, outputs, calls)


def _in_users_layout(value: Value, state: State) -> tuple[Value, State]:
    return Value(value.name, stored_type(state, value)), State(state.kind, state.original())
