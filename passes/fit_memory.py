"""Chooses what to compute again and how many samples to take at a time, so that a training step fits its memory.

Without a target the peak is lowered as far as `FREE_SHARE` of the step's time goes: layer norms, activation functions
and transposes are nearly free to compute again. Under a target the fastest of these is taken, by the estimate of
:mod:`pockc.passes.cost`: micro-batches of every size down to one sample, each with the cheapest recomputation that it
needs to fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pockc.errors import UserError
from pockc.ir import Graph
from pockc.ops import OPS
from pockc.passes import reorder, split_prefix
from pockc.passes.cost import BYTES_PER_SECOND, CALL_SECONDS
from pockc.passes.micro_batches import batch_of, parts_of, split
from pockc.passes.recompute_model import Choice, Step, choices, without_waste
from pockc.passes.rematerialise import with_second_computations
from pockc.passes.split_step import Analysis, analyse
from pockc.recipe import Recipe

FREE_SHARE = 0.03  # of the step's estimated time that recomputation may cost where no target is given
MOST_NODES = 12000  # of a step in micro-batches: more calls would take too long to plan


@dataclass(frozen=True, slots=True)
class Plan:
    """Micro-batches of ``size`` samples, and what each computes again; peak and seconds are estimates."""

    size: int
    step: Step
    choice: Choice
    seconds: float

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
    plan = _chosen(ordered, recipe, batch, analysis)
    _note(recipe, ordered, plan, batch)
    if not plan.choice.dropped and plan.size in (0, batch):
        return graph
    after = with_second_computations(ordered, plan.step, plan.choice.dropped)
    if plan.size in (0, batch):
        return after
    again = analyse(after, batch)
    return split(again.network, again.cut, parts_of(batch, plan.size))


def _chosen(graph: Graph, recipe: Recipe, batch: int, analysis: Analysis | None) -> Plan:
    """The fastest plan that meets the target; where none does, the one with the lowest peak."""
    sizes = [recipe.micro_batch] if recipe.micro_batch else [batch]
    if recipe.transient_target is not None and not recipe.micro_batch and analysis is not None:
        sizes = list(_sizes(graph, batch, analysis))
    plans = [_planned(graph, recipe, size, batch, analysis) for size in sizes]
    target = recipe.transient_target
    fitting = [plan for plan in plans if target is None or plan.peak <= target]
    if fitting:
        return min(fitting, key=lambda plan: plan.seconds)
    return min(plans, key=lambda plan: plan.peak)


def _sizes(graph: Graph, batch: int, analysis: Analysis) -> Iterator[int]:
    """The whole batch, then powers of two below it as far as the step may be split."""
    yield batch
    if analysis.obstacle is not None:
        return
    for exponent in reversed(range(batch.bit_length())):
        size = 2**exponent
        if size < batch and len(parts_of(batch, size)) * len(graph.nodes) <= MOST_NODES:
            yield size


def _planned(graph: Graph, recipe: Recipe, size: int, batch: int, analysis: Analysis | None) -> Plan:
    """What to compute again for micro-batches of that size."""
    if size == batch or analysis is None:
        step = Step(graph, recipe.workspace)
        overhead = 0.0
    else:
        share = min(size / batch, 1.0)
        step = Step(graph, recipe.workspace, dict.fromkeys(analysis.batched(), share), analysis.sum_bytes())
        overhead = (len(parts_of(batch, size)) - 1) * _part_seconds(analysis)
    found = _choice(step, recipe.transient_target)
    return Plan(size, step, found, sum(step.seconds) + found.seconds + overhead)


def _choice(step: Step, target: int | None) -> Choice:
    if target is None:
        return without_waste(step, choices(step, 0, FREE_SHARE * sum(step.seconds))[-1])
    return without_waste(step, choices(step, target, float("inf"))[-1])


def _part_seconds(analysis: Analysis) -> float:
    """What one more micro-batch costs: the start of its calls, weights read again, sums read and written."""
    inside = analysis.network.roles
    calls = sum(1 for node in inside if not OPS[node.op].view)
    weights = {value for node in inside for value in node.inputs if value in analysis.network.graph.states}
    moved = sum(value.type.nbytes for value in weights) + 3 * analysis.sum_bytes()
    return calls * CALL_SECONDS + moved / BYTES_PER_SECOND


def _note(recipe: Recipe, graph: Graph, plan: Plan, batch: int) -> None:
    again = [graph.nodes[index] for index in sorted(plan.choice.dropped)]
    recipe.decisions.update(
        batch=batch,
        micro_batch=plan.size,
        recomputed=[
            {
                "op": node.op,
                "module": node.origin.module,
                "nbytes": sum(value.type.nbytes for value in node.outputs),
                "seconds": plan.step.seconds[index],
            }
            for index, node in zip(sorted(plan.choice.dropped), again, strict=True)
        ],
        estimated_seconds=plan.seconds,
        estimated_slowdown=plan.seconds / sum(plan.step.seconds),
    )
