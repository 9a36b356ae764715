"""Language models with losses over tiles of the vocabulary, as programs: trajectories, evaluation, entries."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pockc
from benchmarks import runner, zoo
from pockc import abi
from pockc.artifact import read
from pockc.parity import verify_against_torch
from pockc.passes import tile_vocabulary

pytestmark = [pytest.mark.torch, pytest.mark.native]

WORDS = 150  # the last of its tiles is narrower
SMALL = {"batch_size": 2, "sequence_length": 8, "layers": 2, "vocab_size": WORDS}


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 words, whatever they cost."""
    monkeypatch.setattr(tile_vocabulary, "TILE_BYTES", 4 * 32 * 72)
    monkeypatch.setattr(tile_vocabulary, "_worthwhile", lambda *_: True)
    monkeypatch.setattr(tile_vocabulary, "_kept", lambda *_: 2)


def model_of(name: str) -> Any:
    return zoo.ZOO[name](**SMALL, width=64 if name == "llama_tiny" else 72)


def build(name: str, **options: Any) -> pockc.Program:
    model, inputs = model_of(name)
    return pockc.build(model, inputs, loss="causal_lm", optimizer=pockc.SGD(lr=0.1), **options)


def ops_of(path: Path, entry: str) -> list[str]:
    return [call.op for call in read(path).entries[entry].calls]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("name", "scheme", "optimizer", "accumulation"),
    [
        ("llama_tiny", "full", pockc.AdamW(lr=3e-4), 1),
        ("llama_tiny", "sparse", pockc.SGD(lr=3e-3, momentum=0.9), 1),
        ("llama_tiny", "head", pockc.Lion(lr=1e-4, weight_decay=0.1), 1),
        ("llama_tiny", "full", pockc.AdamW(lr=3e-4, clip_norm=0.5), 2),
        ("smollm2_135m", "full", pockc.SGD(lr=3e-3, momentum=0.9), 1),
    ],
)
def test_ten_steps_over_tiles_agree_with_pytorch(
    name: str, scheme: str, optimizer: pockc.Optimizer, accumulation: int
) -> None:
    model, inputs = model_of(name)
    options: dict[str, Any] = {"scheme": scheme, "loss": "causal_lm", "accumulation": accumulation}
    parity = verify_against_torch(model, inputs, optimizer=optimizer, steps=10, seed=1, **options)
    assert parity.passed, parity


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("optimizer", [pockc.SGD(lr=3e-3, momentum=0.9), pockc.AdamW(lr=3e-4), pockc.Lion(lr=1e-4)])
def test_slots_of_one_byte_train_as_without_tiles(optimizer: pockc.Optimizer, tmp_path: Path) -> None:
    model, inputs = model_of("llama_tiny")
    ids = np.random.default_rng(0).integers(0, WORDS, (2, 8))
    losses = []
    for name, disabled in (("tiles", frozenset[str]()), ("whole", frozenset({"tile-vocabulary"}))):
        path = tmp_path / f"{name}.pock"
        pockc.build(model, inputs, "causal_lm", optimizer, state_dtype="int8", disabled=disabled).save(path)
        ops = ops_of(path, "train_step")
        assert ("cross_entropy_tile" in ops) == (name == "tiles")
        assert {"momentum8", "adam8", "lion8"}.intersection(ops)
        assert {"sgd", "momentum", "adam", "lion"}.isdisjoint(ops)
        with pockc.Session(path) as session:
            losses.append([session.train_step(input_ids=ids, labels=ids) for _ in range(10)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.usefixtures("tiles")
def test_tiles_give_the_same_bits_with_any_number_of_threads(tmp_path: Path) -> None:
    path = tmp_path / "model.pock"
    build("llama_tiny").save(path)
    assert "cross_entropy_grad_tile" in ops_of(path, "train_step")
    random = np.random.default_rng(0)
    ids = random.integers(0, WORDS, (2, 8))
    found = []
    for threads in (1, 2, 4):
        with pockc.Session(path, threads=threads) as session:
            losses = [session.train_step(input_ids=ids, labels=ids) for _ in range(3)]
            found.append((losses, session.parameters()["lm_head.weight"]))
    for losses, weight in found[1:]:
        assert losses == found[0][0]
        assert weight.tobytes() == found[0][1].tobytes()


@pytest.mark.usefixtures("tiles")
def test_the_pass_can_be_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "model.pock"
    build("llama_tiny", disabled=frozenset({"tile-vocabulary"})).save(path)
    assert "cross_entropy" in ops_of(path, "train_step")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("disabled", [frozenset(), frozenset({"tile-vocabulary"})], ids=["tiles", "whole"])
def test_pock_run_prints_the_accuracy_per_token(tmp_path: Path, disabled: frozenset[str]) -> None:
    """Five samples in batches of two: the last batch is filled up with one that must not count twice."""
    path, data = tmp_path / "model.pock", tmp_path / "data.npz"
    build("llama_tiny", disabled=disabled).save(path)
    ids = np.random.default_rng(3).integers(0, WORDS, (5, 8))
    with pockc.Session(path) as session:
        parts = [session.run("infer", input_ids=ids[rows])["logits"] for rows in ([0, 1], [2, 3], [4, 0])]
    predicted = np.concatenate(parts)[:5]
    labels = np.full((5, 8), -100)
    labels[:, 1:] = predicted.argmax(-1)[:, :-1]
    labels[:, 2::3] = (labels[:, 2::3] + 1) % WORDS  # wrong
    labels[2, 4] = -100
    np.savez(data, input_ids=ids, labels=labels)

    counted = labels[:, 1:] != -100
    right = (predicted.argmax(-1)[:, :-1] == labels[:, 1:]) & counted
    expected = right.sum() / counted.sum()
    assert 0 < expected < 1
    assert runner.evaluate(path, data)["accuracy"] == pytest.approx(expected, rel=1e-12)


def test_entries_that_are_left_out_take_no_memory(tmp_path: Path) -> None:
    everything = build("llama_tiny")
    lean = build("llama_tiny", entries=("train_step",))
    assert list(everything.entries) == ["train_step", "eval_step", "infer"]
    assert list(lean.entries) == ["train_step"]
    assert lean.arena_bytes <= everything.arena_bytes
    assert lean.arena_bytes == lean.state_bytes + lean.placements["train_step"].nbytes


def test_program_without_inference_says_so_and_tests_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.pock"
    _, inputs = model_of("llama_tiny")
    program = build("llama_tiny", entries=["train_step", "eval_step"])
    program.save(path, golden={name: np.asarray(value) for name, value in inputs.items()})
    with (
        pockc.Session(path) as session,
        pytest.raises(pockc.UserError, match=r"no entry 'infer'.*train_step, eval_step"),
    ):
        session.infer(**inputs)
    np.savez(tmp_path / "data.npz", input_ids=np.zeros((2, 8), np.int64))
    pock_run = str(abi.runtime_file("pock-run"))
    command = [pock_run, "infer", str(path), "--data", str(tmp_path / "data.npz"), "--output", str(tmp_path / "o.npz")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "the program has no entry `infer`: it has train_step, eval_step" in refused.stderr
    tested = subprocess.run([pock_run, "selftest", str(path)], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout
    assert "eval_step/correct" in tested.stdout and "infer" not in tested.stdout


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("train_step", "eval"), "no entry 'eval'.*train_step, eval_step, infer.*eval_step"),
        (("eval_step",), "leave out train_step"),
        ("train_step", "is the text 'train_step'"),
    ],
)
def test_wrong_entries_are_told(entries: Any, message: str) -> None:
    with pytest.raises(pockc.UserError, match=message):
        build("llama_tiny", entries=entries)
