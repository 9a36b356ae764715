"""Numbers in 16 bits, for activations and their gradients: f16 and b16, rounded and widened with numpy.

    f16  IEEE 754 binary16: 11 significant bits, magnitudes up to 65504, subnormal ones from 2^-24
    b16  bfloat16, the upper half of a float32: 8 significant bits, the range of float32

Rounding is to the nearest, ties to even: a number in the normal range moves by at most `UNIT_ROUNDOFF` of itself, 2^-11
(f16) or 2^-8 (b16). What is too large becomes infinite. Widening is exact, so that arithmetic on such numbers is
arithmetic of float32 on what they are, rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pockc.compact import from_bf16, to_bf16

Array = npt.NDArray[Any]

HALF_DTYPES = ("f16", "b16")
UNIT_ROUNDOFF: Mapping[str, float] = {"f16": 2.0**-11, "b16": 2.0**-8}


def is_half(dtype: str) -> bool:
    """Whether numbers of this dtype of the IR have 16 bits."""
    return dtype in HALF_DTYPES


def narrow(array: Array, dtype: str) -> Array:
    """Rounded to a 16-bit dtype, as it is stored: float16 for f16, the bits as uint16 for b16."""
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return np.asarray(array, np.float16)
    bits = np.ascontiguousarray(array, np.float32).reshape(np.shape(array))
    return np.where(np.isnan(bits), np.uint16(0x7FC0), to_bf16(bits))


def widen(stored: Array, dtype: str) -> Array:
    """The float32 numbers that `narrow` stored."""
    return stored.astype(np.float32) if dtype == "f16" else from_bf16(stored)
