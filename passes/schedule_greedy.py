"""Scheduling of large graphs: the given order, bent so that memory stays under a bound."""

from __future__ import annotations

import heapq

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
    def __init__(self, problem: Problem, priority: tuple[int, ...], bound: int) -> None:
        self.problem, self.priority, self.bound = problem, priority, bound
        self.rank = {node: i for i, node in enumerate(priority)}
        self.waiting = [mask.bit_count() for mask in problem.before]
        self.done, self.live = 0, problem.initial
        self.ready: list[int] = []  # a heap of ranks
        self.doubtful: list[int] = []  # ready nodes whose chain may have become free
        self.blocked: list[tuple[int, int]] = []  # free chains that did not fit: a heap of bytes needed, and nodes
        self.result: list[int] = []

    def order(self) -> tuple[int, ...]:
        for node, count in enumerate(self.waiting):
            if count == 0:
                self._make_ready(node)
        self.doubtful.sort(key=self.rank.__getitem__, reverse=True)
        while len(self.result) < self.problem.count:
            self._run_free_chains()
            if len(self.result) < self.problem.count:
                self._run(self._next())
        return tuple(self.result)

    def _make_ready(self, node: int) -> None:
        heapq.heappush(self.ready, self.rank[node])
        self.doubtful.append(node)

    def _has_run(self, node: int) -> bool:
        return bool(self.done >> node & 1)

    def _run(self, node: int) -> None:
        _, self.live = self.problem.step(node, self.done, self.live)
        self.done |= 1 << node
        self.result.append(node)
        for follower in self.problem.followers[node]:
            self.waiting[follower] -= 1
            if self.waiting[follower] == 0:
                self._make_ready(follower)
        for storage in self.problem.reads[node]:
            left = self.problem.readers[storage] & ~self.done
            last = left.bit_length() - 1
            if left and left == 1 << last and last < self.problem.count and self.waiting[last] == 0:
                self.doubtful.append(last)

    def _run_free_chains(self) -> None:
        while True:
            if self.doubtful:
                node = self.doubtful.pop()
            elif self.blocked and self.live + self.blocked[0][0] <= self.bound:
                node = heapq.heappop(self.blocked)[1]
            else:
                return
            if self._has_run(node):
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
        passed: list[int] = []
        best, least = -1, -1
        while self.ready:
            rank = heapq.heappop(self.ready)
            node = self.priority[rank]
            if self._has_run(node):
                continue
            call, _ = self.problem.step(node, self.done, self.live)
            passed.append(rank)
            if best < 0 or call < least:
                best, least = node, call
            if call <= self.bound:
                break
        for rank in passed:
            heapq.heappush(self.ready, rank)
        return best
