"""Kernels on 16-bit numbers against the numpy reference on what these are, rounded; and such operands out of place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pockc.halves import HALF_DTYPES, UNIT_ROUNDOFF, narrow, widen
from pockc.ir import Array, TensorType, dtype_of
from pockc.ops import OPS, complete_attributes, infer, load_families
from pockc.ops.common import f32, pack_bits
from pockc.ops.halves import MOVES, NARROWS, SUMS
from pockc.targets.native.workspace import workspace_bytes
from tests.native import kernels
from tests.native.test_instruction_sets import available_sets

pytestmark = pytest.mark.native
load_families()

Operands = Sequence[TensorType | Array]
BITS = pack_bits(np.random.default_rng(0).integers(0, 2, 3 * 37).astype(np.bool_))
CLIPPED = {"activation": "clip", "low": -0.5, "high": 6.0}
PADDED = {"stride": (2, 2), "padding": (1, 1, 1, 1)}
LABELS = np.array([5, 63, -100])  # in the tile, behind it, of a row that does not count
KNOWN = np.array([[2.5, 7, 1, -4, 2], [3.0, 20, 0, 9, 1], [2.0, 9, 0, 3, 0]], np.float32)  # of classes before a tile
# Operands, attributes, and which of the operands have 16 bits where not all that may. Sizes at and around vectors, the
# depth of a block of products, and the sums that wait to be rounded.
CASES: list[tuple[str, Operands, Mapping[str, Any], tuple[int, ...] | None]] = [
    ("matmul", (f32(3, 4), f32(4, 5)), {}, None),
    ("matmul", (f32(9, 40), f32(37, 40), f32(37)), {"transpose_b": True, "activation": "gelu"}, (0,)),
    ("matmul", (f32(9, 40), f32(40, 37), f32(37)), CLIPPED, (0,)),
    ("matmul", (f32(50, 530), f32(530, 33)), {}, (0,)),
    ("matmul", (f32(2, 9, 65), f32(2, 31, 65)), {"transpose_b": True}, None),
    ("matmul", (f32(2, 3, 40, 9), f32(2, 3, 40, 50)), {"transpose_a": True}, None),
    ("matmul", (f32(70, 45), f32(70, 20)), {"transpose_a": True}, None),
    ("matmul", (f32(70, 45), f32(70, 20)), {"transpose_a": True}, (1,)),
    ("matmul", (f32(64, 64), f32(64, 64)), {}, (0,)),  # threads get whole tiles of rows, more than their share
    ("matmul", (f32(700, 20), f32(20, 400)), {}, (0,)),
    ("conv2d", (f32(1, 6, 6, 40), f32(36, 1, 1, 40), f32(36)), {"activation": "silu"}, None),
    ("conv2d", (f32(2, 7, 6, 35), f32(6, 3, 3, 35)), PADDED, None),
    ("conv2d", (f32(2, 5, 5, 12), f32(6, 3, 3, 6)), {"groups": 2, "padding": (1, 1, 1, 1)}, None),
    ("conv2d", (f32(2, 9, 8, 35), f32(35, 3, 3, 1), f32(35)), {"groups": 35, **CLIPPED, **PADDED}, None),
    ("conv2d_grad_input", (f32(1, 6, 6, 36), f32(36, 1, 1, 40)), {"size": (6, 6)}, None),
    ("conv2d_grad_input", (f32(2, 4, 3, 6), f32(6, 3, 3, 35)), {"size": (7, 6), **PADDED}, None),
    ("conv2d_grad_input", (f32(2, 4, 4, 6), f32(6, 1, 1, 9)), {"size": (8, 8), "stride": (2, 2)}, None),
    ("conv2d_grad_input", (f32(2, 5, 4, 35), f32(35, 3, 3, 1)), {"size": (9, 8), "groups": 35, **PADDED}, None),
    ("conv2d_grad_weight", (f32(1, 6, 6, 40), f32(1, 6, 6, 36)), {"kernel": (1, 1)}, None),
    ("conv2d_grad_weight", (f32(2, 7, 6, 35), f32(2, 4, 3, 6)), {"kernel": (3, 3), **PADDED}, None),
    ("conv2d_grad_weight", (f32(2, 9, 8, 35), f32(2, 5, 4, 35)), {"kernel": (3, 3), "groups": 35, **PADDED}, None),
    *((op, (f32(3, 37),), {}, None) for op in ("neg", "abs", "exp", "reciprocal", "tanh", "erf", "sigmoid", "silu")),
    *((op, (f32(3, 37),), {}, None) for op in ("hardswish", "hardsigmoid", "gelu")),
    *((op, (np.linspace(0.1, 3, 111, dtype=np.float32),), {}, None) for op in ("sqrt", "rsqrt")),
    ("clip", (f32(3, 37),), {"low": -0.5, "high": 1.0}, None),
    *((f"{op}_grad", (f32(3, 37), f32(3, 37)), {}, None) for op in ("tanh", "sigmoid", "silu", "hardswish", "gelu")),
    *((op, (f32(3, 37), f32(3, 37)), {}, None) for op in ("add", "sub", "mul", "div", "maximum", "minimum")),
    ("add", (f32(3, 37), f32(37)), {}, (0,)),
    ("sub", (f32(37), f32(3, 37)), {}, None),
    ("mul", (f32(2, 5, 4, 19), f32(2, 1, 1, 19)), {}, None),
    ("mul", (f32(3, 37), f32()), {}, (0,)),
    ("range_mask", (f32(3, 37),), {"low": 0.0, "high": 1.0}, None),
    ("apply_mask", (f32(3, 37), BITS), {"scale": 1.25}, None),
    ("max_pool2d", (f32(2, 7, 6, 19),), {"kernel": (3, 3), **PADDED}, None),
    ("avg_pool2d", (f32(2, 7, 6, 19),), {"kernel": (3, 3), **PADDED}, None),
    ("reduce_sum", (f32(300, 37),), {"axes": (0,)}, None),
    ("reduce_mean", (f32(2, 7, 6, 19),), {"axes": (1, 2)}, None),
    ("reduce_sum", (f32(3, 37),), {"axes": (1,)}, None),
    ("layer_norm", (f32(3, 37), f32(37), f32(37)), {"epsilon": 1e-5}, None),
    ("rms_norm", (f32(3, 37), f32(37)), {"epsilon": 1e-5}, None),
    ("layer_norm_grad_input", (f32(3, 37), f32(3, 37), f32(37)), {"epsilon": 1e-5}, None),
    ("layer_norm_grad_gamma", (f32(9, 37), f32(9, 37)), {"epsilon": 1e-5}, None),
    ("rms_norm_grad_input", (f32(3, 37), f32(3, 37), f32(37)), {"epsilon": 1e-5}, None),
    ("rms_norm_grad_gamma", (f32(9, 37), f32(9, 37)), {"epsilon": 1e-5}, None),
    ("attention", (f32(2, 4, 5, 8), f32(2, 2, 7, 8), f32(2, 2, 7, 19)), {"scale": 0.3}, None),
    ("attention", (f32(1, 2, 70, 8), f32(1, 2, 70, 8), f32(1, 2, 70, 8)), {"scale": 0.3, "causal": True}, (0, 2)),
    ("attention", (f32(1, 2, 70, 8), f32(1, 2, 300, 8), f32(1, 2, 300, 8)), {"scale": 0.3}, None),
    ("attention_grad", (*(f32(1, 2, 9, 8),) * 5, f32(1, 2, 9)), {"scale": 0.3, "causal": True}, None),
    ("cross_entropy_tile", (f32(3, 37), LABELS), {"start": 3}, None),
    ("cross_entropy_tile", (f32(3, 37), LABELS, KNOWN), {"start": 3}, (0,)),
    ("cross_entropy_grad_tile", (f32(), f32(3, 37), LABELS, KNOWN), {"start": 3, "classes": 64}, None),
    ("transpose", (f32(2, 3, 5, 8),), {"permutation": (0, 2, 1, 3)}, None),
    ("transpose", (f32(5, 7),), {"permutation": (1, 0)}, None),
    ("slice", (f32(5, 7),), {"axis": 1, "start": 1, "stop": 6, "step": 2}, None),
    ("insert", (f32(5, 7), f32(5, 2)), {"axis": 1, "start": 3}, None),
    ("concat", (f32(5, 7), f32(5, 2)), {"axis": 1}, None),
    ("expand", (f32(5, 1),), {"shape": (5, 3)}, None),
    ("take", (f32(5, 7), np.array([4, 0], np.int32)), {"axis": 0}, None),
    ("copy", (f32(5, 7),), {}, None),
    ("reshape", (f32(5, 7),), {"shape": (7, 5)}, None),
]  # fmt: skip
EACH = [(*case, dtype) for case in CASES for dtype in HALF_DTYPES]
IDS = [f"{index}-{case[0]}-{dtype}" for index, case in enumerate(CASES) for dtype in HALF_DTYPES]


def prepared(
    op: str, operands: Operands, attrs: Mapping[str, Any], positions: tuple[int, ...] | None, dtype: str
) -> tuple[list[Array], list[TensorType], list[Array], list[TensorType], dict[str, Any]]:
    """Stored operands with their types, the same as floats, the types of results, complete attributes."""
    random = np.random.default_rng(len(op))
    arrays = [x if isinstance(x, np.ndarray) else random.uniform(-2, 2, x.shape).astype(np.float32) for x in operands]
    if positions is None:
        every = range(len(arrays)) if op in MOVES else NARROWS.get(op, SUMS.get(op, ()))
        positions = tuple(i for i in every if arrays[i].dtype == np.float32)
    stored = [narrow(x, dtype) if i in positions else x for i, x in enumerate(arrays)]
    types = [TensorType(x.shape, dtype if i in positions else dtype_of(x)) for i, x in enumerate(arrays)]
    exact = [widen(x, dtype) if i in positions else x for i, x in enumerate(stored)]
    complete = complete_attributes(op, attrs)
    results, _ = infer(op, types, complete)
    return stored, types, exact, list(results), complete


def expected(op: str, exact: list[Array], attrs: Mapping[str, Any]) -> list[Array]:
    found = OPS[op].reference(*exact, **attrs)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize(("op", "operands", "attrs", "positions", "dtype"), EACH, ids=IDS)
def test_kernels_round_what_the_reference_gives(
    op: str, operands: Operands, attrs: Mapping[str, Any], positions: tuple[int, ...] | None, dtype: str
) -> None:
    stored, types, exact, results, complete = prepared(op, operands, attrs, positions, dtype)
    wanted = expected(op, exact, complete)
    outputs: dict[tuple[str, int], list[Array]] = {}
    providers = [f"simd-{name}" for name in available_sets()] if op not in MOVES else ["ref"]
    for provider in providers:
        for threads in (1, 3):
            room = workspace_bytes(op, types, results, complete, threads)
            status, found = kernels.run_typed(op, provider, stored, types, results, complete, threads, room)
            assert status == kernels.OK, provider
            outputs[provider, threads] = found
            if room > 0:
                status, _ = kernels.run_typed(op, provider, stored, types, results, complete, threads, room - 64)
                assert status == kernels.UNSUPPORTED, "the planner reserves more than the kernel asks for"
            for got, type_, want in zip(found, results, wanted, strict=True):
                _compare(got, type_, want, dtype)
    for name in {provider for provider, _ in outputs}:
        for one, several in zip(outputs[name, 1], outputs[name, 3], strict=True):
            assert one.tobytes() == several.tobytes(), name


def _compare(got: Array, type_: TensorType, want: Array, dtype: str) -> None:
    if not type_.is_half:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        return
    # Two numbers of float32 that differ in their last bits may round to neighbours, 2 u apart.
    close = widen(got, dtype)
    bound = 2 * UNIT_ROUNDOFF[dtype] * np.abs(want) + 2e-5
    assert np.all(np.abs(close - want) <= bound)
    nearest, large = widen(narrow(want, dtype), dtype), np.abs(want) > 0.05
    assert np.mean(close[large] == nearest[large]) > 0.9  # as a rule it is the nearest itself


@pytest.mark.parametrize("op", ["softmax", "log", "rotary", "batch_norm", "sgd"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_other_ops_refuse_them(op: str, dtype: str) -> None:
    types = [TensorType(x.shape, "f32") for x in OPS[op].samples[0].inputs]
    attrs = complete_attributes(op, OPS[op].samples[0].attrs)
    results, _ = infer(op, types, attrs)
    halved = [TensorType(types[0].shape, dtype), *types[1:]]
    assert kernels.check(op, halved, results, kernels.flat(op, attrs)) == kernels.BAD_FILE


def test_sums_over_samples_are_never_rounded() -> None:
    types, attrs = [TensorType((1, 6, 6, 8), "b16")] * 2, complete_attributes("conv2d_grad_weight", {"kernel": (1, 1)})
    results, _ = infer("conv2d_grad_weight", types, attrs)
    assert results == (f32(8, 1, 1, 8),)
    rounded = [TensorType(results[0].shape, "b16")]
    assert (
        kernels.check("conv2d_grad_weight", types, rounded, kernels.flat("conv2d_grad_weight", attrs))
        == kernels.BAD_FILE
    )


def test_operands_of_two_such_dtypes_are_refused() -> None:
    types = [TensorType((3, 4), "b16"), TensorType((3, 4), "f16")]
    assert kernels.check("add", types, types[:1], ([], [])) == kernels.BAD_FILE


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_casts_round_to_nearest_even_and_widen_exactly(dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    stored = every.view(np.float16) if dtype == "f16" else every
    exact = widen(stored, dtype)
    half, full = TensorType(every.shape, dtype), f32(*every.shape)
    status, (floats,) = kernels.run_typed("cast", "ref", [stored], [half], [full], {"dtype": "f32"})
    assert status == kernels.OK
    np.testing.assert_array_equal(floats, exact)
    finite = exact[np.isfinite(exact)]
    between = np.sort(np.unique(finite))
    middles = (between[1:].astype(np.float64) + between[:-1]) / 2  # ties, but for where float32 cannot hold them
    above = np.nextafter(middles.astype(np.float32), np.float32(np.inf))
    special = [65519.9, 65520.0, 1e30, np.inf, -np.inf, np.nan]
    near: Array = np.concatenate([finite, middles, above, special]).astype(np.float32)
    with np.errstate(over="ignore"):
        wanted = narrow(near, dtype)
    status, (found,) = kernels.run_typed(
        "cast", "ref", [near], [f32(*near.shape)], [TensorType(near.shape, dtype)], {"dtype": dtype}
    )
    assert status == kernels.OK
    numbers = ~np.isnan(near)
    np.testing.assert_array_equal(np.isnan(widen(found, dtype)), ~numbers)
    assert found[numbers].tobytes() == wanted[numbers].tobytes()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_vectors_round_as_single_numbers_do(dtype: str) -> None:
    """A product with the matrix (1) leaves each number as it is, and rounds it: of all magnitudes, ties among them."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 14, dtype=np.uint64).astype(np.uint32)
    bits[::2] = bits[::2] & 0xFFFF_F000 | 0x1000 if dtype == "f16" else bits[::2] & 0xFFFF_0000 | 0x8000
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    sign = narrow(np.ones((1, 1), np.float32), dtype)
    types = [f32(len(numbers), 1), TensorType((1, 1), dtype)]
    results = [TensorType((len(numbers), 1), dtype)]
    attrs = complete_attributes("matmul", {})
    for name in available_sets():
        room = workspace_bytes("matmul", types, results, attrs, 1)
        operands = [numbers[:, None], sign]
        status, (found,) = kernels.run_typed("matmul", f"simd-{name}", operands, types, results, attrs, 1, room)
        assert status == kernels.OK
        assert found.tobytes() == narrow(numbers[:, None], dtype).tobytes(), name


def test_the_tables_of_runtime_and_compiler_are_the_same() -> None:
    listed = (kernels.ROOT / "runtime" / "kernels" / "halves.inc").read_text()
    for macro, table in (("NARROWS", NARROWS), ("SUMS", SUMS)):
        found = re.findall(rf"^POCKC_{macro}\((\w+), 0b([01]+)\)", listed, re.MULTILINE)
        assert {op: tuple(i for i, bit in enumerate(reversed(bits)) if bit == "1") for op, bits in found} == dict(table)
