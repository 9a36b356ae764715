"""What it takes to run a training step in micro-batches whose gradients add up: then few activations exist at a time.

The sum of the micro-batches' gradients is the gradient of the whole batch, up to rounding: losses that are means over
rows count every row of the batch (see ``first_row`` of cross_entropy). It costs memory for the sums, which a step in
one piece does not need where it updates each parameter at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pockc.ir import Graph, Node, Value
from pockc.passes.batch_rules import Roles, roles
from pockc.passes.batch_sums import sum_roles
from pockc.passes.micro_batches import REMADE, Cut, Network


@dataclass(frozen=True, slots=True)
class Analysis:
    """What can run in micro-batches. ``obstacle`` is a node that needs the whole batch at once, if there is one."""

    network: Network
    cut: Cut
    obstacle: Node | None

    def batched(self) -> set[Value]:
        """The values of which a micro-batch has its own rows alone."""
        return {value for node in self.cut.nodes if node not in self.network.sums for value in node.outputs}

    def repeated(self) -> set[Node]:
        """The nodes that run once for each micro-batch: those that split, and what they have made of states anew."""
        found = set(self.cut.nodes)
        makers = self.network.graph.producers()
        stack = [value for node in self.cut.nodes for value in node.inputs]
        while stack:
            maker = makers.get(stack.pop())
            if maker is not None and maker not in found and maker.op in REMADE:
                found.add(maker)
                stack += maker.inputs
        return found

    def sum_bytes(self) -> int:
        """Bytes of the sums, which are alive through all micro-batches."""
        values = (value for node in self.network.sums for value in node.outputs)
        return sum(value.type.nbytes for value in values if value not in self.network.onto)


def analyse(graph: Graph, batch: int) -> Analysis:
    """Sort the nodes of a training step: per sample, sums over samples, and what comes before or after them."""
    batched = {value for value in graph.inputs if value.type.shape[:1] == (batch,)}
    independent = set(graph.states)
    summed: set[Value] = set()  # and what is computed from sums
    known: dict[Node, Roles] = {}
    sums: set[Node] = set()
    onto: dict[Value, Value] = {}
    readers = graph.consumers()
    obstacle: Node | None = None
    for node in graph.nodes:
        if independent.issuperset(node.inputs):
            independent.update(node.outputs)
            continue
        if batched.isdisjoint(node.inputs) and summed.union(independent).issuperset(node.inputs):
            summed.update(node.outputs)
            continue
        if _is_added_to(node, sums, readers):
            onto[node.inputs[2]] = node.outputs[0]
            known[node] = (True, True, False)
            sums.add(node)
            summed.update(node.outputs)
            continue
        found = roles(node, batched, batch)
        added = sum_roles(node, batched, batch) if found is None else None
        if found is not None and summed.isdisjoint(node.inputs):
            batched.update(node.outputs)
        elif added is not None and summed.isdisjoint(node.inputs):
            sums.add(node)
            summed.update(node.outputs)
        else:
            obstacle = obstacle or node
            continue
        known[node] = found or added or ()
    results = frozenset(graph.results())
    boundary = [
        value
        for node in known
        if node not in sums
        for value in node.outputs
        if value in results or any(reader not in known for reader in readers.get(value, ()))
    ]
    if obstacle is None and any(value in batched for value in graph.updates.values()):
        makers = graph.producers()
        obstacle = next(makers[value] for value in graph.updates.values() if value in batched)
    network = Network(graph, batch, known, readers, results, frozenset(sums), onto)
    return Analysis(network, Cut(tuple(known), tuple(boundary)), obstacle)


def _is_added_to(node: Node, sums: set[Node], readers: Mapping[Value, list[Node]]) -> bool:
    """Whether this is the gradient of a table on top of another sum, as tied embeddings have it: both are one sum."""
    if node.op != "embedding_grad" or len(node.inputs) < 3 or readers[node.inputs[2]] != [node]:
        return False
    return any(node.inputs[2] in other.outputs for other in sums)
