"""Images as cameras give them: inputs of bytes, which the model converts by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pockc
from benchmarks import runner, zoo
from pockc.errors import UserError
from pockc.parity import verify_against_torch
from pockc.session import Session

pytestmark = [pytest.mark.torch, pytest.mark.native]

SMALL = zoo.SMALL["mcunet_5fps"]


def test_ten_steps_agree_with_pytorch() -> None:
    model, inputs = zoo.mcunet_5fps(**SMALL, uint8_images=True)

    parity = verify_against_torch(model, inputs, scheme="sparse", optimizer=pockc.SGD(lr=3e-3, momentum=0.9))

    assert parity.passed, parity


def test_the_arena_has_a_quarter_of_the_images() -> None:
    options: dict[str, Any] = {"scheme": "head", "optimizer": pockc.SGD(lr=0.1), "entries": ["train_step"]}

    planned = {}
    for uint8_images in (False, True):
        model, inputs = zoo.mcunet_5fps(batch_size=8, num_classes=10, uint8_images=uint8_images)
        planned[uint8_images] = pockc.build(model, inputs, **options).memory

    images = 8 * 3 * 128 * 128
    assert planned[False].arena_bytes - planned[True].arena_bytes >= 2 * images  # of the 3 that the inputs are smaller


def test_pock_run_trains_on_bytes_as_on_floats(tmp_path: Path) -> None:
    """The same numbers, given as bytes to a model that scales them, and scaled: the same losses."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (6, 3, 32, 32), np.uint8), random.integers(0, 10, 6)
    reports = []
    for dtype in (np.uint8, np.float32):
        model, inputs = zoo.mcunet_5fps(**SMALL, uint8_images=dtype is np.uint8)
        pixels = images if dtype is np.uint8 else (images.astype(np.float32) / np.float32(127.5) - 1)
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        pockc.build(model, inputs, scheme="sparse", optimizer=pockc.SGD(lr=1e-2)).save(folder / "model.pock")
        np.savez(folder / "data.npz", pixel_values=pixels, labels=labels)
        report = runner.train(folder / "model.pock", folder / "data.npz", folder / "c.st", quiet=True, epochs=2)
        reports.append([epoch["loss"] for epoch in report["epochs"]])

    assert reports[0] == pytest.approx(reports[1], rel=1e-6)


def test_a_session_takes_bytes_alone(tmp_path: Path) -> None:
    model, inputs = zoo.mcunet_5fps(**SMALL, uint8_images=True)
    pockc.build(model, inputs, scheme="head", optimizer=pockc.SGD(lr=0.1)).save(tmp_path / "model.pock")

    with Session(tmp_path / "model.pock") as session:
        logits = session.infer(pixel_values=inputs["pixel_values"].numpy())
        with pytest.raises(UserError, match="pixel_values"):
            session.infer(pixel_values=np.zeros((2, 3, 32, 32), np.float32))

    assert isinstance(logits, np.ndarray)
    np.testing.assert_allclose(logits, model(**inputs).detach().numpy(), rtol=1e-4, atol=1e-4)


class Wrapping(nn.Module):
    """Computes with bytes, where 255 + 1 is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).float()


def test_arithmetic_of_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"its result is uint8\. Supported: float32"):
        pockc.build(Wrapping(), {"x": torch.zeros(2, 3, dtype=torch.uint8)}, loss="mse", scheme="full")
