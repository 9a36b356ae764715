"""Products of many odd shapes on boards: tiles with every number of rows and vectors, few and many steps.

Sums are one chain of fused multiply-adds per element whatever the vectors, so that most boards give the bits of this
machine.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import emulation
from benchmarks.emulation import CORES, Core
from pockc.build import build
from pockc.optim import SGD
from pockc.targets import devices
from pockc.targets.native import deliver
from tests.cross.boards import need

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

ROWS, DEPTH, COLUMNS = 26, 131, 30  # at most
SHAPES = 48


class Products(nn.Module):
    """Linear layers of random sizes, each on some rows and columns of the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        draw = random.Random(0)
        self.sizes = [(draw.randint(1, ROWS), draw.randint(1, draw.choice((9, DEPTH)))) for _ in range(SHAPES)]
        columns = [draw.randint(1, COLUMNS) for _ in range(SHAPES)]
        self.embed = nn.Linear(DEPTH, DEPTH)
        self.layers = nn.ModuleList(nn.Linear(size[1], n) for size, n in zip(self.sizes, columns, strict=True))
        self.heads = nn.ModuleList(nn.Linear(n, 5, bias=False) for n in columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        logits = torch.zeros(1, 5)
        for (rows, depth), layer, head in zip(self.sizes, self.layers, self.heads, strict=True):
            logits = logits + head(torch.tanh(layer(x[:, :rows, :depth])).mean(1))
        return logits


@pytest.mark.parametrize("core", [core for core in CORES if core.name != "cortex-a53"], ids=lambda core: core.name)
def test_products_of_odd_shapes_are_those_of_this_machine(core: Core, tmp_path: Path) -> None:
    need(core.architecture)
    torch.manual_seed(0)
    model, examples = Products().eval(), {"x": torch.randn(1, ROWS, DEPTH)}
    program = build(model, examples, optimizer=SGD(lr=0.1), scheme="full", device=core.device)
    file, data = tmp_path / "model.pock", tmp_path / "batch.npz"
    program.save(file)
    emulation.write_batch(program, examples, data)
    deliver(program, devices.find(core.device), tmp_path, "zig")

    expected = emulation.train(emulation.native_runner(), file, data, tmp_path)
    got = emulation.train(tmp_path / "pock-run", file, data, tmp_path, emulation.emulated(core.architecture, core.name))

    assert emulation.worst_difference(got.losses, expected.losses) <= 1e-5
    if core.same_bits:
        assert got.checkpoint == expected.checkpoint
