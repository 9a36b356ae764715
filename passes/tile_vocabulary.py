"""Cross entropy over tiles of the vocabulary: never is there a whole gradient of the weight, seldom are all logits.

With a vocabulary of 32000 and 512 tokens the logits are 66 MB, as much as the gradient of the weight that makes them,
and both are alive together: the peak of a language model's training step. Here the logits of some words are computed,
and what the loss needs of them is noted per token. The backward pass goes over the tiles again, turns the logits of
each into their gradient, and where nothing else is added to the gradient of the weight, updates those rows of it at
once. Logits that were kept until then are needed in memory, those that were not are computed a second time: all of them
once more are four products of that size instead of three. Where the weight is frozen nothing needs the gradient of all
logits: some tokens at a time go through both passes at once, and no product is needed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pockc.ir import Builder, Graph, Node, Value
from pockc.passes import memory, reorder
from pockc.passes.cost import seconds
from pockc.passes.fit_memory import FREE_SHARE
from pockc.passes.rewrite import live_nodes
from pockc.recipe import Recipe

TILE_BYTES = 2 << 20  # of a tile's logits, and of its rows of the weight
TILE_MULTIPLE = 16  # rows of the weight, so that they begin at multiples of 64 bytes whatever its width
MOST_TILES = 64  # more calls would take too long to plan
ROWS_BYTES = 32 << 20  # of the logits of some tokens,
LEAST_ROWS = 128  # and as many tokens at the least: the weight is read once for these
MOST_GROWTH = 3  # times the peak without kept logits, which these may make of it where no target is given

Tile = tuple[int, int]  # first class, and the first behind

# Operands, without indices, of the optimizer ops that can update a range of rows: those with a slot of one byte per
# element cannot, because a block of codes may span rows.
_OPERANDS = {"sgd": 3, "momentum": 5, "adam": 6, "lion": 4}


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Run ``matmul -> cross_entropy``, what counts correct predictions, and the gradients, over tiles of the classes.

    That is done where it lowers the graph's peak by a larger share than it raises the estimated time. Unless to compute
    all logits again costs next to nothing, those of as many tiles are kept as there is room for: under a target up to
    that, without one as long as the peak is not more than `MOST_GROWTH` times the smallest.

    Pre:  biases are fused, gradients and optimizer attached; nothing but losses reads the logits.
    Post: the same function to rounding. Where it was applied, no value has all logits or their gradient; a weight whose
          gradient went straight to its optimizer op is updated by a chain of such ops with a ``start``.
    """
    for head in _heads(graph):
        if _tile_width(head) >= head.classes:
            continue
        candidate = smallest = tiled(graph, head, 0)
        if _slower(graph, smallest) > FREE_SHARE:
            candidate = _faster(graph, head, smallest, recipe)
        if _worthwhile(graph, candidate if recipe.transient_target is None else smallest, recipe):
            graph = candidate
    return graph


@dataclass(slots=True)
class Head:
    """The nodes around the logits of one loss."""

    product: Node  # [..., D] x [V, D] -> [..., V]
    loss: Node
    gradient: Node | None = None  # of the logits
    count: Node | None = None
    weight_gradient: Node | None = None
    input_gradient: Node | None = None
    bias_gradient: Node | None = None
    update: Node | None = None  # the optimizer op, where it may run tile by tile
    views: list[Node] = field(default_factory=list)  # reshapes of logits and of their gradient

    @property
    def classes(self) -> int:
        """The size of the vocabulary."""
        return self.product.inputs[1].type.shape[0]

    @property
    def tiles(self) -> list[Tile]:
        """Ranges of the classes."""
        width = _tile_width(self)
        return [(start, min(start + width, self.classes)) for start in range(0, self.classes, width)]

    @property
    def tokens(self) -> int:
        """The rows of the logits."""
        return self.loss.inputs[1].type.elements

    def nodes(self) -> Iterator[Node]:
        """All that tiles replace."""
        optional = (self.gradient, self.count, self.weight_gradient, self.input_gradient, self.bias_gradient)
        yield from (self.product, self.loss, *self.views)
        yield from (node for node in (*optional, self.update) if node is not None)


