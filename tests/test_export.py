"""Exported weights in the original model, with every batch norm policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pockc.build import build
from pockc.checkpoint import export
from pockc.optim import SGD
from pockc.session import Session

pytestmark = [pytest.mark.torch, pytest.mark.native]


class Net(nn.Module):
    """Two batch norms, a saved table, and a table that the model makes by itself."""

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))
        self.register_buffer("offset", torch.tensor([0.1, 0.2, 0.3]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.body(x)).mean((2, 3))) * self.scale + self.offset
        return logits


def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net(3 * torch.randn(16, 2, 6, 6) + 1)  # moves the running statistics
    return net.eval()


def batch(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {"x": random.standard_normal((4, 2, 6, 6)).astype(np.float32), "labels": random.integers(0, 3, 4)}


@pytest.mark.parametrize("scheme", ["full", "head"])
@pytest.mark.parametrize("batchnorm", ["fold", "freeze", "train"])
def test_export_with_base_loads_strictly_and_gives_the_programs_logits(
    batchnorm: Any, scheme: str, tmp_path: Path
) -> None:
    original = model()
    save_file(original.state_dict(), tmp_path / "base.safetensors")
    example = {"x": torch.from_numpy(batch(0)["x"])}
    build(original, example, optimizer=SGD(lr=0.05), scheme=scheme, batchnorm=batchnorm).save(tmp_path / "model.pock")
    with Session(tmp_path / "model.pock") as session:
        for seed in range(5):
            session.train_step(**batch(seed))
        session.save_checkpoint(tmp_path / "tuned.ckpt")
        expected = session.run("infer", x=batch(9)["x"])["logits"]

    output = tmp_path / "tuned.safetensors"
    checkpoint, base = tmp_path / "tuned.ckpt", tmp_path / "base.safetensors"
    assert export(tmp_path / "model.pock", output, checkpoint=checkpoint, base=base) == []

    tuned = Net().eval()
    tuned.load_state_dict(load_file(output), strict=True)
    with torch.no_grad():
        np.testing.assert_allclose(tuned(torch.from_numpy(batch(9)["x"])).numpy(), expected, rtol=1e-4, atol=1e-5)
        before = original(torch.from_numpy(batch(9)["x"])).numpy()
    assert np.abs(before - expected).max() > 1e-3
    moved = not torch.equal(tuned.norm.running_mean, original.norm.running_mean)  # type: ignore[arg-type, union-attr]
    assert moved == (batchnorm == "train")


@pytest.mark.parametrize("batchnorm", ["fold", "freeze", "train"])
def test_export_without_base_names_exactly_what_the_model_has_more(batchnorm: Any, tmp_path: Path) -> None:
    example = {"x": torch.from_numpy(batch(0)["x"])}
    build(model(), example, optimizer=SGD(lr=0.05), batchnorm=batchnorm).save(tmp_path / "model.pock")

    missing = export(tmp_path / "model.pock", tmp_path / "tuned.safetensors")

    written = set(load_file(tmp_path / "tuned.safetensors"))
    assert sorted(missing) == sorted(set(Net().state_dict()) - written)
    assert written <= set(Net().state_dict())
    assert "norm.num_batches_tracked" in missing
    assert ("norm.running_mean" in missing) == (batchnorm == "fold")
