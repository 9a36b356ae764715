"""The boards that pockc knows, and boards that users describe in YAML.

A file for ``--device my-board.yaml`` names what differs from a known board, and nothing else is needed:

    name: my-board
    like: rpi4                # a name of `pockc devices`
    cores: 2
    memory: 512MiB
    cost: {gflops: 6.0, gigabytes_per_second: 2.0, cache_megabytes: 1}
    tuning: my-board.json     # beside this file: what `pockc tune` measured on the board

or says everything: ``name``, ``triple``, ``cores`` and ``memory`` are needed then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pockc.errors import UserError, near_names
from pockc.sizes import parse_size


@dataclass(frozen=True, slots=True)
class Cost:
    """What a board can do, roughly: for models of time, which rank and explain. None of it was measured on a board."""

    gflops: float  # float32, of one core: clock x lanes x pipes x 2
    gigabytes_per_second: float  # that one core reads of main memory
    call_microseconds: float = 2.0  # to start a kernel
    cache_megabytes: float = 1.0  # of the last level, in MiB

    @property
    def cache_bytes(self) -> int:
        """Bytes that a program can count on finding in the cache again."""
        return int(self.cache_megabytes * (1 << 20))


@dataclass(frozen=True, slots=True)
class Device:
    """A board. ``memory_bytes`` is of its common variant; 0 where it varies too much to say."""

    name: str
    triple: str  # of the C++ toolchain
    features: tuple[str, ...]  # CPU features that every board of this name has, as GCC spells them
    cores: int
    threads: int  # cores that training may use; workspaces are sized for as many
    memory_bytes: int
    cost: Cost
    cpu: str = ""  # core, as GCC and Clang name it
    target: str = "native"
    dtype: str = "f32"  # that the board computes fastest in, among those that the target has
    tuning: str = ""  # a file of times that `pockc tune` measured on it (pockc/tuning.py)

    @property
    def architecture(self) -> str:
        """The processor as ``uname -m`` says it: x86_64, aarch64, armv7l or riscv64."""
        first = self.triple.partition("-")[0]
        return {"arm": "armv7l", "armv7": "armv7l", "armv7a": "armv7l", "arm64": "aarch64"}.get(first, first)

    @property
    def instruction_set(self) -> str:
        """The best x86 set that every such board has, as the runtime names it; else "": chosen where it runs."""
        return next((name for name, features in _X86_SETS.items() if features <= set(self.features)), "")

    @property
    def is_x86(self) -> bool:
        """Whether it is an x86 machine."""
        return self.architecture == "x86_64"

    def as_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self) | {"features": list(self.features)}


DEFAULT = "x86-64"
ARCHITECTURES = ("x86_64", "aarch64", "armv7l", "riscv64")
_ARM64, _ARM32, _X86 = "aarch64-linux-gnu", "arm-linux-gnueabihf", "x86_64-linux-gnu"
_GIB = 1 << 30
_V8, _V82 = ("neon",), ("neon", "fp16", "dotprod")
_AVX2 = ("sse2", "avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_X86_SETS = {"avx512": frozenset(_AVX512), "avx2": frozenset(_AVX2)}  # best first

# Costs: the clock of the data sheet times what llvm-mca's model of the core does per cycle in the inner loop of a
# matrix product: 4 operations on a Cortex-A53, 8 on A57 and A72, 16 on A76 and A78. Memory: of one core, to one digit.
# Caches: of the data sheet; of x86 what small machines have.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("rpi3", _ARM64, _V8, 4, 4, 1 * _GIB, Cost(5.6, 2.0, cache_megabytes=0.5), "cortex-a53"),
        Device("rpi4", _ARM64, _V8, 4, 4, 4 * _GIB, Cost(12.0, 3.0), "cortex-a72"),
        Device("rpi5", _ARM64, _V82, 4, 4, 8 * _GIB, Cost(38.4, 8.0, cache_megabytes=2.0), "cortex-a76"),
        Device("rpi-armv7", _ARM32, ("neon-vfpv4",), 4, 4, 1 * _GIB, Cost(3.6, 1.5, cache_megabytes=0.5), "cortex-a7"),
        Device("jetson-nano", _ARM64, _V8, 4, 4, 4 * _GIB, Cost(11.4, 4.0, cache_megabytes=2.0), "cortex-a57"),
        Device("jetson-orin", _ARM64, _V82, 8, 8, 32 * _GIB, Cost(35.2, 12.0, cache_megabytes=2.0), "cortex-a78"),
        Device("android-arm64", "aarch64-linux-android", _V8, 8, 4, 0, Cost(12.0, 4.0)),
        Device("x86-64", _X86, ("sse2",), 4, 4, 0, Cost(20.0, 8.0, cache_megabytes=4.0)),
        Device("x86-64-avx2", _X86, _AVX2, 4, 4, 0, Cost(80.0, 10.0, cache_megabytes=8.0)),
        Device("x86-64-avx512", _X86, _AVX512, 4, 4, 0, Cost(160.0, 12.0, cache_megabytes=8.0)),
        Device("riscv64", "riscv64-linux-gnu", ("rv64gc",), 4, 4, 4 * _GIB, Cost(3.0, 2.0, cache_megabytes=2.0)),
    )
}


def find(name: str) -> Device:
    """The device of that name, or of that YAML file.

    Raises:
        UserError: there is no such device, or its file is not valid.
    """
    if name.endswith((".yaml", ".yml")):
        return load(Path(name))
    if name not in DEVICES:
        raise UserError(
            f"there is no device {name!r}",
            supported=", ".join((*DEVICES, "a .yaml file that describes one")),
            instead=near_names(name, DEVICES),
        )
    return DEVICES[name]


def tuned(device: Device, table: Path | None) -> Device:
    """The device with another file of times; None keeps its own."""
    return device if table is None else replace(device, tuning=str(table))


def recorded(metadata: Mapping[str, Any]) -> Device:
    """The device that a program was built for, from its metadata."""
    board = metadata.get("board")
    if board is None:
        return find(metadata["device"])
    return Device(**{**board, "features": tuple(board["features"]), "cost": Cost(**board["cost"])})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _CostFile(_Strict):
    gflops: Annotated[float, Field(gt=0)] | None = None
    gigabytes_per_second: Annotated[float, Field(gt=0)] | None = None
    call_microseconds: Annotated[float, Field(ge=0)] | None = None
    cache_megabytes: Annotated[float, Field(ge=0)] | None = None


class _DeviceFile(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    like: str | None = None
    triple: str | None = None
    cpu: str | None = None
    features: tuple[str, ...] | None = None
    cores: Annotated[int, Field(ge=1, le=256)] | None = None
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    memory: str | None = None
    dtype: Literal["f32"] | None = None
    tuning: str | None = None
    cost: _CostFile | None = None


def load(path: Path) -> Device:
    """A device from a YAML file.

    Raises:
        UserError: no such file, or it is not a valid description of a board: the message names field and reason.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the device file {path}: {error.strerror}", supported=", ".join(DEVICES)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}", where=path) from None
    try:
        described = _DeviceFile.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path) from None
    return _merged(described, path)