def _heads(graph: Graph) -> Iterator[Head]:
    producers, readers, results = graph.producers(), graph.consumers(), set(graph.results())
    for node in graph.nodes:
        if node.op != "cross_entropy":
            continue
        product = producers.get(node.inputs[0])
        while product is not None and product.op == "reshape":
            product = producers.get(product.inputs[0])
        if product is None or not _is_linear(product):
            continue
        head = Head(product, node)
        taken = _take_losses(head, readers, results) and _take_gradients(head, readers, results)
        if taken and not _waits_for_loss(head, producers):
            head.update = _immediate_update(head, graph, readers)
            yield head


def _waits_for_loss(head: Head, producers: dict[Value, Node]) -> bool:
    """Whether the loss's own gradient is computed from the loss: both passes are emitted as one."""
    stack = [head.gradient.inputs[0]] if head.gradient is not None else []
    seen: set[Node] = set()
    while stack:
        node = producers.get(stack.pop())
        if node is not None and node not in seen:
            seen.add(node)
            stack += node.inputs
    return head.loss in seen


def _is_linear(node: Node) -> bool:
    if node.op != "matmul" or node.attrs["activation"] != "none" or node.attrs["transpose_a"]:
        return False
    return bool(node.attrs["transpose_b"]) and len(node.inputs[1].type.shape) == 2


Readers = dict[Value, list[Node]]


def _readers_behind_views(value: Value, readers: Readers, results: set[Value], views: list[Node]) -> list[Node] | None:
    """What reads a value directly or reshaped, reshapes left to ``views``; None where it is a result."""
    if value in results:
        return None
    found = []
    for reader in readers.get(value, ()):
        if reader.op != "reshape":
            found.append(reader)
            continue
        views.append(reader)
        behind = _readers_behind_views(reader.outputs[0], readers, results, views)
        if behind is None:
            return None
        found += behind
    return found


def _take_losses(head: Head, readers: Readers, results: set[Value]) -> bool:
    """Note what reads the logits; False where that is anything but one loss, its gradient and a count."""
    for reader in _readers_behind_views(head.product.outputs[0], readers, results, head.views) or [head.product]:
        if reader is head.loss:
            continue
        if reader.op == "cross_entropy_grad" and head.gradient is None and _is_of(reader, head.loss):
            head.gradient = reader
        elif reader.op == "count_correct" and head.count is None and reader.inputs[1] is head.loss.inputs[1]:
            head.count = reader
        else:
            return False
    return True


def _is_of(gradient: Node, loss: Node) -> bool:
    return gradient.inputs[1:] == loss.inputs and gradient.attrs == loss.attrs


def _take_gradients(head: Head, readers: Readers, results: set[Value]) -> bool:
    """Note what reads the gradient of the logits; False where that is more than the gradients of a linear layer."""
    if head.gradient is None:
        return True
    behind = _readers_behind_views(head.gradient.outputs[0], readers, results, head.views)
    if behind is None:
        return False
    for reader in behind:
        role = _role(head, reader)
        if role is None or getattr(head, role) is not None:
            return False
        setattr(head, role, reader)
    return True


def _role(head: Head, reader: Node) -> str | None:
    """Which gradient of the layer a reader of the logits' gradient computes."""
    if reader.op == "reduce_sum":
        return "bias_gradient" if reader.outputs[0].type.shape == (head.classes,) else None
    if reader.op != "matmul" or len(reader.inputs) != 2 or reader.attrs["transpose_b"]:
        return None
    if reader.attrs["transpose_a"]:
        flat = reader.inputs[0].type.shape == (head.tokens, head.classes)
        return "weight_gradient" if flat and len(reader.inputs[1].type.shape) == 2 else None
    return "input_gradient" if reader.inputs[1] is head.product.inputs[1] else None


def _immediate_update(head: Head, graph: Graph, readers: Readers) -> Node | None:
    """The optimizer op that alone reads the gradient of the weight, and updates all of the weight."""
    if head.weight_gradient is None:
        return None
    gradient, weight = head.weight_gradient.outputs[0], head.product.inputs[1]
    nodes = readers.get(gradient, [])
    if len(nodes) != 1 or gradient in graph.results():
        return None
    (node,) = nodes
    if node.inputs[:2] != (weight, gradient) or len(node.inputs) != _OPERANDS.get(node.op):
        return None
    states = _updated_states(node)
    if any(graph.updates.get(state) is not new for state, new in zip(states, node.outputs, strict=True)):
        return None
    alone = all(readers[slot] == [node] for slot in states[1:])
    own = {head.product, head.input_gradient, node}
    return node if alone and own.issuperset(readers[weight]) else None


