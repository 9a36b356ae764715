"""Makes the largest weight gradients row by row, each part used up before the next one is made.

The gradient of a linear layer is G = C^T X, and plain gradient descent uses each row of it once, W_i -= rate G_i: row i
of G needs nothing but column i of C. So the rows need not exist together, and the result has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pockc.ir import Graph, Node
from pockc.passes import reorder, row_strips
from pockc.passes.channel_chains import find
from pockc.passes.rewrite import Rewriter
from pockc.passes.schedule_model import problem_of
from pockc.passes.tile_estimates import needed_outside
from pockc.recipe import Recipe

COUNTS = (1, 2, 4, 8, 16)  # parts to choose from
LEAST_GAIN = 0.02  # of the peak: for less, the graph is not worth making longer


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Cut gradients into rows, into the fewest parts that bring them below what the rest needs.

    Pre:  no later pass adds readers of gradients.
    Post: the same new values; of a gradient that was cut no more than some rows exist at a time. Each part of the
          update is an indexed `sgd` of what the part before left.
    """
    found = _gradients(graph)
    counts = _choose(graph, recipe) if found else {}
    if not counts:
        return graph
    rewriter = Rewriter(graph)
    parts = {gradient.update: (gradient, counts[gradient.name]) for gradient in found}
    for node in graph.nodes:
        if node in parts and parts[node][1] > 1:
            _cut(rewriter, *parts[node])
        else:
            rewriter.keep(node)  # also the product of a gradient in parts, which is dead then
    return rewriter.finish()


@dataclass(frozen=True, slots=True)
class _Gradient:
    """The product that makes a gradient, and the update that alone reads it."""

    product: Node
    update: Node

    @property
    def name(self) -> str:
        return self.update.inputs[0].name

    @property
    def rows(self) -> int:
        return self.product.outputs[0].type.shape[0]

    def saved(self, count: int) -> int:
        """Bytes less at a time in so many parts, each of which has its own columns of the left operand."""
        whole, left = self.product.outputs[0].type.nbytes, self.product.inputs[0].type.nbytes
        return whole - whole // count - left // count if count > 1 else 0


def _gradients(graph: Graph) -> list[_Gradient]:
    """What can be cut: C^T X of matrices for an `sgd` that updates all of a parameter."""
    makers, readers, results = graph.producers(), graph.consumers(), set(graph.results())
    found = []
    for node in graph.nodes:
        product = makers.get(node.inputs[1]) if node.op == "sgd" and len(node.inputs) == 3 else None
        if product is None or product.op != "matmul" or product.origin.phase != "backward":
            continue
        plain = len(product.inputs) == 2 and product.attrs["transpose_a"] and product.attrs["activation"] == "none"
        matrices = all(len(value.type.shape) == 2 for value in product.inputs)
        alone = len(readers[node.inputs[1]]) == 1 and node.inputs[1] not in results
        if plain and matrices and alone and node.inputs[0] in graph.states and node.outputs[0] not in readers:
            found.append(_Gradient(product, node))
    return found


def _choose(graph: Graph, recipe: Recipe) -> dict[str, int]:
    """How many parts each gradient gets, by its parameter; none where the peak would hardly be lower.

    What later passes can make small as well, tiles of channels and strips of rows, does not count as what the rest
    needs: they are then held to a peak that is lower.
    """
    ordered = reorder.searched(graph, recipe)
    gradients = _gradients(ordered)
    chains = find(ordered, recipe) if "tile-channels" not in recipe.disabled else []
    inside = {node for chain in chains for node in (*chain.nodes, chain.end)}
    inside.update(node for gradient in gradients for node in (gradient.product, gradient.update))
    if "split-rows" not in recipe.disabled:
        inside.update(node for cut in row_strips.analyse(ordered).cuts[-1:] for node in cut.nodes)
    needed = dict(zip(ordered.nodes, problem_of(ordered, recipe.workspace).needed().tolist(), strict=True))
    needs = {
        gradient: [needed[gradient.product] - gradient.saved(min(count, gradient.rows)) for count in COUNTS]
        for gradient in gradients
    }
    limit = max(needed_outside(ordered, inside, recipe), *(min(need) for need in needs.values()))
    if all(need[0] * (1 - LEAST_GAIN) <= limit for need in needs.values()):
        return {}
    return {
        gradient.name: next(count for count, nbytes in zip(COUNTS, need, strict=True) if nbytes <= limit)
        for gradient, need in needs.items()
    }


def _cut(rewriter: Rewriter, gradient: _Gradient, count: int) -> None:
    """The update part by part, in place of the whole."""
    product, update = gradient.product, gradient.update
    left, right = rewriter.inputs(product)
    value, _, rate = rewriter.inputs(update)
    height = -(-gradient.rows // count)
    for start in range(0, gradient.rows, height):
        stop = min(start + height, gradient.rows)
        columns = rewriter.emit(product, "slice", (left,), {"axis": 1, "start": start, "stop": stop})
        part = rewriter.emit(product, "matmul", (columns, right), product.attrs)
        rows = rewriter.builder.constant(np.arange(start, stop), "i32", hint=f"{gradient.name}.rows")
        value = rewriter.emit(update, "sgd", (value, part, rate, rows), {**update.attrs, "axis": 0})
    rewriter.replace(update.outputs[0], value)
