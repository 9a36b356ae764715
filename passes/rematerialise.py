"""Computes forward results again in the backward pass, where keeping them costs more than it is worth."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace

from pockc.ir import Builder, Graph, Node, Value
from pockc.ops import OPS
from pockc.passes.lifetimes import update_chains
from pockc.passes.recompute_model import Step
from pockc.passes.rewrite import live_nodes


def with_second_computations(graph: Graph, step: Step, dropped: Iterable[int]) -> Graph:
    """The graph of the step, with the dropped nodes once more right before the backward pass reads their results.

    Each second computation carries its first one's module and source line, and the phase ``recompute``. Results are
    the same to the last bit: every op is a pure function. Of a weight that is being updated range by range they read
    rows that have not had their turn where these are by then, so that nobody needs the old weight for longer.
    """
    rewriting = _Rewriting(graph)
    for index, before in step.again(set(dropped)):
        for other in before:
            rewriting.emit_again(graph.nodes[other])
        rewriting.emit(graph.nodes[index], late=not step.early[index])
    return rewriting.finish()


class _Rewriting:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.builder = Builder(replace(graph, nodes=()))
        self.producers = graph.producers()
        self.again: dict[Value, Value] = {}  # dropped value, or a view of one -> its second computation
        self.state_of = {link: state for state, chain in update_chains(graph).items() for link in chain}
        self.latest: dict[Value, Value] = {}  # updated state -> what has taken its place so far
        self.changed: dict[Value, list[tuple[int, int]]] = {}  # its rows that are new there
        self.rows: dict[tuple[Value, int, int], Value] = {}  # slices of links

    def emit(self, node: Node, *, late: bool) -> None:
        """A node of the graph; of the backward pass if ``late``."""
        inputs = tuple(map(self._second, node.inputs)) if late else node.inputs
        if node.op == "slice" and inputs[0] in self.state_of and node.attrs["axis"] == 0:
            rows = self.rows.setdefault((inputs[0], node.attrs["start"], node.attrs["stop"]), node.outputs[0])
            if rows is not node.outputs[0]:
                self.again[node.outputs[0]] = rows
                return
        self.builder.nodes.append(node if inputs == node.inputs else replace(node, inputs=inputs))
        for value in self.state_of.keys() & node.outputs:
            self._note_link(node, value)

    def _note_link(self, node: Node, link: Value) -> None:
        state, start = self.state_of[link], node.attrs.get("start", -1)
        self.latest[state] = link
        rows = (start, start + node.inputs[1].type.shape[0]) if start >= 0 else (0, sys.maxsize)
        self.changed.setdefault(state, []).append(rows)

    def emit_again(self, node: Node) -> None:
        """The second computation of a node."""
        inputs = [self._second(value) for value in node.inputs]
        self.builder.origin = replace(node.origin, phase="recompute")
        inputs = [self._rows_by_now(value) for value in inputs]
        outputs = self.builder.multi(node.op, *inputs, hint=node.outputs[0].name, **node.attrs)
        self.again.update(zip(node.outputs, outputs, strict=True))

    def finish(self) -> Graph:
        """The graph, without first computations that nothing reads any more."""
        self.builder.nodes = live_nodes(self.builder.nodes, self.graph.results())
        return self.builder.build(self.graph.outputs, self.graph.updates)

    def _second(self, value: Value) -> Value:
        """What the backward pass reads instead of a value: itself, unless it or what it is a view of was dropped."""
        node = self.producers.get(value)
        view = value not in self.again and node is not None and OPS[node.op].view
        if view and node is not None and self._second(node.inputs[0]) is not node.inputs[0]:
            self.emit_again(node)
        return self.again.get(value, value)

    def _rows_by_now(self, value: Value) -> Value:
        """For a slice of a state whose update has begun elsewhere, the same rows of the state's last link."""
        node = self.producers.get(value)
        if node is None or node.op != "slice" or node.attrs["axis"] != 0 or node.attrs["step"] != 1:
            return value
        state, start, stop = node.inputs[0], node.attrs["start"], node.attrs["stop"]
        if state not in self.latest or any(first < stop and start < end for first, end in self.changed[state]):
            return value
        known = (self.latest[state], start, stop)
        if known not in self.rows:
            self.rows[known] = self.builder("slice", self.latest[state], hint=value.name, **node.attrs)
        return self.rows[known]
