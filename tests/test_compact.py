"""Frozen weights in fewer bytes: their encoding, and operations on them against the same on the decoded weights."""

from __future__ import annotations

import struct
from math import prod

import numpy as np
import pytest

from pockc.compact import COMPACT_DTYPES, compact_nbytes, decode, encode, row_nbytes
from pockc.ir import Array, TensorType

SHAPES = [(1, 1), (3, 1), (5, 33), (7, 9), (64, 64), (4, 3, 3, 5), (2, 31), (6, 257), (1, 1000)]


def weights(shape: tuple[int, ...], seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    rows = random.standard_normal(shape).astype(np.float32)
    magnitudes = 10.0 ** random.uniform(-4, 3, (shape[0], *[1] * (len(shape) - 1)))
    return (rows * magnitudes).astype(np.float32)


def largest_in_group(x: Array) -> Array:
    """Of each element, the largest magnitude among the 32 of its row that share a scale."""
    rows = np.abs(x).reshape(len(x), -1)
    starts = range(0, rows.shape[1], 32)
    groups = [np.broadcast_to(rows[:, i : i + 32].max(1, keepdims=True), rows[:, i : i + 32].shape) for i in starts]
    return np.concatenate(groups, axis=1).reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
def test_what_encoding_loses_is_bounded_and_its_size_is_what_the_type_says(dtype: str, shape: tuple[int, ...]) -> None:
    for seed in range(20):
        x = weights(shape, seed)
        encoded = encode(x, dtype)
        found = decode(encoded, shape, dtype)
        assert encoded.shape == (shape[0], row_nbytes(dtype, prod(shape[1:])))
        assert encoded.nbytes == compact_nbytes(shape, dtype) == TensorType(shape, dtype).nbytes
        assert encoded.shape[1] % 4 == 0
        row = np.abs(x).max(axis=tuple(range(1, x.ndim)), keepdims=True)
        bound = {"bf16": np.abs(x) / 256, "q8": row / 254, "q4": 0.13 * largest_in_group(x)}[dtype]
        assert (np.abs(found - x) <= bound * 1.0001).all()
        assert found.dtype == np.float32 and found.shape == shape


@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
def test_what_was_decoded_encodes_to_the_same_bytes(dtype: str) -> None:
    for shape in SHAPES:
        once = encode(weights(shape), dtype)
        np.testing.assert_array_equal(encode(decode(once, shape, dtype), dtype), once)


@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
def test_zeros_stay_zeros_and_tiny_and_large_numbers_finite(dtype: str) -> None:
    x = np.zeros((4, 40), np.float32)
    x[1], x[2, 7], x[3] = 1e-44, -1e-38, 1e38
    found = decode(encode(x, dtype), x.shape, dtype)
    assert np.isfinite(found).all() and not found[0].any()
    np.testing.assert_allclose(found[3], x[3], rtol=0.01)


def test_the_layouts_are_those_of_the_format() -> None:
    x = np.zeros((2, 34), np.float32)
    x[1, 0], x[1, 17], x[1, 33] = -8.0, 7.0, 16.0
    assert encode(x[:, :3], "bf16")[1].tobytes() == struct.pack("<HHHxx", 0xC100, 0, 0)
    q8 = encode(x[:, :3], "q8")[1].tobytes()
    assert q8 == struct.pack("<fbbbx", np.float32(8) / np.float32(127), -127, 0, 0)
    q4 = encode(x, "q4")[1].tobytes()
    first, second = bytearray([0x88] * 16), bytearray([0x88] * 16)
    first[0], first[1] = 0x80, 0xF8  # -8 in the low half of byte 0, 7 in the high half of byte 1
    second[1] = 0x80  # its scale is negative: 16 = -8 * -2
    assert q4 == struct.pack("<HH", 0x3F80, 0xC000) + bytes(first) + bytes(second)


def test_sizes_are_a_half_a_quarter_and_less_than_a_seventh() -> None:
    plain = TensorType((768, 768)).nbytes
    assert TensorType((768, 768), "bf16").nbytes * 2 == plain
    assert plain / TensorType((768, 768), "q8").nbytes == pytest.approx(4, abs=0.03)
    assert plain / TensorType((768, 768), "q4").nbytes == pytest.approx(32 / 4.5, abs=0.01)
