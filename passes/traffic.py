"""What the calls of a schedule move to and from main memory, on a processor with a cache.

A model from shapes and order alone: a cache of whole tensors, of which the least recently used leaves first (Mattson et
al. 1970, "Evaluation Techniques for Storage Hierarchies"). A tensor that is there when it is read costs nothing, one
that has to leave before its last reader is written. A tensor larger than the cache is never there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from pockc.ir import Graph, Node, Value
from pockc.ops import OPS
from pockc.passes.cost import (
    BYTES_PER_SECOND,
    CACHE_BYTES_PER_SECOND,
    CALL_SECONDS,
    OPERATIONS_PER_SECOND,
    multiply_adds,
    touched_bytes,
)
from pockc.passes.lifetimes import storages


def seconds(graph: Graph, cache: int, share: Mapping[Value, float], runs: Mapping[Node, int]) -> list[float]:
    """The estimated time of each node in all its runs: the longest of arithmetic, cache and memory, and the calls.

    Args: those of `of_calls`, and how often a node runs, if not once.
    """
    found = []
    for node, moved in zip(graph.nodes, of_calls(graph, cache, share), strict=True):
        if OPS[node.op].view:
            found.append(0.0)  # no kernel runs
            continue
        times = runs.get(node, 1)
        touched = sum(nbytes * share.get(value, 1.0) for value, nbytes in touched_bytes(node))
        moving = max(moved / BYTES_PER_SECOND, touched / CACHE_BYTES_PER_SECOND)
        arithmetic = 2 * multiply_adds(node) / OPERATIONS_PER_SECOND  # as much in parts as at once
        found.append(max(arithmetic, times * moving) + times * CALL_SECONDS)
    return found


def of_calls(graph: Graph, cache: int, share: Mapping[Value, float]) -> list[int]:
    """Bytes between memory and cache at each node of a schedule.

    Args:
        graph: the nodes in the order in which they run.
        cache: bytes of it that one core can count on.
        share: of some values, how much of them a call has at a time: micro-batches take their own rows.
    """
    model = _Cache(graph, cache, share)
    return [0 if OPS[node.op].view else model.call(index, node) for index, node in enumerate(graph.nodes)]


class _Cache:
    """The tensors that are there, by their storages."""

    def __init__(self, graph: Graph, capacity: int, share: Mapping[Value, float]) -> None:
        self.capacity = capacity
        self.share = share
        self.root = storages(graph)
        self.held: OrderedDict[Value, int] = OrderedDict()  # storage -> bytes; the least recently used first
        self.unwritten: set[Value] = set()  # of these: newer than what main memory has
        self.last = {self.root[value]: i for i, node in enumerate(graph.nodes) for value in node.inputs}
        self.last |= {self.root[value]: len(graph.nodes) for value in (*graph.states, *graph.results())}

    def call(self, index: int, node: Node) -> int:
        """Bytes that a call moves: operands that are not there, results too large for it, and what leaves for them."""
        moved = 0
        for value, nbytes in touched_bytes(node):
            storage, made = self.root[value], value in node.outputs
            size = int(nbytes * self.share.get(value, 1.0))
            if size > self.capacity:
                moved += size
                continue
            if storage in self.held:
                self.held.move_to_end(storage)
            else:
                moved += 0 if made else size
                self.held[storage] = size
            if made:
                self.unwritten.add(storage)
        for value in node.inputs:
            if self.last[self.root[value]] <= index:
                self._forget(self.root[value])
        return moved + self._evicted()

    def _forget(self, storage: Value) -> None:
        """Its bytes are of no use any more: nobody writes them."""
        self.held.pop(storage, None)
        self.unwritten.discard(storage)

    def _evicted(self) -> int:
        """Bytes written to make room again."""
        written = 0
        filled = sum(self.held.values())
        while filled > self.capacity:
            storage, size = self.held.popitem(last=False)
            filled -= size
            if storage in self.unwritten:
                self.unwritten.discard(storage)
                written += size
        return written
