"""Runs the widest layers of the backward pass in micro-batches, so that their gradients never exist for all samples.

Between two narrow gradients, those of the input and of the output of an inverted residual say, lie wide ones. They
depend on the samples one by one; only what they tell a parameter is summed over the batch, part by part here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pockc.ir import Builder, Graph, Node, Origin, Value, substitute, uniquely_named
from pockc.passes import reorder
from pockc.passes.batch_rules import Roles, rescaled, roles
from pockc.passes.channel_chains import find
from pockc.passes.micro_batches import Part, batch_of
from pockc.passes.rewrite import derived
from pockc.passes.schedule_model import problem_of
from pockc.passes.tile_channels import MARK
from pockc.passes.tile_estimates import needed_outside
from pockc.recipe import Recipe

COUNTS = (1, 2, 4, 8)  # parts of the batch to choose from
LEAST_GAIN = 0.02  # of the peak: for less, the graph is not worth making longer
MOST_SEGMENTS = 8
WIDE = 0.5  # of the result that sets the peak


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Backward nodes in order that make each wide gradient that they read, and read each that they make.

    ``roles`` says which operands are read by rows; the results of ``sums`` are sums over the batch.
    """

    nodes: tuple[Node, ...]
    roles: Mapping[Node, Roles]
    sums: frozenset[Node]


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Split segments of the backward pass: into the fewest parts that bring them below what the rest needs.

    Pre:  no later pass adds readers of gradients.
    Post: the same function up to the order of sums over the batch; of the gradients inside a segment that was split
          only those of one part exist at a time.
    """
    batch = batch_of(graph)
    if batch < 2 or not graph.updates:
        return graph
    ordered = reorder.searched(graph, recipe)
    segments, limit = _segments(ordered, batch, recipe)
    if not segments:
        return graph
    counts = [count for count in COUNTS if count <= batch]
    needs = [_needs(ordered, segments, count, batch, recipe) for count in counts]
    limit = max(limit, *(min(need[i] for need in needs) for i in range(len(segments))))
    if limit > (1 - LEAST_GAIN) * max(needs[0]):
        return graph
    chosen = [next(c for c, need in zip(counts, needs, strict=True) if need[i] <= limit) for i in range(len(segments))]
    return split(ordered, dict(zip(segments, chosen, strict=True)), batch) or graph


def _segments(graph: Graph, batch: int, recipe: Recipe) -> tuple[list[Segment], int]:
    """The segments around the nodes that need the most, down to one that has none; and what the rest needs."""
    search = _Search(graph, batch)
    needed = dict(zip(graph.nodes, problem_of(graph, recipe.workspace).needed().tolist(), strict=True))
    trained = _behind_trained(graph)
    elsewhere = trained.union(*((*chain.nodes, chain.end) for chain in find(graph, recipe)))
    rest = needed_outside(graph, elsewhere, recipe)
    segments: list[Segment] = []
    inside: set[Node] = set()
    for node in sorted(trained, key=lambda node: -needed[node]):
        if node in inside:
            continue
        segment = search.around(node) if len(segments) < MOST_SEGMENTS and needed[node] > rest else None
        if segment is None or not inside.isdisjoint(segment.nodes) or split(graph, {segment: 2}, batch) is None:
            return segments, max(rest, needed[node])
        segments.append(segment)
        inside.update(segment.nodes)
    return segments, rest


def _behind_trained(graph: Graph) -> set[Node]:
    """The nodes that depend on a parameter which is updated, and those of the backward pass."""
    changed = {state for state in graph.updates if graph.states[state].kind == "parameter"}
    found: set[Node] = set()
    for node in graph.nodes:
        if node.origin.phase != "forward" or not changed.isdisjoint(node.inputs):
            found.add(node)
            changed.update(node.outputs)
    return found


class _Search:
    """Grows segments from a node along wide values."""

    def __init__(self, graph: Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self.producers, self.readers, self.results = graph.producers(), graph.consumers(), set(graph.results())
        known = derived(graph, graph.states)
        values = (*graph.inputs, *(value for node in graph.nodes for value in node.outputs))
        self.batched = {value for value in values if value not in known}

    def around(self, start: Node) -> Segment | None:
        """The segment that a node is part of; None where some of it cannot run on part of the batch."""
        wide = WIDE * max(value.type.nbytes for value in (*start.inputs, *start.outputs))
        found: dict[Node, Roles] = {}
        sums: set[Node] = set()
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            role, is_sum = self._role(node)
            if role is None or not self.results.isdisjoint(node.outputs):
                return None
            found[node] = role
            if is_sum:
                sums.add(node)
            waiting += self._neighbours(node, wide, is_sum=is_sum)
        if len(sums) == len(found):
            return None
        nodes = tuple(node for node in self.graph.nodes if node in found)
        return Segment(nodes, found, frozenset(sums))

    def _neighbours(self, node: Node, wide: float, *, is_sum: bool) -> list[Node]:
        """What makes a wide gradient that a node reads, and what reads one that it makes."""
        made = [value for value in node.outputs if value.type.nbytes >= wide and not is_sum]
        read = [self.producers[v] for v in node.inputs if v.type.nbytes >= wide and v in self.producers]
        return read + [reader for value in made for reader in self.readers.get(value, ())]

    def _role(self, node: Node) -> tuple[Roles | None, bool]:
        """Which operands a part of the batch reads by rows; and whether the result is a sum over the batch."""
        rows = all(value.type.shape[:1] == (self.batch,) for value in node.inputs)
        if node.op == "conv2d_grad_weight" and rows:
            return (True, True), True
        if node.op == "reduce_sum" and rows and 0 in node.attrs["axes"]:
            return (True,), True
        return roles(node, self.batched, self.batch), False


def _needs(graph: Graph, segments: Sequence[Segment], count: int, batch: int, recipe: Recipe) -> list[int]:
    """What each segment needs in so many parts; unlimited where it cannot be split."""
    after = split(graph, dict.fromkeys(segments, count), batch, weighed=True)
    peaks = [sys.maxsize if after is None else 0] * len(segments)
    if after is not None:
        for node, nbytes in zip(after.nodes, problem_of(after, recipe.workspace).needed().tolist(), strict=True):
            if node.origin.file == MARK:
                peaks[node.origin.line] = max(peaks[node.origin.line], nbytes)
    return peaks


def split(graph: Graph, counts: Mapping[Segment, int], batch: int, *, weighed: bool = False) -> Graph | None:
    """The graph with each segment in that many parts; None where a segment waits for what waits for it.

    With ``weighed`` the origin of a segment's nodes is `MARK` and the segment's number.
    """
    splitter = _Splitter(graph, batch)
    inside = {node for segment in counts for node in segment.nodes}
    for line, (segment, count) in enumerate(counts.items()):
        splitter.run(segment, count, Origin("", MARK, line, "backward") if weighed else None)
    nodes = (*splitter.builder.nodes, *(node for node in graph.nodes if node not in inside))
    after = uniquely_named(substitute(replace(graph, nodes=nodes), splitter.whole))
    ordered = reorder.by_updates(after)
    return ordered if len(ordered.nodes) == len(nodes) else None


class _Splitter:
    """Emits segments part by part."""

    def __init__(self, graph: Graph, batch: int) -> None:
        self.batch = batch
        self.readers = graph.consumers()
        self.builder = Builder(replace(graph, nodes=()))
        self.whole: dict[Value, Value] = {}  # what other nodes read -> the same put together

    def run(self, segment: Segment, count: int, origin: Origin | None) -> None:
        """The segment, whose results then have replacements in ``whole``."""
        parts: dict[Value, list[Value]] = {}
        size = -(-self.batch // count)
        for start in range(0, self.batch, size):
            self._part(segment, (start, min(size, self.batch - start)), parts, origin)
        for node in segment.nodes:
            self.builder.origin = origin or node.origin
            for value in node.outputs:
                if node in segment.sums:
                    continue
                if any(reader not in segment.roles for reader in self.readers.get(value, ())):
                    self.whole[value] = self._joined(parts[value], value)

    def _joined(self, parts: list[Value], value: Value) -> Value:
        return self.builder("concat", *parts, axis=0, hint=value.name) if len(parts) > 1 else parts[0]

    def _part(self, segment: Segment, part: Part, parts: dict[Value, list[Value]], origin: Origin | None) -> None:
        rows: dict[Value, Value] = {}
        for node in segment.nodes:
            self.builder.origin = origin or node.origin
            inputs = []
            for value, sliced in zip(node.inputs, segment.roles[node], strict=True):
                if sliced and value not in rows:
                    rows[value] = self._slice(value, part)
                inputs.append(rows[value] if sliced else value)
            attrs = node.attrs if node in segment.sums else rescaled(node, self.batch, *part)
            outputs = self.builder.multi(node.op, *inputs, hint=node.outputs[0].name, **attrs)
            for value, output in zip(node.outputs, outputs, strict=True):
                if node in segment.sums:
                    total = self.whole.get(value)
                    self.whole[value] = self.builder("add", total, output, hint=value.name) if total else output
                else:
                    rows[value] = output
                    parts.setdefault(value, []).append(output)

    def _slice(self, value: Value, part: Part) -> Value:
        start, samples = part
        if samples == self.batch:
            return value
        each = value.type.shape[0] // self.batch
        first, stop = start * each, (start + samples) * each
        return self.builder("slice", value, axis=0, start=first, stop=stop, hint=value.name)
