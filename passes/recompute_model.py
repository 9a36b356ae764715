"""What recomputation would save and cost: live bytes of a training step as a function of the set of dropped nodes.

A node of the forward pass is *dropped* if its results are not kept for the backward pass: there they are computed once
more, right before their first reader, from what is kept or from what is dropped as well. So every result is computed at
most twice. That is the model of Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174),
on a graph instead of a chain; which nodes to drop is chosen as in the knapsack problem, by bytes gained per second.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pockc.ir import Graph, Node, Value
from pockc.ops import OPS
from pockc.passes import traffic
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
    ``fixed`` bytes are added to every call, for their gradient sums; ``runs`` says how often a node runs, if not once.
    ``cache`` bytes need no main memory; ``seconds`` are of all runs of a node.
    """

    graph: Graph
    workspace: Workspace
    batched: Mapping[Value, float] = field(default_factory=dict)
    fixed: int = 0
    runs: Mapping[Node, int] = field(default_factory=dict)
    cache: int = 0
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
    first_late: list[int] = field(init=False)  # node -> the first late call that reads what it makes
    early_readers: list[list[int]] = field(init=False)  # node -> early nodes that do
    last_early: list[int] = field(init=False)  # storage -> the last early call that needs it, its maker at the least
    last_late: list[int] = field(init=False)  # storage -> the last late call that reads it, else -1
    last: list[int] = field(init=False)  # storage -> the last call that needs it
    alone: npt.NDArray[np.int64] = field(init=False)  # call -> bytes alive with nothing dropped
    across: npt.NDArray[np.int64] = field(init=False)  # call -> of these, bytes alive from the call before it on

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
        self.makes = [() for _ in graph.nodes]
        for storage, maker in enumerate(self.maker):
            if maker >= 0:
                self.makes[maker] += (storage,)
        self.scratch = [0 if OPS[node.op].view else aligned(self.workspace(node)) for node in graph.nodes]
        self.seconds = traffic.seconds(graph, self.cache, self.batched, self.runs)
        self.early = [node in runs_twice for node in graph.nodes]
        self.late = [i for i, node in enumerate(graph.nodes) if not self.early[i] and not OPS[node.op].view]
        self.saved = {storage for i in self.late for storage in self.reads[i]}
        self.kept = set(storages_of(graph.results()))
        self._count_calls()

    def _count_calls(self) -> None:
        """The calls with nothing dropped, numbered from 1; 0 is before the first."""
        calls = [index for index in range(len(self.reads)) if self.makes_call(index)]
        end = len(calls)
        born = [0] * len(self.nbytes)
        self.last_late = [-1] * len(self.nbytes)
        self.first_late = [end + 2] * len(self.reads)
        self.early_readers = [[] for _ in self.reads]
        for call, index in enumerate(calls, start=1):
            for storage in self.makes[index]:
                born[storage] = call
        self.last_early = [end if storage in self.kept else call for storage, call in enumerate(born)]
        for call, index in enumerate(calls, start=1):
            for storage in self.reads[index]:
                maker = self.maker[storage]
                if self.early[index]:
                    self.last_early[storage] = max(self.last_early[storage], call)
                    if maker >= 0:
                        self.early_readers[maker].append(index)
                    continue
                self.last_late[storage] = call
                if maker >= 0:
                    self.first_late[maker] = min(self.first_late[maker], call)
        self.last = list(map(max, self.last_early, self.last_late))
        starts, ends = (np.bincount(at, self.nbytes, end + 1).astype(np.int64) for at in (born, self.last))
        alive = np.cumsum(starts) - np.cumsum(ends) + ends
        self.across = np.concatenate([[0], (alive - ends)[:-1]]) + self.fixed
        self.alone = alive + np.array([0, *(self.scratch[index] for index in calls)], np.int64) + self.fixed

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

    def live(self, dropped: AbstractSet[int]) -> npt.NDArray[np.int64]:
        """Bytes alive at each call, and before the first one. Take-overs of dying operands count as new bytes.

        That is what it is with nothing dropped, and what dropping changes: a result ends with its last early reader, a
        second one lives from its call to its last reader, and what only second computations read waits for them.
        """
        slots = self._slots(dropped)
        order = sorted((slot, node) for node, slot in slots.items())
        before = [slot for slot, _ in order]
        when = {node: slot + count for count, (slot, node) in enumerate(order)}

        def moved(call: int) -> int:
            return call + bisect_right(before, call)

        steps = [0] * (len(self.alone) + len(order) + 1)
        last_again: dict[int, int] = {}  # storage -> the last second computation that reads it
        for _, node in order:
            now = when[node]
            for storage in self.reads[node]:
                last_again[storage] = max(now, last_again.get(storage, 0))
        for node in dropped:
            for storage in self.makes[node]:
                nbytes = self.nbytes[storage]
                steps[moved(self.last_early[storage]) + 1] -= nbytes
                steps[moved(self.last[storage]) + 1] += nbytes
                again = last_again.pop(storage, 0)
                if node in when:
                    late = self.last_late[storage]
                    steps[when[node]] += nbytes
                    steps[max(when[node], again, moved(late) if late >= 0 else 0) + 1] -= nbytes
        for storage, again in last_again.items():
            end = moved(self.last[storage])
            if again > end:
                steps[end + 1] += self.nbytes[storage]
                steps[again + 1] -= self.nbytes[storage]
        live = np.array(steps[:-1], np.int64).cumsum()
        scratch = [self.scratch[node] for _, node in order]
        live += np.insert(self.alone, before, self.across[before] + scratch) if order else self.alone
        return live

    def _slots(self, dropped: AbstractSet[int]) -> dict[int, int]:
        """The late call right before which each dropped node runs once more; none for those that no late one needs."""
        slots: dict[int, int] = {}
        for node in sorted(dropped, reverse=True):
            slot = self.first_late[node]
            for reader in self.early_readers[node]:
                if reader in slots:
                    slot = min(slot, slots[reader])
            if slot <= len(self.alone):
                slots[node] = slot
        return slots

    def outcome(self, dropped: AbstractSet[int], target: float) -> Outcome:
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
