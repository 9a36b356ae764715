"""Writes a program as a .pock file: see runtime/FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pockc.compact import COMPACT_DTYPES
from pockc.errors import InternalError, UserError
from pockc.halves import HALF_DTYPES, is_half
from pockc.ir import DTYPES, Array, Graph, Node, State, StateKind, Value
from pockc.ops import ENUM_VALUES, OPS
from pockc.passes.lifetimes import storages, unread_fills
from pockc.passes.memory import aligned
from pockc.program import Program
from pockc.program import states as program_states

MAGIC = b"\x89POCK\r\n\x1a"
VERSION = 3  # of files with 16-bit activations; see `Tables.version` for others, which older readers take
HEADER = struct.Struct("<8sIIQII32s")  # magic, version, sections, file size, table CRC, header CRC, model hash
SECTION = struct.Struct("<IIQQ")  # id, CRC, offset, size
PRODUCTS = {"fp16": 1, "bf16": 2}  # what the section `half_arithmetic` says
SECTION_IDS = {"metadata": 1, "program": 2, "data": 3, "golden": 4, "half_arithmetic": 5}
ALIGNMENT, DATA_ALIGNMENT = 64, 4096
DTYPE_CODES = (*(dtype for dtype in DTYPES if not is_half(dtype)), *COMPACT_DTYPES, *HALF_DTYPES)
KINDS: tuple[StateKind, ...] = ("parameter", "buffer", "constant", "slot", "counter")


def write(program: Program, path: str | Path, *, golden: bytes = b"") -> None:
    """Write a program; an existing file is replaced whole or not at all.

    Args:
        program: A planned program.
        path: Where to; its folder is made if need be.
        golden: Contents of the optional GOLDEN section.

    Raises:
        UserError: the system refuses the write.
    """
    write_tables(Tables(program), path, {**program.metadata, "memory": program.memory.as_json()}, golden)


def write_tables(tables: Tables, path: str | Path, metadata: Mapping[str, Any], golden: bytes = b"") -> int:
    """Write what the tables hold; returns at which byte of the file the DATA section begins. Errors as for `write`."""
    program = tables.program
    body = tables.program_section()
    metadata = {
        **metadata,
        "omitted": tables.omitted(),
        "text": {name: program.text(name) for name in program.entries},
    }
    sections: dict[str, list[bytes | memoryview]] = {
        "metadata": [json.dumps(metadata, ensure_ascii=False).encode()],
        "program": [body],
        "data": list(tables.data.chunks()),
    }
    if golden:
        sections["golden"] = [golden]
    if metadata.get("half_arithmetic"):
        sections["half_arithmetic"] = [struct.pack("<I", PRODUCTS[metadata["dtype"]])]
    model_hash = hashlib.sha256(body + tables.signature()).digest()
    positions = _positions(sections)
    write_atomically(Path(path), _layout(sections, positions, model_hash, tables.version))
    return positions["data"]


def flatten(op: str, attrs: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Attributes in canonical order as the file holds them: integers (also bools, tuples, strings) and floats."""
    annotations = OPS[op].type_rule.__annotations__
    ints: list[int] = []
    floats: list[float] = []
    for name in OPS[op].attributes:
        value = attrs[name]
        if isinstance(value, float) or annotations.get(name) in (float, "float"):
            floats.append(float(value))
        elif isinstance(value, str):
            ints.append(ENUM_VALUES.index(value))
        elif isinstance(value, tuple):
            ints += [len(value), *(int(item) for item in value)]
        else:
            ints.append(int(value))
    return ints, floats


