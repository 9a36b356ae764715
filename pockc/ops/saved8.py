"""Activations that wait for the backward pass in one byte per element: `pack8` and `unpack8`.

Elements are quantised in blocks (GACT: Liu et al. 2022, arXiv 2206.11357, keeps fewer bits in the same way). With s the
largest size in a block of `BLOCK` elements divided by 127, x becomes the code round(x / s) + 128, and comes back as
(code - 128) s: off by at most s / 2, 1/254 of the block's largest element. The scale is exact for the batch at hand, so
that nothing has to be calibrated.

Blocks do not cross samples: row i of the packed tensor, all f32 scales and then all codes, filled up to whole words,
depends on x[i] alone. Only gradients read what is unpacked, so that the loss of a step is that of its parameters; the
gradient is that of a slightly different activation.
"""

from __future__ import annotations

from math import prod

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import Sample, define
from pockc.ops.common import f32, require, require_dtype, require_type
from pockc.ops.quantized import to_codes

BLOCK = 128
ZERO = 128  # the code of 0
LARGEST = 127


def packed_type(shape: tuple[int, ...]) -> TensorType:
    """The type of the packed form of f32 numbers of that shape, which has at least two axes."""
    elements = prod(shape[1:])
    return TensorType((shape[0], 4 * _blocks(elements) + -(-elements // 4) * 4), "u8")


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def _require_rows(shape: tuple[int, ...]) -> None:
    require(len(shape) >= 2, f"what is packed must have at least two axes, not the shape {shape}")


def _pack8_rule(x: TensorType) -> TensorType:
    require_dtype("x", x, "f32")
    _require_rows(x.shape)
    return packed_type(x.shape)


def _pack8(x: Array) -> Array:
    rows = x.astype(np.float32).reshape(x.shape[0], -1)
    count, elements = rows.shape
    blocks = np.pad(rows, ((0, 0), (0, -elements % BLOCK))).reshape(count, -1, BLOCK)
    scale = np.abs(blocks).max(axis=2) / np.float32(LARGEST)
    steps = np.divide(blocks, scale[..., None], out=np.zeros_like(blocks), where=scale[..., None] != 0)
    codes = to_codes(steps + np.float32(ZERO), 0, 255).reshape(count, -1)[:, :elements]
    packed = np.zeros(packed_type(x.shape).shape, np.uint8)
    packed[:, : 4 * scale.shape[1]] = scale.astype("<f4").view(np.uint8)
    packed[:, 4 * scale.shape[1] :][:, :elements] = codes
    return packed


def _unpack8_rule(packed: TensorType, *, shape: tuple[int, ...]) -> TensorType:
    _require_rows(shape)
    require_type("the packed tensor", packed, packed_type(shape))
    return f32(*shape)


def _unpack8(packed: Array, *, shape: tuple[int, ...]) -> Array:
    elements = prod(shape[1:])
    scales = 4 * _blocks(elements)
    scale: Array = np.ascontiguousarray(packed[:, :scales]).view("<f4")
    codes = packed[:, scales : scales + elements].astype(np.float32) - np.float32(ZERO)
    numbers: Array = codes * np.repeat(scale, BLOCK, axis=1)[:, :elements]
    return numbers.reshape(shape)


def _packed(*shape: int) -> Array:
    """A packed tensor of seeded numbers."""
    return _pack8(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


_SPECIAL = np.array([[0.0, -0.0, 0.0, 0.0], [1.0, -254.0, 3.0, 127.0], [1e-45, 0.0, 0.0, 0.0]], np.float32)

define(
    "pack8",
    type_rule=_pack8_rule,
    reference=_pack8,
    samples=[
        Sample((f32(3, 300),)),
        Sample((f32(2, 3, 5, 16),)),
        Sample((f32(4, 1),)),
        Sample((f32(1, 128),)),
        Sample((_SPECIAL,)),
    ],
)
define(
    "unpack8",
    type_rule=_unpack8_rule,
    reference=_unpack8,
    samples=[
        Sample((_packed(3, 300),), {"shape": (3, 300)}, tolerance=0.0),
        Sample((_packed(2, 3, 5, 16),), {"shape": (2, 3, 5, 16)}, tolerance=0.0),
        Sample((_packed(4, 1),), {"shape": (4, 1)}, tolerance=0.0),
    ],
)
