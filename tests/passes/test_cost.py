"""The time estimate of a node: counted by hand, and linear in what grows."""

from __future__ import annotations

from typing import Any

import pytest

from pockc.ir import Builder, Node, TensorType, Value
from pockc.passes.cost import BYTES_PER_SECOND, CALL_SECONDS, OPERATIONS_PER_SECOND, moved_bytes, multiply_adds, seconds


def node(op: str, *types: TensorType, **attrs: Any) -> Node:
    b = Builder()
    b.multi(op, *(Value(f"x{i}", type_) for i, type_ in enumerate(types)), **attrs)
    return b.nodes[0]


def f32(*shape: int) -> TensorType:
    return TensorType(shape)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (node("matmul", f32(3, 4), f32(4, 5)), 3 * 4 * 5),
        (node("matmul", f32(2, 4, 3), f32(5, 4), transpose_a=True, transpose_b=True), 2 * 3 * 4 * 5),
        (node("conv2d", f32(2, 8, 8, 4), f32(6, 3, 3, 4), padding=(1, 1, 1, 1)), 2 * 64 * 6 * 9 * 4),
        (node("conv2d", f32(2, 8, 8, 4), f32(4, 3, 3, 1), padding=(1, 1, 1, 1), groups=4), 2 * 64 * 4 * 9),
        (node("conv2d_grad_input", f32(2, 4, 4, 6), f32(6, 1, 1, 4), size=(4, 4)), 2 * 16 * 6 * 4),
        (node("conv2d_winograd", f32(2, 7, 8, 4), f32(6, 3, 3, 4), outputs=2), 2 * 3 * 3 * 16 * 4 * 6),
        (node("conv2d_winograd", f32(2, 7, 8, 6), f32(6, 3, 3, 4), outputs=4, transposed=True), 2 * 2 * 2 * 36 * 4 * 6),
        (node("conv2d_grad_weight", f32(2, 4, 4, 4), f32(2, 4, 4, 6), kernel=(1, 1)), 2 * 16 * 6 * 4),
        (node("attention", f32(1, 4, 5, 8), f32(1, 2, 7, 8), f32(1, 2, 7, 6), scale=1.0), 4 * 5 * 7 * (8 + 6)),
        (node("add", f32(3), f32(3)), 0),
    ],
)
def test_multiply_adds_are_those_of_the_sums(found: Node, expected: int) -> None:
    assert multiply_adds(found) == expected


def test_attention_and_its_gradient_are_two_products_and_five() -> None:
    q = f32(1, 4, 16, 8)
    forward = node("attention", q, q, q, scale=1.0)
    out, sums = (value.type for value in forward.outputs)
    backward = node("attention_grad", out, q, q, q, out, sums, scale=1.0)
    assert 2 * multiply_adds(backward) == 5 * multiply_adds(forward)


def test_only_touched_bytes_count() -> None:
    table, ids, indices = f32(1000, 4), TensorType((3,), "i64"), TensorType((2,), "i32")
    assert moved_bytes(node("add", f32(5, 4), f32(4))) == 4 * (20 + 4 + 20)
    assert moved_bytes(node("embedding", table, ids)) == 2 * 4 * 12
    assert moved_bytes(node("slice", table, axis=0, start=0, stop=3)) == 2 * 4 * 12
    assert moved_bytes(node("insert", table, f32(3, 4), axis=0, start=7)) == 2 * 4 * 12
    assert moved_bytes(node("sgd", table, f32(2, 4), f32(), indices)) == 3 * 4 * 8
    assert moved_bytes(node("lion", table, table, table, f32(), beta1=0.9, beta2=0.9)) == (3 + 2) * 4 * 4000


def test_the_slower_of_arithmetic_and_traffic_counts() -> None:
    product = node("matmul", f32(512, 512), f32(512, 512))
    vector = node("matmul", f32(1, 512), f32(512, 512))
    assert seconds(product) == pytest.approx(2 * 512**3 / OPERATIONS_PER_SECOND + CALL_SECONDS)
    assert seconds(vector) == pytest.approx(4 * (512 * 512 + 1024) / BYTES_PER_SECOND + CALL_SECONDS)
    assert seconds(node("reshape", f32(4, 4), shape=(16,))) == 0.0
