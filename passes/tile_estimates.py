"""What parts of a graph need, before the batch is split and the final order is known: for the passes that tile."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import numpy as np
import numpy.typing as npt

from pockc.ir import Graph, Node
from pockc.passes.lifetimes import buffers
from pockc.passes.memory import Interval, live_bytes
from pockc.passes.micro_batches import analyse, batch_of
from pockc.passes.schedule_model import problem_of
from pockc.recipe import Recipe


def needed_outside(graph: Graph, inside: AbstractSet[Node], recipe: Recipe) -> int:
    """What the other nodes than those ``inside`` need at the least, whatever their order."""
    nodes = zip(graph.nodes, needed(graph, recipe).tolist(), strict=True)
    return max((nbytes for node, nbytes in nodes if node not in inside), default=0)


def needed(graph: Graph, recipe: Recipe) -> npt.NDArray[np.int64]:
    """What each node needs at the least, whatever their order; sample by sample where that is possible."""
    split = splittable(graph, recipe)
    least = problem_of(graph, recipe.workspace).needed()
    return np.where([node in split for node in graph.nodes], np.minimum(least, live_estimate(graph, recipe)), least)


def splittable(graph: Graph, recipe: Recipe) -> frozenset[Node]:
    """The nodes that `split_prefix` can run sample by sample."""
    batch = batch_of(graph)
    splits = batch > 1 and "split-prefix" not in recipe.disabled
    return frozenset(analyse(graph, batch).roles) if splits else frozenset()


def live_estimate(graph: Graph, recipe: Recipe) -> npt.NDArray[np.int64]:
    """Live bytes at each call; where samples can run one at a time, those of one, beside the inputs of all."""
    split = splittable(graph, recipe)
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
