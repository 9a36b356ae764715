"""The frozen prefix in eight bits: what becomes codes, what stays f32, and how far off the boundary may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pockc.calibration import measure
from pockc.errors import UserError
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Node, Value, op_counts
from pockc.ops import OPS
from pockc.ops.common import f32
from pockc.ops.quantized import dequantize
from pockc.optim import SGD
from pockc.passes import dce, differentiate, quantize_prefix, reorder
from pockc.passes.frozen_prefix import prefix_nodes, value_keys
from pockc.passes.lifetimes import buffers
from pockc.passes.quantize_prefix import affine
from pockc.passes.row_strips import analyse, in_strips
from pockc.recipe import Recipe

RECIPE = Recipe(trained={"head": None}, optimizer=SGD(lr=0.1))
PADDED: dict[str, Any] = {"padding": (1, 1, 1, 1)}
Layers = Callable[[Builder, Value], Value]


class Network(Builder):
    """Layers with seeded weights on images of 8 by 8, and a trained head behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)
        self.image = self.input("image", f32(2, 8, 8, 3))

    def conv(self, x: Value, filters: int, kernel: int = 1, *, groups: int = 1, clip: bool = True) -> Value:
        depth = x.type.shape[3] // groups
        scale = 1.5 / np.sqrt(kernel * kernel * depth)
        weight = self.random.standard_normal((filters, kernel, kernel, depth)) * scale
        window = PADDED if kernel == 3 else {}
        y = self("conv2d", x, self.constant(weight, hint="weight"), groups=groups, **window)
        y = self("add", y, self.constant(self.random.standard_normal(filters) * 0.2, hint="bias"))
        return self("clip", y, low=0.0, high=6.0) if clip else y

    def finished(self, x: Value) -> Graph:
        """The graph, with ``x`` as the output ``boundary``, in front of the head."""
        head = self.state("head", "parameter", self.random.standard_normal(x.type.shape[-1:]).astype(np.float32))
        return self.build({"logits": self("mul", x, head), "boundary": x})


def residual_network() -> Graph:
    b = Network()
    stem = b.conv(b.image, 8, 3)
    wide = b.conv(b.conv(stem, 16), 16, 3, groups=16)
    return b.finished(b("add", stem, b.conv(wide, 8, clip=False)))


def images(count: int = 2, seed: int = 1) -> dict[str, Array]:
    return {"image": np.random.default_rng(seed).uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32)}


def quantized(graph: Graph, recipe: Recipe = RECIPE, samples: Mapping[str, Array] | None = None) -> Graph:
    ranges = measure(graph, recipe, samples or images())
    return dce.run(quantize_prefix.run(graph, replace(recipe, prefix_ranges=ranges)), recipe)


def eight_bit_ops(graph: Graph) -> dict[str, int]:
    return {op: count for op, count in op_counts(graph.nodes).items() if op.endswith(("int8", "quantize"))}


def of_op(graph: Graph, op: str) -> list[Node]:
    return [node for node in graph.nodes if node.op == op]


def test_everything_in_front_of_the_trained_head_becomes_codes() -> None:
    graph = quantized(residual_network())

    assert op_counts(graph.nodes) == {"quantize": 1, "conv2d_int8": 4, "add_int8": 1, "dequantize": 1, "mul": 1}
    (boundary,) = of_op(graph, "dequantize")
    assert graph.outputs["boundary"] is boundary.outputs[0]
    assert {value.type.dtype for node in graph.nodes[:-2] for value in node.outputs} == {"u8"}


def test_without_ranges_the_graph_is_left_alone() -> None:
    graph = residual_network()
    assert quantize_prefix.run(graph, RECIPE) is graph


def test_what_is_trained_is_never_quantised() -> None:
    graph = residual_network()
    ranges = measure(graph, RECIPE, images())
    bias = graph.state("bias")
    states = {
        value: replace(state, kind="parameter" if value is bias else state.kind)
        for value, state in graph.states.items()
    }
    recipe = Recipe(trained={"bias": None}, optimizer=SGD(lr=0.1), prefix_ranges=ranges)

    after = quantize_prefix.run(replace(graph, states=states), recipe)

    assert eight_bit_ops(after) == {"quantize": 1, "conv2d_int8": 1, "dequantize": 1}
    assert len(of_op(after, "conv2d")) == 3


