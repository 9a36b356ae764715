"""Chooses a kernel for each node that several can compute: by times of the device, else by a model of cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pockc.ir import Graph, Node
from pockc.ops import infer
from pockc.ops.winograd import TAPS, TILES
from pockc.passes import cost
from pockc.passes.memory import live
from pockc.passes.rewrite import is_frozen
from pockc.recipe import Recipe

REPLACED = ("conv2d", "conv2d_grad_input")  # ops of nodes that may have several candidates
WINOGRAD = "conv2d_winograd"
DIRECT = "direct"  # the candidate that a node is before this pass
KINDS = (DIRECT, *(f"winograd{outputs}" for outputs in TILES))  # names of candidates
KERNELS = ("winograd",)  # families of candidates that `Recipe.disabled` may name, for ablation

# The model. Only ratios matter: a core does so many operations while it moves one byte to or from main memory, and
# moves so many in its caches meanwhile. A candidate must be better than those before it by a margin, since this is a
# model, and since they are more exact.
OPERATIONS_PER_BYTE = 8
CACHED_BYTES = 3
KEPT_FLOATS = 128 * 1024  # of a transformed weight that is made once; a larger one is made for each block of tiles
BLOCK_TILES = 64
MARGIN = 0.9


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Put the fastest candidate in the place of each node that has several.

    Where the device was measured (`Recipe.times`), times decide, and elsewhere the model. A candidate whose scratch
    memory would raise the peak is left out. With this pass switched off the candidate after the first is taken,
    wherever its memory allows: what the choice is worth.

    Pre:  the order is final, and what nodes need of the arena.
    Post: the same function; no call has more bytes alive than the worst one before, or than `Recipe.sufficient`.
    """
    alive = live(graph, recipe.workspace)
    room = max(int(alive.max(initial=0)), recipe.sufficient)
    nodes = []
    for call, node in enumerate(graph.nodes):
        spare = room - int(alive[call + 1]) + recipe.workspace(node)
        found = {
            name: candidate
            for name, candidate in candidates(node).items()
            if name == DIRECT or (_allowed(graph, recipe, node) and recipe.workspace(candidate) <= spare)
        }
        nodes.append(found[_chosen(recipe, node, found)])
    return replace(graph, nodes=tuple(nodes))


def candidates(node: Node) -> dict[str, Node]:
    """By name, the nodes that compute the same from the same operands; first this one, as ``direct``."""
    return {DIRECT: node, **dict(_winograd(node))}


def key(node: Node) -> str:
    """What a time depends on: op, types and attributes, the weight as f32."""
    types = ", ".join(
        str(replace(value.type, dtype="f32") if value.type.is_compact else value.type) for value in node.inputs
    )
    attributes = ", ".join(f"{name}={value}" for name, value in node.attrs.items() if name not in ("low", "high"))
    return f"{node.op}({types}; {attributes})"


def _allowed(graph: Graph, recipe: Recipe, node: Node) -> bool:
    """Whether a node may be computed by Winograd's algorithm, whose rounding is another: with frozen weights alone."""
    return recipe.disabled.isdisjoint(KERNELS) and is_frozen(graph, recipe, node.inputs[1])


def _chosen(recipe: Recipe, node: Node, found: Mapping[str, Node]) -> str:
    if len(found) == 1:
        return DIRECT
    if "place" in recipe.disabled:
        return list(found)[1]
    times = recipe.times.get(key(node), {})
    if all(name in times for name in found):
        return min(found, key=lambda name: times[name])
    best, least = DIRECT, _operations(node)
    for name, candidate in found.items():
        if (estimate := _operations(candidate)) < MARGIN * least:
            best, least = name, estimate
    return best


def _winograd(node: Node) -> Iterator[tuple[str, Node]]:
    """As `conv2d_winograd`, by size of tile, where a node is a dense 3x3 convolution of stride 1 or its gradient."""
    if node.op not in REPLACED or node.inputs[0].type.is_half:
        return
    weight, attrs = node.inputs[1].type.shape, node.attrs
    plain = attrs["stride"] == (1, 1) and attrs["dilation"] == (1, 1) and attrs["groups"] == 1
    if weight[1:3] != (TAPS, TAPS) or not plain:
        return
    given: dict[str, Any] = {name: attrs[name] for name in ("padding", "activation", "low", "high") if name in attrs}
    if node.op == "conv2d_grad_input":
        if max(attrs["padding"]) >= TAPS:
            return
        given = {"padding": tuple(TAPS - 1 - side for side in attrs["padding"]), "transposed": True}
    for outputs in TILES:
        types, complete = infer(WINOGRAD, [v.type for v in node.inputs], {**given, "outputs": outputs}, node.origin)
        assert types == tuple(v.type for v in node.outputs)
        yield f"winograd{outputs}", replace(node, op=WINOGRAD, attrs=complete)


def _operations(node: Node) -> float:
    """The estimated time of a convolution, in arithmetic operations that would take as long."""
    moved = OPERATIONS_PER_BYTE * cost.moved_bytes(node)
    if node.op != WINOGRAD:
        return 2 * cost.multiply_adds(node) + moved
    depth, columns = node.inputs[0].type.shape[3], node.outputs[0].type.shape[3]
    places, tiles = cost.winograd_tiles(node)
    blocks = 1 if places * depth * columns <= KEPT_FLOATS else -(-tiles // BLOCK_TILES)
    # Inputs and products of each tile, and the weight for each block of tiles: written once and read once.
    transformed = 2 * 4 * places * (tiles * (depth + columns) + blocks * depth * columns)
    return 2 * cost.multiply_adds(node) + moved + OPERATIONS_PER_BYTE / CACHED_BYTES * transformed
