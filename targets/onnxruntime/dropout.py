"""The random bits of dropout: Philox4x32-10, as pockc/ops/dropout.py has it, in 64-bit integers; the same bits.

ONNX Runtime multiplies signed integers and shifts unsigned ones, so products change sides: their bits are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pockc.ir import Node
from pockc.ops.dropout import KEY_INCREMENTS, MULTIPLIERS, ROUNDS
from pockc.targets.onnxruntime.emitter import Emitter, Lowering
from pockc.targets.onnxruntime.masks import Bits, keep_bits

_I64, _U64 = 7, 13  # TensorProto.DataType
_LOW = 0xFFFFFFFF


def _u64(e: Emitter, data: Any) -> str:
    return e.constant(np.asarray(data, np.uint64), np.uint64, "counter")


def _low(e: Emitter, tensor: str) -> str:
    return e("BitwiseAnd", tensor, _u64(e, _LOW))


def _high(e: Emitter, tensor: str) -> str:
    return e("BitShift", tensor, _u64(e, 32), direction="RIGHT")


def _xor(e: Emitter, *tensors: str) -> str:
    first, *rest = tensors
    for tensor in rest:
        first = e("BitwiseXor", first, tensor)
    return first


def _product(e: Emitter, tensor: str, multiplier: int) -> str:
    signed = e("Mul", e("Cast", tensor, to=_I64), e.constant(multiplier, np.int64))
    return e("Cast", signed, to=_U64)


def _key(e: Emitter, half: str, increment: int) -> list[str]:
    """A word of the key in each round."""
    signed = e("Cast", half, to=_I64)
    rounds = (e("Add", signed, e.constant(increment * i & _LOW, np.int64)) for i in range(ROUNDS))
    return [_low(e, e("Cast", word, to=_U64)) for word in rounds]


def _dropout_mask(e: Emitter, node: Node) -> None:
    (seed, step), (mask,) = node.inputs, node.outputs
    elements, probability, stream = (node.attrs[name] for name in ("elements", "probability", "stream"))
    blocks = np.arange(-(-elements // 4), dtype=np.uint64)
    seeds = e("Cast", e.read(seed), to=_U64)
    key0, key1 = _key(e, _low(e, seeds), KEY_INCREMENTS[0]), _key(e, _high(e, seeds), KEY_INCREMENTS[1])
    c0, c1 = _u64(e, blocks & np.uint64(_LOW)), _u64(e, blocks >> np.uint64(32))
    ones = _u64(e, np.full(len(blocks), stream, np.uint64))
    steps = e("Expand", _low(e, e("Cast", e.read(step), to=_U64)), e.ints(len(blocks)))
    c2, c3 = ones, steps
    for k0, k1 in zip(key0, key1, strict=True):
        product0, product1 = _product(e, c0, MULTIPLIERS[0]), _product(e, c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            _xor(e, _high(e, product1), c1, k0),
            _low(e, product1),
            _xor(e, _high(e, product0), c3, k1),
            _low(e, product0),
        )
    columns = (e.reshaped(word, (len(blocks), 1)) for word in (c0, c1, c2, c3))
    words = e("Cast", e.reshaped(e("Concat", *columns, axis=1), (4 * len(blocks),)), to=_I64)
    first = e("Slice", words, e.ints(0), e.ints(elements), e.ints(0))
    keep = e("GreaterOrEqual", first, e.constant(int(probability * 2**32), np.int64))
    keep_bits(e, mask, Bits(keep, (elements,), (0,)))


OPS: dict[str, Lowering] = {"dropout_mask": _dropout_mask}