def conv_of(graph: Graph, node: Node, x: Array, w: Array) -> Array:
    """What a convolution of ``graph`` makes of other operands."""
    return np.asarray(OPS["conv2d"].reference(x, w, **node.attrs))


def steps_of(w: Array) -> Array:
    """The scale of each weight."""
    return np.broadcast_to(np.abs(w).max(axis=(1, 2, 3), keepdims=True) / 127, w.shape)


def test_one_convolution_is_never_off_by_more_than_its_scales_allow() -> None:
    """Codes are off by half a scale at most, of x, w and y: |dy| <= sum(|w'| sx / 2 + |x| sw / 2) + sy / 2."""
    graph, samples = with_layers(lambda b, x: x), images()
    (node,) = of_op(graph, "conv2d")
    boundary, image, w = graph.outputs["boundary"], samples["image"], graph.states[node.inputs[1]].data
    assert w is not None
    ranges, keys = measure(graph, RECIPE, samples), keys_of(graph)
    (x_scale, _), (y_scale, _) = (affine(*ranges[keys[value]]) for value in (graph.inputs[0], boundary))
    of_x = conv_of(graph, node, np.full_like(image, x_scale / 2), np.abs(w) + steps_of(w) / 2)
    bound = of_x + conv_of(graph, node, np.abs(image), steps_of(w) / 2) + y_scale / 2

    found, exact = (evaluate(g, samples)[0]["boundary"] for g in (quantized(graph), graph))

    assert np.all(np.abs(found - exact) <= bound + 1e-5)
    assert bound.max() < 0.05 * np.ptp(exact)


def test_the_boundary_is_as_close_as_the_scales_promise() -> None:
    """Rounding to steps of s adds noise of variance s^2 / 12; weights amplify it by their squares, a clip lowers it."""
    graph, samples = residual_network(), images()
    ranges, keys = measure(graph, RECIPE, samples), keys_of(graph)
    exact, readers = values_of(graph, samples), graph.consumers()

    def rounding(value: Value) -> float:
        """Of what becomes codes: not in front of a bias or a clip, which its convolution takes in."""
        reader = readers[value][0]
        taken_in = reader.op == "clip" or (reader.op == "add" and reader.inputs[1] in graph.states)
        return 0.0 if taken_in else affine(*ranges[keys[value]])[0] ** 2 / 12

    image = graph.inputs[0]
    variance = {image: np.full(image.type.shape, rounding(image))}
    for node in prefix_nodes(graph, RECIPE):
        (x, *others), y = node.inputs, node.outputs[0]
        noise = variance[x]
        if node.op == "conv2d":
            w = graph.states[others[0]].data
            assert w is not None
            noise = conv_of(graph, node, noise, w**2) + conv_of(graph, node, exact[x] ** 2, steps_of(w) ** 2 / 12)
        elif node.op == "add" and others[0] not in graph.states:
            noise = noise + variance[others[0]]
        variance[y] = noise + rounding(y)
    boundary = graph.outputs["boundary"]

    difference = evaluate(quantized(graph), samples)[0]["boundary"] - exact[boundary]

    expected = float(np.sqrt(variance[boundary].mean()))
    assert 0.5 * expected < np.sqrt((difference**2).mean()) < 1.1 * expected
    assert expected < 0.05 * exact[boundary].std()


def keys_of(graph: Graph) -> dict[Value, str]:
    nodes = prefix_nodes(graph, RECIPE)
    made = {value for node in nodes for value in node.outputs} | set(graph.inputs)
    return {value: key for value, key in value_keys(graph, nodes).items() if value in made}


def values_of(graph: Graph, samples: Mapping[str, Array]) -> dict[Value, Array]:
    made = {value.name: value for node in graph.nodes for value in node.outputs}
    found = evaluate(replace(graph, outputs=made), samples)[0]
    return {graph.inputs[0]: samples["image"], **{value: found[name] for name, value in made.items()}}


def test_a_residual_sum_takes_over_the_buffer_of_its_operand() -> None:
    graph = reorder.run(quantized(residual_network()), RECIPE)
    owner = buffers(graph)
    (total,) = of_op(graph, "add_int8")

    assert owner[total.outputs[0]] in [owner[value] for value in total.inputs]


