"""A compiled program: scheduled entries over one set of states, with every byte placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pockc.errors import InternalError, UserError, near_names
from pockc.ir import Graph, Node, State, Value
from pockc.passes.lifetimes import Buffer
from pockc.passes.memory import Placement, aligned


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

    def as_json(self) -> dict[str, Any]:
        return {
            "arena_bytes": self.arena_bytes,
            "peak_bytes": self.peak_bytes,
            "lower_bound_bytes": self.lower_bound_bytes,
            "by_kind": dict(self.by_kind),
            "tensors_at_peak": [
                {field: getattr(tensor, field) for field in LiveTensor.__slots__} for tensor in self.tensors_at_peak
            ],
            "timeline": {entry: list(live) for entry, live in self.timeline.items()},
        }


@dataclass(frozen=True, slots=True)
class Program:
    """What `pockc.build` returns and `save` writes."""

    entries: Mapping[str, Graph]
    placements: Mapping[str, Placement]
    state_offset: Mapping[str, int]  # mutable states by name, in arena [0, state_bytes)
    state_bytes: int
    arena_bytes: int
    max_threads: int
    accumulation: int
    metadata: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the .pock file, replacing an old one only when the new one is complete."""
        from pockc.artifact import write  # the writer depends on the program, not the program on the writer

        write(self, path)

    def text(self, entry: str = "train_step") -> str:
        """The text IR of one entry."""
        if entry not in self.entries:
            raise UserError(
                f"there is no entry {entry!r}", supported=", ".join(self.entries), instead=near_names(entry, self.entries)
            )
        return str(self.entries[entry])

    @property
    def memory(self) -> MemoryReport:
        return memory_report(self)

    def offset(self, entry: str, value: Value) -> int | None:
        """Arena offset of a value of an entry; None for a state that is mapped from the file."""
        placement = self.placements[entry]
        buffer = placement.buffer[value]
        if buffer.state is None:
            return self.state_bytes + placement.offset[buffer]
        return self.state_offset.get(buffer.state.name)


def place_states(entries: Mapping[str, Graph]) -> tuple[dict[str, int], int]:
    """Offsets of the states that some entry updates, and the bytes they take. Slots follow their parameter."""
    mutable: dict[str, Value] = {}
    for graph in entries.values():
        for state in graph.updates:
            mutable.setdefault(state.name, state)
    offsets: dict[str, int] = {}
    top = 0
    for name, value in mutable.items():
        offsets[name] = top
        top += aligned(value.type.nbytes)
    return offsets, top


def states(entries: Mapping[str, Graph]) -> dict[str, tuple[Value, State]]:
    """All states but constants, by name. Entries must agree on type and layout."""
    found: dict[str, tuple[Value, State]] = {}
    for graph in entries.values():
        for value, state in graph.states.items():
            if state.kind == "constant":
                continue
            known_value, known = found.setdefault(value.name, (value, state))
            if known_value.type != value.type or known.permutation != state.permutation:
                raise InternalError(f"entries disagree on state {value.name}: {known_value.type} and {value.type}")
    return found


def memory_report(program: Program) -> MemoryReport:
    """Account for every byte at the worst call of the training step."""
    timelines = {entry: _timeline(program, entry) for entry in program.entries}
    mapped = mapped_bytes(program)
    entry = max(timelines, key=lambda name: max(timelines[name], default=0))
    main = "train_step" if "train_step" in timelines else entry
    call = max(range(len(timelines[main])), key=timelines[main].__getitem__, default=0)
    tensors = _alive(program, main, call)
    by_kind: dict[str, int] = {"frozen_parameters": mapped}
    for tensor in tensors:
        by_kind[tensor.kind] = by_kind.get(tensor.kind, 0) + tensor.nbytes
    bound = max((max(live, default=0) for live in timelines.values()), default=program.state_bytes) + mapped
    return MemoryReport(
        arena_bytes=program.arena_bytes,
        peak_bytes=program.arena_bytes + mapped,
        lower_bound_bytes=bound,
        by_kind=by_kind,
        tensors_at_peak=tuple(sorted(tensors, key=lambda tensor: -tensor.nbytes)),
        timeline={name: tuple(live) for name, live in timelines.items()},
    )


