"""Where functions lie in the linked runtime: what a program never runs shall not be in its memory.

A page fault brings the pages around it too, so that resident memory grows where unused functions lie between used ones.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from pockc import abi

pytestmark = pytest.mark.native

INSTRUCTION_SETS = {".text.baseline", ".text.avx2", ".text.avx512", ".text.neon"}
HALVES = re.compile(r"simd_.*3[BF]16")  # in the compiler's name of a function, an argument of a template


def readelf(option: str, name: str) -> str:
    command = ["readelf", "--wide", option, str(abi.runtime_file(name))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sections(name: str) -> dict[str, range]:
    """Addresses of every section of code."""
    rows = re.findall(r"\] (\.text\S*) +PROGBITS +(\w+) \w+ (\w+)", readelf("--sections", name))
    return {section: range(int(at, 16), int(at, 16) + int(size, 16)) for section, at, size in rows}


@pytest.mark.parametrize("name", ["libpockrt.so", "pock-run"])
def test_kernels_lie_apart_by_instruction_set_and_width_of_numbers(name: str) -> None:
    found = sections(name)
    kernels = [len(found[section]) for section in INSTRUCTION_SETS & set(found)]
    assert kernels and min(kernels) > 200_000
    # 16-bit numbers have a third to a half of the code of 32-bit ones.
    assert len(found[".text.halves"]) > sum(kernels) / 4
    assert 20_000 < len(found[".text.checks"]) < len(found[".text.reference"])
    # At load every call is checked, while reference kernels hardly ever run.
    order = sorted(
        (section for section in found if section.startswith(".text.")), key=lambda section: found[section].start
    )
    assert (order[0], order[-1]) == (".text.checks", ".text.reference")


@pytest.mark.parametrize("name", ["libpockrt.so", "pock-run"])
def test_no_function_for_16_bits_lies_among_others(name: str) -> None:
    symbols = re.findall(r": (\w+) +\w+ FUNC .* (\S+)$", readelf("--symbols", name), re.MULTILINE)
    if not any("simd_" in function for _, function in symbols):
        pytest.skip("the runtime is stripped: there are no names to look at")
    halves = sections(name)[".text.halves"]
    misplaced = {
        function
        for address, function in symbols
        if "simd_" in function and bool(HALVES.search(function)) != (int(address, 16) in halves)
    }
    assert not misplaced
