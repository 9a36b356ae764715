"""Rewrites of what model code spells out into the operators that the IR has for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pockc.ir import Graph, Node, State, Value
from pockc.ops import infer


def rewrite(graph: Graph) -> Graph:
    """Finds RMS norms, rotary embeddings, repeated key heads and broadcast masks of attention.

    Pre: level `imported`.
    Post: level `imported`; the same function, without dead nodes and without states that nothing reads.
    """
    matcher = _Matcher(graph.states)
    for node in graph.nodes:
        matcher.add(node)
    return _without_dead_code(replace(graph, nodes=tuple(matcher.nodes)))


class _Matcher:
    """Rewrites node by node, operands first; a rewritten node keeps its outputs, so that nothing else changes."""

    def __init__(self, states: Mapping[Value, State]) -> None:
        self.states = states
        self.nodes: list[Node] = []
        self.producers: dict[Value, Node] = {}

    def add(self, node: Node) -> None:
        for rule in _RULES.get(node.op, ()):
            rewritten = rule(self, node)
            if rewritten is not None and rewritten.op != node.op:
                node = rewritten
                break
            node = rewritten or node
        self.nodes.append(node)
        self.producers.update(dict.fromkeys(node.outputs, node))

    def made_by(self, value: Value, op: str) -> Node | None:
        """The node that makes the value, if it is of this op."""
        node = self.producers.get(value)
        return node if node is not None and node.op == op else None

    def number(self, value: Value) -> float | None:
        """The value of a constant scalar."""
        state = self.states.get(value)
        if state is None or state.kind != "constant" or state.data is None or state.data.size != 1:
            return None
        return float(state.data.item())


def _instead_of(node: Node, op: str, inputs: Sequence[Value], **attrs: Any) -> Node | None:
    """A node that makes the outputs of another one in another way; None if it would not make the same types."""
    types, complete = infer(op, [value.type for value in inputs], attrs, node.origin)
    if types != tuple(output.type for output in node.outputs):
        return None
    return Node(op, tuple(inputs), node.outputs, complete, node.origin)


def _both_orders(node: Node) -> tuple[tuple[Value, Value], tuple[Value, Value]]:
    left, right = node.inputs
    return (left, right), (right, left)


# ---- RMS norm: x * rsqrt(mean(x * x) + epsilon), times a vector ----


def _rms_norm_by_rsqrt(matcher: _Matcher, node: Node) -> Node | None:
    for x, factor in _both_orders(node):
        root = matcher.made_by(factor, "rsqrt")
        epsilon = root and _mean_square_epsilon(matcher, root.inputs[0], x)
        if epsilon is not None:
            return _instead_of(node, "rms_norm", [x], epsilon=epsilon)
    return None


def _rms_norm_by_division(matcher: _Matcher, node: Node) -> Node | None:
    x, divisor = node.inputs
    root = matcher.made_by(divisor, "sqrt")
    epsilon = root and _mean_square_epsilon(matcher, root.inputs[0], x)
    return None if epsilon is None else _instead_of(node, "rms_norm", [x], epsilon=epsilon)


def _mean_square_epsilon(matcher: _Matcher, value: Value, x: Value) -> float | None:
    """The epsilon of mean(x * x) + epsilon over the last axis."""
    total = matcher.made_by(value, "add")
    if total is None:
        return None
    for mean_value, constant in _both_orders(total):
        mean, epsilon = matcher.made_by(mean_value, "reduce_mean"), matcher.number(constant)
        if mean is None or epsilon is None:
            continue
        square = matcher.made_by(mean.inputs[0], "mul")
        last = mean.attrs["keepdims"] and mean.attrs["axes"] == (len(x.type.shape) - 1,)
        if square is not None and last and square.inputs == (x, x):
            return epsilon
    return None


def _rms_norm_with_gamma(matcher: _Matcher, node: Node) -> Node | None:
    for normalised, gamma in _both_orders(node):
        norm = matcher.made_by(normalised, "rms_norm")
        if norm is not None and len(norm.inputs) == 1 and gamma.type.shape == normalised.type.shape[-1:]:
            return _instead_of(node, "rms_norm", [norm.inputs[0], gamma], epsilon=norm.attrs["epsilon"])
    return None


# ---- rotary embedding: x * cos + concat(-x2, x1) * sin, with x1 and x2 the halves of x ----


def _rotary(matcher: _Matcher, node: Node) -> Node | None:
    for straight_value, turned_value in _both_orders(node):
        straight, turned = matcher.made_by(straight_value, "mul"), matcher.made_by(turned_value, "mul")
        if straight is None or turned is None:
            continue
        for half_turned, sin in _both_orders(turned):
            x = _rotated(matcher, half_turned)
            if x is None or x not in straight.inputs or len(x.type.shape) != 4:
                continue
            cos = straight.inputs[1 - straight.inputs.index(x)]
            if len(cos.type.shape) == len(sin.type.shape) == 4:
                return _instead_of(node, "rotary", [x, cos, sin], inverse=False)
    return None


def _rotated(matcher: _Matcher, value: Value) -> Value | None:
    """The x of concat(-x2, x1) along the last axis."""
    joined = matcher.made_by(value, "concat")
    if joined is None or len(joined.inputs) != 2:
        return None
    negated, first = matcher.made_by(joined.inputs[0], "neg"), matcher.made_by(joined.inputs[1], "slice")
    second = matcher.made_by(negated.inputs[0], "slice") if negated else None
    if first is None or second is None or first.inputs != second.inputs:
        return None
    x = first.inputs[0]
    axis, width = len(x.type.shape) - 1, x.type.shape[-1]
    halves = [
        (part.attrs["axis"], part.attrs["start"], part.attrs["stop"], part.attrs["step"]) for part in (first, second)
    ]
    wanted = [(axis, 0, width // 2, 1), (axis, width // 2, width, 1)]
    return x if joined.attrs["axis"] == axis and halves == wanted else None


# ---- attention ----


def _grouped_heads(matcher: _Matcher, node: Node) -> Node | None:
    """Key and value heads that are repeated for every query head of their group: the op does that itself."""
    query, key, value, *mask = node.inputs
    few_keys, few_values = _unrepeated(matcher, key), _unrepeated(matcher, value)
    if few_keys is None or few_values is None or few_keys.type.shape[1] != few_values.type.shape[1]:
        return None
    return _instead_of(node, "attention", [query, few_keys, few_values, *mask], **node.attrs)


def _unrepeated(matcher: _Matcher, value: Value) -> Value | None:
    """The x[B,G,S,D] behind x -> [B,G,1,S,D] -> [B,G,n,S,D] -> [B,G*n,S,D]."""
    merged = matcher.made_by(value, "reshape")
    wide = matcher.made_by(merged.inputs[0], "expand") if merged else None
    split = matcher.made_by(wide.inputs[0], "reshape") if wide else None
    if wide is None or split is None:
        return None
    x = split.inputs[0]
    if len(x.type.shape) != 4:
        return None
    batch, groups, length, width = x.type.shape
    widened = wide.outputs[0].type.shape
    same = split.outputs[0].type.shape == (batch, groups, 1, length, width)
    same = same and len(widened) == 5 and widened == (batch, groups, widened[2], length, width)
    return x if same and value.type.shape == (batch, groups * widened[2], length, width) else None


def _narrow_mask(matcher: _Matcher, node: Node) -> Node | None:
    """A mask that is broadcast first: the op broadcasts it itself."""
    if len(node.inputs) < 4:
        return None
    wide = matcher.made_by(node.inputs[3], "expand")
    if wide is None or len(wide.inputs[0].type.shape) != 4:
        return None
    return _instead_of(node, "attention", [*node.inputs[:3], wide.inputs[0]], **node.attrs)


_Rule = Callable[[_Matcher, Node], "Node | None"]
_RULES: dict[str, tuple[_Rule, ...]] = {
    "mul": (_rms_norm_by_rsqrt, _rms_norm_with_gamma),
    "div": (_rms_norm_by_division,),
    "add": (_rotary,),
    "attention": (_grouped_heads, _narrow_mask),
}


def _without_dead_code(graph: Graph) -> Graph:
    """Only nodes that results need, only states that are read or updated; inputs all stay."""
    live = set(graph.results())
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if live.isdisjoint(node.outputs):
            continue
        kept.append(node)
        live.update(node.inputs)
    states = {value: state for value, state in graph.states.items() if value in live or value in graph.updates}
    return replace(graph, nodes=tuple(reversed(kept)), states=states)
