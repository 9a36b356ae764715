"""The .pock file: what runtime/FORMAT.md describes, as plain records, with a bounded reader.

Reading keeps tensor contents in the mapping of the file. The writer is in pockc/artifact_writer.py.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pockc.artifact_writer import (
    ALIGNMENT,
    DATA_ALIGNMENT,
    DTYPE_CODES,
    HEADER,
    KINDS,
    MAGIC,
    SECTION,
    SECTION_IDS,
    VERSION,
    write,
)
from pockc.compact import COMPACT_DTYPES, decode
from pockc.errors import UserError, near_names
from pockc.ir import NUMPY_DTYPES, Array, StateKind, TensorType

MAX_TENSORS, MAX_STATES, MAX_CALLS, MAX_ENTRIES = 1 << 20, 1 << 16, 1 << 20, 64
MAX_TEXT, MAX_RANK, MAX_OPERANDS, MAX_ATTRIBUTES, MAX_BYTES = 4096, 8, 1 << 14, 256, 1 << 40

Item = TypeVar("Item")
_SOURCE = re.compile(r"\S+ \((.*)\)(?: \[\w+\])?")  # of an origin


@dataclass(frozen=True, slots=True)
class Tensor:
    """A place in the arena or in DATA, and what lies there."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    in_data: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its contents."""
        return TensorType(self.shape, self.dtype).nbytes

    @property
    def numpy_dtype(self) -> Any:
        """The element type as numpy calls it; that of what is decoded, where it is compact."""
        return np.dtype(NUMPY_DTYPES["f32" if self.dtype in COMPACT_DTYPES else self.dtype])

    def __str__(self) -> str:
        return str(TensorType(self.shape, self.dtype))


@dataclass(frozen=True, slots=True)
class StateRecord:
    """A named state. ``stored == original.transpose(permutation)``; ``()`` is identity."""

    name: str
    kind: StateKind
    mutable: bool
    trained: bool
    permutation: tuple[int, ...]
    tensor: Tensor
    initial: int  # offset of the initial contents in DATA


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call. ``origin`` reads ``module.path (file:line) [phase]``; the forward phase is not written."""

    op: str
    origin: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    workspace_offset: int
    workspace_bytes: int

    @property
    def module(self) -> str:
        """The user's module path."""
        return self.origin.partition(" ")[0]

    @property
    def source(self) -> str:
        """The user's ``file:line``, or nothing."""
        found = _SOURCE.fullmatch(self.origin)
        return found[1] if found else ""

    @property
    def phase(self) -> str:
        """``forward``, ``backward``, ``recompute`` or ``update``."""
        return self.origin.rpartition("[")[2].rstrip("]") if self.origin.endswith("]") else "forward"


@dataclass(frozen=True, slots=True)
class Entry:
    """One function of the program, e.g. ``train_step``."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Artifact:
    """A file that was read and checked."""

    path: Path
    model_hash: str
    metadata: dict[str, Any]
    state_bytes: int
    arena_bytes: int
    max_threads: int
    accumulation: int
    tensors: tuple[Tensor, ...]
    states: tuple[StateRecord, ...]
    entries: dict[str, Entry]
    data: memoryview = field(repr=False)

    def entry(self, name: str) -> Entry:
        """The entry of that name. Raises UserError."""
        if name not in self.entries:
            raise UserError(
                f"{self.path} has no entry {name!r}",
                supported=", ".join(self.entries),
                instead=near_names(name, self.entries),
            )
        return self.entries[name]

    def contents(self, state: StateRecord) -> Array:
        """The initial contents of a state in the user's layout; decoded if it is compact."""
        shape, dtype = state.tensor.shape, state.tensor.dtype
        if dtype in COMPACT_DTYPES:
            stored = decode(np.frombuffer(self.data, np.uint8, state.tensor.nbytes, state.initial), shape, dtype)
        else:
            stored = np.frombuffer(self.data, NUMPY_DTYPES[dtype], prod(shape), state.initial).reshape(shape)
        return stored.transpose(np.argsort(state.permutation)) if state.permutation else stored

    @cached_property
    def state_by_name(self) -> dict[str, StateRecord]:
        """The states, for looking up."""
        return {state.name: state for state in self.states}


