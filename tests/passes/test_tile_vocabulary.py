"""Losses over tiles of the vocabulary: what is left of the logits, the same numbers, updates in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType, Value, op_counts
from pockc.ops import OPS, load_families
from pockc.optim import SGD, Adam, AdamW, Lion, Optimizer
from pockc.passes import (
    attach_loss,
    attach_optimizer,
    cse,
    dce,
    differentiate,
    fuse,
    memory,
    reorder,
    slice_updates,
    tile_vocabulary,
)
from pockc.passes.lifetimes import overwritten, update_chains
from pockc.recipe import Recipe, no_workspace
from pockc.scheme import Channels
from pockc.verify import verify

BATCH, TOKENS, WIDTH, WORDS = 3, 5, 8, 75  # the last tile is narrower than the others
IGNORED = -100


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 words."""
    monkeypatch.setattr(tile_vocabulary, "TILE_BYTES", 4 * 16 * BATCH * TOKENS)
    yield


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles in any case, and no logits kept."""
    monkeypatch.setattr(tile_vocabulary, "_worthwhile", lambda *_: True)
    monkeypatch.setattr(tile_vocabulary, "_kept", lambda *_: 0)


def parameter(b: Builder, name: str, *shape: int) -> Value:
    data = np.random.default_rng(len(b.states)).standard_normal(shape) * 0.4
    return b.state(name, "parameter", data.astype(np.float32))


def language_model(
    *, bias: bool = False, tied: bool = False, words: int = WORDS, tokens: int = TOKENS, width: int = WIDTH
) -> Graph:
    """An embedding, one layer and a head."""
    b = Builder()
    ids = b.input("input_ids", TensorType((BATCH, tokens), "i64"))
    table = parameter(b, "table", words, width)
    body = parameter(b, "body", width, width)
    head = table if tied else parameter(b, "head", words, width)
    hidden = b("tanh", b("matmul", b("embedding", table, ids), body, transpose_b=True))
    logits = b("matmul", hidden, head, transpose_b=True)
    if bias:
        logits = b("add", logits, parameter(b, "bias", words))
    return b.build({"logits": logits})


def recipe(*trained: str, optimizer: Optimizer | None = None, **options: Any) -> Recipe:
    return Recipe(dict.fromkeys(trained), optimizer or SGD(lr=0.5), loss=options.pop("loss", "causal_lm"), **options)


def lowered(graph: Graph, options: Recipe, *, accumulate: bool = False) -> Graph:
    graph = differentiate.run(attach_loss.run(graph, options), options)
    graph = attach_optimizer.accumulate(graph, options) if accumulate else attach_optimizer.run(graph, options)
    for step in (slice_updates, cse, dce, fuse):
        graph = step.run(graph, options)
    return graph


def batch(words: int = WORDS) -> dict[str, Array]:
    random = np.random.default_rng(1)
    ids = random.integers(0, words, (BATCH, TOKENS))
    labels = random.integers(0, words, (BATCH, TOKENS))
    labels[1, 2:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def both_agree(before: Graph, after: Graph, given: dict[str, Array] | None = None, steps: int = 2) -> None:
    """The same outputs and states over some steps, in double precision, in the given order and in the scheduled one."""
    verify(after, "lowered")
    inputs = given or batch()
    scheduled = reorder.run(after, recipe())
    initial = {v.name: s.data for v, s in before.states.items() if s.kind != "constant" and s.data is not None}
    doubles = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in initial.items()}
    for graph in (after, scheduled):
        expected = found = doubles
        for _ in range(steps):
            outputs, expected = evaluate(before, inputs, expected)
            others, found = evaluate(graph, inputs, found)
            assert outputs.keys() == others.keys()
            for name, value in {**outputs, **expected}.items():
                result = {**others, **found}[name]
                np.testing.assert_allclose(result, value, rtol=1e-6, atol=1e-8, err_msg=name)
    memory.run(scheduled, no_workspace)


def has_logits(graph: Graph) -> bool:
    return any(v.type.shape[-1:] == (WORDS,) and len(v.type.shape) > 1 for n in graph.nodes for v in n.outputs)


def widest(graph: Graph, words: int = WORDS) -> int:
    """How many values beside states have a row per word."""
    chain = {value for values in update_chains(graph).values() for value in values}
    return sum(v.type.shape == (words, WIDTH) and v not in chain for n in graph.nodes for v in n.outputs)


OPTIMIZERS = {
    "sgd": SGD(lr=0.5),
    "decay": SGD(lr=0.5, weight_decay=0.1),
    "momentum": SGD(lr=0.1, momentum=0.9),
    "adam": Adam(lr=0.01, weight_decay=0.1),
    "adamw": AdamW(lr=0.01),
    "lion": Lion(lr=0.01),
}


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_whole_weight_is_updated_tile_by_tile(optimizer: Optimizer) -> None:
    options = recipe("table", "body", "head", optimizer=optimizer)
    before = lowered(language_model(), options)
    after = tile_vocabulary.run(before, options)

    both_agree(before, after)
    assert has_logits(before) and not has_logits(after)
    assert widest(before) == 2 and widest(after) == 1  # the gradient of the embedding is left
    counts = op_counts(after.nodes)
    assert counts["cross_entropy_tile"] == counts["cross_entropy_grad_tile"] == 5
    assert "cross_entropy" not in counts and "cross_entropy_grad" not in counts and "insert" not in counts
    head = after.state("head")
    scheduled = reorder.run(after, options)
    chain = update_chains(scheduled)[head]
    assert len(chain) == 5 and all(overwritten(scheduled)[link][0] is head for link in chain)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    ("words", "loss_options"),
    [
        (WORDS, {"label_smoothing": 0.1}),
        (WORDS, {"ignore_index": 3}),
        (64, {}),
        (17, {}),
        (81, {"label_smoothing": 0.3}),
    ],
)
def test_losses_and_sizes(words: int, loss_options: dict[str, float]) -> None:
    options = recipe("table", "body", "head", "bias", loss_options=loss_options)
    before = lowered(language_model(bias=True, words=words), options)
    after = tile_vocabulary.run(before, options)
    given = batch(words)
    if "ignore_index" in loss_options:
        given["labels"] = np.where(given["labels"] == IGNORED, 3, given["labels"])
    both_agree(before, after, given)
    assert op_counts(after.nodes)["cross_entropy_tile"] == -(-words // 16)


@pytest.mark.usefixtures("forced")
def test_bias_has_its_gradient_put_together() -> None:
    options = recipe("head", "bias")
    before = lowered(language_model(bias=True), options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    assert not has_logits(after) and widest(after) == 0


@pytest.mark.usefixtures("forced")
def test_frozen_head_needs_no_gradient_of_its_weight() -> None:
    options = recipe("body")
    before = lowered(language_model(), options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    assert not has_logits(after) and widest(after) == 0
    assert op_counts(after.nodes)["sgd"] == 1


@pytest.mark.usefixtures("forced")
def test_tied_embedding_adds_to_the_gradient_of_the_head() -> None:
    options = recipe("table", "body")
    before = lowered(language_model(tied=True), options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    assert not has_logits(after)
    assert op_counts(after.nodes)["sgd"] == 2 and op_counts(after.nodes)["insert"] == 5
    (scatter,) = (node for node in after.nodes if node.op == "embedding_grad")
    assert scatter.inputs[2].type.shape == (WORDS, WIDTH)
    scheduled = reorder.run(after, options)
    live = memory.live_peak(scheduled, no_workspace)
    assert live < 1.9 * 4 * WORDS * WIDTH + 4 * BATCH * TOKENS * (WORDS - 16)  # one gradient of the table, not two


@pytest.mark.usefixtures("forced")
def test_clipping_needs_all_of_the_gradient() -> None:
    options = recipe("table", "body", "head", optimizer=AdamW(lr=0.01, clip_norm=0.1))
    before = lowered(language_model(), options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    assert not has_logits(after)
    assert op_counts(after.nodes)["insert"] == 5 and op_counts(after.nodes)["adam"] == 3


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", ["momentum", "adamw", "lion"])
def test_slots_of_one_byte_need_all_of_the_gradient(name: str) -> None:
    """Blocks of codes span rows, so that a range of rows cannot be updated alone."""
    options = recipe("table", "body", "head", optimizer=OPTIMIZERS[name], state_dtype="int8")
    before = lowered(language_model(), options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    assert not has_logits(after)
    op = {"momentum": "momentum8", "adamw": "adam8", "lion": "lion8"}[name]
    assert op_counts(after.nodes)["insert"] == 5 and op_counts(after.nodes)[op] == 3
    assert all(len(chain) == 1 for chain in update_chains(after).values())


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("accumulate", [True, False])
def test_accumulation_needs_all_of_the_gradient(accumulate: bool) -> None:
    options = recipe("table", "body", "head", accumulation=2)
    before = lowered(language_model(), options, accumulate=accumulate)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    assert not has_logits(after) and op_counts(after.nodes)["insert"] == 5


@pytest.mark.usefixtures("forced")
def test_channel_sparse_head_needs_the_gradient_of_its_channels() -> None:
    options = replace(recipe("head"), trained={"head": Channels(0.5, "first", 0), "body": None})
    before = lowered(language_model(), options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    assert not has_logits(after)
    parts = [node.outputs[0].type.shape for node in after.nodes if node.op == "insert"]
    assert parts == [(WORDS, WIDTH // 2)] * 5


@pytest.mark.usefixtures("forced")
def test_evaluation_counts_instead_of_giving_logits() -> None:
    options = recipe()
    before = cse.run(attach_loss.evaluation(language_model(bias=True), options), options)
    before = fuse.run(before, options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    outputs, _ = evaluate(after, batch())
    logits = evaluate(language_model(bias=True), {"input_ids": batch()["input_ids"]})[0]["logits"]
    shifted = np.concatenate([batch()["labels"][:, 1:], np.full((BATCH, 1), IGNORED)], 1)
    assert list(outputs) == ["loss", "correct", "counted"]
    assert outputs["counted"].tolist() == (shifted != IGNORED).sum(1).tolist() == [4, 1, 4]
    assert outputs["correct"].tolist() == (logits.argmax(-1) == shifted).sum(1).tolist()
    assert not has_logits(after)


CASES: dict[str, tuple[dict[str, bool], Recipe]] = {
    "sgd": ({}, recipe("table", "body", "head")),
    "adamw": ({}, recipe("table", "body", "head", optimizer=AdamW(lr=0.01))),
    "frozen head": ({}, recipe("body")),
    "bias": ({"bias": True}, recipe("head", "bias", loss_options={"label_smoothing": 0.1})),
    "tied": ({"tied": True}, recipe("table", "body")),
    "clipped": ({}, recipe("table", "body", "head", optimizer=SGD(lr=0.1, clip_norm=0.1))),
    "accumulated": ({}, recipe("table", "body", "head", accumulation=2)),
    "channels": ({}, replace(recipe("head"), trained={"head": Channels(0.5, "first", 0), "body": None})),
    "one byte": ({}, recipe("body", "head", optimizer=SGD(lr=0.1, momentum=0.9), state_dtype="int8")),
}


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kept", [2, 5])
@pytest.mark.parametrize(("model", "options"), CASES.values(), ids=CASES)
def test_kept_logits_are_computed_once(
    model: dict[str, bool], options: Recipe, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_vocabulary, "_kept", lambda *_: kept)
    before = lowered(language_model(**model), options)
    after = tile_vocabulary.run(before, options)
    both_agree(before, after)
    logits = [value.type.shape[1] for node in after.nodes for value in node.outputs if "tile_logits" in value.name]
    assert logits == [*[16] * (5 - kept), WORDS - 16 * (5 - kept), *[16] * (5 - kept)]
    untouched = {"frozen head": 0, "channels": WIDTH // 2}
    parts = [v.type.shape for n in after.nodes for v in n.outputs if "tile_weight_gradient" in v.name]
    width = untouched.get(next(name for name, case in CASES.items() if case[1] is options), WIDTH)
    assert sorted(parts) == (sorted([(16, width)] * 4 + [(WORDS - 64, width)]) if width else [])


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("loss_options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}])
def test_frozen_head_takes_some_tokens_at_a_time(
    loss_options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product once; the last tokens are fewer than the others."""
    monkeypatch.setattr(tile_vocabulary, "LEAST_ROWS", 4)
    monkeypatch.setattr(tile_vocabulary, "ROWS_BYTES", 4 * 4 * WORDS)
    options = recipe("body", "bias", loss_options=loss_options)
    before = lowered(language_model(bias=True), options)
    after = tile_vocabulary.run(before, options)
    given = batch()
    if "ignore_index" in loss_options:
        given["labels"] = np.where(given["labels"] == IGNORED, 3, given["labels"])
    both_agree(before, after, given)
    logits = [value.type.shape for node in after.nodes for value in node.outputs if "row_logits" in value.name]
    assert logits == [(4, WORDS)] * 3 + [(3, WORDS)]
    assert sum(node.op == "matmul" for node in after.nodes) == sum(node.op == "matmul" for node in before.nodes) + 2 * 3
    tight = replace(options, transient_target=1)
    assert "cross_entropy_grad_tile" in op_counts(tile_vocabulary.run(before, tight).nodes)


