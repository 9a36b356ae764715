"""Runs the frozen prefix in eight bits: activations of one byte, in front of the first trained tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pockc.compact import quantized_rows
from pockc.ir import Array, Graph, Node, Value
from pockc.ops import OPS
from pockc.ops.quantized import CODES, LARGEST_CODE, MOST_PRODUCTS, WEIGHT_ZERO, dequantize, quantize
from pockc.passes.frozen_prefix import prefix_nodes, value_keys
from pockc.passes.rewrite import Rewriter, count_uses
from pockc.recipe import Recipe

SMALLEST_SPREAD = 1e-30  # of a range: below, a scale would be no normal float
# Functions of one number become a table of 256 codes.
FUNCTIONS = (
    "neg", "abs", "sign", "exp", "sqrt", "tanh", "sigmoid", "erf", "softplus", "floor", "silu", "hardswish",
    "hardsigmoid", "gelu", "leaky_relu", "elu", "pow_scalar", "clip",
)  # fmt: skip


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Compute with codes where the recipe has the ranges, and where there is a kernel for it.

    Convolutions with their bias and clip, sums of two activations with their clip, max-pools, and functions of one
    number behind these; transposes and reshapes move codes. Whatever else there is in the prefix stays f32, with
    conversions around it.

    Pre:  the graph is forward only, channels last, its frozen batch norms folded. `Recipe.prefix_ranges` is from the
          same passes over the training graph.
    Post: values behind the first trained tensor are f32, and computed from what `dequantize` makes of the boundary.
          Entries that share the recipe agree on every value of the training graph's prefix. Nothing quantised depends
          on what is trained.
    """
    if not recipe.prefix_ranges:
        return graph
    nodes = prefix_nodes(graph, recipe)
    keys = value_keys(graph, nodes)
    ranges = {value: recipe.prefix_ranges[key] for value, key in keys.items() if key in recipe.prefix_ranges}
    inside = {node for node in nodes if node.outputs[0] in ranges}
    return _Quantizer(graph, inside, ranges).run()


class Coded(NamedTuple):
    """A value as codes."""

    value: Value
    scale: float
    zero_point: int

    @property
    def attrs(self) -> dict[str, Any]:
        """What `quantize` and `dequantize` need to know."""
        return {"scale": self.scale, "zero_point": self.zero_point}

    def code(self, number: float) -> int:
        """The code of a bound, infinite or not."""
        steps = min(max(number / self.scale + self.zero_point, 0.0), float(LARGEST_CODE))
        return int(np.rint(steps))


