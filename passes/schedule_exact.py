"""Exact search for an order under a bound: depth-first over the sets of nodes that have run."""

from __future__ import annotations

from dataclasses import dataclass

from pockc.passes.schedule_model import Problem

LARGEST_GROUP = 3  # nodes that are tried together, where one alone would leave more bytes alive


@dataclass(frozen=True, slots=True)
class Outcome:
    """``order`` is None where none was found; ``complete`` says whether none exists or the budget ran out.

    ``spent`` counts the sets that were visited: a count, not a time, so that equal inputs give equal orders.
    """

    order: tuple[int, ...] | None
    complete: bool
    spent: int


def optimum(problem: Problem, start: tuple[int, ...], budget: int) -> tuple[tuple[int, ...], bool]:
    """The best order that the budget allows to find, and whether it is known to be the best of all.

    Each round asks for an order that is better than the best one so far, until there is none.
    """
    best, peak = start, problem.peak(start)
    least = problem.lower_bound()
    while peak > least:
        outcome = within(problem, peak - 1, budget)
        budget -= outcome.spent
        if outcome.order is None:
            return best, outcome.complete
        best, peak = outcome.order, problem.peak(outcome.order)
    return best, True


def within(problem: Problem, bound: int, budget: int) -> Outcome:
    """An order whose every call stays within ``bound`` bytes, if ``budget`` visited sets are enough to find one."""
    return _Search(problem, bound, budget).run()


@dataclass(slots=True)
class _Frame:
    """A set of nodes that have run, its live bytes, the length of its order, and the nodes to try next."""

    done: int
    live: int
    length: int
    choices: list[int]


class _Search:
    """Depth-first search with two rules that lose nothing.

    A set of nodes needs to be visited once, however it was reached. And a free group runs at once, without trying
    anything else: nodes that fit under the bound one after the other, and leave no more bytes alive than there were,
    nor than any part of the group alone. Move them to the front of any legal order: what they free now they would
    free later too, and what they take now they would take later at least in part, so that no call grows beyond the
    bound.
    """

    def __init__(self, problem: Problem, bound: int, budget: int) -> None:
        self.problem, self.bound, self.budget = problem, bound, budget
        self.relatives = _relatives(problem)
        self.order: list[int] = []
        self.seen: set[int] = set()
        self.frames: list[_Frame] = []
        self.spent = 0

    def run(self) -> Outcome:
        problem = self.problem
        if max(problem.initial, problem.floor) > self.bound:
            return Outcome(None, complete=True, spent=0)
        everything = (1 << problem.count) - 1
        self._enter(0, problem.initial)
        while self.frames:
            frame = self.frames[-1]
            if frame.done == everything:
                return Outcome(tuple(self.order), complete=True, spent=self.spent)
            if self.spent >= self.budget:
                return Outcome(None, complete=False, spent=self.spent)
            del self.order[frame.length :]
            if not frame.choices:
                self.frames.pop()
                continue
            index = frame.choices.pop()
            _, after = problem.step(index, frame.done, frame.live)
            self.order.append(index)
            self._enter(frame.done | 1 << index, after)
        return Outcome(None, complete=True, spent=self.spent)

    def _enter(self, done: int, live: int) -> None:
        done, live, ready = self._close(done, live)
        choices = [] if done in self.seen else self._choices(done, live, ready)
        self.seen.add(done)
        self.frames.append(_Frame(done, live, len(self.order), choices))
        self.spent += 1

    def _choices(self, done: int, live: int, ready: list[int]) -> list[int]:
        """The nodes that fit, the most promising last: least memory alive afterwards."""
        steps = [(self.problem.step(index, done, live), index) for index in ready]
        fitting = [(after, call, index) for (call, after), index in steps if call <= self.bound]
        return [index for _, _, index in sorted(fitting, reverse=True)]

    def _close(self, done: int, live: int) -> tuple[int, int, list[int]]:
        """Run free groups until there is none; returns the set, its live bytes and the nodes that are ready then."""
        ready = self.problem.ready(done)
        while group := self._free_group(ready, done, live):
            for member in group:
                _, live = self.problem.step(member, done, live)
                done |= 1 << member
            self.order.extend(group)
            ready = self.problem.ready(done)
        return done, live, ready

    def _free_group(self, ready: list[int], done: int, live: int) -> list[int]:
        for index in ready:
            if group := self._extend([index], done, live, live, set()):
                return group
        return []

    def _extend(self, group: list[int], done: int, live: int, target: int, tried: set[int]) -> list[int]:
        """The group, extended until it leaves no more than ``target`` bytes alive; empty where that cannot be."""
        index = group[-1]
        call, after = self.problem.step(index, done, live)
        done |= 1 << index
        if call > self.bound or done in tried:
            return []
        tried.add(done)
        if after <= target:
            return group if self._no_part_is_better(group, done, target, after) else []
        if len(group) == LARGEST_GROUP:
            return []
        for relative in self.relatives[index]:
            if done >> relative & 1 or self.problem.before[relative] & ~done:
                continue
            if found := self._extend([*group, relative], done, after, target, tried):
                return found
        return []

    def _no_part_is_better(self, group: list[int], done: int, before: int, after: int) -> bool:
        """Whether no part of the group that could run alone leaves fewer bytes alive than all of it."""
        start = done & ~sum(1 << i for i in group)
        live = {start: before}
        parts = [start]
        while parts:
            part = parts.pop()
            for index in group:
                larger = part | 1 << index
                if larger in live or self.problem.before[index] & ~part:
                    continue
                _, live[larger] = self.problem.step(index, part, live[part])
                parts.append(larger)
        return min(live.values()) >= after


def _relatives(problem: Problem) -> list[list[int]]:
    """Per node, those that wait for it or read what it reads: running them too may free what it could not alone."""
    relatives = []
    for index in range(problem.count):
        shared = 0
        for storage in problem.reads[index]:
            shared |= problem.readers[storage]
        readers = [i for i in range(problem.count) if shared >> i & 1 and i != index]
        relatives.append(list(dict.fromkeys((*problem.followers[index], *readers))))
    return relatives
