"""What compiles the runtime for another machine: zig from pip by default, or any CMake toolchain file.

Everything made is kept in one cache folder, so that the second program for a processor costs one small compilation and
a link: in a clone ``.cache/pockc``, else ``$XDG_CACHE_HOME/pockc`` (``~/.cache/pockc``). Removing it is safe.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pockc
from pockc.errors import UserError
from pockc.targets.devices import Device

GLIBC = "2.28"  # that shared libraries need at most: Debian 10, Raspberry Pi OS 10 and everything later

# Per `uname -m`: zig's name of the machine, of its C library, and the CPU to compile for where not the oldest of all.
_ZIG_TARGETS = {
    "x86_64": ("x86_64-linux", "", ""),
    "aarch64": ("aarch64-linux", "", ""),
    "armv7l": ("arm-linux", "eabihf", "cortex_a7"),  # with NEON and fused multiply-add: the binary checks
    "riscv64": ("riscv64-linux", "", ""),
}


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A CMake toolchain file, and what distinguishes builds that it makes from others."""

    file: Path
    key: str


def cache_folder() -> Path:
    """Where compiled runtimes are kept."""
    clone = _clone()
    if clone is not None:
        return clone / ".cache" / "pockc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pockc"


def runtime_sources() -> Path:
    """The folder with the runtime's CMakeLists.txt. Raises UserError where this installation has none."""
    clone = _clone()
    sources = clone / "runtime" if clone else _package() / "_runtime"
    if not (sources / "CMakeLists.txt").is_file():
        raise UserError(
            f"the sources of the runtime are not in {sources}", instead="Install pockc from its wheel, or use a clone."
        )
    return sources


def tool(name: str) -> str:
    """A build tool from this environment or from the system. Raises UserError where neither has it."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(name, path=path)
    if found is None:
        raise UserError(f"cross-compiling needs {name}", instead="Install it: pip install 'pockc[cross]'.")
    return found


def for_device(device: Device, choice: str | None, *, library: bool = False) -> Toolchain:
    """The toolchain for a board.

    Args:
        device: The board.
        choice: ``zig`` or None for zig from pip, else the path of a CMake toolchain file.
        library: Whether it is for shared libraries, which use the board's C library; `pock-run` brings its own.

    Raises:
        UserError: there is no zig here, or no such file.
    """
    if choice in (None, "zig"):
        return _zig(device, library=library)
    file = Path(str(choice)).resolve()
    if not file.is_file():
        raise UserError(f"there is no toolchain file {choice}", supported="zig, or the path of a CMake toolchain file")
    return Toolchain(file, f"{device.architecture}-{_digest(str(file).encode() + file.read_bytes())}")


def has_zig() -> bool:
    """Whether zig is installed in this Python environment."""
    return importlib.util.find_spec("ziglang") is not None


def _package() -> Path:
    return Path(pockc.__file__).resolve().parent


def _clone() -> Path | None:
    folder = _package().parent
    return folder if (folder / "runtime" / "CMakeLists.txt").is_file() and (folder / "Makefile").is_file() else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _zig(device: Device, *, library: bool) -> Toolchain:
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        raise UserError(
            f"there is no pock-run for {device.name} ({device.triple}) here: cross-compiling it needs zig",
            instead="pip install 'pockc[cross]', or name a CMake toolchain file with --toolchain; or build runtime/ "
            "with CMake on the board: model.pock runs there as it is.",
        )
    zig = Path(found.origin).parent / "zig"
    system, abi, cpu = _ZIG_TARGETS[device.architecture]
    target = f"{system}-gnu{abi}.{GLIBC}" if library else f"{system}-musl{abi}"
    folder = cache_folder() / "toolchains" / target
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("cc", "c++", "ar", "ranlib"):
        _write_program(folder / name, _WRAPPER.format(cache=cache_folder() / "zig", zig=zig, name=name))
    processor = {"armv7l": "armv7"}.get(device.architecture, device.architecture)
    text = _TOOLCHAIN.format(processor=processor, folder=folder, target=target, cpu=f"-mcpu={cpu}" if cpu else "")
    write_if_changed(folder / "toolchain.cmake", text)
    return Toolchain(folder / "toolchain.cmake", f"{target}-{_digest(str(zig).encode())}")


_WRAPPER = """#!/bin/sh
export ZIG_GLOBAL_CACHE_DIR="{cache}" ZIG_LOCAL_CACHE_DIR="{cache}"
exec "{zig}" {name} "$@"
"""

# Optimised like the build itself, and never linked: a check that links would compile the C++ library a second time.
_TOOLCHAIN = """# Written by pockc.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {processor})
set(CMAKE_C_COMPILER "{folder}/cc")
set(CMAKE_CXX_COMPILER "{folder}/c++")
set(CMAKE_AR "{folder}/ar" CACHE FILEPATH "")
set(CMAKE_RANLIB "{folder}/ranlib" CACHE FILEPATH "")
set(CMAKE_C_COMPILER_TARGET {target})
set(CMAKE_CXX_COMPILER_TARGET {target})
set(CMAKE_C_FLAGS_INIT "{cpu}")
set(CMAKE_CXX_FLAGS_INIT "{cpu}")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
"""


def write_if_changed(path: Path, text: str) -> None:
    """Write a file unless it says that already: its time decides what is compiled again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _write_program(path: Path, text: str) -> None:
    write_if_changed(path, text)
    path.chmod(0o755)
