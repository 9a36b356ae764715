"""Optimizer state in one byte per element: its codes, its memory, and what training with it reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pockc.build import build
from pockc.errors import UserError
from pockc.ir import Array
from pockc.ops.optimizer8 import BLOCK, decode_momentum, decode_square, encode_momentum, encode_square
from pockc.optim import SGD, Adam, AdamW, Lion, Optimizer
from pockc.program import Program
from pockc.scheme import Scheme
from pockc.session import Session

OPTIMIZERS = [SGD(lr=0.05, momentum=0.9), Adam(lr=2e-3), AdamW(lr=2e-3), Lion(lr=3e-4)]
TEN_STEPS, CHANGE = 1e-3, 0.05  # relative: of each loss, and of each tensor's change
BATCH, FEATURES, HIDDEN, CLASSES = 32, 20, 48, 5


# --- Codes ------------------------------------------------------------------------------------------------------------


def wide(count: int) -> Array:
    """Values of both signs over six decades."""
    random = np.random.default_rng(0)
    return (random.choice((-1, 1), count) * 10 ** random.uniform(-6, 0, count)).astype(np.float32)


def test_momentum_codes_are_off_by_half_a_level_at_most() -> None:
    m = wide(1000)
    codes, scale = encode_momentum(m)
    assert (codes.shape, scale.shape) == ((1000,), (4,))
    error = np.abs(decode_momentum(codes, scale) - m)
    largest = np.repeat(scale, BLOCK)[:1000]
    # A level c is off by at most (c + 1/2)^2 - c^2 = c + 1/4 in units of the largest / 127^2.
    level = 127 * np.sqrt(np.abs(m) / largest)
    assert np.all(error <= 1.001 * largest * (level + 0.75) / 127**2)
    np.testing.assert_array_equal(np.abs(decode_momentum(codes, scale)).reshape(-1)[:BLOCK].max(), scale[0])


def test_codes_of_decoded_values_are_the_same_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    scale = np.asarray([0.37], np.float32)
    signed = np.where(codes == 128, 127, codes).astype(np.uint8)  # -128 is not a code
    np.testing.assert_array_equal(encode_momentum(decode_momentum(signed, scale))[0], signed)
    np.testing.assert_array_equal(encode_square(decode_square(codes, scale))[0], codes)


def test_a_positive_second_moment_never_becomes_zero() -> None:
    v = wide(1000) ** 2
    v[7] = 0
    found = decode_square(*encode_square(v))
    assert found[7] == 0
    assert np.all(np.delete(found, 7) > 0)
    large = v > 1e-4 * v.max()
    np.testing.assert_allclose(np.sqrt(found[large]), np.sqrt(v[large]), rtol=0.05)


def test_a_block_of_zeros_stays_zero() -> None:
    zeros = np.zeros((3, 100), np.float32)
    for codes, scale in (encode_momentum(zeros), encode_square(zeros)):
        assert not codes.any()
        assert not scale.any()


# --- Programs ---------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                         nn.Linear(HIDDEN, CLASSES)).eval()  # fmt: skip


def compiled(optimizer: Optimizer, state_dtype: Any, scheme: str | Scheme = "full") -> Program:
    example = {"input": torch.zeros(BATCH, FEATURES)}
    return build(network(), example, optimizer=optimizer, scheme=scheme, state_dtype=state_dtype)


def batch(step: int) -> dict[str, Array]:
    """Samples of overlapping clusters: a task that no model solves to a loss of zero."""
    centres = np.random.default_rng(1).standard_normal((CLASSES, FEATURES))
    random = np.random.default_rng(100 + step)
    labels = random.integers(0, CLASSES, BATCH)
    inputs = 0.5 * centres[labels] + random.standard_normal((BATCH, FEATURES))
    return {"input": inputs.astype(np.float32), "labels": labels}


def train(program: Program, folder: Path, steps: int) -> tuple[list[float], dict[str, Array]]:
    path = folder / "model.pock"
    program.save(path)
    with Session(path) as session:
        losses = [session.train_step(**batch(step)) for step in range(steps)]
        return losses, session.parameters()


def slot_bytes(program: Program) -> int:
    step = program.entries["train_step"]
    return sum(value.type.nbytes for value, state in step.states.items() if state.kind == "slot")


@pytest.mark.torch
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda x: type(x).__name__)
def test_slots_take_a_quarter_of_the_bytes(optimizer: Optimizer) -> None:
    plain, small = compiled(optimizer, "f32"), compiled(optimizer, "int8")
    assert 0.25 < slot_bytes(small) / slot_bytes(plain) < 0.27
    assert small.state_bytes < plain.state_bytes
    assert small.metadata["state_dtype"] == "int8"
    for entry in small.entries.values():
        assert not any(node.op in ("momentum", "adam", "lion") for node in entry.nodes)


@pytest.mark.torch
@pytest.mark.native
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda x: type(x).__name__)
def test_ten_steps_stay_near_those_with_f32_state(optimizer: Optimizer, tmp_path: Path) -> None:
    wanted, exact = train(compiled(optimizer, "f32"), tmp_path, 10)
    losses, found = train(compiled(optimizer, "int8"), tmp_path, 10)
    np.testing.assert_allclose(losses, wanted, rtol=TEN_STEPS)
    initial = {name: value.numpy() for name, value in network().state_dict().items()}
    for name, value in exact.items():
        change = np.linalg.norm(value - initial[name])
        assert np.linalg.norm(found[name] - value) < CHANGE * change, name


@pytest.mark.torch
@pytest.mark.native
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda x: type(x).__name__)
def test_two_hundred_steps_reach_the_same_loss(optimizer: Optimizer, tmp_path: Path) -> None:
    wanted, _ = train(compiled(optimizer, "f32"), tmp_path, 200)
    found, _ = train(compiled(optimizer, "int8"), tmp_path, 200)
    assert np.mean(wanted[-50:]) < 0.8 * wanted[0]
    assert abs(np.mean(found[-50:]) / np.mean(wanted[-50:]) - 1) < 0.02


@pytest.mark.torch
@pytest.mark.native
def test_resumed_training_continues_to_the_last_bit(tmp_path: Path) -> None:
    file, checkpoint = tmp_path / "model.pock", tmp_path / "a.ckpt"
    compiled(AdamW(lr=1e-2), "int8").save(file)
    with Session(file) as first, Session(file, threads=2) as second:
        for step in range(5):
            first.train_step(**batch(step))
        first.save_checkpoint(checkpoint)
        second.load_checkpoint(checkpoint)
        for step in range(5, 9):
            assert first.train_step(**batch(step)) == second.train_step(**batch(step))
        for name in ("2.weight", "2.weight.adam_m", "2.weight.adam_m.scale", "2.weight.adam_v"):
            np.testing.assert_array_equal(first.state(name), second.state(name))


@pytest.mark.torch
@pytest.mark.native
def test_a_channel_sparse_update_keeps_codes_of_its_channels_alone(tmp_path: Path) -> None:
    scheme = tmp_path / "scheme.yaml"
    scheme.write_text("name: part\nupdate:\n  - tensors: '2.weight'\n    channels: {fraction: 0.25, select: first}\n")
    program = compiled(AdamW(lr=1e-2), "int8", str(scheme))
    losses, found = train(program, tmp_path, 30)
    assert slot_bytes(program) == 2 * (HIDDEN * HIDDEN // 4 + 4 * 3)  # 576 codes are 3 blocks
    initial = network().state_dict()["2.weight"].numpy()
    assert np.all(found["2.weight"][:, HIDDEN // 4 :] == initial[:, HIDDEN // 4 :])
    assert np.all(found["2.weight"][:, : HIDDEN // 4] != initial[:, : HIDDEN // 4])
    assert np.mean(losses[-5:]) < losses[0]


@pytest.mark.torch
def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="SGD without momentum keeps no state"):
        compiled(SGD(lr=0.1), "int8")
    with pytest.raises(UserError, match="f32, int8"):
        compiled(AdamW(), "int4")
