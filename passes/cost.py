"""What a node costs in time, for passes that weigh memory against recomputation.

An estimate from shapes alone, the same on every machine: a compiled program must not depend on where it was built.
It ranks alternatives; it predicts no device.
"""

from __future__ import annotations

from collections.abc import Callable

from pockc.ir import Node, Value
from pockc.ops import OPS

# A core of a small board, to one digit. Only the ratios matter.
OPERATIONS_PER_SECOND = 20e9  # of products: a multiply-add is two
BYTES_PER_SECOND = 5e9  # of tensors that do not fit into a cache
CACHE_BYTES_PER_SECOND = 20e9  # of those that do
CALL_SECONDS = 2e-6  # to start a kernel

OPTIMIZERS = frozenset({"sgd", "momentum", "adam", "lion", "momentum8", "adam8", "lion8"})


def seconds(node: Node) -> float:
    """The estimated time of one node: the longer of its arithmetic and its memory traffic, and the call."""
    if OPS[node.op].view:
        return 0.0  # no kernel runs
    arithmetic = 2 * multiply_adds(node) / OPERATIONS_PER_SECOND
    return max(arithmetic, moved_bytes(node) / BYTES_PER_SECOND) + CALL_SECONDS


def multiply_adds(node: Node) -> int:
    """Multiply-adds of products and convolutions; 0 for everything else, which is bound by its memory traffic."""
    count = _PRODUCTS.get(node.op)
    return count(node) if count else 0


def moved_bytes(node: Node) -> int:
    """Bytes that the kernel reads and writes."""
    return sum(nbytes for _, nbytes in touched_bytes(node))


def touched_bytes(node: Node) -> list[tuple[Value, int]]:
    """Bytes that the kernel reads or writes of each operand and each result; what it only addresses is left out."""
    every = (*node.inputs, *node.outputs)
    if node.op in ("slice", "take", "embedding"):
        part = node.outputs[0].type.nbytes
        return [(node.inputs[0], part), (node.outputs[0], part)]
    if node.op == "insert":  # in place, as a rule
        part = node.inputs[1].type.nbytes
        return [(node.inputs[1], part), (node.outputs[0], part)]
    if node.op in OPTIMIZERS:  # of the parameter, read and written, only what the gradient covers
        part = node.inputs[1].type.nbytes
        new_slots = node.outputs[1:]
        slots = [(value, value.type.nbytes) for value in (*node.inputs[2 : 2 + len(new_slots)], *new_slots)]
        return [(node.inputs[0], part), (node.inputs[1], part), (node.outputs[0], part), *slots]
    return [(value, value.type.nbytes) for value in every]


def _matmul(node: Node) -> int:
    depth = node.inputs[0].type.shape[-2 if node.attrs["transpose_a"] else -1]
    return node.outputs[0].type.elements * depth


def _conv2d(node: Node) -> int:
    weight = node.inputs[1].type
    return node.outputs[0].type.elements * (weight.elements // weight.shape[0])


def _conv2d_int8(node: Node) -> int:
    weight = node.inputs[1].type
    return node.outputs[0].type.elements * (weight.elements // weight.shape[-1])


def winograd_tiles(node: Node) -> tuple[int, int]:
    """Of a `conv2d_winograd`: places of a tile, each of which is a matrix product over all tiles; and tiles."""
    batch, height, width, _ = node.outputs[0].type.shape
    size = node.attrs["outputs"]
    return (size + 2) ** 2, batch * -(-height // size) * -(-width // size)


def _conv2d_winograd(node: Node) -> int:
    places, tiles = winograd_tiles(node)
    return places * tiles * node.inputs[0].type.shape[3] * node.outputs[0].type.shape[3]


def _conv2d_grad_input(node: Node) -> int:
    ct, weight = (value.type for value in node.inputs[:2])
    return ct.elements * (weight.elements // weight.shape[0])


def _conv2d_grad_weight(node: Node) -> int:
    ct, weight = node.inputs[1].type, node.outputs[0].type
    return ct.elements * (weight.elements // weight.shape[0])


def _attention(node: Node) -> int:
    """Scores and their product with the values."""
    return _scores(node.inputs[0].type.shape, node.inputs[2].type.shape)


def _attention_grad(node: Node) -> int:
    """Scores again, then the gradients of scores, queries, keys and values."""
    return 5 * _scores(node.inputs[1].type.shape, node.inputs[3].type.shape) // 2


def _scores(queries: tuple[int, ...], values: tuple[int, ...]) -> int:
    batch, heads, rows, depth = queries
    return batch * heads * rows * values[2] * (depth + values[3])


_PRODUCTS: dict[str, Callable[[Node], int]] = {
    "matmul": _matmul,
    "conv2d": _conv2d,
    "conv2d_int8": _conv2d_int8,
    "conv2d_grad_input": _conv2d_grad_input,
    "conv2d_grad_input_masked": _conv2d_grad_input,
    "conv2d_grad_weight": _conv2d_grad_weight,
    "conv2d_winograd": _conv2d_winograd,
    "attention": _attention,
    "attention_grad": _attention_grad,
}
