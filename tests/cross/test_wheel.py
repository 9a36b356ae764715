"""The wheel for 64-bit ARM Linux that `make wheel-aarch64` made: what is in it, and that its library loads and trains.

There is no Python for the board here: the C demo stands for it, linked with the wheel's library.
"""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from pockc.build import build
from pockc.optim import SGD
from pockc.targets import devices
from pockc.targets.native import toolchain
from tests.cross.boards import MACHINES, WANTED, elf_machine, need
from tests.cross.dynamic import RUNTIME, compile_demo, need_sysroot, run_demo

pytestmark = [pytest.mark.torch, pytest.mark.native]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "wheel" not in WANTED:
        pytest.skip("POCKC_CROSS does not name wheel: `make wheel-aarch64` does")
    (wheel,) = (ROOT / "dist").glob("pockc-*-py3-none-manylinux_2_28_aarch64.whl")
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_has_the_compiler_and_binaries_for_the_board(unpacked: Path) -> None:
    for name in ("libpockrt.so", "pock-run", "pock-run-onnxruntime"):
        assert elf_machine((unpacked / "pockc" / "_lib" / name).read_bytes()) == MACHINES["aarch64"]
    for name in ("pockc/cli.py", "pockc/passes/dce.py", "pockc/_runtime/CMakeLists.txt"):
        assert (unpacked / name).is_file()
    (metadata,) = unpacked.glob("*.dist-info/WHEEL")
    assert "Tag: py3-none-manylinux_2_28_aarch64\n" in metadata.read_text()


def test_library_needs_an_old_c_library_alone(unpacked: Path) -> None:
    library = unpacked / "pockc" / "_lib" / "libpockrt.so"
    text = subprocess.run(["readelf", "-d", "-V", str(library)], capture_output=True, text=True, check=True).stdout

    needed = {line.partition("[")[2].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line}
    versions = {tuple(map(int, word[6:].split("."))) for word in text.split() if word.startswith("GLIBC_")}
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-aarch64.so.1"}
    assert versions and max(versions) <= tuple(map(int, toolchain.GLIBC.split(".")))


def test_library_of_the_wheel_trains_under_emulation(unpacked: Path, tmp_path: Path) -> None:
    need("aarch64")
    need_sysroot()
    torch.manual_seed(0)
    model = tmp_path / "model.pock"
    build(nn.Sequential(nn.Linear(4, 3)).eval(), (torch.randn(2, 4),), optimizer=SGD(lr=0.1)).save(model)
    library = unpacked / "pockc" / "_lib" / "libpockrt.so"
    compiler = toolchain.for_device(devices.find("rpi4"), "zig", library=True).file.parent / "cc"
    target = ("-target", f"aarch64-linux-gnu.{toolchain.GLIBC}")
    demo = compile_demo(tmp_path, library, RUNTIME / "include", str(compiler), *target)

    losses = run_demo(demo, model)

    assert len(losses) == 6 and losses == sorted(losses, reverse=True)
    assert (tmp_path / "tuned.ckpt").is_file()
