"""Programs whose frozen prefix runs in eight bits: one prefix for all entries, exact, smaller, and trainable."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pockc.build import Calibration, build
from pockc.errors import UserError
from pockc.golden import golden_vectors
from pockc.interp import evaluate
from pockc.ir import Array, Graph, op_counts
from pockc.optim import SGD
from pockc.program import Program
from pockc.session import Session
from tests.shell import Shell

pytestmark = [pytest.mark.torch, pytest.mark.native]
BATCH, PIXELS, CLASSES = 4, 16, 5


class Block(nn.Module):
    """Inverted bottleneck with batch norms and a residual."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return] # of a Sequential


class Net(nn.Module):
    """A stem, two frozen blocks, a pool, dropout, a trained block and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.pool = nn.MaxPool2d(4)
        self.frozen = nn.Sequential(Block(8, 24), Block(8, 24))
        self.dropout = nn.Dropout(dropout)
        self.block = Block(8, 24)
        self.head = nn.Linear(8, CLASSES)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_var is not None
                nn.init.uniform_(norm.bias, -0.3, 0.5)
                nn.init.uniform_(norm.running_var, 0.2, 0.8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.pool(self.frozen(self.stem(pixel_values)))
        logits: Tensor = self.head(self.block(self.dropout(x)).mean((2, 3)))
        return logits


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, PIXELS, PIXELS)).astype(np.float32)


def compile_model(model: nn.Module, calibration: Calibration = None, **options: Any) -> Program:
    example = {"pixel_values": torch.from_numpy(images(BATCH))}
    if calibration is not None:
        options |= {"prefix_dtype": "int8", "calibration": calibration}
    return build(model, example, optimizer=SGD(lr=0.2), scheme="last-k:7", **options)


def samples() -> dict[str, Array]:
    return {"pixel_values": images(32, seed=9)}


@cache
def compiled(eight_bits: bool) -> Program:
    return compile_model(Net().eval(), samples() if eight_bits else None)


def batch(seed: int) -> dict[str, Array]:
    return {"pixel_values": images(BATCH, seed), "labels": np.random.default_rng(seed).integers(0, CLASSES, BATCH)}


def prefix_of(graph: Graph) -> list[str]:
    """The calls on codes, by what is the same in entries of all micro-batches: op, numbers and bytes of constants."""
    found = {}
    for node in graph.nodes:
        if node.op.endswith(("int8", "quantize")):
            constants = [graph.states[v].data for v in node.inputs if v in graph.states]
            key = f"{node.op} {dict(node.attrs)} {[data.tobytes() for data in constants if data is not None]}"
            found[key] = node.origin.module
    return sorted(found)


def test_all_entries_have_the_same_prefix() -> None:
    entries = compiled(eight_bits=True).entries
    counts = {name: op_counts(graph.nodes) for name, graph in entries.items()}

    assert counts["infer"]["conv2d_int8"] % 7 == 0  # the stem and two blocks, in each micro-batch
    assert {"quantize", "max_pool2d_int8", "add_int8", "dequantize"} <= counts["train_step"].keys()
    assert prefix_of(entries["train_step"]) == prefix_of(entries["eval_step"]) == prefix_of(entries["infer"])


def test_a_model_with_dropout_has_one_prefix_too() -> None:
    entries = compile_model(Net(dropout=0.3).train(), samples()).entries

    assert "dropout_mask" in op_counts(entries["train_step"].nodes)
    assert prefix_of(entries["train_step"]) == prefix_of(entries["infer"])


@pytest.mark.parametrize("reference_kernels", [False, True])
def test_the_runtime_and_the_interpreter_agree(reference_kernels: bool, tmp_path: Path) -> None:
    program = compiled(eight_bits=True)
    program.save(tmp_path / "model.pock")
    given = batch(3)
    with Session(tmp_path / "model.pock", reference_kernels=reference_kernels) as session:
        evaluated = session.eval_step(**given)
        logits = session.run("infer", pixel_values=given["pixel_values"])["logits"]
        loss = session.train_step(**given)
    expected, _ = evaluate(program.entries["train_step"], given)

    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(evaluated["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(evaluated["logits"], logits, rtol=1e-5, atol=1e-6)


def test_logits_are_close_to_those_of_float_activations() -> None:
    given = {"pixel_values": images(BATCH, seed=5)}
    exact, found = (evaluate(compiled(bits).entries["infer"], given)[0]["logits"] for bits in (False, True))

    assert 0 < np.abs(found - exact).max() < 0.05 * np.ptp(exact)


def test_training_lowers_the_loss_as_with_float_activations(tmp_path: Path) -> None:
    losses = {}
    for eight_bits in (False, True):
        compiled(eight_bits).save(tmp_path / "model.pock")
        with Session(tmp_path / "model.pock") as session:
            losses[eight_bits] = [session.train_step(**batch(step % 4)) for step in range(60)]
    first, last = (np.mean(losses[True][part]) for part in (slice(4), slice(-4, None)))

    assert last < 0.8 * first
    assert abs(last - np.mean(losses[False][-4:])) < 0.1 * first


def test_memory_falls_and_is_what_the_runtime_takes(tmp_path: Path) -> None:
    before, after = compiled(eight_bits=False), compiled(eight_bits=True)
    after.save(tmp_path / "model.pock")
    with Session(tmp_path / "model.pock") as session:
        assert session.memory.arena_bytes == after.arena_bytes
        session.train_step(**batch(0))
        assert session.memory.used_peak_bytes <= after.arena_bytes

    assert after.arena_bytes < before.arena_bytes
    assert after.memory.by_kind["frozen_parameters"] < 0.6 * before.memory.by_kind["frozen_parameters"]


def test_micro_batches_of_the_prefix_give_the_same_bits(tmp_path: Path) -> None:
    results = {}
    for disabled in (frozenset[str](), frozenset({"split-prefix"})):
        program = compile_model(Net().eval(), samples(), disabled=disabled)
        program.save(tmp_path / "model.pock")
        sizes = {n.outputs[0].type.shape[0] for n in program.entries["train_step"].nodes if n.op == "conv2d_int8"}
        with Session(tmp_path / "model.pock") as session:
            results[min(sizes)] = session.train_step(**batch(1))

    assert len(results) == 2  # the first in micro-batches, the second not
    assert len(set(results.values())) == 1


def test_a_budget_is_kept_and_changes_no_code() -> None:
    free = compiled(eight_bits=True)
    tight = compile_model(Net().eval(), samples(), memory_budget=int(0.9 * free.memory.peak_bytes))

    assert tight.memory.peak_bytes <= 0.9 * free.memory.peak_bytes
    assert set(prefix_of(tight.entries["train_step"])) == set(prefix_of(free.entries["train_step"]))


def test_full_backpropagation_beside_it_has_no_codes() -> None:
    program = compile_model(Net().eval(), samples(), compare_full=True)

    assert program.metadata["full_memory"]["peak_bytes"] > program.memory.peak_bytes


def test_golden_vectors_can_be_made() -> None:
    assert golden_vectors(compiled(eight_bits=True), {"pixel_values": images(BATCH)})


def test_the_example_serves_where_the_user_says_so() -> None:
    program = compile_model(Net().eval(), "example")

    assert program.metadata["prefix_dtype"] == "int8"
    assert "conv2d_int8" in op_counts(program.entries["train_step"].nodes)


def test_messages_about_options_that_do_not_fit(golden: Callable[..., None]) -> None:
    attempts: tuple[dict[str, Any], ...] = (
        {"prefix_dtype": "int8"},
        {"prefix_dtype": "int4", "calibration": "example"},
        {"calibration": "example"},
        {"prefix_dtype": "int8", "calibration": "data.npz"},
        {"prefix_dtype": "int8", "calibration": "example", "batchnorm": "train"},
        {"prefix_dtype": "int8", "calibration": "example", "scheme": "full"},
        {"prefix_dtype": "int8", "calibration": {"images": images(2)}},
    )
    example = {"pixel_values": torch.from_numpy(images(BATCH))}
    lines = []
    for options in attempts:
        with pytest.raises(UserError) as caught:
            build(Net().eval(), example, **{"scheme": "head", **options})
        lines.append(f"{caught.value}\n")
    golden("".join(lines))


MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval(), (torch.randn(2, 3, 8, 8),)
"""


def test_samples_come_from_a_file(shell: Shell) -> None:
    (shell.folder / "net.py").write_text(MODEL)
    np.savez(shell.folder / "data.npz", input=np.ones((3, 3, 8, 8), np.uint8), labels=np.zeros(3, np.int64))
    options = ("build", "net.py:make", "--scheme", "head", "--prefix-dtype", "int8")

    code, out, err = shell(*options, "--calibrate", "data.npz")

    assert (code, err) == (0, "")
    assert "frozen prefix" in out
    with Session(shell.folder / "out" / "model.pock") as session:
        assert session.metadata["prefix_dtype"] == "int8"
        assert "data.npz" in session.metadata["built_from"]["sources"]
        assert "scale=0.003921" in session.metadata["text"]["infer"]  # of ones alone: 1 / 255
    code, _, err = shell(*options, "--calibrate", "nowhere.npz")
    assert code == 2
    assert "cannot read calibration samples from nowhere.npz" in err
