"""Runs the first part of the network in micro-batches, so that its activations never exist for the whole batch.

What the backward pass does not read is needed by the next layer alone. Up to the first trained layer that is every
activation, and early ones are the largest. Only the boundary, the values that cross from this prefix to the rest, is
kept for all samples. Evaluation and inference keep nothing but the predictions: there the prefix is all of the network.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pockc.ir import Graph, Value
from pockc.ops import OPS
from pockc.passes import reorder
from pockc.passes.memory import Workspace, live
from pockc.passes.micro_batches import Cut, Network, analyse, batch_of, cut_behind, parts_of, split
from pockc.passes.schedule_greedy import order_under
from pockc.passes.schedule_model import problem_of
from pockc.recipe import Recipe, no_workspace

LEAST_GAIN = 0.01  # of the peak: for less, the graph is not worth making longer
MOST_CUTS = 12  # candidates that are planned; the estimate that ranks them is close
MOST_NODES = 8192  # of a prefix in micro-batches: more calls would take too long to plan


def run(graph: Graph, recipe: Recipe) -> Graph:
    """The graph with that prefix, in those micro-batches, that make the peak smallest.

    Candidates are compared in a simple order, the best of them once more in that of `reorder`. Micro-batches are as
    large as costs no peak. A prefix may contain trained parameters: the boundary then has what their gradients need.

    Pre:  no later pass adds readers of activations.
    Post: the same function; where that lowers the peak by `LEAST_GAIN`, every node of a prefix, which is batch-parallel
          by the rules of `batch_rules`, runs once per micro-batch, and `insert` puts the boundary together.
    """
    batch = batch_of(graph)
    if batch < 2:
        return graph
    ordered = reorder.searched(graph, recipe)
    if live(ordered, recipe.workspace).max() <= recipe.sufficient:
        return graph
    network = analyse(eager(ordered, recipe), batch)
    cut, sizes = _best(network, recipe.workspace)
    if not sizes:
        return graph
    reached, after = _reordered(network, cut, sizes[-1], recipe)
    if reached > (1 - LEAST_GAIN) * live(ordered, recipe.workspace).max():
        return graph
    limit = max(reached, _peaks(network, cut, sizes[-1], recipe.workspace).prefix)
    size = next(size for size in sizes if _peaks(network, cut, size, recipe.workspace).prefix <= limit)
    return after if size == sizes[-1] else _reordered(network, cut, size, recipe)[1]


def eager(graph: Graph, recipe: Recipe) -> Graph:
    """The graph with every free chain as early as it can run.

    Away from the peak `reorder` is content with any order. Here each value is to be counted at its smallest: a mask
    that stands for an activation in the backward pass must be made before the cut, or the activation crosses it.
    """
    if "reorder" in recipe.disabled:
        return graph
    problem = problem_of(graph, recipe.workspace)
    order = order_under(problem, tuple(range(problem.count)), sys.maxsize)
    return replace(graph, nodes=tuple(graph.nodes[index] for index in order))


def _best(network: Network, workspace: Workspace) -> tuple[Cut, list[int]]:
    """The cut with the smallest peak, and its micro-batches.

    What follows the last node that could be in a prefix is the same for all cuts, and not counted: were it higher than
    the rest, all would seem equal, but `reorder` may lower it.
    """
    plans: list[tuple[int, int, int, Cut]] = []
    for cut in _promising(network, workspace):
        if sizes := _sizes(network.batch, len(cut.nodes)):
            peaks = _peaks(network, cut, sizes[-1], workspace)
            plans.append((max(peaks), peaks.prefix, len(cut.nodes), cut))
    if not plans:
        return Cut((), ()), []
    *_, cut = min(plans, key=lambda plan: plan[:3])
    return cut, _sizes(network.batch, len(cut.nodes))


def _reordered(network: Network, cut: Cut, size: int, recipe: Recipe) -> tuple[int, Graph]:
    """The split graph in its final order, with its peak: with inputs taken apart first where that is better."""
    parts = parts_of(network.batch, size)
    candidates = [split(network, cut, parts, ahead=ahead) for ahead in (False, True)]
    best = min(candidates, key=lambda candidate: live(candidate, recipe.workspace).max())
    after = reorder.searched(best, recipe)
    return int(live(after, recipe.workspace).max()), after


def _sizes(batch: int, nodes: int) -> list[int]:
    """Micro-batches to choose from, the largest first."""
    powers = [2**exponent for exponent in range(batch.bit_length()) if 2**exponent < batch]
    return [size for size in reversed(powers) if nodes * len(parts_of(batch, size)) <= MOST_NODES]


def _promising(network: Network, workspace: Workspace) -> list[Cut]:
    """The cuts with the smallest estimated peaks for single samples.

    The estimate takes the live bytes of the whole-batch order, divides those in front of the cut by the batch, and adds
    to them the inputs, the boundary and the workspace.
    """
    calls = {node: call for call, node in enumerate(network.graph.nodes)}
    nodes = tuple(network.roles)
    if not nodes:
        return []
    alone = live(network.graph, no_workspace)[1:]  # by call: without what the inputs hold before the first
    shared = live(network.graph, workspace)[1 : calls[nodes[-1]] + 2]
    rest = np.append(np.maximum.accumulate(shared[::-1])[::-1], 0)
    inputs = sum(value.type.nbytes for value in network.graph.inputs)
    front = 0
    estimates: list[tuple[int, int]] = []
    for count, (node, boundary) in enumerate(zip(nodes, _boundary_bytes(network), strict=True), start=1):
        call = calls[node]
        front = max(front, (int(alone[call]) - inputs) // network.batch + workspace(node))
        estimates.append((max(inputs + boundary + front, int(rest[call + 1])), count))
    cuts = (cut_behind(network, nodes[:count]) for _, count in sorted(estimates)[:MOST_CUTS])
    return list({cut.nodes: cut for cut in cuts if cut.nodes}.values())


def _boundary_bytes(network: Network) -> list[int]:
    """What crosses behind each node of the prefix; a view crosses with what it views."""
    unread = {value: len(nodes) + (value in network.results) for value, nodes in network.readers.items()}
    unread.update({value: unread.get(value, 1) for value in network.results})
    crossing: dict[Value, int] = {}
    total = 0
    totals: list[int] = []
    for node in network.roles:
        for value in dict.fromkeys(node.inputs):
            unread[value] -= 1
            if unread[value] == 0:
                total -= crossing.pop(value, 0)
        for value in node.outputs:
            if unread.get(value) and not (OPS[node.op].view and node.inputs[0] in crossing):
                crossing[value] = value.type.nbytes
                total += value.type.nbytes
        totals.append(total)
    return totals


class _Peaks(NamedTuple):
    prefix: int  # up to the call that completes the boundary
    rest: int  # from there to the last node that could be in a prefix


def _peaks(network: Network, cut: Cut, size: int, workspace: Workspace) -> _Peaks:
    """The peaks with micro-batches of that size; those between the second and the last are like the second."""
    parts = parts_of(network.batch, size)
    after = split(network, cut, parts if len(parts) <= 3 else [*parts[:2], parts[-1]])
    bytes_alive = live(after, workspace)
    behind = 2 + max(call for call, node in enumerate(after.nodes) if node.op == "insert")
    tail = next(count for count, node in enumerate(reversed(network.graph.nodes)) if node in network.roles)
    return _Peaks(
        int(bytes_alive[:behind].max()), int(bytes_alive[behind : 1 + len(after.nodes) - tail].max(initial=0))
    )
