"""Lets a convolution's input gradient apply the mask of the activation in front of it while its rows are cached.

Behind ``y = clip(...)``, and relatives of it, the gradient of a convolution that reads y counts only where y was inside
its range: an input gradient, a mask of y and their product, three passes over memory of which the last two do hardly
any arithmetic. In one call it is one pass, and where y itself is there, no mask is needed at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pockc.ir import Graph, Node, Value
from pockc.ops import infer
from pockc.passes.lifetimes import storage_readers, storages
from pockc.passes.memory import live, live_peak
from pockc.passes.rewrite import live_nodes
from pockc.recipe import Recipe

MASKED = "conv2d_grad_input_masked"


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Replace ``apply_mask(conv2d_grad_input(ct, w), mask)`` by one node.

    Pre:  the order is final, and which kernel computes each convolution.
    Post: the same bits; no call has more bytes alive than the worst one before, or than `Recipe.sufficient`.
    """
    room = max(live_peak(graph, recipe.workspace), recipe.sufficient)
    fusion = _Fusion(graph)
    found = fusion.pairs()
    while found:
        after = fusion.fused(found)
        alive = live(after, recipe.workspace)[1:]
        over = {
            value for node, nbytes in zip(after.nodes, alive, strict=False) if nbytes > room for value in node.outputs
        }
        if not over:
            return after
        kept = [pair for pair in found if not pair.moves or over.isdisjoint(fusion.passed(pair))]
        if kept == found:
            kept = [pair for pair in found if not pair.moves]
        if kept == found:
            return graph
        found = kept
    return graph


@dataclass(frozen=True, slots=True)
class _Found:
    """An input gradient with the node that masks it."""

    product: Node
    masking: Node
    gate: Value
    bounds: Mapping[str, Any]  # of an activation that is the gate
    place: Node  # instead of this one the fused node runs
    scaled: Node | None = None  # what makes the weight of states alone, if it has to move there too

    @property
    def moves(self) -> bool:
        """Whether the product runs later than it did."""
        return self.place is not self.product


class _Fusion:
    """What of a graph may be fused, and the graph in which some of it is."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.call = {node: index for index, node in enumerate(graph.nodes)}
        self.producers = graph.producers()
        self.readers = graph.consumers()
        self.root = storages(graph)
        self.reading = storage_readers(graph)
        self.results = frozenset(graph.results())

    def pairs(self) -> list[_Found]:
        """All that may be fused as far as values go; whether there is memory for it is not asked."""
        return [pair for node in self.graph.nodes if (pair := self._pair(node)) is not None]

    def fused(self, found: Sequence[_Found]) -> Graph:
        """The graph with one node for each of these."""
        dropped = {node for pair in found for node in (pair.product, pair.masking, pair.scaled)}
        placed = {pair.place: pair for pair in found}
        nodes: list[Node] = []
        for node in self.graph.nodes:
            if (pair := placed.get(node)) is not None:
                nodes += [*([pair.scaled] if pair.scaled else []), _fused(pair)]
            if node not in dropped:
                nodes.append(node)
        return replace(self.graph, nodes=tuple(live_nodes(nodes, self.results)))

    def passed(self, pair: _Found) -> set[Value]:
        """The results of the nodes that the product moves behind, and its own."""
        between = self.graph.nodes[self.call[pair.product] : self.call[pair.place]]
        return {value for node in (*between, pair.masking) for value in node.outputs}

    def _pair(self, masking: Node) -> _Found | None:
        if masking.op != "apply_mask" or masking.attrs["scale"] != 1:
            return None
        gradient, mask = masking.inputs
        product = self.producers.get(gradient)
        if product is None or product.op != "conv2d_grad_input" or self.readers[gradient] != [masking]:
            return None
        if gradient in self.results or any(value.type.is_half for value in (*product.inputs, gradient)):
            return None
        return self._in_place(product, masking, mask) or self._moved(product, masking, mask)

    def _in_place(self, product: Node, masking: Node, mask: Value) -> _Found | None:
        """By the activation if it is alive when the product runs, else by a mask that is there by then."""
        call, maker = self.call[product], self._range_mask(mask, masking)
        if maker is not None:
            (activation,) = maker.inputs
            if self._made(activation) < call <= max(self.reading[self.root[activation]]):
                return _Found(product, masking, activation, maker.attrs, product)
        return _Found(product, masking, mask, {}, product) if self._made(mask) < call else None

    def _moved(self, product: Node, masking: Node, mask: Value) -> _Found | None:
        """By the activation, where the mask would be made of it: both are made behind the product."""
        maker = self._range_mask(mask, masking)
        if maker is None or self.readers[mask] != [masking]:
            return None
        scaled = self.producers.get(product.inputs[1])
        if scaled is not None and (self.readers[scaled.outputs[0]] != [product] or not self._is_static(scaled)):
            scaled = None
        between = self.graph.nodes[self.call[scaled or product] : self.call[maker]]
        states = {*product.inputs, *(scaled.inputs if scaled else ())}
        if any(node.origin.phase == "update" and not states.isdisjoint(node.inputs) for node in between):
            return None  # it may write the weight
        return _Found(product, masking, maker.inputs[0], maker.attrs, maker, scaled)

    def _range_mask(self, mask: Value, masking: Node) -> Node | None:
        """The node that makes the mask of an activation that has the gradient's type."""
        maker = self.producers.get(mask)
        if maker is None or maker.op != "range_mask" or maker.inputs[0].type != masking.outputs[0].type:
            return None
        return maker

    def _is_static(self, node: Node) -> bool:
        return all(value in self.graph.states for value in node.inputs)

    def _made(self, value: Value) -> int:
        producer = self.producers.get(value)
        return -1 if producer is None else self.call[producer]


def _fused(pair: _Found) -> Node:
    product = pair.product
    inputs = (*product.inputs, pair.gate)
    types, attrs = infer(MASKED, [value.type for value in inputs], {**product.attrs, **pair.bounds}, product.origin)
    assert types == tuple(value.type for value in pair.masking.outputs)
    return replace(product, op=MASKED, inputs=inputs, outputs=pair.masking.outputs, attrs=attrs)