@pytest.mark.usefixtures("forced")
def test_gradient_that_depends_on_the_loss_comes_behind_all_logits() -> None:
    options = recipe("body", "head")
    attached = attach_loss.run(language_model(), options)
    b = Builder(attached)
    squared = b.build({"loss": b("mul", attached.outputs["loss"], attached.outputs["loss"])})
    before = differentiate.run(squared, options)
    for step in (attach_optimizer, slice_updates, cse, dce, fuse):
        before = step.run(before, options)
    assert tile_vocabulary.run(before, options) is before


def test_evaluation_of_one_label_per_sample_keeps_its_logits() -> None:
    b = Builder()
    x = b.input("x", TensorType((4, WIDTH)))
    graph = b.build({"logits": b("matmul", x, parameter(b, "w", 10, WIDTH), transpose_b=True)})
    assert list(attach_loss.evaluation(graph, recipe(loss="cross_entropy")).outputs) == ["loss", "logits"]


@pytest.mark.usefixtures("forced")
def test_logits_with_another_reader_stay() -> None:
    options = recipe("head")
    graph = language_model()
    b = Builder(graph)
    penalty = b("reduce_mean", b("mul", graph.outputs["logits"], graph.outputs["logits"]), axes=(0, 1, 2))
    attached = attach_loss.run(graph, options)
    b = Builder(attached)
    penalty = b("reduce_mean", b("exp", graph.outputs["logits"]), axes=(0, 1, 2))
    both = b.build({"loss": b("add", attached.outputs["loss"], penalty)})
    assert tile_vocabulary.run(both, options) is both


