"""Accuracy of the vectorised kernels' own transcendental functions, in units of the last place of the f32 result."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from pockc.ir import Array, TensorType
from tests.native import kernels

pytestmark = pytest.mark.native


def _gelu(x: Array) -> Array:
    y: Array = x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2
    return y


# Function, the interval that is sampled, and the bound that runtime/kernels/simd/math.h states.
FUNCTIONS: list[tuple[str, Callable[[Array], Array], float, float, float]] = [
    ("exp", np.exp, -103.0, 88.7, 1.0),
    ("log", np.log, 1e-30, 1e30, 1.0),
    ("log", np.log, 0.5, 2.0, 1.0),
    ("tanh", np.tanh, -10.0, 10.0, 2.0),
    ("erf", np.vectorize(math.erf), -5.0, 5.0, 2.0),
    ("gelu", _gelu, 0.0, 30.0, 2.0),
    ("gelu", _gelu, -1.0, 0.0, 3.0),
]


def apply(op: str, x: Array) -> Array:
    status, found = kernels.run(op, "simd", [x], [TensorType(x.shape)], {})
    assert status == kernels.OK
    return found[0]


@pytest.mark.parametrize(("op", "exact", "low", "high", "bound"), FUNCTIONS)
def test_error_is_within_the_stated_bound(
    op: str, exact: Callable[[Array], Array], low: float, high: float, bound: float
) -> None:
    generator = np.random.default_rng(0)
    near_zero = generator.standard_normal(50_000) * 0.3
    spread = np.concatenate([generator.uniform(low, high, 200_000), near_zero[(near_zero > low) & (near_zero < high)]])
    x = spread.astype(np.float32)
    expected = exact(x.astype(np.float64))
    distance = np.abs(apply(op, x) - expected) / np.spacing(np.abs(expected.astype(np.float32)))
    assert distance.max() <= bound, f"{distance.max():.2f} ulp at {x[distance.argmax()]!r}"


def test_gelu_of_negative_numbers_is_within_the_stated_distance() -> None:
    x = np.concatenate([np.linspace(-20.0, -1.0, 200_001), [-1e3, -1e20, -3e38]]).astype(np.float32)
    assert np.abs(apply("gelu", x) - _gelu(x.astype(np.float64))).max() <= 1e-7


def test_gelu_slope_is_within_the_stated_distance() -> None:
    x = np.concatenate([np.linspace(-20.0, 20.0, 400_001), [-3e38, -1e3, 1e3, 3e38]]).astype(np.float32)
    status, found = kernels.run("gelu_grad", "simd", [np.ones_like(x), x], [TensorType(x.shape)], {})
    assert status == kernels.OK
    exact = x.astype(np.float64)
    density = np.exp(-np.square(exact) / 2) / math.sqrt(2 * math.pi)
    cdf = np.vectorize(math.erfc)(-exact / math.sqrt(2)) / 2
    assert np.abs(found[0] - (cdf + exact * density)).max() <= 2e-7


@pytest.mark.parametrize(
    ("op", "values", "expected"),
    [
        ("exp", (0.0, -200.0, 200.0, -math.inf, math.inf), (1.0, 0.0, math.inf, 0.0, math.inf)),
        ("log", (1.0, 0.0, math.inf, -1.0), (0.0, -math.inf, math.inf, math.nan)),
        ("tanh", (0.0, -math.inf, math.inf, 50.0), (0.0, -1.0, 1.0, 1.0)),
        ("erf", (0.0, -math.inf, math.inf, 50.0), (0.0, -1.0, 1.0, 1.0)),
        ("gelu", (0.0, -3e38, math.inf, 50.0), (0.0, 0.0, math.inf, 50.0)),
    ],
)
def test_limits_and_nan_are_exact(op: str, values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    found = apply(op, np.array((*values, math.nan), np.float32))
    np.testing.assert_array_equal(found, np.array((*expected, math.nan), np.float32))
