"""Every lowering against the numpy reference of its op, in ONNX Runtime, on the samples of the op table."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from pockc.ir import Array, Builder, TensorType, Value, dtype_of
from pockc.ops import OPS, Sample, load_families
from pockc.ops.common import sample_operands
from pockc.targets.onnxruntime.entry import OnnxEntry, make_entry
from pockc.targets.onnxruntime.model import make_model
from pockc.targets.onnxruntime.table import LOWERINGS

load_families()
onnxruntime.set_default_logger_severity(3)


def entry_of(op: str, samples: list[list[Array]], *, frozen: bool = False) -> OnnxEntry:
    """The op once for each of its samples; with ``frozen`` all operands but the first are constants."""
    builder = Builder()
    outputs: dict[str, Value] = {}
    for i, (sample, operands) in enumerate(zip(OPS[op].samples, samples, strict=True)):
        values: list[Value] = []
        for j, array in enumerate(operands):
            if frozen and j > 0:
                values.append(builder.state(f"x{i}.{j}", "constant", array))
            else:
                values.append(builder.input(f"x{i}.{j}", TensorType(tuple(array.shape), dtype_of(array))))
        found = builder.multi(op, *values, **sample.attrs)
        outputs |= {f"y{i}.{j}": value for j, value in enumerate(found)}
    return make_entry("test", builder.build(outputs), ())


def run(entry: OnnxEntry, operands: list[Array]) -> list[Array]:
    model = make_model(entry, {}, "", lambda array: None)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [argument.tensor for argument in entry.inputs]
    return list(session.run(None, dict(zip(names, operands, strict=True))))


def check(op: str, sample: Sample, operands: list[Array], found: list[Array]) -> None:
    expected = OPS[op].reference(*operands, **sample.attrs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == len(expected)
    for ours, reference in zip(found, expected, strict=True):
        reference = np.asarray(reference)
        assert ours.shape == reference.shape
        if reference.dtype.kind != "f":
            np.testing.assert_array_equal(ours, reference)
            continue
        largest = np.abs(reference[np.isfinite(reference)]).max(initial=1e-30)
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("op", sorted(LOWERINGS))
def test_lowering_computes_what_the_reference_does(op: str, frozen: bool) -> None:
    samples = [sample_operands(sample) for sample in OPS[op].samples]
    entry = entry_of(op, samples, frozen=frozen)

    found = run(entry, [array for operands in samples for array in (operands[:1] if frozen else operands)])

    count = len(found) // len(samples)  # all samples of an op have as many outputs
    for i, (sample, operands) in enumerate(zip(OPS[op].samples, samples, strict=True)):
        check(op, sample, operands, found[i * count : (i + 1) * count])


def test_what_has_no_lowering_is_known() -> None:
    # Tiles, compact states and kernels to choose from are made by passes and options that this target does not have.
    missing = {op for op in OPS if op not in LOWERINGS}

    tiles = {"cross_entropy_tile", "cross_entropy_of_tiles", "cross_entropy_grad_tile", "count_correct_of_tiles"}
    eight_bits = {"quantize", "dequantize", "lookup_int8", "add_int8", "conv2d_int8", "max_pool2d_int8"}
    dynamic_scale = {"all_finite", "gate"}
    others = {"momentum8", "adam8", "lion8", "pack8", "unpack8", "conv2d_winograd", "conv2d_grad_input_masked"}
    assert missing == tiles | eight_bits | dynamic_scale | others


def test_images_stay_channels_first_between_convolutions() -> None:
    random = np.random.default_rng(0)
    builder = Builder()
    x = builder.input("x", TensorType((2, 3, 6, 6)))
    value = builder("transpose", x, permutation=(0, 2, 3, 1))
    for i in range(2):
        weight = builder.state(f"w{i}", "constant", random.standard_normal((3, 3, 3, 3)).astype(np.float32))
        value = builder("clip", builder("conv2d", value, weight, padding=(1, 1, 1, 1)), low=0.0, high=6.0)
        value = builder("add", value, builder.state(f"b{i}", "constant", np.ones(3, np.float32)))
    value = builder("transpose", value, permutation=(0, 3, 1, 2))

    entry = make_entry("test", builder.build({"y": value}), ())

    assert [node.op for node in entry.nodes] == ["Conv", "Clip", "Add", "Conv", "Clip", "Add"]
