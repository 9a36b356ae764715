"""Programs with activations in 16 bits on 64-bit ARM: the same bits on every core, but where they multiply in 16 bits.

The second build of the runtime that these need takes minutes: POCKC_CROSS has to name `halves` too.
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
from pockc.artifact import read
from pockc.build import build
from pockc.checkpoint import read_checkpoint
from pockc.halves import UNIT_ROUNDOFF
from pockc.ir import Array
from pockc.optim import SGD
from pockc.parity import tolerances
from pockc.program import Program
from pockc.recipe import Dtype
from pockc.targets import devices
from pockc.targets.native import deliver
from tests.cross.boards import WANTED, need

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

ROUNDOFF, LEAST = UNIT_ROUNDOFF["f16"], 2.0**-24  # LEAST: of numbers in fp16, above 0
TERMS = 32  # of a sum in fp16: kHalfTerms of runtime/kernels/simd/gemm_half.h
WITHOUT, WITH = "cortex-a53", "cortex-a76"  # the FP16 extension


class Net(nn.Module):
    """Products of every kind, with tails of rows, columns and depth; what else a model has between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.pointwise, self.dense = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 38, 3, padding=1, groups=2)
        self.depthwise, self.narrow = nn.Conv2d(38, 38, 3, padding=1, groups=38), nn.Conv2d(38, 20, 1)
        self.up, self.down = nn.Linear(20, 70), nn.Linear(70, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.dense(torch.relu(self.pointwise(torch.relu(self.stem(x))))))
        x = self.narrow(self.depthwise(x)).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


