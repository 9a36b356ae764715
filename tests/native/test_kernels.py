"""Every kernel against the numpy reference of its op, on the op's samples; and calls that a hostile file could hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from pockc.artifact_writer import flatten
from pockc.errors import UserError
from pockc.ir import Array, TensorType, dtype_of
from pockc.ops import OPS, Sample, infer, load_families
from pockc.ops.common import f32, sample_operands
from tests.native import kernels

pytestmark = pytest.mark.native
load_families()

LISTED = (kernels.ROOT / "runtime" / "kernels" / "kernels.inc").read_text()
SIMD_OPS = re.findall(r"^POCKC_SIMD\((\w+)\)", LISTED, re.MULTILINE)
CASES = [(op, i) for op, definition in OPS.items() for i in range(len(definition.samples))]
# The buffers that an optimizer's outputs always share: p, then the slots.
OPTIMIZER_STATE = {"sgd": (0,), "momentum": (0, 2), "adam": (0, 2, 3), "lion": (0, 2)}
OPTIMIZER_STATE |= {"momentum8": (0, 2, 3), "adam8": (0, 2, 3, 4, 5), "lion8": (0, 2, 3)}


@dataclass(frozen=True)
class Case:
    """One sample with everything that a kernel call and its judgement need."""

    op: str
    operands: list[Array]
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    attrs: Mapping[str, Any]
    tolerance: float

    @classmethod
    def of(cls, op: str, sample: Sample) -> Case:
        operands = sample_operands(sample)
        inputs = tuple(TensorType(tuple(x.shape), dtype_of(x)) for x in operands)
        outputs, attrs = infer(op, inputs, sample.attrs)
        return cls(op, operands, inputs, outputs, attrs, sample.tolerance)

    def expected(self) -> tuple[Array, ...]:
        with np.errstate(all="ignore"):
            result = OPS[self.op].reference(*self.operands, **self.attrs)
        return result if isinstance(result, tuple) else (result,)


def assert_close(found: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == np.asarray(y).dtype
        if x.dtype != np.float32:
            np.testing.assert_array_equal(x, y)
            continue
        finite = np.abs(np.asarray(y)[np.isfinite(y)])
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1.0, finite.max(initial=0.0)))


def test_every_op_has_a_reference_kernel_and_every_kernel_an_op() -> None:
    listed = re.findall(r"^POCKC_REF\((\w+)\)", LISTED, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(OPS)
    assert set(SIMD_OPS) <= set(listed)
    for op in OPS:
        assert kernels.call(op, "ref", [], [], [], []) == kernels.BAD_FILE, f"{op} takes a call without operands"
    assert kernels.call("no_such_op", "ref", [], [], [], []) == kernels.NOT_FOUND


@pytest.mark.parametrize(("op", "index"), CASES)
def test_a_reference_kernel_agrees_with_numpy(op: str, index: int) -> None:
    case = Case.of(op, OPS[op].samples[index])
    status, found = kernels.run(op, "ref", case.operands, case.outputs, case.attrs, workspace_bytes=0)
    assert status == kernels.OK
    assert_close(found, case.expected(), case.tolerance)


@pytest.mark.parametrize("op", SIMD_OPS)
def test_a_vectorised_kernel_agrees_with_numpy_and_not_with_the_number_of_threads(op: str) -> None:
    accepted = 0
    for sample in OPS[op].samples:
        case = Case.of(op, sample)
        status, found = kernels.run(op, "simd", case.operands, case.outputs, case.attrs)
        if status == kernels.UNSUPPORTED:
            continue
        accepted += 1
        assert status == kernels.OK
        assert_close(found, case.expected(), case.tolerance)
        status, threaded = kernels.run(op, "simd", case.operands, case.outputs, case.attrs, threads=3)
        assert status == kernels.OK
        for x, y in zip(found, threaded, strict=True):
            assert x.tobytes() == y.tobytes(), "the result depends on the number of threads"
    assert accepted > 0, "no sample of the op is one that the vectorised kernel accepts"


_Q, _K, _V = (TensorType(shape) for shape in ((2, 2, 70, 24), (2, 2, 90, 24), (2, 2, 90, 40)))
# Operands and attributes beyond the kernels' block sizes; few are a multiple of a vector or a tile.
LARGER: list[tuple[str, tuple[TensorType, ...], Mapping[str, Any]]] = [
    ("matmul", (TensorType((413, 523)), TensorType((523, 395))), {}),
    ("matmul", (TensorType((523, 413)), TensorType((523, 395))), {"transpose_a": True}),
    ("matmul", (TensorType((523, 1024)), TensorType((523, 37))), {"transpose_a": True}),
    ("matmul", (TensorType((130, 523)), TensorType((395, 523))), {"transpose_b": True}),
    *[("matmul", (TensorType((rows, 523)), TensorType((395, 523))), {"transpose_b": True}) for rows in (1, 8)],
    # Of few channels, of which most patches are read where they lie: wide and narrow, with and without borders.
    ("conv2d", (TensorType((2, 9, 113, 3)), TensorType((40, 3, 3, 3))), {"stride": (2, 2), "padding": (1, 1, 1, 1)}),
    ("conv2d", (TensorType((1, 9, 60, 4)), TensorType((20, 5, 5, 4))), {"padding": (4, 0, 0, 6)}),
    (
        "conv2d",
        (TensorType((1, 5, 41, 3)), TensorType((7, 7, 7, 3)), TensorType((7,))),
        {"padding": (3, 3, 3, 3), "activation": "clip", "low": 0.0, "high": 6.0},
    ),
    ("conv2d", (TensorType((1, 30, 23, 5)), TensorType((9, 3, 3, 5))), {"dilation": (2, 1), "padding": (2, 2, 1, 1)}),
    ("conv2d_grad_weight", (TensorType((2, 12, 12, 50)), TensorType((2, 10, 10, 203))), {"kernel": (3, 3)}),
    ("transpose", (TensorType((3, 50, 7, 71)),), {"permutation": (0, 2, 1, 3)}),
    ("transpose", (TensorType((5, 3, 4, 2, 9)),), {"permutation": (3, 1, 0, 2, 4)}),
    ("attention", (_Q, _K, _V), {"scale": 0.2}),
    ("attention", (_Q, _K, _V), {"scale": 0.2, "causal": True}),
    ("attention", (_Q, _K, _V, TensorType((2, 1, 70, 90), "bool")), {"scale": 0.2}),
    ("attention", (_Q, _K, _V, TensorType((1, 1, 70, 90))), {"scale": 0.2, "causal": True}),
    ("attention", (_Q, _K, _V, TensorType((2, 2, 70, 1), "bool")), {"scale": 0.2}),
    ("attention", (_Q, _K, _V, TensorType((2, 1, 70, 1))), {"scale": 0.2}),
]


@pytest.mark.parametrize(("op", "inputs", "attrs"), LARGER)
def test_a_vectorised_kernel_agrees_with_numpy_beyond_its_block_sizes(
    op: str, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any]
) -> None:
    case = Case.of(op, Sample(inputs=inputs, attrs=dict(attrs), tolerance=1e-5))
    for threads in (1, 3):
        status, found = kernels.run(op, "simd", case.operands, case.outputs, case.attrs, threads=threads)
        assert status == kernels.OK
        assert_close(found, case.expected(), case.tolerance)


# Keys of which a query sees some in a second tile alone, or none.
_LATE_KEYS = np.ones((1, 1, 150, 600), np.bool_)
_LATE_KEYS[..., ::3, :300] = False
_LATE_KEYS[..., ::7, :] = False
_LONG, _SHORT = TensorType((1, 4, 150, 24)), TensorType((1, 2, 150, 24))


@pytest.mark.parametrize(
    ("query", "key", "masks", "causal"),
    [
        (_LONG, TensorType((1, 2, 600, 24)), (_LATE_KEYS,), False),
        (
            _LONG,
            TensorType((1, 2, 600, 24)),
            (np.where(_LATE_KEYS, np.float32(0.5), -np.inf).astype(np.float32),),
            False,
        ),
        (TensorType((2, 2, 600, 24)), TensorType((2, 1, 600, 24)), (), True),
        (TensorType((1, 2, 600, 24)), _SHORT, (), True),
        (_LONG, TensorType((1, 2, 600, 24)), (), True),
    ],
)
def test_attention_over_several_tiles_agrees_with_numpy_in_both_directions(
    query: TensorType, key: TensorType, masks: tuple[Array, ...], causal: bool
) -> None:
    attrs = {"scale": 0.6, "causal": causal}
    forward = Case.of("attention", Sample((query, key, key, *masks), attrs, tolerance=1e-5))
    out, sums = forward.expected()
    ct = np.random.default_rng(1).uniform(-2, 2, out.shape).astype(np.float32)
    q, k, v = forward.operands[:3]
    backward = Case.of("attention_grad", Sample((ct, q, k, v, out, sums, *masks), attrs, tolerance=1e-5))
    for case in (forward, backward):
        for threads in (1, 3):
            status, found = kernels.run(case.op, "simd", case.operands, case.outputs, case.attrs, threads=threads)
            assert status == kernels.OK
            assert_close(found, case.expected(), case.tolerance)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_first_part_is_inserted_without_a_base_and_leaves_the_rest_as_it_is(axis: int) -> None:
    part = np.arange(6, dtype=np.float32).reshape((2, 3) if axis == 0 else (3, 2))
    out = f32(5, 3) if axis == 0 else f32(3, 5)
    status, (found,) = kernels.run("insert", "ref", [part], [out], {"axis": axis, "start": 1})
    assert status == kernels.OK
    rows = found if axis == 0 else found.T
    np.testing.assert_array_equal(rows[1:3], part if axis == 0 else part.T)
    assert np.isnan(rows[[0, 3, 4]]).all()  # as kernels.run fills what is not written

    too_far = kernels.run("insert", "ref", [part], [out], {"axis": axis, "start": 4})[0]
    assert too_far == kernels.BAD_FILE


def shared_buffers(case: Case) -> Iterator[dict[int, int]]:
    """The ways in which outputs of this call may take over the buffers of inputs."""
    for i in OPS[case.op].in_place:
        if i < len(case.inputs) and case.inputs[i] == case.outputs[0]:
            yield {0: i}
    if case.op in OPTIMIZER_STATE:
        yield dict(enumerate(OPTIMIZER_STATE[case.op]))


SHARING = [op for op, definition in OPS.items() if definition.in_place or op in OPTIMIZER_STATE]


@pytest.mark.parametrize("provider", ["ref", "simd"])
@pytest.mark.parametrize("op", SHARING)
def test_an_output_may_take_over_an_operands_buffer(op: str, provider: str) -> None:
    if provider == "simd" and op not in SIMD_OPS:
        pytest.skip("the op has no vectorised kernel")
    shared = 0
    for sample in OPS[op].samples:
        case = Case.of(op, sample)
        status, apart = kernels.run(op, provider, case.operands, case.outputs, case.attrs)
        if status == kernels.UNSUPPORTED:
            continue
        for share in shared_buffers(case):
            shared += 1
            status, found = kernels.run(op, provider, case.operands, case.outputs, case.attrs, share=share)
            assert status == kernels.OK
            for x, y in zip(found, apart, strict=True):
                assert x.tobytes() == y.tobytes(), f"sharing {share} changes the result"
    assert shared > 0, "no sample of the op has an operand like its output"


# Hostile calls. A program file may hold any shapes and attributes: a check must refuse all but what the op's type rule
# takes, with exactly the outputs that it gives.

HUGE = (2**31, 2**40, 2**62, 2**63 - 1)


def altered_types(types: tuple[TensorType, ...]) -> Iterator[tuple[TensorType, ...]]:
    """The types with one dimension, rank or dtype changed."""
    for i, type_ in enumerate(types):
        for other in one_change(type_):
            yield (*types[:i], other, *types[i + 1 :])


def one_change(type_: TensorType) -> Iterator[TensorType]:
    for axis, size in enumerate(type_.shape):
        for changed in (size + 1, size - 1, 1, 0, -size, *HUGE):
            yield replace(type_, shape=(*type_.shape[:axis], changed, *type_.shape[axis + 1 :]))
    yield replace(type_, shape=(1, *type_.shape))
    yield replace(type_, shape=type_.shape[1:])
    yield replace(type_, shape=type_.shape[:-1])
    for dtype in ("f32", "i64", "i32", "u8", "bool"):
        yield replace(type_, dtype=dtype)


def altered_attributes(attrs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The attributes with one number changed."""
    for name, value in attrs.items():
        if isinstance(value, bool) or not isinstance(value, int | tuple):
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        for i, number in enumerate(numbers):
            for changed in (-number - 1, -1, 0, 1, number + 1, number + 2, 255, *HUGE, -(2**63)):
                altered = (*numbers[:i], changed, *numbers[i + 1 :])
                yield {**attrs, name: altered if isinstance(value, tuple) else changed}
        if isinstance(value, tuple):
            yield {**attrs, name: (*value, 1)}
            yield {**attrs, name: value[:-1]}


