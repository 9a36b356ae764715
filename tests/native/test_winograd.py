"""Winograd's kernel against plain sums, PyTorch and itself: over sizes, blocks, epilogues and threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pockc.ir import Array, TensorType
from pockc.ops import OPS, infer, load_families
from pockc.targets.native.workspace import workspace_bytes
from tests.native import kernels

pytestmark = pytest.mark.native
load_families()

# x, output channels, padding (top, bottom, left, right). The last two have several blocks of tiles and of columns.
CASES: list[tuple[tuple[int, int, int, int], int, tuple[int, int, int, int]]] = [
    ((1, 3, 3, 1), 1, (0, 0, 0, 0)),
    ((2, 1, 9, 7), 33, (1, 1, 1, 1)),
    ((1, 13, 6, 24), 16, (2, 0, 1, 2)),
    ((3, 7, 7, 40), 50, (1, 1, 1, 1)),
    ((1, 29, 30, 100), 130, (1, 1, 1, 1)),
    ((2, 14, 14, 260), 97, (1, 1, 1, 1)),
]
EPILOGUES: list[dict[str, Any]] = [
    {},
    {"activation": "clip", "low": 0.0, "high": float("inf")},
    {"activation": "silu"},
    {"activation": "gelu_tanh"},
]


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(op: str, operands: list[Array], attrs: dict[str, Any], threads: int = 1, provider: str = "simd") -> Array:
    types = [TensorType(x.shape) for x in operands]
    outputs, complete = infer(op, types, attrs)
    size = workspace_bytes(op, types, outputs, complete, threads)
    status, (y,) = kernels.run(op, provider, operands, outputs, complete, threads=threads, workspace_bytes=size)
    assert status == kernels.OK
    return y


def pytorch(x: Array, w: Array, bias: Array | None, padding: tuple[int, ...]) -> Array:
    top, bottom, left, right = padding
    image = F.pad(torch.from_numpy(x).double().permute(0, 3, 1, 2), (left, right, top, bottom))
    weight = torch.from_numpy(w).double().permute(0, 3, 1, 2)
    y = F.conv2d(image, weight, None if bias is None else torch.from_numpy(bias).double())
    return np.asarray(y.permute(0, 2, 3, 1))


def relative(found: Array, exact: Array) -> float:
    """Root mean square of the error over that of the result."""
    return float(np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize(("shape", "filters", "padding"), CASES)
def test_it_is_the_convolution_and_the_same_bits_on_any_number_of_threads(
    shape: tuple[int, int, int, int], filters: int, padding: tuple[int, int, int, int], outputs: int
) -> None:
    x, w, bias = random(1, *shape), random(2, filters, 3, 3, shape[3]), random(3, filters)
    attrs = {"outputs": outputs, "padding": padding}

    y = run("conv2d_winograd", [x, w, bias], attrs)

    assert relative(y, pytorch(x, w, bias, padding)) < 3e-6
    for threads in (2, 3, 4):
        assert run("conv2d_winograd", [x, w, bias], attrs, threads).tobytes() == y.tobytes()


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize(("shape", "filters", "padding"), CASES)
def test_transposed_it_is_the_input_gradient(
    shape: tuple[int, int, int, int], filters: int, padding: tuple[int, int, int, int], outputs: int
) -> None:
    w = random(2, filters, 3, 3, shape[3])
    y = pytorch(np.zeros(shape, np.float32), w, None, padding)
    ct = random(4, *y.shape)
    direct = run("conv2d_grad_input", [ct, w], {"size": shape[1:3], "padding": padding}, provider="ref")
    reverse = {"outputs": outputs, "padding": tuple(2 - side for side in padding), "transposed": True}

    found = run("conv2d_winograd", [ct, w], reverse)

    assert relative(found, direct) < 3e-6
    assert run("conv2d_winograd", [ct, w], reverse, threads=3).tobytes() == found.tobytes()


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_are_those_of_conv2d(epilogue: dict[str, Any], outputs: int) -> None:
    x, w, bias = random(1, 2, 9, 11, 20), random(2, 37, 3, 3, 20) / 10, random(3, 37)
    padding = (1, 1, 1, 1)
    for operands in ([x, w], [x, w, bias]):
        plain = run("conv2d", operands, {"padding": padding, **epilogue})
        found = run("conv2d_winograd", operands, {"outputs": outputs, "padding": padding, **epilogue})
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)


# What winograd.h says of the error; with the points 1, -1, 2, -2 tiles of 4 would miss their bar.
@pytest.mark.parametrize(("outputs", "most"), [(2, 5e-7), (4, 1.5e-6)])
@pytest.mark.parametrize(("channels", "size"), [(64, 28), (256, 14)])
def test_error_is_what_is_said(channels: int, size: int, outputs: int, most: float) -> None:
    x = np.maximum(random(1, 1, size, size, channels), 0)
    w = random(2, channels, 3, 3, channels) / np.float32(np.sqrt(4.5 * channels))
    exact = pytorch(x, w, None, (1, 1, 1, 1))

    found = run("conv2d_winograd", [x, w], {"outputs": outputs, "padding": (1, 1, 1, 1)})

    assert relative(found, exact) < most


@pytest.mark.parametrize(
    ("changed", "x", "w", "y"),
    [
        ({"outputs": 3}, (1, 6, 6, 4), (5, 3, 3, 4), (1, 4, 4, 5)),
        ({"outputs": 5}, (1, 6, 6, 4), (5, 3, 3, 4), (1, 4, 4, 5)),
        ({}, (1, 6, 6, 4), (5, 3, 3, 3), (1, 4, 4, 5)),
        ({}, (1, 6, 6, 4), (5, 3, 2, 4), (1, 4, 4, 5)),
        ({}, (1, 6, 6, 4), (5, 3, 3, 4), (1, 4, 5, 5)),
        ({"transposed": True}, (1, 6, 6, 4), (5, 3, 3, 4), (1, 4, 4, 5)),
    ],
)
def test_a_program_file_cannot_make_it_read_elsewhere(
    changed: dict[str, Any], x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...]
) -> None:
    given = kernels.flat("conv2d_winograd", {"outputs": 2, **changed})
    assert kernels.check("conv2d_winograd", [TensorType(x), TensorType(w)], [TensorType(y)], given) == kernels.BAD_FILE


def test_the_op_is_refused_for_other_tiles() -> None:
    with pytest.raises(ValueError, match="2 or 4 outputs"):
        OPS["conv2d_winograd"].type_rule(TensorType((1, 6, 6, 4)), TensorType((5, 3, 3, 4)), outputs=3)
