"""pock-run-onnxruntime, which has no Python in it, against the session in Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pockc.build import build
from pockc.errors import UserError
from pockc.session import open_session
from tests.native.kernels import build_target, installed
from tests.onnxruntime.models import batch, examples, mobile_net, saved
from tests.shell import Shell

pytestmark = [pytest.mark.torch, pytest.mark.native]

(LIBRARY,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*")


@cache
def driver() -> Path:
    return installed("pock-run-onnxruntime") or build_target("pock-run-onnxruntime", "-DPOCKC_ONNXRUNTIME=ON")


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


def test_selftest_judges_what_the_driver_computes(tmp_path: Path) -> None:
    program = build(mobile_net(), examples(), target="onnxruntime", entries=("train_step", "infer"))
    program.save(tmp_path / "model.pock", golden={name: x.numpy() for name, x in examples().items()})

    good = run("selftest", tmp_path / "model.pock")
    shutil.copy2(tmp_path / "infer.onnx", tmp_path / "train_step.onnx")
    bad = run("selftest", tmp_path / "model.pock")

    assert good.returncode == 0 and "selftest passed" in good.stdout, good.stdout + good.stderr
    assert bad.returncode == 1


def test_build_leaves_driver_and_page_beside_the_models(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pockc.targets.native.delivery.runtime_file", lambda name: driver().with_name(name))

    code, out, err = shell("build", "model.py:make", "--target", "onnxruntime", "-o", "out")

    assert (code, err) == (0, "") and "pock-run-onnxruntime (" in out
    here = shell.folder / "out"
    assert {"model.pock", "train_step.onnx", "eval_step.onnx", "infer.onnx"} < {file.name for file in here.iterdir()}
    assert "pip download onnxruntime==1." in (here / "README.md").read_text()
    beside = {**os.environ, "POCKC_ONNXRUNTIME": str(LIBRARY)}
    command = [str(here / "pock-run-onnxruntime"), "selftest", str(here / "model.pock")]
    done = subprocess.run(command, env=beside, capture_output=True, text=True, check=False)
    assert "selftest passed" in done.stdout, done.stderr


def test_build_without_the_driver_says_so_and_how_to_make_it(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise UserError(f"the compiled runtime ({name}) is not there")

    monkeypatch.setattr("pockc.targets.native.delivery.runtime_file", missing)

    code, out, _ = shell("build", "model.py:make", "--target", "onnxruntime", "-o", "out")

    assert code == 0
    assert "Note: the compiled runtime (pock-run-onnxruntime) is not there" in out
    assert "--target pock-run-onnxruntime" in (shell.folder / "out" / "README.md").read_text()


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
