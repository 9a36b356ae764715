"""Frozen weights in fewer bytes: bf16, int8 per output channel, int4 in groups of 32; kernels decode them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pockc.compact import Bytes, compact_nbytes, encode
from pockc.ir import Array, Graph, Node, TensorType, Value, substitute
from pockc.ops import OPS
from pockc.passes.rewrite import is_frozen
from pockc.recipe import Recipe

SMALLEST_BYTES = 4096  # what is smaller saves less than its scales and its error are worth
LARGEST_MAGNITUDE = 1e38  # rounding up a larger one could make it infinite
# By `Recipe.frozen_dtype`, best first: where rows are short, int8 takes no more bytes than int4.
CANDIDATES: Mapping[str, tuple[str, ...]] = {"f32": (), "bf16": ("bf16",), "int8": ("q8",), "int4": ("q8", "q4")}
Encoded = tuple[str, Bytes]  # dtype, rows


def run(entries: Mapping[str, Graph], recipe: Recipe) -> dict[str, Graph]:
    """Store each large frozen weight as `Recipe.frozen_dtype` says, in all entries of a program at once.

    A weight qualifies where every reader takes it as the operand that may be compact (`OpDef.weight`). A parameter must
    qualify in every entry that reads it, since entries share it; that is why this pass sees them together. Constants,
    such as weights with a batch norm folded into them, are each entry's own; equal ones are stored once anyway.

    Pre:  the entries are lowered: frozen factors are folded into their weights, whose bytes are final; nothing that
          the order or the plan depends on changes, since frozen weights are mapped, not placed.
    Post: names, nodes and shapes are the same. Trained parameters, and all that is small, of one axis, or read in any
          other way, are f32.
    """
    if not CANDIDATES[recipe.frozen_dtype]:
        return dict(entries)
    chosen = _agreed(entries, recipe)
    encoded: dict[int, Encoded | None] = {}  # by identity: entries share arrays, and `entries` keeps them alive
    for name, graph in entries.items():
        for value in chosen[name]:
            data = graph.states[value].data
            if data is not None and id(data) not in encoded:
                encoded[id(data)] = _encoded(data, recipe)
    return {
        name: _with_compact(graph, {value: encoded.get(id(graph.states[value].data)) for value in chosen[name]})
        for name, graph in entries.items()
    }


def _agreed(entries: Mapping[str, Graph], recipe: Recipe) -> dict[str, list[Value]]:
    """By entry, what may be compact: states that qualify in all the entries that read them."""
    readers = {name: graph.consumers() for name, graph in entries.items()}
    qualified = {
        name: {v for v in graph.states if v in readers[name] and _qualifies(graph, recipe, v, readers[name][v])}
        for name, graph in entries.items()
    }
    refused = {
        value.name
        for name, graph in entries.items()
        for value, state in graph.states.items()
        if state.kind != "constant" and value in readers[name] and value not in qualified[name]
    }
    return {
        name: [v for v in graph.states if v in qualified[name] and (_is_constant(graph, v) or v.name not in refused)]
        for name, graph in entries.items()
    }


def _is_constant(graph: Graph, value: Value) -> bool:
    return graph.states[value].kind == "constant"


def _qualifies(graph: Graph, recipe: Recipe, value: Value, readers: list[Node]) -> bool:
    type_ = value.type
    if type_.dtype != "f32" or len(type_.shape) < 2 or type_.nbytes < SMALLEST_BYTES or value in graph.results():
        return False
    as_weights = all(_reads_as_weight(node, value) for node in readers)
    return as_weights and graph.states[value].data is not None and is_frozen(graph, recipe, value)


def _reads_as_weight(node: Node, value: Value) -> bool:
    """Whether a node may read the value in compact form: as its weight, and a matrix product as one matrix."""
    positions = [i for i, operand in enumerate(node.inputs) if operand is value]
    return positions == [OPS[node.op].weight] and (node.op != "matmul" or len(value.type.shape) == 2)


def _encoded(data: Array, recipe: Recipe) -> Encoded | None:
    """The smallest form that the recipe allows; None where that saves nothing, or numbers are out of range."""
    if not np.abs(data).max() <= LARGEST_MAGNITUDE:  # a NaN is out of range too
        return None
    sizes = [(compact_nbytes(data.shape, dtype), dtype) for dtype in CANDIDATES[recipe.frozen_dtype]]
    nbytes, dtype = min(sizes, key=lambda size: size[0])
    return (dtype, encode(data, dtype)) if nbytes < data.nbytes else None


def _with_compact(graph: Graph, encoded: Mapping[Value, Encoded | None]) -> Graph:
    new = {value: Value(value.name, TensorType(value.type.shape, form[0])) for value, form in encoded.items() if form}
    states = {
        new.get(value, value): replace(state, data=form[1]) if (form := encoded.get(value)) else state
        for value, state in graph.states.items()
    }
    return replace(substitute(graph, new), states=states)
