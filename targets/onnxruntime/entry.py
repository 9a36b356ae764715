"""One entry of a program as an ONNX graph in plain records: nodes, constants, arguments, which updates are in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pockc.ir import Array, Graph, Origin, State, TensorType, Value
from pockc.targets.onnxruntime.emitter import Emitter, OnnxNode, Permutation, emit_graph, identity, in_order
from pockc.targets.onnxruntime.table import LOWERINGS

# Nodes whose result may be their operand's own memory: who reads it reads the operand.
_VIEWS = frozenset({"Reshape", "Identity", "Squeeze", "Unsqueeze"})
# Nodes that read each element of an operand before they write it, if to the same place: elementwise ones, and those
# that copy an operand only where the result is elsewhere.
_ELEMENT_BY_ELEMENT = frozenset({"Add", "Sub", "Mul", "Div", "ScatterND", "ScatterElements"})


@dataclass(frozen=True, slots=True)
class Argument:
    """An input or output of the graph: the tensor's name, and the value's type in the user's layout."""

    tensor: str
    name: str  # the user's: of an input, an output or a state
    type: TensorType


@dataclass(frozen=True, slots=True)
class OnnxEntry:
    """An entry: ``states`` follow the inputs, ``updates`` follow the outputs.

    ``in_place`` names the states whose new value may be written over the old one, because everything that reads the old
    one comes before.
    """

    name: str
    nodes: tuple[OnnxNode, ...]
    constants: Mapping[str, Array]
    inputs: tuple[Argument, ...]
    states: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    updates: tuple[Argument, ...]
    in_place: frozenset[str]


def stored_order(state: State, value: Value) -> Permutation:
    """The order of a state's axes in the user's layout, in which the model takes it."""
    return tuple(int(axis) for axis in np.argsort(state.permutation)) if state.permutation else identity(value)


def stored_type(state: State, value: Value) -> TensorType:
    """The type of a state in the user's layout."""
    return TensorType(in_order(value.type.shape, stored_order(state, value)), value.type.dtype)


def make_entry(name: str, graph: Graph, mutable: Collection[str]) -> OnnxEntry:
    """The ONNX graph of an entry.

    Args:
        name: Of the entry.
        graph: Its IR; every op has a lowering.
        mutable: Names of the states that the program may change: inputs here. All others are initializers.
    """
    e = Emitter()
    inputs = [_input(e, value) for value in graph.inputs]
    states = [_state(e, value, state) for value, state in graph.states.items() if value.name in mutable]
    for value, state in graph.states.items():
        if value.name not in mutable:
            _initializer(e, value, state)
    emit_graph(graph, LOWERINGS, e)
    e.origin = Origin(module=f"<{name}>")
    outputs = [Argument(e.read(value), key, value.type) for key, value in graph.outputs.items()]
    updates = [
        Argument(e.read(new, stored_order(graph.states[old], old)), old.name, stored_type(graph.states[old], old))
        for old, new in graph.updates.items()
    ]
    wanted = [argument.name for argument in outputs] + [f"{argument.name}.new" for argument in updates]
    results = _named_results(e, [*outputs, *updates], wanted)
    nodes = _live(e.nodes, {argument.tensor for argument in results})
    read = {tensor for node in nodes for tensor in node.inputs}
    used = tuple(argument for argument in states if argument.tensor in read)
    updated = tuple(results[len(outputs) :])
    return OnnxEntry(
        name=name,
        nodes=tuple(nodes),
        constants={tensor: array for tensor, array in e.constants.items() if tensor in read},
        inputs=tuple(inputs),
        states=used,
        outputs=tuple(results[: len(outputs)]),
        updates=updated,
        in_place=_in_place(nodes, used, updated),
    )


def _input(e: Emitter, value: Value) -> Argument:
    tensor = e.unique(value.name)
    e.write(value, tensor)
    return Argument(tensor, value.name, value.type)


