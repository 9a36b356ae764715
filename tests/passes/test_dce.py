"""Only what a result needs stays."""

from __future__ import annotations

import numpy as np

from pockc.ir import Builder, TensorType
from pockc.optim import SGD
from pockc.passes import dce
from pockc.recipe import Recipe


def test_dead_nodes_and_unread_frozen_states_go() -> None:
    b = Builder()
    x = b.input("x", TensorType((3,)))
    unused = b.input("unused", TensorType((3,)))
    ones = np.ones(3, np.float32)
    w, trained, frozen = (b.state(name, "parameter", ones) for name in ("w", "trained", "frozen"))
    statistic, slot, counter = (
        b.state("mean", "buffer", ones),
        b.state("m", "slot", ones),
        b.state("n", "counter", ones),
    )
    b("exp", b("add", b("mul", unused, frozen), b.constant(2.0)))
    b("add", x, statistic)
    y = b("mul", x, w)
    graph = b.build({"y": y})
    after = dce.run(graph, Recipe(trained={"trained": None}, optimizer=SGD(lr=0.1)))
    assert [node.op for node in after.nodes] == ["mul"]
    assert after.inputs == (x, unused)
    assert list(after.states) == [w, trained, slot, counter]


def test_an_update_keeps_what_it_needs() -> None:
    b = Builder()
    x = b.input("x", TensorType((3,)))
    mean, old = (b.state(name, "buffer", np.zeros(3, np.float32)) for name in ("mean", "old"))
    new = b("add", b("mul", mean, b.constant(0.9)), x)
    graph = b.build({}, {mean: new, old: x})
    after = dce.run(graph, Recipe(trained={}, optimizer=SGD(lr=0.1)))
    assert [node.op for node in after.nodes] == ["mul", "add"]
    assert {value.name for value in after.states} == {"mean", "old", "constant"}


def test_one_live_output_keeps_a_node_whole() -> None:
    b = Builder()
    x = b.input("x", TensorType((1, 4, 4, 2)))
    _, indices = b.multi("max_pool2d", x, kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0))
    after = dce.run(b.build({"indices": indices}), Recipe(trained={}, optimizer=SGD(lr=0.1)))
    assert [len(node.outputs) for node in after.nodes] == [2]
