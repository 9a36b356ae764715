"""Merges nodes that compute the same thing.

Two nodes are the same when op, operands and attributes are: every op is a pure function, and that includes
``dropout_mask``, whose bits follow from seed, step and stream. ``copy`` stays: it exists to have its own buffer.

Pre: any level.
Post: no two nodes but copies are structurally equal; of equal ones the first remains. Small constants of equal
contents are one state.
"""

from __future__ import annotations

from collections.abc import Hashable

from pockc.ir import Graph, Node, Value
from pockc.passes.rewrite import Rewriter
from pockc.recipe import Recipe

SMALL = 4096  # bytes; larger constants are not compared by content here: the artifact stores equal contents once


def run(graph: Graph, recipe: Recipe) -> Graph:
    """The graph with each computation done once."""
    rewriter = Rewriter(graph)
    merge_constants(graph, rewriter)
    seen: dict[Hashable, tuple[Value, ...]] = {}
    for node in graph.nodes:
        earlier = seen.setdefault(key(node, rewriter), node.outputs)
        if earlier is node.outputs or node.op == "copy":
            rewriter.keep(node)
            continue
        for old, new in zip(node.outputs, earlier, strict=True):
            rewriter.replace(old, new)
    return rewriter.finish()


def key(node: Node, rewriter: Rewriter) -> Hashable:
    """Equal for nodes that compute the same. Attributes go by text, which tells 0.0 from -0.0 and 1 from True."""
    return node.op, rewriter.inputs(node), tuple(sorted((name, repr(value)) for name, value in node.attrs.items()))


def merge_constants(graph: Graph, rewriter: Rewriter) -> None:
    """Map each small constant to the first one with the same type and bytes."""
    seen: dict[Hashable, Value] = {}
    for value, state in graph.states.items():
        if state.kind != "constant" or state.data is None or value.type.nbytes > SMALL:
            continue
        first = seen.setdefault((value.type, state.data.tobytes()), value)
        if first is not value:
            rewriter.replace(value, first)
