"""Cuts a forward graph behind its frozen prefix, so that what the prefix makes of a sample can be kept.

What crosses the cut is the *boundary*. Every expensive node of the prefix stays in front of it. Cheap ones may as well
run behind it: where that makes the boundary smaller, they do. An attention mask is then an input behind the cut
instead of a large tensor in it, and a residual stream crosses once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pockc.errors import UserError
from pockc.ir import Graph, Node, Value, substitute, uniquely_named
from pockc.passes.cost import multiply_adds
from pockc.passes.frozen_prefix import value_keys
from pockc.passes.micro_batches import analyse, batch_of
from pockc.passes.rewrite import is_frozen, live_nodes
from pockc.recipe import Recipe

# May run behind the cut, in every step: a pass over memory at most, like reading the boundary itself.
CHEAP = frozenset({
    "reshape", "transpose", "expand", "slice", "concat", "cast", "copy", "neg", "abs", "add", "sub", "mul", "div",
    "maximum", "minimum", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and",
    "logical_or", "logical_not", "where", "clip", "dequantize", "reduce_sum", "reduce_mean", "reduce_max",
})  # fmt: skip
NAME = "encoded"  # of the tensors of the boundary: outputs of `encode`, inputs of what starts from there
UNBOUNDED = 1 << 62

Network = Mapping[Hashable, dict[Hashable, int]]  # residual capacities of a flow network


@dataclass(frozen=True, slots=True)
class Boundary:
    """What crosses the cut, by its names in the program, and keys by which other graphs of the model find it."""

    values: dict[str, Value]
    keys: dict[str, str]

    def in_graph(self, graph: Graph, recipe: Recipe) -> dict[str, Value] | None:
        """The same values in another graph of the model; None where it computes one of them otherwise."""
        found = {key: value for value, key in value_keys(graph, _untouched(graph, recipe)).items()}
        values = {name: found.get(key) for name, key in self.keys.items()}
        known = {name: value for name, value in values.items() if value is not None}
        return known if len(known) == len(values) else None


def find(graph: Graph, recipe: Recipe) -> Boundary:
    """The boundary of the fewest bytes behind all that is expensive in front of everything trained.

    Args:
        graph: a training graph, forward only.
        recipe: says what is trained or updated.

    Raises:
        UserError: nothing expensive is in front, or what is there is not the same in every step.
    """
    untouched = _untouched(graph, recipe)
    _refuse_changes(graph, recipe, untouched)
    front = replace(graph, nodes=untouched, outputs={}, updates={})
    nodes = list(analyse(front, batch_of(graph)).roles)
    if not any(map(multiply_adds, nodes)):
        raise UserError(
            "cache_prefix has nothing to cache: no product or convolution lies in front of everything that is trained",
            supported="schemes that leave the first layers frozen, such as sparse, last-k:N or head",
            instead="Leave cache_prefix out, or freeze the first layers.",
        )
    values = _smallest(graph, nodes)
    keys = value_keys(graph, untouched)
    names = {f"{NAME}.{position}": value for position, value in enumerate(values)}
    return Boundary(names, {name: keys[value] for name, value in names.items()})


def encoder(graph: Graph, boundary: Mapping[str, Value]) -> Graph:
    """The prefix alone: from inputs to the boundary."""
    nodes = tuple(live_nodes(list(graph.nodes), boundary.values()))
    return _trimmed(replace(graph, nodes=nodes, outputs=dict(boundary), updates={}))


def behind(graph: Graph, boundary: Mapping[str, Value]) -> Graph:
    """The rest: the boundary has become inputs, in front of those that are still read."""
    given = {value: Value(name, value.type) for name, value in boundary.items()}
    after = substitute(graph, given)
    nodes = tuple(live_nodes(list(after.nodes), after.results()))
    return _trimmed(replace(after, inputs=(*given.values(), *graph.inputs), nodes=nodes))


def joined(encode: Graph, rest: Graph, inputs: Sequence[str]) -> Graph:
    """Both parts as one entry, each node as it is: the same numbers, to the last bit, as one after the other.

    Args:
        encode: the prefix.
        rest: what starts from its outputs.
        inputs: names of inputs in the order in which the result shall have them; others follow.
    """
    known = {value.name: value for value in (*rest.inputs, *rest.states) if not _is_constant(rest, value)}
    own = [value for value in (*encode.inputs, *encode.states) if not _is_constant(encode, value)]
    shared = {value: known[value.name] for value in own if known.get(value.name, value) is not value}
    front = substitute(encode, shared)
    crossing = {value: front.outputs[value.name] for value in rest.inputs if value.name in front.outputs}
    after = substitute(rest, crossing)
    given = {value.name: value for value in (*encode.inputs, *rest.inputs) if value not in crossing}
    given |= {value.name: value for value in rest.inputs if value not in crossing}
    order = [*(name for name in inputs if name in given), *(name for name in given if name not in inputs)]
    states = {value: state for value, state in encode.states.items() if value not in shared}
    return uniquely_named(
        replace(
            after,
            inputs=tuple(given[name] for name in order),
            states={**states, **rest.states},
            nodes=(*front.nodes, *after.nodes),
        )
    )


def _is_constant(graph: Graph, value: Value) -> bool:
    return value in graph.states and graph.states[value].kind == "constant"


def _trimmed(graph: Graph) -> Graph:
    """Without inputs and constants that nothing reads."""
    read = {value for node in graph.nodes for value in node.inputs}.union(graph.results())
    states = {value: state for value, state in graph.states.items() if state.kind != "constant" or value in read}
    return replace(graph, inputs=tuple(value for value in graph.inputs if value in read), states=states)


def _untouched(graph: Graph, recipe: Recipe) -> tuple[Node, ...]:
    """The nodes that depend on inputs and frozen states alone."""
    return _without(graph, {value for value in graph.states if not is_frozen(graph, recipe, value)})


def _without(graph: Graph, changing: Iterable[Value]) -> tuple[Node, ...]:
    """The nodes that none of these values reaches."""
    reached = set(changing)
    found: list[Node] = []
    for node in graph.nodes:
        if reached.isdisjoint(node.inputs):
            found.append(node)
        else:
            reached.update(node.outputs)
    return tuple(found)


def _refuse_changes(graph: Graph, recipe: Recipe, untouched: tuple[Node, ...]) -> None:
    """Raise UserError where the prefix differs from step to step, or its steps must all be made.

    Statistics of a batch norm are updated there, or something expensive lies behind dropout.
    """
    in_front = _without(graph, {value for value in graph.states if value.name in recipe.trained})
    cut_off = [node for node in in_front if node not in set(untouched)]
    made = {value for node in cut_off for value in node.outputs}
    if not any(map(multiply_adds, cut_off)) and made.isdisjoint(graph.updates.values()):
        return
    kind = "dropout" if cut_off[0].op == "dropout_mask" else "a batch norm that is updated"
    raise UserError(
        f"cache_prefix cannot keep what lies in front of everything trained: it contains {kind}, "
        "which makes it another in every step",
        where=cut_off[0].origin,
        supported="prefixes that are the same function in every step",
        instead="Build from model.eval(), which has no dropout, and with batchnorm fold or freeze.",
    )


def _smallest(graph: Graph, nodes: Sequence[Node]) -> list[Value]:
    """The boundary of the fewest bytes: a minimum cut between what is expensive and all that reads it.

    Every value that a reader behind the prefix needs either crosses, or is made there by a cheap node from what then
    has to cross instead. So the boundary is a set of values without which no path leads from an expensive node
    through cheap ones to a reader. Of several such sets the last in order is taken, which leaves least to do again.
    Inputs cost nothing: the data has them.
    """
    inside = set(nodes)
    makers = {value: node for node in nodes for value in node.outputs}
    readers = graph.consumers()
    results = set(graph.results())
    crossing = [v for v in makers if v in results or any(node not in inside for node in readers.get(v, ()))]
    network: defaultdict[Hashable, dict[Hashable, int]] = defaultdict(dict)
    waiting = list(crossing)
    seen = set(crossing)
    for value in crossing:
        network[value, "out"]["sink"] = UNBOUNDED
    while waiting:
        value = waiting.pop()
        network[value, "in"][value, "out"] = value.type.nbytes
        if makers[value].op not in CHEAP:
            network["source"][value, "in"] = UNBOUNDED
            continue
        for operand in makers[value].inputs:
            if operand in makers:
                network[operand, "out"][value, "in"] = UNBOUNDED
                waiting += [operand] if operand not in seen else []
                seen.add(operand)
    _saturate(network)
    reaching = _reaching_sink(network)
    return [value for value in makers if (value, "out") in reaching and (value, "in") not in reaching]


def _saturate(network: defaultdict[Hashable, dict[Hashable, int]]) -> None:
    """A maximum flow from source to sink, along shortest paths; what is left are the residual capacities."""
    while path := _shortest_path(network):
        edges = list(pairwise(path))
        amount = min(network[start][end] for start, end in edges)
        for start, end in edges:
            network[start][end] -= amount
            network[end][start] = network[end].get(start, 0) + amount


def _shortest_path(network: Network) -> list[Hashable]:
    """From source to sink with some capacity left on every edge; empty if there is none."""
    came_from: dict[Hashable, Hashable] = {"source": "source"}
    waiting: deque[Hashable] = deque(["source"])
    while waiting and "sink" not in came_from:
        start = waiting.popleft()
        for end, capacity in network.get(start, {}).items():
            if capacity > 0 and end not in came_from:
                came_from[end] = start
                waiting.append(end)
    if "sink" not in came_from:
        return []
    path: list[Hashable] = ["sink"]
    while path[-1] != "source":
        path.append(came_from[path[-1]])
    return path[::-1]


def _reaching_sink(network: Network) -> set[Hashable]:
    """From where some capacity is left all the way to the sink."""
    into: defaultdict[Hashable, list[Hashable]] = defaultdict(list)
    for start, ends in network.items():
        for end, capacity in ends.items():
            if capacity > 0:
                into[end].append(start)
    found: set[Hashable] = {"sink"}
    waiting: list[Hashable] = ["sink"]
    while waiting:
        for start in into[waiting.pop()]:
            if start not in found:
                found.add(start)
                waiting.append(start)
    return found
