"""What recomputation costs in memory, counted call by call."""

from __future__ import annotations

import random
from collections.abc import Set as AbstractSet
from itertools import pairwise

import pytest

from pockc.passes import reorder
from pockc.passes.recompute_model import Step, choices, without_waste
from tests.passes.test_schedule import training_graph, workspace

Storage = tuple[int, bool]  # and whether it is of a second computation


def step_of(seed: int) -> Step:
    graph = reorder.prepared(training_graph(seed)[0])
    batched = {value: 0.5 for node in graph.nodes[::3] for value in node.outputs}
    return Step(graph, workspace, batched if seed % 2 else {}, fixed=192 * (seed % 3))


def counted(step: Step, dropped: AbstractSet[int]) -> list[int]:
    """Live bytes before the first call and at each one, by walking the calls."""
    calls: list[tuple[set[Storage], set[Storage], int]] = [(set(), set(), 0)]  # what is read, made, and for scratch

    def call(index: int, again: bool) -> None:
        late = again or not step.early[index]
        reads = {(storage, late and step.maker[storage] in dropped) for storage in step.reads[index]}
        calls.append((reads, {(storage, again) for storage in step.makes[index]}, step.scratch[index]))

    for index, before in step.again(set(dropped)):
        for other in before:
            call(other, again=True)
        if step.makes_call(index):
            call(index, again=False)
    first: dict[Storage, int] = {(storage, False): 0 for storage, maker in enumerate(step.maker) if maker < 0}
    last = dict(first)
    for at, (reads, makes, _) in enumerate(calls):
        first.update(dict.fromkeys(makes, at))
        last.update(dict.fromkeys(reads | makes, at))
    last.update({(storage, False): len(calls) - 1 for storage in step.kept})
    return [
        scratch + step.fixed + sum(step.nbytes[key[0]] for key in first if first[key] <= at <= last[key])
        for at, (_, _, scratch) in enumerate(calls)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_live_bytes_are_those_of_the_calls(seed: int) -> None:
    step, rng = step_of(seed), random.Random(seed)
    candidates = step.candidates()
    assert step.live(set()).tolist() == counted(step, set())
    for _ in range(6):
        dropped: set[int] = set()
        for node in rng.sample(candidates, rng.randint(0, len(candidates))):
            dropped |= step.closure(node, dropped) if rng.random() < 0.8 else {node}
        assert step.live(dropped).tolist() == counted(step, dropped)


def test_choices_have_ever_lower_peaks_and_no_waste() -> None:
    lower = 0
    for seed in range(40):
        step = step_of(seed)
        found = choices(step, 0, float("inf"))
        peaks = [choice.peak for choice in found]
        assert peaks == [max(counted(step, choice.dropped)) for choice in found]
        assert all(after < before for before, after in pairwise(peaks))
        least = without_waste(step, found[-1])
        assert least.peak <= peaks[-1] and least.dropped <= found[-1].dropped
        lower += len(found) > 1
    assert lower > 5
