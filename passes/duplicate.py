"""Recompute what is cheap: a value made of states alone need not wait in memory for the backward pass."""

from __future__ import annotations

from dataclasses import replace

from pockc.ir import Builder, Graph, Node, Value
from pockc.recipe import Recipe

MAX_INPUTS_PER_OUTPUT = 2  # an elementwise or data-moving node reads about as much as it writes


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Give backward readers their own copy of cheap nodes that depend on states only.

    A trained weight under a folded batch norm is scaled once in the forward pass; keeping the scaled copy for the
    input gradient would double the weights' memory, and scaling it again costs one pass over it.

    Pre:  forward and backward nodes are in one graph, states are not updated yet where they are read.
    Post: no node that reads only states, and is cheap, has readers in both the forward and the backward pass.
    """
    readers = graph.consumers()
    builder = Builder(replace(graph, nodes=()))
    clones: dict[Value, Value] = {}
    for node in graph.nodes:
        if node.origin.phase != "forward" and any(v in clones for v in node.inputs):
            node = replace(node, inputs=tuple(clones.get(v, v) for v in node.inputs))
        builder.nodes.append(node)
        if not _is_cheap(node, graph):
            continue
        phases = {reader.origin.phase != "forward" for reader in readers.get(node.outputs[0], ())}
        if phases == {True, False}:
            builder.origin = replace(node.origin, phase="backward")
            clones[node.outputs[0]] = builder(node.op, *node.inputs, hint=node.outputs[0].name, **node.attrs)
    return builder.build(graph.outputs, graph.updates)


def _is_cheap(node: Node, graph: Graph) -> bool:
    if len(node.outputs) != 1 or node.op not in ("mul", "add", "sub", "transpose", "reshape", "take", "expand", "clip"):
        return False
    read = sum(value.type.nbytes for value in node.inputs)
    written = node.outputs[0].type.nbytes
    return all(value in graph.states for value in node.inputs) and read <= MAX_INPUTS_PER_OUTPUT * written
