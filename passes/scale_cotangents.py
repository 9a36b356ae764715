"""Scales the cotangent of a convolution instead of its trained weight and the weight's gradient.

A batch norm that :mod:`pockc.passes.fold_batchnorm` folded leaves ``y = conv(x, w * s)`` with a factor per output
channel, so a step scales the weight for the input gradient once more, and the gradient of w by s. Both gradients are
linear in the cotangent g of y, whose last axis is the same channels:

    conv_grad_input(g, w * s) = conv_grad_input(g * s, w)        conv_grad_weight(x, g) * s = conv_grad_weight(x, g * s)

Late layers have few positions and many weights: there one product over g replaces two over w.
"""

from __future__ import annotations

from pockc.ir import Graph, Node, Value
from pockc.passes.rewrite import Rewriter
from pockc.recipe import Recipe


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Move the scale; only in float32, because narrow cotangents would be rounded, or overflow, once more.

    Pre:  gradients are derived, nothing is fused.
    Post: the same function, within rounding. No input gradient of a conv2d reads a trained weight times a factor per
          output channel, and no such factor follows its weight gradient, where the cotangent is the smaller one.
    """
    if recipe.dtype != "f32":
        return graph
    return _Scaling(graph).run()


class _Scaling:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rewriter = Rewriter(graph)
        self.makers = {output: node for node in graph.nodes for output in node.outputs}
        self.scaled: dict[tuple[Value, Value], Value] = {}  # by cotangent and scale

    def run(self) -> Graph:
        for node in self.graph.nodes:
            found = None
            if node.op == "conv2d_grad_input":
                found = self.input_gradient(node)
            elif node.op == "mul":
                found = self.weight_gradient(node)
            if found is None:
                self.rewriter.keep(node)
            else:
                self.rewriter.replace(node.outputs[0], found)
        return self.rewriter.finish()

    def input_gradient(self, node: Node) -> Value | None:
        """Of the scaled cotangent and the plain weight."""
        cotangent, weight = node.inputs
        factors = self.factors(self.makers.get(weight))
        if factors is None or factors[0] not in self.graph.states or not _is_smaller(cotangent, weight):
            return None
        inputs = (self.scaled_cotangent(node, cotangent, factors[1]), factors[0])
        return self.rewriter.emit(node, node.op, inputs, node.attrs)

    def weight_gradient(self, node: Node) -> Value | None:
        """Of the scaled cotangent, instead of one that is scaled afterwards."""
        factors = self.factors(node)
        gradient = self.makers.get(factors[0]) if factors is not None else None
        if factors is None or gradient is None or gradient.op != "conv2d_grad_weight":
            return None
        x, cotangent = gradient.inputs
        if self.rewriter.uses[factors[0]] != 1 or not _is_smaller(cotangent, factors[0]):
            return None
        inputs = (self.rewriter[x], self.scaled_cotangent(gradient, cotangent, factors[1]))
        return self.rewriter.emit(gradient, gradient.op, inputs, gradient.attrs)

    def factors(self, node: Node | None) -> tuple[Value, Value] | None:
        """A convolution's weight or its gradient, and a state with one factor per output channel."""
        if node is None or node.op != "mul":
            return None
        for weight, scale in (node.inputs, node.inputs[::-1]):
            shape = weight.type.shape
            if len(shape) == 4 and scale.type.shape == (shape[0], 1, 1, 1) and scale in self.graph.states:
                return weight, scale
        return None

    def scaled_cotangent(self, like: Node, cotangent: Value, scale: Value) -> Value:
        if (cotangent, scale) not in self.scaled:
            factor = self.rewriter.emit(like, "reshape", (scale,), {"shape": cotangent.type.shape[-1:]})
            self.scaled[cotangent, scale] = self.rewriter.emit(like, "mul", (self.rewriter[cotangent], factor))
        return self.scaled[cotangent, scale]


def _is_smaller(cotangent: Value, weight: Value) -> bool:
    return cotangent.type.nbytes <= weight.type.nbytes