class Products(nn.Module):
    """Three products of one input and nothing else: what a core makes of them is what its kernels multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(300, 37, bias=False)
        self.pointwise = nn.Conv2d(75, 21, 1, bias=False)
        self.dense = nn.Conv2d(75, 19, 3, stride=2, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(len(x), -1, 300)
        parts = (self.linear(rows), self.pointwise(x), self.dense(x))
        return torch.cat([part.flatten(1) for part in parts], 1)


@dataclass(frozen=True)
class Case:
    """A program with its runner for 64-bit ARM, and what this machine makes of it."""

    folder: Path
    expected: emulation.Run

    def train(self, folder: Path, core: str, threads: int = 1) -> emulation.Run:
        return train(self.folder / "pock-run", self.folder, folder, emulation.emulated("aarch64", core), threads)

    def run(self, core: str, *arguments: object) -> str:
        return emulation.run(self.folder / "pock-run", arguments, emulation.emulated("aarch64", core))

    def trained(self, content: bytes, folder: Path) -> dict[str, Array]:
        """The tensors of a checkpoint."""
        (folder / "read.ckpt").write_bytes(content)
        return read_checkpoint(folder / "read.ckpt", read(self.folder / "model.pock"))


def train(runner: Path, case: Path, folder: Path, before: tuple[str, ...] = (), threads: int = 1) -> emulation.Run:
    return emulation.train(runner, case / "model.pock", case / "batch.npz", folder, before, threads)


def need_halves() -> None:
    need("aarch64")
    if "halves" not in WANTED:
        pytest.skip("POCKC_CROSS does not name halves: `make test-cross` does")


def compiled(dtype: Dtype, **options: Any) -> tuple[Program, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, examples = Net().eval(), {"x": torch.randn(4, 3, 16, 16)}
    return build(model, examples, optimizer=SGD(lr=0.05, momentum=0.9), device="rpi5", dtype=dtype, **options), examples


def case(dtype: Dtype, factory: pytest.TempPathFactory, **options: Any) -> Case:
    need_halves()
    folder = factory.mktemp(dtype)
    program, examples = compiled(dtype, **options)
    program.save(folder / "model.pock", golden=examples)
    emulation.write_batch(program, examples, folder / "batch.npz")
    deliver(program, devices.find("rpi5"), folder, "zig")
    return Case(folder, train(emulation.native_runner(), folder, folder))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case("fp16", tmp_path_factory)


@pytest.fixture(scope="module")
def multiplied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case("fp16", tmp_path_factory, half_arithmetic=True)


@pytest.mark.parametrize("core", [WITHOUT, WITH])
def test_storage_alone_gives_the_bits_of_this_machine_on_every_core(core: str, stored: Case, tmp_path: Path) -> None:
    got = stored.train(tmp_path, core)
    assert list(got.losses) == list(stored.expected.losses)
    assert got.checkpoint == stored.expected.checkpoint
    assert "products in fp16" not in stored.run(core, "selftest", stored.folder / "model.pock")


def test_core_without_the_extension_multiplies_in_float32(multiplied: Case, stored: Case, tmp_path: Path) -> None:
    got = multiplied.train(tmp_path, WITHOUT)
    assert list(got.losses) == list(multiplied.expected.losses) == list(stored.expected.losses)
    assert got.checkpoint == multiplied.expected.checkpoint == stored.expected.checkpoint
    printed = multiplied.run(WITHOUT, "selftest", multiplied.folder / "model.pock")
    assert "selftest passed (instruction set neon)" in printed


def test_core_with_the_extension_multiplies_in_fp16_and_keeps_to_the_bound(multiplied: Case, tmp_path: Path) -> None:
    got = multiplied.train(tmp_path, WITH)
    threaded = multiplied.train(tmp_path, WITH, threads=2)
    ours, theirs = (multiplied.trained(run.checkpoint, tmp_path) for run in (got, multiplied.expected))
    torch.manual_seed(0)
    initial = {name: parameter.detach().numpy() for name, parameter in Net().named_parameters()}

    assert got.checkpoint == threaded.checkpoint != multiplied.expected.checkpoint
    loss, tensor = tolerances("fp16")
    assert emulation.worst_difference(got.losses, multiplied.expected.losses) <= loss
    for name, start in initial.items():
        moved = np.linalg.norm(theirs[name] - start)
        assert np.linalg.norm(ours[name] - theirs[name]) <= tensor * moved, name
    printed = multiplied.run(WITH, "selftest", multiplied.folder / "model.pock")
    assert "selftest passed (instruction set neon-dotprod, products in fp16)" in printed


def test_products_keep_to_the_bound_of_sums_in_16_bits(tmp_path: Path) -> None:
    """Per element, by the maths of gemm_half.h.

    g sum |a b| of the sums, u (1 + g) sum |a b| of rounding weights before, K 2^-25 where products are below normal
    numbers, and u |y| of rounding the result.
    """
    need_halves()
    torch.manual_seed(0)
    model, x = Products().eval(), torch.randn(8, 75, 8, 8).half().float()
    program = build(model, (x,), loss="mse", optimizer=SGD(lr=0.1), device="rpi5", dtype="fp16", half_arithmetic=True)
    program.save(tmp_path / "model.pock")
    deliver(program, devices.find("rpi5"), tmp_path, "zig")
    np.savez(tmp_path / "x.npz", allow_pickle=False, **{program.entries["infer"].inputs[0].name: x.numpy()})

    exact, sizes = (product(model, x, torch.abs) if magnitude else product(model, x) for magnitude in (False, True))
    depth, growth = 75 * 9, TERMS * ROUNDOFF / (1 - TERMS * ROUNDOFF)
    bound = (growth + ROUNDOFF * (1 + growth)) * sizes + depth * LEAST / 2 + 1.001 * ROUNDOFF * np.abs(exact)
    errors = {core: np.abs(infer(core, tmp_path) - exact) for core in (WITHOUT, WITH)}

    assert np.all(errors[WITH] <= bound)
    assert np.all(errors[WITHOUT] <= 1.001 * ROUNDOFF * np.abs(exact) + 1e-5 * sizes), "products in float32"
    root = np.sqrt(np.mean(errors[WITH] ** 2)), np.sqrt(np.mean(exact**2))
    assert ROUNDOFF < root[0] / root[1] < 4 * ROUNDOFF, "near the rounding of storage, and more than it"


def product(model: nn.Module, x: torch.Tensor, of: Any = lambda tensor: tensor) -> Array:
    """In float64, of the numbers themselves or of their magnitudes."""
    doubled = Products().double()
    doubled.load_state_dict({name: of(weight.double()) for name, weight in model.state_dict().items()})
    with torch.no_grad():
        return np.asarray(doubled(of(x.double())))


def infer(core: str, folder: Path) -> Array:
    arguments = ["infer", folder / "model.pock", "--data", folder / "x.npz", "-o", folder / "y.npz", "--quiet"]
    emulation.run(folder / "pock-run", arguments, emulation.emulated("aarch64", core))
    with np.load(folder / "y.npz") as outputs:
        return np.asarray(next(iter(outputs.values())), np.float64)


def test_runner_without_kernels_for_16_bits_refuses_them_in_a_sentence(tmp_path: Path) -> None:
    need("aarch64")
    plain, _ = compiled("f32")
    deliver(plain, devices.find("rpi5"), tmp_path, "zig")
    program, _ = compiled("bf16")
    program.save(tmp_path / "model.pock")

    with pytest.raises(RuntimeError) as caught:
        emulation.run(tmp_path / "pock-run", ["info", tmp_path / "model.pock"], emulation.emulated("aarch64", WITHOUT))

    said = str(caught.value)
    assert "has 16 bits, and this pock-run was made for a program without such tensors" in said
    assert said.count("\n") == 1
