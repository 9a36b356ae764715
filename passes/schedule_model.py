"""What an order costs: live bytes as a function of the set of nodes that have run, for the searches over orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pockc.errors import InternalError
from pockc.ir import Graph, Node, Value
from pockc.passes.lifetimes import aligned, overwritten, storage_readers, storages, takeover_candidates

Workspace = Callable[[Node], int]  # bytes of scratch memory that the node's kernel wants

# An output that needs memory: its storage, the bytes, and the storages that it may take over where they die.
Allocation = tuple[int, int, tuple[int, ...]]


Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Problem:
    """A graph as the searches see it: nodes are bits of an integer, values are storages.

    A storage is a value with all its views. Which storages are alive, and whether an output may take one over, depends
    on the set of nodes that have run and on nothing else: that is what makes searches over sets exact. States and what
    is written into them are no storages; they are always alive.
    """

    before: tuple[int, ...]  # per node: the set of nodes that it waits for
    followers: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]  # per node: storages
    makes: tuple[tuple[Allocation, ...], ...]
    workspace: tuple[int, ...]
    readers: tuple[int, ...]  # per storage: the set of nodes that read it, and the bit `count` if it outlives them all
    nbytes: tuple[int, ...]  # per storage
    initial: int  # live bytes before the first node
    floor: int  # bytes of all inputs: alive together before the first node, even those that nothing reads

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(self.before)

    def step(self, index: int, done: int, live: int) -> tuple[int, int]:
        """Bytes alive while a node runs, and after it, where the set ``done`` has run and keeps ``live`` bytes."""
        pending = ~(done | 1 << index)
        readers, nbytes = self.readers, self.nbytes
        allocated = freed = 0
        dying = [storage for storage in self.reads[index] if not readers[storage] & pending]
        for storage, size, candidates in self.makes[index]:
            for heir in candidates:
                if heir in dying:
                    dying.remove(heir)
                    break
            else:
                allocated += size
            if not readers[storage]:
                freed += size
        for storage in dying:
            freed += nbytes[storage]
        return live + allocated + self.workspace[index], live + allocated - freed

    def calls(self, order: Iterable[int]) -> list[int]:
        """Bytes alive at each call of an order."""
        done, live, calls = 0, self.initial, []
        for index in order:
            call, live = self.step(index, done, live)
            done |= 1 << index
            calls.append(call)
        return calls

    def peak(self, order: Iterable[int]) -> int:
        """The most bytes that are alive at once: what `memory` reports as the maximum of this order."""
        return max(self.floor, self.initial, max(self.calls(order), default=0))

    def ready(self, done: int) -> list[int]:
        """The nodes that may run after the set ``done``."""
        return [i for i, before in enumerate(self.before) if not done >> i & 1 and not before & ~done]

    def window(self, done: int, live: int, nodes: Sequence[int]) -> Problem:
        """The problem of ordering ``nodes`` alone, after the set ``done``; node i of it is ``nodes[i]``."""
        position = {node: i for i, node in enumerate(nodes)}
        outlives = 1 << len(nodes)
        inside = _mask(nodes)

        def local(mask: int) -> int:
            return _mask(i for i, node in enumerate(nodes) if mask >> node & 1)

        touched = {s for node in nodes for s in (*self.reads[node], *(made[0] for made in self.makes[node]))}
        number = {storage: i for i, storage in enumerate(sorted(touched))}
        later = ~(done | inside)
        readers = (local(self.readers[s]) | (outlives if self.readers[s] & later else 0) for s in number)
        return Problem(
            before=tuple(local(self.before[node]) for node in nodes),
            followers=tuple(tuple(position[f] for f in self.followers[node] if f in position) for node in nodes),
            reads=tuple(tuple(number[s] for s in self.reads[node]) for node in nodes),
            makes=tuple(
                tuple((number[s], size, tuple(number[c] for c in candidates)) for s, size, candidates in self.makes[n])
                for n in nodes
            ),
            workspace=tuple(self.workspace[node] for node in nodes),
            readers=tuple(readers),
            nbytes=tuple(self.nbytes[s] for s in number),
            initial=live,
            floor=0,
        )

    def lower_bound(self) -> int:
        """Bytes that some call needs in every order: an order may need more."""
        return max(self.floor, self.initial, int(self.needed().max(initial=0)))

    def needed(self) -> npt.NDArray[np.int64]:
        """Bytes that each node needs in every order.

        While a node runs, everything that its ancestors made for it or for its descendants is alive. Nodes that are
        neither count for nothing.
        """
        reach = self._reachability()
        reached_from = np.ascontiguousarray(reach.T)
        makers = {made[0]: index for index in range(self.count) for made in self.makes[index]}
        needed = np.array([self._least_allocation(i, reach[i]) for i in range(self.count)], np.int64)
        needed += self.workspace
        for storage, readers in enumerate(self.readers):
            read_later: Flags = np.ones(self.count, np.bool_)
            if not readers >> self.count & 1:
                read_later = np.logical_or.reduce(reached_from[_members(readers)], axis=0)
            made_before = np.ones(self.count, np.bool_)
            if storage in makers:
                made_before = reach[makers[storage]].copy()
                made_before[makers[storage]] = False
            needed[read_later & made_before] += self.nbytes[storage]
        return needed

    def _least_allocation(self, index: int, reached: Flags) -> int:
        """What a node must allocate however early everything ran that may run before it."""

        def may_die(storage: int) -> bool:
            readers = [i for i in _members(self.readers[storage]) if i != index]
            return not any(i == self.count or reached[i] for i in readers)

        return sum(size for _, size, candidates in self.makes[index] if not any(map(may_die, candidates)))

    def _reachability(self) -> Flags:
        """[i, j]: node j is node i or needs it to have run."""
        reach = np.eye(self.count, dtype=np.bool_)
        for index in reversed(self.topological()):
            for follower in self.followers[index]:
                reach[index] |= reach[follower]
        return reach

    def topological(self) -> list[int]:
        """Some order of the nodes that is legal."""
        waiting = [mask.bit_count() for mask in self.before]
        order = [i for i, count in enumerate(waiting) if count == 0]
        for index in order:
            for follower in self.followers[index]:
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    order.append(follower)
        return order


def _mask(members: Iterable[int]) -> int:
    return sum(1 << i for i in members)


def _members(mask: int) -> list[int]:
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found


def problem_of(graph: Graph, workspace: Workspace) -> Problem:
    """The scheduling problem of a graph whose updates are all in place. Node i of it is ``graph.nodes[i]``.

    Every order of the problem keeps the updates in place: what makes the new value of a state waits for the readers
    of the old one.
    """
    homes = overwritten(graph)
    if not homes.keys() >= set(graph.updates.values()):
        raise InternalError("schedule: an update is not in place")
    root = storages(graph)
    values = (*graph.inputs, *(v for node in graph.nodes for v in node.outputs))
    owned = [v for v in values if root[v] is v and v not in homes and v.type.nbytes]
    number = {value: i for i, value in enumerate(owned)}

    def storages_of(values: Iterable[Value]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(number[root[v]] for v in values if root[v] in number))

    def made_by(node: Node) -> tuple[Allocation, ...]:
        return tuple(
            (number[v], aligned(v.type.nbytes), storages_of(takeover_candidates(node, position, root)))
            for position, v in enumerate(node.outputs)
            if v in number
        )

    reads = [storages_of(node.inputs) for node in graph.nodes]
    readers_of: list[set[int]] = [set() for _ in owned]
    for index, read in enumerate([*reads, storages_of(graph.results())]):
        for storage in read:
            readers_of[storage].add(index)
    before = _waits(graph, homes)
    followers: list[list[int]] = [[] for _ in graph.nodes]
    for index, earlier in enumerate(before):
        for i in sorted(earlier):
            followers[i].append(index)
    sizes = [aligned(value.type.nbytes) for value in owned]
    given = storages_of(graph.inputs)
    return Problem(
        before=tuple(map(_mask, before)),
        followers=tuple(map(tuple, followers)),
        reads=tuple(reads),
        makes=tuple(map(made_by, graph.nodes)),
        workspace=tuple(aligned(workspace(node)) for node in graph.nodes),
        readers=tuple(map(_mask, readers_of)),
        nbytes=tuple(sizes),
        initial=sum(sizes[s] for s in given if readers_of[s]),
        floor=sum(sizes[s] for s in given),
    )


def _waits(graph: Graph, homes: Mapping[Value, tuple[Value, Value]]) -> list[set[int]]:
    """Per node, the nodes that must come first: the makers of its operands, and readers of what it overwrites."""
    maker = {output: i for i, node in enumerate(graph.nodes) for output in node.outputs}
    before = [{maker[value] for value in node.inputs if value in maker} for node in graph.nodes]
    known = storage_readers(graph)
    for value, (_, old) in homes.items():
        before[maker[value]].update(i for i in known[old] if i != maker[value])
    return before
