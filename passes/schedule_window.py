"""Refinement of an order: the calls around the peak, ordered again by exact search, until there is no gain."""

from __future__ import annotations

from pockc.passes.schedule_exact import within
from pockc.passes.schedule_model import Problem

WINDOWS = (16, 32, 64, 128, 256)  # calls around the peak that are ordered again, in growing numbers
SEARCH = 400  # sets of nodes that one search may visit
TOTAL = 6000  # and all searches together


def refined(problem: Problem, start: tuple[int, ...], least: int) -> tuple[int, ...]:
    """An order at least as good as ``start``, found by reordering windows around the peak; stops at ``least`` bytes.

    What happens in a window of consecutive calls changes nothing outside: which bytes are alive depends on the set of
    nodes that have run.
    """
    refinement = _Refinement(problem, start, least)
    while refinement.improve():
        pass
    return refinement.order


class _Refinement:
    def __init__(self, problem: Problem, start: tuple[int, ...], least: int) -> None:
        self.problem, self.order, self.least = problem, start, least
        self.budget = TOTAL

    def improve(self) -> bool:
        """Take one call at the peak below it, by the smallest window that can; False if none can."""
        calls = self.problem.calls(self.order)
        peak = max(calls)
        if peak <= max(self.least, self.problem.floor):
            return False
        at = calls.index(peak)
        for width in WINDOWS:
            first, last = max(0, at - width // 2), min(len(calls), at + width // 2)
            if segment := self._arranged(first, last, peak):
                self.order = (*self.order[:first], *segment, *self.order[last:])
                return True
        return False

    def _arranged(self, first: int, last: int, peak: int) -> tuple[int, ...] | None:
        """The nodes of calls ``first`` to ``last`` in an order below ``peak``: as far below as the budget finds one."""
        done, live = 0, self.problem.initial
        for node in self.order[:first]:
            _, live = self.problem.step(node, done, live)
            done |= 1 << node
        nodes = self.order[first:last]
        window = self.problem.window(done, live, nodes)
        least = max(self.least, window.lower_bound())
        for bound in sorted({least, (least + peak) // 2, peak - 1}):
            if bound >= peak or self.budget <= 0:
                return None
            outcome = within(window, bound, min(SEARCH, self.budget))
            self.budget -= outcome.spent
            if outcome.order is not None:
                return tuple(nodes[i] for i in outcome.order)
        return None
