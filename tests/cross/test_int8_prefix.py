"""A frozen prefix of int8 activations on 64-bit ARM, with dot products of bytes where the core has them.

`tests/test_prefix_dtype.py` has what such programs do here. Sums of codes are exact, so every core gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import emulation
from pockc.build import build
from pockc.ir import op_counts
from pockc.optim import SGD
from pockc.targets import devices
from pockc.targets.native import deliver
from tests.cross.boards import need

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

CORES = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "neon-dotprod", "max": "neon-dotprod"}


def frozen(inputs: int, outputs: int, kernel: int, *, clipped: bool = True, **options: Any) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)
    return [convolution, nn.ReLU6()] if clipped else [convolution]


class Net(nn.Module):
    """Every shape of the kernel: tails of channels, of pixels and of depth, more depth than a tile, no clip before."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(
            *frozen(3, 20, 3, stride=2),  # 27 inputs, 16 + 4 channels, zero points in the image's middle
            *frozen(20, 20, 3, groups=20), *frozen(20, 70, 1, clipped=False),
            *frozen(70, 131, 3),
            *frozen(131, 8, 3, dilation=2),  # 1179 inputs
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.frozen(pixel_values).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Case:
    folder: Path
    expected: emulation.Run

    @property
    def runner(self) -> Path:
        return self.folder / "pock-run"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    need("aarch64")
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    model, examples = Net().eval(), {"pixel_values": torch.randn(2, 3, 23, 23)}
    calibration = {"pixel_values": np.random.default_rng(0).standard_normal((16, 3, 23, 23)).astype(np.float32)}
    program = build(
        model,
        examples,
        optimizer=SGD(lr=0.1),
        scheme="head",
        device="rpi5",
        prefix_dtype="int8",
        calibration=calibration,
    )
    assert op_counts(program.entries["train_step"].nodes)["conv2d_int8"] >= 5
    program.save(folder / "model.pock", golden=examples)
    emulation.write_batch(program, examples, folder / "batch.npz")
    deliver(program, devices.find("rpi5"), folder, "zig")
    return Case(folder, train(emulation.native_runner(), folder, folder))


def train(runner: Path, case: Path, folder: Path, before: tuple[str, ...] = ()) -> emulation.Run:
    return emulation.train(runner, case / "model.pock", case / "batch.npz", folder, before)


@pytest.mark.parametrize("core", CORES)
def test_every_core_takes_what_it_has_and_gives_the_bits_of_this_machine(core: str, case: Case, tmp_path: Path) -> None:
    before = emulation.emulated("aarch64", core)

    printed = emulation.run(case.runner, ["selftest", case.folder / "model.pock"], before)
    got = train(case.runner, case.folder, tmp_path, before)

    assert f"selftest passed (instruction set {CORES[core]})" in printed
    assert list(got.losses) == list(case.expected.losses)
    assert got.checkpoint == case.expected.checkpoint
