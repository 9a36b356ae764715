from __future__ import annotations

import numpy as np
import pytest

from pockc.compact import decode
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType
from pockc.optim import SGD
from pockc.passes import quantize_frozen
from pockc.recipe import FrozenDtype, Recipe
from pockc.verify import verify


def random(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def recipe(frozen_dtype: FrozenDtype, *trained: str) -> Recipe:
    return Recipe(trained=dict.fromkeys(trained), optimizer=SGD(lr=0.1), frozen_dtype=frozen_dtype)


def linear(weight: Array, *, also_scaled: bool = False, kind: str = "parameter") -> Graph:
    """y = x w^T, and perhaps 2 w as another output."""
    b = Builder()
    x = b.input("x", TensorType((3, weight.shape[1])))
    w = b.constant(weight, hint="w") if kind == "constant" else b.state("w", "parameter", weight)
    outputs = {"y": b("matmul", x, w, transpose_b=True)}
    if also_scaled:
        outputs["scaled"] = b("mul", w, b.constant(2.0))
    return b.build(outputs)


def dtype_after(graph: Graph, frozen_dtype: FrozenDtype, *trained: str) -> str:
    after = quantize_frozen.run({"only": graph}, recipe(frozen_dtype, *trained))["only"]
    verify(after, "lowered")
    return after.state("w").type.dtype


@pytest.mark.parametrize(("frozen_dtype", "stored"), [("bf16", "bf16"), ("int8", "q8"), ("int4", "q4"), ("f32", "f32")])
@pytest.mark.parametrize("kind", ["parameter", "constant"])
def test_large_weights_are_stored_as_asked_and_everything_else_stays(
    kind: str, frozen_dtype: FrozenDtype, stored: str
) -> None:
    weight = random(40, 64)
    graph = linear(weight, kind=kind)
    after = quantize_frozen.run({"only": graph}, recipe(frozen_dtype))["only"]
    verify(after, "lowered")
    value = after.state("w")
    assert value.type == TensorType((40, 64), stored)
    assert str(after).replace(f": {stored}[40,64]", ": f32[40,64]") == str(graph)
    if stored != "f32":
        data = after.states[value].data
        assert data is not None
        x = random(3, 64)
        expected = x @ decode(data, (40, 64), stored).T
        np.testing.assert_allclose(evaluate(after, {"x": x})[0]["y"], expected, rtol=1e-5, atol=1e-5)


def test_float_storage_changes_no_graph() -> None:
    graph = linear(random(40, 64))
    assert quantize_frozen.run({"only": graph}, recipe("f32")) == {"only": graph}


def test_trained_small_and_otherwise_read_weights_stay_float() -> None:
    assert dtype_after(linear(random(40, 64)), "int8", "w") == "f32"
    assert dtype_after(linear(random(15, 64)), "int8") == "f32"
    assert dtype_after(linear(random(40, 64), also_scaled=True), "int8") == "f32"


def test_rows_too_short_to_gain_take_the_form_that_does() -> None:
    assert dtype_after(linear(random(512, 9)), "int4") == "q8"
    assert dtype_after(linear(random(512, 16)), "int4") == "q8"
    assert dtype_after(linear(random(512, 17)), "int4") == "q4"
    assert dtype_after(linear(random(2048, 1)), "int8") == "f32"
    assert dtype_after(linear(random(2048, 1)), "bf16") == "f32"


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38])
def test_weights_that_could_not_be_told_apart_from_infinite_ones_stay_float(number: float) -> None:
    weight = random(40, 64)
    weight[3, 5] = number
    assert dtype_after(linear(weight), "bf16") == "f32"


def test_entries_agree_on_a_parameter_and_share_its_bytes() -> None:
    weight = random(40, 64)
    entries = {"train_step": linear(weight), "infer": linear(weight)}
    after = quantize_frozen.run(entries, recipe("int8"))
    first, second = (graph.states[graph.state("w")].data for graph in after.values())
    assert first is not None and first is second

    disagreeing = {"train_step": linear(weight), "infer": linear(weight, also_scaled=True)}
    after = quantize_frozen.run(disagreeing, recipe("int8"))
    assert [graph.state("w").type.dtype for graph in after.values()] == ["f32", "f32"]


def test_constants_are_each_entrys_own() -> None:
    weight = random(40, 64)
    entries = {
        "train_step": linear(weight, kind="constant"),
        "infer": linear(weight, kind="constant", also_scaled=True),
    }
    after = quantize_frozen.run(entries, recipe("int8"))
    assert [graph.state("w").type.dtype for graph in after.values()] == ["q8", "f32"]
