"""Small real programs and archives as seeds for the fuzz targets: `python -m tests.fuzz_corpus FOLDER`.

FOLDER/program holds .pock files that together use most ops; FOLDER/npz holds stored and compressed archives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import pockc


class Convolutions(nn.Module):
    """Normal, strided, grouped, depthwise and pointwise convolutions, pools, a residual sum, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        x = x + self.depthwise(x)
        x = F.max_pool2d(F.relu(self.grouped(x)), 2)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.head(F.avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Embedding, attention, layer norm, GELU, dropout: an encoder of one block."""

    def __init__(self, vocabulary: int = 24, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embedding(ids)
        query, key, value, out = self.projections
        q, k, v = (p(self.first(x)).unflatten(2, (4, 8)).transpose(1, 2) for p in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.drop(out(mixed))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(x)


class Small(nn.Module):
    """Functions of one number, a softmax, slices and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.tanh(self.first(x))
        x = torch.cat([F.silu(x[:, :8]), x[:, 8:].abs().sqrt()], 1)
        x = x / (1 + torch.softmax(x, 1)) - x.mean(1, keepdim=True)
        return self.second(F.layer_norm(x, (16,)))


def image() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, 16, 16)}


def ids() -> dict[str, torch.Tensor]:
    return {"ids": torch.arange(16).reshape(2, 8)}


def vector() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 6)}


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]], bool, dict[str, Any]]

# Name: model, inputs, whether in training mode, options of `pockc.build`.
CASES: dict[str, Case] = {
    "convolutions-full-sgd": (Convolutions, image, False, {"optimizer": pockc.SGD(lr=0.1, momentum=0.9)}),
    "convolutions-train-lion8": (
        Convolutions,
        image,
        True,
        {"optimizer": pockc.Lion(lr=1e-3), "batchnorm": "train", "state_dtype": "int8"},
    ),
    "convolutions-head-prefix8": (
        Convolutions,
        image,
        False,
        {"scheme": "head", "prefix_dtype": "int8", "calibration": "example"},
    ),
    "convolutions-bias-micro": (Convolutions, image, False, {"scheme": "bias-only", "micro_batch": 1}),
    "attention-causal-adam8": (
        Attention,
        ids,
        True,
        {"loss": "causal_lm", "state_dtype": "int8", "optimizer": pockc.AdamW(lr=1e-3, clip_norm=1.0)},
    ),
    "attention-bias-int8": (
        Attention,
        ids,
        False,
        {"loss": "causal_lm", "scheme": "bias-only", "frozen_dtype": "int8"},
    ),
    "attention-head-int4": (Attention, ids, False, {"loss": "causal_lm", "scheme": "head", "frozen_dtype": "int4"}),
    "small-huber-adam": (
        Small,
        vector,
        False,
        {"loss": "huber", "accumulation": 2, "optimizer": pockc.Adam(lr=1e-3), "loss_scale": "dynamic"},
    ),
    "small-bce": (Small, vector, False, {"loss": "bce_with_logits", "optimizer": pockc.SGD(lr=0.1)}),
}


def write_programs(folder: Path, names: Iterable[str] = tuple(CASES)) -> None:
    """One .pock file per case of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        make, inputs, training, options = CASES[name]
        torch.manual_seed(0)
        program = pockc.build(make().train(training), inputs(), **options)
        program.save(folder / f"{name}.pock")


def write_archives(folder: Path) -> None:
    """Archives of all dtypes and ranks, stored and compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x": generator.standard_normal((3, 2, 4)).astype(np.float32),
        "y": generator.standard_normal(5),
        "labels": np.arange(4),
        "ids": np.arange(6, dtype=np.int32).reshape(2, 3),
        "bytes": np.zeros(200, np.uint8),
        "mask": np.array(True),
    }
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", **arrays)


def main() -> None:
    """Write both folders."""
    folder = Path(sys.argv[1])
    write_programs(folder / "program")
    write_archives(folder / "npz")


if __name__ == "__main__":
    main()
