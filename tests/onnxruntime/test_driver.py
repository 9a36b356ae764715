"""pock-run-onnxruntime, which has no Python in it, against the session in Python."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pockc.session import open_session
from tests.native.kernels import build_target
from tests.onnxruntime.models import batch, saved

pytestmark = [pytest.mark.torch, pytest.mark.native]

(LIBRARY,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*")


@cache
def driver() -> Path:
    return build_target("pock-run-onnxruntime", "-DPOCKC_ONNXRUNTIME=ON")


def run(*words: object, library: Path = LIBRARY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "POCKC_ONNXRUNTIME": str(library)}
    return subprocess.run(
        [str(driver()), *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    saved(folder)
    only = batch(0)
    np.savez(folder / "train.npz", x=only["x"], labels=only["labels"])  # one batch: its order does not matter
    return folder


def test_training_is_that_of_the_session_in_python(folder: Path) -> None:
    done = run("train", folder / "model.pock", "--data", folder / "train.npz", "--epochs", 3, "--save", folder / "c")
    assert done.returncode == 0, done.stderr
    assert "epoch 3/3" in done.stdout

    with open_session(folder / "model.pock") as ours, open_session(folder / "model.pock") as loaded:
        for _ in range(3):
            ours.train_step(**batch(0))
        loaded.load_checkpoint(folder / "c")
        for name, array in ours.parameters().items():
            np.testing.assert_allclose(loaded.state(name), array, rtol=1e-4, atol=1e-5)
        assert loaded.state("pockc.step") == 3


def test_a_checkpoint_of_python_is_evaluated(folder: Path) -> None:
    with open_session(folder / "model.pock") as session:
        for _ in range(5):
            session.train_step(**batch(0))
        session.save_checkpoint(folder / "python.ckpt")
        loss = float(session.eval_step(**batch(0))["loss"])

    done = run("eval", folder / "model.pock", "--data", folder / "train.npz", "--checkpoint", folder / "python.ckpt")
    assert done.returncode == 0, done.stderr
    assert f"loss {loss:.4f}" in done.stdout


def test_bench_times_steps(folder: Path) -> None:
    done = run("bench", folder / "model.pock", "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert "ms/step median" in done.stdout


def test_missing_library_and_models_are_told(folder: Path, tmp_path: Path) -> None:
    data = ("--data", folder / "train.npz")
    missing = run("train", folder / "model.pock", *data, library=tmp_path / "none.so")
    assert missing.returncode == 1 and "cannot load ONNX Runtime" in missing.stderr

    (tmp_path / "model.pock").write_bytes((folder / "model.pock").read_bytes())
    alone = run("train", tmp_path / "model.pock", *data)
    assert alone.returncode == 1 and "train_step.onnx" in alone.stderr
