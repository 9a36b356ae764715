"""`pock-run` and `libpockrt` for another machine, compiled by a toolchain of :mod:`pockc.targets.native.toolchain`.

One build tree per processor and toolchain holds the compiled runtime. A program adds a kernel list of its own, which is
compiled into the registry of its `pock-run`: the linker then takes those kernels and leaves the others.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pockc.errors import UserError
from pockc.program import Program
from pockc.targets.devices import Device
from pockc.targets.native import toolchain
from pockc.targets.native.toolchain import Toolchain

_X86_SETS = ("baseline", "avx2", "avx512")  # as runtime/src/registry.cpp has them
HEADERS = ("include/pockc/runtime.h", "bindings/pockc.hpp")


def build_runner(
    program: Program, device: Device, folder: Path, choice: str | None = None, *, symbols: bool = False
) -> Path:
    """Compile a stripped `pock-run` with a program's kernels alone, statically linked where the toolchain can.

    Args:
        program: Its entries say which kernels.
        device: The board.
        folder: Where `pock-run` goes.
        choice: ``zig``, None for the same, or the path of a CMake toolchain file.
        symbols: Keep the names of functions, for tools that look into the binary.

    Raises:
        UserError: there is no toolchain, or it fails.
    """
    tools = toolchain.for_device(device, choice)
    halves = has_halves(program)
    with _build_tree(tools, halves, symbols) as tree:
        toolchain.write_if_changed(tree / "program" / "kernels.inc", kernel_list(program, device))
        _compile(tree, tools, ["pock-run"], halves, symbols)
        return _deliver(tree / "pock-run", folder / "pock-run")


def build_library(device: Device, folder: Path, choice: str | None = None) -> list[Path]:
    """Compile ``libpockrt.so`` and ``libpockrt.a`` with every kernel; copies their headers too."""
    tools = toolchain.for_device(device, choice, library=True)
    with _build_tree(tools) as tree:
        _compile(tree, tools, ["pockrt", "pockrt_static"])
        files = [
            _deliver(tree / "libpockrt.so", folder / "lib" / "libpockrt.so"),
            _deliver(tree / "libpockrt_static.a", folder / "lib" / "libpockrt.a"),
        ]
    sources = toolchain.runtime_sources()
    return files + [_deliver(sources / name, folder / "include" / "pockc" / Path(name).name) for name in HEADERS]


def build_onnxruntime_runner(device: Device, folder: Path, choice: str | None = None) -> Path:
    """Compile ``pock-run-onnxruntime``; it is dynamic, for it loads ONNX Runtime's library."""
    tools = toolchain.for_device(device, choice, library=True)
    with _build_tree(tools) as tree:
        _compile(tree, tools, ["pock-run-onnxruntime"])
        return _deliver(tree / "pock-run-onnxruntime", folder / "pock-run-onnxruntime")


def kernel_list(program: Program, device: Device) -> str:
    """A kernels.inc with the kernels of a program, in the instruction set of its board alone where it names one."""
    used = {node.op for graph in program.entries.values() for node in graph.nodes}
    products = "bf16" if device.is_x86 else "fp16"  # what such processors may multiply
    multiplies_halves = bool(program.metadata.get("half_arithmetic")) and program.metadata["dtype"] == products
    complete = (toolchain.runtime_sources() / "kernels" / "kernels.inc").read_text()

    def keep(line: str) -> bool:
        entry = re.match(r"POCKC_(REF|SIMD|DOTPROD|HALF_PRODUCTS|BF16_PRODUCTS)\((\w+)\)", line)
        if entry is None:
            return True
        wanted = {"HALF_PRODUCTS": multiplies_halves, "BF16_PRODUCTS": multiplies_halves and device.is_x86}
        return entry[2] in used and wanted.get(entry[1], True)

    others = [name for name in _X86_SETS if device.instruction_set not in ("", name)]
    left_out = "".join(f"#define POCKC_WITHOUT_{name.upper()}\n" for name in others)
    return left_out + "".join(line for line in complete.splitlines(keepends=True) if keep(line))


def has_halves(program: Program) -> bool:
    """Whether some tensor has 16 bits: kernels for these double a binary."""
    values = (value for graph in program.entries.values() for node in graph.nodes for value in node.outputs)
    return any(value.type.is_half for value in values)


@contextmanager
def _build_tree(tools: Toolchain, halves: bool = True, symbols: bool = False) -> Iterator[Path]:
    """The build tree of a toolchain, for this process alone: one each without kernels for 16 bits, and with symbols."""
    name = tools.key + ("" if halves else "-f32") + ("-symbols" if symbols else "")
    tree = toolchain.cache_folder() / "runtime" / name
    (tree / "program").mkdir(parents=True, exist_ok=True)
    with (tree / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tree


def _compile(tree: Path, tools: Toolchain, targets: Sequence[str], halves: bool = True, symbols: bool = False) -> None:
    """Configure once, then build; the output goes to ``build.log`` in the tree."""
    cmake, ninja, sources = toolchain.tool("cmake"), toolchain.tool("ninja"), toolchain.runtime_sources()
    with (tree / "build.log").open("w") as log:
        if not (tree / "build.ninja").is_file() or _made_from(tree) != sources:
            shutil.rmtree(tree / "CMakeFiles", ignore_errors=True)
            (tree / "CMakeCache.txt").unlink(missing_ok=True)
            options = {
                "CMAKE_MAKE_PROGRAM": ninja,
                "CMAKE_BUILD_TYPE": "Release",
                "CMAKE_TOOLCHAIN_FILE": tools.file,
                "POCKC_BUILD_TESTS": "OFF",
                "POCKC_ONNXRUNTIME": "ON",
                "POCKC_KERNELS_DIR": tree / "program",
                "POCKC_HALVES": "ON" if halves else "OFF",
                "POCKC_SYMBOLS": "ON" if symbols else "OFF",
            }
            definitions = [f"-D{name}={value}" for name, value in options.items()]
            _run([cmake, "-S", str(sources), "-B", str(tree), "-G", "Ninja", *definitions], log.fileno(), tree)
        _run([ninja, "-C", str(tree), *targets], log.fileno(), tree)


def _made_from(tree: Path) -> Path | None:
    """The sources that a tree was configured for: a cache may outlive the clone."""
    cache = tree / "CMakeCache.txt"
    found = re.search(r"^CMAKE_HOME_DIRECTORY:\w+=(.*)$", cache.read_text(), re.MULTILINE) if cache.is_file() else None
    return Path(found[1]) if found else None


def _run(command: list[str], log: int, tree: Path) -> None:
    done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = (tree / "build.log").read_text(errors="replace").splitlines()
        telling = [
            line
            for sign in (r"\berror: ", r"\bCMake Error", r"\bFAILED\b", r"")
            for line in lines
            if re.search(sign, line)
        ]
        first = telling[0] if telling else "it printed nothing"
        raise UserError(
            f"cross-compiling the runtime failed: {first.strip()}",
            instead=f"The whole output is in {tree / 'build.log'}.",
        )


def _deliver(source: Path, to: Path) -> Path:
    """Copy a result; one that is running may be replaced, but not written to."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.unlink(missing_ok=True)
        shutil.copy2(source, to)
        os.utime(to)
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror}") from None
    return to