class _Quantizer:
    """One sweep. ``codes`` has what exists as codes, ``floats`` what exists as f32, both by old values."""

    def __init__(self, graph: Graph, inside: set[Node], ranges: Mapping[Value, tuple[float, float]]) -> None:
        self.graph, self.inside, self.ranges = graph, inside, ranges
        self.rewriter = Rewriter(graph)
        self.producers = graph.producers()
        self.readers = graph.consumers()
        self.uses = count_uses(graph)
        self.codes: dict[Value, Coded] = {}
        self.floats: set[Value] = {*graph.inputs, *graph.states}
        self.absorbed: set[Node] = set()  # by a node in front

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if node in self.absorbed:
                continue
            rule = RULES.get(node.op) if node in self.inside else None
            if rule is None or not rule(self, node):
                self.keep(node)
        for value in self.graph.results():
            self.make_float(value)
        return self.rewriter.finish()

    def keep(self, node: Node) -> None:
        """The node as it is, on f32 operands."""
        for value in node.inputs:
            self.make_float(value)
        self.rewriter.keep(node)
        self.floats.update(node.outputs)

    def make_float(self, value: Value) -> None:
        """Let later nodes read the value as f32."""
        if value in self.floats:
            return
        coded = self.codes[value]
        self.rewriter.replace(
            value, self.rewriter.emit(self.producers[value], "dequantize", (coded.value,), coded.attrs)
        )
        self.floats.add(value)

    def is_coded(self, value: Value) -> bool:
        """Whether the value was computed as codes."""
        return value in self.codes and value not in self.floats

    def coded(self, value: Value, reader: Node) -> Coded:
        """The value as codes; what only moves in front of that moves as codes too."""
        if value in self.codes:
            return self.codes[value]
        mover = self.producers.get(value)
        if mover is not None and mover.op in MOVERS and mover in self.inside:
            source = self.coded(mover.inputs[0], mover)
            moved = self.rewriter.emit(mover, mover.op, (source.value,), mover.attrs)
            self.codes[value] = source._replace(value=moved)
        else:
            scale, zero_point = affine(*self.ranges[value])
            attrs = {"scale": scale, "zero_point": zero_point}
            codes = self.rewriter.emit(mover or reader, "quantize", (self.rewriter[value],), attrs)
            self.codes[value] = Coded(codes, scale, zero_point)
        return self.codes[value]

    def only_reader(self, value: Value, op: str) -> Node | None:
        """The only reader of a value, if it is such an op of the prefix."""
        readers = self.readers.get(value, [])
        fits = len(readers) == 1 and self.uses[value] == 1 and readers[0].op == op and readers[0] in self.inside
        return readers[0] if fits else None

    def with_bias(self, value: Value) -> tuple[Value, Array | None]:
        """A sum, less its bias: the value with the bias added, and the bias, where adding it is all that follows."""
        channels = value.type.shape[-1]
        node = self.only_reader(value, "add")
        if node is None:
            return value, None
        bias = next((v for v in node.inputs if v in self.graph.states), None)
        if bias is None or bias.type.elements != channels or bias.type.shape[-1:] != (channels,):
            return value, None
        data = self.graph.states[bias].data
        if data is None:
            return value, None
        self.absorbed.add(node)
        return node.outputs[0], data.reshape(-1)

    def with_clip(self, value: Value) -> tuple[Value, tuple[float, float]]:
        """The value after the clip that is all that follows, and its bounds."""
        node = self.only_reader(value, "clip")
        if node is None:
            return value, (-math.inf, math.inf)
        self.absorbed.add(node)
        return node.outputs[0], (node.attrs["low"], node.attrs["high"])

    def target(self, value: Value) -> Coded:
        """Scale and zero point of a value to be computed; of the codes there is no value yet."""
        return Coded(value, *affine(*self.ranges[value]))


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of codes for a range, which is widened to include 0: that has a code of its own."""
    low, high = min(low, 0.0), max(high, 0.0)
    spread = high - low
    scale = float(np.float32(spread / LARGEST_CODE)) if spread > SMALLEST_SPREAD else 1.0
    return scale, int(np.rint(-low / scale))


def _conv2d(q: _Quantizer, node: Node) -> bool:
    x, w = node.inputs
    state = q.graph.states.get(w)
    if state is None or state.data is None or w.type.elements // w.type.shape[0] > MOST_PRODUCTS:
        return False
    value, bias = q.with_bias(node.outputs[0])
    value, bounds = q.with_clip(value)
    source, target = q.coded(x, node), q.target(value)
    scales, codes = quantized_rows(state.data)
    stem = w.name.removesuffix(".folded")
    weight = np.moveaxis(codes.astype(np.int16) + WEIGHT_ZERO, 0, -1)
    factor = source.scale * scales.astype(np.float64) / target.scale
    offset = (0.0 if bias is None else bias.astype(np.float64)) / target.scale + target.zero_point
    constant = q.rewriter.builder.constant
    operands = (
        source.value,
        constant(weight, "u8", hint=f"{stem}.codes"),
        constant(factor, hint=f"{stem}.factor"),
        constant(np.broadcast_to(offset, factor.shape), hint=f"{stem}.offset"),
    )
    window = {name: node.attrs[name] for name in ("stride", "padding", "dilation", "groups")}
    attrs = {"zero_point": source.zero_point, **window, **_bounds(target, bounds)}
    q.codes[value] = target._replace(value=q.rewriter.emit(node, "conv2d_int8", operands, attrs))
    return True


def _add(q: _Quantizer, node: Node) -> bool:
    a, b = node.inputs
    if a.type != b.type or not (q.is_coded(a) or q.is_coded(b)) or not {a, b} <= q.ranges.keys():
        return False
    value, bounds = q.with_clip(node.outputs[0])
    left, right, target = q.coded(a, node), q.coded(b, node), q.target(value)
    attrs = {
        "a_factor": float(np.float32(left.scale / target.scale)),
        "a_zero_point": left.zero_point,
        "b_factor": float(np.float32(right.scale / target.scale)),
        "b_zero_point": right.zero_point,
        "zero_point": target.zero_point,
        **_bounds(target, bounds),
    }
    codes = q.rewriter.emit(node, "add_int8", (left.value, right.value), attrs)
    q.codes[value] = target._replace(value=codes)
    return True


def _bounds(target: Coded, bounds: tuple[float, float]) -> dict[str, int]:
    """The bounds of a clip as codes."""
    return {"low": target.code(bounds[0]), "high": target.code(bounds[1])}


def _function(q: _Quantizer, node: Node) -> bool:
    """A function of one number, by a table of what it makes of each code."""
    if not q.is_coded(node.inputs[0]):
        return False
    source, target = q.codes[node.inputs[0]], q.target(node.outputs[0])
    numbers = dequantize(np.arange(CODES, dtype=np.uint8), **source.attrs)
    with np.errstate(all="ignore"):
        results = np.asarray(OPS[node.op].reference(numbers, **node.attrs), np.float32)
    table = q.rewriter.builder.constant(quantize(results, **target.attrs), "u8", hint=f"{node.op}.table")
    codes = q.rewriter.emit(node, "lookup_int8", (source.value, table))
    q.codes[node.outputs[0]] = target._replace(value=codes)
    return True


def _max_pool2d(q: _Quantizer, node: Node) -> bool:
    """Pooled codes stand for the same numbers. Indices are for a gradient, which a prefix has not."""
    if not q.is_coded(node.inputs[0]) or q.uses.get(node.outputs[1]):
        return False
    source = q.codes[node.inputs[0]]
    pooled = q.rewriter.emit(node, "max_pool2d_int8", (source.value,), node.attrs)
    q.codes[node.outputs[0]] = source._replace(value=pooled)
    return True


def _move(q: _Quantizer, node: Node) -> bool:
    """What only moves elements: f32 stays f32 until a reader wants codes."""
    if not q.is_coded(node.inputs[0]):
        return False
    q.coded(node.outputs[0], node)
    return True


MOVERS = frozenset({"transpose", "reshape"})
RULES: dict[str, Callable[[_Quantizer, Node], bool]] = {
    "conv2d": _conv2d,
    "add": _add,
    "max_pool2d": _max_pool2d,
    **dict.fromkeys(FUNCTIONS, _function),
    **dict.fromkeys(MOVERS, _move),
}
