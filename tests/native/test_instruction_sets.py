"""Every vectorised kernel for every instruction set that this machine runs: right, and the same bits with any of them.

Sets without fused multiply-add round differently; they are judged by tolerance alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from pockc.ir import Array, TensorType, dtype_of
from pockc.ops import OPS, Sample, infer, load_families
from pockc.ops.common import sample_operands
from tests.native import kernels

pytestmark = pytest.mark.native
load_families()
LISTED = (kernels.ROOT / "runtime" / "kernels" / "kernels.inc").read_text()
SIMD_OPS = re.findall(r"^POCKC_SIMD\((\w+)\)", LISTED, re.MULTILINE)
FUSED_SETS = ("avx512", "avx2", "neon")


@cache
def available_sets() -> tuple[str, ...]:
    one = np.ones(3, np.float32)
    statuses = {
        name: kernels.run("neg", f"simd-{name}", [one], [TensorType((3,))], {})[0] for name in (*FUSED_SETS, "baseline")
    }
    return tuple(name for name, status in statuses.items() if status == kernels.OK)


def run(op: str, name: str, operands: Sequence[Array], sample: Sample, threads: int) -> list[Array] | None:
    outputs, attrs = infer(op, tuple(TensorType(tuple(x.shape), dtype_of(x)) for x in operands), sample.attrs)
    status, found = kernels.run(op, f"simd-{name}", operands, outputs, attrs, threads=threads)
    if status == kernels.UNSUPPORTED:
        return None
    assert status == kernels.OK
    return found


def assert_close(found: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        if x.dtype != np.float32:
            np.testing.assert_array_equal(x, y)
            continue
        finite = np.abs(np.asarray(y)[np.isfinite(y)])
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1.0, finite.max(initial=0.0)))


def test_this_machine_runs_at_least_one_set() -> None:
    assert available_sets()


@pytest.mark.parametrize("op", SIMD_OPS)
def test_every_instruction_set_agrees_with_numpy_and_fused_ones_with_each_other(op: str) -> None:
    accepted = 0
    for sample in OPS[op].samples:
        operands = sample_operands(sample)
        _, attrs = infer(op, tuple(TensorType(tuple(x.shape), dtype_of(x)) for x in operands), sample.attrs)
        with np.errstate(all="ignore"):
            reference = OPS[op].reference(*operands, **attrs)
        expected = reference if isinstance(reference, tuple) else (reference,)
        bits: set[tuple[bytes, ...]] = set()
        for threads, name in enumerate(available_sets(), start=1):
            found = run(op, name, operands, sample, threads)
            if found is None:
                continue
            accepted += 1
            assert_close(found, expected, sample.tolerance)
            if name in FUSED_SETS:
                bits.add(tuple(x.tobytes() for x in found))
        assert len(bits) <= 1, f"{op} gives different bits on different instruction sets"
    assert accepted > 0


@pytest.mark.parametrize(
    ("op", "shapes", "attrs"),
    [
        ("matmul", ((130, 700), (700, 450)), {}),
        ("matmul", ((523, 411), (523, 150)), {"transpose_a": True}),
        ("matmul", ((130, 300), (450, 300)), {"transpose_b": True}),
        ("matmul", ((5, 700), (450, 700)), {"transpose_b": True}),
        ("conv2d", ((2, 20, 21, 40), (70, 3, 3, 40)), {"padding": (1, 1, 1, 1), "stride": (2, 1)}),
        ("conv2d", ((2, 19, 113, 3), (40, 3, 3, 3)), {"padding": (0, 1, 0, 1), "stride": (2, 2)}),
        ("conv2d", ((2, 26, 87, 3), (70, 7, 7, 3)), {"padding": (3, 3, 3, 3), "stride": (1, 2)}),
        ("conv2d_grad_weight", ((2, 20, 20, 40), (2, 20, 20, 70)), {"kernel": (3, 3), "padding": (1, 1, 1, 1)}),
        ("conv2d_grad_weight", ((2, 20, 20, 40), (2, 20, 20, 40)), {"kernel": (1, 1), "groups": 40}),
        ("conv2d_winograd", ((2, 20, 21, 40), (70, 3, 3, 40)), {"outputs": 2, "padding": (1, 1, 1, 1)}),
        ("conv2d_winograd", ((2, 20, 21, 70), (70, 3, 3, 40)), {"outputs": 4, "transposed": True}),
        ("reduce_sum", ((3000, 45),), {"axes": (0,)}),
        ("reduce_sum", ((3, 20000),), {"axes": (1,)}),
        ("attention", ((2, 3, 70, 24), (2, 3, 90, 24), (2, 3, 90, 40)), {"scale": 0.2}),
        ("attention", ((1, 4, 300, 24), (1, 2, 300, 24), (1, 2, 300, 40)), {"scale": 0.2, "causal": True}),
        (
            "attention_grad",
            ((1, 4, 300, 40), (1, 4, 300, 24), (1, 2, 300, 24), (1, 2, 300, 40), (1, 4, 300, 40), (1, 4, 300)),
            {"scale": 0.1, "causal": True},
        ),
    ],
)
def test_long_sums_have_the_same_bits_on_every_fused_set_and_thread_count(
    op: str, shapes: Sequence[tuple[int, ...]], attrs: dict[str, object]
) -> None:
    generator = np.random.default_rng(0)
    operands = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    sample = Sample(inputs=tuple(TensorType(shape) for shape in shapes), attrs=attrs)
    results = {
        (name, threads): run(op, name, operands, sample, threads)
        for name in available_sets()
        if name in FUSED_SETS
        for threads in (1, 2, 3)
    }
    assert all(found is not None for found in results.values())
    assert len({tuple(x.tobytes() for x in found) for found in results.values() if found is not None}) <= 1
