"""Runs wide frozen layers on some of their channels at a time, where their activations would set the peak.

An inverted residual expands to six times its channels, convolves each of them, and sums them up again; a feed-forward
block does the same to its features. What lies between is the largest of all activations, and nothing else reads it.
"""

from __future__ import annotations

from dataclasses import replace

from pockc.ir import Graph, Origin
from pockc.passes import reorder
from pockc.passes.channel_chains import Chain, find, tiled
from pockc.passes.tile_estimates import live_estimate, needed_outside
from pockc.recipe import Recipe

COUNTS = (1, 2, 4, 8)  # tiles to choose from: each reads the chain's input again and adds to its result once more
MARK = "<chain>"  # the file in the origin of nodes that are only weighed
LEAST_GAIN = 0.02  # of the peak: less is not worth the time


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Cut chains of frozen layers into tiles of channels: the fewest that bring them below what the rest needs.

    The first entry decides; the others cut the same weights in the same way, so that these are stored once.

    Pre:  biases and activations are in their products; no later pass adds readers of activations.
    Post: the same function up to the order of sums. Of a chain in tiles no intermediate value exists whole, and the
          weight of its last product is replaced by constants. What a gradient or the user reads is never cut.
    """
    chains = find(graph, recipe)
    counts = recipe.tiles if recipe.tiles is not None else _choose(graph, recipe) if chains else {}
    chosen = {chain: counts[chain.name] for chain in chains if counts.get(chain.name, 1) > 1}
    return tiled(graph, chosen) if chosen else graph


def _choose(graph: Graph, recipe: Recipe) -> dict[str, int]:
    """How many tiles each chain gets, by its name; none where the peak would hardly be lower."""
    ordered = reorder.searched(graph, recipe)
    chains = find(ordered, recipe)
    rest = needed_outside(ordered, {node for chain in chains for node in (*chain.nodes, chain.end)}, recipe)
    needs = [_needs(ordered, chains, count, recipe) for count in COUNTS]
    least = {chain: min(need[chain.name] for need in needs) for chain in chains}
    limit = max(rest, *least.values())
    if limit > (1 - LEAST_GAIN) * max(rest, *needs[0].values()):
        return {}
    return {
        chain.name: next(count for count, need in zip(COUNTS, needs, strict=True) if need[chain.name] <= limit)
        for chain in chains
    }


def least_needs(graph: Graph, chains: list[Chain], recipe: Recipe) -> dict[str, int]:
    """The peak of each chain in the tiles that make it smallest, by its name; in given tiles, where they are given."""
    if "tile-channels" in recipe.disabled:
        return _needs(graph, chains, 1, recipe)
    if recipe.tiles is not None:
        given = {count: _needs(graph, chains, count, recipe) for count in {1, *recipe.tiles.values()}}
        return {chain.name: given[recipe.tiles.get(chain.name, 1)][chain.name] for chain in chains}
    needs = [_needs(graph, chains, count, recipe) for count in COUNTS]
    return {chain.name: min(need[chain.name] for need in needs) for chain in chains}


def _needs(graph: Graph, chains: list[Chain], count: int, recipe: Recipe) -> dict[str, int]:
    """The peak of each chain in so many tiles, by its name."""
    marked = _marked(graph, chains)
    after = tiled(marked, dict.fromkeys(find(marked, recipe), count)) if count > 1 else marked
    peaks = {chain.name: 0 for chain in chains}
    for node, nbytes in zip(after.nodes, live_estimate(after, recipe).tolist(), strict=True):
        if node.origin.file == MARK and node.op != "slice":
            peaks[node.origin.module] = max(peaks[node.origin.module], nbytes)
    return peaks


def _marked(graph: Graph, chains: list[Chain]) -> Graph:
    """The graph with the chain's name for the origin of its nodes: those of its tiles inherit it."""
    origin = {node: Origin(chain.name, MARK) for chain in chains for node in (*chain.nodes, chain.end)}
    nodes = tuple(replace(node, origin=origin[node]) if node in origin else node for node in graph.nodes)
    return replace(graph, nodes=nodes)
