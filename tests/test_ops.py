"""Every op against numpy, PyTorch and finite differences, driven by the samples in the op table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

from pockc.errors import InternalError, UserError
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Node, TensorType, Value, dtype_of, op_counts
from pockc.ops import ENUM_VALUES, OPS, OpDef, Sample, infer, load_families
from pockc.ops.common import f32, sample_operands
from pockc.ops.dropout import philox

load_families()

Case = tuple[OpDef, Sample]


def cases(select: Callable[[OpDef, Sample], bool]) -> pytest.MarkDecorator:
    """The samples that satisfy ``select``, as parameters called op and sample."""
    found = [
        pytest.param(op, sample, id=f"{name}-{i}")
        for name, op in OPS.items()
        for i, sample in enumerate(op.samples)
        if select(op, sample)
    ]
    return pytest.mark.parametrize(("op", "sample"), found)


def type_of(array: Array) -> TensorType:
    return TensorType(array.shape, dtype_of(array))


def in_double(arrays: Iterable[Array]) -> list[Array]:
    return [x.astype(np.float64) if x.dtype == np.float32 else x for x in arrays]


def as_torch(arrays: Iterable[Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(x)) for x in arrays]


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_close(found: Array, expected: Array, tolerance: float) -> None:
    """Equal to a tolerance relative to each element and to the largest one; infinities have to agree."""
    finite = np.abs(expected[np.isfinite(expected)])
    largest = float(finite.max()) if finite.size else 0.0
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * largest)


def gradient_graph(op: OpDef, sample: Sample, need: frozenset[int]) -> tuple[Graph, Node]:
    """A graph of the op (output y) and its gradients (g0, g1, ...), and the op's node in it."""
    builder = Builder()
    operands = [builder.input(f"x{i}", type_of(x)) for i, x in enumerate(sample_operands(sample))]
    builder.multi(op.name, *operands, **sample.attrs)
    node = builder.nodes[-1]
    ct = builder.input("ct", node.outputs[0].type)
    assert op.vjp is not None
    gradients = op.vjp(builder, node, (ct, *(None for _ in node.outputs[1:])), need)
    assert len(gradients) == len(operands)
    for i, (gradient, operand) in enumerate(zip(gradients, operands, strict=True)):
        assert gradient is None or i in need
        assert gradient is None or gradient.type == operand.type
    outputs = {f"g{i}": g for i, g in enumerate(gradients) if g is not None}
    return builder.build({"y": node.outputs[0], **outputs}), node


def double_operands(sample: Sample, graph: Graph) -> dict[str, Array]:
    """Operands and a random cotangent in double precision, by input name."""
    operands = {f"x{i}": x for i, x in enumerate(in_double(sample_operands(sample)))}
    cotangent = np.random.default_rng(1).uniform(-1, 1, graph.inputs[-1].type.shape)
    return {**operands, "ct": np.asarray(cotangent)}


def gradients_of(op: OpDef, sample: Sample, need: Iterable[int]) -> tuple[dict[int, Array], dict[str, Array]]:
    """The gradients of operands ``need``, zeros where absent, and the operands."""
    wanted = frozenset(need)
    graph, _ = gradient_graph(op, sample, wanted)
    operands = double_operands(sample, graph)
    found, _ = evaluate(graph, operands)
    return {i: found.get(f"g{i}", np.zeros_like(operands[f"x{i}"])) for i in wanted}, operands


# Forward


@cases(lambda op, sample: True)
def test_type_rule_agrees_with_reference(op: OpDef, sample: Sample) -> None:
    operands = sample_operands(sample)
    types, attrs = infer(op.name, [type_of(x) for x in operands], sample.attrs)
    with np.errstate(all="ignore"):
        results = as_tuple(op.reference(*operands, **attrs))
    assert tuple(type_of(np.asarray(result)) for result in results) == types


@cases(lambda op, sample: True)
def test_reference_leaves_its_operands_alone(op: OpDef, sample: Sample) -> None:
    operands = sample_operands(sample)
    before = [x.copy() for x in operands]
    with np.errstate(all="ignore"):
        op.reference(*operands, **infer(op.name, [type_of(x) for x in operands], sample.attrs)[1])
    for x, old in zip(operands, before, strict=True):
        np.testing.assert_array_equal(x, old)


@cases(lambda op, sample: sample.torch is not None)
def test_reference_agrees_with_torch(op: OpDef, sample: Sample) -> None:
    assert sample.torch is not None
    operands = sample_operands(sample)
    attrs = infer(op.name, [type_of(x) for x in operands], sample.attrs)[1]
    with np.errstate(all="ignore"):
        found = as_tuple(op.reference(*operands, **attrs))
    expected = as_tuple(sample.torch(torch, *as_torch(operands)))
    assert len(found) == len(expected)
    for result, wanted in zip(found, expected, strict=True):
        assert_close(np.asarray(result), wanted.detach().numpy(), sample.tolerance)


