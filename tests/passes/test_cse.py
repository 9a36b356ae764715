"""One node per computation."""

from __future__ import annotations

import numpy as np

from pockc.interp import evaluate
from pockc.ir import Builder, Graph, Origin, TensorType, Value, op_counts
from pockc.optim import SGD
from pockc.passes import cse
from pockc.recipe import Recipe
from pockc.verify import verify

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))


def start() -> tuple[Builder, Value]:
    builder = Builder()
    return builder, builder.input("x", TensorType((4,)))


def merged(before: Graph) -> Graph:
    after = cse.run(before, RECIPE)
    verify(after, "imported")
    x = {"x": np.random.default_rng(0).standard_normal(4).astype(np.float32)}
    expected, found = evaluate(before, x)[0], evaluate(after, x)[0]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    return after


def test_equal_chains_become_one_and_the_first_remains() -> None:
    b, x = start()
    b.origin = Origin("first")
    one = b("exp", b("neg", x))
    b.origin = Origin("second")
    two = b("exp", b("neg", x))
    after = merged(b.build({"y": b("add", one, two)}))
    assert op_counts(after.nodes) == {"neg": 1, "exp": 1, "add": 1}
    assert [node.origin.module for node in after.nodes] == ["first", "first", "second"]


def test_attributes_tell_nodes_apart() -> None:
    b, x = start()
    results = [
        b("clip", x, low=low, high=1.0, inclusive=inclusive) for low in (0.0, -0.0) for inclusive in (False, True)
    ]
    after = merged(b.build({f"y{i}": result for i, result in enumerate(results)}))
    assert len(after.nodes) == 4


def test_operand_order_tells_nodes_apart() -> None:
    b, x = start()
    y = b("exp", x)
    after = merged(b.build({"one": b("sub", x, y), "two": b("sub", y, x)}))
    assert op_counts(after.nodes) == {"exp": 1, "sub": 2}


def test_all_outputs_of_a_node_are_merged() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((1, 4, 4, 2)))
    pools = [builder.multi("max_pool2d", x, kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0)) for _ in range(2)]
    after = cse.run(builder.build({"y": pools[0][0], "indices": pools[1][1]}), RECIPE)
    assert [node.op for node in after.nodes] == ["max_pool2d"]
    assert after.results() == after.nodes[0].outputs


def test_equal_constants_are_one_state() -> None:
    b, x = start()
    one, two = (b.state(name, "constant", np.full(4, 2, np.float32)) for name in ("a", "b"))
    after = merged(b.build({"y": b("sub", b("mul", x, one), b("mul", x, two))}))
    assert op_counts(after.nodes) == {"mul": 1, "sub": 1}
    assert [value.name for value in after.states] == ["a"]


def test_equal_parameters_remain_two() -> None:
    b, x = start()
    one, two = (b.state(name, "parameter", np.full(4, 2, np.float32)) for name in ("a", "b"))
    after = merged(b.build({"y": b("sub", b("mul", x, one), b("mul", x, two))}))
    assert op_counts(after.nodes) == {"mul": 2, "sub": 1}


def test_dropout_masks_merge_within_a_stream_only() -> None:
    b, x = start()
    seed, step = (b.state(name, "counter", np.array(1, np.int64)) for name in ("seed", "step"))
    for stream in (0, 0, 1):
        mask = b("dropout_mask", seed, step, elements=4, probability=0.5, stream=stream)
        x = b("apply_mask", x, mask)
    after = merged(b.build({"y": x}))
    assert op_counts(after.nodes) == {"dropout_mask": 2, "apply_mask": 3}


def test_copies_keep_their_own_buffers() -> None:
    b, x = start()
    after = merged(b.build({"one": b("copy", x), "two": b("copy", x)}))
    assert op_counts(after.nodes) == {"copy": 2}
