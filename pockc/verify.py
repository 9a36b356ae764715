"""The verifier: what must hold of a graph at each level, checked after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from pockc.compact import row_nbytes
from pockc.errors import InternalError, UserError
from pockc.ir import NUMPY_DTYPES, Graph, Node, TensorType, Value
from pockc.ops import OPS, infer, load_families
from pockc.text import show_node

Level = Literal["imported", "training", "lowered", "planned"]

OPTIMIZER_OPS = frozenset({"sgd", "momentum", "adam", "lion", "momentum8", "adam8", "lion8", "learning_rate", "gate"})


def verify(
    graph: Graph, level: Level, supports: Callable[[Node], bool] | None = None, checked: set[Node] | None = None
) -> None:
    """Check the invariants of a level. Nodes in ``checked`` are known to keep invariant 4; those that do join them.

    At every level:
        1. Every value is defined once: as an input, as a state or as one output of one node (SSA).
        2. Names of values are unique.
        3. Every operand is defined before the node that reads it; graph outputs and updates are defined.
        4. Every op exists; its output types are those of its type rule, its attributes complete and in canonical order.
        5. An update maps a state, not a constant, to a value of the state's type.
        6. The data of a state, where there is any, has the state's type. Inputs and results of nodes are never compact.
        7. A gate needs every output, and every new state that does not need it: what comes first depends on no order.
    imported:
        8. There are no gradient ops, no optimizer ops, and no updates but of buffers (running statistics).
        9. Every node is in the forward phase.
    lowered, planned:
        10. Every node passes ``supports``, where the target gives it. (Offsets have a checker of their own.)

    Raises:
        InternalError: with every violation, one to a line, each with its node's text and origin.
    """
    load_families()
    problems = [*_structure(graph), *_states(graph), *_gates(graph)]
    checked = set() if checked is None else checked
    for node in graph.nodes:
        if node in checked:
            continue
        found = [*_types(node)]
        problems += found
        if not found:
            checked.add(node)
    if level == "imported":
        problems += _imported(graph)
    if level in ("lowered", "planned") and supports is not None:
        problems += [f"{_Place(node)}: the target has no kernel for it" for node in graph.nodes if not supports(node)]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise InternalError(f"the graph breaks {len(problems)} invariant(s) of level {level!r}:\n{listed}")


@dataclass(frozen=True)
class _Place:
    """Names a node in a message; text only when it is printed, since printing every node costs more than checking."""

    node: Node

    def __str__(self) -> str:
        return f"{self.node.origin}: {show_node(self.node)}"


def _structure(graph: Graph) -> Iterator[str]:
    """Invariants 1 to 3."""
    defined: set[Value] = set()
    names: set[str] = set()
    steps: list[tuple[object, tuple[Value, ...], tuple[Value, ...]]]
    steps = [("inputs", (), graph.inputs), ("states", (), tuple(graph.states))]
    steps += [(_Place(node), node.inputs, node.outputs) for node in graph.nodes]
    for where, reads, writes in steps:
        yield from (f"{where}: operand {value!r} is not defined before" for value in reads if value not in defined)
        for value in writes:
            if value in defined:
                yield f"{where}: {value!r} is defined twice"
            elif value.name in names:
                yield f"{where}: the name %{value.name} is taken by another value"
            defined.add(value)
            names.add(value.name)
    results = [(f"output {name}", value) for name, value in graph.outputs.items()]
    results += [(f"update of %{state.name}", value) for state, value in graph.updates.items()]
    yield from (f"{where}: {value!r} is not defined" for where, value in results if value not in defined)


def _states(graph: Graph) -> Iterator[str]:
    """Invariants 5 and 6."""
    dense = (*graph.inputs, *graph.results(), *(value for node in graph.nodes for value in node.outputs))
    yield from (f"{value!r} is compact, but no frozen weight" for value in dense if value.type.is_compact)
    for value, new in graph.updates.items():
        if value not in graph.states:
            yield f"update of %{value.name}: it is not a state of the graph"
        elif graph.states[value].kind == "constant":
            yield f"update of %{value.name}: it is a constant"
        if new.type != value.type:
            yield f"update of %{value.name}: {new!r} has not its type {value.type}"
    for value, state in graph.states.items():
        if value.type.is_compact and len(value.type.shape) < 2:
            yield f"state {value!r}: a compact type has at least two axes"
        elif state.data is None:
            continue
        elif (state.data.shape, state.data.dtype) != _stored(value.type):
            yield f"state {value!r}: its data is {state.data.dtype}{list(state.data.shape)}"


def _gates(graph: Graph) -> Iterator[str]:
    """Invariant 7."""
    for gate in (node for node in graph.nodes if node.op == "gate"):
        before, behind = {*gate.inputs, *gate.outputs}, set(gate.outputs)
        for node in reversed(graph.nodes):
            if not before.isdisjoint(node.outputs):
                before.update(node.inputs)
        for node in graph.nodes:
            if not behind.isdisjoint(node.inputs):
                behind.update(node.outputs)
        late = [value for value in graph.outputs.values() if value not in before]
        late += [value for value in graph.updates.values() if value not in before and value not in behind]
        yield from (f"{_Place(gate)}: {value!r} may come behind it" for value in late)


def _stored(type_: TensorType) -> tuple[tuple[int, ...], Any]:
    """Shape and numpy dtype of a state's data."""
    if not type_.is_compact:
        return type_.shape, NUMPY_DTYPES[type_.dtype]
    return (type_.shape[0], row_nbytes(type_.dtype, prod(type_.shape[1:]))), np.uint8


def _types(node: Node) -> Iterator[str]:
    """Invariant 4."""
    if node.op not in OPS:
        yield f"{_Place(node)}: there is no such op"
        return
    try:
        types, attrs = infer(node.op, [v.type for v in node.inputs], node.attrs)
    except (UserError, InternalError, TypeError) as error:
        yield f"{_Place(node)}: {error}"
        return
    if list(attrs.items()) != list(node.attrs.items()):
        yield f"{_Place(node)}: the attributes should be {attrs}"
    found = tuple(value.type for value in node.outputs)
    if found != types:
        yield f"{_Place(node)}: the outputs should be {', '.join(map(str, types))}"


def _imported(graph: Graph) -> Iterator[str]:
    """Invariants 8 and 9."""
    for node in graph.nodes:
        if node.op.endswith("_grad") or "_grad_" in node.op or node.op in OPTIMIZER_OPS:
            yield f"{_Place(node)}: such an op cannot come from a model"
        if node.origin.phase != "forward":
            yield f"{_Place(node)}: it is in the {node.origin.phase} phase"
    for state in graph.updates:
        if graph.states[state].kind != "buffer":
            yield f"update of %{state.name}: a model updates nothing but its own buffers"
