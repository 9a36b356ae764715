"""Chooses what to compute again and how many samples to take at a time, so that a training step fits its memory.

Without a target the peak is lowered as far as `FREE_SHARE` of the step's time goes: layer norms, activation functions
and transposes are nearly free to compute again, and micro-batches pay for the weights that each of them reads by
activations that stay in the cache. Under a target the fastest of these is taken, by the estimates of
:mod:`pockc.passes.cost` and :mod:`pockc.passes.traffic`: micro-batches of every size down to one sample, each with the
cheapest recomputation that it needs to fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pockc.errors import UserError
from pockc.ir import Graph
from pockc.passes import reorder, split_prefix
from pockc.passes.cost import BYTES_PER_SECOND, CALL_SECONDS
from pockc.passes.memory import live
from pockc.passes.micro_batches import batch_of, parts_of, split
from pockc.passes.recompute_model import Choice, Step, choices, without_waste
from pockc.passes.rematerialise import with_second_computations
from pockc.passes.split_step import Analysis, analyse
from pockc.recipe import Recipe

FREE_SHARE = 0.03  # of the step's estimated time that recomputation may cost where no target is given
WORTH_SPLITTING = 0.9  # of the peak: what smaller micro-batches have to come below for their many calls to be worth it
MOST_NODES = 12000  # of a step in micro-batches: more calls would take too long to plan


@dataclass(frozen=True, slots=True)
class Candidate:
    """Micro-batches of ``size`` samples: what a step in these keeps alive, and its estimated seconds."""

    size: int
    step: Step
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Micro-batches, and what each of them computes again; peak and seconds are estimates."""

    candidate: Candidate
    choice: Choice

    @property
    def size(self) -> int:
        """Samples of a micro-batch."""
        return self.candidate.size

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.candidate.seconds + self.choice.seconds

    @property
    def peak(self) -> int:
        """Transient bytes."""
        return self.choice.peak


def run(graph: Graph, recipe: Recipe) -> Graph:
    """The step with what was chosen. The choice is noted in ``recipe.decisions``.

    Pre:  `cse` does not run any more: it would merge the two computations. No later pass adds readers of activations.
    Post: the same function: to the last bit where the batch stays whole, within rounding where gradients of
          micro-batches add up.
    """
    if not graph.updates:
        return graph
    ordered = split_prefix.eager(reorder.prepared(graph), recipe)
    batch = batch_of(ordered)
    analysis = analyse(ordered, batch) if batch > 1 else None
    if recipe.micro_batch and analysis is not None and analysis.obstacle is not None:
        raise UserError(
            f"the step cannot run in micro-batches: {analysis.obstacle.op} mixes the samples of a batch",
            where=analysis.obstacle.origin,
            instead="Build for a smaller batch, with --accumulate for the gradients of more samples.",
        )
    whole = _in_one_piece(ordered, recipe, batch)
    plan = _chosen(ordered, recipe, whole, analysis)
    _note(recipe, ordered, plan, whole)
    if not plan.choice.dropped and plan.size in (0, batch):
        return graph
    after = with_second_computations(ordered, plan.candidate.step, plan.choice.dropped)
    if plan.size in (0, batch):
        return after
    again = analyse(after, batch)
    return split(again.network, again.cut, parts_of(batch, plan.size))


def _chosen(graph: Graph, recipe: Recipe, whole: Candidate, analysis: Analysis | None) -> Plan:
    """The plan to follow among micro-batches of the sizes that may be taken."""
    candidates = [whole]
    if analysis is not None:
        sizes = [recipe.micro_batch] if recipe.micro_batch else _sizes(graph, whole.size, analysis)
        candidates += [_in_parts(graph, recipe, size, whole.size, analysis) for size in sizes if size < whole.size]
    if recipe.micro_batch:
        candidates = candidates[-1:]
    if recipe.transient_target is None:
        return _smallest(graph, recipe, candidates)
    return _fastest(candidates, recipe.transient_target)


