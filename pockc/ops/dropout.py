"""The random bits of dropout, from a counter-based generator: a function of seed, step and position alone."""

from __future__ import annotations

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import Sample, define
from pockc.ops.common import pack_bits, require, require_type
from pockc.ops.masks import mask_type

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
ROUNDS = 10


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10 (Salmon et al. 2011): 32-bit words ``[n, 4]``, held as u64, from counters ``[n, 4]``, held as u64.

    ``key`` is two 32-bit words.
    """
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = np.uint64(MULTIPLIERS[0]) * c0
        product1 = np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0 = (k0 + KEY_INCREMENTS[0]) & 0xFFFFFFFF
        k1 = (k1 + KEY_INCREMENTS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], 1)


def _dropout_mask_rule(
    seed: TensorType, step: TensorType, *, elements: int, probability: float, stream: int
) -> TensorType:
    require_type("seed", seed, TensorType((), "i64"))
    require_type("step", step, TensorType((), "i64"))
    require(elements > 0, f"there must be elements, not {elements}")
    require(0 <= probability < 1, f"the probability of dropping must lie in [0, 1), not {probability}")
    require(0 <= stream < 2**32, f"the stream must be a 32-bit number, not {stream}")
    return mask_type(elements)


def _dropout_mask(seed: Array, step: Array, *, elements: int, probability: float, stream: int) -> Array:
    blocks = np.arange((elements + 3) // 4, dtype=np.uint64)
    counter = np.empty((len(blocks), 4), np.uint64)
    counter[:, 0] = blocks & _LOW
    counter[:, 1] = blocks >> _HALF
    counter[:, 2] = stream
    counter[:, 3] = int(step) & 0xFFFFFFFF
    words = philox(counter, (int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF))
    keep = words.reshape(-1)[:elements] >= int(probability * 2**32)
    return pack_bits(keep)


define(
    "dropout_mask",
    type_rule=_dropout_mask_rule,
    reference=_dropout_mask,
    samples=[
        Sample((np.int64(seed), np.int64(step)), {"elements": elements, "probability": probability, "stream": stream})
        for seed, step, elements, probability, stream in (
            (0, 1, 64, 0.5, 0),
            (1234567890123456789, 7, 1001, 0.1, 3),
            (-5, 2**33 + 1, 13, 0.9, 2**32 - 1),
            (42, 1, 1, 0.0, 1),
        )
    ],
)