@cases(lambda op, sample: op.view)
def test_view_has_the_bytes_of_its_operand(op: OpDef, sample: Sample) -> None:
    (x,) = sample_operands(sample)
    assert np.asarray(op.reference(x, **sample.attrs)).tobytes() == x.tobytes()


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.in_place], ids=lambda op: op.name)
def test_in_place_operand_can_hold_the_output(op: OpDef) -> None:
    for index in op.in_place:
        types = [[type_of(x) for x in sample_operands(sample)] for sample in op.samples]
        results = [infer(op.name, t, s.attrs)[0] for t, s in zip(types, op.samples, strict=True)]
        given = [(operands[index], r[0]) for operands, r in zip(types, results, strict=True) if index < len(operands)]
        assert any(operand == result for operand, result in given)


# Gradients


@cases(lambda op, sample: bool(sample.differentiable) and sample.torch is not None)
def test_gradient_agrees_with_autograd(op: OpDef, sample: Sample) -> None:
    assert sample.torch is not None
    found, operands = gradients_of(op, sample, sample.differentiable)
    tensors = as_torch(operands[f"x{i}"] for i in range(len(sample.inputs)))
    leaves = [tensors[i].requires_grad_() for i in sample.differentiable]
    y = as_tuple(sample.torch(torch, *tensors))[0]
    cotangent = torch.from_numpy(operands["ct"])
    expected = torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
    for i, gradient in zip(sample.differentiable, expected, strict=True):
        wanted = np.zeros_like(found[i]) if gradient is None else gradient.numpy()
        assert found[i].dtype == np.float64, "a reference dropped to single precision"
        assert_close(found[i], wanted, 1e-6)


@cases(lambda op, sample: bool(sample.differentiable))
def test_gradient_agrees_with_finite_differences(op: OpDef, sample: Sample) -> None:
    gradients, operands = gradients_of(op, sample, sample.differentiable)
    forward, _ = gradient_graph(op, sample, frozenset())
    random = np.random.default_rng(2)
    direction = {i: np.asarray(random.standard_normal(operands[f"x{i}"].shape)) for i in sample.differentiable}

    def loss(distance: float) -> float:
        moved = {f"x{i}": operands[f"x{i}"] + distance * d for i, d in direction.items()}
        y = evaluate(forward, {**operands, **moved})[0]["y"]
        return float((y * operands["ct"]).sum())

    distance = 1e-5
    numeric = (loss(distance) - loss(-distance)) / (2 * distance)
    analytic = sum(float((gradients[i] * d).sum()) for i, d in direction.items())
    scale = sum(float(np.abs(gradients[i] * d).sum()) for i, d in direction.items())
    assert abs(numeric - analytic) <= 1e-6 * max(scale, 1.0)


@cases(lambda op, sample: len(sample.differentiable) > 1)
def test_gradient_is_the_same_when_only_one_is_needed(op: OpDef, sample: Sample) -> None:
    together, _ = gradients_of(op, sample, sample.differentiable)
    for i in sample.differentiable:
        alone, _ = gradients_of(op, sample, [i])
        np.testing.assert_array_equal(alone[i], together[i])


@cases(lambda op, sample: bool(sample.differentiable))
def test_gradient_rule_emits_nothing_that_it_does_not_use(op: OpDef, sample: Sample) -> None:
    needs = [frozenset(sample.differentiable), *(frozenset({i}) for i in sample.differentiable), frozenset[int]()]
    for need in needs:
        graph, _ = gradient_graph(op, sample, need)
        used = {v for name, v in graph.outputs.items() if name != "y"}
        emitted = [n for n in graph.nodes if graph.outputs["y"] not in n.outputs]
        for node in reversed(emitted):
            assert used & set(node.outputs), f"{node.op} is emitted for nothing when {set(need)} is needed"
            used |= set(node.inputs)


@pytest.mark.parametrize("name", ["batch_norm", "max_pool2d", "attention"])
def test_gradient_flows_through_the_first_output_only(name: str) -> None:
    graph, node = gradient_graph(OPS[name], OPS[name].samples[0], frozenset())
    builder = Builder(graph)
    cotangents = (node.outputs[0], *node.outputs[1:])
    vjp = OPS[name].vjp
    assert vjp is not None
    with pytest.raises(InternalError, match="first output"):
        vjp(builder, node, cotangents, frozenset({0}))


# Structure of gradients: what a sparse scheme relies on


