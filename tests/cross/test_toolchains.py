"""Toolchains beside zig's default: Debian's g++ through a CMake file, and libraries for applications."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import emulation
from pockc.build import build
from pockc.optim import SGD
from pockc.program import Program
from pockc.targets import devices
from pockc.targets.native import deliver, toolchain
from tests.cross.boards import MACHINES, WANTED, elf_machine, need
from tests.cross.dynamic import compile_demo, need_sysroot, run_demo

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

COMPILER = "aarch64-linux-gnu-g++"
DEBIAN = f"""
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER {COMPILER})
"""
X = torch.linspace(-1, 1, 8).view(2, 4)


@pytest.fixture(scope="module")
def program() -> Program:
    if "toolchains" not in WANTED:
        pytest.skip("POCKC_CROSS does not name toolchains: `make test-toolchains` does")
    need("aarch64")
    torch.manual_seed(0)
    return build(nn.Sequential(nn.Linear(4, 3)).eval(), (X,), optimizer=SGD(lr=0.1), device="rpi4")


def test_debians_compiler_makes_a_static_runner_and_a_library(program: Program, tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}: `make test-toolchains` installs it where that is permitted")
    file = tmp_path / "debian.cmake"
    file.write_text(DEBIAN)
    program.save(tmp_path / "model.pock", golden={"input": X.numpy()})

    deliver(program, devices.find("rpi4"), tmp_path, str(file), library=True)

    before = emulation.emulated("aarch64", "cortex-a53")
    assert "selftest passed" in emulation.run(tmp_path / "pock-run", ["selftest", tmp_path / "model.pock"], before)
    assert_application_trains(tmp_path, "aarch64-linux-gnu-gcc")


def test_zigs_library_serves_an_application(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "model.pock")

    deliver(program, devices.find("rpi4"), tmp_path, library=True)

    compiler = toolchain.for_device(devices.find("rpi4"), "zig", library=True).file.parent / "cc"
    assert_application_trains(tmp_path, str(compiler), "-target", f"aarch64-linux-gnu.{toolchain.GLIBC}")


def assert_application_trains(folder: Path, *compiler: str) -> None:
    need_sysroot()
    library = folder / "lib" / "libpockrt.so"
    assert elf_machine(library.read_bytes()) == MACHINES["aarch64"]
    assert (folder / "lib" / "libpockrt.a").read_bytes().startswith(b"!<arch>")
    demo = compile_demo(folder, library, folder / "include", *compiler)
    assert len(run_demo(demo, folder / "model.pock")) == 6
