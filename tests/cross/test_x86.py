"""The static `pock-run` for x86 boards: small, and refused where the CPU lacks what it was made for."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from benchmarks import emulation, zoo
from pockc.build import build
from pockc.program import Program
from pockc.targets import devices
from pockc.targets.native import deliver
from tests.cross.boards import MACHINES, elf_machine, need, segments

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

# A CPU of qemu's without the instruction set, and what it is told; AVX-512 is what no CPU of qemu's has.
LACKING = {
    "x86-64-avx2": ("Nehalem", "this CPU lacks AVX2 or FMA"),
    "x86-64-avx512": ("max", r"this CPU lacks AVX-512 \(F, BW, DQ, VL\)"),
}


@pytest.fixture(scope="module")
def program() -> Program:
    need("x86_64")
    model, examples = zoo.mobilenet_v2(batch_size=1, image_size=32)
    return build(model, examples, scheme="sparse", entries=("train_step", "infer"))


@pytest.fixture(scope="module")
def model(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("x86") / "model.pock"
    program.save(file)
    return file


@pytest.mark.parametrize("device", ["x86-64", *LACKING])
def test_runner_is_static_small_and_runs_where_it_can(
    device: str, program: Program, model: Path, tmp_path: Path
) -> None:
    deliver(program, devices.find(device), tmp_path, "zig")
    runner = tmp_path / "pock-run"

    content = runner.read_bytes()
    assert len(content) < 1 << 20
    assert elf_machine(content) == MACHINES["x86_64"]
    assert 3 not in [kind for kind, _ in segments(content)], "a static program has no interpreter"
    if device in LACKING:
        core, said = LACKING[device]
        with pytest.raises(RuntimeError, match=f"pock-run: {said}, which this binary was made for: build the program"):
            emulation.run(runner, ["info", model], emulation.emulated("x86_64", core))
    else:
        chosen = {
            core: emulation.run(runner, ["info", model], ("qemu-x86_64", "-cpu", core)) for core in ("Nehalem", "max")
        }
        assert "baseline (this machine)" in chosen["Nehalem"] and "avx2 (this machine)" in chosen["max"]
    name = devices.find(device).instruction_set
    if platform.machine() == "x86_64" and (not name or name in Path("/proc/cpuinfo").read_text()):
        assert "samples" in emulation.run(runner, ["bench", model, "--steps", 1])
