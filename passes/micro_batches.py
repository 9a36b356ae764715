"""What :mod:`pockc.passes.split_prefix` cuts, and how it makes the prefix anew for each part of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from pockc.ir import Builder, Graph, Node, Value
from pockc.ops import OPS
from pockc.passes.batch_rules import Roles, rescaled, roles
from pockc.passes.batch_sums import is_mean
from pockc.passes.lifetimes import view_offset
from pockc.passes.rewrite import live_nodes

# Made anew for each part where made of states alone: cheaper than keeping it through all parts.
REMADE = frozenset({"mul", "add", "sub", "transpose", "reshape", "take", "expand", "clip"})

Part = tuple[int, int]  # first sample, number of samples


@dataclass(frozen=True, slots=True)
class Network:
    """A scheduled graph, and what of it can run on some samples at a time."""

    graph: Graph
    batch: int
    roles: Mapping[Node, Roles]  # the nodes that can, in order
    readers: Mapping[Value, Sequence[Node]]
    results: AbstractSet[Value]
    sums: AbstractSet[Node] = frozenset()  # of the nodes: those whose partial results add up
    onto: Mapping[Value, Value] = field(default_factory=dict)  # a sum -> the sum that it is a part of


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the prefix ends: its nodes in order, and the values that cross from it to the rest."""

    nodes: tuple[Node, ...]
    boundary: tuple[Value, ...]


def batch_of(graph: Graph) -> int:
    """The leading size that most inputs share; 0 without inputs."""
    sizes = [value.type.shape[0] for value in graph.inputs if value.type.shape]
    return max(sizes, key=sizes.count, default=0)


def analyse(graph: Graph, batch: int) -> Network:
    """The network of a scheduled graph whose inputs share a batch in axis 0.

    What the backward pass makes of activations counts where it is made before the forward pass ends.
    """
    batched = {value for value in graph.inputs if value.type.shape[:1] == (batch,)}
    independent = set(graph.states)
    new_states = set(graph.updates.values())
    known: dict[Node, Roles] = {}
    for node in graph.nodes:
        if independent.issuperset(node.inputs):
            independent.update(node.outputs)
            continue
        if not all(value in batched or value in independent for value in node.inputs):
            continue
        found = roles(node, batched, batch)
        if found is not None and new_states.isdisjoint(node.outputs):
            known[node] = found
            batched.update(node.outputs)
    forward = [i for i, node in enumerate(known) if node.origin.phase == "forward"]
    known = dict(list(known.items())[: max(forward, default=-1) + 1])
    return Network(graph, batch, known, graph.consumers(), frozenset(graph.results()))


def cut_behind(network: Network, nodes: Sequence[Node]) -> Cut:
    """The cut behind some nodes, less those at its end that may as well run behind it.

    These are views of the boundary, and what is made from values that cross anyway: with them in the prefix both
    operand and result would have to be kept.
    """
    inside = dict.fromkeys(nodes)
    made = {output for node in nodes for output in node.outputs}

    def crosses(value: Value) -> bool:
        return value in network.results or any(reader not in inside for reader in network.readers.get(value, ()))

    for node in reversed(nodes):
        if any(reader in inside for output in node.outputs for reader in network.readers.get(output, ())):
            continue
        by_rows = [value for value, sliced in zip(node.inputs, network.roles[node], strict=True) if sliced]
        if OPS[node.op].view or all(value not in made or crosses(value) for value in by_rows):
            del inside[node]
    boundary = (value for node in inside for value in node.outputs if crosses(value))
    return Cut(tuple(inside), tuple(boundary))


def parts_of(batch: int, size: int) -> list[Part]:
    """The micro-batches: as many samples each, but the last."""
    return [(start, min(size, batch - start)) for start in range(0, batch, size)]


def split(network: Network, cut: Cut, parts: Sequence[Part], *, ahead: bool = False) -> Graph:
    """The graph with the nodes of the cut made anew for each part of the batch, and their boundary put together.

    With ``ahead`` the inputs are taken apart before the first part runs: this needs them twice for a moment, but then
    each part frees its own rows.
    """
    splitter = _Splitter(network, cut)
    if ahead:
        splitter.take_apart(parts)
    for start, samples in parts:
        splitter.run(start, samples)
    return splitter.finish()