def test_applied_where_it_saves_more_memory_than_it_costs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    options = recipe("body", "head")
    large = lowered(language_model(words=4000, tokens=256, width=64), options)
    monkeypatch.setattr(tile_vocabulary, "TILE_BYTES", 2 << 20)
    assert "cross_entropy_tile" in op_counts(tile_vocabulary.run(large, options).nodes)
    enough = memory.live_peak(reorder.run(large, options), no_workspace)
    assert tile_vocabulary.run(large, replace(options, sufficient=enough)) is large
    one_tile = lowered(language_model(words=16), options)
    assert tile_vocabulary.run(one_tile, options) is one_tile
    monkeypatch.setattr(tile_vocabulary, "TILE_BYTES", 4 * 16 * BATCH * TOKENS)
    cheap = lowered(language_model(words=2000), options)  # its products take less time than the calls of the tiles
    assert tile_vocabulary.run(cheap, options) is cheap


def test_target_says_how_many_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_vocabulary, "TILE_BYTES", 2 << 20)
    options = recipe("body", "head")
    before = lowered(language_model(words=4000, tokens=256, width=64), options)
    (head,) = tile_vocabulary._heads(before)
    smallest = tile_vocabulary.tiled(before, head, 0)
    least = reorder.least_peak(smallest, options)
    tile = 4 * head.tokens * head.tiles[0][1]
    assert len(head.tiles) == 6
    for kept in (0, 1, 4, 6):
        for target in (least + kept * tile, least + (kept + 1) * tile - 1):
            after = tile_vocabulary.run(before, replace(options, transient_target=target))
            products = sum("tile_logits" in value.name for node in after.nodes for value in node.outputs)
            assert products == 2 * (6 - kept) + (kept > 0)
            assert memory.live_peak(reorder.run(after, options), no_workspace) <= 1.1 * least + kept * tile