def mapped_bytes(program: Program) -> int:
    """Bytes of frozen states and constants that some call reads, equal contents counted once."""
    contents: dict[tuple[Any, ...], int] = {}
    for graph in program.entries.values():
        read = {value for node in graph.nodes for value in node.inputs}
        for value, state in graph.states.items():
            if value in read and value.name not in program.state_offset:
                data = state.data
                key = (value.type, None if data is None else data.tobytes())
                contents[(value.type, hash(key))] = aligned(value.type.nbytes)
    return sum(contents.values())


def _timeline(program: Program, entry: str) -> list[int]:
    """Live bytes of the arena (states included) at each call of one entry."""
    graph, placement = program.entries[entry], program.placements[entry]
    count = len(graph.nodes)
    steps = [0] * (count + 1)
    for buffer in placement.offset:
        steps[max(buffer.first, 0)] += aligned(buffer.nbytes)
        steps[min(buffer.last + 1, count)] -= aligned(buffer.nbytes)
    live, total = [], program.state_bytes
    for index in range(count):
        total += steps[index]
        live.append(total + aligned(placement.workspace[index][1]))
    return live


def _alive(program: Program, entry: str, call: int) -> list[LiveTensor]:
    """Everything in the arena at one call of an entry: states, transient buffers, the kernel's workspace."""
    graph, placement = program.entries[entry], program.placements[entry]
    makers = graph.producers()
    tensors = []
    known = {name: (value, state) for name, (value, state) in states(program.entries).items()}
    for name in program.state_offset:
        value, state = known[name]
        kind = {"parameter": "parameters", "slot": "optimizer_state"}.get(state.kind, "buffers")
        tensors.append(LiveTensor(name, str(value.type), aligned(value.type.nbytes), kind, name.rpartition(".")[0], ""))
    for buffer in placement.offset:
        if not buffer.first <= call <= buffer.last:
            continue
        value = _resident(buffer, makers, graph, call)
        origin = makers[value].origin if value in makers else None
        tensors.append(
            LiveTensor(
                value.name,
                str(value.type),
                aligned(buffer.nbytes),
                _kind(buffer, graph, makers, call),
                origin.module if origin else "<input>",
                f"{origin.file}:{origin.line}" if origin and origin.file else "",
            )
        )
    if graph.nodes and placement.workspace[call][1]:
        node = graph.nodes[call]
        nbytes = aligned(placement.workspace[call][1])
        tensors.append(LiveTensor(f"{node.op}.workspace", f"u8[{nbytes}]", nbytes, "workspace", node.origin.module, ""))
    return tensors


def _resident(buffer: Buffer, makers: Mapping[Value, Node], graph: Graph, call: int) -> Value:
    """The value that lives in a shared buffer at a call: the last one made until then."""
    made = {node: index for index, node in enumerate(graph.nodes)}
    past = [v for v in buffer.values if v not in makers or made[makers[v]] <= call]
    return past[-1] if past else buffer.values[0]


def _kind(buffer: Buffer, graph: Graph, makers: Mapping[Value, Node], call: int) -> str:
    """What a transient buffer is for: inputs, activations saved for the backward pass, gradients, temporaries."""
    value = _resident(buffer, makers, graph, call)
    if value not in makers:
        return "inputs"
    phases = {node.origin.phase for node in graph.nodes[call + 1 :] for v in node.inputs if v in buffer.values}
    made_in = makers[value].origin.phase
    is_mask = makers[value].op == "range_mask"
    if (made_in == "forward" or is_mask) and phases - {"forward"}:
        return "saved_activations"
    return "activations" if made_in == "forward" else "gradients"
