"""Small models that between them have what the target lowers in its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pockc.build import build
from pockc.ir import Array
from pockc.optim import AdamW

BATCH, CLASSES = 4, 3


class MobileNet(nn.Module):
    """An inverted residual between a strided stem and a head, as in MobileNetV2."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU6(),
            nn.Conv2d(4 * width, 4 * width, 3, 1, 1, groups=4 * width, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU6(),
            nn.Conv2d(4 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        logits: Tensor = self.head(self.dropout(self.pool(y + self.block(y)).mean((2, 3))))
        return logits


def mobile_net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = MobileNet(**options)
    with torch.no_grad():
        model(2 * torch.randn(16, 3, 12, 12) + 0.3)  # moves the running statistics
    return model.eval()


def examples() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, 3, 12, 12, generator=torch.Generator().manual_seed(1))}


def batch(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((BATCH, 3, 12, 12)).astype(np.float32),
        "labels": random.integers(0, CLASSES, BATCH),
    }


def saved(folder: Path, target: str = "onnxruntime", **options: Any) -> Path:
    """A program of the model in a folder."""
    model = options.pop("model", None) or mobile_net()
    program = build(model, examples(), **{"optimizer": AdamW(lr=1e-2), "target": target, **options})
    program.save(file := folder / "model.pock")
    return file
