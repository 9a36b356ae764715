"""The driver for ONNX Runtime on 64-bit ARM: the library of the pip package, under emulation, against x86."""

from __future__ import annotations

import os
import platform
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks import emulation
from pockc.build import build
from pockc.session import open_session
from pockc.targets import devices
from pockc.targets.onnxruntime import delivery
from tests.cross.boards import MACHINES, WANTED, elf_machine, need
from tests.cross.dynamic import SYSROOT, need_sysroot
from tests.onnxruntime.models import batch, examples, mobile_net

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

WHEELS = Path(__file__).parents[2] / ".cache" / "onnxruntime-aarch64"
EPOCHS = 5
CPU = """processor : 0
Features : fp asimd evtstrm crc32 cpuid
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x0
CPU part : 0xd08
CPU revision : 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a board needs: models, driver, library."""
    if "onnxruntime" not in WANTED:
        pytest.skip("POCKC_CROSS does not name onnxruntime: `make test-cross-onnx` does")
    need("aarch64")
    need_sysroot()
    wheels = sorted(WHEELS.glob(f"onnxruntime-{onnxruntime.__version__}-*_aarch64.whl"))
    if not wheels:
        pytest.skip(f"ONNX Runtime for aarch64 is not in {WHEELS}: it could not be downloaded")
    folder = tmp_path_factory.mktemp("board")
    program = build(mobile_net(), examples(), target="onnxruntime", device="rpi4")
    program.save(folder / "model.pock", golden={name: x.numpy() for name, x in examples().items()})
    np.savez(folder / "train.npz", allow_pickle=False, **batch(0))
    delivery.deliver(program, devices.find("rpi4"), folder, "zig")
    with zipfile.ZipFile(wheels[0]) as archive:
        (member,) = (name for name in archive.namelist() if "capi/libonnxruntime.so" in name)
        (folder / "libonnxruntime.so.1").write_bytes(archive.read(member))
    return folder


def board_root(folder: Path) -> Path:
    """What qemu shows of a board's file system: ONNX Runtime crashes where that describes an x86."""
    root, cpus = folder / "root", folder / "root" / "sys" / "devices" / "system" / "cpu"
    if not root.exists():
        (root / "proc").mkdir(parents=True)
        (root / "proc" / "cpuinfo").write_text(CPU)
        (root / "lib").symlink_to(SYSROOT / "lib")
        cpus.mkdir(parents=True)
        for name in ("possible", "present"):
            (cpus / name).write_text("0\n")
    return root


def run(folder: Path, *words: object, core: str = "cortex-a72") -> str:
    """The driver finds the library beside itself."""
    command = [*emulation.emulated("aarch64", core), "-L", str(board_root(folder)), str(folder / delivery.RUNNER)]
    environment = {name: value for name, value in os.environ.items() if name != "POCKC_ONNXRUNTIME"}
    done = subprocess.run([*command, *map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_driver_is_small_and_for_the_board(folder: Path) -> None:
    content = (folder / delivery.RUNNER).read_bytes()
    assert elf_machine(content) == MACHINES["aarch64"]
    assert len(content) < 1 << 20


@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a76"])
def test_selftest_passes(core: str, folder: Path) -> None:
    assert "selftest passed" in run(folder, "selftest", folder / "model.pock", core=core)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86")
def test_training_is_that_of_this_machine(folder: Path) -> None:
    checkpoint = folder / "tuned.ckpt"
    options = ("--epochs", EPOCHS, "--save", checkpoint)
    run(folder, "train", folder / "model.pock", "--data", folder / "train.npz", *options)

    with open_session(folder / "model.pock") as here, open_session(folder / "model.pock") as board:
        for _ in range(EPOCHS):
            here.train_step(**batch(0))
        board.load_checkpoint(checkpoint)
        expected, got = (float(session.eval_step(**batch(0))["loss"]) for session in (here, board))
        assert board.state("pockc.step") == EPOCHS
    assert got == pytest.approx(expected, rel=1e-5)