class _Splitter:
    """Emits the prefix part by part, then the rest."""

    def __init__(self, network: Network, cut: Cut) -> None:
        self.network = network
        self.cut = cut
        self.boundary = frozenset(cut.boundary)
        self.builder = Builder(replace(network.graph, nodes=()))
        self.producers = network.graph.producers()
        self.filled: dict[Value, Value] = {}  # boundary value -> as far as it is put together
        self.kept: set[Node] = set()  # nodes made of states alone that all parts share
        self.taken: dict[int, dict[Value, Value]] = {}  # first sample -> inputs of its part

    def take_apart(self, parts: Sequence[Part]) -> None:
        """Slice the inputs for all parts."""
        inputs = set(self.network.graph.inputs)
        for node in self.cut.nodes:
            for value, sliced in zip(node.inputs, self.network.roles[node], strict=True):
                if not sliced or value not in inputs:
                    continue
                inputs.remove(value)
                for start, samples in parts:
                    part = self._slice(value, node, start, samples, {})
                    if view_offset(self.builder.nodes[-1], of_given=True) is not None:
                        part = self.builder("copy", part, hint=value.name)
                    self.taken.setdefault(start, {})[value] = part

    def run(self, start: int, samples: int) -> None:
        """The prefix on samples ``[start, start + samples)``."""
        rows = self.taken.get(start, {})  # batched values of this part
        remade: dict[Value, Value] = {}
        for node in self.cut.nodes:
            inputs = []
            for value, sliced in zip(node.inputs, self.network.roles[node], strict=True):
                if value in self.network.onto:
                    continue
                if sliced and value not in rows:
                    rows[value] = self._slice(value, node, start, samples, remade)
                inputs.append(rows[value] if sliced else self._made_of_states(value, remade))
            self.builder.origin = node.origin
            total = self.filled.get(node.outputs[0])
            if node.op == "embedding_grad" and total is not None:
                self.filled[node.outputs[0]] = self.builder(node.op, *inputs, total, hint=total.name, **node.attrs)
                continue
            attrs = rescaled(node, self.network.batch, start, samples)
            outputs = self.builder.multi(node.op, *inputs, hint=node.outputs[0].name, **attrs)
            if node in self.network.sums:
                self._add(node, outputs[0], samples)
                continue
            rows.update(zip(node.outputs, outputs, strict=True))
            for value in node.outputs:
                if value in self.boundary:
                    self._insert(value, rows[value], start)

    def finish(self) -> Graph:
        """The rest, which reads the boundary."""
        graph = self.network.graph
        done = self.kept.union(self.cut.nodes)
        for node in graph.nodes:
            if node not in done:
                inputs = tuple(self.filled.get(value, value) for value in node.inputs)
                self.builder.nodes.append(node if inputs == node.inputs else replace(node, inputs=inputs))
        outputs = {name: self.filled.get(value, value) for name, value in graph.outputs.items()}
        results = {*outputs.values(), *graph.updates.values()}
        self.builder.nodes = live_nodes(self.builder.nodes, results)
        return self.builder.build(outputs, graph.updates)

    def _slice(self, value: Value, reader: Node, start: int, samples: int, remade: dict[Value, Value]) -> Value:
        """The rows of an input, of a table that has a row for each sample, or of what is filled part by part."""
        each = value.type.shape[0] // self.network.batch
        first, end = start * each, (start + samples) * each
        maker = self.producers.get(value)
        if maker is not None and maker.op == "expand" and not maker.inputs[0].type.shape:
            self.builder.origin = maker.origin
            shape = (end - first, *value.type.shape[1:])
            return self.builder("expand", self._made_of_states(maker.inputs[0], remade), shape=shape, hint=value.name)
        source = self._made_of_states(value, remade)
        self.builder.origin = reader.origin
        return self.builder("slice", source, axis=0, start=first, stop=end, hint=value.name)

    def _add(self, node: Node, part: Value, samples: int) -> None:
        value = self.network.onto.get(node.outputs[0], node.outputs[0])
        if is_mean(node):
            part = self.builder("mul", part, self.builder.constant(samples / self.network.batch), hint=value.name)
        total = self.filled.get(value)
        self.filled[value] = part if total is None else self.builder("add", total, part, hint=value.name)

    def _insert(self, value: Value, part: Value, start: int) -> None:
        shape, dtype = value.type.shape, value.type.dtype
        if value not in self.filled:
            self.filled[value] = self.builder("expand", self.builder.constant(0, dtype), shape=shape, hint=value.name)
        first = start * (shape[0] // self.network.batch)
        self.filled[value] = self.builder("insert", self.filled[value], part, axis=0, start=first, hint=value.name)

    def _made_of_states(self, value: Value, remade: dict[Value, Value]) -> Value:
        """An input, a state, or a value that depends on states alone: made anew, or kept from the first part on."""
        node = self.producers.get(value)
        if node is None or node in self.kept:
            return value
        if value in remade:
            return remade[value]
        if node.op in REMADE:
            inputs = [self._made_of_states(operand, remade) for operand in node.inputs]
            self.builder.origin = node.origin
            remade[value] = self.builder(node.op, *inputs, hint=value.name, **node.attrs)
            return remade[value]
        self._keep(node)
        return value

    def _keep(self, node: Node) -> None:
        """Append a node with all that it needs, once."""
        for operand in node.inputs:
            producer = self.producers.get(operand)
            if producer is not None and producer not in self.kept:
                self._keep(producer)
        self.kept.add(node)
        self.builder.nodes.append(node)