def _updated_states(node: Node) -> tuple[Value, ...]:
    """The operands of an optimizer op that its outputs are the new values of."""
    return (node.inputs[0], *node.inputs[2 : 1 + len(node.outputs)])


def _tile_width(head: Head) -> int:
    """Classes of a tile, from shapes alone."""
    longest = max(head.tokens, head.product.inputs[1].type.shape[1])
    width = max(TILE_BYTES // (4 * longest), -(-head.classes // MOST_TILES))
    return max(1, -(-width // TILE_MULTIPLE)) * TILE_MULTIPLE


def _faster(graph: Graph, head: Head, smallest: Graph, recipe: Recipe) -> Graph:
    """The graph with as few logits computed twice as memory allows."""
    target = recipe.transient_target
    if head.weight_gradient is None and head.tokens >= 2 * _height(head):
        candidate = in_rows(graph, head, _height(head))
        if target is None or reorder.least_peak(candidate, recipe) <= target:
            return candidate
    return tiled(graph, head, _kept(head, smallest, recipe))


def _height(head: Head) -> int:
    """Tokens at a time, where these go through both passes at once."""
    return max(LEAST_ROWS, ROWS_BYTES // (4 * head.classes) // TILE_MULTIPLE * TILE_MULTIPLE)


def _kept(head: Head, smallest: Graph, recipe: Recipe) -> int:
    """Of how many tiles the logits may be kept, by what the graph needs without any."""
    least = max(reorder.least_peak(smallest, recipe), recipe.sufficient)
    most = MOST_GROWTH * least if recipe.transient_target is None else recipe.transient_target
    tile = 4 * head.tokens * _tile_width(head)
    return max(0, min((most - least) // tile, len(head.tiles)))


def _slower(graph: Graph, candidate: Graph) -> float:
    """The share of the graph's estimated time that the candidate takes more."""
    return max(0.0, sum(map(seconds, candidate.nodes)) / sum(map(seconds, graph.nodes)) - 1)


def _worthwhile(graph: Graph, candidate: Graph, recipe: Recipe) -> bool:
    slower = _slower(graph, candidate)
    after = max(memory.live_peak(reorder.searched(candidate, recipe), recipe.workspace), recipe.sufficient)
    if 1 - after / reorder.least_peak(graph, recipe) > slower:
        return True
    before = memory.live_peak(reorder.searched(graph, recipe), recipe.workspace)  # a search that takes its time
    return 1 - after / before > slower


def tiled(graph: Graph, head: Head, kept: int) -> Graph:
    """The graph with the nodes of a head made anew for each tile, the logits of the last ``kept`` tiles only once.

    Those are one tile, of which the gradient of the weight is made in parts.
    """
    tiles = head.tiles
    again = tiles[: len(tiles) - kept]
    once = (tiles[-kept][0], head.classes) if kept else None
    return _remade(graph, head, lambda builder: _Tiles(builder, head, again, once).run())


def in_rows(graph: Graph, head: Head, height: int) -> Graph:
    """The graph with the nodes of a head of frozen weight made anew for each ``height`` tokens."""
    return _remade(graph, head, lambda builder: _over_rows(builder, head, height))


def _remade(graph: Graph, head: Head, make: Callable[[Builder], dict[Value, Value]]) -> Graph:
    """The graph with what ``make`` emits in place of the nodes of a head: a value for each that others read."""
    replaced = set(head.nodes())
    behind = {output for node in replaced for output in node.outputs}
    later: list[Node] = []
    builder = Builder(replace(graph, nodes=()))
    for node in graph.nodes:
        if node in replaced:
            continue
        if behind.isdisjoint(node.inputs):
            builder.nodes.append(node)
        else:
            behind.update(node.outputs)
            later.append(node)
    new = make(builder)
    builder.nodes += [replace(node, inputs=tuple(new.get(v, v) for v in node.inputs)) for node in later]
    outputs = {name: new.get(value, value) for name, value in graph.outputs.items()}
    updates = {state: new.get(value, value) for state, value in graph.updates.items()}
    builder.nodes = live_nodes(builder.nodes, {*outputs.values(), *updates.values()})
    return builder.build(outputs, updates)


def _over_rows(builder: Builder, head: Head, height: int) -> dict[Value, Value]:
    """Emits both passes over some tokens after the other.

    The gradient of a mean over all tokens that count needs their number, which the labels tell before any logits.
    """
    given, weight, *bias = head.product.inputs
    builder.origin = head.product.origin
    rows = builder("reshape", given, shape=(head.tokens, given.type.shape[-1]), hint="rows")
    labels = builder("reshape", head.loss.inputs[1], shape=(head.tokens,), hint="labels")
    known: list[Value] = []
    sums = _Sums(builder)
    for start in range(0, head.tokens, height):
        stop = min(start + height, head.tokens)
        builder.origin = head.product.origin
        part = builder("slice", rows, axis=0, start=start, stop=stop, hint="some_rows")
        logits = builder("matmul", part, weight, *bias, transpose_b=True, hint="row_logits")
        builder.origin = head.loss.origin
        own = builder("slice", labels, axis=0, start=start, stop=stop, hint="labels")
        ignored = head.loss.attrs["ignore_index"]
        known.append(builder("cross_entropy_tile", logits, own, start=0, ignore_index=ignored, hint="running"))
        if head.gradient is None:
            continue
        builder.origin = head.gradient.origin
        attrs = {**head.loss.attrs, "first_row": start}
        ct = builder("cross_entropy_grad", head.gradient.inputs[0], logits, labels, hint="row_gradient", **attrs)
        if head.input_gradient is not None:
            builder.origin = head.input_gradient.origin
            sums.insert(head.input_gradient, builder("matmul", ct, weight, hint="gradient"), start, height=head.tokens)
        if head.bias_gradient is not None:
            builder.origin = head.bias_gradient.origin
            sums.add(head.bias_gradient, builder("reduce_sum", ct, axes=(0,), hint="gradient"))
    builder.origin = head.loss.origin
    return {**_losses(builder, head, builder("concat", *known, axis=0, hint="running"), labels), **sums.results()}


def _losses(builder: Builder, head: Head, running: Value, labels: Value) -> dict[Value, Value]:
    """Loss and counts, from what is known of every token."""
    builder.origin = head.loss.origin
    attrs = {**_loss_attrs(head), "classes": head.classes}
    new = {head.loss.outputs[0]: builder("cross_entropy_of_tiles", running, labels, hint="loss", **attrs)}
    if head.count is not None:
        counts = builder.multi("count_correct_of_tiles", running, labels, **head.count.attrs)
        new.update(zip(head.count.outputs, counts, strict=True))
    return new


def _loss_attrs(head: Head) -> dict[str, Any]:
    return {name: value for name, value in head.loss.attrs.items() if name != "first_row"}


class _Sums:
    """Gradients that are put together from parts, by the nodes that made each as a whole."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.whole: dict[Node, Value] = {}

    def add(self, node: Node, part: Value) -> None:
        """One more term."""
        known = self.whole.get(node)
        self.whole[node] = part if known is None else self.builder("add", known, part, hint="gradient")

    def insert(self, node: Node, part: Value, start: int, *, height: int) -> None:
        """The rows from ``start`` on, of so many."""
        if node not in self.whole:
            shape = (height, *part.type.shape[1:])
            self.whole[node] = self.builder("expand", self.builder.constant(0.0), shape=shape, hint="gradient")
        self.whole[node] = self.builder("insert", self.whole[node], part, axis=0, start=start, hint="gradient")

    def results(self) -> dict[Value, Value]:
        """What replaces the output of each node, in its shape."""
        return {node.outputs[0]: self._like(node, value) for node, value in self.whole.items()}

    def _like(self, node: Node, value: Value) -> Value:
        self.builder.origin = node.origin
        shape = node.outputs[0].type.shape
        return value if value.type.shape == shape else self.builder("reshape", value, shape=shape, hint="gradient")


class _Tiles:
    """Emits both passes over the tiles: forward from the first to the last, backward from the last to the first.

    The last one may be the tile whose logits are kept: they are given up before others are computed again, and the
    weight is read where it lies until it is updated.
    """

    def __init__(self, builder: Builder, head: Head, again: list[Tile], once: Tile | None) -> None:
        self.builder, self.head = builder, head
        self.once = once
        self.tiles = again if once is None else [*again, once]
        given, self.weight, *self.bias = head.product.inputs
        builder.origin = head.product.origin
        self.rows = builder("reshape", given, shape=(head.tokens, given.type.shape[-1]), hint="rows")
        labels = head.loss.inputs[1]
        self.labels = builder("reshape", labels, shape=(head.tokens,), hint="labels")
        self.loss_attrs = _loss_attrs(head)
        self.parts: dict[Tile, Value] = {}  # of the weight, and the logits: those of the forward pass
        self.logits: dict[Tile, Value] = {}
        self.states = _updated_states(head.update) if head.update is not None else (self.weight,)
        self.sums = _Sums(builder)

    def run(self) -> dict[Value, Value]:
        """What replaces each output of the head's nodes that others read."""
        running = self._statistics()
        new = _losses(self.builder, self.head, running, self.labels)
        if self.head.gradient is not None:
            new.update(self._backward(self.head.gradient, running))
        return new

    def _slice(self, value: Value, tile: Tile, hint: str) -> Value:
        return self.builder("slice", value, axis=0, start=tile[0], stop=tile[1], hint=hint)

    def _product(self, tile: Tile, weight: Value) -> Value:
        """The logits of a tile, from its rows of the weight."""
        bias = [self._slice(value, tile, "tile_bias") for value in self.bias]
        return self.builder("matmul", self.rows, weight, *bias, transpose_b=True, hint="tile_logits")

    def _statistics(self) -> Value:
        running: tuple[Value, ...] = ()
        for tile in self.tiles:
            self.builder.origin = self.head.product.origin
            self.parts[tile] = weight = self._slice(self.weight, tile, "tile_weight")
            self.logits[tile] = logits = self._product(tile, weight)
            self.builder.origin = self.head.loss.origin
            attrs = {"start": tile[0], "ignore_index": self.loss_attrs["ignore_index"]}
            running = (self.builder("cross_entropy_tile", logits, self.labels, *running, hint="running", **attrs),)
        return running[0]

    def _backward(self, gradient: Node, running: Value) -> dict[Value, Value]:
        head, builder = self.head, self.builder
        for tile in reversed(self.tiles):
            builder.origin = replace(head.product.origin, phase="backward")
            updated = self.states[0] is not self.weight
            weight = self._slice(self.states[0], tile, "tile_weight") if updated else self.parts[tile]
            logits = self.logits[tile] if tile == self.once else self._product(tile, weight)
            builder.origin = gradient.origin
            attrs = {**self.loss_attrs, "start": tile[0], "classes": head.classes}
            operands = (gradient.inputs[0], logits, self.labels, running)
            ct = builder("cross_entropy_grad_tile", *operands, hint="tile_gradient", **attrs)
            if head.input_gradient is not None:
                builder.origin = head.input_gradient.origin
                self.sums.add(head.input_gradient, builder("matmul", ct, weight, hint="gradient"))
            if head.bias_gradient is not None:
                builder.origin = head.bias_gradient.origin
                part = builder("reduce_sum", ct, axes=(0,))
                self.sums.insert(head.bias_gradient, part, tile[0], height=head.classes)
            if head.weight_gradient is not None:
                self._weight_gradient(head.weight_gradient, tile, ct)
        new = self.sums.results()
        if head.update is not None:
            new.update(zip(head.update.outputs, self.states, strict=True))
        return new

    def _weight_gradient(self, node: Node, tile: Tile, ct: Value) -> None:
        """Rows of the weight's gradient, some at a time: used for the update at once, or put in their place."""
        for start, stop in self.head.tiles:
            if not tile[0] <= start < tile[1]:
                continue
            self.builder.origin = node.origin
            columns = ct
            if (start, stop) != tile:
                first, behind = start - tile[0], stop - tile[0]
                columns = self.builder("slice", ct, axis=1, start=first, stop=behind, hint="tile_gradient")
            part = self.builder("matmul", columns, node.inputs[1], transpose_a=True, hint="tile_weight_gradient")
            if self.head.update is None:
                self.sums.insert(node, part, start, height=self.head.classes)
            else:
                self._update(self.head.update, part, start)

    def _update(self, node: Node, gradient: Value, start: int) -> None:
        """The rows of the weight and its slots from ``start`` on."""
        self.builder.origin = node.origin
        operands = (self.states[0], gradient, *self.states[1:], *node.inputs[1 + len(self.states) :])
        self.states = self.builder.multi(node.op, *operands, hint=node.op, **{**node.attrs, "start": start})
