"""Activations in one byte until the backward pass: exact losses, close gradients, less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pockc
from benchmarks import zoo
from pockc.errors import UserError
from pockc.ir import op_counts
from pockc.ops import OPS, load_families
from pockc.optim import SGD
from pockc.passes import compress_saved
from pockc.recipe import Recipe

load_families()

ROWS = 512


def gelu_network(width: int = 256) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(width, width), torch.nn.GELU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 10)), {"input": torch.randn(ROWS, width)}


def built(tmp_path: Path, name: str, **options: Any) -> tuple[pockc.Program, list[float], dict[str, np.ndarray]]:
    """A program of the network, the losses of 30 steps on one batch, and the parameters after the first."""
    model, inputs = gelu_network()
    options = {"micro_batch": ROWS} | options  # or what is packed may decide how many samples run at a time
    program = pockc.build(model, inputs, optimizer=SGD(lr=0.5, momentum=0.9), **options)
    program.save(path := tmp_path / f"{name}.pock")
    batch = {"input": inputs["input"].numpy(), "labels": np.arange(ROWS) % 10}
    with pockc.Session(path) as session:
        losses = [session.train_step(**batch)]
        first = session.parameters()
        losses += [session.train_step(**batch) for _ in range(30)]
    return program, losses, first


@pytest.mark.parametrize("shape", [(3, 300), (2, 5, 7, 9), (16, 128)])
def test_what_is_unpacked_is_off_by_half_a_step(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    restored = OPS["unpack8"].reference(OPS["pack8"].reference(x), shape=shape)
    assert np.abs(restored - x).max() <= np.abs(x).max() / 254 * (1 + 1e-5)
    assert np.abs(restored - x).max() > 0


def test_training_needs_less_and_gets_as_far(tmp_path: Path) -> None:
    exact, exact_losses, exact_first = built(tmp_path, "exact")
    packed, losses, first = built(tmp_path, "packed", saved_dtype="int8")
    assert losses[0] == exact_losses[0]  # nothing of the forward pass is approximate
    assert packed.placements["train_step"].nbytes < 0.7 * exact.placements["train_step"].nbytes
    counts = op_counts(packed.entries["train_step"].nodes)
    assert counts["pack8"] >= 4 and counts["unpack8"] >= counts["pack8"]
    model, _ = gelu_network()
    for name, before in model.state_dict().items():
        step, exact_step = first[name] - before.numpy(), exact_first[name] - before.numpy()
        assert np.linalg.norm(step - exact_step) <= 0.02 * np.linalg.norm(exact_step), name
        assert "bias" in name or not np.array_equal(step, exact_step), name
    gained, exactly = losses[0] - losses[-1], exact_losses[0] - exact_losses[-1]
    assert exactly > 0.05
    assert gained == pytest.approx(exactly, rel=0.05)


def test_micro_batches_and_budgets_take_packed_activations(tmp_path: Path) -> None:
    whole, losses, _ = built(tmp_path, "whole", saved_dtype="int8")
    parts, part_losses, _ = built(tmp_path, "parts", saved_dtype="int8", micro_batch=64)
    assert parts.placements["train_step"].nbytes < whole.placements["train_step"].nbytes
    np.testing.assert_allclose(part_losses, losses, rtol=1e-5)


def test_a_convolutional_network_trains_in_channel_sparse_schemes(tmp_path: Path) -> None:
    model, inputs = zoo.mcunet_5fps(batch_size=4, image_size=64, num_classes=4)
    arenas = []
    for saved_dtype in ("f32", "int8"):
        program = pockc.build(model, inputs, optimizer=SGD(lr=0.02), saved_dtype=saved_dtype, entries=("train_step",))
        arenas.append(program.placements["train_step"].nbytes)
    assert arenas[1] < 0.8 * arenas[0]
    program.save(path := tmp_path / "model.pock")
    batch = {**{name: tensor.numpy() for name, tensor in inputs.items()}, "labels": np.arange(4)}
    with pockc.Session(path) as session:
        losses = [session.train_step(**batch) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_graph_without_the_option_is_left_alone() -> None:
    model, inputs = gelu_network(width=16)
    graph = pockc.build(model, inputs, entries=("train_step",)).entries["train_step"]
    recipe = Recipe(trained={}, optimizer=SGD(lr=0.1))
    assert compress_saved.run(graph, recipe) is graph
    assert compress_saved.run(replace(graph, updates={}), replace(recipe, saved_dtype="int8")).updates == {}


def test_an_unknown_dtype_is_refused() -> None:
    model, inputs = gelu_network()
    with pytest.raises(UserError, match="saved_dtype is 'int4'"):
        pockc.build(model, inputs, saved_dtype="int4")  # type: ignore[arg-type] # the point of the test
