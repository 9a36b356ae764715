"""Runs wide frozen layers on some of their channels at a time, where their activations would set the peak.

An inverted residual expands to six times its channels, convolves each of them, and sums them up again; a feed-forward
block does the same to its features. What lies between is the largest of all activations, and nothing else reads it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pockc.ir import Graph, Node, Origin
from pockc.passes import reorder
from pockc.passes.channel_chains import Chain, find, tiled
from pockc.passes.lifetimes import buffers
from pockc.passes.memory import Interval, live_bytes
from pockc.passes.micro_batches import analyse, batch_of
from pockc.passes.schedule_model import problem_of
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
    ordered = reorder.run(graph, recipe)
    chains = find(ordered, recipe)
    rest = _rest(ordered, chains, recipe)
    needs = [_needs(ordered, chains, count, recipe) for count in COUNTS]
    least = {chain: min(need[chain.name] for need in needs) for chain in chains}
    limit = max(rest, *least.values())
    if limit > (1 - LEAST_GAIN) * max(rest, *needs[0].values()):
        return {}
    return {
        chain.name: next(count for count, need in zip(COUNTS, needs, strict=True) if need[chain.name] <= limit)
        for chain in chains
    }


def _rest(graph: Graph, chains: list[Chain], recipe: Recipe) -> int:
    """What the nodes outside the chains need, whatever their order."""
    inside = {node for chain in chains for node in (*chain.nodes, chain.end)}
    needed = problem_of(graph, recipe.workspace).needed()
    split = _splittable(graph, recipe)
    figures = zip(graph.nodes, needed.tolist(), _estimate(graph, recipe, split).tolist(), strict=True)
    return max((min(figure) if node in split else figure[0] for node, *figure in figures if node not in inside), default=0)


def _needs(graph: Graph, chains: list[Chain], count: int, recipe: Recipe) -> dict[str, int]:
    """The peak of each chain in so many tiles, by its name."""
    marked = _marked(graph, chains)
    after = tiled(marked, dict.fromkeys(find(marked, recipe), count)) if count > 1 else marked
    peaks = {chain.name: 0 for chain in chains}
    for node, nbytes in zip(after.nodes, _estimate(after, recipe, _splittable(after, recipe)).tolist(), strict=True):
        if node.origin.file == MARK and node.op != "slice":
            peaks[node.origin.module] = max(peaks[node.origin.module], nbytes)
    return peaks


def _marked(graph: Graph, chains: list[Chain]) -> Graph:
    """The graph with the chain's name for the origin of its nodes: those of its tiles inherit it."""
    origin = {node: Origin(chain.name, MARK) for chain in chains for node in (*chain.nodes, chain.end)}
    nodes = tuple(replace(node, origin=origin[node]) if node in origin else node for node in graph.nodes)
    return replace(graph, nodes=nodes)


def _splittable(graph: Graph, recipe: Recipe) -> frozenset[Node]:
    """The nodes that `split_prefix` can run sample by sample."""
    batch = batch_of(graph)
    splits = batch > 1 and "split-prefix" not in recipe.disabled
    return frozenset(analyse(graph, batch).roles) if splits else frozenset()


def _estimate(graph: Graph, recipe: Recipe, split: frozenset[Node]) -> npt.NDArray[np.int64]:
    """Live bytes at each call; where samples can run one at a time, those of one, beside the inputs of all."""
    planned = [buffer for buffer in dict.fromkeys(buffers(graph).values()) if buffer.state is None]
    intervals = [Interval(buffer.first, buffer.last, buffer.nbytes) for buffer in planned]
    calls = len(graph.nodes)
    made = _live([interval for interval in intervals if interval.first >= 0], calls)
    whole = made + _live([interval for interval in intervals if interval.first < 0], calls)
    one = made // max(batch_of(graph), 1) + sum(value.type.nbytes for value in graph.inputs)
    in_split = np.array([node in split for node in graph.nodes], np.bool_)
    return np.where(in_split, one, whole) + np.array([recipe.workspace(node) for node in graph.nodes], np.int64)


def _live(intervals: list[Interval], calls: int) -> npt.NDArray[np.int64]:
    """Live bytes at each of the calls."""
    return live_bytes([*intervals, Interval(0, calls, 0)])[1 : calls + 1]
