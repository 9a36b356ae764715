"""What a schedule moves past a cache: small cases by hand, and what has to hold of any."""

from __future__ import annotations

import pytest

from pockc.ir import Builder, Graph, TensorType, Value
from pockc.passes import traffic
from pockc.passes.cost import CALL_SECONDS, moved_bytes, seconds

KIB = 1024
TENSOR = TensorType((KIB // 4,))  # one KiB


def chain(links: int) -> Graph:
    """`x`, its negation, that one's, and so on: each tensor has one reader, right behind its maker."""
    b = Builder()
    value = b.input("x", TENSOR)
    for _ in range(links):
        value = b("neg", value)
    return b.build({"y": value}, {})


def fan(readers: int) -> Graph:
    """`readers` negations, made one after the other, then their sum from the first on."""
    b = Builder()
    x = b.input("x", TENSOR)
    parts = [b("neg", x) for _ in range(readers)]
    total = parts[0]
    for part in parts[1:]:
        total = b("add", total, part)
    return b.build({"y": total}, {})


def test_without_a_cache_every_byte_moves() -> None:
    graph = fan(4)
    assert traffic.of_calls(graph, 0, {}) == [moved_bytes(node) for node in graph.nodes]


def test_a_chain_moves_what_it_begins_with() -> None:
    assert traffic.of_calls(chain(5), 2 * KIB, {}) == [KIB, 0, 0, 0, 0]


def test_what_has_to_leave_is_written_and_read_again() -> None:
    room, scarce = (sum(traffic.of_calls(fan(6), cache * KIB, {})) for cache in (8, 3))
    assert room == KIB
    assert scarce > 4 * KIB


def test_a_tensor_larger_than_the_cache_is_never_there() -> None:
    assert traffic.of_calls(chain(2), KIB - 1, {}) == [2 * KIB, 2 * KIB]


def test_micro_batches_have_a_share_of_what_they_split() -> None:
    graph = fan(6)
    halves: dict[Value, float] = {value: 0.5 for node in graph.nodes for value in (*node.inputs, *node.outputs)}
    whole = traffic.of_calls(graph, 3 * KIB, {})
    assert [2 * moved for moved in traffic.of_calls(graph, 3 * KIB // 2, halves)] == whole
    assert sum(traffic.of_calls(graph, 4 * KIB, halves)) == KIB // 2 < sum(traffic.of_calls(graph, 4 * KIB, {}))


@pytest.mark.parametrize("cache", [0, 2 * KIB, 64 * KIB])
def test_time_falls_with_the_cache_and_grows_with_the_runs(cache: int) -> None:
    graph = fan(5)
    once = traffic.seconds(graph, cache, {}, {})
    assert all(time <= seconds(node) for time, node in zip(once, graph.nodes, strict=True))
    twice = traffic.seconds(graph, cache, {}, dict.fromkeys(graph.nodes, 2))
    assert twice == pytest.approx([2 * time for time in once])
    assert min(once) >= CALL_SECONDS
