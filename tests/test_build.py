"""Whole builds of small models: every option of `pockc.build` against PyTorch, and the bit-exactness of resuming."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pockc
from pockc.parity import verify_against_torch


class ConvNet(nn.Module):
    """Two convolutions with batch norm, a residual, an optional dropout and a linear head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 5)
        for norm in (self.norm, self.depthwise_norm):
            assert norm.running_mean is not None and norm.running_var is not None
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.1, 0.2)
            norm.running_mean.normal_(0.0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(pixel_values)))
        x = x + nn.functional.relu6(self.depthwise_norm(self.depthwise(x)))
        logits: Tensor = self.head(self.dropout(x.mean((2, 3))))
        return logits


class Regressor(nn.Module):
    """A small network with a real-valued output, and its own loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class OwnLoss(Regressor):
    """Returns its loss first."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y if target is None else (nn.functional.mse_loss(y, target), y)


IMAGES = {"pixel_values": torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))}
VECTORS = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(2))}
MOMENTUM = pockc.SGD(lr=0.02, momentum=0.9)


@pytest.mark.parametrize("scheme", ["full", "bias-only", "head", "last-k:2", "head+bias-only"])
@pytest.mark.parametrize("batchnorm", ["fold", "freeze", "train"])
def test_every_batchnorm_policy_follows_pytorch(batchnorm: Any, scheme: str) -> None:
    model = ConvNet().train(batchnorm == "train")
    parity = verify_against_torch(model, IMAGES, optimizer=MOMENTUM, scheme=scheme, batchnorm=batchnorm, steps=5)
    assert parity.passed, parity


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits", "mse", "l1", "huber"])
def test_every_named_loss_follows_pytorch(loss: str) -> None:
    model: nn.Module = ConvNet().eval() if loss == "cross_entropy" else Regressor().eval()
    inputs = IMAGES if loss == "cross_entropy" else VECTORS
    assert verify_against_torch(model, inputs, loss, pockc.AdamW(lr=1e-3), steps=5).passed


