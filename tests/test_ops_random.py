"""Convolution, products, broadcasting and attention over random shapes, with gradients, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pockc.interp import evaluate
from pockc.ir import Builder, TensorType
from pockc.ops import OPS

sizes = st.integers(1, 4)


def check(op: str, shapes: Sequence[tuple[int, ...]], attrs: dict[str, Any], reference: Callable[..., Any]) -> None:
    """The op and the gradients of all operands, in double precision, equal those of the torch function."""
    random = np.random.default_rng(0)
    builder = Builder()
    values = [builder.input(f"x{i}", TensorType(shape)) for i, shape in enumerate(shapes)]
    y, *rest = builder.multi(op, *values, **attrs)
    ct = builder.input("ct", y.type)
    vjp = OPS[op].vjp
    assert vjp is not None
    need = frozenset(range(len(shapes)))
    gradients = vjp(builder, builder.nodes[-1], (ct, *(None for _ in rest)), need)
    graph = builder.build({"y": y, **{f"g{i}": g for i, g in enumerate(gradients) if g is not None}})
    arrays = {value.name: np.asarray(random.standard_normal(value.type.shape)) for value in graph.inputs}
    found, _ = evaluate(graph, arrays)

    leaves = [torch.from_numpy(arrays[f"x{i}"]).requires_grad_() for i in range(len(shapes))]
    expected = reference(*leaves)
    wanted = torch.autograd.grad(expected, leaves, torch.from_numpy(arrays["ct"]))
    np.testing.assert_allclose(found["y"], expected.detach().numpy(), rtol=1e-9, atol=1e-9)
    for i, gradient in enumerate(wanted):
        np.testing.assert_allclose(found[f"g{i}"], gradient.numpy(), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*(st.integers(0, 2) for _ in range(4))),
)
def test_convolution(
    batch: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    groups: int,
    channels: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> None:
    top, bottom, left, right = padding
    assume(size[0] + top + bottom > (kernel[0] - 1) * dilation[0])
    assume(size[1] + left + right > (kernel[1] - 1) * dilation[1])

    def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        image = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
        y = torch.nn.functional.conv2d(image, w.permute(0, 3, 1, 2), None, stride, 0, dilation, groups)
        return y.permute(0, 2, 3, 1)

    shapes = [(batch, *size, channels[0] * groups), (channels[1] * groups, *kernel, channels[0])]
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    check("conv2d", shapes, attrs, reference)


@st.composite
def broadcast_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast: axes of a common shape replaced by 1, or leading ones left out."""
    common = draw(st.lists(sizes, max_size=4))

    def variant() -> tuple[int, ...]:
        shape = [draw(st.sampled_from((1, size))) for size in common]
        return tuple(shape[draw(st.integers(0, len(shape))) :])

    return variant(), variant()


@settings(deadline=None, max_examples=60)
@given(shapes=broadcast_pairs(), op=st.sampled_from(("add", "sub", "mul", "maximum")))
def test_broadcasting(shapes: tuple[tuple[int, ...], tuple[int, ...]], op: str) -> None:
    check(op, shapes, {}, getattr(torch, op))


@settings(deadline=None, max_examples=60)
@given(
    batches=broadcast_pairs(), matrix=st.tuples(sizes, sizes, sizes), transposed=st.tuples(st.booleans(), st.booleans())
)
def test_matrix_product(
    batches: tuple[tuple[int, ...], tuple[int, ...]], matrix: tuple[int, int, int], transposed: tuple[bool, bool]
) -> None:
    rows, inner, columns = matrix
    transpose_a, transpose_b = transposed
    a = (*batches[0], *((inner, rows) if transpose_a else (rows, inner)))
    b = (*batches[1], *((columns, inner) if transpose_b else (inner, columns)))

    def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.mT if transpose_a else x, y.mT if transpose_b else y)

    check("matmul", [a, b], {"transpose_a": transpose_a, "transpose_b": transpose_b}, reference)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    queries=sizes,
    keys=sizes,
    features=st.tuples(sizes, sizes),
    causal=st.booleans(),
)
def test_attention(
    batch: int, groups: int, per_group: int, queries: int, keys: int, features: tuple[int, int], causal: bool
) -> None:
    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.7, enable_gqa=True)

    shapes = [
        (batch, groups * per_group, queries, features[0]),
        (batch, groups, keys, features[0]),
        (batch, groups, keys, features[1]),
    ]
    check("attention", shapes, {"scale": 0.7, "causal": causal}, reference)
