"""Training steps that fit: computed again, in micro-batches, and still the same function."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pockc
from benchmarks import memory_peer, zoo
from benchmarks.verify_zoo import loss_of
from pockc.ir import Array, Node, TensorType, Value, dtype_of
from pockc.ops import OPS, Sample, infer, load_families
from pockc.ops.common import f32, sample_operands
from pockc.passes import batch_rules, batch_sums
from pockc.sizes import parse_size

load_families()
pytestmark = [pytest.mark.torch, pytest.mark.native]

OPTIMIZER = pockc.SGD(lr=1e-2, momentum=0.9)
PLAIN = frozenset({"fit-memory"})
SIZES = [("mobilenet_v2", 1), ("resnet50", 3), ("minilm_l6", 1), ("llama_tiny", 3), ("smollm2_135m", 3)]  # of 4 samples

# What the ops' own samples lack: rows that a batch of two divides.
EXTRA: dict[str, tuple[Sample, ...]] = {
    "conv2d_grad_weight": (
        Sample((f32(4, 5, 5, 2), f32(4, 3, 3, 3)), {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0, 0, 0)}),
    ),
    "matmul": (Sample((f32(6, 3), f32(6, 4)), {"transpose_a": True}),),
    "reduce_sum": (Sample((f32(4, 3),), {"axes": (0,)}), Sample((f32(4, 2, 3),), {"axes": (0, 1), "keepdims": True})),
    "reduce_mean": (Sample((f32(4, 3),), {"axes": (0, 1)}),),
    "embedding_grad": (Sample((f32(4, 3), np.array([1, 0, 4, 4])), {"rows": 5}),),
}


@functools.cache
def small(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model, inputs = zoo.ZOO[name](**{**zoo.SMALL[name], "batch_size": 4})
    return model, inputs


def built(name: str, **options: Any) -> pockc.Program:
    model, inputs = small(name)
    options.setdefault("scheme", "full")
    return pockc.build(model, inputs, loss=loss_of(name), optimizer=OPTIMIZER, **options)


def trained(program: pockc.Program, name: str, folder: Path, steps: int = 4) -> tuple[list[float], dict[str, Array]]:
    """Losses and final parameters; what the runtime allocates is what was planned."""
    path = folder / "model.pock"
    program.save(path)
    batch = memory_peer.batch_of(small(name)[1], loss_of(name))
    with pockc.Session(path) as session:
        assert session.memory.arena_bytes == program.memory.arena_bytes
        return [session.train_step(**batch) for _ in range(steps)], session.parameters()


@functools.cache
def plain(name: str) -> pockc.Program:
    return built(name, disabled=PLAIN)


@pytest.mark.parametrize("name", ["mobilenet_v2", "minilm_l6", "llama_tiny"])
def test_what_is_computed_again_has_the_same_bits(name: str, tmp_path: Path) -> None:
    program = built(name)
    recomputed = [node for node in program.entries["train_step"].nodes if node.origin.phase == "recompute"]
    assert recomputed and all(node.origin.module for node in recomputed)
    assert program.memory.arena_bytes < plain(name).memory.arena_bytes
    ours, theirs = trained(program, name, tmp_path), trained(plain(name), name, tmp_path)
    assert ours[0] == theirs[0]
    assert all(np.array_equal(ours[1][key], theirs[1][key]) for key in theirs[1])


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_gradients_of_micro_batches_add_up(name: str, size: int, tmp_path: Path) -> None:
    program = built(name, micro_batch=size)
    assert program.metadata["memory_plan"]["micro_batch"] == size
    (losses, ours), (expected, theirs) = trained(program, name, tmp_path), trained(plain(name), name, tmp_path)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    for key, tensor in theirs.items():
        np.testing.assert_allclose(ours[key], tensor, rtol=1e-4, atol=1e-6, err_msg=key)


def test_micro_batches_are_taken_where_activations_outweigh_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(32, 32, 1), nn.ReLU6())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    inputs = {"input": torch.randn(8, 32, 96, 96)}

    def made(**options: Any) -> pockc.Program:
        return pockc.build(model, inputs, optimizer=OPTIMIZER, **options)

    chosen, whole = made(), made(micro_batch=8)
    assert chosen.metadata["memory_plan"]["micro_batch"] < 8 == whole.metadata["memory_plan"]["micro_batch"]
    assert chosen.memory.arena_bytes < 0.7 * whole.memory.arena_bytes
    batch = {"input": inputs["input"].numpy(), "labels": np.arange(8)}
    losses = []
    for program in (chosen, whole):
        program.save(tmp_path / "model.pock")
        with pockc.Session(tmp_path / "model.pock") as session:
            losses.append([session.train_step(**batch) for _ in range(4)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_transformers_keep_their_batch_in_one_piece() -> None:
    model, inputs = zoo.minilm_l6(batch_size=8, sequence_length=32, vocab_size=500)
    program = pockc.build(model, inputs, optimizer=OPTIMIZER, scheme="full")
    assert program.metadata["memory_plan"]["micro_batch"] == 8


def test_rows_that_are_ignored_count_over_the_whole_batch(tmp_path: Path) -> None:
    model, inputs = small("minilm_l6")
    labels = np.array([1, -100, -100, 3])

    def losses(micro_batch: int) -> list[float]:
        program = pockc.build(model, inputs, optimizer=OPTIMIZER, micro_batch=micro_batch)
        program.save(tmp_path / "model.pock")
        with pockc.Session(tmp_path / "model.pock") as session:
            return [session.train_step(**inputs, labels=labels) for _ in range(3)]

    np.testing.assert_allclose(losses(1), losses(0), rtol=1e-5)


def sums_of(op: str) -> Iterator[tuple[Node, batch_rules.Roles, list[Array], int]]:
    for sample in (*OPS[op].samples, *EXTRA.get(op, ())):
        operands = sample_operands(sample)
        values = tuple(Value("operand", TensorType(x.shape, dtype_of(x))) for x in operands)
        types, attrs = infer(op, [v.type for v in values], sample.attrs)
        node = Node(op, values, tuple(Value("result", t) for t in types), attrs)
        for batch in (2, 3, 4):
            roles = batch_sums.sum_roles(node, set(values), batch)
            if roles is not None:
                yield node, roles, operands, batch


@pytest.mark.parametrize("op", sorted(batch_sums.RULES))
def test_an_op_that_is_called_a_sum_is(op: str) -> None:
    tried = 0
    for node, roles, operands, batch in sums_of(op):
        if node.attrs.get("first_row", 0) > 0 or len(node.inputs) > 2:
            continue
        total: Array = np.zeros(node.outputs[0].type.shape)
        for i in range(batch):
            rows = [np.split(x, batch)[i] if sliced else x for x, sliced in zip(operands, roles, strict=True)]
            attrs = batch_rules.rescaled(node, batch, i, 1)
            total = total + np.asarray(OPS[op].reference(*rows, **attrs)) / (batch if batch_sums.is_mean(node) else 1)
        expected = OPS[op].reference(*operands, **node.attrs)
        np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
        tried += 1
    assert tried


class Wide(nn.Module):
    """Layers whose activations outweigh the parameters."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(layers)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