def type_rule_agrees(case: Case) -> bool:
    try:
        outputs, _ = infer(case.op, case.inputs, case.attrs)
    except (UserError, MemoryError, OverflowError):
        return False
    return outputs == case.outputs


def is_small(case: Case) -> bool:
    return sum(t.nbytes for t in (*case.inputs, *case.outputs)) < 1 << 20


def assert_refused_or_right(case: Case, flattened: tuple[list[int], list[float]]) -> None:
    """If the check takes the call, so does the type rule, and running it is safe."""
    if kernels.check(case.op, case.inputs, case.outputs, flattened) != kernels.OK:
        return
    assert type_rule_agrees(case), f"{case.op} takes {case.inputs} -> {case.outputs} with {dict(case.attrs)}"
    if is_small(case):
        operands = sample_operands(Sample(inputs=case.inputs))
        status, _ = kernels.run(case.op, "ref", operands, case.outputs, case.attrs)
        assert status in (kernels.OK, kernels.INVALID_ARGUMENT)


def cases(op: str) -> list[Case]:
    """A few samples of the op: they differ in ranks and optional operands."""
    return [Case.of(op, sample) for sample in OPS[op].samples[:4]]


@pytest.mark.parametrize("op", OPS)
def test_a_check_refuses_outputs_that_the_operands_do_not_give(op: str) -> None:
    for case in cases(op):
        flattened = kernels.flat(op, case.attrs)
        for outputs in altered_types(case.outputs):
            if outputs != case.outputs:
                status = kernels.check(op, case.inputs, outputs, flattened)
                assert status != kernels.OK, f"{op} takes {case.inputs} -> {outputs} with {dict(case.attrs)}"