def _smallest(graph: Graph, recipe: Recipe, candidates: list[Candidate]) -> Plan:
    """The lowest peak that is almost as fast as the fastest; more micro-batches only where they gain something.

    And only where they are no slower than the whole batch: products of few rows are slower than the estimate knows.
    `split_prefix` will lower the peak of the whole batch where its first layers are frozen, so that is what
    micro-batches have to come below.
    """
    limit = (1 + FREE_SHARE) * min(candidate.seconds for candidate in candidates)
    plans: list[Plan] = []
    for candidate in candidates:
        if candidate.seconds <= min(limit, candidates[0].seconds):
            choice = choices(candidate.step, 0, limit - candidate.seconds)[-1]
            plans.append(Plan(candidate, without_waste(candidate.step, choice)))
    best, *smaller = plans
    if not smaller:
        return best
    peak = best.peak
    if best.candidate.size == batch_of(graph):
        after = split_prefix.run(with_second_computations(graph, best.candidate.step, best.choice.dropped), recipe)
        peak = int(live(after, recipe.workspace).max())
    for plan in smaller:
        if plan.peak < WORTH_SPLITTING * peak:
            best, peak = plan, plan.peak
    return best


def _fastest(candidates: list[Candidate], target: int) -> Plan:
    """The fastest plan that meets the target; where none does, the one with the lowest peak."""
    plans = []
    for candidate in candidates:
        choice = choices(candidate.step, target, float("inf"))[-1]
        plans.append(Plan(candidate, without_waste(candidate.step, choice)))
    fitting = [plan for plan in plans if plan.peak <= target]
    if fitting:
        return min(fitting, key=lambda plan: plan.seconds)
    return min(plans, key=lambda plan: plan.peak)


def _sizes(graph: Graph, batch: int, analysis: Analysis) -> Iterator[int]:
    """Powers of two below the batch, the largest first, as far as the step may be split."""
    if analysis.obstacle is not None:
        return
    for exponent in reversed(range(batch.bit_length())):
        size = 2**exponent
        if size < batch and len(parts_of(batch, size)) * len(graph.nodes) <= MOST_NODES:
            yield size


def _in_one_piece(graph: Graph, recipe: Recipe, batch: int) -> Candidate:
    step = Step(graph, recipe.workspace, cache=recipe.cache)
    return Candidate(batch, step, sum(step.seconds))


def _in_parts(graph: Graph, recipe: Recipe, size: int, batch: int, analysis: Analysis) -> Candidate:
    """What micro-batches of that size keep alive and cost."""
    parts = len(parts_of(batch, size))
    shares = dict.fromkeys(analysis.batched(), size / batch)
    runs = dict.fromkeys(analysis.repeated(), parts)
    step = Step(graph, recipe.workspace, shares, analysis.sum_bytes(), runs, recipe.cache)
    return Candidate(size, step, sum(step.seconds) + (parts - 1) * _part_seconds(analysis))


def _part_seconds(analysis: Analysis) -> float:
    """What one more micro-batch costs beside its share of the work, none of which hides behind arithmetic.

    Sums are read twice and written once; weights are read, packed for the product and read again.
    """
    states = analysis.network.graph.states
    weights = {value for node in analysis.cut.nodes for value in node.inputs if value in states}
    moved = 3 * (analysis.sum_bytes() + sum(value.type.nbytes for value in weights))
    return len(analysis.network.sums) * CALL_SECONDS + moved / BYTES_PER_SECOND


def _note(recipe: Recipe, graph: Graph, plan: Plan, whole: Candidate) -> None:
    again = [graph.nodes[index] for index in sorted(plan.choice.dropped)]
    recipe.decisions.update(
        batch=whole.size,
        micro_batch=plan.size,
        recomputed=[
            {
                "op": node.op,
                "module": node.origin.module,
                "nbytes": sum(value.type.nbytes for value in node.outputs),
                "seconds": plan.candidate.step.seconds[index],
            }
            for index, node in zip(sorted(plan.choice.dropped), again, strict=True)
        ],
        estimated_seconds=plan.seconds,
        estimated_slowdown=plan.seconds / whole.seconds,
    )
