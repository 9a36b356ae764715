"""Plan memory: one arena offset for every buffer of an entry. The core knows intervals only, not graphs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pockc.errors import InternalError
from pockc.ir import Graph, Node, Value
from pockc.passes.lifetimes import ALIGNMENT as ALIGNMENT
from pockc.passes.lifetimes import Buffer, buffers, extents, updates_in_place
from pockc.passes.lifetimes import aligned as aligned

MOST_ROUNDS = 200  # attempts to repair one order
MOST_SHAKEN = 80  # further orders that are tried where no plan is good
SHAKE = 0.1
MOST_VISITS = 8_000_000  # pairs of buffers that are alive together, over the attempts: large plans get fewer
TOLERANCE = 1000  # part of the lower bound that is not worth more attempts,
SHAKEN_TOLERANCE = 300  # and that is not worth the long ones

Workspace = Callable[[Node], int]  # bytes of scratch memory that the node's kernel wants


class Interval(NamedTuple):
    """A buffer of ``nbytes``, alive on calls ``first`` to ``last`` inclusive."""

    first: int
    last: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one entry's transient memory lies: byte offsets from the start of the transient part of the arena."""

    buffer: Mapping[Value, Buffer]  # every value of the graph; those of a state's buffer live with the state
    shift: Mapping[Value, int]  # bytes from the start of its buffer, for values that are no start of one
    offset: Mapping[Buffer, int]
    workspace: tuple[tuple[int, int], ...]  # per node: offset, bytes
    nbytes: int  # extent of the transient part
    max_live_bytes: int  # lower bound of any placement of this order


def run(graph: Graph, workspace: Workspace, *, in_place: bool = True, search: bool = True) -> Placement:
    """Place the transient buffers and workspaces of a scheduled graph.

    Without ``in_place`` no output takes over the buffer of an operand (views and updates of states do), and without
    ``search`` the first order of placement is taken as it is: ablations show what either buys.

    Pre:  `reorder` made every update in place or an explicit copy.
    Post: no two buffers that are alive at the same call overlap (`check` proves it).
    """
    updated = set(updates_in_place(graph).values())
    if late := [state.name for state in graph.updates if state not in updated]:
        raise InternalError(f"memory plan: the new values of {', '.join(late)} cannot be written in place")
    owner = buffers(graph, in_place=in_place)
    planned = [b for b in dict.fromkeys(owner.values()) if b.state is None]
    scratch = [workspace(node) for node in graph.nodes]
    intervals = [Interval(b.first, b.last, b.nbytes) for b in planned]
    intervals += [Interval(i, i, nbytes) for i, nbytes in enumerate(scratch) if nbytes]
    offsets, total = plan(intervals, search=search)
    check(intervals, offsets)
    scratch_offsets = iter(offsets[len(planned) :])
    return Placement(
        buffer=owner,
        shift={value: extent.offset for value, extent in extents(graph).items() if extent.offset},
        offset=dict(zip(planned, offsets, strict=False)),
        workspace=tuple((next(scratch_offsets), nbytes) if nbytes else (0, 0) for nbytes in scratch),
        nbytes=total,
        max_live_bytes=int(live_bytes(intervals).max(initial=0)),
    )


def live(graph: Graph, workspace: Workspace) -> npt.NDArray[np.int64]:
    """Transient bytes alive at each call of a graph, from call -1 on."""
    planned = [buffer for buffer in dict.fromkeys(buffers(graph).values()) if buffer.state is None]
    scratch = [Interval(call, call, workspace(node)) for call, node in enumerate(graph.nodes)]
    return live_bytes([*(Interval(b.first, b.last, b.nbytes) for b in planned), *scratch])


def live_peak(graph: Graph, workspace: Workspace) -> int:
    """The most transient bytes that are alive at once."""
    return int(live(graph, workspace).max(initial=0))


def live_bytes(intervals: Sequence[Interval]) -> npt.NDArray[np.int64]:
    """Bytes alive at each call, from call -1 on: its maximum bounds every placement from below."""
    if not intervals:
        return np.zeros(0, np.int64)
    steps = np.zeros(max(i.last for i in intervals) + 3, np.int64)
    for interval in intervals:
        steps[interval.first + 1] += aligned(interval.nbytes)
        steps[interval.last + 2] -= aligned(interval.nbytes)
    return np.cumsum(steps)


def plan(intervals: Sequence[Interval], *, search: bool = True) -> tuple[list[int], int]:
    """Offsets of the intervals and the total: the best of several greedy orders, each repaired until it is good.

    Without ``search`` it is the first of them, by size. Deterministic. Offsets are multiples of ALIGNMENT.
    """
    offsets, total = _plan(tuple(intervals), search)
    return list(offsets), total


@lru_cache(maxsize=16)  # the scheduler asks what its order needs, and then the order is planned
def _plan(intervals: tuple[Interval, ...], search: bool) -> tuple[tuple[int, ...], int]:
    if not intervals:
        return (), 0
    placer = _Placer(intervals)
    good_enough = placer.bound + placer.bound // TOLERANCE
    orders = _orders(intervals)
    best = placer.place(orders[0])
    if not search:
        return tuple(best.offsets), best.total
    for attempt in (placer.place, placer.repaired):
        for order in orders:
            if best.total <= good_enough:
                return tuple(best.offsets), best.total
            best = min(best, attempt(order, best.total - 1), key=_Placed.quality)
    generator = random.Random(0)
    for trial in range(min(MOST_SHAKEN, placer.rounds)):
        if best.total <= placer.bound + placer.bound // SHAKEN_TOLERANCE:
            break
        attempt = placer.repaired if trial % 4 == 0 else placer.place
        best = min(best, attempt(_shaken(orders[trial % len(orders)], generator), best.total - 1), key=_Placed.quality)
    return tuple(best.offsets), best.total