@pytest.mark.parametrize("op", OPS)
def test_a_check_takes_no_operands_that_the_type_rule_refuses(op: str) -> None:
    for case in cases(op):
        flattened = kernels.flat(op, case.attrs)
        for inputs in altered_types(case.inputs):
            assert_refused_or_right(replace(case, inputs=inputs), flattened)
        for count in range(len(case.inputs)):
            if op == "insert" and count == 1:
                continue  # a first part, which files may hold and graphs may not: see the test of that
            assert_refused_or_right(replace(case, inputs=case.inputs[:count]), flattened)
        assert_refused_or_right(replace(case, inputs=(*case.inputs, case.inputs[-1])), flattened)


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].attributes])
def test_a_check_takes_no_attributes_that_the_type_rule_refuses(op: str) -> None:
    for case in cases(op):
        for attrs in altered_attributes(case.attrs):
            assert_refused_or_right(replace(case, attrs=attrs), flatten(op, attrs))


@pytest.mark.parametrize("op", OPS)
def test_a_check_refuses_missing_and_surplus_attributes_and_outputs(op: str) -> None:
    case = cases(op)[0]
    ints, floats = kernels.flat(op, case.attrs)

    def status(ints: list[int], floats: list[float], outputs: Sequence[TensorType] = case.outputs) -> int:
        return kernels.check(op, case.inputs, outputs, (ints, floats))

    assert status(ints, floats) == kernels.OK
    assert status([*ints, 0], floats) != kernels.OK
    assert status(ints, [*floats, 0.0]) != kernels.OK
    assert not ints or status(ints[:-1], floats) != kernels.OK
    assert not floats or status(ints, floats[:-1]) != kernels.OK
    assert status(ints, floats, case.outputs[:-1]) != kernels.OK
    assert status(ints, floats, (*case.outputs, case.outputs[0])) != kernels.OK