class _Data:
    """The DATA section: tensor contents, each once, whoever uses them."""

    def __init__(self) -> None:
        self.size = 0
        self._offsets: dict[tuple[bytes, int], int] = {}
        self._known: dict[int, int] = {}  # by identity: entries share their frozen weights, which need one hash
        self._arrays: list[Array] = []

    def add(self, array: Array) -> int:
        """The offset of these contents. The array must live, unchanged, until the file is written."""
        if id(array) not in self._known:
            self._known[id(array)] = self._add(np.ascontiguousarray(array))
        return self._known[id(array)]

    def _add(self, array: Array) -> int:
        key = (hashlib.sha256(_bytes(array)).digest(), array.nbytes)
        if key not in self._offsets:
            self._offsets[key] = self.size
            self._arrays.append(array)
            self.size += aligned(array.nbytes)
        return self._offsets[key]

    def chunks(self) -> Iterator[bytes | memoryview]:
        for array in self._arrays:
            yield _bytes(array)
            yield bytes(aligned(array.nbytes) - array.nbytes)


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class Tables:
    """The tables of the PROGRAM section: tensors, states, strings, entries; equal rows are shared."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.arena_bytes = program.arena_bytes
        self.data = _Data()
        self.tensors: dict[bytes, int] = {}
        self.strings: dict[str, int] = {}
        self.version = 1  # the least that a reader must know: 2 for compact tensors
        read = {
            value.name
            for graph in program.entries.values()
            for value in (*graph.results(), *(operand for node in graph.nodes for operand in node.inputs))
            if value in graph.states
        }
        known = program_states(program.entries)
        self.states = {n: s for n, s in known.items() if n in read or n in program.state_offset}
        self.unread = [n for n, (_, s) in known.items() if n not in self.states and s.kind in ("parameter", "buffer")]

    def omitted(self) -> list[str]:
        """Original parameters and buffers that no entry reads: the model ignores them, or a constant was computed."""
        originals = (*self.program.metadata.get("parameters", {}), *self.program.metadata.get("buffers", ()))
        return list(dict.fromkeys([*(name for name in originals if name not in self.states), *self.unread]))

    def signature(self) -> bytes:
        """Names, dtypes and shapes of the states: what a checkpoint must agree with."""
        lines = [f"{name}\0{value.type}\0{state.permutation}\n" for name, (value, state) in self.states.items()]
        return "".join(lines).encode()

    def program_section(self) -> bytes:
        """The PROGRAM section, whose tables it fills."""
        program = self.program
        # What stays mapped comes before what is copied once, so that no page of it is shared with the latter.
        for value, state in sorted(self.states.values(), key=lambda pair: pair[0].name in program.state_offset):
            self._initial(value, state)
        states = _list(self._state(value, state) for value, state in self.states.values())
        entries = _list(self.entry(name, graph) for name, graph in program.entries.items())
        head = struct.pack("<QQII", program.state_bytes, self.arena_bytes, program.max_threads, program.accumulation)
        return head + _list(self.tensors) + states + _list(map(_text, self.strings)) + entries

    def tensor(self, value: Value, offset: int, in_data: bool) -> int:
        """The row of a value that lies there, in the arena or in DATA."""
        shape = value.type.shape
        self.version = max(self.version, VERSION if value.type.is_half else 2 if value.type.is_compact else 1)
        codes = bytes([DTYPE_CODES.index(value.type.dtype), in_data, len(shape), 0])
        row = codes + struct.pack(f"<{len(shape)}qQ", *shape, offset)
        return self.tensors.setdefault(row, len(self.tensors))

    def _string(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))

    def _state(self, value: Value, state: State) -> bytes:
        mutable = value.name in self.program.state_offset
        initial = self._initial(value, state)
        offset = self.program.state_offset[value.name] if mutable else initial
        tensor = self.tensor(value, offset, in_data=not mutable)
        trained = mutable and state.kind == "parameter"
        head = bytes([KINDS.index(state.kind), mutable, len(state.permutation), *state.permutation])
        return _text(value.name) + head + struct.pack("<IQB", tensor, initial, trained)

    def _initial(self, value: Value, state: State) -> int:
        if state.data is None:
            raise InternalError(f"state {value.name} has no contents")
        return self.data.add(state.data)

    def _location(self, entry: str, value: Value) -> tuple[int, bool]:
        """The offset of a value, and whether it is in DATA rather than in the arena."""
        offset = self.program.offset(entry, value)
        if offset is not None:
            return offset, False
        placement = self.program.placements[entry]
        state = placement.buffer[value].state
        if state is None:
            raise InternalError(f"{value!r} of {entry} has no place")
        initial = self._initial(state, self.program.entries[entry].states[state])
        return initial + placement.shift.get(value, 0), True

    def entry(self, name: str, graph: Graph) -> bytes:
        """An entry: its arguments, and its nodes as calls."""
        placement, storage = self.program.placements[name], storages(graph)
        index: dict[Value, int] = {}
        used = [*graph.inputs, *graph.results(), *(v for n in graph.nodes for v in (*n.inputs, *n.outputs))]
        for value in dict.fromkeys(used):
            index[value] = self.tensor(value, *self._location(name, value))
        unmade = {node.outputs[0] for node in unread_fills(graph)}
        calls = [
            self._call(node, [index[v] for v in node.inputs if v not in unmade], index, workspace)
            for node, workspace in zip(graph.nodes, placement.workspace, strict=True)
            if storage[node.outputs[0]] is node.outputs[0] and node.outputs[0] not in unmade  # views are there already
        ]
        inputs = {value.name: index[value] for value in graph.inputs}
        return entry_row(name, inputs, {key: index[value] for key, value in graph.outputs.items()}, calls)

    def _call(self, node: Node, inputs: list[int], index: Mapping[Value, int], workspace: tuple[int, int]) -> bytes:
        phase = node.origin.phase
        origin = f"{node.origin}" if phase == "forward" else f"{node.origin} [{phase}]"
        outputs = [index[v] for v in node.outputs]
        offset, nbytes = workspace
        where = self.program.state_bytes + offset if nbytes else 0
        return self.call(node.op, origin, inputs, outputs, flatten(node.op, node.attrs), (where, nbytes))

    def call(
        self,
        op: str,
        origin: str,
        inputs: list[int],
        outputs: list[int],
        attributes: tuple[Sequence[int], Sequence[float]] = ((), ()),
        workspace: tuple[int, int] = (0, 0),
    ) -> bytes:
        """A call between rows of the tensor table; the workspace is an offset in the arena and bytes."""
        ints, floats = attributes
        return b"".join(
            [
                struct.pack("<II", self._string(op), self._string(origin[-4096:])),
                _numbers("I", inputs),
                _numbers("I", outputs),
                _numbers("q", ints),
                _numbers("d", floats),
                struct.pack("<QQ", *workspace),
            ]
        )


def entry_row(name: str, inputs: Mapping[str, int], outputs: Mapping[str, int], calls: Iterable[bytes]) -> bytes:
    """An entry with arguments by name, each a row of the tensor table."""
    arguments = [_list(_argument(key, tensor) for key, tensor in given.items()) for given in (inputs, outputs)]
    return _text(name) + b"".join(arguments) + _list(calls)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw


def _numbers(code: str, values: Sequence[Any]) -> bytes:
    return struct.pack(f"<I{len(values)}{code}", len(values), *values)


def _list(items: Iterable[bytes]) -> bytes:
    rows = list(items)
    return struct.pack("<I", len(rows)) + b"".join(rows)


def _argument(name: str, tensor: int) -> bytes:
    return _text(name) + struct.pack("<I", tensor)


Sections = Mapping[str, list[bytes | memoryview]]


def _positions(sections: Sections) -> dict[str, int]:
    """At which byte each section begins, each at its alignment."""
    found = {}
    position = HEADER.size + len(sections) * SECTION.size
    for name, chunks in sections.items():
        position += -position % (DATA_ALIGNMENT if name == "data" else ALIGNMENT)
        found[name] = position
        position += sum(map(len, chunks))
    return found


def _layout(
    sections: Sections, positions: Mapping[str, int], model_hash: bytes, version: int
) -> Iterator[bytes | memoryview]:
    """The bytes of the file in order: header, section table, sections at their positions."""
    table: list[bytes] = []
    body: list[bytes | memoryview] = []
    end = HEADER.size + len(sections) * SECTION.size
    for name, chunks in sections.items():
        size, crc = 0, 0
        for chunk in chunks:
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
        table.append(SECTION.pack(SECTION_IDS[name], crc, positions[name], size))
        body += [bytes(positions[name] - end), *chunks]
        end = positions[name] + size
    joined = b"".join(table)
    head = HEADER.pack(MAGIC, version, len(sections), end, zlib.crc32(joined), 0, bytes(32))[:28]
    yield head + struct.pack("<I", zlib.crc32(head)) + model_hash + joined
    yield from body


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Into a temporary file beside the target, flushed to the disk, then renamed over it. Raises UserError."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None
