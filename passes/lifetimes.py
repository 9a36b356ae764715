"""Which values share a buffer, and from which call to which call each buffer is alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pockc.ir import Graph, Node, Value
from pockc.ops import OPS

ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """The size rounded up to the alignment of the arena."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@dataclass(slots=True, eq=False)
class Buffer:
    """One stretch of memory: the values that live in it, one after the other or as views of each other.

    Alive on calls ``first`` to ``last`` inclusive; inputs from -1, results to the number of calls.
    ``state`` is set where the buffer is the home of a state: it is then always alive and never planned.
    """

    nbytes: int
    first: int
    last: int
    state: Value | None = None
    values: list[Value] = field(default_factory=list)


def optimizer_homes(node: Node) -> dict[int, int]:
    """Output index -> input index that it may overwrite, for the ops that update states."""
    slots = {"sgd": 0, "momentum": 1, "lion": 1, "adam": 2, "momentum8": 2, "lion8": 2, "adam8": 4}
    if node.op not in slots:
        return {}
    return {0: 0, **{i + 1: i + 2 for i in range(slots[node.op])}}


def in_place_inputs(node: Node, output: int) -> tuple[int, ...]:
    """Input indices whose buffer this output may take over."""
    homes = optimizer_homes(node)
    if homes:
        return (homes[output],) if output in homes else ()
    return OPS[node.op].in_place if output == 0 else ()


def storages(graph: Graph) -> dict[Value, Value]:
    """For each value, the one whose bytes it is: itself, or what it is a view of, at any remove."""
    root: dict[Value, Value] = {value: value for value in (*graph.inputs, *graph.states)}
    for node in graph.nodes:
        for output in node.outputs:
            root[output] = root[node.inputs[0]] if OPS[node.op].view else output
    return root


def takeover_candidates(node: Node, position: int, storage: Mapping[Value, object]) -> list[Value]:
    """The operands whose bytes an output may take over, provided that nothing reads them later.

    Only an operand of the output's own type, whose bytes the node reads through no other operand.
    """
    found = []
    for i in in_place_inputs(node, position):
        if i >= len(node.inputs) or node.inputs[i].type != node.outputs[position].type:
            continue
        value = node.inputs[i]
        if sum(storage[other] is storage[value] for other in node.inputs) == 1:
            found.append(value)
    return found


def readers_of_states(graph: Graph) -> dict[Value, list[int]]:
    """For each state, the calls that read it, directly or through a view."""
    root = storages(graph)
    readers: dict[Value, list[int]] = {state: [] for state in graph.states}
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            if root[value] in readers:
                readers[root[value]].append(index)
    return readers


def updates_in_place(graph: Graph) -> dict[Value, Value]:
    """New value -> state, where writing the new value straight into the state's buffer is right.

    It is where the value is made by a node of this graph, every reader of the old contents comes before that node
    (or is it, and the op allows it), and no two states claim the same value.
    """
    maker = {output: (i, node) for i, node in enumerate(graph.nodes) for output in node.outputs}
    readers = readers_of_states(graph)
    homes: dict[Value, Value] = {}
    for state, value in graph.updates.items():
        if value not in maker or value in homes or state.type != value.type:
            continue
        index, node = maker[value]
        if OPS[node.op].view:
            continue
        own = [i for i, operand in enumerate(node.inputs) if operand is state]
        allowed = set(own) <= set(in_place_inputs(node, node.outputs.index(value)))
        last_reader = max(readers[state], default=-1)
        if last_reader < index or (last_reader == index and own and allowed):
            homes[value] = state
    return homes


def buffers(graph: Graph) -> dict[Value, Buffer]:
    """The buffer of every value of a scheduled graph.

    Pre: every update is either in place (`updates_in_place`) or a `copy` that ends the graph.
    """
    end = len(graph.nodes)
    homes = updates_in_place(graph)
    last_use = _last_uses(graph, end)
    owner: dict[Value, Buffer] = {}

    def own(value: Value, buffer: Buffer) -> None:
        owner[value] = buffer
        buffer.values.append(value)
        buffer.last = max(buffer.last, last_use.get(value, buffer.first))

    state_buffers = {state: Buffer(state.type.nbytes, -1, end, state) for state in graph.states}
    for state, buffer in state_buffers.items():
        own(state, buffer)
    for value in graph.inputs:
        own(value, Buffer(value.type.nbytes, -1, -1))
    for index, node in enumerate(graph.nodes):
        for position, output in enumerate(node.outputs):
            if output in homes:
                own(output, state_buffers[homes[output]])
                continue
            source = _takeover(node, position, index, owner, last_use)
            own(output, source or Buffer(output.type.nbytes, index, index))
    return owner


def _last_uses(graph: Graph, end: int) -> dict[Value, int]:
    """The last call that reads each value; results live to the end; a view extends what it views."""
    last = {value: index for index, node in enumerate(graph.nodes) for value in node.inputs}
    last.update({value: end for value in graph.results()})
    for node in reversed(graph.nodes):
        if OPS[node.op].view:
            source, view = node.inputs[0], node.outputs[0]
            last[source] = max(last[source], last.get(view, -1))
    return last


def _takeover(
    node: Node, position: int, index: int, owner: dict[Value, Buffer], last_use: dict[Value, int]
) -> Buffer | None:
    """The buffer that an output inherits: what it views, or an operand that dies here and may be overwritten."""
    if OPS[node.op].view:
        return owner[node.inputs[0]]
    for value in takeover_candidates(node, position, owner):
        buffer = owner[value]
        if buffer.state is None and all(last_use.get(v, -1) <= index for v in buffer.values):
            return buffer
    return None