IMAGES = {"x": torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))}


def wide_losses(program: pockc.Program, path: Path) -> list[float]:
    program.save(path)
    with pockc.Session(path) as session:
        memory = session.memory
        assert memory.arena_bytes + memory.mapped_bytes <= program.memory.peak_bytes
        return [session.train_step(**IMAGES, labels=np.arange(8) % 5) for _ in range(3)]


@pytest.fixture(scope="module")
def unconstrained() -> pockc.Program:
    return pockc.build(Wide().eval(), IMAGES, optimizer=OPTIMIZER)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.35])
def test_a_budget_is_kept_with_the_same_losses(unconstrained: pockc.Program, share: float, tmp_path: Path) -> None:
    budget = int(share * unconstrained.memory.peak_bytes)
    program = pockc.build(Wide().eval(), IMAGES, optimizer=OPTIMIZER, memory_budget=budget)
    note = program.metadata["budget"]
    assert program.memory.peak_bytes <= budget == note["bytes"]
    assert note["unconstrained_bytes"] == unconstrained.memory.peak_bytes
    assert note["estimated_slowdown"] >= 1.0 and (share == 1.0 or note["recomputed"] or note["micro_batch"] < 8)
    expected = wide_losses(unconstrained, tmp_path / "model.pock")
    np.testing.assert_allclose(wide_losses(program, tmp_path / "budget.pock"), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_any_budget_gives_a_program_within_it_or_says_what_is_possible(
    unconstrained: pockc.Program, seed: int, tmp_path: Path
) -> None:
    share = random.Random(seed).uniform(0.01, 0.6)
    budget = int(share * unconstrained.memory.peak_bytes)
    build = functools.partial(pockc.build, Wide().eval(), IMAGES, optimizer=OPTIMIZER)
    try:
        program = build(memory_budget=budget)
    except pockc.BudgetError as error:
        assert error.smallest > budget and f"{error.smallest:,}" in str(error)
        assert build(memory_budget=error.smallest).memory.peak_bytes <= error.smallest
    else:
        assert program.memory.peak_bytes <= budget


def test_an_impossible_budget_names_schemes_and_batches_that_fit(golden: Any, unconstrained: pockc.Program) -> None:
    with pytest.raises(pockc.BudgetError) as raised:
        pockc.build(Wide().eval(), IMAGES, optimizer=OPTIMIZER, memory_budget=unconstrained.memory.peak_bytes // 12)
    golden(str(raised.value) + "\n")


def test_samples_that_a_layer_mixes_cannot_run_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 22 * 22, 5))
    with pytest.raises(pockc.UserError, match="batch_norm mixes the samples of a batch"):
        pockc.build(model.train(), {"input": IMAGES["x"]}, batchnorm="train", micro_batch=2)


@pytest.mark.parametrize(
    ("text", "expected"), [("32MiB", 32 << 20), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("7kb", 7000)]
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-3MB", "12 parsecs", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(pockc.UserError, match="is not a size of memory"):
        parse_size(text)
