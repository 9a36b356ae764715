"""Runs the first layers in strips of image rows, where whole images would set the peak.

Early layers have the largest activations, also of a single sample. What is before the first trained layer is read by
the next layer alone, so only a strip of it has to exist at a time: the patch-based inference of Lin et al. 2021,
"MCUNetV2" (arXiv 2110.15352), for the frozen part of a training step, for evaluation and for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pockc.ir import Graph, Node
from pockc.passes import reorder
from pockc.passes.channel_chains import find
from pockc.passes.cost import seconds
from pockc.passes.micro_batches import batch_of
from pockc.passes.row_strips import Cut, Images, analyse, fits, front, in_strips
from pockc.passes.tile_channels import least_needs
from pockc.passes.tile_estimates import live_estimate, needed
from pockc.recipe import Recipe

COUNTS = (2, 3, 4, 6, 8, 12, 16)  # strips to choose from
LEAST_ROWS = 2  # of a strip: shorter ones compute most rows of the layers before them twice
FREE_SHARE = 0.06  # of the entry's estimated time that rows computed twice may cost where no target is given;
LATER_SHARE = 0.2  # this much in evaluation and inference, lest they need more memory than the training step
LEAST_GAIN = 0.02  # of the peak: less is not worth the time
LEAST_RATE = 3  # share of the peak that has to be gained for a share of the time, where no target is given
NEAR = 1.01  # by which a peak may be larger than the smallest one, to save time


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cut in so many strips; the peak and the seconds it adds are estimates."""

    cut: Cut
    count: int
    peak: int
    seconds: float


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Run what is in front of the cut that lowers the peak most in strips. The choice is in ``recipe.decisions``.

    Pre:  activations are in their products; no later pass adds readers of activations.
    Post: the same function to the last bit. No value in front of the chosen cut exists for whole images but the inputs.
          Strips overlap by the rows that windows reach across their edges, which both compute.
    """
    images = analyse(graph)
    if not images.cuts:
        return graph
    ordered = reorder.searched(graph, recipe)
    chosen = _chosen(ordered, analyse(ordered), recipe)
    if chosen is None:
        return graph
    recipe.decisions["strips"] = {
        "count": chosen.count,
        "rows": chosen.cut.height,
        "module": chosen.cut.nodes[-1].origin.module,
        "seconds": chosen.seconds,
    }
    cut = next(cut for cut in images.cuts if cut.boundary is chosen.cut.boundary)
    return in_strips(graph, images, cut, chosen.count)


def _chosen(graph: Graph, images: Images, recipe: Recipe) -> Candidate | None:
    """With a target the fastest that meets it, else the one with the smallest peak; None where that hardly gains."""
    before, rests = _needs(graph, images, recipe)
    if before <= recipe.sufficient or max(recipe.sufficient, min(rests)) > (1 - LEAST_GAIN) * before:
        return None
    total = sum(map(seconds, graph.nodes))
    free = _free_share(recipe) * total
    found = [
        candidate
        for candidate in _candidates(graph, images, rests, recipe, free)
        if candidate.peak <= (1 - LEAST_GAIN) * before
        and candidate.seconds <= free
        and (_is_free(recipe) or before - candidate.peak >= LEAST_RATE * before * candidate.seconds / total)
    ]
    least = min((candidate.peak for candidate in found), default=0)
    target = recipe.transient_target
    enough = max(least, max(recipe.sufficient, NEAR * least) if target is None else target)
    within = [candidate for candidate in found if candidate.peak <= enough]
    return min(within, key=lambda candidate: candidate.seconds, default=None)


def _is_free(recipe: Recipe) -> bool:
    """Whether time does not count: under a target, or where an entry would need more than the training step."""
    return recipe.transient_target is not None or recipe.sufficient > 0


def _free_share(recipe: Recipe) -> float:
    if recipe.transient_target is not None:
        return float("inf")
    return LATER_SHARE if recipe.sufficient else FREE_SHARE


def _candidates(graph: Graph, images: Images, rests: list[int], recipe: Recipe, free: float) -> Iterator[Candidate]:
    """The cuts in each number of strips."""
    batch = max(batch_of(graph), 1)
    for cut, rest in zip(images.cuts, rests, strict=True):
        alone = sum(map(seconds, cut.nodes))
        waiting = cut.boundary.type.nbytes // batch * (batch - 1)  # of the samples before, until the last has run
        for count in COUNTS:
            if cut.height < count * LEAST_ROWS or not fits(images, cut, count):
                continue
            strip_graph = front(graph, images, cut, count)
            more = sum(map(seconds, strip_graph.nodes)) - alone
            peak = max(rest, waiting + int(live_estimate(strip_graph, recipe).max()))
            yield Candidate(cut, count, peak, more)
            if more > free or peak == rest:
                break  # thinner strips cost more


def _needs(graph: Graph, images: Images, recipe: Recipe) -> tuple[int, list[int]]:
    """What the graph needs with whole images, and what is needed behind each cut, in tiles of channels at best."""
    chains = find(graph, recipe)
    in_tiles = least_needs(graph, chains, recipe)
    by_node: dict[Node, int] = dict(zip(graph.nodes, needed(graph, recipe).tolist(), strict=True))
    for chain in chains:
        by_node.update(dict.fromkeys((*chain.nodes, chain.end), in_tiles[chain.name]))
    every: npt.NDArray[np.int64] = np.array(list(by_node.values()), np.int64)
    index = {node: position for position, node in enumerate(by_node)}
    rests = []
    for cut in images.cuts:
        outside = np.ones(len(every), np.bool_)
        outside[[index[node] for node in cut.nodes]] = False
        rests.append(int(every[outside].max(initial=0)))
    return int(every.max()), rests