def _shaken(order: Sequence[int], generator: random.Random) -> list[int]:
    """The order with its members moved by up to a few tenths of its length: what no rule of `_orders` finds."""
    width = SHAKE * len(order)
    rank = {member: place + generator.gauss(0, width) for place, member in enumerate(order)}
    return sorted(order, key=rank.__getitem__)


def _orders(intervals: Sequence[Interval]) -> tuple[list[int], ...]:
    """In which order to place: by size, by bytes times calls, outwards from the call at the peak, and by time."""
    count = range(len(intervals))
    peak = int(live_bytes(intervals).argmax()) - 1
    size = [aligned(interval.nbytes) for interval in intervals]
    span = [interval.last - interval.first + 1 for interval in intervals]
    first = [interval.first for interval in intervals]
    last = [interval.last for interval in intervals]
    distance = [max(interval.first - peak, peak - interval.last, 0) for interval in intervals]
    return (
        sorted(count, key=lambda i: (-size[i], first[i])),
        sorted(count, key=lambda i: (-size[i] * span[i], first[i])),
        sorted(count, key=lambda i: (distance[i], -last[i], -size[i])),
        sorted(count, key=lambda i: (distance[i], -span[i])),
        sorted(count, key=lambda i: (distance[i] > 0, -span[i], first[i])),
        sorted(count, key=lambda i: (distance[i], -size[i])),
        sorted(count, key=lambda i: (-last[i], -size[i])),
        sorted(count, key=lambda i: (first[i], -span[i])),
    )


@dataclass(frozen=True, slots=True)
class _Placed:
    offsets: list[int]  # -1 where the placement was given up before
    total: int
    culprit: int | None = None  # where in the order the interval is that went beyond the limit

    def quality(self) -> tuple[bool, int]:
        """Complete placements before others, then by total."""
        return self.culprit is not None, self.total


class _Placer:
    """Greedy best-fit placement in a given order."""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        first = np.array([i.first for i in intervals])
        last = np.array([i.last for i in intervals])
        self.bound = int(live_bytes(intervals).max())
        self.sizes = [aligned(i.nbytes) for i in intervals]
        self.alive_with = [np.flatnonzero((first <= i.last) & (last >= i.first)).tolist() for i in intervals]
        self.rounds = min(MOST_ROUNDS, MOST_VISITS // sum(map(len, self.alive_with)))

    def place(self, order: Sequence[int], limit: int | None = None) -> _Placed:
        """Each interval goes into the tightest gap among the placed ones that are alive with it, else on top.

        Gives up at the first interval that ends beyond ``limit``.
        """
        return self._place_on([-1] * len(order), order, 0, limit)

    def _place_on(self, offsets: list[int], order: Sequence[int], placed: int, limit: int | None) -> _Placed:
        """`place`, where the first ``placed`` of the order have their offsets already. Writes into ``offsets``."""
        for position in range(placed, len(order)):
            index, size = order[position], self.sizes[order[position]]
            taken = [i for i in self.alive_with[index] if offsets[i] >= 0]
            taken.sort(key=offsets.__getitem__)
            offsets[index] = self._best_gap(taken, offsets, size)
            if limit is not None and offsets[index] + size > limit:
                return _Placed(offsets, offsets[index] + size, position)
        return _Placed(offsets, max(map(int.__add__, offsets, self.sizes)))

    def _best_gap(self, taken: Sequence[int], offsets: Sequence[int], wanted: int) -> int:
        """The start of the tightest gap that ``wanted`` bytes fit into between intervals by offset, else their end."""
        best, least, end, wanted = -1, sys.maxsize, 0, max(wanted, 1)
        for index in taken:
            start = offsets[index]
            if least > start - end >= wanted:
                best, least = end, start - end
            stop = start + self.sizes[index]
            if stop > end:
                end = stop
        return best if best >= 0 else end

    def repaired(self, order: Sequence[int], limit: int) -> _Placed:
        """The best placement of repeated attempts: what goes beyond the limit is placed earlier the next time.

        It moves halfway up the order, not to the front: most intervals that were ever in the way then keep their
        order, and what is in front of the new place keeps its offset.
        """
        order = list(order)
        best = placed = self.place(order, limit)
        for _ in range(self.rounds):
            offsets, culprit = placed.offsets, placed.culprit
            if culprit is None:
                best, limit = replace(placed, offsets=offsets.copy()), placed.total - 1
                culprit = next(i for i, member in enumerate(order) if offsets[member] + self.sizes[member] > limit)
            if best.total <= self.bound:
                break
            place = culprit // 2
            for member in order[place:]:
                offsets[member] = -1
            order.insert(place, order.pop(culprit))
            placed = self._place_on(offsets, order, place, limit)
        return min(best, placed, key=_Placed.quality)


def check(intervals: Sequence[Interval], offsets: Sequence[int]) -> None:
    """Prove that no two intervals overlap in both time and space. Raises InternalError."""
    first = np.array([i.first for i in intervals])
    last = np.array([i.last for i in intervals])
    start = np.array(offsets, np.int64)
    end = start + np.array([i.nbytes for i in intervals], np.int64)
    for i in range(len(intervals)):
        clash = (first <= last[i]) & (last >= first[i]) & (start < end[i]) & (end > start[i])
        clash[i] = False
        if clash.any():
            other = int(np.flatnonzero(clash)[0])
            raise InternalError(f"memory plan: {intervals[i]} at {start[i]} and {intervals[other]} at {start[other]}")
