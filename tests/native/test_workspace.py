"""The planner's workspace figures against the kernels: exactly these bytes are enough, one byte less is not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pockc.ir import NUMPY_DTYPES, Array, TensorType, dtype_of
from pockc.ops import OPS, infer, load_families
from pockc.ops.common import sample_operands
from pockc.targets.native.workspace import workspace_bytes
from tests.native import kernels

load_families()
LISTED = (kernels.ROOT / "runtime" / "kernels" / "kernels.inc").read_text()
SIMD_OPS = re.findall(r"^POCKC_SIMD\((\w+)\)", LISTED, re.MULTILINE)

Shapes = Sequence[tuple[int, ...]]
# Beyond the ops' own samples: operand shapes and attributes at and around the kernels' block sizes.
LARGER: list[tuple[str, Shapes, Mapping[str, Any]]] = [
    ("matmul", ((5, 255), (255, 15)), {}),
    ("matmul", ((40, 256), (256, 400)), {}),
    ("matmul", ((300, 40), (300, 17)), {"transpose_a": True}),
    ("matmul", ((300, 500), (300, 40)), {"transpose_a": True}),
    ("matmul", ((2, 3, 20, 300), (2, 3, 31, 300)), {"transpose_b": True}),
    ("conv2d", ((2, 9, 9, 40), (400, 3, 3, 40)), {"padding": (1, 1, 1, 1)}),
    ("matmul", ((3, 40, 200), (3, 200, 100)), {}),
    ("matmul", ((300, 1024), (1024, 100)), {}),
    ("matmul", ((520, 40), (40, 200)), {}),
    ("conv2d", ((1, 4, 4, 576), (160, 1, 1, 576)), {}),
    ("conv2d", ((1, 14, 14, 96), (192, 1, 1, 96)), {}),
    ("conv2d", ((1, 15, 15, 32), (64, 1, 1, 32)), {"stride": (2, 2)}),
    ("conv2d", ((1, 9, 9, 24), (24, 5, 5, 1)), {"groups": 24}),
    ("conv2d", ((1, 9, 9, 24), (36, 3, 3, 2)), {"groups": 12}),
    ("conv2d_grad_input", ((2, 5, 5, 50), (50, 3, 3, 33)), {"size": (9, 9), "stride": (2, 2), "padding": (1, 1, 1, 1)}),
    ("conv2d_grad_input", ((1, 4, 4, 160), (160, 1, 1, 576)), {"size": (4, 4)}),
    ("conv2d_grad_input", ((1, 8, 8, 64), (64, 1, 1, 48)), {"size": (15, 15), "stride": (2, 2)}),
    ("conv2d_grad_input", ((2, 12, 8, 64), (64, 3, 5, 48)), {"size": (25, 16), "dilation": (1, 2), "stride": (2, 1)}),
    ("conv2d_grad_input", ((1, 7, 7, 24), (24, 3, 3, 1)), {"size": (9, 9), "groups": 24}),
    ("conv2d_grad_input_masked", ((1, 4, 4, 160), (160, 1, 1, 576), (1, 4, 4, 576)), {"size": (4, 4), "high": 1.0}),
    ("conv2d_grad_weight", ((2, 20, 20, 50), (2, 18, 18, 33)), {"kernel": (3, 3)}),
    ("conv2d_grad_weight", ((1, 9, 9, 50), (1, 9, 9, 390)), {"kernel": (1, 1)}),
    ("conv2d_grad_weight", ((1, 9, 9, 24), (1, 7, 7, 24)), {"kernel": (3, 3), "groups": 24}),
    ("conv2d_winograd", ((1, 3, 4, 5), (7, 3, 3, 5)), {"outputs": 2, "padding": (1, 1, 1, 1)}),
    ("conv2d_winograd", ((2, 30, 31, 40), (100, 3, 3, 40)), {"outputs": 4, "padding": (1, 1, 1, 1)}),
    ("conv2d_winograd", ((1, 20, 20, 300), (300, 3, 3, 200)), {"outputs": 2, "transposed": True}),
    ("conv2d_winograd", ((1, 4, 4, 1024), (50, 3, 3, 1024)), {"outputs": 4, "padding": (1, 1, 1, 1)}),
    ("layer_norm_grad_gamma", ((9, 100), (9, 100)), {"epsilon": 1e-5}),
    ("attention", ((1, 2, 70, 24), (1, 1, 70, 24), (1, 1, 70, 40)), {"scale": 0.2}),
    ("attention", ((1, 1, 20, 8), (1, 1, 5000, 8), (1, 1, 5000, 8)), {"scale": 0.2}),
    (
        "attention_grad",
        ((1, 2, 70, 40), (1, 2, 70, 24), (1, 1, 600, 24), (1, 1, 600, 40), (1, 2, 70, 40), (1, 2, 70)),
        {"scale": 0.2},
    ),
]


def assert_exact(op: str, operands: Sequence[Array], attrs: Mapping[str, Any], threads: int) -> bool:
    """False where the vectorised kernel leaves the call to the reference kernel."""
    inputs = tuple(TensorType(tuple(x.shape), dtype_of(x)) for x in operands)
    outputs, complete = infer(op, inputs, attrs)
    needed = workspace_bytes(op, inputs, outputs, complete, threads)

    def status(size: int) -> int:
        return kernels.run(op, "simd", operands, outputs, complete, threads=threads, workspace_bytes=size)[0]

    if status(kernels.WORKSPACE_BYTES) == kernels.UNSUPPORTED:
        return False
    assert needed % 64 == 0
    assert status(needed) == kernels.OK, f"{op} refuses the {needed} bytes that were planned for {threads} threads"
    if needed > 0:
        assert status(needed - 1) == kernels.UNSUPPORTED, f"{op} takes less than the {needed} planned bytes"
    return True


@pytest.mark.native
@pytest.mark.parametrize("op", SIMD_OPS)
def test_planned_workspace_is_what_the_kernel_asks_for(op: str) -> None:
    accepted = [
        assert_exact(op, sample_operands(sample), sample.attrs, threads)
        for sample in OPS[op].samples
        for threads in (1, 3)
    ]
    assert any(accepted)


SIZES = st.integers(0, 1400).map(lambda i: 1 + int(i * i / 1400))  # small ones more often
FORMS = st.sampled_from(["f32 f32 f32", "b16 f32 b16", "b16 f32 f32", "b16 b16 b16", "f16 f16 f16"])


@pytest.mark.native
@pytest.mark.parametrize("provider", ["simd", "half-b16"])
@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, SIZES, FORMS, st.booleans(), st.booleans(), st.integers(1, 3))
def test_products_of_any_shape_stay_within_it(
    provider: str, m: int, n: int, k: int, form: str, transpose_a: bool, transpose_b: bool, threads: int
) -> None:
    """`kernels.call` has the guard. Blocks of bfloat16 are deeper and narrower than the planner takes them to be."""
    left, right, result = form.split()
    assume(m * n * k <= 1 << 27)
    types = [
        TensorType((k, m) if transpose_a else (m, k), left),
        TensorType((n, k) if transpose_b else (k, n), right),
    ]
    results = (TensorType((m, n), result),)
    attrs = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    room = workspace_bytes("matmul", tuple(types), results, attrs, threads)
    operands = [np.zeros(type_.shape, NUMPY_DTYPES[type_.dtype]) for type_ in types]
    status, _ = kernels.run_typed("matmul", provider, operands, types, results, attrs, threads, room)
    assert status in ((kernels.OK,) if provider == "simd" else (kernels.OK, kernels.UNSUPPORTED, kernels.NOT_FOUND))


@pytest.mark.native
@pytest.mark.parametrize(("op", "shapes", "attrs"), LARGER)
def test_planned_workspace_is_exact_around_block_sizes(op: str, shapes: Shapes, attrs: Mapping[str, Any]) -> None:
    generator = np.random.default_rng(0)
    operands = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    for threads in (1, 2, 3, 4):
        assert assert_exact(op, operands, attrs, threads)


def test_ops_without_scratch_and_empty_operands_need_none() -> None:
    vector = TensorType((4,))
    assert workspace_bytes("add", (vector, vector), (vector,), {}, 2) == 0
    assert workspace_bytes("dropout_mask", (), (TensorType((8,), "u8"),), {}, 2) == 0
    empty = TensorType((0, 4))
    attrs = {"transpose_a": False, "transpose_b": False}
    assert workspace_bytes("matmul", (empty, TensorType((4, 4))), (empty,), attrs, 1) == 0


def test_a_thread_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        workspace_bytes("add", (), (), {}, 0)


def matmul_bytes(rows: int, columns: int, depth: int, threads: int = 1) -> int:
    types = TensorType((rows, depth)), TensorType((depth, columns))
    attrs = {"transpose_a": False, "transpose_b": False}
    return workspace_bytes("matmul", types, (TensorType((rows, columns)),), attrs, threads)


def test_scratch_does_not_grow_with_the_size_of_the_problem() -> None:
    assert matmul_bytes(8, 8, 8) <= 1 << 9
    assert matmul_bytes(10_000, 10_000, 10_000) == matmul_bytes(600, 600, 600) < 1 << 19


def test_a_product_of_few_rows_has_little_scratch_on_any_number_of_threads() -> None:
    block = 4 * 256 * 48
    assert matmul_bytes(16, 160, 576) == block
    assert matmul_bytes(16, 160, 576, threads=4) == 4 * block
    assert matmul_bytes(1, 1000, 160, threads=4) == 4 * 160 * 48  # too little work for more than one thread


@pytest.mark.parametrize("rows", [1, 60, 70, 196, 260, 1000, 5000])
@pytest.mark.parametrize("columns", [10, 300, 3000])
def test_a_program_planned_for_some_threads_runs_on_fewer(rows: int, columns: int) -> None:
    needed = [matmul_bytes(rows, columns, 300, threads) for threads in range(1, 9)]
    assert needed == sorted(needed)
