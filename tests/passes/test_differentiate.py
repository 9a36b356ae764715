"""Need-driven differentiation against full differentiation followed by dead-code elimination, and by numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from pockc.errors import UserError
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType, Value, op_counts
from pockc.optim import SGD
from pockc.passes import dce, differentiate
from pockc.recipe import Recipe


def recipe(*trained: str) -> Recipe:
    return Recipe(trained=dict.fromkeys(trained), optimizer=SGD(lr=0.1))


def residual_network(layers: int = 6, width: int = 5) -> Graph:
    """Linear layers with biases, ReLUs and skip connections (fan-out), and a squared mean as loss."""
    rng = np.random.default_rng(0)
    builder = Builder()
    hidden = builder.input("x", TensorType((3, width)))
    for layer in range(layers):
        weight = builder.state(f"w{layer}", "parameter", rng.standard_normal((width, width)).astype(np.float32))
        bias = builder.state(f"b{layer}", "parameter", rng.standard_normal(width).astype(np.float32))
        product = builder("matmul", hidden, weight, transpose_b=True)
        activated = builder("clip", builder("add", product, bias), low=0.0, high=float("inf"))
        hidden = activated if layer == 0 else builder("add", hidden, activated)
    loss = builder("reduce_mean", builder("mul", hidden, hidden), axes=(0, 1))
    return builder.build({"loss": loss})


PARAMETERS = [f"{kind}{layer}" for layer in range(6) for kind in "wb"]


def gradients(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    outputs, _ = evaluate(graph, inputs)
    return {name: value for name, value in outputs.items() if name.startswith(differentiate.PREFIX)}


@pytest.mark.parametrize("seed", range(40))
def test_a_random_scheme_needs_exactly_the_nodes_that_survive_elimination(seed: int) -> None:
    chosen = random.Random(seed).sample(PARAMETERS, random.Random(seed).randint(1, len(PARAMETERS)))
    forward = residual_network()
    driven = differentiate.run(forward, recipe(*chosen))
    full = differentiate.run(forward, recipe(*PARAMETERS))
    wanted = {f"{differentiate.PREFIX}{name}" for name in chosen}
    outputs = {name: value for name, value in full.outputs.items() if name == "loss" or name in wanted}
    oracle = dce.run(replace(full, outputs=outputs), recipe(*chosen))
    assert op_counts(driven.nodes) == op_counts(oracle.nodes)
    x = {"x": np.random.default_rng(seed).standard_normal((3, 5)).astype(np.float32)}
    expected = gradients(oracle, x)
    for name, value in gradients(driven, x).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=f"seed {seed}")


def test_gradients_of_shared_values_sum_over_their_uses() -> None:
    graph = differentiate.run(residual_network(), recipe("w0", "b3"))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    states = {v.name: s.data.astype(np.float64) for v, s in graph.states.items() if s.data is not None}
    outputs, _ = evaluate(graph, {"x": x.astype(np.float64)}, states)
    for name in ("w0", "b3"):
        direction = rng.standard_normal(states[name].shape)
        step = 1e-6

        def loss_at(offset: float, name: str = name, direction: Array = direction) -> float:
            moved = {**states, name: states[name] + offset * direction}
            return float(evaluate(graph, {"x": x.astype(np.float64)}, moved)[0]["loss"])

        numeric = (loss_at(step) - loss_at(-step)) / (2 * step)
        analytic = float((outputs[differentiate.PREFIX + name] * direction).sum())
        assert numeric == pytest.approx(analytic, rel=1e-5)


def test_training_biases_alone_keeps_no_matmul_input() -> None:
    graph = differentiate.run(residual_network(), recipe(*[f"b{i}" for i in range(6)]))
    made_forward = {v for node in graph.nodes if node.origin.phase == "forward" for v in node.outputs}
    saved = {
        v
        for node in graph.nodes
        if node.origin.phase == "backward" and node.op != "range_mask"
        for v in node.inputs
        if v in made_forward
    }
    hidden = [v for v in saved if v.type.shape == (3, 5)]
    assert len(hidden) == 1, "only the loss's own operand is read again"


def test_a_trained_parameter_behind_an_integer_op_is_an_error_with_a_way_out() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((4,)))
    weight = builder.state("w", "parameter", np.ones(4, np.float32))
    compared = builder("greater", builder("mul", x, weight), builder.constant(0.0))
    loss = builder("reduce_sum", builder("cast", compared, dtype="f32"), axes=(0,))
    with pytest.raises(UserError, match="no trained parameter reaches the loss"):
        differentiate.run(builder.build({"loss": loss}), recipe("w"))


def test_accumulation_scales_the_gradient() -> None:
    forward = residual_network(layers=2)
    x = {"x": np.ones((3, 5), np.float32)}
    once = gradients(differentiate.run(forward, recipe("w0")), x)
    quarter = gradients(differentiate.run(forward, replace(recipe("w0"), accumulation=4)), x)
    for name, value in once.items():
        np.testing.assert_allclose(quarter[name], value / 4, rtol=1e-6)


def test_a_value_without_a_path_to_the_loss_gets_no_gradient() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((2,)))
    used: Value = builder.state("used", "parameter", np.ones(2, np.float32))
    builder.state("unused", "parameter", np.ones(2, np.float32))
    loss = builder("reduce_sum", builder("mul", x, used), axes=(0,))
    graph = differentiate.run(builder.build({"loss": loss}), recipe("used", "unused"))
    assert set(graph.outputs) == {"loss", "gradient:used"}
