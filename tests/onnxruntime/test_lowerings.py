"""Every lowering against the numpy reference of its op, in ONNX Runtime, on the samples of the op table."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from pockc.errors import InternalError
from pockc.ir import Array, Builder, TensorType, Value, dtype_of
from pockc.ops import OPS, Sample, load_families
from pockc.ops.common import sample_operands
from pockc.targets.onnxruntime.entry import OnnxEntry, make_entry
from pockc.targets.onnxruntime.model import make_model
from pockc.targets.onnxruntime.table import LOWERINGS

load_families()
onnxruntime.set_default_logger_severity(3)

CASES = [(op, i) for op in sorted(LOWERINGS) for i in range(len(OPS[op].samples))]
CHANNELS_LAST = (0, 2, 3, 1)


def run(entry: OnnxEntry, operands: list[Array]) -> list[Array]:
    model = make_model(entry, {}, "", lambda array: None)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [argument.tensor for argument in entry.inputs]
    return list(session.run(None, dict(zip(names, operands, strict=True))))


def entry_of(op: str, sample: Sample, operands: list[Array], *, frozen: bool = False) -> OnnxEntry:
    """The op alone; with ``frozen`` all operands but the first are constants."""
    builder = Builder()
    values: list[Value] = []
    for i, array in enumerate(operands):
        if frozen and i > 0:
            values.append(builder.state(f"x{i}", "constant", array))
        else:
            values.append(builder.input(f"x{i}", TensorType(tuple(array.shape), dtype_of(array))))
    outputs = builder.multi(op, *values, **sample.attrs)
    return make_entry("test", builder.build({f"y{i}": value for i, value in enumerate(outputs)}), ())


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
        finite = np.abs(reference[np.isfinite(reference)]).max(initial=1e-30)
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=1e-5 * finite)


@pytest.mark.parametrize(("op", "index"), CASES)
def test_lowering_computes_what_the_reference_does(op: str, index: int) -> None:
    sample = OPS[op].samples[index]
    operands = sample_operands(sample)

    check(op, sample, operands, run(entry_of(op, sample, operands), operands))


@pytest.mark.parametrize("op", sorted(LOWERINGS))
def test_lowering_folds_frozen_operands(op: str) -> None:
    sample = OPS[op].samples[0]
    operands = sample_operands(sample)

    check(op, sample, operands, run(entry_of(op, sample, operands, frozen=True), operands[:1]))
