"""Programs for boards, run here: `pock-run` of another architecture under Debian's qemu-user."""

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pockc import abi
from pockc.parity import batches
from pockc.program import Program

STEPS = 10
_QEMU = {"x86_64": "qemu-x86_64", "aarch64": "qemu-aarch64", "armv7l": "qemu-arm", "riscv64": "qemu-riscv64"}


@dataclass(frozen=True)
class Core:
    """A processor core that qemu imitates, and the device that it stands for."""

    name: str
    device: str
    architecture: str
    same_bits: bool  # as x86 with fused multiply-add, not only the same within rounding


CORES = (
    Core("cortex-a53", "rpi3", "aarch64", True),
    Core("cortex-a72", "rpi4", "aarch64", True),
    Core("cortex-a76", "rpi5", "aarch64", True),
    Core("cortex-a7", "rpi-armv7", "armv7l", False),  # NEON there takes denormal numbers for zero
    Core("rv64", "riscv64", "riscv64", True),
)


def missing(architecture: str) -> str:
    """Why programs for it cannot be run here, in one sentence; empty if they can."""
    if shutil.which(_QEMU[architecture]) is None:
        return f"{_QEMU[architecture]} is not installed: `make qemu` installs it where that is permitted"
    return ""


def emulated(architecture: str, core: str) -> tuple[str, ...]:
    """What to put before a command for it to run on that core."""
    return (_QEMU[architecture], "-cpu", core)


def write_batch(program: Program, examples: Mapping[str, Any], file: Path) -> None:
    """One seeded batch like the example inputs, as an .npz: an epoch over it is one step."""
    arrays = {name: np.asarray(value) for name, value in examples.items()}
    batch = next(batches(arrays, program.entries["train_step"], program.metadata["loss"], 1, seed=1))
    np.savez(file, allow_pickle=False, **batch)


@dataclass(frozen=True)
class Run:
    """What training made: the loss of each step, and the checkpoint's bytes."""

    losses: NDArray[np.float64]
    checkpoint: bytes


def train(runner: Path, model: Path, data: Path, folder: Path, before: Sequence[str] = (), threads: int = 1) -> Run:
    """Ten steps on one batch. Raises RuntimeError with the program's message where it fails."""
    checkpoint, report = folder / "trained.ckpt", folder / "report.json"
    checkpoint.unlink(missing_ok=True)
    arguments = ["train", model, "--data", data, "--epochs", STEPS, "--save", checkpoint, "--json", report, "--quiet"]
    run(runner, [*arguments, "--threads", threads], before)
    epochs = json.loads(report.read_text(encoding="utf-8"))["epochs"]
    return Run(np.array([epoch["loss"] for epoch in epochs]), checkpoint.read_bytes())


def run(runner: Path, arguments: Sequence[object], before: Sequence[str] = ()) -> str:
    """One command of `pock-run`; its output. Raises RuntimeError with its message where it fails."""
    command = [*before, str(runner), *map(str, arguments)]
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def native_runner() -> Path:
    """The `pock-run` of this machine."""
    return abi.runtime_file("pock-run")


def worst_difference(got: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Of losses, relative; infinite where one is not a number."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    difference = np.abs(got - wanted)
    return float(np.max(np.divide(difference, np.abs(wanted), out=difference, where=difference > 0)))
