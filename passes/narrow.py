"""Computes only the rows that something reads: a slice moves in front of the nodes that make what it drops.

A classifier that looks at the first token alone makes most of the last layer of its encoder for nothing: queries, the
feed-forward half and the norms of all other tokens, and in training their gradients. Of that layer only keys and values
need every token:

    h = layer_norm(f(a) + a)       [N, L, D]             s = slice(a, 0:1)              [N, 1, D]
    s = slice(h, 0:1)              [N, 1, D]      ->     h = layer_norm(f(s) + s)       [N, 1, D]

One backward sweep finds which range of each value its readers need, one forward sweep makes the ranges. Rows are
computed as before, one by one, so that results differ by no more than the order of sums in kernels for fewer rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pockc.ir import Graph, Node, Value
from pockc.passes.rewrite import Rewriter
from pockc.passes.row_rules import BINARY, UNARY
from pockc.recipe import Recipe

HEAVY = frozenset({"matmul", "attention"})  # without one of them there is nothing to gain
EIGHT_BITS = frozenset({"quantize", "dequantize", "lookup_int8", "add_int8"})  # that later passes make
LEAST_SAVING = 2  # an axis becomes at least that many times shorter: else the sums of its gradient cost more


class Range(NamedTuple):
    """The part of a tensor that a `slice` with these attributes gives."""

    axis: int
    start: int
    stop: int
    step: int

    def along(self, axis: int) -> Range:
        """The same part along another axis."""
        return self._replace(axis=axis)

    @property
    def size(self) -> int:
        """How many positions it has."""
        return len(range(self.start, self.stop, self.step))


# By operand, the range that a node reads to make a range of its first result, or None for all of the operand; None
# where the node has to make all of its result.
Reads = tuple[Range | None, ...]
Rule = Callable[[Node, Range], Reads | None]


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Narrow every value of which all readers need one and the same short range along one axis.

    Pre:  a forward graph, canonical.
    Post: no matmul or attention makes rows that only a slice behind it drops, where all nodes between have a rule.
    """
    narrowed = _narrowed(graph)
    if not any(node.op in HEAVY and node.outputs[0] in narrowed for node in graph.nodes):
        return graph
    rewriter = Rewriter(graph)
    slices: dict[tuple[Value, Range], Value] = {}
    for node in graph.nodes:
        if node.op == "slice" and node.inputs[0] in narrowed:
            rewriter.replace(node.outputs[0], rewriter[node.inputs[0]])
            continue
        part = narrowed.get(node.outputs[0])
        reads = _reads(node, part) if part is not None else None
        if part is None or reads is None:
            rewriter.keep(node)
            continue
        rewriter.builder.origin = node.origin
        for value, read in zip(node.inputs, reads, strict=True):
            if read is not None and value not in narrowed and (value, read) not in slices:
                slices[value, read] = rewriter.builder("slice", rewriter[value], hint=value.name, **read._asdict())
        # What nothing narrows is sliced, or read whole.
        inputs = [
            slices[value, read] if read is not None and value not in narrowed else rewriter[value]
            for value, read in zip(node.inputs, reads, strict=True)
        ]
        results = rewriter.builder.multi(node.op, *inputs, hint=node.outputs[0].name, **_attributes(node, part))
        rewriter.replace(node.outputs[0], results[0])
    return rewriter.finish()


def _narrowed(graph: Graph) -> dict[Value, Range]:
    """The values of which no reader needs more than a range, that range, and only those whose node can make it."""
    needs: dict[Value, set[Range | None]] = {value: {None} for value in graph.results()}
    found: dict[Value, Range] = {}
    for node in reversed(graph.nodes):
        part = _wanted(node, needs)
        reads = _reads(node, part) if part is not None else None
        if part is not None and reads is not None:
            found[node.outputs[0]] = part
        if reads is None:
            reads = _slice_reads(node)
        for value, read in zip(node.inputs, reads, strict=True):
            needs.setdefault(value, set()).add(read)
    return found


