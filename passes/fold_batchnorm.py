"""Moves the frozen scale of a batch norm into the weight in front of it, and merges its shift with the bias.

A batch norm with frozen statistics and gamma is ``y * s + t``. Along the output channels ``(w * x) * s = (w * s) * x``,
so the scale is a factor of the weight. Where the weight is trained, ``w * s`` remains a node: the gradient of w passes
through it, and updates are those of the original model with gamma and statistics frozen. Where it is frozen, the
product is a constant after `fold`.
"""

from __future__ import annotations

from pockc.ir import Graph, Node, Value
from pockc.passes.rewrite import Rewriter, derived, is_frozen
from pockc.recipe import Recipe


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Rewrite ``mul(product, s)`` and ``add(add(y, b1), b2)``; nothing unless the recipe says ``fold``.

    Pre:  `layout` ran: the channels of a conv2d are its last axis.
    Post: no conv2d or matmul by a weight is followed, as its only reader, by a mul with a frozen vector over the
          channels, with or without a bias in between. Of several biases one sum remains, a function of states alone.
    """
    if recipe.batchnorm != "fold":
        return graph
    frozen = derived(graph, (v for v in graph.states if is_frozen(graph, recipe, v)))
    return _Folding(graph, frozen, derived(graph, graph.states)).run()


class _Folding:
    """``frozen`` values come from frozen states alone; ``static`` ones from states alone, trained ones included."""

    def __init__(self, graph: Graph, frozen: set[Value], static: set[Value]) -> None:
        self.graph, self.frozen, self.static = graph, frozen, static
        self.rewriter = Rewriter(graph)

    def run(self) -> Graph:
        for node in self.graph.nodes:
            found = None
            if node.op == "mul":
                found = self.scaled_product(node)
            elif node.op == "add":
                found = self.summed_bias(node)
            if found is None:
                self.rewriter.keep(node)
                continue
            self.rewriter.replace(node.outputs[0], found)
        return self.rewriter.finish()

    def scaled_product(self, node: Node) -> Value | None:
        inputs = self.rewriter.inputs(node)
        for y, scale in (inputs, inputs[::-1]):
            if scale in self.frozen and scale.type.shape == y.type.shape[-1:] and self.takes_scale(y):
                return self.scaled(y, scale)
        return None

    def takes_scale(self, y: Value) -> bool:
        """Whether ``y`` is a product by a weight, possibly plus biases, that nothing else reads."""
        node = self.rewriter.producers.get(y)
        if node is None or self.rewriter.uses[y] != 1:
            return False
        if node.op == "add":
            return node.inputs[1] in self.static and self.is_bias(node) and self.takes_scale(node.inputs[0])
        is_product = node.op in ("conv2d", "matmul") and len(node.inputs) == 2
        return is_product and node.inputs[1] in self.static and (node.op == "conv2d" or _is_matrix(node.inputs[1]))

    def scaled(self, y: Value, scale: Value) -> Value:
        """``y * scale`` for a ``y`` that takes the scale."""
        node = self.rewriter.producers[y]
        if node.op == "add":
            bias = self.emit(node, "mul", node.inputs[1], scale)
            return self.rewriter.emit(node, "add", (self.scaled(node.inputs[0], scale), bias))
        x, weight = node.inputs
        if node.op == "conv2d" or node.attrs["transpose_b"]:  # output channels are the first axis of the weight
            shape = (*scale.type.shape, *(1,) * (len(weight.type.shape) - 1))
            scale = self.emit(node, "reshape", scale, shape=shape)
        return self.rewriter.emit(node, node.op, (x, self.emit(node, "mul", weight, scale)), node.attrs)

    def summed_bias(self, node: Node) -> Value | None:
        """``(y + b1) + b2`` as ``y + (b1 + b2)``."""
        inner = self.rewriter.producer(self.rewriter[node.inputs[0]], "add")
        second = self.rewriter[node.inputs[1]]
        if inner is None or self.rewriter.uses[inner.outputs[0]] != 1 or not self.is_bias(inner):
            return None
        y, first = inner.inputs
        if first not in self.static or second not in self.static or first.type != second.type:
            return None
        return self.rewriter.emit(inner, "add", (y, self.emit(node, "add", first, second)))

    def is_bias(self, node: Node) -> bool:
        """Whether the second operand of an add is a vector over the channels of the first."""
        y, bias = node.inputs
        return bias.type.shape == y.type.shape[-1:] and y.type == node.outputs[0].type

    def emit(self, like: Node, op: str, *inputs: Value, **attrs: object) -> Value:
        """A node over states alone."""
        value = self.rewriter.emit(like, op, inputs, attrs)
        self.static.add(value)
        if self.frozen.issuperset(inputs):
            self.frozen.add(value)
        return value


def _is_matrix(weight: Value) -> bool:
    return len(weight.type.shape) == 2
