"""Dynamically linked programs for 64-bit ARM: they need that machine's C library, which Debian packages for here."""

from __future__ import annotations

from pathlib import Path

import pytest

SYSROOT = Path("/usr/aarch64-linux-gnu")


def need_sysroot() -> None:
    """Skip where there is none."""
    if not (SYSROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        pytest.skip(f"there is no C library in {SYSROOT}: apt-get install libc6-arm64-cross libstdc++6-arm64-cross")
