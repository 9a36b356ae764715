"""What lies in the arena at each call of an entry, found from the calls of a program file alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pockc.artifact import Artifact, Call, Entry, Tensor
from pockc.passes.memory import aligned

STATE_KINDS = {"parameter": "parameters", "slot": "optimizer_state"}  # other states are buffers
KINDS = (
    "frozen_parameters", "parameters", "optimizer_state", "buffers",
    "inputs", "saved_activations", "activations", "gradients", "workspace",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Live:
    """A value in the arena on calls ``first`` to ``last`` inclusive. ``call`` makes it: -1 for inputs and states."""

    first: int
    last: int
    nbytes: int  # rounded up to the arena's alignment
    kind: str
    name: str
    type: str
    call: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """One entry: its calls, and every value of the arena, states and workspaces included."""

    calls: tuple[Call, ...]
    values: tuple[Live, ...]

    def by_kind(self) -> dict[str, npt.NDArray[np.int64]]:
        """Live bytes of the arena at each call, kind by kind."""
        count = max(len(self.calls), 1)
        steps = {kind: np.zeros(count + 1, np.int64) for kind in KINDS if kind != "frozen_parameters"}
        for value in self.values:
            steps[value.kind][value.first] += value.nbytes
            steps[value.kind][value.last + 1] -= value.nbytes
        return {kind: np.cumsum(deltas)[:-1] for kind, deltas in steps.items()}

    def total(self) -> npt.NDArray[np.int64]:
        """Live bytes of the arena at each call."""
        layers = np.stack(list(self.by_kind().values()))
        return np.asarray(layers.sum(axis=0), np.int64)

    def alive(self, call: int) -> list[Live]:
        """What is in the arena at a call, largest first."""
        return sorted((v for v in self.values if v.first <= call <= v.last), key=lambda value: -value.nbytes)


def timeline(artifact: Artifact, entry: str) -> Timeline:
    """The timeline of one entry of a program file."""
    found = artifact.entries[entry]
    end = max(len(found.calls) - 1, 0)
    states = [
        Live(0, end, aligned(s.tensor.nbytes), STATE_KINDS.get(s.kind, "buffers"), s.name, str(s.tensor), -1)
        for s in artifact.states
        if s.mutable
    ]
    workspaces = [
        Live(i, i, aligned(c.workspace_bytes), "workspace", f"{c.op} workspace", f"u8[{c.workspace_bytes}]", i)
        for i, c in enumerate(found.calls)
        if c.workspace_bytes
    ]
    transient = _Replay(artifact.state_bytes, found).values()
    return Timeline(found.calls, (*states, *transient, *workspaces))


def mapped_bytes(artifact: Artifact) -> int:
    """Bytes of the file that calls read in place: frozen weights and constants."""
    calls = [call for entry in artifact.entries.values() for call in entry.calls]
    ranges = {(t.offset, t.offset + aligned(t.nbytes)) for call in calls for t in call.inputs if t.in_data}
    total = covered = 0
    for start, end in sorted(ranges):  # parts of a tensor may be read beside the whole
        total += max(0, end - max(start, covered))
        covered = max(covered, end)
    return total


@dataclass(slots=True)
class _Value:
    call: int
    name: str
    tensor: Tensor
    phases: set[str] = field(default_factory=set)  # of the calls that read it


@dataclass(slots=True)
class _Buffer:
    """A stretch of the arena and the values that it held, each written over the one before while that was read."""

    start: int
    end: int
    last: int  # call that uses it last
    values: list[_Value]


class _Replay:
    """Replays the calls on the arena's addresses: a read prolongs what lies there, a write replaces it."""

    def __init__(self, state_bytes: int, entry: Entry) -> None:
        self.state_bytes, self.entry = state_bytes, entry
        self.current: list[_Buffer] = []  # disjoint
        self.buffers: list[_Buffer] = []

    def values(self) -> Iterator[Live]:
        for name, tensor in self.entry.inputs.items():
            self._write(_Value(-1, name, tensor), ())
        for index, call in enumerate(self.entry.calls):
            read = [buffer for tensor in call.inputs for buffer in self._at(tensor)]
            for buffer in read:
                buffer.last = index
                buffer.values[-1].phases.add(call.phase)
            for tensor in call.outputs:
                self._write(_Value(index, call.op, tensor), read)
        for tensor in self.entry.outputs.values():
            for buffer in self._at(tensor):
                buffer.last = len(self.entry.calls)
        for buffer in self.buffers:
            yield from self._lives(buffer)

    def _at(self, tensor: Tensor) -> list[_Buffer]:
        if tensor.in_data:
            return []
        end = tensor.offset + tensor.nbytes
        return [buffer for buffer in self.current if buffer.start < end and tensor.offset < buffer.end]

    def _write(self, value: _Value, read: Sequence[_Buffer]) -> None:
        start, end = value.tensor.offset, value.tensor.offset + aligned(value.tensor.nbytes)
        if start < self.state_bytes:
            return  # a state, which is always alive
        for buffer in read:
            if buffer.start <= start and end <= buffer.end:  # in place
                buffer.values.append(value)
                return
        self.current = [buffer for buffer in self.current if end <= buffer.start or buffer.end <= start]
        self.current.append(_Buffer(start, end, value.call, [value]))
        self.buffers.append(self.current[-1])

    def _lives(self, buffer: _Buffer) -> Iterator[Live]:
        count = max(len(self.entry.calls), 1)
        until = [*(value.call - 1 for value in buffer.values[1:]), min(buffer.last, count - 1)]
        for value, last in zip(buffer.values, until, strict=True):
            first = max(value.call, 0)
            if first <= last:
                nbytes = buffer.end - buffer.start
                yield Live(first, last, nbytes, self._kind(value), value.name, str(value.tensor), value.call)

    def _kind(self, value: _Value) -> str:
        if value.call < 0:
            return "inputs"
        maker = self.entry.calls[value.call]
        if maker.phase == "recompute":
            return "activations"
        forward = maker.phase == "forward" or maker.op == "range_mask"
        if forward and value.phases - {"forward"}:
            return "saved_activations"
        return "activations" if forward else "gradients"
