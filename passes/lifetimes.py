"""Which values share a buffer, and from which call to which call each buffer is alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from pockc.ir import Graph, Node, TensorType, Value
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


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes that a value is: those of ``storage`` from ``offset`` on."""

    storage: Value  # the value itself, or what it is a view of, at any remove
    offset: int = 0


def extents(graph: Graph) -> dict[Value, Extent]:
    """Where the bytes of each value are.

    Views are reshapes, and slices of inputs and states that are contiguous and begin at a multiple of the alignment.
    Slices of other values are copied: a small part that waits for the backward pass must not keep the whole alive.
    """
    found = {value: Extent(value) for value in (*graph.inputs, *graph.states)}
    given = set(found)
    for node in graph.nodes:
        source = found.get(node.inputs[0]) if node.inputs else None
        offset = view_offset(node, source is not None and source.storage in given)
        for output in node.outputs:
            if source is None or offset is None:
                found[output] = Extent(output)
            else:
                found[output] = Extent(source.storage, source.offset + offset)
    return found


def view_offset(node: Node, of_given: bool) -> int | None:
    """At which byte of its first operand a view begins; None for a node that makes bytes of its own."""
    if OPS[node.op].view:
        return 0
    if node.op != "slice" or not of_given:
        return None
    return rows_offset(node.inputs[0].type, **node.attrs)


def rows_offset(source: TensorType, *, axis: int, start: int, stop: int, step: int = 1) -> int | None:
    """At which byte a slice begins that can be read where it lies; None for one that has to be copied."""
    offset = source.nbytes // source.shape[axis] * start
    contiguous = step == 1 and prod(source.shape[:axis]) == 1
    return offset if contiguous and offset % ALIGNMENT == 0 else None


def storages(graph: Graph) -> dict[Value, Value]:
    """For each value, the one whose bytes it is, or is a part of: itself, or what it is a view of, at any remove."""
    return {value: extent.storage for value, extent in extents(graph).items()}


def takeover_candidates(node: Node, position: int, storage: Mapping[Value, Value]) -> list[Value]:
    """The operands whose bytes an output may take over, provided that nothing reads them later.

    Only an operand of the output's own type, whose bytes the node reads through no other operand, and which is all of
    its storage: other parts of that may be in use.
    """
    found = []
    for i in in_place_inputs(node, position):
        if i >= len(node.inputs) or node.inputs[i].type != node.outputs[position].type:
            continue
        value = node.inputs[i]
        whole = storage[value].type.nbytes == value.type.nbytes
        if whole and sum(storage[other] is storage[value] for other in node.inputs) == 1:
            found.append(value)
    return found


def storage_readers(graph: Graph) -> dict[Value, list[int]]:
    """For each storage (see `storages`), the calls that read it, directly or through a view."""
    root = storages(graph)
    found: dict[Value, list[int]] = {value: [] for value in root.values()}
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            found[root[value]].append(index)
    return found


def update_chains(graph: Graph) -> dict[Value, tuple[Value, ...]]:
    """For each updated state, what takes its place one after the other: last its new value.

    As a rule that is the new value alone. Updates of some rows each make a chain, in which every link has the rows of
    the one before it but for its own.
    """
    maker = graph.producers()
    results = set(graph.results())

    def older(link: Value) -> Value | None:
        node = maker.get(link)
        if node is None or not optimizer_homes(node) or not _updates_part(node):
            return None
        operand = node.inputs[optimizer_homes(node)[node.outputs.index(link)]]
        return None if operand in results else operand

    chains = {}
    for state, value in graph.updates.items():
        links: list[Value] = []
        link: Value | None = value
        while link is not None and link is not state:
            links.append(link)
            link = older(link)
        chains[state] = tuple(reversed(links)) if link is state else (value,)
    return chains


def _updates_part(node: Node) -> bool:
    """Whether an optimizer node changes some rows alone, a range of them or those at indices."""
    return node.attrs.get("start", -1) >= 0 or node.inputs[-1].type.dtype == "i32"


