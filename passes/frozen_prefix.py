"""The frozen prefix: what of a forward graph depends on inputs and frozen states alone, and names that outlive a build.

It is pure inference, the same in every step. `quantize_prefix` runs it in eight bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pockc.ir import Graph, Node, State, Value
from pockc.passes.rewrite import is_frozen
from pockc.recipe import Recipe


def prefix_nodes(graph: Graph, recipe: Recipe) -> tuple[Node, ...]:
    """The nodes in front of everything trained or updated, in order."""
    frozen = {value for value in graph.states if is_frozen(graph, recipe, value)}
    running = set(graph.inputs)
    found: list[Node] = []
    for node in graph.nodes:
        operands = set(node.inputs)
        if operands & running and operands <= running | frozen:
            found.append(node)
            running.update(node.outputs)
    return tuple(found)


def value_keys(graph: Graph, nodes: Sequence[Node]) -> dict[Value, str]:
    """A name for each input and each result of some nodes, by what computes it, down to the bytes of constants.

    Graphs of one model, in whatever mode it was traced, agree on the names of what they have in common.
    """
    keys = {value: f"input {value.name}" for value in graph.inputs}
    for node in nodes:
        for value in node.inputs:
            if value not in keys:
                keys[value] = _state_key(value, graph.states[value])
        text = f"{node.op} {sorted(node.attrs.items())} {[keys[value] for value in node.inputs]}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        keys.update({value: f"{digest} {position}" for position, value in enumerate(node.outputs)})
    return keys


def _state_key(value: Value, state: State) -> str:
    if state.kind != "constant" or state.data is None:
        return f"state {value.name}"
    return f"constant {value.type} {hashlib.sha256(state.data.tobytes()).hexdigest()}"
