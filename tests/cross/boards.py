"""What the tests of programs for other processors share."""

from __future__ import annotations

import os
import struct

import pytest

from benchmarks import emulation
from pockc.targets.native import toolchain

WANTED = os.environ.get("POCKC_CROSS", "").replace(",", " ").split()
MACHINES = {"x86_64": 62, "aarch64": 183, "armv7l": 40, "riscv64": 243}  # e_machine of ELF


def need(architecture: str) -> None:
    """Skip, with the reason, what cannot be run here."""
    if architecture not in WANTED:
        pytest.skip(f"POCKC_CROSS does not name {architecture}: `make test-cross` does")
    if not toolchain.has_zig():
        pytest.skip("zig is not installed: pip install 'pockc[cross]'")
    if reason := emulation.missing(architecture):
        pytest.skip(reason)


def elf_machine(content: bytes) -> int:
    assert content[:4] == b"\x7fELF"
    return int(struct.unpack_from("<H", content, 18)[0])


def segments(content: bytes) -> list[tuple[int, int]]:
    """Type and alignment of each program header."""
    wide = content[4] == 2
    offset = struct.unpack_from("<Q", content, 32)[0] if wide else struct.unpack_from("<I", content, 28)[0]
    size, count = struct.unpack_from("<HH", content, 54 if wide else 42)
    at = 48 if wide else 28
    field = "<Q" if wide else "<I"
    return [
        (struct.unpack_from("<I", content, start)[0], struct.unpack_from(field, content, start + at)[0])
        for start in range(offset, offset + size * count, size)
    ]
