"""Keeps what the backward pass reads in one byte per element, where the user allows gradients to be approximate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from pockc.ir import Builder, Graph, Node, Value
from pockc.ops import OPS
from pockc.passes import reorder, split_prefix
from pockc.passes.lifetimes import storages
from pockc.passes.recompute_model import forward_nodes
from pockc.passes.rewrite import live_nodes
from pockc.recipe import Recipe

LEAST_BYTES = 4096  # of what is packed: less saves less than its error is worth
LEAST_ROW = 64  # elements of a sample, or of a token


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Where `Recipe.saved_dtype` is int8, put `pack8` and `unpack8` between a saved activation and its gradients.

    Every late reader has an `unpack8` of its own, right before it: the f32 tensor then lives for one call. What the
    gradient of the loss reads stays f32, as do masks, indices and the statistics of norms, which are small.

    Pre:  everything that reads activations in the backward pass is there; nothing merges equal nodes afterwards.
    Post: outputs and losses of the step are the same to the last bit for the same parameters; gradients are those of
          activations that differ by half a step of `pack8`.
    """
    if recipe.saved_dtype == "f32" or not graph.updates:
        return graph
    ordered = split_prefix.eager(reorder.prepared(graph), recipe)
    compressor = _Compressor(ordered)
    for node in ordered.nodes:
        compressor.append(node)
    builder = compressor.builder
    builder.nodes = live_nodes(builder.nodes, ordered.results())  # without views that nothing reads any more
    return builder.build(ordered.outputs, ordered.updates)


class _Compressor:
    """Copies a graph whose late nodes read what was packed."""

    def __init__(self, graph: Graph) -> None:
        self.builder = Builder(replace(graph, nodes=()))
        self.early = forward_nodes(graph)
        self.producers = graph.producers()
        self.packed: dict[Value, Value] = {}
        self.behind: dict[Node, list[Value]] = {}  # the last early reader of a value, or its maker -> the value
        readers = graph.consumers()
        for value in _chosen(graph, self.early):
            early = [reader for reader in readers[value] if reader in self.early]
            self.behind.setdefault(early[-1] if early else self.producers[value], []).append(value)

    def append(self, node: Node) -> None:
        """The node, with what it reads unpacked before it and what it reads last packed behind it."""
        if node not in self.early and not OPS[node.op].view:
            inputs = tuple(self._restored(value, node) for value in node.inputs)
            node = node if inputs == node.inputs else replace(node, inputs=inputs)
            self.builder.nodes.append(node)
            return
        self.builder.nodes.append(node)
        for value in self.behind.get(node, ()):
            self.builder.origin = replace(self.producers[value].origin, phase="forward")
            self.packed[value] = self.builder("pack8", value, hint=f"{value.name}.packed")

    def _restored(self, value: Value, reader: Node) -> Value:
        """A saved value in f32 for one reader; of a view, the same view of what is unpacked."""
        if value in self.packed:
            self.builder.origin = replace(reader.origin, phase="backward")
            return self.builder("unpack8", self.packed[value], shape=value.type.shape, hint=value.name)
        node = self.producers.get(value)
        if node is None or not OPS[node.op].view:
            return value
        source = self._restored(node.inputs[0], reader)
        if source is node.inputs[0]:
            return value
        return self.builder(node.op, source, *node.inputs[1:], hint=value.name, **node.attrs)


def _chosen(graph: Graph, early: Collection[Node]) -> list[Value]:
    """The activations to pack: those that late nodes read, directly or through views, and no gradient of a loss."""
    candidates = [
        value
        for node in graph.nodes
        if node in early and not OPS[node.op].view
        for value in node.outputs
        if value.type.dtype == "f32"
        and len(value.type.shape) >= 2
        and value.type.nbytes >= LEAST_BYTES
        and value.type.elements // value.type.shape[0] >= LEAST_ROW
    ]
    root = storages(graph)
    found: set[Value] = set()
    exact = {root[value] for value in graph.results()}
    for node in graph.nodes:
        if node in early or OPS[node.op].view:
            continue
        read = {root[value] for value in node.inputs}
        found |= read
        if node.op.startswith("cross_entropy"):
            exact |= read
    return [value for value in candidates if value in found and value not in exact]
