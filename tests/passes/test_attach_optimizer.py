"""Optimizers attached to a graph, against torch.optim over several steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType
from pockc.optim import SGD, Adam, AdamW, Group, Lion, Optimizer, Schedule
from pockc.passes import attach_optimizer, differentiate, slice_updates
from pockc.recipe import Recipe
from pockc.scheme import Channels

WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
BATCHES = np.random.default_rng(1).standard_normal((6, 3, 6)).astype(np.float32)


def forward() -> Graph:
    """loss = mean((x w^T + b)^2)."""
    builder = Builder()
    x = builder.input("x", TensorType((3, 6)))
    weight = builder.state("w", "parameter", WEIGHT)
    bias = builder.state("b", "parameter", np.full(4, 0.5, np.float32))
    y = builder("add", builder("matmul", x, weight, transpose_b=True), bias)
    return builder.build({"loss": builder("reduce_mean", builder("mul", y, y), axes=(0, 1))})


def recipe_for(optimizer: Optimizer, **changes: Any) -> Recipe:
    return replace(Recipe(trained={"w": None, "b": None}, optimizer=optimizer), **changes)


def trained(recipe: Recipe, steps: int = 6) -> dict[str, Array]:
    graph = attach_optimizer.run(differentiate.run(forward(), recipe), recipe)
    states: dict[str, Array] = {}
    for batch in BATCHES[:steps]:
        _, new = evaluate(graph, {"x": batch}, states)
        states = {**states, **new}
    return states


def torch_trained(
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    clip: float | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> dict[str, Array]:
    weight = torch.tensor(WEIGHT, requires_grad=True)
    bias = torch.full((4,), 0.5, requires_grad=True)
    optimizer = make([weight, bias])
    scheduler = schedule(optimizer) if schedule else None
    for batch in torch.tensor(BATCHES):
        optimizer.zero_grad()
        (batch @ weight.T + bias).square().mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([weight, bias], clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {"w": weight.detach().numpy(), "b": bias.detach().numpy()}


CASES: dict[str, tuple[Optimizer, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (SGD(lr=0.1, weight_decay=0.01), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01)),
    "momentum": (
        SGD(lr=0.1, momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    ),
    "nesterov": (
        SGD(lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (Adam(lr=0.01, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    "adamw": (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01)),
}


@pytest.mark.parametrize("name", CASES)
def test_six_steps_equal_torch(name: str) -> None:
    optimizer, make = CASES[name]
    expected, found = torch_trained(make), trained(recipe_for(optimizer))
    for parameter, value in expected.items():
        np.testing.assert_allclose(found[parameter], value, rtol=2e-5, atol=1e-6)


def test_clipping_equals_clip_grad_norm() -> None:
    expected = torch_trained(lambda p: torch.optim.SGD(p, lr=0.1), clip=0.2)
    found = trained(recipe_for(SGD(lr=0.1, clip_norm=0.2)))
    np.testing.assert_allclose(found["w"], expected["w"], rtol=2e-5, atol=1e-6)


def test_a_step_schedule_equals_torch() -> None:
    expected = torch_trained(
        lambda p: torch.optim.SGD(p, lr=0.1), schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5)
    )
    found = trained(recipe_for(SGD(lr=0.1, schedule=Schedule("step", step_size=2, factor=0.5))))
    np.testing.assert_allclose(found["w"], expected["w"], rtol=2e-5, atol=1e-6)


def test_groups_set_weight_decay_and_rate_per_parameter() -> None:
    def grouped(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        weight, bias = parameters
        return torch.optim.AdamW(
            [{"params": [weight], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0, "lr": 0.001}], lr=0.01
        )

    groups = (Group("w", weight_decay=0.3), Group("b*", weight_decay=0.0, learning_rate_factor=0.1))
    expected, found = torch_trained(grouped), trained(recipe_for(AdamW(lr=0.01, groups=groups)))
    for parameter, value in expected.items():
        np.testing.assert_allclose(found[parameter], value, rtol=2e-5, atol=1e-6)


def test_lion_keeps_its_sign_rule() -> None:
    found = trained(recipe_for(Lion(lr=0.01)), steps=1)
    moved = found["w"] - WEIGHT
    np.testing.assert_allclose(np.abs(moved), 0.01, rtol=1e-4)


def test_accumulated_micro_steps_equal_one_step_on_the_mean_gradient() -> None:
    recipe = recipe_for(SGD(lr=0.1, momentum=0.9), accumulation=3)
    forward_backward = differentiate.run(forward(), recipe)
    last = attach_optimizer.run(forward_backward, recipe)
    earlier = attach_optimizer.accumulate(forward_backward, recipe)
    states: dict[str, Array] = {}
    for index, batch in enumerate(BATCHES):
        _, new = evaluate(last if index % 3 == 2 else earlier, {"x": batch}, states)
        states = {**states, **new}
    weight = torch.tensor(WEIGHT, requires_grad=True)
    bias = torch.full((4,), 0.5, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9)
    for start in (0, 3):
        optimizer.zero_grad()
        for batch in torch.tensor(BATCHES[start : start + 3]):
            ((batch @ weight.T + bias).square().mean() / 3).backward()
        optimizer.step()
    np.testing.assert_allclose(states["w"], weight.detach().numpy(), rtol=2e-5, atol=1e-6)
    assert not states["w.accumulated"].any()
    assert int(states["pockc.updates"]) == 2


@pytest.mark.parametrize("select", ["first", "magnitude", "random"])
def test_a_channel_sparse_update_moves_only_its_channels_and_saves_only_their_activation(select: Any) -> None:
    channels = Channels(fraction=0.5, select=select, seed=3)
    recipe = recipe_for(SGD(lr=0.1, momentum=0.9), trained={"w": channels})
    whole = attach_optimizer.run(differentiate.run(forward(), recipe), recipe)
    sliced = slice_updates.run(whole, recipe)
    products = [node for node in sliced.nodes if node.op == "matmul" and node.origin.phase == "backward"]
    assert [node.outputs[0].type.shape for node in products] == [(4, 3)]
    before, after = (evaluate(graph, {"x": BATCHES[0]})[1] for graph in (whole, sliced))
    np.testing.assert_allclose(after["w"], before["w"], rtol=1e-6)
    touched = np.flatnonzero(np.abs(after["w"] - WEIGHT).sum(axis=0))
    assert len(touched) == 3
    if select == "magnitude":
        assert set(touched) == set(np.argsort(-np.square(WEIGHT).sum(axis=0))[:3])