# Values inside tensors can only be judged while running.

TABLE = np.zeros((5, 3), np.float32)
SCALAR = np.float32(0.5).reshape(())
STEP = np.int64(1).reshape(())


def i32(*values: int) -> Array:
    return np.array(values, np.int32)


def i64(*values: int) -> Array:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("op", "operands", "attrs"),
    [
        ("embedding", (TABLE, i64(0, 5)), {}),
        ("embedding", (TABLE, i64(-1, 0)), {"padding_index": -1}),
        ("embedding_grad", (TABLE[:2], i64(0, 5)), {"rows": 5}),
        ("embedding_grad", (TABLE[:2], i64(-(2**63), 0)), {"rows": 5}),
        ("take", (TABLE, i32(4, 5)), {"axis": 0}),
        ("take", (TABLE, i32(-1)), {"axis": 1}),
        ("take_grad", (TABLE[:2], i32(0, 7)), {"axis": 0, "size": 7}),
        ("cross_entropy", (TABLE, i64(0, 1, 2, 3, 0)), {}),
        ("cross_entropy", (TABLE, i64(0, 1, 2, -1, 0)), {}),
        ("cross_entropy_grad", (SCALAR, TABLE, i64(0, 1, 2, -1, 0)), {}),
        ("sgd", (TABLE, TABLE[:2], SCALAR, i32(0, 5)), {}),
        ("momentum", (TABLE, TABLE[:2], TABLE[:2], SCALAR, STEP, i32(-1, 0)), {"momentum": 0.9}),
        ("lion", (TABLE, TABLE[:2], TABLE[:2], SCALAR, i32(0, 9)), {"beta1": 0.9, "beta2": 0.99}),
        (
            "adam",
            (TABLE, TABLE[:2], TABLE[:2], TABLE[:2], SCALAR, STEP, i32(0, 5)),
            {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8},
        ),
    ],
)
def test_an_index_in_the_data_that_is_out_of_range_is_refused(
    op: str, operands: tuple[Array, ...], attrs: dict[str, Any]
) -> None:
    outputs, complete = infer(op, [TensorType(x.shape, dtype_of(x)) for x in operands], attrs)
    status, _ = kernels.run(op, "ref", operands, outputs, complete)
    assert status == kernels.INVALID_ARGUMENT


