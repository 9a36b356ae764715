"""The boards that pockc knows: what the compiler and the user need to know of each."""

from __future__ import annotations

from dataclasses import dataclass

from pockc.errors import UserError, near_names


@dataclass(frozen=True, slots=True)
class Device:
    """A board. ``memory_bytes`` is of its common variant; 0 where it varies too much to say."""

    name: str
    triple: str  # of the C++ toolchain
    features: tuple[str, ...]  # CPU features that every board of this name has, as GCC spells them
    threads: int  # cores that training may use; workspaces are sized for as many
    memory_bytes: int
    target: str = "native"
    dtype: str = "f32"  # that the board computes fastest in, among those that the target has

    @property
    def is_x86(self) -> bool:
        """Whether it is an x86 machine."""
        return self.triple.startswith("x86_64")


DEFAULT = "x86-64"
_ARM, _X86 = "aarch64-linux-gnu", "x86_64-linux-gnu"
_GIB = 1 << 30

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("rpi3", _ARM, ("simd",), 4, 1 * _GIB),  # Cortex-A53
        Device("rpi4", _ARM, ("simd",), 4, 4 * _GIB),  # Cortex-A72
        Device("rpi5", _ARM, ("simd", "fp16", "dotprod"), 4, 8 * _GIB),  # Cortex-A76
        Device("jetson-nano", _ARM, ("simd",), 4, 4 * _GIB),  # Cortex-A57
        Device("jetson-orin", _ARM, ("simd", "fp16", "dotprod"), 8, 32 * _GIB),  # Cortex-A78AE
        Device("android-arm64", "aarch64-linux-android", ("simd",), 4, 0),
        Device("x86-64", _X86, ("sse2",), 4, 0),
        Device("x86-64-avx2", _X86, ("avx2", "fma"), 4, 0),
        Device("x86-64-avx512", _X86, ("avx2", "fma", "avx512f", "avx512bw", "avx512vl"), 4, 0),
    )
}


def find(name: str) -> Device:
    """The device of that name. Raises UserError if there is none."""
    if name not in DEVICES:
        raise UserError(f"there is no device {name!r}", supported=", ".join(DEVICES), instead=near_names(name, DEVICES))
    return DEVICES[name]