def _explain(error: ValidationError, path: Path) -> UserError:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = _CostFile if field.startswith("cost.") else _DeviceFile
        names = tuple(known.model_fields)
        return UserError(
            f"unknown field {field!r}",
            where=path,
            supported=", ".join(names),
            instead=near_names(str(first["loc"][-1]), names),
        )
    return UserError(f"field {field!r}: {first['msg']}" if field else first["msg"], where=path)


def _merged(described: _DeviceFile, path: Path) -> Device:
    """The description over the board that it is like, or over nothing but defaults."""
    if described.name in DEVICES:
        raise UserError(
            f"{described.name!r} is the name of a known device", where=path, instead="Choose another name, and `like`."
        )
    base = find(described.like) if described.like else _bare(described, path)
    given = described.model_dump(exclude={"like", "memory", "cost"}, exclude_none=True)
    given["tuning"] = str(path.parent / described.tuning) if described.tuning else ""  # never that of another board
    if "cores" in given and "threads" not in given:
        given["threads"] = min(described.cores or 1, 16)
    if described.memory is not None:
        given["memory_bytes"] = parse_size(described.memory)
    if described.cost is not None:
        given["cost"] = replace(base.cost, **described.cost.model_dump(exclude_none=True))
    device = replace(base, **given)
    if device.threads > device.cores:
        raise UserError(f"{device.threads} threads on {device.cores} cores", where=path, supported="threads <= cores")
    if device.architecture not in ARCHITECTURES or "-linux" not in device.triple:
        raise UserError(
            f"the triple {device.triple!r} names no machine that the runtime is for",
            where=path,
            supported="x86_64-linux-gnu, aarch64-linux-gnu, aarch64-linux-android, arm-linux-gnueabihf, "
            "riscv64-linux-gnu, and the same with musl",
        )
    return device


def _bare(described: _DeviceFile, path: Path) -> Device:
    missing = [name for name in ("triple", "cores", "memory") if getattr(described, name) is None]
    if missing:
        raise UserError(
            f"the description lacks {', '.join(missing)}",
            where=path,
            instead="Say `like: rpi4`, or another known device, to take what is not given from there.",
        )
    cores = described.cores or 1
    return Device(described.name, described.triple or "", (), cores, cores, 0, Cost(10.0, 3.0))