def _state(e: Emitter, value: Value, state: State) -> Argument:
    tensor = e.unique(value.name)
    e.write(value, tensor, stored_order(state, value))
    return Argument(tensor, value.name, stored_type(state, value))


def _initializer(e: Emitter, value: Value, state: State) -> None:
    """A frozen state, in the user's layout."""
    tensor = e.unique(value.name)
    e.constants[tensor] = state.original()
    e.write(value, tensor, stored_order(state, value))


def _named_results(e: Emitter, results: list[Argument], wanted: list[str]) -> list[Argument]:
    """The results under names of their own. One that no node makes, or that is two results, is copied."""
    made = {tensor for node in e.nodes for tensor in node.outputs}
    renamed: dict[str, str] = {}
    found = []
    for argument, name in zip(results, wanted, strict=True):
        name = e.unique(name)
        if argument.tensor in made and argument.tensor not in renamed:
            renamed[argument.tensor] = name
        else:
            tensor = e("Identity", argument.tensor)
            renamed[tensor] = name
        found.append(Argument(name, argument.name, argument.type))
    for node in e.nodes:
        node.inputs[:] = [renamed.get(tensor, tensor) for tensor in node.inputs]
        node.outputs[:] = [renamed.get(tensor, tensor) for tensor in node.outputs]
    return found


def _live(nodes: list[OnnxNode], wanted: set[str]) -> list[OnnxNode]:
    """The nodes that the wanted tensors need; of optional outputs only those that somebody reads."""
    live = set(wanted)
    found = []
    for node in reversed(nodes):
        if not live.intersection(node.outputs):
            continue
        live.update(node.inputs)
        kept = [tensor if tensor in live else "" for tensor in node.outputs]
        while not kept[-1]:
            kept.pop()
        found.append(OnnxNode(node.op, node.inputs, kept, node.attrs, node.origin))
    return found[::-1]


def _in_place(nodes: list[OnnxNode], states: Iterable[Argument], updates: Iterable[Argument]) -> frozenset[str]:
    """The states whose new value no reader of the old one can come after, in whatever order the nodes run.

    ONNX Runtime orders nodes as it likes, as long as operands come first. So every node that reads a state, itself or
    a view of it, has to be among those that the node of the new value waits for, or be that node and go element by
    element. Integers are copied in any case: they are few, and the format does not let calls replace them.
    """
    makers = {tensor: index for index, node in enumerate(nodes) for tensor in node.outputs}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        for tensor in node.inputs:
            readers.setdefault(tensor, []).append(index)
    tensors = {argument.name: argument.tensor for argument in states}
    safe = set()
    for update in updates:
        last, old = makers[update.tensor], tensors.get(update.name)
        if update.type.dtype != "f32" or old is None or nodes[last].op in _VIEWS:
            continue
        before = _ancestors(last, nodes, makers)
        if all(_comes_before(reader, last, before, nodes, old) for reader in _readers(old, nodes, readers)):
            safe.add(update.name)
    return frozenset(safe)


def _comes_before(reader: int, last: int, before: set[int], nodes: list[OnnxNode], old: str) -> bool:
    return reader in before or (reader == last and old in nodes[last].inputs and nodes[last].op in _ELEMENT_BY_ELEMENT)


def _readers(tensor: str, nodes: list[OnnxNode], readers: Mapping[str, list[int]]) -> list[int]:
    """The nodes that read a tensor, or one that may be the same memory."""
    found = []
    for index in readers.get(tensor, ()):
        found.append(index)
        if nodes[index].op in _VIEWS:
            found += _readers(nodes[index].outputs[0], nodes, readers)
    return found


def _ancestors(last: int, nodes: list[OnnxNode], makers: Mapping[str, int]) -> set[int]:
    """The nodes that a node waits for."""
    found: set[int] = set()
    pending = [last]
    while pending:
        for tensor in nodes[pending.pop()].inputs:
            index = makers.get(tensor)
            if index is not None and index not in found:
                found.add(index)
                pending.append(index)
    return found
