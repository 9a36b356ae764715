"""The text form of graphs: golden, and read back to the same text."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pockc.errors import PockcError
from pockc.ir import Builder, Graph, Origin, TensorType, dtype_of
from pockc.ops import OPS, Sample, load_families
from pockc.ops.common import sample_operands
from pockc.text import parse, show
from pockc.verify import verify

load_families()


def training_step() -> Graph:
    """A small step by hand, with every kind of line and of origin."""
    builder = Builder()
    x = builder.input("pixel_values", TensorType((2, 6, 6, 3)))
    labels = builder.input("labels", TensorType((2,), "i64"))
    random = np.random.default_rng(0)
    kernel = random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weight = builder.state("features.0.0.weight", "parameter", kernel.transpose(0, 2, 3, 1), (0, 2, 3, 1))
    bias = builder.state("classifier.bias", "parameter", np.zeros(4, np.float32))
    builder.state("running_mean", "buffer", np.zeros(4, np.float32))
    builder.origin = Origin("features.0.0", "/somewhere/models/net.py", 12)
    y = builder("conv2d", x, weight, stride=(2, 2), padding=(1, 1, 1, 1), hint="conv")
    y = builder("clip", y, low=0.0, high=math.inf, hint="relu")
    builder.origin = Origin("features.1", "/somewhere/models/net.py", 13)
    y, indices = builder.multi("max_pool2d", y, kernel=(3, 3), stride=(1, 1), padding=(0, 0, 0, 0), hint="pool")
    builder.origin = Origin("classifier")
    pooled = builder("reduce_mean", y, axes=(1, 2))
    logits = builder(
        "mul", builder("add", pooled, bias), builder.constant(np.array([0.5, 1.0, 1e-7, -3.0])), hint="logits"
    )
    builder.origin = Origin()
    loss = builder("cross_entropy", logits, labels, label_smoothing=0.1, hint="loss")
    builder.origin = Origin("", "train.py", 1, "backward")
    ct = builder("cross_entropy_grad", builder.constant(1.0), logits, labels, label_smoothing=0.1)
    builder.origin = Origin("classifier", phase="update")
    step = builder("sgd", bias, builder("reduce_sum", ct, axes=(0,)), builder.constant(0.1))
    return builder.build({"loss": loss, "logits": logits, "pool indices": indices}, {bias: step})


def test_training_step_prints_as_reviewed(golden: Callable[..., None]) -> None:
    golden(show(training_step()))


def test_training_step_reads_back_to_the_same_text_and_a_legal_graph() -> None:
    text = show(training_step())
    graph = parse(text)
    assert show(graph) == text
    assert str(graph) == text
    verify(graph, "training")


def test_parsed_graph_has_constants_but_no_other_contents() -> None:
    graph = parse(show(training_step()))
    for state in graph.states.values():
        assert (state.data is not None) == (state.kind == "constant")
    assert graph.states[graph.state("features.0.0.weight")].permutation == (0, 2, 3, 1)


def test_origin_survives_but_for_the_directory_of_the_file() -> None:
    nodes = parse(show(training_step())).nodes
    assert nodes[0].origin == Origin("features.0.0", "net.py", 12)
    assert nodes[6].origin == Origin()
    assert nodes[7].origin == Origin("", "train.py", 1, "backward")
    assert nodes[8].origin == Origin("classifier", phase="update")


@pytest.mark.parametrize(
    ("name", "sample"),
    [pytest.param(name, s, id=f"{name}-{i}") for name, op in OPS.items() for i, s in enumerate(op.samples)],
)
def test_every_op_reads_back(name: str, sample: Sample) -> None:
    builder = Builder()
    operands = [builder.input(f"x{i}", TensorType(x.shape, dtype_of(x))) for i, x in enumerate(sample_operands(sample))]
    outputs = builder.multi(name, *operands, **sample.attrs)
    graph = builder.build({str(i): value for i, value in enumerate(outputs)})
    parsed = parse(show(graph))
    assert show(parsed) == show(graph)
    assert parsed.nodes[0].attrs == graph.nodes[0].attrs
    assert list(map(type, parsed.nodes[0].attrs.values())) == list(map(type, graph.nodes[0].attrs.values()))
    verify(parsed, "training")


@settings(deadline=None)
@given(
    names=st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True),
    elements=st.lists(st.floats(width=32), min_size=1, max_size=16),
    number=st.floats(allow_nan=False),
)
def test_any_name_element_and_attribute_reads_back(names: list[str], elements: list[float], number: float) -> None:
    builder = Builder()
    inputs = [builder.input(name, TensorType((len(elements),))) for name in names]
    data = np.array(elements, np.float32)
    y = builder("add", inputs[-1], builder.constant(data))
    graph = builder.build({name: builder("leaky_relu", y, slope=number) for name in names})
    parsed = parse(show(graph))
    assert show(parsed) == show(graph)
    assert [value.name for value in parsed.inputs] == names
    (state,) = parsed.states.values()
    assert state.data is not None
    np.testing.assert_array_equal(state.data, data)
    assert parsed.nodes[-1].attrs == {"slope": number}


@pytest.mark.parametrize("dtype", ["i64", "i32", "u8", "bool", "f32"])
def test_constants_of_every_element_type_read_back(dtype: str) -> None:
    builder = Builder()
    value = builder.constant(np.array([[0, 1], [1, 0]]), dtype)
    graph = parse(show(builder.build({"y": builder("copy", value)})))
    (state,) = graph.states.values()
    assert state.data is not None
    assert dtype_of(state.data) == dtype
    assert state.data.tolist() == [[0, 1], [1, 0]]


MALFORMED = (
    "input x: f32[2]",
    "input %x f32[2]",
    "input %x: f24[2]",
    "input %x: f32[two]",
    "input %x: f32[2",
    "input %x: f32[2]\ninput %x: f32[2]",
    "state %w: f32[2] weight",
    "state %w: f32[2] constant = [1.0]",
    "state %w: f32[2] constant = [1.0, many]",
    "%y: f32[2] = exp(%x)",
    "input %x: f32[2]\n%y: f32[2] = expo(%x)",
    "input %x: f32[2]\n%y: f32[2] = exp(%x) base=2",
    "input %x: f32[2]\n%y: f32[2] = exp(%x) ; hello",
    "input %x: f32[2]\n%y: f32[2] = exp(%x) )",
    "input %x: f32[2]\n%y: f32[2] = exp(%x",
    "input %x: f32[2]\n%y: f32[2] = exp(%x)  #",
    "output y = %y",
    "update %w = %y",
)


def test_malformed_text_is_refused_with_its_line(golden: Callable[..., None]) -> None:
    messages = []
    for text in MALFORMED:
        with pytest.raises(PockcError) as error:
            parse(text)
        messages.append(f"{text}\n--> {error.value}\n\n")
    golden("".join(messages))
