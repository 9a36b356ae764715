"""The intermediate representation: everything a pass ever sees, on one screen.

A graph is a topologically ordered tuple of nodes over values. Values are the edges and compare by identity;
their names are hints for the printer, except the names of states, which are the user's own parameter names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pockc.compact import COMPACT_DTYPES, compact_nbytes, decode
from pockc.errors import InternalError
from pockc.halves import is_half
from pockc.ops import OPS, infer

Array = npt.NDArray[Any]
Phase = Literal["forward", "backward", "recompute", "update"]  # recompute: forward once more, for the backward pass
StateKind = Literal["parameter", "buffer", "constant", "slot", "counter"]

# The element types of the IR; sizes in bytes. `bool` is one byte. Bit masks are `u8` tensors of 8 elements a byte.
# f16 and b16 are activations in 16 bits, of pockc/halves.py, which the user never sees as such.
# Frozen states may have a dtype of pockc/compact.py instead: numbers that kernels read as f32, and store nowhere.
DTYPES: dict[str, int] = {"f32": 4, "i64": 8, "i32": 4, "u8": 1, "bool": 1, "f16": 2, "b16": 2}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A static shape and an element type, e.g. ``f32[8,224,224,3]``."""

    shape: tuple[int, ...]
    dtype: str = "f32"

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def is_compact(self) -> bool:
        """Whether these are frozen weights in fewer bytes: see pockc/compact.py."""
        return self.dtype in COMPACT_DTYPES

    @property
    def is_half(self) -> bool:
        """Whether these are numbers in 16 bits: see pockc/halves.py."""
        return is_half(self.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the dense tensor, or of the rows of a compact one."""
        if self.is_compact:
            return compact_nbytes(self.shape, self.dtype)
        return self.elements * DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: the user's module path (``features.3.conv``), source file and line, and the phase."""

    module: str = ""
    file: str = ""
    line: int = 0
    phase: Phase = "forward"

    def __str__(self) -> str:
        place = f" ({self.file}:{self.line})" if self.file else ""
        return f"{self.module or '<model>'}{place}"


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """An edge: produced once, by a node, or given as an input or a state."""

    name: str
    type: TensorType

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation. ``attrs`` holds plain Python values: int, float, bool, str or tuples of int."""

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What persists across steps: initial contents of a state value, in the layout the graph uses.

    ``permutation`` relates it to the user's layout: ``data == original.transpose(permutation)``; ``()`` is identity.
    ``data`` may be None in graphs that were parsed from text. Where the value's type is compact, it is the encoded
    rows, which `contents` decodes.
    """

    kind: StateKind
    data: Array | None
    permutation: tuple[int, ...] = ()

    def original(self) -> Array:
        """The contents in the user's own layout."""
        if self.data is None:
            raise InternalError("this state carries no data: its graph was parsed from text")
        return self.data.transpose(np.argsort(self.permutation)) if self.permutation else self.data


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Graph:
    """One entry of a program: a pure function of inputs and states, with the new values of the states it updates.

    Graphs compare by identity and never change: what was found out about one may be kept as long as it is there.
    """

    inputs: tuple[Value, ...]
    states: Mapping[Value, State]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, Value]
    updates: Mapping[Value, Value] = field(default_factory=dict)  # state -> its new value

    def __str__(self) -> str:
        from pockc.text import show  # the printer depends on the IR, not the IR on the printer

        return show(self)

    def state(self, name: str) -> Value:
        """The state value of that name; KeyError if there is none."""
        found = next((v for v in self.states if v.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def producers(self) -> dict[Value, Node]:
        """The node that makes each value."""
        return {output: node for node in self.nodes for output in node.outputs}

    def consumers(self) -> dict[Value, list[Node]]:
        """Nodes reading each value, in order; a node that reads a value twice is listed once."""
        readers: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                readers.setdefault(value, []).append(node)
        return readers

    def results(self) -> tuple[Value, ...]:
        """The values that must survive the graph: outputs, then new states."""
        return (*self.outputs.values(), *self.updates.values())


class Builder:
    """Appends type-checked nodes. Set ``origin`` before a group of calls; every node inherits it."""

    def __init__(self, graph: Graph | None = None) -> None:
        self.inputs: list[Value] = list(graph.inputs) if graph else []
        self.states: dict[Value, State] = dict(graph.states) if graph else {}
        self.nodes: list[Node] = list(graph.nodes) if graph else []
        self.origin = Origin()
        self._constants: dict[tuple[bytes, TensorType], Value] = {}

    def input(self, name: str, type_: TensorType) -> Value:
        """A new input, last in the list."""
        self.inputs.append(value := Value(name, type_))
        return value

    def state(self, name: str, kind: StateKind, data: Array, permutation: tuple[int, ...] = ()) -> Value:
        """A new state; its type is that of ``data``, whose numpy dtype must be one of the IR's."""
        value = Value(name, TensorType(tuple(data.shape), dtype_of(data)))
        self.states[value] = State(kind, data, permutation)
        return value

    def constant(self, data: Array | float | int, dtype: str = "f32", hint: str = "constant") -> Value:
        """A frozen state with these contents; equal small constants of one builder are shared."""
        array = np.asarray(data, dtype=NUMPY_DTYPES[dtype], order="C")  # ascontiguousarray would make scalars 1-D
        key = (array.tobytes(), TensorType(tuple(array.shape), dtype))
        if array.size <= 64 and key in self._constants:
            return self._constants[key]
        self._constants[key] = value = self.state(hint, "constant", array)
        return value

    def __call__(self, op: str, *inputs: Value, hint: str = "", **attrs: Any) -> Value:
        """Append a node with one output and return that output."""
        outputs = self.multi(op, *inputs, hint=hint, **attrs)
        if len(outputs) != 1:
            raise InternalError(f"{op} has {len(outputs)} outputs; use Builder.multi")
        return outputs[0]

    def multi(self, op: str, *inputs: Value, hint: str = "", **attrs: Any) -> tuple[Value, ...]:
        """Append a node and return all its outputs. Raises UserError, with the origin, where the type rule fails."""
        types, attrs = infer(op, [v.type for v in inputs], attrs, self.origin)
        outputs = tuple(Value(hint or op, t) for t in types)
        self.nodes.append(Node(op, inputs, outputs, attrs, self.origin))
        return outputs

    def build(self, outputs: Mapping[str, Value], updates: Mapping[Value, Value] | None = None) -> Graph:
        """The graph, with unused constants dropped and value names made unique."""
        used = {v for node in self.nodes for v in node.inputs} | set(outputs.values()) | set((updates or {}).values())
        states = {v: s for v, s in self.states.items() if s.kind != "constant" or v in used}
        return uniquely_named(Graph(tuple(self.inputs), states, tuple(self.nodes), dict(outputs), dict(updates or {})))


# Of the stored form: numpy has no bfloat16, and b16 is its bits.
NUMPY_DTYPES: dict[str, Any] = {
    "f32": np.float32, "i64": np.int64, "i32": np.int32, "u8": np.uint8, "bool": np.bool_,
    "f16": np.float16, "b16": np.uint16,
}  # fmt: skip


def contents(value: Value, state: State) -> Array | None:
    """The data of a state as its readers see it, in the layout of the graph: f32 for a compact one."""
    if state.data is None or not value.type.is_compact:
        return state.data
    return decode(state.data, value.type.shape, value.type.dtype)


def dtype_of(array: Array) -> str:
    """The IR's name of a numpy dtype; InternalError for one that the IR lacks."""
    for name, dtype in NUMPY_DTYPES.items():
        if array.dtype == dtype:
            return name
    raise InternalError(f"numpy dtype {array.dtype} is not an IR dtype")


def substitute(graph: Graph, mapping: Mapping[Value, Value]) -> Graph:
    """The graph with every *use* of a mapped value replaced; chains of the mapping are followed."""

    def final(value: Value) -> Value:
        while value in mapping:
            value = mapping[value]
        return value

    if not mapping:
        return graph
    nodes = tuple(replace(node, inputs=tuple(final(v) for v in node.inputs)) for node in graph.nodes)
    outputs = {name: final(v) for name, v in graph.outputs.items()}
    updates = {state: final(v) for state, v in graph.updates.items()}
    return replace(graph, nodes=nodes, outputs=outputs, updates=updates)


def uniquely_named(graph: Graph) -> Graph:
    """The same graph with unique value names. Inputs and non-constant states keep theirs; the rest is renumbered."""
    keep = [*graph.inputs, *(v for v, s in graph.states.items() if s.kind != "constant")]
    taken: set[str] = set()
    for value in keep:
        if value.name in taken:
            raise InternalError(f"two inputs or states are called {value.name!r}")
        taken.add(value.name)
    counts: dict[str, int] = {}

    def fresh(value: Value) -> Value:
        stem = value.name.rstrip("0123456789").rstrip("_") or "v"
        name = value.name
        while name in taken:
            counts[stem] = counts.get(stem, 0) + 1
            name = f"{stem}_{counts[stem]}"
        taken.add(name)
        return value if name == value.name else Value(name, value.type)

    renamed: dict[Value, Value] = {v: v for v in keep}
    for value in (*graph.states, *(o for node in graph.nodes for o in node.outputs)):
        if value not in renamed:
            renamed[value] = fresh(value)
    if all(old is new for old, new in renamed.items()):
        return graph

    def rename(values: Iterable[Value]) -> tuple[Value, ...]:
        return tuple(renamed[v] for v in values)

    nodes = [replace(n, inputs=rename(n.inputs), outputs=rename(n.outputs)) for n in graph.nodes]
    return Graph(
        inputs=graph.inputs,
        states={renamed[v]: s for v, s in graph.states.items()},
        nodes=tuple(nodes),
        outputs={name: renamed[v] for name, v in graph.outputs.items()},
        updates={renamed[s]: renamed[v] for s, v in graph.updates.items()},
    )


def op_counts(nodes: Sequence[Node]) -> dict[str, int]:
    """How many nodes of each op: the structural numbers that tests pin."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op] = counts.get(node.op, 0) + 1
    return counts


__all__ = ["DTYPES", "NUMPY_DTYPES", "OPS", "Builder", "Graph", "Node", "Origin", "State", "TensorType", "Value"]
