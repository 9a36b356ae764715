"""What recomputation would save and cost: live bytes of a training step as a function of the set of dropped nodes.

A node of the forward pass is *dropped* if its results are not kept for the backward pass: there they are computed once
more, right before their first reader, from what is kept or from what is dropped as well. So every result is computed at
most twice. That is the model of Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174),
on a graph instead of a chain; which nodes to drop is chosen as in the knapsack problem, by bytes gained per second.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pockc.ir import Graph, Node, Value
from pockc.ops import OPS
from pockc.passes.cost import seconds
from pockc.passes.lifetimes import aligned, storages, updates_in_place
from pockc.passes.memory import Workspace

# Ops that put a forward result into the form that the backward pass keeps: they belong to the forward pass.
SAVERS = frozenset({"reshape", "transpose", "slice", "take", "range_mask", "cast"})
STEP_DOWN = 0.93  # of the peak: the next target once one is reached
LEAST_GAIN = 1e-4  # of the peak, which a target must come down to be worth more moves


def forward_nodes(graph: Graph) -> set[Node]:
    """The nodes that may run twice: those of the forward pass, and what makes the saved form of their results.

    Of the latter only what runs before the backward pass begins: a mask that is made there reads the activation there.
    """
    early = set(graph.states).union(graph.inputs)
    found: set[Node] = set()
    begun = False
    for node in graph.nodes:
        saver = node.origin.phase == "backward" and node.op in SAVERS and not begun
        if (node.origin.phase == "forward" or saver) and early.issuperset(node.inputs):
            found.add(node)
            early.update(node.outputs)
        elif node.origin.phase == "backward":
            begun = True
    return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """Live bytes at the worst call, bytes times calls above a target, and the second computations' time."""

    peak: int
    excess: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A set of nodes to drop, with the estimated peak of the transient bytes and the seconds that it costs."""

    dropped: frozenset[int]
    peak: int
    seconds: float


@dataclass(slots=True)
class Step:
    """A scheduled training step as numbers: nodes and storages are indices in order.

    ``batched`` says of what share of a value's bytes a micro-batch has at a time, for a step that will run in those;
    ``fixed`` bytes are added to every call, for their gradient sums.
    """

    graph: Graph
    workspace: Workspace
    batched: Mapping[Value, float] = field(default_factory=dict)
    fixed: int = 0
    reads: list[tuple[int, ...]] = field(init=False)
    makes: list[tuple[int, ...]] = field(init=False)
    scratch: list[int] = field(init=False)
    seconds: list[float] = field(init=False)
    nbytes: list[int] = field(init=False)
    maker: list[int] = field(init=False)  # storage -> node, -1 for inputs
    early: list[bool] = field(init=False)
    saved: set[int] = field(init=False)  # storages that late nodes read
    kept: set[int] = field(init=False)  # storages of results
    late: list[int] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        root = storages(graph)
        at_home = set(updates_in_place(graph))
        owned: dict[Value, int] = {}
        self.nbytes, self.maker = [], []

        def own(value: Value, maker: int) -> None:
            owned[value] = len(self.nbytes)
            self.nbytes.append(int(aligned(value.type.nbytes) * self.batched.get(value, 1.0)))
            self.maker.append(maker)

        for value in graph.inputs:
            own(value, -1)
        for index, node in enumerate(graph.nodes):
            for value in node.outputs:
                if root[value] is value and value not in at_home:
                    own(value, index)

        def storages_of(values: Iterable[Value]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(owned[root[v]] for v in values if root[v] in owned))

        runs_twice = forward_nodes(graph)
        self.reads = [storages_of(node.inputs) for node in graph.nodes]
        self.makes = [() if OPS[node.op].view else storages_of(node.outputs) for node in graph.nodes]
        self.scratch = [0 if OPS[node.op].view else aligned(self.workspace(node)) for node in graph.nodes]
        self.seconds = [seconds(node) for node in graph.nodes]
        self.early = [node in runs_twice for node in graph.nodes]
        self.late = [i for i, node in enumerate(graph.nodes) if not self.early[i] and not OPS[node.op].view]
        self.saved = {storage for i in self.late for storage in self.reads[i]}
        self.kept = set(storages_of(graph.results()))

    def candidates(self) -> list[int]:
        """The nodes of the forward pass that make something that the backward pass reads."""
        return [
            i
            for i, made in enumerate(self.makes)
            if self.early[i] and self.reads[i] and any(s in self.saved and s not in self.kept for s in made)
        ]

    def closure(self, node: int, dropped: set[int]) -> set[int]:
        """The nodes to drop with this one: those whose results it reads and that the backward pass does not keep."""
        found, stack = {node}, [node]
        while stack:
            for storage in self.reads[stack.pop()]:
                maker = self.maker[storage]
                if maker < 0 or maker in dropped or maker in found or storage in self.saved or storage in self.kept:
                    continue
                found.add(maker)
                stack.append(maker)
        return found

    def again(self, dropped: set[int]) -> list[tuple[int, list[int]]]:
        """The calls of the step, each node with the dropped nodes that run once more right before it."""
        done: set[int] = set()
        calls: list[tuple[int, list[int]]] = []
        for index in range(len(self.reads)):
            needed: set[int] = set()
            stack = [index] if not self.early[index] and self.makes_call(index) else []
            while stack:
                for storage in self.reads[stack.pop()]:
                    maker = self.maker[storage]
                    if maker in dropped and maker not in done and maker not in needed:
                        needed.add(maker)
                        stack.append(maker)
            done |= needed
            calls.append((index, sorted(needed)))
        return calls

    def makes_call(self, index: int) -> bool:
        """Whether the runtime calls a kernel for this node: not for a view."""
        return not OPS[self.graph.nodes[index].op].view

    def live(self, dropped: set[int]) -> npt.NDArray[np.int64]:
        """Bytes alive at each call, and before the first one. Take-overs of dying operands count as new bytes."""
        storage_count = len(self.nbytes)
        first = [0] * (2 * storage_count)
        last = [-1] * (2 * storage_count)
        scratch = [0]

        def call(index: int, second: bool) -> None:
            now = len(scratch)
            late = second or not self.early[index]
            for storage in self.reads[index]:
                last[storage + storage_count if late and self.maker[storage] in dropped else storage] = now
            for storage in self.makes[index]:
                name = storage + storage_count if second else storage
                first[name] = last[name] = now
            scratch.append(self.scratch[index])

        for storage, maker in enumerate(self.maker):
            if maker < 0:
                last[storage] = 0
        for index, before in self.again(dropped):
            for other in before:
                call(other, second=True)
            if self.makes_call(index):
                call(index, second=False)
        for storage in self.kept:
            last[storage] = len(scratch) - 1
        steps = np.zeros(len(scratch) + 1, np.int64)
        used = [s for s in range(2 * storage_count) if last[s] >= 0]
        sizes = [self.nbytes[s % storage_count] for s in used]
        np.add.at(steps, [first[s] for s in used], sizes)
        np.subtract.at(steps, [last[s] + 1 for s in used], sizes)
        live: npt.NDArray[np.int64] = np.cumsum(steps[:-1]) + np.array(scratch) + self.fixed
        return live

    def outcome(self, dropped: set[int], target: float) -> Outcome:
        """What dropping these nodes means."""
        live = self.live(dropped)
        excess = float(np.maximum(live - target, 0).sum())
        return Outcome(int(live.max()), excess, sum(self.seconds[i] for i in dropped))

    def chosen(self, dropped: set[int]) -> Choice:
        """The choice of these nodes."""
        return Choice(frozenset(dropped), self.outcome(dropped, 0).peak, sum(self.seconds[i] for i in dropped))


def choices(step: Step, target: int, most_seconds: float) -> list[Choice]:
    """Ever larger sets of dropped nodes, from none on, each with a lower peak than the one before.

    Ends where the peak is at most ``target``, where no move lowers it, or where more time would be spent than
    ``most_seconds``. Greedy: the move that takes most bytes times calls above the current aim, per second.
    """
    dropped: set[int] = set()
    peak = step.outcome(dropped, 0).peak
    found = [Choice(frozenset(), peak, 0.0)]
    if 0 < target < peak and _reach(step, dropped, target, most_seconds):
        return [*found, step.chosen(dropped)]
    dropped.clear()
    while peak > target:
        aim = max(float(target), peak * STEP_DOWN)
        before = set(dropped)
        if not _reach(step, dropped, aim, most_seconds):
            dropped = before
            break
        peak = step.outcome(dropped, 0).peak
        if peak > found[-1].peak * (1 - LEAST_GAIN):
            break
        found.append(step.chosen(dropped))
    return found


def _reach(step: Step, dropped: set[int], aim: float, most_seconds: float) -> bool:
    """Drop nodes until no call is above the aim; False where that is not possible.

    Scores of moves are re-evaluated only when they come to the top: one move seldom makes another better.
    """
    now = step.outcome(dropped, aim)
    queue = [(-float("inf"), node) for node in step.candidates() if node not in dropped]
    heapq.heapify(queue)
    fresh: dict[int, tuple[set[int], Outcome]] = {}
    while now.excess > 0 and queue:
        _, node = heapq.heappop(queue)
        if node in dropped:
            continue
        if node not in fresh:
            move = step.closure(node, dropped)
            after = step.outcome(dropped | move, aim)
            gain = now.excess - after.excess
            cost = after.seconds - now.seconds
            if gain > 0 and after.seconds <= most_seconds:
                fresh[node] = move, after
                heapq.heappush(queue, (-gain / cost, node))
            continue
        move, now = fresh[node]
        dropped |= move
        fresh.clear()
        queue = [(score, other) for score, other in queue if other not in dropped]
        heapq.heapify(queue)
    return now.excess == 0


def without_waste(step: Step, choice: Choice) -> Choice:
    """The same peak without the moves that later ones made needless: most expensive first."""
    dropped = set(choice.dropped)
    for node in sorted(choice.dropped, key=lambda i: -step.seconds[i]):
        fewer = dropped - {node}
        if step.outcome(fewer, 0).peak <= choice.peak:
            dropped = fewer
    return step.chosen(dropped)
