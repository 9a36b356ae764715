"""What cross-compiling decides and says before, and instead of, compiling anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pockc.build import build
from pockc.errors import UserError
from pockc.program import Program
from pockc.recipe import Dtype
from pockc.targets import devices
from pockc.targets.native import cross, deliver, toolchain
from tests.shell import Shell

pytestmark = [pytest.mark.torch, pytest.mark.native]


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return build(nn.Sequential(nn.Linear(4, 3)).eval(), (torch.randn(2, 4),), device="rpi4")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that nothing that was compiled before is found."""
    monkeypatch.setattr(toolchain, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_kernel_list_has_the_program_s_kernels_and_nothing_else(program: Program) -> None:
    listed = cross.kernel_list(program, devices.find("rpi4"))
    used = {node.op for graph in program.entries.values() for node in graph.nodes}
    assert "POCKC_REF(matmul)\n" in listed and "POCKC_SIMD(matmul)\n" in listed
    assert {line[len("POCKC_REF(") : -1] for line in listed.splitlines() if line.startswith("POCKC_REF(")} == used
    assert "conv2d" not in listed
    macros = ("REF", "SIMD", "DOTPROD", "HALF_PRODUCTS", "BF16_PRODUCTS")
    assert listed.endswith("".join(f"#undef POCKC_{macro}\n" for macro in macros))


@pytest.mark.parametrize(
    ("device", "left_out"),
    [
        ("x86-64", []),
        ("x86-64-avx2", ["BASELINE", "AVX512"]),
        ("x86-64-avx512", ["BASELINE", "AVX2"]),
        ("rpi5", []),
        ("riscv64", []),
    ],
)
def test_board_gets_its_instruction_set_alone(program: Program, device: str, left_out: list[str]) -> None:
    listed = cross.kernel_list(program, devices.find(device))
    assert [line.partition("WITHOUT_")[2] for line in listed.splitlines() if "WITHOUT_" in line] == left_out


@pytest.mark.parametrize("dtype", ["f32", "bf16", "fp16"])
def test_board_gets_kernels_for_16_bits_only_where_its_program_has_such_tensors(dtype: Dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    assert cross.has_halves(build(model, (torch.randn(32, 64),), dtype=dtype)) == (dtype != "f32")


def test_cache_is_in_the_clone_and_else_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert toolchain.cache_folder() == Path(__file__).parents[1] / ".cache" / "pockc"
    monkeypatch.setattr(toolchain, "_clone", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toolchain.cache_folder() == tmp_path / "pockc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert toolchain.cache_folder() == Path.home() / ".cache" / "pockc"


def test_boards_of_one_processor_share_what_is_compiled(cache: Path) -> None:
    if not toolchain.has_zig():
        pytest.skip("zig is not installed: pip install 'pockc[cross]'")
    pi3, pi5, phone, wide = (
        toolchain.for_device(devices.find(name), None) for name in ("rpi3", "rpi5", "android-arm64", "riscv64")
    )
    assert pi3 == pi5 == phone != wide
    assert toolchain.for_device(devices.find("rpi3"), "zig", library=True).key != pi3.key
    assert "-mcpu=cortex_a7" in toolchain.for_device(devices.find("rpi-armv7"), None).file.read_text()


def test_missing_toolchain_file_is_refused_before_the_build(shell: Shell) -> None:
    code, out, err = shell("build", "model.py:make", "--device", "rpi4", "--toolchain", "nowhere.cmake")
    assert (code, out) == (2, "")
    assert "there is no toolchain file nowhere.cmake" in err


def test_failing_toolchain_is_quoted_and_its_output_kept(program: Program, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.cmake"
    file.write_text("set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_CXX_COMPILER /nowhere/g++)\n")

    with pytest.raises(UserError, match="cross-compiling the runtime failed: CMake Error") as caught:
        deliver(program, devices.find("rpi4"), tmp_path / "out", str(file))

    log = Path(str(caught.value).rpartition(" is in ")[2].rstrip("."))
    assert "/nowhere/g++" in log.read_text()
    assert log.is_relative_to(cache)


def test_missing_build_tool_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"cross-compiling needs nimja\. Install it: pip install 'pockc\[cross\]'"):
        toolchain.tool("nimja")