def with_layers(layers: Callable[[Network, Value], Value]) -> Graph:
    b = Network()
    return b.finished(layers(b, b.conv(b.image, 8, 3)))


def close(graph: Graph, after: Graph, share: float = 0.03) -> None:
    exact = evaluate(graph, images())[0]["boundary"]
    found = evaluate(after, images())[0]["boundary"]
    assert np.abs(found - exact).max() < share * np.ptp(exact)


def test_functions_of_one_number_become_tables() -> None:
    graph = with_layers(lambda b, x: b("hardswish", b.conv(x, 8, clip=False)))
    after = quantized(graph)

    assert eight_bit_ops(after) == {"quantize": 1, "conv2d_int8": 2, "lookup_int8": 1, "dequantize": 1}
    close(graph, after)


def test_pools_and_movements_work_on_codes() -> None:
    window: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)}

    def layers(b: Network, x: Value) -> Value:
        pooled, _ = b.multi("max_pool2d", x, **window)
        moved = b("transpose", pooled, permutation=(0, 2, 1, 3))
        return b("reshape", moved, shape=(2, 1, 16, 8))

    graph = with_layers(layers)
    after = quantized(graph)

    counts = {"quantize": 1, "conv2d_int8": 1, "max_pool2d_int8": 1, "transpose": 1, "reshape": 1, "dequantize": 1}
    assert op_counts(after.nodes) == {**counts, "mul": 1}
    assert after.nodes[-2].op == "dequantize"
    close(graph, after)


def channels_first() -> tuple[Network, Value, dict[str, Array]]:
    """A network whose images come as PyTorch has them; the images in the layout of the layers; samples."""
    b = Network()
    b.inputs[0] = b.image = Value("image", f32(2, 3, 8, 8))
    samples = {"image": images()["image"].transpose(0, 3, 1, 2).copy()}
    return b, b("transpose", b.image, permutation=(0, 2, 3, 1)), samples


def test_the_image_is_moved_as_codes() -> None:
    b, image, samples = channels_first()
    after = quantized(b.finished(b.conv(image, 8, 3)), samples=samples)

    assert [node.op for node in after.nodes] == ["quantize", "transpose", "conv2d_int8", "dequantize", "mul"]
    assert after.nodes[1].outputs[0].type.dtype == "u8"


def test_what_has_no_kernel_stays_f32_between_conversions() -> None:
    def layers(b: Network, x: Value) -> Value:
        gate = b("sigmoid", b("reduce_mean", x, axes=(1, 2), keepdims=True))
        return b.conv(b("mul", x, gate), 8)

    graph = with_layers(layers)
    after = quantized(graph)

    assert eight_bit_ops(after) == {"quantize": 2, "conv2d_int8": 2, "dequantize": 2}
    assert {"reduce_mean", "sigmoid", "mul"} <= op_counts(after.nodes).keys()
    close(graph, after)


def test_strips_of_rows_give_the_same_codes() -> None:
    b, image, samples = channels_first()
    pooled, _ = b.multi("max_pool2d", b.conv(image, 8, 3), kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1))
    deep = b.conv(b.conv(pooled, 16), 16, 3, groups=16)
    graph = quantized(b.finished(b("hardswish", b("add", pooled, b.conv(deep, 8, clip=False)))), samples=samples)
    images_of = analyse(graph)
    expected = evaluate(graph, samples)[0]["boundary"]

    ends = {cut.nodes[-1].op for cut in images_of.cuts}
    assert {"conv2d_int8", "add_int8", "max_pool2d_int8", "lookup_int8"} <= ends
    for cut in images_of.cuts:
        for count in (2, 4):
            after = in_strips(graph, images_of, cut, count)
            np.testing.assert_array_equal(evaluate(after, samples)[0]["boundary"], expected)


def test_a_convolution_with_two_readers_keeps_its_sum_and_its_clip_apart() -> None:
    def layers(b: Network, x: Value) -> Value:
        y = b.conv(x, 8, clip=False)
        return b("add", y, b("clip", y, low=0.0, high=1.0))

    graph = with_layers(layers)
    after = quantized(graph)

    assert eight_bit_ops(after) == {"quantize": 1, "conv2d_int8": 2, "lookup_int8": 1, "add_int8": 1, "dequantize": 1}
    close(graph, after)


