"""The account of a program's memory: what is alive when, and what it is for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pockc.ir import Node, State, Value
from pockc.passes.lifetimes import Buffer, storages, unread_fills
from pockc.passes.memory import aligned
from pockc.program import Program, states


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor that is alive at the peak of the training step."""

    name: str
    type: str
    nbytes: int
    kind: str
    module: str
    source: str


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Planned memory, in bytes. The runtime allocates ``arena_bytes``, to the byte.

    ``peak_bytes`` adds the frozen weights, which are mapped from the file. ``lower_bound_bytes`` is what is alive at
    the worst call of the worst entry, frozen weights included: no placement of this order can do with less.
    ``by_kind`` splits what is alive at the training step's worst call; ``fragmentation`` is the rest of the peak.
    """

    arena_bytes: int
    peak_bytes: int
    lower_bound_bytes: int
    by_kind: Mapping[str, int]
    tensors_at_peak: tuple[LiveTensor, ...]
    timeline: Mapping[str, tuple[int, ...]]  # entry -> live bytes of the arena at each call

    def totals(self) -> dict[str, Any]:
        """The sums alone, as plain values."""
        return {
            "arena_bytes": self.arena_bytes,
            "peak_bytes": self.peak_bytes,
            "lower_bound_bytes": self.lower_bound_bytes,
            "by_kind": dict(self.by_kind),
        }

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            **self.totals(),
            "tensors_at_peak": [
                {field: getattr(tensor, field) for field in LiveTensor.__slots__} for tensor in self.tensors_at_peak
            ],
            "timeline": {entry: list(live) for entry, live in self.timeline.items()},
        }


def account(program: Program) -> MemoryReport:
    """Account for every byte at the worst call of the training step."""
    timelines = {entry: _timeline(program, entry) for entry in program.entries}
    mapped = mapped_bytes(program)
    live = timelines["train_step"]
    tensors = _Peak(program, "train_step", call=max(range(len(live)), key=live.__getitem__)).tensors()
    by_kind: dict[str, int] = {"frozen_parameters": mapped}
    for tensor in tensors:
        by_kind[tensor.kind] = by_kind.get(tensor.kind, 0) + tensor.nbytes
    return MemoryReport(
        arena_bytes=program.arena_bytes,
        peak_bytes=program.arena_bytes + mapped,
        lower_bound_bytes=max(max(live) for live in timelines.values()) + mapped,
        by_kind=by_kind,
        tensors_at_peak=tuple(sorted(tensors, key=lambda tensor: -tensor.nbytes)),
        timeline={name: tuple(live) for name, live in timelines.items()},
    )


def content_key(value: Value, state: State) -> tuple[Any, ...]:
    """Equal for states whose stored bytes are equal: parameters by name, constants by contents."""
    if state.kind != "constant" or state.data is None:
        return (value.name, value.type)
    return (hashlib.sha256(np.ascontiguousarray(state.data).data).digest(), value.type)


def mapped_bytes(program: Program) -> int:
    """Bytes of frozen states and constants that some call reads, equal contents counted once."""
    sizes: dict[tuple[Any, ...], int] = {}
    for graph in program.entries.values():
        skipped = unread_fills(graph)
        read = {value for node in graph.nodes if node not in skipped for value in node.inputs}
        for value, state in graph.states.items():
            if value in read and value.name not in program.state_offset:
                sizes[content_key(value, state)] = aligned(value.type.nbytes)
    return sum(sizes.values())


def _timeline(program: Program, entry: str) -> list[int]:
    """Live bytes of the arena (states included) at each call of one entry."""
    placement = program.placements[entry]
    count = len(program.entries[entry].nodes)
    steps = [0] * (count + 1)
    for buffer in placement.offset:
        steps[max(buffer.first, 0)] += aligned(buffer.nbytes)
        steps[min(buffer.last + 1, count)] -= aligned(buffer.nbytes)
    live, total = [], program.state_bytes
    for index in range(count):
        total += steps[index]
        live.append(total + aligned(placement.workspace[index][1]))
    return live or [total]


class _Peak:
    """What is in the arena at one call of an entry: states, transient buffers, the kernel's workspace."""

    def __init__(self, program: Program, entry: str, call: int) -> None:
        self.program, self.call = program, call
        self.graph, self.placement = program.entries[entry], program.placements[entry]
        self.root = storages(self.graph)
        self.made: dict[Value, int] = {v: i for i, node in enumerate(self.graph.nodes) for v in node.outputs}
        self.phases: dict[Value, set[str]] = {}  # of the nodes that read a value or a view of it
        for node in self.graph.nodes:
            for value in node.inputs:
                self.phases.setdefault(self.root[value], set()).add(node.origin.phase)

    def tensors(self) -> list[LiveTensor]:
        alive = [b for b in self.placement.offset if b.first <= self.call <= b.last]
        return [*self._states(), *(self._transient(buffer) for buffer in alive), *self._workspace()]

    def _states(self) -> list[LiveTensor]:
        known = states(self.program.entries)
        tensors = []
        for name in self.program.state_offset:
            value, state = known[name]
            kind = {"parameter": "parameters", "slot": "optimizer_state"}.get(state.kind, "buffers")
            nbytes = aligned(value.type.nbytes)
            tensors.append(LiveTensor(name, str(value.type), nbytes, kind, name.rpartition(".")[0], ""))
        return tensors

    def _transient(self, buffer: Buffer) -> LiveTensor:
        past = [v for v in buffer.values if self.made.get(v, -1) <= self.call]
        value = self.root[past[-1] if past else buffer.values[0]]
        node = self.graph.nodes[self.made[value]] if value in self.made else None
        origin = node.origin if node else None
        return LiveTensor(
            value.name,
            str(value.type),
            aligned(buffer.nbytes),
            self._kind(value, node),
            origin.module if origin else "<input>",
            f"{origin.file}:{origin.line}" if origin and origin.file else "",
        )

    def _kind(self, value: Value, node: Node | None) -> str:
        """What a value is for: inputs, activations saved for the backward pass, gradients, temporaries."""
        if node is None:
            return "inputs"
        if node.origin.phase == "recompute":
            return "activations"
        forward = node.origin.phase == "forward" or node.op == "range_mask"
        if forward and self.phases.get(value, set()) - {"forward"}:
            return "saved_activations"
        return "activations" if forward else "gradients"

    def _workspace(self) -> list[LiveTensor]:
        nbytes = aligned(self.placement.workspace[self.call][1]) if self.graph.nodes else 0
        if not nbytes:
            return []
        node = self.graph.nodes[self.call]
        return [LiveTensor(f"{node.op}.workspace", f"u8[{nbytes}]", nbytes, "workspace", node.origin.module, "")]
