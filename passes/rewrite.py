"""What the rewriting passes share: one forward sweep that keeps, replaces or drops nodes.

A sweep visits the nodes in order. Inputs of a node are looked up in the :class:`Rewriter` first, so that a pass
always sees the operands that were already rewritten, and one sweep carries a rewrite through whole chains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pockc.ir import Builder, Graph, Node, State, Value
from pockc.recipe import Recipe

FROZEN_KINDS = frozenset({"parameter", "buffer", "constant"})


class Rewriter:
    """One forward sweep over ``graph``. Nodes that end up unused are dropped by :meth:`finish`.

    ``uses`` counts the uses of each value, by nodes and as a result. It may count nodes that died during the sweep,
    so that it errs on the safe side: a count of one is exact.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.builder = Builder()
        self.builder.inputs = list(graph.inputs)
        self.builder.states = dict(graph.states)
        self.producers: dict[Value, Node] = {}
        self.uses = count_uses(graph)
        self._mapping: dict[Value, Value] = {}
        self._emitted: set[Value] = set()  # and not yet the replacement of an old value

    def __getitem__(self, value: Value) -> Value:
        """What an old value became; the value itself where nothing changed."""
        return self._mapping.get(value, value)

    def inputs(self, node: Node) -> tuple[Value, ...]:
        """The operands of an old node, as rewritten so far."""
        return tuple(self[v] for v in node.inputs)

    def producer(self, value: Value, op: str) -> Node | None:
        """The rewritten node that makes ``value``, if it is an ``op``."""
        node = self.producers.get(value)
        return node if node is not None and node.op == op else None

    def keep(self, node: Node) -> None:
        """Append an old node with rewritten operands of unchanged types, and with its own outputs."""
        inputs = self.inputs(node)
        self.append(node if inputs == node.inputs else replace(node, inputs=inputs))

    def append(self, node: Node) -> None:
        """Append a finished node."""
        self.builder.nodes.append(node)
        self.producers.update((output, node) for output in node.outputs)

    def emit(self, like: Node, op: str, inputs: Iterable[Value], attrs: Mapping[str, Any] | None = None) -> Value:
        """Append a type-checked node with one output, with the origin and the printed name of ``like``."""
        self.builder.origin = like.origin
        value = self.builder(op, *inputs, hint=like.outputs[0].name, **(attrs or {}))
        self.producers[value] = self.builder.nodes[-1]
        self.uses[value] = 1  # by the next node of the same rewrite, until it replaces an old value
        self._emitted.add(value)
        return value

    def replace(self, old: Value, new: Value) -> None:
        """Let every later use of ``old`` read ``new``."""
        own = 0 if new in self._emitted else self.uses.get(new, 0)
        self._emitted.discard(new)
        self.uses[new] = own + self.uses.get(old, 0)
        self._mapping[old] = new

    def finish(self) -> Graph:
        """The rewritten graph without dead nodes, with unique names."""
        outputs = {name: self[v] for name, v in self.graph.outputs.items()}
        updates = {state: self[v] for state, v in self.graph.updates.items()}
        self.builder.nodes = live_nodes(self.builder.nodes, {*outputs.values(), *updates.values()})
        return self.builder.build(outputs, updates)


def count_uses(graph: Graph) -> dict[Value, int]:
    """How often each value is read: by operands of nodes, each operand counted, and as a result of the graph."""
    uses: dict[Value, int] = {}
    for value in (*(v for node in graph.nodes for v in node.inputs), *graph.results()):
        uses[value] = uses.get(value, 0) + 1
    return uses


def live_nodes(nodes: list[Node], results: Iterable[Value]) -> list[Node]:
    """The nodes that some result depends on, in order."""
    needed = set(results)
    live: list[Node] = []
    for node in reversed(nodes):
        if needed.isdisjoint(node.outputs):
            continue
        needed.update(node.inputs)
        live.append(node)
    return live[::-1]


def is_frozen(graph: Graph, recipe: Recipe, value: Value) -> bool:
    """Whether ``value`` is a state that no entry changes: neither trained nor updated, and no slot or counter."""
    state = graph.states.get(value)
    if state is None or state.kind not in FROZEN_KINDS or value in graph.updates:
        return False
    return state.kind == "constant" or not (value.name in recipe.trained or value.name in recipe.updated_buffers)


def derived(graph: Graph, roots: Iterable[Value]) -> set[Value]:
    """The roots and everything computed from them alone."""
    found = set(roots)
    for node in graph.nodes:
        if node.inputs and found.issuperset(node.inputs):
            found.update(node.outputs)
    return found


def constant_scalar(states: Mapping[Value, State], value: Value) -> float | None:
    """The number that fills a constant state; None where the value is no constant or its elements differ."""
    state = states.get(value)
    if state is None or state.kind != "constant" or state.data is None or not state.data.size:
        return None
    first = state.data.flat[0]
    return float(first) if np.all(state.data == first) else None