@pytest.mark.parametrize(
    "optimizer",
    [
        pockc.SGD(lr=0.05, weight_decay=0.01),
        pockc.SGD(lr=0.02, momentum=0.9, nesterov=True),
        pockc.Adam(lr=1e-3, weight_decay=0.01),
        pockc.AdamW(lr=1e-3, groups=(pockc.Group("*.bias", weight_decay=0.0),)),
        pockc.Lion(lr=1e-4, weight_decay=0.1),
        pockc.AdamW(lr=1e-3, schedule=pockc.Schedule("cosine", warmup_steps=2, total_steps=6)),
        pockc.SGD(lr=0.1, clip_norm=0.1),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_every_optimizer_follows_pytorch(optimizer: pockc.Optimizer) -> None:
    assert verify_against_torch(ConvNet().eval(), IMAGES, optimizer=optimizer, scheme="full", steps=6).passed


def test_accumulation_with_clipping_follows_pytorch() -> None:
    optimizer = pockc.SGD(lr=0.05, momentum=0.9, clip_norm=0.5)
    assert verify_against_torch(ConvNet().eval(), IMAGES, optimizer=optimizer, steps=3, accumulation=3).passed


def test_a_channel_sparse_scheme_follows_pytorch(tmp_path: Path) -> None:
    file = tmp_path / "half.yaml"
    file.write_text(
        "name: half\nupdate:\n  - head.*\n"
        "  - {tensors: depthwise.weight, channels: {fraction: 0.5, select: magnitude}}\n"
        "  - {tensors: conv.weight, channels: {fraction: 0.34, select: first}}\n"
    )
    assert verify_against_torch(ConvNet().eval(), IMAGES, optimizer=MOMENTUM, scheme=file, steps=5).passed


def test_a_callable_loss_and_a_loss_inside_the_model_agree_with_the_named_one(tmp_path: Path) -> None:
    target = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    builds = {
        "named": pockc.build(Regressor().eval(), VECTORS, "mse", pockc.SGD(lr=0.1)),
        "callable": pockc.build(
            Regressor().eval(), {**VECTORS, "labels": target}, nn.functional.mse_loss, pockc.SGD(lr=0.1)
        ),
        "inside": pockc.build(OwnLoss().eval(), {**VECTORS, "target": target}, None, pockc.SGD(lr=0.1)),
    }
    losses = {}
    for name, program in builds.items():
        program.save(tmp_path / f"{name}.pock")
        label = "target" if name == "inside" else "labels"
        with pockc.Session(tmp_path / f"{name}.pock") as session:
            losses[name] = [session.train_step(**VECTORS, **{label: target}) for _ in range(4)]
    assert losses["callable"] == pytest.approx(losses["named"], rel=1e-6)
    assert losses["inside"] == pytest.approx(losses["named"], rel=1e-6)
    assert losses["named"][-1] < losses["named"][0]


def test_dropout_is_on_while_training_and_off_in_inference(tmp_path: Path) -> None:
    model = ConvNet(dropout=0.5).train()
    pockc.build(model, IMAGES, optimizer=pockc.SGD(lr=0.0), batchnorm="freeze").save(tmp_path / "m.pock")
    labels = np.zeros(4, np.int64)
    with pockc.Session(tmp_path / "m.pock") as session:
        losses = {session.train_step(**IMAGES, labels=labels) for _ in range(4)}
        assert len(losses) == 4, "every step draws another mask"
        expected = model.eval()(IMAGES["pixel_values"]).detach().numpy()
        np.testing.assert_allclose(np.asarray(session.infer(**IMAGES)), expected, rtol=1e-4, atol=1e-5)


RESUME = """
import sys
import numpy as np
import pockc
with pockc.Session(sys.argv[1]) as session:
    session.load_checkpoint(sys.argv[2])
    batches = np.load(sys.argv[3])
    for step in range(5, 10):
        session.train_step(pixel_values=batches[f"x{step}"], labels=batches[f"y{step}"])
    session.save_checkpoint(sys.argv[4])
"""


@pytest.mark.parametrize("optimizer", [pockc.SGD(lr=0.05, momentum=0.9), pockc.AdamW(lr=1e-3)])
def test_ten_steps_equal_five_a_save_a_new_process_and_five_more_to_the_last_bit(
    optimizer: pockc.Optimizer, tmp_path: Path
) -> None:
    file = tmp_path / "m.pock"
    pockc.build(ConvNet(dropout=0.3).train(), IMAGES, optimizer=optimizer, batchnorm="train").save(file)
    random = np.random.default_rng(0)
    batches: dict[str, Any] = {f"x{i}": random.standard_normal((4, 3, 12, 12)).astype(np.float32) for i in range(10)}
    batches |= {f"y{i}": random.integers(0, 5, 4) for i in range(10)}
    np.savez(tmp_path / "batches.npz", **batches)
    with pockc.Session(file) as straight, pockc.Session(file) as halfway:
        for step in range(10):
            straight.train_step(pixel_values=batches[f"x{step}"], labels=batches[f"y{step}"])
        for step in range(5):
            halfway.train_step(pixel_values=batches[f"x{step}"], labels=batches[f"y{step}"])
        halfway.save_checkpoint(tmp_path / "half.ckpt")
        arguments = [str(tmp_path / name) for name in ("m.pock", "half.ckpt", "batches.npz", "end.ckpt")]
        subprocess.run([sys.executable, "-c", RESUME, *arguments], check=True)
        halfway.load_checkpoint(tmp_path / "end.ckpt")
        for name in ("head.weight", "conv.weight", "norm.running_var", "pockc.step"):
            np.testing.assert_array_equal(straight.state(name), halfway.state(name), err_msg=name)
        for name, value in straight.parameters().items():
            np.testing.assert_array_equal(value, halfway.parameters()[name], err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "crossentropy"}, "cross_entropy"),
        ({"batchnorm": "frozen"}, "fold, freeze, train"),
        ({"accumulation": 0}, "at least 1"),
        ({"device": "rpi44"}, "rpi4"),
        ({"scheme": "heads"}, "head"),
        ({"loss": 3}, "callable"),
    ],
)
def test_a_wrong_option_names_what_is_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pockc.UserError, match=message):
        pockc.build(ConvNet().eval(), IMAGES, **options)
