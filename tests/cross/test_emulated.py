"""Programs for other processors, cross-compiled and run under emulation: `make test-cross`.

The first build for a processor compiles zig's C++ library and the whole runtime, which takes minutes: these tests run
for the architectures that POCKC_CROSS names.
"""

from __future__ import annotations

import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import emulation
from benchmarks.emulation import CORES, Core
from pockc.artifact import read
from pockc.build import build
from pockc.optim import AdamW
from pockc.program import Program
from pockc.targets import devices
from pockc.targets.native import cross, deliver
from tests.cross.boards import MACHINES, elf_machine, need, segments

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

LOSS_TOLERANCE = 1e-5


class Mixed(nn.Module):
    """Convolutions of every kind, attention, norms: most kernels of a model of vision and of one of text."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.Hardswish(),
            nn.Conv2d(12, 20, 1, bias=False), nn.BatchNorm2d(20), nn.MaxPool2d(2),
        )  # fmt: skip
        self.qkv, self.norm = nn.Linear(20, 60), nn.LayerNorm(20)
        self.up, self.down = nn.Linear(20, 40), nn.Linear(40, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixel_values).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 10).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.norm(x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        logits: torch.Tensor = self.head(torch.tanh(x).mean(1))
        return logits


@dataclass(frozen=True)
class Case:
    """A program, a batch for it, and what x86 makes of it."""

    program: Program
    file: Path
    data: Path
    expected: emulation.Run


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("cross")
    torch.manual_seed(0)
    model, examples = Mixed().eval(), {"pixel_values": torch.randn(3, 3, 24, 24)}
    program = build(model, examples, optimizer=AdamW(lr=1e-2), device="rpi4")
    file, data = folder / "model.pock", folder / "batch.npz"
    program.save(file, golden=examples)
    emulation.write_batch(program, examples, data)
    return Case(program, file, data, emulation.train(emulation.native_runner(), file, data, folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def delivered(case: Case, device: str, folders: dict[str, Path], factory: pytest.TempPathFactory) -> Path:
    """The folder for a board, made once per architecture."""
    board = devices.find(device)
    need(board.architecture)
    if board.architecture not in folders:
        folders[board.architecture] = factory.mktemp(board.architecture)
        deliver(case.program, board, folders[board.architecture], "zig")
    return folders[board.architecture]


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.name)
def test_training_under_emulation_equals_this_machine(
    core: Core, case: Case, folders: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runner = delivered(case, core.device, folders, tmp_path_factory) / "pock-run"
    before = emulation.emulated(core.architecture, core.name)

    printed = emulation.run(runner, ["selftest", case.file], before)
    got = emulation.train(runner, case.file, case.data, tmp_path, before)
    threaded = emulation.train(runner, case.file, case.data, tmp_path, before, threads=4)

    assert "selftest passed" in printed
    assert emulation.worst_difference(got.losses, case.expected.losses) <= LOSS_TOLERANCE
    assert got.checkpoint == threaded.checkpoint
    if core.same_bits:
        assert list(got.losses) == list(case.expected.losses)
        assert got.checkpoint == case.expected.checkpoint


@pytest.mark.parametrize("device", ["rpi4", "rpi-armv7", "riscv64"])
def test_runner_is_static_small_and_for_the_board(
    device: str, case: Case, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = delivered(case, device, folders, tmp_path_factory)
    content = (folder / "pock-run").read_bytes()

    assert len(content) < 1 << 20
    assert elf_machine(content) == MACHINES[devices.find(device).architecture]
    kinds = [kind for kind, _ in segments(content)]
    assert 1 in kinds and 3 not in kinds, "a static program has no interpreter"
    assert b".symtab" not in content, "not stripped"
    assert "pock-run train" in (folder / "README.md").read_text()


def test_pages_of_16_kib_are_fine_for_the_arm_binary(
    case: Case, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = (delivered(case, "android-arm64", folders, tmp_path_factory) / "pock-run").read_bytes()
    assert all(alignment % 16384 == 0 for kind, alignment in segments(content) if kind == 1)


def test_second_program_for_a_board_takes_seconds_and_has_its_own_kernels_alone(
    case: Case, folders: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    delivered(case, "rpi4", folders, tmp_path_factory)
    torch.manual_seed(0)
    small = build(nn.Sequential(nn.Linear(4, 3)).eval(), (torch.randn(2, 4),), device="rpi4")
    before = emulation.emulated("aarch64", "cortex-a53")

    started = time.perf_counter()
    deliver(small, devices.find("rpi4"), tmp_path)
    seconds = time.perf_counter() - started

    assert seconds < 30
    assert "conv2d" not in cross.kernel_list(small, devices.find("rpi4"))
    with pytest.raises(RuntimeError, match="is not in this pock-run, which has the kernels of another program alone"):
        emulation.run(tmp_path / "pock-run", ["selftest", case.file], before)


@pytest.mark.parametrize(
    ("architecture", "device", "core"),
    [
        ("aarch64", "rpi4", "cortex-a57"),
        ("aarch64", "rpi4", "max"),
        ("armv7l", "rpi-armv7", "cortex-a15"),
        ("armv7l", "rpi-armv7", "max"),
    ],
)
def test_other_cores_of_the_architecture_pass_the_selftest(
    architecture: str,
    device: str,
    core: str,
    case: Case,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    runner = delivered(case, device, folders, tmp_path_factory) / "pock-run"
    assert "selftest passed" in emulation.run(runner, ["selftest", case.file], emulation.emulated(architecture, core))


@pytest.mark.parametrize("core", ["cortex-a8", "cortex-a9", "arm1176", "arm926", "cortex-r5f"])
def test_core_without_fused_neon_is_refused_in_a_sentence(
    core: str, case: Case, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    runner = delivered(case, "rpi-armv7", folders, tmp_path_factory) / "pock-run"
    command = [*emulation.emulated("armv7l", core), str(runner), "selftest", str(case.file)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("pock-run: this CPU lacks NEON with fused multiply-add (VFPv4)")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the runtime here is not for x86")
@pytest.mark.parametrize(
    ("core", "isa"),
    [
        ("qemu64", "baseline"),
        ("Nehalem", "baseline"),
        ("SandyBridge", "baseline"),
        ("Haswell", "avx2"),
        ("max", "avx2"),
    ],
)
def test_x86_runner_takes_what_the_cpu_has(core: str, isa: str, case: Case) -> None:
    if reason := emulation.missing("x86_64"):
        pytest.skip(reason)
    printed = emulation.run(emulation.native_runner(), ["selftest", case.file], emulation.emulated("x86_64", core))
    assert f"selftest passed (instruction set {isa})" in printed


def test_x86_without_fused_multiply_add_is_within_rounding(case: Case, tmp_path: Path) -> None:
    if reason := emulation.missing("x86_64"):
        pytest.skip(reason)
    before = emulation.emulated("x86_64", "Nehalem")
    got = emulation.train(emulation.native_runner(), case.file, case.data, tmp_path, before)
    assert emulation.worst_difference(got.losses, case.expected.losses) <= LOSS_TOLERANCE


def test_program_for_one_board_is_the_same_file_for_all(case: Case) -> None:
    assert read(case.file).metadata["device"] == "rpi4"  # and yet this machine has trained it
    assert len(case.expected.losses) == emulation.STEPS
