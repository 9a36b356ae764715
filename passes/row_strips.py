"""Where images can run in strips of rows, and the graph in which they do: for :mod:`pockc.passes.split_rows`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pockc.ir import Builder, Graph, Node, Value
from pockc.passes.row_rules import Rows, reading, row_axis

IMAGE_RANK = 4
ROWS_OF_INPUTS = 2  # the row axis of a model's images: PyTorch's are N, C, H, W


@dataclass(frozen=True, slots=True)
class Cut:
    """The first layers of a network, in order, of which only one value is read by the rest."""

    nodes: tuple[Node, ...]
    boundary: Value

    @property
    def height(self) -> int:
        """Rows of the boundary."""
        return self.boundary.type.shape[1]


@dataclass(frozen=True, slots=True)
class Images:
    """The values of a graph that are made row by row, with the axes of their rows, and where they may be cut."""

    axes: Mapping[Value, int]
    cuts: tuple[Cut, ...]


def analyse(graph: Graph) -> Images:
    """What of the forward pass can run in strips. Cuts have channels-last boundaries and are in order of depth."""
    axes = {value: ROWS_OF_INPUTS for value in graph.inputs if len(value.type.shape) == IMAGE_RANK}
    independent = set(graph.states)
    nodes: list[Node] = []
    for node in graph.nodes:
        if independent.issuperset(node.inputs):
            independent.update(node.outputs)
        elif node.origin.phase == "forward" and (axis := row_axis(node, axes, independent)) is not None:
            axes.update(dict.fromkeys(node.outputs, axis))
            nodes.append(node)
    return Images(axes, tuple(_cuts(graph, nodes, axes)))


def _cuts(graph: Graph, nodes: list[Node], axes: Mapping[Value, int]) -> Iterator[Cut]:
    """The places where a single value crosses from the nodes in front to everything else."""
    unread = {value: len(readers) for value, readers in graph.consumers().items()}
    for value in graph.results():
        unread[value] = unread.get(value, 0) + 1
    crossing: set[Value] = set()
    for count, node in enumerate(nodes, start=1):
        for value in dict.fromkeys(node.inputs):
            unread[value] -= 1
            if unread[value] == 0:
                crossing.discard(value)
        crossing.update(value for value in node.outputs if unread.get(value))
        if len(crossing) == 1 and crossing.issubset(node.outputs):
            (boundary,) = crossing
            if axes[boundary] == 1 and len(boundary.type.shape) == IMAGE_RANK:
                yield Cut(tuple(nodes[:count]), boundary)


def strips(height: int, count: int) -> list[Rows]:
    """That many strips of equal height, but the last; fewer where the rows do not suffice."""
    step = -(-height // count)
    return [(start, min(start + step, height)) for start in range(0, height, step)]


def fits(images: Images, cut: Cut, count: int) -> bool:
    """Whether the boundary has that many strips, and each depends on some rows, not on padding alone."""
    rows = strips(cut.height, count)
    read = [needed for part in rows for needed in _needed(images, cut, part).values()]
    return len(rows) == count and all(first < end for first, end in read)


def in_strips(graph: Graph, images: Images, cut: Cut, count: int) -> Graph:
    """The graph with the nodes of the cut made anew for each strip of the boundary, which `insert` puts together.

    The strips must fit (`fits`).
    """
    builder = Builder(replace(graph, nodes=()))
    inside = set(cut.nodes)
    whole: dict[Value, Value] = {}
    for node in graph.nodes:
        if node is cut.nodes[-1]:
            whole[cut.boundary] = _filled(builder, images, cut, count)
        elif node not in inside:
            inputs = tuple(whole.get(value, value) for value in node.inputs)
            builder.nodes.append(node if inputs == node.inputs else replace(node, inputs=inputs))
    outputs = {name: whole.get(value, value) for name, value in graph.outputs.items()}
    return builder.build(outputs, graph.updates)


def front(graph: Graph, images: Images, cut: Cut, count: int) -> Graph:
    """The strips alone, with what is made of states for them: all that runs up to the boundary."""
    needed = {value for node in cut.nodes for value in node.inputs}
    before: list[Node] = []
    inside = set(cut.nodes)
    for node in reversed(graph.nodes):
        if node not in inside and not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            before.append(node)
    builder = Builder(replace(graph, nodes=tuple(reversed(before)), outputs={}, updates={}))
    return builder.build({"boundary": _filled(builder, images, cut, count)})


def _filled(builder: Builder, images: Images, cut: Cut, count: int) -> Value:
    boundary = cut.boundary
    builder.origin = cut.nodes[-1].origin
    zero = builder.constant(0, boundary.type.dtype)
    filled = builder("expand", zero, shape=boundary.type.shape, hint=boundary.name)
    for rows in strips(cut.height, count):
        part = _strip(builder, images, cut, rows)
        filled = builder("insert", filled, part, axis=1, start=rows[0], hint=boundary.name)
    return filled


def _strip(builder: Builder, images: Images, cut: Cut, rows: Rows) -> Value:
    """Some rows of the boundary, from the rows of the inputs that they depend on.

    Neighbouring strips share rows of what their windows slide over: these are computed for both.
    """
    needed = _needed(images, cut, rows)
    made: dict[Value, Value] = {}

    def part(value: Value, rows: Rows) -> Value:
        """Those rows of a value, of which at least those are made."""
        axis = images.axes[value]
        if value not in made:
            first, end = needed[value]
            whole = (first, end) == (0, value.type.shape[axis])
            made[value] = value if whole else builder("slice", value, axis=axis, start=first, stop=end, hint=value.name)
        if rows == needed[value]:
            return made[value]
        start, stop = (row - needed[value][0] for row in rows)
        return builder("slice", made[value], axis=axis, start=start, stop=stop, hint=value.name)

    for node in cut.nodes:
        builder.origin = node.origin
        read = reading(node, images.axes, needed[node.outputs[0]])
        pairs = zip(node.inputs, read.rows, strict=True)
        inputs = [value if own is None else part(value, own) for value, own in pairs]
        outputs = builder.multi(node.op, *inputs, hint=node.outputs[0].name, **read.attrs)
        made.update(zip(node.outputs, outputs, strict=True))
    return made[cut.boundary]


def _needed(images: Images, cut: Cut, rows: Rows) -> dict[Value, Rows]:
    """Of each value, the rows from the first to the last that a strip of the boundary depends on."""
    needed = {cut.boundary: rows}
    for node in reversed(cut.nodes):
        wanted = [needed[value] for value in node.outputs if value in needed]
        own = (min(first for first, _ in wanted), max(end for _, end in wanted))
        needed.update(dict.fromkeys(node.outputs, own))
        for value, read in zip(node.inputs, reading(node, images.axes, own).rows, strict=True):
            if read is not None:
                known = needed.get(value, read)
                needed[value] = (min(known[0], read[0]), max(known[1], read[1]))
    return needed