def read(path: str | Path) -> Artifact:
    """Read and check a program file.

    Raises:
        UserError: the file is missing, is not a program, is truncated or corrupt, or has an unknown version.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size < HEADER.size:
                raise _corrupt(path, "is not a .pock file: it is shorter than a header")
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", instead="Make it with `pockc build`.") from None
    model_hash, count = _read_header(path, content)
    sections = _read_sections(path, content, count)
    if "program" not in sections:
        raise _corrupt(path, "has no program section")
    data = sections.get("data", memoryview(b""))
    body = _ProgramReader(path, sections["program"], len(data)).read()
    return Artifact(path, model_hash, _read_metadata(path, sections), data=data, **body)


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}", instead="Copy it again from where it was built, or build it again.")


def _read_header(path: Path, content: memoryview) -> tuple[str, int]:
    magic, version, count, size, table_crc, header_crc, model_hash = HEADER.unpack_from(content)
    if magic != MAGIC:
        raise _corrupt(path, "is not a .pock file, or its transfer changed line ends")
    if zlib.crc32(content[:28]) != header_crc:
        raise _corrupt(path, "is corrupt: the header's checksum is wrong")
    if not 1 <= version <= VERSION:
        raise UserError(
            f"{path} has format version {version}",
            supported=f"versions 1 to {VERSION}",
            instead="Build it again, or update pockc.",
        )
    if len(content) != size:
        what = "truncated" if len(content) < size else "too long"
        raise _corrupt(path, f"is {what}: it has {len(content)} bytes, its header says {size}")
    table = content[HEADER.size : HEADER.size + count * SECTION.size]
    if not 1 <= count <= 16 or len(table) < count * SECTION.size:
        raise _corrupt(path, "is corrupt: its section count is out of range")
    if zlib.crc32(table) != table_crc:
        raise _corrupt(path, "is corrupt: the section table's checksum is wrong")
    return model_hash.hex(), count


def _read_sections(path: Path, content: memoryview, count: int) -> dict[str, memoryview]:
    names = {code: name for name, code in SECTION_IDS.items()}
    sections: dict[str, memoryview] = {}
    end_of_last = HEADER.size + count * SECTION.size
    for index in range(count):
        code, crc, offset, size = SECTION.unpack_from(content, HEADER.size + index * SECTION.size)
        name = names.get(code, f"unknown-{index}")
        alignment = DATA_ALIGNMENT if name == "data" else ALIGNMENT
        if offset % alignment or offset < end_of_last or offset + size > len(content) or name in sections:
            raise _corrupt(path, f"is corrupt: section {index} ({name}) is out of range")
        end_of_last = offset + size
        sections[name] = content[offset:end_of_last]
        if zlib.crc32(sections[name]) != crc:
            raise _corrupt(path, f"is corrupt: the checksum of its {name} section is wrong")
    return sections


def _read_metadata(path: Path, sections: dict[str, memoryview]) -> dict[str, Any]:
    try:
        metadata = json.loads(bytes(sections.get("metadata", b"{}")))
    except ValueError:
        raise _corrupt(path, "is corrupt: its metadata section is not JSON") from None
    if not isinstance(metadata, dict):
        raise _corrupt(path, "is corrupt: its metadata section is not a JSON object")
    return metadata


class _ProgramReader:
    """Reads the PROGRAM section; every count and index is checked before it is used."""

    def __init__(self, path: Path, section: memoryview, data_bytes: int) -> None:
        self.path, self.section, self.position = path, section, 0
        self.data_bytes = data_bytes
        self.state_bytes = self.arena_bytes = 0
        self.tensors: list[Tensor] = []
        self.strings: list[str] = []

    def read(self) -> dict[str, Any]:
        self.state_bytes, self.arena_bytes = self.number("Q"), self.number("Q")
        max_threads, accumulation = self.number("I"), self.number("I")
        self.require(self.state_bytes <= self.arena_bytes <= MAX_BYTES, "the arena's size is out of range")
        self.require(1 <= max_threads <= 256 and accumulation >= 1, "a thread or accumulation count is out of range")
        self.tensors = self.items(self.tensor, MAX_TENSORS, 12, "tensors")
        states = self.items(self.state, MAX_STATES, 20, "states")
        self.strings = self.items(self.text, MAX_TENSORS, 4, "strings")
        entries = self.items(self.entry, MAX_ENTRIES, 16, "entries")
        self.require(self.position == len(self.section), "the program section has bytes after its end")
        self.require(len({s.name for s in states}) == len(states), "two states have one name")
        self.require(len(dict(entries)) == len(entries), "two entries have one name")
        return {
            "state_bytes": self.state_bytes,
            "arena_bytes": self.arena_bytes,
            "max_threads": max_threads,
            "accumulation": accumulation,
            "tensors": tuple(self.tensors),
            "states": tuple(states),
            "entries": dict(entries),
        }

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise _corrupt(self.path, f"is corrupt: {problem}")

    def take(self, nbytes: int) -> memoryview:
        self.require(self.position + nbytes <= len(self.section), "its program section is cut off")
        self.position += nbytes
        return self.section[self.position - nbytes : self.position]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def array(self, count: int, code: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(struct.calcsize(f"<{count}{code}")))

    def count(self, limit: int, item_bytes: int, what: str) -> int:
        """A count of items that take at least ``item_bytes`` each, bounded by the limit and by what is left."""
        count = self.number("I")
        left = len(self.section) - self.position
        self.require(count <= limit and count * item_bytes <= left, f"the count of {what} is out of range")
        return count

    def items(self, read: Callable[[], Item], limit: int, item_bytes: int, what: str) -> list[Item]:
        return [read() for _ in range(self.count(limit, item_bytes, what))]

    def text(self) -> str:
        raw = bytes(self.take(self.count(MAX_TEXT, 1, "bytes of a string")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _corrupt(self.path, "is corrupt: a string is not UTF-8") from None

    def tensor(self) -> Tensor:
        code, storage, rank, zero = self.array(4, "B")
        known = code < len(DTYPE_CODES) and storage < 2 and rank <= MAX_RANK and zero == 0
        self.require(known, "a tensor's type is wrong")
        compact = DTYPE_CODES[code] in COMPACT_DTYPES
        self.require(not compact or (rank >= 2 and storage == 1), "a compact tensor is no frozen weight")
        shape = self.array(rank, "q")
        offset = self.number("Q")
        self.require(all(0 < size <= MAX_BYTES for size in shape), "a tensor's shape is out of range")
        tensor = Tensor(DTYPE_CODES[code], shape, offset, storage == 1)
        limit = self.data_bytes if tensor.in_data else self.arena_bytes
        inside = offset % ALIGNMENT == 0 and offset + tensor.nbytes <= limit
        self.require(inside, f"a tensor lies outside the {'data section' if tensor.in_data else 'arena'}")
        return tensor

    def tensor_at(self, index: int) -> Tensor:
        self.require(index < len(self.tensors), "a tensor index is out of range")
        return self.tensors[index]

    def state(self) -> StateRecord:
        name = self.text()
        kind, mutable, rank = self.array(3, "B")
        self.require(kind < len(KINDS) and mutable < 2 and rank <= MAX_RANK, f"state {name!r} is out of range")
        permutation = self.array(rank, "B")
        tensor, initial, trained = self.tensor_at(self.number("I")), self.number("Q"), self.number("B")
        fits = rank in (0, len(tensor.shape)) and sorted(permutation) == list(range(rank)) and trained < 2
        self.require(fits, f"the permutation of state {name!r} is wrong")
        inside = initial % ALIGNMENT == 0 and initial + tensor.nbytes <= self.data_bytes
        self.require(inside, f"the initial value of state {name!r} lies outside the data section")
        self.require(bool(mutable) != tensor.in_data, f"state {name!r} lies in the wrong kind of memory")
        in_states = tensor.in_data or tensor.offset + tensor.nbytes <= self.state_bytes
        self.require(in_states, f"state {name!r} lies outside the arena's part for states")
        return StateRecord(name, KINDS[kind], mutable == 1, trained == 1, permutation, tensor, initial)

    def entry(self) -> tuple[str, Entry]:
        name = self.text()
        inputs, outputs = self.arguments(), self.arguments()
        calls = self.items(self.call, MAX_CALLS, 40, "calls")
        return name, Entry(inputs, outputs, tuple(calls))

    def arguments(self) -> dict[str, Tensor]:
        pairs = self.items(lambda: (self.text(), self.tensor_at(self.number("I"))), 1024, 8, "arguments")
        self.require(not any(tensor.in_data for _, tensor in pairs), "an argument of an entry is not in the arena")
        return dict(pairs)

    def operands(self) -> tuple[Tensor, ...]:
        indices = self.array(self.count(MAX_OPERANDS, 4, "operands"), "I")
        return tuple(self.tensor_at(index) for index in indices)

    def call(self) -> Call:
        op, origin = self.number("I"), self.number("I")
        self.require(max(op, origin) < len(self.strings), "a string index is out of range")
        inputs, outputs = self.operands(), self.operands()
        ints = self.array(self.count(MAX_ATTRIBUTES, 8, "attributes"), "q")
        floats = self.array(self.count(MAX_ATTRIBUTES, 8, "attributes"), "d")
        offset, nbytes = self.number("Q"), self.number("Q")
        self.require(offset + nbytes <= self.arena_bytes, "a workspace lies outside the arena")
        self.require(not any(t.in_data for t in outputs), f"{self.strings[op]} writes into the data section")
        return Call(self.strings[op], self.strings[origin], inputs, outputs, ints, floats, offset, nbytes)


__all__ = ["Artifact", "Call", "Entry", "StateRecord", "Tensor", "read", "write"]
