"""The file of times of candidate kernels that `pockc tune` measured on a device, and that builds for it read.

JSON: the device's name, what was measured on, and per call (`passes.place.key`) the milliseconds of each candidate. A
device's YAML names its file as ``tuning``; `pockc build --tuning` gives one by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pockc.artifact_writer import write_atomically
from pockc.errors import UserError
from pockc.targets.devices import Device

Times = Mapping[str, Mapping[str, float]]  # milliseconds by call and candidate


@dataclass(frozen=True, slots=True)
class Table:
    """Times of one device. ``machine`` says what they were measured on, for people."""

    device: str
    machine: Mapping[str, Any]
    times: Times

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises UserError."""
        content = {"format": 1, "device": self.device, "machine": self.machine, "times": self.times}
        write_atomically(path, [json.dumps(content, indent=1).encode() + b"\n"])


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    device: str
    machine: dict[str, Any]
    times: dict[str, dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]]


def load(path: Path) -> Table:
    """The table in a file.

    Raises:
        UserError: no such file, or it is no table of times.
    """
    try:
        found = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read the table of times {path}: {error.strerror}", instead="Make one with `pockc tune`."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{field}: {first['msg']}", where=path, instead="Make the table again, with `pockc tune`."
        ) from None
    return Table(found.device, found.machine, found.times)


def times_of(device: Device) -> Times:
    """What was measured on a device; nothing where its entry names no file.

    Raises:
        UserError: the file is not valid, or of another device.
    """
    if not device.tuning:
        return {}
    table = load(Path(device.tuning))
    if table.device != device.name:
        raise UserError(
            f"the times in {device.tuning} are of the device {table.device!r}, and this build is for {device.name!r}",
            instead=f"Measure with `pockc tune --device {device.name}` on that device, or leave the table out.",
        )
    return table.times
