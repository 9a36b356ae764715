"""Tuning for a board without Python, from profiles of programs that each use one kind of kernel.

`prepare` writes a program per kind; the board runs ``pock-run bench model.pock --profile --json profile.json`` of each;
`collect` makes the table. Only calls of the training step are measured so: others are left to the model of cost.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pockc.build import build
from pockc.errors import UserError
from pockc.ir import Node
from pockc.passes import place
from pockc.targets import devices
from pockc.targets import find as find_target
from pockc.targets.devices import Device
from pockc.tune import distinct_calls, untuned
from pockc.tuning import Table

ENTRY = "train_step"
PROFILE = "profile.json"
ADVICE = f"Run `./pock-run bench model.pock --profile --json {PROFILE}` on the board, and put the file there."


def prepare(arguments: Mapping[str, Any], device: Device, folder: Path) -> list[Path]:
    """Write ``folder/<kind>/``, with a program that uses that kind of kernel wherever its memory allows, per kind.

    Raises:
        UserError: as `pockc.build`; or there is no `pock-run` for the device here.
    """
    calls = distinct_calls(arguments, device)
    written = []
    for kind in place.KINDS:
        preferred = {key: {name: 1.0 if name == kind else 2.0 for name in place.KINDS} for key in calls}
        with tempfile.TemporaryDirectory(prefix="pockc-tune-") as temporary:
            table = Path(temporary, "table.json")
            Table(device.name, {}, preferred).save(table)
            program = build(**{**untuned(arguments, device), "device": devices.tuned(device, table)})
        find_target("native").emit(program, folder / kind)
        written.append(folder / kind)
    return written


def collect(arguments: Mapping[str, Any], device: Device, folder: Path) -> Table:
    """The table of the profiles in ``folder/<kind>/profile.json``, which the board made of what `prepare` wrote.

    Raises:
        UserError: as `pockc.build`; a profile is missing, is no profile, or is of another program.
    """
    files = {kind: folder / kind / PROFILE for kind in place.KINDS}
    profiles = {kind: _read(path) for kind, path in files.items()}
    program = build(**untuned(arguments, device, without=place.KERNELS))
    nodes = [node for node in program.entries[ENTRY].nodes if node.op in place.REPLACED]
    found: dict[str, dict[str, list[float]]] = {}
    for kind, calls in profiles.items():
        _require_same(files[kind], calls, nodes, kind)
        for node, call in zip(nodes, calls, strict=True):
            candidates = place.candidates(node)
            if len(candidates) > 1 and call.op == candidates[kind].op and call.ms > 0:  # else it did not fit the memory
                found.setdefault(place.key(node), {}).setdefault(kind, []).append(call.ms)
    times = {key: {kind: sum(ms) / len(ms) for kind, ms in kinds.items()} for key, kinds in found.items()}
    return Table(device.name, {"processor": device.cpu or device.name, "architecture": device.architecture}, times)


class _Call(NamedTuple):
    op: str
    shapes: str  # "[1,8,8,4] [4,3,3,4] > [1,8,8,4]"
    ms: float


def _read(path: Path) -> list[_Call]:
    """The calls that may have several candidates, in order."""
    try:
        rows = json.loads(path.read_text())["profile"]
        calls = [_Call(row["op"], row["shapes"], float(row["cpu_ms"])) for row in rows]
        return [call for call in calls if call.op in (*place.REPLACED, place.WINOGRAD)]
    except OSError as error:
        raise UserError(f"cannot read the profile {path}: {error.strerror}", instead=ADVICE) from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not what `pock-run bench --profile --json` writes", instead=ADVICE) from None


def _shapes(node: Node) -> str:
    inputs, outputs = (
        " ".join(f"[{','.join(map(str, v.type.shape))}]" for v in vs) for vs in (node.inputs, node.outputs)
    )
    return f"{inputs} > {outputs}"


def _require_same(path: Path, calls: list[_Call], nodes: list[Node], kind: str) -> None:
    """Raise UserError unless these can be the calls of the program of one kind."""
    possible = [{(n.op, _shapes(n)), (place.candidates(n).get(kind, n).op, _shapes(n))} for n in nodes]
    same = len(calls) == len(nodes)
    if not same or any((call.op, call.shapes) not in known for call, known in zip(calls, possible, strict=True)):
        raise UserError(f"{path} is of another program than this model and these options make", instead=ADVICE)