def _wanted(node: Node, needs: Mapping[Value, set[Range | None]]) -> Range | None:
    """The one range that all readers of a node need, if there is one and nothing reads its further outputs."""
    first, *others = node.outputs
    if any(value in needs for value in others) or len(needs.get(first, ())) != 1:
        return None
    (part,) = needs[first]
    return part


def _slice_reads(node: Node) -> Reads:
    """What a node reads that makes its whole result: all of its operands, but for a slice that drops enough."""
    if node.op != "slice":
        return tuple(None for _ in node.inputs)
    part = Range(**node.attrs)
    size = node.inputs[0].type.shape[part.axis]
    return (part if part.size * LEAST_SAVING <= size else None,)


def _reads(node: Node, part: Range) -> Reads | None:
    rule = RULES.get(node.op)
    return rule(node, part) if rule is not None else None


def _attributes(node: Node, part: Range) -> Mapping[str, Any]:
    """Those of a node that makes a range of its result."""
    if node.op not in ("reshape", "expand"):
        return node.attrs
    shape = list(node.attrs["shape"])
    shape[part.axis] = part.size
    return {**node.attrs, "shape": tuple(shape)}


def _aligned(node: Node, part: Range) -> Reads:
    """Operands that broadcast: their axes are those of the result, counted from the last."""
    return tuple(_operand_range(value, len(node.outputs[0].type.shape), part) for value in node.inputs)


def _operand_range(value: Value, rank: int, part: Range) -> Range | None:
    axis = part.axis - (rank - len(value.type.shape))
    stretched = axis < 0 or value.type.shape[axis] == 1
    return None if stretched else part.along(axis)


def _row_norm(node: Node, part: Range) -> Reads | None:
    """What works along the last axis, with parameters of that size."""
    x, *parameters = node.inputs
    return None if part.axis == len(x.type.shape) - 1 else (part, *(None for _ in parameters))


def _transpose(node: Node, part: Range) -> Reads:
    return (part.along(node.attrs["permutation"][part.axis]),)


def _reshape(node: Node, part: Range) -> Reads | None:
    """An axis that stays: as many elements in front of a step along it, and as many steps."""
    old, new = node.inputs[0].type.shape, node.outputs[0].type.shape
    for axis, size in enumerate(old):
        if size == new[part.axis] and math.prod(old[:axis]) == math.prod(new[: part.axis]):
            return (part.along(axis),)
    return None


def _matmul(node: Node, part: Range) -> Reads | None:
    """The rows of the left matrix, or a leading axis of either operand. Columns would cut weights."""
    a, b, *bias = node.inputs
    rank = len(node.outputs[0].type.shape)
    if part.axis == rank - 1 or min(len(a.type.shape), len(b.type.shape)) < 2:
        return None
    if part.axis == rank - 2:
        rows = len(a.type.shape) - (1 if node.attrs["transpose_a"] else 2)
        return (part.along(rows), None, *(None for _ in bias))
    return (_operand_range(a, rank, part), _operand_range(b, rank, part), *(None for _ in bias))


def _attention(node: Node, part: Range) -> Reads | None:
    """Some of the queries. With a causal mask a query's row says which keys it sees, so that the first must stay."""
    moves = part.start != 0 or part.step != 1
    if part.axis != 2 or (node.attrs["causal"] and moves):
        return None
    mask = tuple(_operand_range(value, 4, part) for value in node.inputs[3:])
    return (part, None, None, *mask)


def _embedding(node: Node, part: Range) -> Reads | None:
    """Fewer indices; the table is read where they say."""
    indices = node.inputs[1]
    return (None, part) if part.axis < len(indices.type.shape) else None


RULES: Mapping[str, Rule] = {
    **dict.fromkeys((UNARY | BINARY | {"where", "expand"}) - EIGHT_BITS, _aligned),
    **dict.fromkeys(("layer_norm", "rms_norm", "softmax", "log_softmax"), _row_norm),
    "transpose": _transpose,
    "reshape": _reshape,
    "matmul": _matmul,
    "attention": _attention,
    "embedding": _embedding,
}
