"""Identities disappear, and what remains computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Builder, Graph, Origin, TensorType, Value, op_counts
from pockc.optim import SGD
from pockc.passes import canonicalize
from pockc.recipe import Recipe
from pockc.verify import verify

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))
Body = Callable[[Builder, Value], Value]


def graph_of(body: Body, *shape: int) -> Graph:
    builder = Builder()
    return builder.build({"y": body(builder, builder.input("x", TensorType(shape)))})


def simplified(body: Body, *shape: int) -> Graph:
    """The canonical graph, after checking that it computes what the given one does."""
    before = graph_of(body, *shape)
    after = canonicalize.run(before, RECIPE)
    verify(after, "imported")
    x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    np.testing.assert_allclose(evaluate(after, x)[0]["y"], evaluate(before, x)[0]["y"], rtol=1e-6, atol=1e-6)
    assert after.outputs["y"].type == before.outputs["y"].type
    return after


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


IDENTITIES: dict[str, Body] = {
    "reshape to the same shape": lambda b, x: b("reshape", x, shape=(1, 4, 6)),
    "reshape there and back": lambda b, x: b("reshape", b("reshape", x, shape=(24,)), shape=(1, 4, 6)),
    "transpose by the identity": lambda b, x: b("transpose", x, permutation=(0, 1, 2)),
    "transpose there and back": lambda b, x: b(
        "transpose", b("transpose", x, permutation=(2, 0, 1)), permutation=(1, 2, 0)
    ),
    "expand to the same shape": lambda b, x: b("expand", x, shape=(1, 4, 6)),
    "slice of everything": lambda b, x: b("slice", x, axis=1, start=0, stop=4),
    "pad by nothing": lambda b, x: b("pad", x, before=(0, 0, 0), after=(0, 0, 0), value=3.0),
    "cast to its own dtype": lambda b, x: b("cast", x, dtype="f32"),
    "concat of one": lambda b, x: b("concat", x, axis=1),
    "sum over an axis of one": lambda b, x: b("reduce_sum", x, axes=(0,), keepdims=True),
    "mean over an axis of one": lambda b, x: b("reshape", b("reduce_mean", x, axes=(0,)), shape=(1, 4, 6)),
    "times one": lambda b, x: b("mul", b.constant(1.0), x),
    "times a vector of ones": lambda b, x: b("mul", x, b.constant(np.ones(6))),
    "divided by one": lambda b, x: b("div", x, b.constant(1.0)),
    "plus zero": lambda b, x: b("add", b.constant(0.0), x),
    "minus zero": lambda b, x: b("sub", x, b.constant(0.0)),
    "first power": lambda b, x: b("pow_scalar", x, exponent=1.0),
    "negated twice": lambda b, x: b("neg", b("neg", x)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_is_removed(name: str) -> None:
    after = simplified(IDENTITIES[name], 1, 4, 6)
    assert ops(after) == []
    assert after.outputs["y"] is after.inputs[0]


KEPT: dict[str, Body] = {
    "part of a slice": lambda b, x: b("slice", x, axis=1, start=0, stop=3),
    "one plus x": lambda b, x: b("add", x, b.constant(1.0)),
    "zero minus x": lambda b, x: b("sub", b.constant(0.0), x),
    "one divided by x": lambda b, x: b("div", b.constant(1.0), x),
    "ones that broadcast x": lambda b, x: b("mul", x, b.constant(np.ones((3, 4, 6)))),
    "mixed numbers": lambda b, x: b("mul", x, b.constant(np.array([1, 1, 1, 1, 1, 2]))),
    "square": lambda b, x: b("pow_scalar", x, exponent=2.0),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_looks_like_an_identity_stays(name: str) -> None:
    assert len(ops(simplified(KEPT[name], 1, 4, 6))) == 1


def test_transposes_compose() -> None:
    after = simplified(
        lambda b, x: b("transpose", b("transpose", x, permutation=(0, 2, 1)), permutation=(1, 0, 2)), 2, 3, 4
    )
    assert [node.attrs["permutation"] for node in after.nodes] == [(2, 0, 1)]


def test_a_mask_takes_over_a_factor() -> None:
    def dropout(b: Builder, x: Value) -> Value:
        mask = b("range_mask", x, low=0.0, high=9.0)
        return b("mul", b("apply_mask", x, mask, scale=2.0), b.constant(0.25))

    after = simplified(dropout, 5)
    assert ops(after) == ["range_mask", "apply_mask"]
    assert after.nodes[1].attrs["scale"] == 0.5


def test_a_mask_that_is_read_elsewhere_keeps_its_scale() -> None:
    def body(b: Builder, x: Value) -> Value:
        masked = b("apply_mask", x, b("range_mask", x, low=0.0, high=9.0), scale=2.0)
        return b("add", masked, b("mul", masked, b.constant(0.25)))

    assert op_counts(simplified(body, 5).nodes) == {"range_mask": 1, "apply_mask": 1, "mul": 1, "add": 1}


@pytest.mark.parametrize("flag", [False, True])
def test_a_product_transposes_its_own_operands(flag: bool) -> None:
    def body(b: Builder, x: Value) -> Value:
        swapped = b("transpose", x, permutation=(0, 2, 1))
        return b("matmul", x, swapped, transpose_b=flag) if not flag else b("matmul", swapped, x, transpose_b=True)

    after = simplified(body, 2, 3, 3)
    assert ops(after) == ["matmul"]


def test_a_transpose_that_moves_the_batch_is_not_the_product_s() -> None:
    after = simplified(lambda b, x: b("matmul", x, b("transpose", x, permutation=(1, 0, 2))), 3, 3, 3)
    assert ops(after) == ["transpose", "matmul"]


def convolution(b: Builder, x: Value) -> Value:
    rng = np.random.default_rng(1)
    return b("conv2d", x, b.constant(rng.standard_normal((4, 3, 3, 2))), stride=(2, 2), padding=(1, 0, 0, 0))


def test_asymmetric_padding_becomes_the_convolution_s() -> None:
    after = simplified(lambda b, x: convolution(b, b("pad", x, before=(0, 0, 1, 0), after=(0, 1, 2, 0))), 1, 6, 6, 2)
    assert ops(after) == ["conv2d"]
    assert after.nodes[0].attrs["padding"] == (1, 1, 1, 2)


def test_padding_on_the_far_side_of_a_transpose_is_found() -> None:
    def body(b: Builder, x: Value) -> Value:
        padded = b("pad", x, before=(0, 0, 0, 1), after=(0, 0, 1, 2))
        return convolution(b, b("transpose", padded, permutation=(0, 2, 3, 1)))

    after = simplified(body, 1, 2, 6, 6)
    assert ops(after) == ["transpose", "conv2d"]
    assert after.nodes[1].attrs["padding"] == (1, 1, 1, 2)


@pytest.mark.parametrize(
    "pad",
    [
        {"before": (0, 1, 1, 0), "after": (0, 0, 0, 0), "value": 1.0},
        {"before": (1, 0, 0, 0), "after": (0, 1, 0, 0)},
        {"before": (0, 0, 0, 1), "after": (0, 1, 0, 0)},
    ],
)
def test_padding_that_is_not_zeros_around_the_image_stays(pad: dict[str, Any]) -> None:
    channels = 2 - sum(pad["before"][3:]) - sum(pad["after"][3:])
    assert ops(simplified(lambda b, x: convolution(b, b("pad", x, **pad)), 1, 6, 6, channels)) == ["pad", "conv2d"]


def test_rewritten_nodes_keep_the_origin_of_the_old_ones() -> None:
    origin = Origin("features.3", "model.py", 7)

    def body(b: Builder, x: Value) -> Value:
        b.origin = origin
        return convolution(b, b("pad", x, before=(0, 0, 1, 0), after=(0, 1, 2, 0)))

    assert [node.origin for node in simplified(body, 1, 6, 6, 2).nodes] == [origin]


def test_long_chains_take_linear_time() -> None:
    def chain(b: Builder, x: Value) -> Value:
        for i in range(5000):
            x = b("reshape", x, shape=(2, 3) if i % 2 else (6,))
        return b("exp", x)

    assert ops(simplified(chain, 2, 3)) == ["exp"]
