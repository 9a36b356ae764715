"""Rows that nothing reads are not made: the same numbers from less work, and only where a slice drops enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pockc
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType, Value, dtype_of, op_counts
from pockc.ops import OPS, load_families
from pockc.ops.common import boolean, f32, sample_operands
from pockc.optim import SGD
from pockc.parity import verify_against_torch
from pockc.passes import narrow
from pockc.recipe import Recipe

load_families()

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))
FIRST: dict[str, Any] = {"axis": 1, "start": 0, "stop": 1}


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def same_results(graph: Graph, arrays: dict[str, Array] | None = None) -> Graph:
    """The graph after the pass, which gives the same."""
    after = narrow.run(graph, RECIPE)
    given = arrays or {value.name: normal(*value.type.shape) for value in graph.inputs}
    before, now = evaluate(graph, given)[0], evaluate(after, given)[0]
    for name in graph.outputs:
        np.testing.assert_allclose(now[name], before[name], rtol=1e-5, atol=1e-5)
    return after


def linear(b: Builder, x: Value, columns: int = 6) -> Value:
    return b("matmul", x, b.state(f"w{len(b.nodes)}", "parameter", normal(columns, x.type.shape[-1])), transpose_b=True)


def shapes(graph: Graph, op: str) -> list[tuple[int, ...]]:
    return [node.outputs[0].type.shape for node in graph.nodes if node.op == op]


@pytest.mark.parametrize("op", sorted(narrow.RULES))
def test_every_rule_gives_the_numbers_of_the_whole_result(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "HEAVY", narrow.RULES.keys())
    monkeypatch.setattr(narrow, "LEAST_SAVING", 0)
    narrowed = 0
    for sample in OPS[op].samples:
        operands = {f"x{i}": array for i, array in enumerate(sample_operands(sample))}
        b = Builder()
        inputs = [b.input(name, TensorType(array.shape, dtype_of(array))) for name, array in operands.items()]
        result = b.multi(op, *inputs, **sample.attrs)[0]
        for axis, size in enumerate(result.type.shape):
            for start, stop, step in ((0, 1, 1), (size - 1, size, 1), (size // 2, size, 1), (0, size, 2)):
                part = Builder(b.build({"y": result}))
                y = part("slice", result, axis=axis, start=start, stop=stop, step=step)
                after = same_results(part.build({"y": y}), operands)
                narrowed += after.outputs["y"] is not y and after.nodes[-1].op == op
    assert narrowed, f"no sample of {op} was narrowed"


def attention_block(**slice_: Any) -> Graph:
    """The first token of a layer: attention, a residual, a norm and a pair of products, between reshapes of heads."""
    b = Builder()
    x = b.input("x", f32(2, 8, 6))
    heads = [b("transpose", b("reshape", linear(b, x), shape=(2, 8, 2, 3)), permutation=(0, 2, 1, 3)) for _ in "qkv"]
    mixed = b.multi("attention", *heads, scale=0.5)[0]
    joined = b("reshape", b("transpose", mixed, permutation=(0, 2, 1, 3)), shape=(2, 8, 6))
    scale, shift = (b.state(name, "parameter", normal(6)) for name in ("scale", "shift"))
    h = b("layer_norm", b("add", linear(b, joined), x), scale, shift, epsilon=1e-5)
    wide = b("gelu", linear(b, h, 24))
    y = b("add", linear(b, wide), h)
    return b.build({"y": b("slice", y, **slice_)})


def test_a_layer_of_which_one_token_is_read_makes_all_keys_and_values_and_nothing_else() -> None:
    after = same_results(attention_block(**FIRST))
    assert shapes(after, "matmul") == [(2, 1, 6), (2, 8, 6), (2, 8, 6), (2, 1, 6), (2, 1, 24), (2, 1, 6)]
    assert shapes(after, "attention") == [(2, 2, 1, 3)]
    assert op_counts(after.nodes)["slice"] == 1  # of x, for the query and the residual


@pytest.mark.parametrize("part", [(3, 4, 1), (7, 8, 1), (0, 4, 1), (1, 8, 3)])
def test_any_tokens_will_do(part: tuple[int, int, int]) -> None:
    start, stop, step = part
    after = same_results(attention_block(axis=1, start=start, stop=stop, step=step))
    assert shapes(after, "attention") == [(2, 2, len(range(*part)), 3)]


@pytest.mark.parametrize("slice_", [{"axis": 1, "start": 1, "stop": 8}, {"axis": 2, "start": 0, "stop": 1}])
def test_a_slice_that_keeps_most_or_cuts_columns_stays(slice_: dict[str, Any]) -> None:
    graph = attention_block(**slice_)
    assert narrow.run(graph, RECIPE) is graph


def test_what_is_read_in_two_ways_stays_whole() -> None:
    b = Builder()
    h = linear(b, b.input("x", f32(2, 8, 6)))
    first, second = (b("slice", h, axis=1, start=start, stop=start + 1) for start in (0, 1))
    graph = b.build({"first": first, "second": second})
    assert narrow.run(graph, RECIPE) is graph
    b = Builder(graph)
    graph = b.build({"first": first, "all": h})
    assert narrow.run(graph, RECIPE) is graph


def test_arithmetic_alone_is_not_worth_the_sums_of_its_gradient() -> None:
    b = Builder()
    x = b.input("x", f32(2, 8, 6))
    graph = b.build({"y": b("slice", b("add", b("exp", x), x), **FIRST)})
    assert narrow.run(graph, RECIPE) is graph


@pytest.mark.parametrize("start", [0, 4])
def test_a_causal_mask_allows_the_first_tokens_alone(start: int) -> None:
    b = Builder()
    heads = [b.input(name, f32(1, 2, 8, 4)) for name in "qkv"]
    y = b.multi("attention", *heads, scale=0.5, causal=True)[0]
    after = same_results(b.build({"y": b("slice", y, axis=2, start=start, stop=start + 2)}))
    assert shapes(after, "attention") == [(1, 2, 2 if start == 0 else 8, 4)]


def test_a_mask_for_each_query_is_narrowed_too() -> None:
    b = Builder()
    heads = [b.input(name, f32(1, 2, 8, 4)) for name in "qkv"]
    mask = b.input("mask", boolean(1, 1, 8, 8))
    y = b.multi("attention", *heads, mask, scale=0.5)[0]
    graph = b.build({"y": b("slice", y, axis=2, start=3, stop=5)})
    visible = np.tri(8, dtype=np.bool_)[None, None]
    same_results(graph, {**{name: normal(1, 2, 8, 4) for name in "qkv"}, "mask": visible})


class Classifier(nn.Module):
    """An encoder layer of which the head sees the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(self.embedding(tokens))[:, 0])
        return logits


@pytest.mark.torch
@pytest.mark.native
def test_training_follows_pytorch_and_needs_less_memory() -> None:
    torch.manual_seed(0)
    model = Classifier()
    inputs = {"tokens": torch.randint(0, 50, (4, 12))}
    small = pockc.build(model, inputs)
    large = pockc.build(model, inputs, disabled=frozenset({"narrow"}))
    assert small.arena_bytes < large.arena_bytes
    assert verify_against_torch(model, inputs, optimizer=SGD(lr=0.1, momentum=0.9)).passed