def emitted(op: str, types: list[TensorType], need: set[int], **attrs: Any) -> tuple[dict[str, int], list[int]]:
    """Counts of the ops that the gradient rule emits, and which operands those read."""
    builder = Builder()
    operands = [builder.input(f"x{i}", t) for i, t in enumerate(types)]
    builder.multi(op, *operands, **attrs)
    node = builder.nodes.pop()
    ct = builder.input("ct", node.outputs[0].type)
    vjp = OPS[op].vjp
    assert vjp is not None
    vjp(builder, node, (ct, *(None for _ in node.outputs[1:])), frozenset(need))
    read: set[Value] = {v for n in builder.nodes for v in n.inputs}
    return op_counts(builder.nodes), [i for i, x in enumerate(operands) if x in read]


def test_bias_gradient_is_one_sum() -> None:
    assert emitted("add", [f32(2, 3, 4), f32(4)], {1}) == ({"reduce_sum": 1}, [])
    assert emitted("sub", [f32(2, 3, 4), f32(1, 4)], {1}) == ({"reduce_sum": 1, "reshape": 1, "neg": 1}, [])


def test_gradient_of_an_operand_with_the_shape_of_the_output_is_the_cotangent() -> None:
    assert emitted("add", [f32(2, 3, 4), f32(4)], {0}) == ({}, [])


def test_weight_gradient_of_a_linear_layer_is_one_product_over_all_rows() -> None:
    counts, read = emitted("matmul", [f32(2, 3, 4), f32(5, 4)], {1}, transpose_b=True)
    assert counts == {"reshape": 2, "matmul": 1}
    assert read == [0]


def test_input_gradient_of_a_linear_layer_does_not_read_the_input() -> None:
    assert emitted("matmul", [f32(2, 3, 4), f32(5, 4)], {0}, transpose_b=True) == ({"matmul": 1}, [1])


@pytest.mark.parametrize(("need", "expected"), [({0}, [1]), ({1}, [0]), ({0, 1}, [0, 1])])
def test_convolution_gradients_read_only_the_other_operand(need: set[int], expected: list[int]) -> None:
    counts, read = emitted("conv2d", [f32(1, 5, 5, 2), f32(3, 3, 3, 2)], need)
    assert sum(counts.values()) == len(need)
    assert read == expected


@pytest.mark.parametrize(("inclusive", "expected"), [(False, []), (True, [0])])
def test_clip_keeps_one_bit_per_element(inclusive: bool, expected: list[int]) -> None:
    counts, read = emitted("clip", [f32(9)], {0}, low=0.0, high=6.0, inclusive=inclusive)
    assert counts == {"range_mask": 1, "apply_mask": 1}
    assert read == expected


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softmax", "log_softmax", "exp", "sqrt", "rsqrt", "reciprocal"])
def test_gradient_from_the_output_does_not_read_the_input(name: str) -> None:
    assert emitted(name, [f32(3, 4)], {0})[1] == []


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm"])
def test_norm_with_only_beta_trained_reads_nothing(name: str) -> None:
    assert emitted(name, [f32(3, 4), f32(4), f32(4)], {2}, epsilon=1e-5) == ({"reduce_sum": 1}, [])


def test_max_pool_keeps_indices_only() -> None:
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}
    assert emitted("max_pool2d", [f32(1, 4, 4, 3)], {0}, **window) == ({"max_pool2d_grad": 1}, [])


@pytest.mark.parametrize(
    ("name", "types"),
    [("matmul", [f32(3, 4), f32(4, 5), f32(5)]), ("conv2d", [f32(1, 4, 4, 2), f32(3, 1, 1, 2), f32(3)])],
)
def test_fused_op_has_no_gradient(name: str, types: list[TensorType]) -> None:
    with pytest.raises(InternalError, match="fuse after differentiation"):
        emitted(name, types, {0})


def test_additive_mask_that_needs_a_gradient_is_refused() -> None:
    heads = f32(1, 2, 3, 4)
    with pytest.raises(UserError, match="no gradient for its additive mask"):
        emitted("attention", [heads, heads, heads, f32(1, 1, 3, 3)], {3}, scale=0.5)


# Particular values


def test_mask_bits_are_in_order_and_padding_is_zero() -> None:
    x = np.array([-1, 0, 1, 2, 3, 1, 1, 1, 1, -5], np.float32)
    open_bounds = OPS["range_mask"].reference(x, low=0.0, high=2.0)
    closed_bounds = OPS["range_mask"].reference(x, low=0.0, high=2.0, inclusive=True)
    assert np.asarray(open_bounds).tolist() == [0b11100100, 0b01]
    assert np.asarray(closed_bounds).tolist() == [0b11101110, 0b01]
    found = OPS["apply_mask"].reference(x, np.asarray(open_bounds), scale=2.0)
    assert np.asarray(found).tolist() == [0, 0, 2, 0, 0, 2, 2, 2, 2, 0]


