"""Kernels on compact frozen weights against the same op on the decoded weights; and compact operands out of place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pockc.compact import COMPACT_DTYPES, decode, encode
from pockc.ir import Array, TensorType, dtype_of
from pockc.ops import OPS, infer, load_families
from pockc.targets.native.workspace import workspace_bytes
from tests.native import kernels
from tests.native.test_instruction_sets import available_sets

pytestmark = pytest.mark.native
load_families()

WEIGHTED = {name: definition.weight for name, definition in OPS.items() if definition.weight is not None}
IDS = np.array([[1, 0, 4], [4, 4, 2]])
Shapes = Sequence[tuple[int, ...]]
# Operand shapes in order, the bias last; attributes. Sizes at and around vectors, groups of 32 and blocks of products.
CASES: list[tuple[str, Shapes, Mapping[str, Any]]] = [
    ("matmul", ((3, 4), (4, 5)), {}),
    ("matmul", ((3, 4), (5, 4)), {"transpose_b": True}),
    ("matmul", ((1, 7), (1, 7)), {"transpose_b": True}),
    ("matmul", ((3, 1), (6, 1)), {"transpose_b": True}),
    ("matmul", ((3, 5), (5, 1)), {}),
    ("matmul", ((4, 3), (4, 33)), {"transpose_a": True}),
    ("matmul", ((45, 20), (70, 45)), {"transpose_a": True, "transpose_b": True}),
    ("matmul", ((2, 9, 65), (31, 65)), {"transpose_b": True}),
    ("matmul", ((2, 3, 9, 33), (33, 47)), {}),
    ("matmul", ((2, 40, 9), (40, 50)), {"transpose_a": True}),
    ("matmul", ((20, 300), (410, 300)), {"transpose_b": True}),
    ("matmul", ((20, 300), (300, 410)), {}),
    ("matmul", ((50, 520), (520, 33)), {}),
    ("matmul", ((9, 40), (37, 40), (37,)), {"transpose_b": True, "activation": "gelu"}),
    ("matmul", ((9, 40), (40, 37), (37,)), {"activation": "clip", "low": -0.5, "high": 6.0}),
    ("conv2d", ((2, 5, 6, 3), (4, 3, 3, 3)), {}),
    ("conv2d", ((1, 6, 6, 40), (36, 1, 1, 40)), {}),
    ("conv2d", ((2, 7, 6, 35), (6, 3, 3, 35)), {"stride": (2, 2), "padding": (1, 1, 1, 1)}),
    ("conv2d", ((2, 5, 5, 12), (6, 3, 3, 6)), {"groups": 2, "padding": (1, 1, 1, 1)}),
    ("conv2d", ((2, 6, 6, 35), (35, 3, 3, 1)), {"groups": 35, "padding": (1, 1, 1, 1)}),
    ("conv2d", ((1, 9, 9, 18), (18, 7, 7, 1)), {"groups": 18, "stride": (2, 2), "padding": (3, 3, 3, 3)}),
    ("conv2d", ((1, 5, 5, 3), (6, 3, 3, 1)), {"groups": 3, "padding": (1, 0, 1, 0)}),
    ("conv2d", ((1, 8, 8, 20), (24, 3, 3, 20), (24,)), {"activation": "silu"}),
    ("conv2d", ((1, 6, 6, 24), (24, 3, 3, 1), (24,)), {"groups": 24, "activation": "clip", "low": 0.0, "high": 6.0}),
    ("conv2d_grad_input", ((2, 3, 4, 4), (4, 3, 3, 3)), {"size": (5, 6)}),
    ("conv2d_grad_input", ((1, 6, 6, 36), (36, 1, 1, 40)), {"size": (6, 6)}),
    ("conv2d_grad_input", ((2, 5, 5, 50), (50, 3, 3, 33)), {"size": (9, 9), "stride": (2, 2), "padding": (1, 1, 1, 1)}),
    ("conv2d_grad_input", ((2, 5, 5, 6), (6, 3, 3, 6)), {"size": (5, 5), "groups": 2, "padding": (1, 1, 1, 1)}),
    ("conv2d_grad_input", ((1, 4, 4, 64), (64, 2, 2, 32)), {"size": (8, 8), "stride": (2, 2)}),
    ("conv2d_grad_input", ((1, 7, 7, 24), (24, 3, 3, 1)), {"size": (9, 9), "groups": 24}),
    ("conv2d_grad_input_masked", ((1, 6, 6, 36), (36, 1, 1, 40), (1, 6, 6, 40)), {"size": (6, 6), "high": 1.0}),
    (
        "conv2d_grad_input_masked",
        ((1, 4, 4, 24), (24, 3, 3, 1), (1, 9, 9, 24)),
        {"size": (9, 9), "groups": 24, "stride": (2, 2), "low": -0.5, "high": 1.0, "inclusive": True},
    ),
    ("conv2d_winograd", ((2, 7, 6, 35), (6, 3, 3, 35), (6,)), {"outputs": 2, "padding": (1, 1, 1, 1)}),
    ("conv2d_winograd", ((1, 9, 9, 24), (40, 3, 3, 24), (40,)), {"outputs": 4, "activation": "silu"}),
    ("conv2d_winograd", ((2, 5, 5, 36), (36, 3, 3, 70)), {"outputs": 4, "padding": (1, 1, 1, 1), "transposed": True}),
    ("embedding", ((5, 3), IDS.shape), {}),
    ("embedding", ((5, 100), IDS.shape), {}),
    ("embedding", ((7, 1), IDS.shape), {"padding_index": 4}),
]
EACH = [(*case, dtype) for case in CASES for dtype in COMPACT_DTYPES]


def operands_of(op: str, shapes: Shapes) -> list[Array]:
    random = np.random.default_rng(0)
    arrays: list[Array] = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    return [arrays[0], IDS] if op == "embedding" else arrays


class Compact:
    """A call whose weight is compact, and the same with the decoded weight."""

    def __init__(self, op: str, shapes: Shapes, attrs: Mapping[str, Any], dtype: str) -> None:
        self.op, self.position = op, WEIGHTED[op]
        self.plain = operands_of(op, shapes)
        weight = self.plain[self.position]
        self.encoded = encode(weight, dtype)
        self.plain[self.position] = decode(self.encoded, weight.shape, dtype)
        self.types = [TensorType(tuple(x.shape), dtype_of(x)) for x in self.plain]
        self.types[self.position] = TensorType(weight.shape, dtype)
        self.outputs, self.attrs = infer(op, self.types, attrs)
        self.flat = kernels.flat(op, attrs)

    def run(self, provider: str, threads: int = 1, workspace: int = kernels.WORKSPACE_BYTES) -> tuple[int, Array]:
        blocks = [kernels.Block(type_.nbytes) for type_ in self.types]
        for i, (block, array) in enumerate(zip(blocks, self.plain, strict=True)):
            block.bytes[...] = (self.encoded if i == self.position else array).reshape(-1).view(np.uint8)
        result = kernels.Block(self.outputs[0].nbytes)
        result.bytes[...] = 0xFF  # NaN: an element that is not written shows
        types, outputs = self.types, self.outputs
        status = kernels.call(
            self.op, provider, types, outputs, *self.flat, (blocks, [result]), threads, workspace_bytes=workspace
        )
        return status, result.view(self.outputs[0]).copy()

    def run_decoded(self, provider: str) -> Array:
        status, (found,) = kernels.run(self.op, provider, self.plain, self.outputs, self.attrs)
        assert status == kernels.OK
        return found


def test_every_op_that_takes_compact_weights_has_a_case() -> None:
    assert set(WEIGHTED) == {op for op, _, _ in CASES}


@pytest.mark.parametrize(("op", "shapes", "attrs", "dtype"), EACH)
def test_kernels_agree_with_numpy_on_the_decoded_weight(
    op: str, shapes: Shapes, attrs: Mapping[str, Any], dtype: str
) -> None:
    case = Compact(op, shapes, attrs, dtype)
    expected = np.asarray(OPS[op].reference(*case.plain, **case.attrs))
    status, found = case.run("ref", workspace=0)
    assert status == kernels.OK
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(("op", "shapes", "attrs", "dtype"), [case for case in EACH if case[0] != "embedding"])
def test_vectorised_kernels_give_the_very_bits_of_the_decoded_weight_for_any_number_of_threads(
    op: str, shapes: Shapes, attrs: Mapping[str, Any], dtype: str
) -> None:
    case = Compact(op, shapes, attrs, dtype)
    for name in available_sets():
        status, found = case.run(f"simd-{name}")
        assert status == kernels.OK
        assert found.tobytes() == case.run_decoded(f"simd-{name}").tobytes()
    expected = case.run_decoded("simd")
    for threads in (1, 3):
        needed = workspace_bytes(op, case.types, case.outputs, case.attrs, threads)
        status, found = case.run("simd", threads, needed)
        assert status == kernels.OK
        assert found.tobytes() == expected.tobytes()
        assert needed == 0 or case.run("simd", threads, needed - 1)[0] == kernels.UNSUPPORTED


@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
@pytest.mark.parametrize("op", sorted(OPS))
def test_no_other_operand_may_be_compact(op: str, dtype: str) -> None:
    """A kernel that only moves bytes would not know how many there are."""
    for sample in OPS[op].samples:
        inputs = [x if isinstance(x, TensorType) else TensorType(x.shape, dtype_of(x)) for x in sample.inputs]
        outputs, attrs = infer(op, inputs, sample.attrs)
        flat = kernels.flat(op, attrs)
        assert kernels.check(op, inputs, outputs, flat) == kernels.OK
        for i, type_ in enumerate(inputs):
            changed = [*inputs[:i], TensorType(type_.shape, dtype), *inputs[i + 1 :]]
            is_weight = i == OPS[op].weight and (op != "matmul" or len(type_.shape) == 2)
            assert kernels.check(op, changed, outputs, flat) == (kernels.OK if is_weight else kernels.BAD_FILE)
        for i, type_ in enumerate(outputs):
            results = [*outputs[:i], TensorType(type_.shape, dtype), *outputs[i + 1 :]]
            assert kernels.check(op, inputs, results, flat) == kernels.BAD_FILE
        every = [TensorType(type_.shape, dtype) for type_ in inputs]
        same = [TensorType(type_.shape, dtype) for type_ in outputs]
        assert kernels.check(op, every, same, flat) == kernels.BAD_FILE
