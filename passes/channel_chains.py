"""Chains of layers that treat their channels one by one, and how such a chain runs on some of them at a time.

A chain begins with products that make channels (convolutions, matrix products), goes on with what works on each channel
alone (depthwise convolutions, activations, pools), and ends in a product that sums over the channels:

    y = sum_c d(h(x)[c])[c] W[c] + b = (sum_{c in tile 1} ... + b) + sum_{c in tile 2} ... + ...

So only the channels of one tile need to exist at a time. The sum is the same up to its order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pockc.ir import Graph, Node, Value
from pockc.passes.lifetimes import rows_offset
from pockc.passes.rewrite import Rewriter, derived, is_frozen
from pockc.recipe import Recipe

LEAST_CHANNELS = 16  # of a tile: a vector of the widest instruction set, and 64 bytes of a bias

UNARY = frozenset(
    {
        "neg", "abs", "exp", "tanh", "sigmoid", "erf", "softplus", "silu", "hardswish", "hardsigmoid", "gelu",
        "leaky_relu", "elu", "pow_scalar", "clip",
    }
)  # fmt: skip
POOLS = frozenset({"max_pool2d", "avg_pool2d"})
BINARY = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})


@dataclass(frozen=True, slots=True)
class Chain:
    """Nodes in order, whose results only they and ``end`` read; ``end`` sums over the channels."""

    nodes: tuple[Node, ...]
    end: Node

    @property
    def name(self) -> str:
        """The weight that has to be cut across its rows: the same in every entry of a program."""
        return self.end.inputs[1].name

    @property
    def channels(self) -> int:
        """How many channels there are to share out."""
        return self.end.inputs[0].type.shape[-1]

    @property
    def nbytes(self) -> int:
        """Of all that exists for some channels only, once the chain is in tiles."""
        return sum(output.type.nbytes for node in self.nodes for output in node.outputs)


def width_of(channels: int, tiles: int) -> int:
    """Channels of all tiles but the last, which has the rest."""
    blocks = -(-channels // LEAST_CHANNELS)
    return -(-blocks // tiles) * LEAST_CHANNELS


def find(graph: Graph, recipe: Recipe) -> list[Chain]:
    """The chains of frozen layers, which nothing but themselves reads from; no node is in two of them."""
    search = _Search(graph, recipe)
    found = [chain for node in graph.nodes if (chain := search.chain(node)) is not None]
    taken: set[Node] = set()
    disjoint = []
    for chain in sorted(found, key=lambda chain: -chain.nbytes):
        if taken.isdisjoint((*chain.nodes, chain.end)):
            taken.update((*chain.nodes, chain.end))
            disjoint.append(chain)
    return disjoint


class _Search:
    """Walks from a product back to those that made its channels."""

    def __init__(self, graph: Graph, recipe: Recipe) -> None:
        self.graph = graph
        self.producers, self.readers = graph.producers(), graph.consumers()
        self.results = set(graph.results())
        self.frozen = derived(graph, [value for value in graph.states if is_frozen(graph, recipe, value)])

    def chain(self, end: Node) -> Chain | None:
        """The chain that ends in a node, if there is one."""
        if not _is_product(end) or end.attrs["activation"] != "none" or end.origin.phase != "forward":
            return None
        operand, weight = end.inputs[:2]
        state = self.graph.states.get(weight)
        if state is None or state.data is None or weight not in self.frozen or len(self.readers[weight]) > 1:
            return None
        inside: set[Node] = set()
        if operand.type.shape[-1] <= LEAST_CHANNELS or operand is weight or not self._gather(operand, inside):
            return None
        made = {output for node in inside for output in node.outputs}
        if not all(inside.issuperset(set(self.readers.get(value, ())) - {end}) for value in made):
            return None
        sources = [node.inputs[0] for node in inside if _is_product(node)]
        if not made.isdisjoint((*self.results, *end.inputs[1:], *sources)):
            return None
        return Chain(tuple(node for node in self.graph.nodes if node in inside), end)

    def _gather(self, value: Value, inside: set[Node]) -> bool:
        """Whether the channels of a value can be made tile by tile; adds the nodes that do."""
        node = self.producers.get(value)
        if node is None or node.outputs[0] is not value or node.origin.phase != "forward":
            return False
        if node in inside:
            return True
        inside.add(node)
        if _is_product(node):
            return self.frozen.issuperset(node.inputs[1:])
        if _is_depthwise(node):
            return self.frozen.issuperset(node.inputs[1:]) and self._gather(node.inputs[0], inside)
        if node.op in UNARY or node.op in POOLS:
            return self._gather(node.inputs[0], inside)
        return node.op in BINARY and all(self._lines_up(v, value) and self._operand(v, inside) for v in node.inputs)

    def _operand(self, value: Value, inside: set[Node]) -> bool:
        return value in self.frozen or self._gather(value, inside)

    def _lines_up(self, operand: Value, result: Value) -> bool:
        if operand in self.frozen:
            return operand.type.shape[-1:] in ((), (1,), result.type.shape[-1:])
        return operand.type.shape == result.type.shape


def _is_product(node: Node) -> bool:
    if node.op == "conv2d":
        return bool(node.attrs["groups"] == 1)
    return node.op == "matmul" and len(node.inputs[1].type.shape) == 2 and not node.attrs["transpose_a"]


def _is_depthwise(node: Node) -> bool:
    if node.op != "conv2d":
        return False
    channels, weight = node.inputs[0].type.shape[3], node.inputs[1].type.shape
    return bool(node.attrs["groups"] == channels == weight[0])


def tiled(graph: Graph, tiles: Mapping[Chain, int]) -> Graph:
    """The graph with each of these chains in that many tiles at the most.

    Tiles of weights are read where they lie, or are constants called ``<weight>.tile`` instead of the weight.
    """
    tiler = _Tiler(graph)
    ends = {chain.end: (chain, width_of(chain.channels, count)) for chain, count in tiles.items()}
    for node in graph.nodes:
        if node in ends:
            tiler.run(*ends[node])
        else:
            tiler.rewriter.keep(node)  # the whole chain among them, which is dead then
    return tiler.rewriter.finish()


def tiles_of(graph: Graph) -> dict[str, int]:
    """Into how many constants `tiled` cut each weight, by its name."""
    counts: dict[str, int] = {}
    for value, state in graph.states.items():
        if state.kind == "constant" and (found := re.fullmatch(r"(.+)\.tile(_\d+)?", value.name)):
            counts[found[1]] = counts.get(found[1], 0) + 1
    return counts


class _Tiler:
    """Emits chains tile by tile."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rewriter = Rewriter(graph)

    def run(self, chain: Chain, width: int) -> None:
        """The chain where its end was: by then all that it reads is there."""
        end, total = chain.end, None
        for start in range(0, chain.channels, width):
            channels = range(start, min(start + width, chain.channels))
            made: dict[Value, Value] = {}
            for node in chain.nodes:
                self._part(node, chain.channels, channels, made)
            weight = self._cut(end, end.inputs[1], 3 if end.op == "conv2d" else int(end.attrs["transpose_b"]), channels)
            bias = [self.rewriter[value] for value in end.inputs[2:]] if total is None else []
            part = self.rewriter.emit(end, end.op, (made[end.inputs[0]], weight, *bias), end.attrs)
            total = part if total is None else self.rewriter.emit(end, "add", (total, part))
        if total is not None:
            self.rewriter.replace(end.outputs[0], total)

    def _part(self, node: Node, count: int, channels: range, made: dict[Value, Value]) -> None:
        """One node of a chain of ``count`` channels on some of them."""
        attrs, inputs = dict(node.attrs), []
        if _is_product(node):
            rows = node.op == "conv2d" or bool(attrs["transpose_b"])
            inputs = [self.rewriter[node.inputs[0]], self._cut(node, node.inputs[1], 0 if rows else 1, channels)]
            inputs += [self._cut(node, bias, 0, channels) for bias in node.inputs[2:]]
        elif node.op == "conv2d":
            attrs["groups"] = len(channels)
            inputs = [made[node.inputs[0]], *(self._cut(node, value, 0, channels) for value in node.inputs[1:])]
        else:
            for value in node.inputs:
                inputs.append(made[value] if value in made else self._broadcast(node, value, count, channels))
        self.rewriter.builder.origin = node.origin
        outputs = self.rewriter.builder.multi(node.op, *inputs, hint=node.outputs[0].name, **attrs)
        made.update(zip(node.outputs, outputs, strict=True))

    def _broadcast(self, reader: Node, value: Value, count: int, channels: range) -> Value:
        shape = value.type.shape
        return self._cut(reader, value, len(shape) - 1, channels) if shape[-1:] == (count,) else self.rewriter[value]

    def _cut(self, reader: Node, value: Value, axis: int, channels: range) -> Value:
        """Some channels of what is frozen: a view of it, or a constant where they are not contiguous."""
        attrs = {"axis": axis, "start": channels.start, "stop": channels.stop}
        state = self.graph.states.get(value)
        if state is None or state.data is None or rows_offset(value.type, **attrs) is not None:
            return self.rewriter.emit(reader, "slice", (self.rewriter[value],), attrs)
        index = (*(slice(None) for _ in range(axis)), slice(channels.start, channels.stop))
        contents = np.ascontiguousarray(state.data[index])
        return self.rewriter.builder.state(f"{value.name}.tile", "constant", contents)
