"""Removes what no result needs.

Pre: any level.
Post: every node has an output that some graph output or update depends on. Frozen parameters, buffers and constants
that nothing reads are gone; inputs, trained or updated states, slots and counters stay.
"""

from __future__ import annotations

from dataclasses import replace

from pockc.ir import Graph
from pockc.passes.rewrite import is_frozen, live_nodes
from pockc.recipe import Recipe


def run(graph: Graph, recipe: Recipe) -> Graph:
    """The graph without dead nodes and without unread frozen states."""
    nodes = live_nodes(list(graph.nodes), graph.results())
    read = {v for node in nodes for v in node.inputs}.union(graph.results())
    states = {v: s for v, s in graph.states.items() if v in read or not is_frozen(graph, recipe, v)}
    return replace(graph, states=states, nodes=tuple(nodes))
