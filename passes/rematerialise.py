"""Computes forward results again in the backward pass, where keeping them costs more than it is worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pockc.ir import Builder, Graph, Node, Value
from pockc.ops import OPS
from pockc.passes.recompute_model import Step
from pockc.passes.rewrite import live_nodes


def with_second_computations(graph: Graph, step: Step, dropped: Iterable[int]) -> Graph:
    """The graph of the step, with the dropped nodes once more right before the backward pass reads their results.

    Each second computation carries its first one's module and source line, and the phase ``recompute``. Results are
    the same to the last bit: every op is a pure function.
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

    def emit(self, node: Node, *, late: bool) -> None:
        """A node of the graph; of the backward pass if ``late``."""
        inputs = tuple(map(self._second, node.inputs)) if late else node.inputs
        self.builder.nodes.append(node if inputs == node.inputs else replace(node, inputs=inputs))

    def emit_again(self, node: Node) -> None:
        """The second computation of a node."""
        inputs = [self._second(value) for value in node.inputs]
        self.builder.origin = replace(node.origin, phase="recompute")
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