def overwritten(graph: Graph) -> dict[Value, tuple[Value, Value]]:
    """Value -> the state whose buffer it may be written into, and the contents that are there before.

    These are new values of states, and links on the way to them, each made by a node of this graph behind every reader
    of the old contents (or being it, where the op allows it). No two states claim the same value.
    """
    maker = {output: (i, node) for i, node in enumerate(graph.nodes) for output in node.outputs}
    root = storages(graph)
    known_readers = storage_readers(graph)
    homes: dict[Value, tuple[Value, Value]] = {}

    def may_overwrite(value: Value, old: Value) -> bool:
        if value not in maker or value in homes or old.type != value.type:
            return False
        index, node = maker[value]
        if root[value] is not value:
            return False
        own = [i for i, operand in enumerate(node.inputs) if operand is old]
        allowed = set(own) <= set(in_place_inputs(node, node.outputs.index(value)))
        last_reader = max(known_readers[old], default=-1)
        return last_reader < index or (last_reader == index and bool(own) and allowed)

    for state, chain in update_chains(graph).items():
        for links in (chain, chain[-1:]):
            pairs = list(zip(links, (state, *links[:-1]), strict=True))
            if all(may_overwrite(value, old) for value, old in pairs):
                homes.update({value: (state, old) for value, old in pairs})
                break
    return homes


def updates_in_place(graph: Graph) -> dict[Value, Value]:
    """Value -> state, where writing the value straight into the state's buffer is right (see `overwritten`)."""
    return {value: state for value, (state, _) in overwritten(graph).items()}


def buffers(graph: Graph, *, in_place: bool = True) -> dict[Value, Buffer]:
    """The buffer of every value of a scheduled graph. Without ``in_place`` only views and states share theirs.

    Pre: every update is either in place (`updates_in_place`) or a `copy` that ends the graph.
    """
    end = len(graph.nodes)
    homes = updates_in_place(graph)
    storage = storages(graph)
    last_use = _last_uses(graph, storage, end)
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
            if storage[output] is not output:
                own(output, owner[storage[output]])
                continue
            candidates = takeover_candidates(node, position, storage) if in_place else []
            heir = _takeover(candidates, index, owner, last_use)
            own(output, heir or Buffer(output.type.nbytes, index, index))
    return owner


def _last_uses(graph: Graph, storage: Mapping[Value, Value], end: int) -> dict[Value, int]:
    """The last call that reads each value; results live to the end; a view extends what it views."""
    last = {value: index for index, node in enumerate(graph.nodes) for value in node.inputs}
    last.update({value: end for value in graph.results()})
    for node in reversed(graph.nodes):
        for view in node.outputs:
            if storage[view] is not view:
                source = node.inputs[0]
                last[source] = max(last[source], last.get(view, -1))
    return last


def _takeover(
    candidates: list[Value], index: int, owner: dict[Value, Buffer], last_use: dict[Value, int]
) -> Buffer | None:
    """The buffer that an output inherits: of an operand that dies here and may be overwritten."""
    for value in candidates:
        buffer = owner[value]
        if buffer.state is None and all(last_use.get(v, -1) <= index for v in buffer.values):
            return buffer
    return None


def unread_fills(graph: Graph) -> set[Node]:
    """The nodes that fill a tensor of which parts overwrite every element, by `insert`, before anything reads it.

    No call makes them: the first part is written alone, to where the tensor will be.
    """
    readers, results = graph.consumers(), set(graph.results())
    return {node for node in graph.nodes if node.op == "expand" and _covered(node.outputs[0], readers, results)}


def _covered(value: Value, readers: Mapping[Value, list[Node]], results: set[Value]) -> bool:
    """Whether the first readers of ``value`` are a chain of inserts along one axis that leave nothing of it."""
    axis, missing = None, set[int]()
    while value not in results:
        found = readers.get(value, [])
        if len(found) != 1 or found[0].op != "insert" or found[0].inputs[0] is not value:
            return False
        base, part = (operand.type.shape for operand in found[0].inputs)
        if axis is None:
            axis = found[0].attrs["axis"]
            missing = set(range(base[axis]))
        if found[0].attrs["axis"] != axis:
            return False
        start = found[0].attrs["start"]
        missing -= set(range(start, start + part[axis]))
        if not missing:
            return True
        value = found[0].outputs[0]
    return False
