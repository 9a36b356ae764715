"""The command line, run in this process in a folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pockc import cli

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.fc(x)))


def make(batch_size=8):
    torch.manual_seed(0)
    return Net().eval(), {"x": torch.randn(batch_size, 6)}


def fixed():
    return Net().eval(), {"x": torch.randn(2, 6)}


def wide():
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4)).eval(), {"input": torch.randn(2, 16)}


def with_labels():
    return Net().eval(), {"x": torch.randn(2, 6), "labels": torch.tensor([0, 1])}


def own_loss(output, labels):
    return F.cross_entropy(output, labels) + output.square().mean()


def broken():
    raise ValueError("no weights here")


def single():
    return Net()
"""


class Shell:
    """Runs the command line in this process, in a folder with a model file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        (folder / "model.py").write_text(MODEL)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "120")

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.monkeypatch.setattr(sys, "argv", ["pockc", *arguments])
        self.capsys.readouterr()
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        captured = self.capsys.readouterr()
        return int(code), captured.out, captured.err