def test_warm_up_rises_to_the_base_rate_and_the_schedule_starts_after_it() -> None:
    attrs = {"schedule": "linear", "warmup_steps": 2, "total_steps": 6}
    rates = [
        float(np.asarray(OPS["learning_rate"].reference(np.float64(1), np.int64(s), **attrs))) for s in range(1, 9)
    ]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(np.array([counter], np.uint64), key)
    assert tuple(int(word) for word in words[0]) == expected


def test_dropout_keeps_the_stated_share_and_changes_with_step_and_stream() -> None:
    def mask(step: int, stream: int) -> Array:
        packed = OPS["dropout_mask"].reference(
            np.int64(9), np.int64(step), elements=80000, probability=0.25, stream=stream
        )
        return np.unpackbits(np.asarray(packed))

    base = mask(1, 0)
    assert abs(base.mean() - 0.75) < 0.01
    for other in (mask(2, 0), mask(1, 1)):
        assert abs((base == other).mean() - (0.75**2 + 0.25**2)) < 0.01


def test_cross_entropy_without_any_row_is_nan_with_zero_gradient() -> None:
    logits, labels = np.ones((2, 3), np.float32), np.full(2, -100)
    assert np.isnan(OPS["cross_entropy"].reference(logits, labels))
    gradient = OPS["cross_entropy_grad"].reference(np.float32(1), logits, labels)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize("label", [-1, 3])
def test_cross_entropy_refuses_a_label_outside_the_classes(label: int) -> None:
    with pytest.raises(IndexError, match="outside the 3 classes"):
        OPS["cross_entropy"].reference(np.ones((1, 3), np.float32), np.array([label]))


def test_attention_row_that_sees_nothing_is_zero() -> None:
    x = np.ones((1, 1, 2, 3), np.float32)
    mask = np.array([[True, True], [False, False]]).reshape(1, 1, 2, 2)
    out, logsumexp = OPS["attention"].reference(x, x, x, mask, scale=1.0)
    np.testing.assert_array_equal(out[0, 0, 1], 0)
    assert np.isneginf(logsumexp[0, 0, 1])


@pytest.mark.parametrize(
    ("attrs", "schedule"),
    [
        ({"schedule": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        (
            {"schedule": "linear", "total_steps": 8, "minimum": 0.25},
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.25, 8),
        ),
        (
            {"schedule": "cosine", "total_steps": 8, "minimum": 0.25},
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8, 0.1 * 0.25),
        ),
        (
            {"schedule": "step", "step_size": 3, "factor": 0.5},
            lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        ),
    ],
    ids=lambda x: x.get("schedule") if isinstance(x, dict) else "",
)
def test_schedule_agrees_with_torch(attrs: dict[str, Any], schedule: Callable[[Any], Any]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = schedule(optimizer)
    for step in range(1, 9):
        found = OPS["learning_rate"].reference(np.float64(0.1), np.int64(step), **attrs)
        assert float(np.asarray(found)) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


# The table


def test_every_op_has_samples_that_cover_its_attributes() -> None:
    for op in OPS.values():
        assert op.samples, f"{op.name} has no samples"
        for name, default in op.attributes.items():
            assert any(name in s.attrs and s.attrs[name] != default for s in op.samples), f"{op.name} never sets {name}"


def test_every_differentiable_op_has_gradient_checks() -> None:
    for op in OPS.values():
        checked = any(sample.differentiable for sample in op.samples)
        assert checked == (op.vjp is not None), f"{op.name}: a gradient rule and gradient checks go together"


# What torch has no counterpart for, or none that would be another way to compute it.
# The step inside of momentum8, adam8 and lion8 is that of momentum, adam and lion; test_state_dtype has their codes.
# What computes with codes is held against the same in f32 by test_quantize_prefix and test_compress_saved.
WITHOUT_TORCH = {"range_mask", "apply_mask", "dropout_mask", "learning_rate", "momentum8", "adam8", "lion8"} | {
    *("quantize", "dequantize", "lookup_int8", "add_int8", "conv2d_int8", "max_pool2d_int8", "pack8", "unpack8")
}


def test_every_op_is_compared_with_torch() -> None:
    without = {op.name for op in OPS.values() if not any(sample.torch for sample in op.samples)}
    assert without == WITHOUT_TORCH


def test_string_attributes_are_in_the_enumeration_of_the_program_file() -> None:
    values = {v for op in OPS.values() for s in op.samples for v in s.attrs.values() if isinstance(v, str)}
    assert values <= set(ENUM_VALUES)


def test_attributes_become_plain_values() -> None:
    _, attrs = infer("clip", [f32(3)], {"low": 0, "high": np.float32(6)})
    assert attrs == {"low": 0.0, "high": 6.0, "inclusive": False}
    assert [type(value) for value in attrs.values()] == [float, float, bool]
    _, attrs = infer("reduce_sum", [f32(3, 4)], {"axes": [np.int64(1)]})
    assert attrs == {"axes": (1,), "keepdims": False}