def test_weights_are_codes_with_a_scale_for_each_output_channel() -> None:
    graph = with_layers(lambda b, x: x)
    after = quantized(graph)
    (conv,) = of_op(after, "conv2d_int8")
    _, codes, factor, _ = (after.states[value].data if value in after.states else None for value in conv.inputs)
    weight = graph.states[graph.state("weight")].data
    assert codes is not None and factor is not None and weight is not None
    scales = np.abs(weight).max(axis=(1, 2, 3)) / 127

    found = dequantize(codes, scale=1.0, zero_point=128).transpose(3, 0, 1, 2) * scales[:, None, None, None]

    assert np.all(np.abs(found - weight) <= 0.501 * scales[:, None, None, None])
    np.testing.assert_allclose(factor / scales, (factor / scales)[0], rtol=1e-6)


def test_a_graph_in_another_mode_is_quantised_as_far_as_the_measured_one() -> None:
    """As evaluation of a model with dropout, whose training graph has a mask where its prefix ends."""
    short, long = with_layers(lambda b, x: x), with_layers(lambda b, x: b.conv(x, 8))
    recipe = replace(RECIPE, prefix_ranges=measure(short, RECIPE, images()))

    after = quantize_prefix.run(long, recipe)

    assert eight_bit_ops(after) == {"quantize": 1, "conv2d_int8": 1, "dequantize": 1}
    first = (of_op(graph, "conv2d_int8")[0] for graph in (after, quantize_prefix.run(short, recipe)))
    attrs = [node.attrs for node in first]
    assert attrs[0] == attrs[1]


def test_a_range_always_has_a_code_for_zero() -> None:
    for low, high in ((-1.0, 3.0), (0.0, 6.0), (2.0, 5.0), (-7.0, -1.0), (0.0, 0.0), (-1e-40, 1e-40)):
        scale, zero_point = affine(low, high)
        assert scale > 0 and 0 <= zero_point <= 255
        assert scale == np.float32(scale)
        assert -zero_point * scale <= min(low, 0) + scale / 2 + 1e-39
        assert (255 - zero_point) * scale >= max(high, 0) - scale / 2 - 1e-39


def test_samples_are_taken_in_batches_and_all_count() -> None:
    graph, samples = residual_network(), images(5)
    samples["image"][4] *= 3
    keys = keys_of(graph)

    found = measure(graph, RECIPE, samples)

    assert found[keys[graph.inputs[0]]] == (samples["image"].min(), samples["image"].max())
    assert set(found) == set(keys.values())
    batches = [measure(graph, RECIPE, {"image": samples["image"][[i, i]]}) for i in range(5)]
    for key, (low, high) in found.items():
        assert low == min(batch[key][0] for batch in batches)
        assert high == max(batch[key][1] for batch in batches)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "no calibration samples of the input 'image'"),
        ({"image": np.zeros((4, 9, 8, 3), np.float32)}, r"have shape \[4, 9, 8, 3\]"),
        ({"image": np.zeros((0, 8, 8, 3), np.float32)}, r"have shape \[0, 8, 8, 3\]"),
        ({"image": np.full((2, 8, 8, 3), np.nan, np.float32)}, "values from nan to nan"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples: dict[str, Array], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(residual_network(), RECIPE, samples)


def test_a_prefix_without_a_convolution_is_refused() -> None:
    b = Network()
    graph = b.finished(b("tanh", b.image))
    with pytest.raises(UserError, match="no convolution"):
        measure(graph, RECIPE, images())


def test_codes_have_no_gradient() -> None:
    b = Builder()
    x = b.state("x", "parameter", np.ones((2, 4), np.float32))
    codes = b("quantize", x, scale=0.1, zero_point=3)
    numbers = b("dequantize", codes, scale=0.1, zero_point=3)
    graph = b.build({"loss": b("reduce_mean", b("mul", numbers, x), axes=(0, 1))})

    with pytest.raises(UserError, match="op quantize has no gradient"):
        differentiate.run(graph, Recipe(trained={"x": None}, optimizer=SGD(lr=0.1)))