def test_a_gate_that_is_shut_says_so_by_its_status() -> None:
    operands: list[Array] = [np.array(False), np.ones(3, np.float32)]
    status, found = kernels.run("gate", "ref", operands, [TensorType(())], {})
    assert (status, float(found[0])) == (kernels.ENTRY_ENDS, 0)


def test_a_pool_index_that_names_no_pixel_is_not_followed() -> None:
    attrs = {"size": (4, 4), "kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}
    ct, indices = np.ones((1, 2, 2, 1), np.float32), np.full((1, 2, 2, 1), 255, np.uint8)
    status, (gradient,) = kernels.run("max_pool2d_grad", "ref", (ct, indices), [TensorType((1, 4, 4, 1))], attrs)
    assert status == kernels.OK
    assert not gradient.any()


@pytest.mark.parametrize("op", ["softmax", "gelu", "silu", "sigmoid"])
def test_a_nan_of_any_payload_stays_one(op: str) -> None:
    # Exponentials add to the bits of a number: of the largest NaNs, that must not overflow where sanitizers look.
    x = np.zeros((2, 32), np.float32)
    x.view(np.uint32)[0] = [0x7FC00000, 0xFFC00000, *[0x7FFFFFC0] * 15, *[0xFFFFFFFF] * 15]
    status, (found,) = kernels.run(op, "simd", [x], [TensorType(x.shape)], {})
    assert status == kernels.OK
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
