"""Dynamically linked programs for 64-bit ARM: they need that machine's C library, which Debian packages for here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import emulation

SYSROOT = Path("/usr/aarch64-linux-gnu")
RUNTIME = Path(__file__).parents[2] / "runtime"


def need_sysroot() -> None:
    """Skip where there is none."""
    if not (SYSROOT / "lib" / "libstdc++.so.6").exists():
        pytest.skip(f"there is no C++ library in {SYSROOT}: apt-get install libc6-arm64-cross libstdc++6-arm64-cross")


def compile_demo(folder: Path, library: Path, include: Path, *compiler: str) -> Path:
    """The C demo of the bindings, linked with a shared library: an application in small."""
    demo = folder / "demo"
    source, run_path = RUNTIME / "bindings" / "demo.c", f"-Wl,-rpath,{library.parent}"
    command = [*compiler, str(source), str(library), f"-I{include}", run_path, "-o", str(demo)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return demo


def run_demo(demo: Path, model: Path) -> list[float]:
    """The losses that it prints."""
    before = (*emulation.emulated("aarch64", "cortex-a72"), "-L", str(SYSROOT))
    printed = emulation.run(demo, [model, demo.with_name("tuned.ckpt")], before)
    return [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]
