"""Plan memory: one arena offset for every buffer of an entry. The core knows intervals only, not graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pockc.errors import InternalError
from pockc.ir import Graph, Node, Value
from pockc.passes.lifetimes import ALIGNMENT as ALIGNMENT
from pockc.passes.lifetimes import Buffer, buffers, updates_in_place
from pockc.passes.lifetimes import aligned as aligned

REPAIR_ROUNDS = 200  # attempts to improve the best order by moving the buffer that sets the peak to the front

Workspace = Callable[[Node], int]  # bytes of scratch memory that the node's kernel wants


@dataclass(frozen=True, slots=True)
class Interval:
    """A buffer of ``nbytes``, alive on calls ``first`` to ``last`` inclusive."""

    first: int
    last: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one entry's transient memory lies: byte offsets from the start of the transient part of the arena."""

    buffer: Mapping[Value, Buffer]  # every value of the graph; those of a state's buffer live with the state
    offset: Mapping[Buffer, int]
    workspace: tuple[tuple[int, int], ...]  # per node: offset, bytes
    nbytes: int  # extent of the transient part
    max_live_bytes: int  # lower bound of any placement of this order


def run(graph: Graph, workspace: Workspace) -> Placement:
    """Place the transient buffers and workspaces of a scheduled graph.

    Pre:  `reorder` made every update in place or an explicit copy.
    Post: no two buffers that are alive at the same call overlap (`check` proves it).
    """
    if late := [state.name for state in graph.updates if state not in updates_in_place(graph).values()]:
        raise InternalError(f"memory plan: the new values of {', '.join(late)} cannot be written in place")
    owner = buffers(graph)
    planned = [b for b in dict.fromkeys(owner.values()) if b.state is None]
    scratch = [workspace(node) for node in graph.nodes]
    intervals = [Interval(b.first, b.last, b.nbytes) for b in planned]
    intervals += [Interval(i, i, nbytes) for i, nbytes in enumerate(scratch) if nbytes]
    offsets, total = plan(intervals)
    check(intervals, offsets)
    scratch_offsets = iter(offsets[len(planned) :])
    return Placement(
        buffer=owner,
        offset=dict(zip(planned, offsets, strict=False)),
        workspace=tuple((next(scratch_offsets), nbytes) if nbytes else (0, 0) for nbytes in scratch),
        nbytes=total,
        max_live_bytes=int(live_bytes(intervals).max(initial=0)),
    )


def live_bytes(intervals: Sequence[Interval]) -> npt.NDArray[np.int64]:
    """Bytes alive at each call, from call -1 on: its maximum bounds every placement from below."""
    if not intervals:
        return np.zeros(0, np.int64)
    steps = np.zeros(max(i.last for i in intervals) + 3, np.int64)
    for interval in intervals:
        steps[interval.first + 1] += aligned(interval.nbytes)
        steps[interval.last + 2] -= aligned(interval.nbytes)
    return np.cumsum(steps)


def plan(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """Offsets of the intervals and the total: the best of several greedy orders, then of repairs of the best.

    Deterministic. Offsets are multiples of ALIGNMENT.
    """
    if not intervals:
        return [], 0
    bound = int(live_bytes(intervals).max())
    sizes = [aligned(i.nbytes) for i in intervals]
    spans = [i.last - i.first + 1 for i in intervals]
    count = range(len(intervals))
    orders = (
        sorted(count, key=lambda i: (-sizes[i], intervals[i].first)),
        sorted(count, key=lambda i: (-sizes[i] * spans[i], intervals[i].first)),
        sorted(count, key=lambda i: (-spans[i], -sizes[i])),
        sorted(count, key=lambda i: (intervals[i].first, -sizes[i])),
    )
    placer = _Placer(intervals)
    order, (offsets, total) = min(((o, placer.place(o)) for o in orders), key=lambda pair: pair[1][1])
    best = (offsets, total)
    for _ in range(REPAIR_ROUNDS):
        if best[1] <= bound:
            break
        order = _repaired(order, offsets, sizes)
        offsets, total = placer.place(order)
        if total < best[1]:
            best = (offsets, total)
    return best


def _repaired(order: list[int], offsets: list[int], sizes: list[int]) -> list[int]:
    """The order with the interval that reaches highest moved half-way to the front."""
    top = max(order, key=lambda i: offsets[i] + sizes[i])
    position = order.index(top)
    rest = order[:position] + order[position + 1 :]
    return [*rest[: position // 2], top, *rest[position // 2 :]]


class _Placer:
    """Greedy best-fit placement in a given order."""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        self.first = np.array([i.first for i in intervals])
        self.last = np.array([i.last for i in intervals])
        self.sizes = np.array([aligned(i.nbytes) for i in intervals], np.int64)

    def place(self, order: Sequence[int]) -> tuple[list[int], int]:
        """Each interval goes into the tightest gap among the placed ones that are alive with it, else on top."""
        offsets = np.full(len(self.sizes), -1, np.int64)
        for index in order:
            alive = (self.first <= self.last[index]) & (self.last >= self.first[index]) & (offsets >= 0)
            offsets[index] = self._best_gap(offsets[alive], self.sizes[alive], int(self.sizes[index]))
        return [int(o) for o in offsets], int((offsets + self.sizes).max())

    @staticmethod
    def _best_gap(starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], wanted: int) -> int:
        if not len(starts):
            return 0
        by_start = np.argsort(starts, kind="stable")
        starts, ends = starts[by_start], np.maximum.accumulate((starts + sizes)[by_start])
        gap_starts = np.concatenate(([0], ends[:-1]))
        gaps = starts - gap_starts
        fitting = np.flatnonzero(gaps >= max(wanted, 1))
        if not len(fitting):
            return int(ends[-1])
        return int(gap_starts[fitting[np.argmin(gaps[fitting])]])


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