def test_without_a_target_logits_are_kept_up_to_a_multiple_of_the_smallest_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tile_vocabulary, "TILE_BYTES", 2 << 20)
    options = recipe("body", "head")
    before = lowered(language_model(words=4000, tokens=256, width=64), options)
    (head,) = tile_vocabulary._heads(before)
    least = reorder.least_peak(tile_vocabulary.tiled(before, head, 0), options)
    peaks = []
    for growth in (1, 3, 4):
        monkeypatch.setattr(tile_vocabulary, "MOST_GROWTH", growth)
        after = tile_vocabulary.run(before, options)
        peaks.append(memory.live_peak(reorder.run(after, options), no_workspace))
        assert peaks[-1] <= 1.1 * growth * least
    assert peaks[0] < peaks[1] < peaks[2]
    monkeypatch.setattr(tile_vocabulary, "FREE_SHARE", 10.0)  # computing them again may cost whatever it does
    cheap = tile_vocabulary.run(before, options)
    assert memory.live_peak(reorder.run(cheap, options), no_workspace) == peaks[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_of_a_tile_agrees_with_finite_differences(smoothing: float) -> None:
    """Of the loss that the tiles give, in a random direction of one tile's logits."""
    load_families()
    random = np.random.default_rng(4)
    logits, direction = random.standard_normal((2, 6, 40))
    labels = np.array([0, 17, 39, IGNORED, 16, 31])
    direction[:, :16] = direction[:, 32:] = 0
    attrs = {"classes": 40, "label_smoothing": smoothing}

    def running(x: Array) -> Array:
        known: tuple[Array, ...] = ()
        for start in (0, 16, 32):
            tile = x[:, start : start + 16]
            known = (np.asarray(OPS["cross_entropy_tile"].reference(tile, labels, *known, start=start)),)
        return known[0]

    def loss(x: Array) -> float:
        return float(np.asarray(OPS["cross_entropy_of_tiles"].reference(running(x), labels, **attrs)))

    numeric = (loss(logits + 1e-5 * direction) - loss(logits - 1e-5 * direction)) / 2e-5
    operands = (np.float64(1.0), logits[:, 16:32], labels, running(logits))
    gradient = OPS["cross_entropy_grad_tile"].reference(*operands, start=16, **attrs)
    np.testing.assert_allclose((gradient * direction[:, 16:32]).sum(), numeric, rtol=1e-6)


def test_tile_of_logits_that_are_all_masked_counts_for_nothing() -> None:
    load_families()
    tile = OPS["cross_entropy_tile"].reference
    labels = np.array([2])
    known = np.asarray(tile(np.full((1, 2), -np.inf), labels, start=0))
    known = np.asarray(tile(np.array([[1.0, 3.0]]), labels, known, start=2))
    expected = [3.0, 1 + np.exp(-2.0), 1.0, -np.inf, 3.0]
    np.testing.assert_allclose(known[0], expected)


def test_reader_of_the_old_weight_comes_before_the_first_link() -> None:
    """A chain of partial updates runs in the state's buffer only if nothing reads the state any more."""
    b = Builder()
    g = b.input("g", TensorType((2, 3)))
    p = parameter(b, "p", 4, 3)
    rate = b.constant(0.1)
    first = b("sgd", p, g, rate, start=0)
    late = b("exp", p)
    last = b("sgd", first, b("add", g, b("slice", first, axis=0, start=2, stop=4)), rate, start=2)
    graph = b.build({"late": late}, {p: last})
    links = tuple(node.outputs[0] for node in graph.nodes if node.op == "sgd")
    assert update_chains(graph)[p] == links
    assert overwritten(graph) == {links[1]: (p, p)}  # p is still read behind the first link, which needs its own buffer
    scheduled = reorder.run(graph, recipe())
    assert scheduled.nodes[0].op == "exp"
    assert overwritten(scheduled) == {links[0]: (p, p), links[1]: (p, links[0])}
    assert memory.run(scheduled, no_workspace).buffer[links[0]].state is p


def test_a_link_that_is_a_result_keeps_a_buffer_of_its_own() -> None:
    b = Builder()
    g = b.input("g", TensorType((2, 3)))
    p = parameter(b, "p", 4, 3)
    first = b("sgd", p, g, b.constant(0.1), start=0)
    last = b("sgd", first, g, b.constant(0.1), start=2)
    scheduled = reorder.run(b.build({"half": first}, {p: last}), recipe())
    half, new = scheduled.outputs["half"], scheduled.updates[p]
    assert update_chains(scheduled)[p] == (new,)
    buffer = memory.run(scheduled, no_workspace).buffer
    assert buffer[half].state is None and buffer[new].state is p
