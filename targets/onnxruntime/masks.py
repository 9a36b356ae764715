"""Bit masks and dropout. A mask is a boolean tensor here; bytes of eight bits are made where somebody insists."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pockc.ir import Node, Value
from pockc.targets.onnxruntime.elementwise import ELEMENT_TYPES, scaled
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, Permutation, in_order

_BITS = np.array([1, 2, 4, 8, 16, 32, 64, 128], np.int32)


class Bits(NamedTuple):
    """The booleans of a mask: a tensor that holds them in the shape of what was tested, in some order of its axes."""

    tensor: str
    shape: tuple[int, ...]  # of the value that was tested, in its own order
    order: Permutation


def keep_bits(e: Emitter, mask: Value, bits: Bits) -> None:
    """Let a mask be known by its booleans; its bytes are made by whoever reads those."""
    e.notes["bits", mask] = bits
    e.later[mask] = lambda: _packed(e, bits, mask.type.shape[0])


def bits_of(e: Emitter, mask: Value, like: Value) -> Bits:
    """The booleans of a mask, for a value of that shape."""
    bits = e.notes.get(("bits", mask))
    if bits is None:
        bits = e.notes["bits", mask] = _unpacked(e, e.read(mask), like)
    if bits.shape == like.type.shape:
        return Bits(*bits)
    flat = e.reshaped(_in_own_order(e, bits), like.type.shape)
    return Bits(flat, like.type.shape, tuple(range(len(like.type.shape))))


def _in_own_order(e: Emitter, bits: Bits) -> str:
    inverse = tuple(bits.order.index(axis) for axis in range(len(bits.order)))
    return e.transposed(bits.tensor, in_order(bits.shape, bits.order), inverse)


# Bit i lies in byte i // 8, least significant first; padding bits are zero.
def _packed(e: Emitter, bits: Bits, nbytes: int) -> str:
    elements = math.prod(bits.shape)
    numbers = e("Cast", e.reshaped(_in_own_order(e, bits), (elements,)), to=ELEMENT_TYPES["i32"])
    padded = e("Pad", numbers, e.ints(0, 8 * nbytes - elements))
    weighted = e("Mul", e.reshaped(padded, (nbytes, 8)), e.constant(_BITS, np.int32))
    return e("Cast", e("ReduceSum", weighted, e.ints(1), keepdims=0), to=ELEMENT_TYPES["u8"])


def _unpacked(e: Emitter, packed: str, like: Value) -> Bits:
    nbytes, shape = -(-like.type.elements // 8), like.type.shape
    columns = e.reshaped(e("Cast", packed, to=ELEMENT_TYPES["i32"]), (nbytes, 1))
    bits = e("Mod", e("Div", columns, e.constant(_BITS, np.int32)), e.constant(2, np.int32))
    flat = e("Slice", e.reshaped(bits, (8 * nbytes,)), e.ints(0), e.ints(like.type.elements), e.ints(0))
    booleans = e("Cast", e.reshaped(flat, shape), to=ELEMENT_TYPES["bool"])
    return Bits(booleans, shape, tuple(range(len(shape))))


def _range_mask(e: Emitter, node: Node) -> None:
    (x,), (mask,) = node.inputs, node.outputs
    low, high, inclusive = (node.attrs[name] for name in ("low", "high", "inclusive"))
    order = e.order(x)
    tensor = e.read(x, order)
    tests = []
    if low != -math.inf:
        tests.append(e("GreaterOrEqual" if inclusive else "Greater", tensor, e.constant(low)))
    if high != math.inf:
        tests.append(e("LessOrEqual" if inclusive else "Less", tensor, e.constant(high)))
    if not tests:
        tests.append(e("Equal", tensor, tensor))
    inside = tests[0] if len(tests) == 1 else e("And", *tests)
    keep_bits(e, mask, Bits(inside, x.type.shape, order))


def _apply_mask(e: Emitter, node: Node) -> None:
    x, mask = node.inputs
    bits = bits_of(e, mask, x)
    tensor, scale = e.read(x, bits.order), node.attrs["scale"]
    kept = tensor if scale == 1 else scaled(e, tensor, scale)
    e.write(node.outputs[0], e("Where", bits.tensor, kept, e.constant(0.0)), bits.order)


OPS: dict[str, Lowering] = {"range_mask": _range_mask, "apply_mask": _apply_mask}
