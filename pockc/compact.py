"""Frozen weights in fewer bytes: the layouts of runtime/FORMAT.md, encoded and decoded with numpy.

A compact tensor has at least two axes. A row holds all elements of one index of the first axis (an output channel of a
linear layer or convolution, an entry of an embedding table) and is a whole number of 4-byte words:

    bf16  the upper halves of the floats, rounded to nearest even
    q8    f32 scale, then an int8 code per element; element = code * scale
    q4    a bf16 scale per group of 32 elements, filled up to a word, then 16 bytes per group: byte j has the codes of
          elements j (low half) and j + 16 (high half); element = (code - 8) * scale. The last group is filled up.

What an element loses is at most 2^-8 of itself (bf16), 1/254 of the largest magnitude of its row (q8), or 13 % of that
of its group, mostly half of this (q4: codes reach from -8 to 7, so the scale has the sign that gives the largest
element the code -8; others of nearly that magnitude and the opposite sign lose up to a whole step).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

COMPACT_DTYPES = ("bf16", "q8", "q4")
GROUP = 32


def row_nbytes(dtype: str, columns: int) -> int:
    """Bytes of a row of that many elements."""
    groups = -(-columns // GROUP)
    match dtype:
        case "bf16":
            return _words(2 * columns)
        case "q8":
            return 4 + _words(columns)
        case "q4":
            return _words(2 * groups) + groups * (GROUP // 2)
    raise ValueError(f"{dtype} is not a compact dtype")


def compact_nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a whole tensor."""
    return shape[0] * row_nbytes(dtype, prod(shape[1:]))


def encode(array: Array, dtype: str) -> Bytes:
    """The rows of an f32 array of at least two axes as u8[rows, bytes of a row]."""
    rows = np.ascontiguousarray(array, np.float32).reshape(array.shape[0], -1)
    encoded = np.zeros((len(rows), row_nbytes(dtype, rows.shape[1])), np.uint8)
    {"bf16": _encode_bf16, "q8": _encode_q8, "q4": _encode_q4}[dtype](rows, encoded)
    return encoded


def decode(encoded: Bytes, shape: tuple[int, ...], dtype: str) -> Array:
    """The f32 array of that shape; the kernels decode the same bits."""
    columns = prod(shape[1:])
    raw = np.ascontiguousarray(encoded).reshape(shape[0], row_nbytes(dtype, columns))
    decoded: Array = {"bf16": _decode_bf16, "q8": _decode_q8, "q4": _decode_q4}[dtype](raw, columns)
    return decoded.reshape(shape)


def _words(nbytes: int) -> int:
    return -(-nbytes // 4) * 4


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """The upper halves of finite floats, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bf16(halves: Array) -> Array:
    """The floats whose upper halves these are."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _encode_bf16(rows: Array, encoded: Bytes) -> None:
    encoded[:, : 2 * rows.shape[1]] = to_bf16(rows).view(np.uint8)


def _decode_bf16(raw: Bytes, columns: int) -> Array:
    return from_bf16(np.ascontiguousarray(raw[:, : 2 * columns]).view("<u2"))


def _codes(x: Array, scale: Array, low: int, high: int) -> Array:
    """The nearest codes of x / scale, 0 where the scale is 0."""
    steps = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)
    return np.clip(np.rint(steps, out=steps), low, high, out=steps)


def quantized_rows(array: Array) -> tuple[Array, Array]:
    """A scale per index of the first axis, f32, and codes from -127 to 127 in the array's shape, int8."""
    rows = np.ascontiguousarray(array, np.float32).reshape(array.shape[0], -1)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    return scale[:, 0], _codes(rows, scale, -127, 127).astype(np.int8).reshape(array.shape)


def _encode_q8(rows: Array, encoded: Bytes) -> None:
    scale, codes = quantized_rows(rows)
    encoded[:, :4] = scale.astype("<f4")[:, None].view(np.uint8)
    encoded[:, 4 : 4 + rows.shape[1]] = codes.view(np.uint8)


def _decode_q8(raw: Bytes, columns: int) -> Array:
    scale: Array = np.ascontiguousarray(raw[:, :4]).view("<f4")
    return raw[:, 4 : 4 + columns].view(np.int8).astype(np.float32) * scale


def _encode_q4(rows: Array, encoded: Bytes) -> None:
    groups = -(-rows.shape[1] // GROUP)
    x = np.zeros((len(rows), groups * GROUP), np.float32)
    x[:, : rows.shape[1]] = rows
    x = x.reshape(len(rows), groups, GROUP)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    scale = from_bf16(to_bf16(largest / np.float32(-8)))
    encoded[:, : 2 * groups] = to_bf16(scale).reshape(len(rows), groups).view(np.uint8)
    codes = _codes(x, scale, -8, 7).astype(np.int8) + 8
    pairs = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
    encoded[:, _words(2 * groups) :] = pairs.astype(np.uint8).reshape(len(rows), -1)


def _decode_q4(raw: Bytes, columns: int) -> Array:
    groups = -(-columns // GROUP)
    scale = from_bf16(np.ascontiguousarray(raw[:, : 2 * groups]).view("<u2"))[..., None]
    pairs = raw[:, _words(2 * groups) :].reshape(len(raw), groups, GROUP // 2)
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=-1).astype(np.float32) - np.float32(8)
    return (codes * scale).reshape(len(raw), -1)[:, :columns]
