"""Scheduling of large graphs: the given order, bent so that memory stays under a bound."""

from __future__ import annotations

import heapq
import sys

from pockc.passes.schedule_model import Problem

FREE = 64  # a node that adds no more bytes than this runs as soon as it can: counters and rates are not worth waiting
LONGEST_CHAIN = 4  # a weight gradient, its scaling, its sum and the update
ROUNDS = 14  # bounds that are tried: each halves the gap between the best order and the lower bound
RESOLUTION = 2000  # part of the peak below which that gap is not worth halving


def improved(problem: Problem, start: tuple[int, ...], least: int) -> tuple[int, ...]:
    """The best order found by bending ``start``, then the result, and so on while that helps.

    ``least`` is a lower bound on the peak of all orders.
    """
    best, peak = start, problem.peak(start)
    while peak > least:
        order = _bisected(problem, best, least)
        if problem.peak(order) >= peak:
            return best
        best, peak = order, problem.peak(order)
    return best


def _bisected(problem: Problem, start: tuple[int, ...], least: int) -> tuple[int, ...]:
    """The best order of a bisection over bounds between ``least`` and the peak of ``start``."""
    best, low, high = start, least, problem.peak(start)
    bounds = [high, low]
    for _ in range(ROUNDS):
        bound = bounds.pop() if bounds else (low + high) // 2
        order = order_under(problem, start, bound)
        peak = problem.peak(order)
        if peak < high:
            best, high = order, peak
        if peak > bound:
            low = max(low, bound)
        if high - low <= high // RESOLUTION:
            break
    return best


def order_under(problem: Problem, priority: tuple[int, ...], bound: int) -> tuple[int, ...]:
    """List scheduling: free chains at once, else the first node by ``priority`` that fits under the bound.

    A chain is free where it ends with no more bytes alive than there were: an update right behind its gradient, a
    1-bit mask. Where nothing fits, the node that exceeds the bound least runs: the order may miss its bound.
    """
    return _ListScheduler(problem, priority, bound).order()


class _ListScheduler:
    """What a node needs depends on which of its operands die with it, so it changes where it becomes a last reader."""

    def __init__(self, problem: Problem, priority: tuple[int, ...], bound: int) -> None:
        self.problem, self.priority, self.bound = problem, priority, bound
        self.rank = {node: i for i, node in enumerate(priority)}
        self.waiting = [mask.bit_count() for mask in problem.before]
        self.done, self.live = 0, problem.initial
        self.has_run = bytearray(problem.count)
        self.ready = Queue(problem.count)  # by rank, the bytes that a ready node adds while it runs
        self.added = [0] * problem.count  # bytes that a ready node leaves alive in addition
        self.doubtful: list[int] = []  # ready nodes whose chain may have become free
        self.blocked: list[tuple[int, int]] = []  # free chains that did not fit: a heap of bytes needed, and nodes
        self.result: list[int] = []

    def order(self) -> tuple[int, ...]:
        for node, count in enumerate(self.waiting):
            if count == 0:
                self._weigh(node)
        self.doubtful.sort(key=self.rank.__getitem__, reverse=True)
        while len(self.result) < self.problem.count:
            self._run_free_chains()
            if len(self.result) < self.problem.count:
                self._run(self._next())
        return tuple(self.result)

    def _weigh(self, node: int) -> None:
        """Note what a node needs, which has become ready or the last reader of an operand."""
        call, self.added[node] = self.problem.step(node, self.done, 0)
        self.ready.put(self.rank[node], call)
        self.doubtful.append(node)

    def _run(self, node: int) -> None:
        self.live += self.added[node]
        self.done |= 1 << node
        self.has_run[node] = True
        self.ready.remove(self.rank[node])
        self.result.append(node)
        for follower in self.problem.followers[node]:
            self.waiting[follower] -= 1
            if self.waiting[follower] == 0:
                self._weigh(follower)
        for storage in self.problem.reads[node]:
            left = self.problem.readers[storage] & ~self.done
            last = left.bit_length() - 1
            if left and left == 1 << last and last < self.problem.count and self.waiting[last] == 0:
                self._weigh(last)

    def _run_free_chains(self) -> None:
        while True:
            if self.doubtful:
                node = self.doubtful.pop()
            elif self.blocked and self.live + self.blocked[0][0] <= self.bound:
                node = heapq.heappop(self.blocked)[1]
            else:
                return
            if self.has_run[node]:
                continue
            for member in self._free_chain(node):
                self._run(member)

    def _free_chain(self, node: int) -> list[int]:
        """The chain that starts with this node, if it is free; one that does not fit is remembered."""
        chain, highest = self._extend([node], self.done, self.live, self.live)
        if chain and highest > self.bound:
            heapq.heappush(self.blocked, (highest - self.live, node))
            return []
        return chain

    def _extend(self, chain: list[int], done: int, live: int, highest: int) -> tuple[list[int], int]:
        node = chain[-1]
        call, after = self.problem.step(node, done, live)
        highest = max(highest, call)
        if after <= self.live + FREE:
            return chain, highest
        done |= 1 << node
        if len(chain) == LONGEST_CHAIN:
            return [], 0
        for follower in self.problem.followers[node]:
            if self.problem.before[follower] & ~done:
                continue
            found, top = self._extend([*chain, follower], done, after, highest)
            if found:
                return found, top
        return [], 0

    def _next(self) -> int:
        """The first ready node that fits; else the one that exceeds the bound least."""
        return self.priority[self.ready.first(max(self.bound - self.live, self.ready.least))]


class Queue:
    """A weight per place, and the first place that has at most some weight: the least of two, of four, and so on."""

    ABSENT = sys.maxsize

    def __init__(self, count: int) -> None:
        self.places = 1 << max(count - 1, 0).bit_length()
        self.tree = [self.ABSENT] * (2 * self.places)  # node i has the children 2 i and 2 i + 1, 1 is the root

    @property
    def least(self) -> int:
        """The smallest weight."""
        return self.tree[1]

    def put(self, place: int, weight: int) -> None:
        """Give a place a weight."""
        tree, at = self.tree, place + self.places
        tree[at] = weight
        while at > 1:
            other = tree[at ^ 1]
            at >>= 1
            weight = min(weight, other)
            if tree[at] == weight:
                return
            tree[at] = weight

    def remove(self, place: int) -> None:
        """Take a place out."""
        self.put(place, self.ABSENT)

    def first(self, most: int) -> int:
        """The first place with a weight of at most ``most``, which is not below the least."""
        tree, at = self.tree, 1
        while at < self.places:
            at *= 2
            if tree[at] > most:
                at += 1
        return at - self.places
