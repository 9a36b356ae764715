"""Channel-sparse updates: cut the saved activation, not the finished gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pockc.ir import Builder, Graph, Node, Value
from pockc.recipe import Recipe

# A rule gets a builder, the node that computes what is taken from, the indices and the axis, and returns the same
# slice computed from slices of the operands, or None where that is not possible.
Rule = Callable[[Builder, Node, Value, int], Value | None]


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Push every `take` of a gradient up through what computes it, to the activation that the forward pass keeps.

    Pre:  `attach_optimizer` took the updated channels out of full weight gradients.
    Post: where the chain allows it, only the slice is ever computed, and only a slice of the activation is saved:
          memory and work fall with the fraction (paper, section 3.2, sub-layer sparse backpropagation).
    """
    while True:
        graph, moved = _sweep(graph)
        if not moved:
            return graph


def _sweep(graph: Graph) -> tuple[Graph, bool]:
    producers, consumers = graph.producers(), graph.consumers()
    kept = set(graph.results())
    builder = Builder(replace(graph, nodes=()))
    renamed: dict[Value, Value] = {}
    moved = False
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(v, v) for v in node.inputs))
        source = producers.get(node.inputs[0]) if node.op == "take" else None
        alone = source is not None and len(consumers[node.inputs[0]]) == 1 and node.inputs[0] not in kept
        if source is not None and alone and source.op in RULES and node.origin.phase == "backward":
            source = replace(source, inputs=tuple(renamed.get(v, v) for v in source.inputs))
            builder.origin = source.origin
            result = RULES[source.op](builder, source, node.inputs[1], int(node.attrs["axis"]))
            if result is not None:
                renamed[node.outputs[0]] = result
                moved = True
                continue
        builder.nodes.append(node)
    outputs = {name: renamed.get(v, v) for name, v in graph.outputs.items()}
    updates = {state: renamed.get(v, v) for state, v in graph.updates.items()}
    pushed = builder.build(outputs, updates)
    return (_without_unused(pushed), moved)


def _without_unused(graph: Graph) -> Graph:
    """Drop the gradients whose slice is computed directly now; they were read by their `take` alone."""
    live = set(graph.results())
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if live.intersection(node.outputs):
            live.update(node.inputs)
            nodes.append(node)
    return replace(graph, nodes=tuple(reversed(nodes)))


def _take(builder: Builder, value: Value, indices: Value, axis: int) -> Value:
    return builder("take", value, indices, axis=axis)


def _elementwise(builder: Builder, node: Node, indices: Value, axis: int) -> Value | None:
    rank = len(node.outputs[0].type.shape)
    operands = []
    for value in node.inputs:
        own = axis - (rank - len(value.type.shape))  # operands are aligned at their last axis
        broadcast = own < 0 or value.type.shape[own] == 1
        operands.append(value if broadcast else _take(builder, value, indices, own))
    return builder(node.op, *operands, **node.attrs)


def _transpose(builder: Builder, node: Node, indices: Value, axis: int) -> Value | None:
    permutation = node.attrs["permutation"]
    return builder("transpose", _take(builder, node.inputs[0], indices, permutation[axis]), permutation=permutation)


def _reshape(builder: Builder, node: Node, indices: Value, axis: int) -> Value | None:
    """Only where the axis stays whole: equal products of the sizes before it, and equal size."""
    before, after = node.inputs[0].type.shape, node.outputs[0].type.shape
    for own in range(len(before)):
        if _split(before, own) == _split(after, axis):
            shape = (*after[:axis], indices.type.shape[0], *after[axis + 1 :])
            return builder("reshape", _take(builder, node.inputs[0], indices, own), shape=shape)
    return None


def _split(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    leading = 1
    for size in shape[:axis]:
        leading *= size
    return leading, shape[axis]


def _matmul(builder: Builder, node: Node, indices: Value, axis: int) -> Value | None:
    left, right = node.inputs[:2]
    if len(node.inputs) > 2 or len(left.type.shape) != 2 or len(right.type.shape) != 2:
        return None
    if axis == 0:
        left = _take(builder, left, indices, 1 if node.attrs["transpose_a"] else 0)
    else:
        right = _take(builder, right, indices, 0 if node.attrs["transpose_b"] else 1)
    return builder("matmul", left, right, **node.attrs)


def _conv2d_grad_weight(builder: Builder, node: Node, indices: Value, axis: int) -> Value | None:
    """Axis 3 of a dense [O, kh, kw, I] are channels of x; axis 0 of a depthwise one channels of x and cotangent."""
    x, cotangent = node.inputs
    channels, groups = x.type.shape[3], node.attrs["groups"]
    if axis == 3 and groups == 1:
        return builder("conv2d_grad_weight", _take(builder, x, indices, 3), cotangent, **node.attrs)
    if axis == 0 and groups == channels == cotangent.type.shape[3]:
        attrs = {**node.attrs, "groups": indices.type.shape[0]}
        x, cotangent = _take(builder, x, indices, 3), _take(builder, cotangent, indices, 3)
        return builder("conv2d_grad_weight", x, cotangent, **attrs)
    return None


RULES: dict[str, Rule] = {
    "add": _elementwise,
    "mul": _elementwise,
    "transpose": _transpose,
    "reshape": _reshape,
    "matmul": _matmul,
    "conv2d_grad_weight": _conv2d_grad_weight,
}
