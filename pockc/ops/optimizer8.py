"""Optimizer steps whose slots take one byte per element: `momentum8`, `adam8`, `lion8`, siblings of those in optimizer.

A slot is two operands: codes u8 in the shape of the gradient, and one f32 scale for each `BLOCK` codes in the order of
storage (block-wise quantisation: Dettmers et al. 2022, arXiv 2110.02861). With s the largest size in its block,

    momenta         m = s c |c| / 127^2         c = -127 .. 127, in two's complement
    second moments  sqrt(v) = s c^2 / 255^2     c = 0 .. 255

Both laws are squares. With a linear one, elements whose gradients are a hundredth of the block's largest would have a
momentum of 0 and, in Adam, a second moment of 0 under it, although Adam moves all elements by about the learning rate.
A square law is off by at most 1 / (127 sqrt(x)) of the value at the share x of the largest: 0.8% at the top, 8% at
1/100; its smallest level is 6e-5 of the largest, and 1.5e-5 for sqrt(v), which are squares of 1/127 and 1/255. It needs
no table and no logarithm, only the square root, which every machine rounds alike.

Codes round to nearest, but a positive v never becomes 0, since m / (sqrt(v) + eps) would explode. An update of a slot
that is smaller than half a level is lost: relative to the block's scale, which is exact and moves freely, m stays where
(1 - beta1) |g - m| is under about 1 / (127 sqrt(x)) of m, and sqrt(v) falls only with its block. That errs towards
small steps. The parameter itself moves by the new moments before they are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import Sample, define
from pockc.ops.common import f32, require, require_type
from pockc.ops.optimizer import RATE, STEP, adam_step, lion_step, momentum_step, require_update

BLOCK = 256


def blocks(shape: tuple[int, ...]) -> int:
    """How many scales the codes of that shape have."""
    return -(-prod(shape) // BLOCK)


def _require_update8(
    p: TensorType,
    g: TensorType,
    slots: Mapping[str, tuple[TensorType, TensorType]],
    indices: TensorType | None,
    axis: int,
) -> None:
    require_update(p, {"g": g}, indices, axis)
    for name, (codes, scale) in slots.items():
        require_type(name, codes, TensorType(g.shape, "u8"))
        require_type(f"{name}_scale", scale, f32(blocks(g.shape)))


def _by_block(x: Array) -> Array:
    """The elements as rows of one block each, filled up with zeros."""
    flat = x.reshape(-1)
    return np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)


def _levels(sizes: Array, most: int) -> tuple[Array, Array]:
    """The level, 0 to ``most``, of every size under the square law, and the scales; sizes by block."""
    scale = sizes.max(axis=1)
    share = sizes / np.where(scale > 0, scale, 1)[:, None]
    return np.floor(np.minimum(most * np.sqrt(share), most) + 0.5).astype(np.int32), scale


def _values(levels: Array, scale: Array, most: int, shape: tuple[int, ...]) -> Array:
    """What signed levels stand for."""
    rows = _by_block(levels.astype(scale.dtype))
    values: Array = scale[:, None] * (rows * np.abs(rows) / most**2)
    return values.reshape(-1)[: prod(shape)].reshape(shape)


def decode_momentum(codes: Array, scale: Array) -> Array:
    """The momenta that codes stand for."""
    return _values(codes.astype(np.int8), scale, 127, codes.shape)


def encode_momentum(m: Array) -> tuple[Array, Array]:
    """Codes and scales of momenta."""
    rows = _by_block(m)
    levels, scale = _levels(np.abs(rows), 127)
    codes = np.where(rows < 0, -levels, levels).astype(np.int8).view(np.uint8)
    return codes.reshape(-1)[: m.size].reshape(m.shape), scale


def decode_square(codes: Array, scale: Array) -> Array:
    """The second moments that codes stand for."""
    return np.asarray(_values(codes, scale, 255, codes.shape) ** 2)


def encode_square(v: Array) -> tuple[Array, Array]:
    """Codes and scales of second moments."""
    rows = _by_block(v)
    levels, scale = _levels(np.sqrt(rows), 255)
    codes = np.where(rows > 0, np.maximum(levels, 1), 0).astype(np.uint8)
    return codes.reshape(-1)[: v.size].reshape(v.shape), scale


def _samples(pairs: int, scalars: tuple[Any, ...], attrs: tuple[Mapping[str, Any], ...]) -> list[Sample]:
    """Whole and indexed updates, within one block and over several."""
    random = np.random.default_rng(0)

    def slots(shape: tuple[int, ...]) -> list[Any]:
        codes = (random.integers(0, 256, shape).astype(np.uint8) for _ in range(pairs))
        return [operand for code in codes for operand in (code, f32(blocks(shape)))]

    found = [Sample((f32(*s), f32(*s), *slots(s), *scalars), a, low=0.1) for a in attrs for s in ((5, 7), (), (9, 100))]
    for whole, part, chosen, axis in (
        ((5, 7), (2, 7), [3, 1], 0),
        ((2, 6, 70), (2, 3, 70), [0, 2, 5], 1),
        ((30, 40), (30, 20), list(range(0, 40, 2)), 1),
    ):
        operands = (f32(*whole), f32(*part), *slots(part), *scalars, np.array(chosen, np.int32))
        found.append(Sample(operands, {**attrs[-1], "axis": axis}, low=0.1))
    return found


# momentum8


def _momentum8_rule(
    p: TensorType,
    g: TensorType,
    m: TensorType,
    m_scale: TensorType,
    lr: TensorType,
    step: TensorType,
    indices: TensorType | None = None,
    *,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    axis: int = 0,
) -> tuple[TensorType, ...]:
    _require_update8(p, g, {"m": (m, m_scale)}, indices, axis)
    require_type("lr", lr, f32())
    require_type("step", step, STEP)
    require(not nesterov or (momentum > 0 and dampening == 0), "nesterov needs momentum above 0 and no dampening")
    return p, m, m_scale


def _momentum8(p: Array, g: Array, m: Array, m_scale: Array, *rest: Array, **attrs: Any) -> tuple[Array, ...]:
    p, moved = momentum_step(p, g, decode_momentum(m, m_scale), *rest, **attrs)
    return p, *encode_momentum(moved)


_MOMENTUM_ATTRS: tuple[Mapping[str, Any], ...] = (
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
)

define(
    "momentum8",
    type_rule=_momentum8_rule,
    reference=_momentum8,
    samples=[sample for step in (1, 3) for sample in _samples(1, (RATE, np.int64(step)), _MOMENTUM_ATTRS)],
    in_place=(0,),
)


# adam8


def _adam8_rule(
    p: TensorType,
    g: TensorType,
    m: TensorType,
    m_scale: TensorType,
    v: TensorType,
    v_scale: TensorType,
    lr: TensorType,
    step: TensorType,
    indices: TensorType | None = None,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    axis: int = 0,
) -> tuple[TensorType, ...]:
    _require_update8(p, g, {"m": (m, m_scale), "v": (v, v_scale)}, indices, axis)
    require_type("lr", lr, f32())
    require_type("step", step, STEP)
    require(0 <= beta1 < 1 and 0 <= beta2 < 1, f"the betas must lie in [0, 1), not {beta1} and {beta2}")
    return p, m, m_scale, v, v_scale


def _adam8(
    p: Array, g: Array, m: Array, m_scale: Array, v: Array, v_scale: Array, *rest: Array, **attrs: Any
) -> tuple[Array, ...]:
    p, mean, square = adam_step(p, g, decode_momentum(m, m_scale), decode_square(v, v_scale), *rest, **attrs)
    return p, *encode_momentum(mean), *encode_square(square)


_ADAM_ATTRS: tuple[Mapping[str, Any], ...] = (
    {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1, "decoupled": False},
    {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3, "weight_decay": 0.01},
)

define(
    "adam8",
    type_rule=_adam8_rule,
    reference=_adam8,
    samples=[sample for step in (1, 7) for sample in _samples(2, (RATE, np.int64(step)), _ADAM_ATTRS)],
    in_place=(0,),
)


# lion8


def _lion8_rule(
    p: TensorType,
    g: TensorType,
    m: TensorType,
    m_scale: TensorType,
    lr: TensorType,
    indices: TensorType | None = None,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
    axis: int = 0,
) -> tuple[TensorType, ...]:
    _require_update8(p, g, {"m": (m, m_scale)}, indices, axis)
    require_type("lr", lr, f32())
    require(0 <= beta1 < 1 and 0 <= beta2 < 1, f"the betas must lie in [0, 1), not {beta1} and {beta2}")
    return p, m, m_scale


def _lion8(p: Array, g: Array, m: Array, m_scale: Array, *rest: Array, **attrs: Any) -> tuple[Array, ...]:
    p, moved = lion_step(p, g, decode_momentum(m, m_scale), *rest, **attrs)
    return p, *encode_momentum(moved)


define(
    "lion8",
    type_rule=_lion8_rule,
    reference=_lion8,
    samples=_samples(1, (RATE,), ({"beta1": 0.9, "beta2": 0.99}, {"beta1": 0.95, "beta2": 0.98, "weight_decay": 0.1})),
    in_place=(0,),
)
