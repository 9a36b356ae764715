"""A compiled program: scheduled entries over one set of states, with every byte placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pockc.errors import InternalError, UserError, near_names
from pockc.ir import Graph, State, Value
from pockc.passes.memory import Placement, aligned

if TYPE_CHECKING:
    from pockc.memory_report import MemoryReport


@dataclass(frozen=True)
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
    target: str = "native"  # which other backends plan and place by themselves: then there are no placements

    def save(self, path: str | Path, *, golden: Mapping[str, Any] | None = None) -> None:
        """Write the .pock file, replacing an old one only when the new one is complete.

        A target other than the native one puts its own files beside it.

        Args:
            path: Where to.
            golden: Example inputs by name. If given, the file also holds inputs like them with the outputs that each
                entry must make of them, for ``pock-run selftest``. That runs each entry once.
        """
        from pockc.artifact import write  # the writer depends on the program, not the program on the writer
        from pockc.golden import golden_vectors

        vectors = golden_vectors(self, golden) if golden is not None else b""
        if self.target == "onnxruntime":
            from pockc.targets.onnxruntime.container import write_models

            write_models(self, Path(path), vectors)
        else:
            write(self, path, golden=vectors)

    def text(self, entry: str = "train_step") -> str:
        """The text IR of one entry."""
        if entry not in self.entries:
            raise UserError(
                f"there is no entry {entry!r}",
                supported=", ".join(self.entries),
                instead=near_names(entry, self.entries),
            )
        return str(self.entries[entry])

    @cached_property
    def memory(self) -> MemoryReport:
        """The account of every planned byte. Raises UserError where the target plans by itself."""
        if self.target != "native":
            raise UserError(f"the memory of the target {self.target} is not planned here", instead="Measure it there.")
        from pockc.memory_report import account  # it reads programs

        return account(self)

    def offset(self, entry: str, value: Value) -> int | None:
        """Arena offset of a value of an entry; None for a state that is mapped from the file."""
        placement = self.placements[entry]
        buffer, shift = placement.buffer[value], placement.shift.get(value, 0)
        if buffer.state is None:
            return self.state_bytes + placement.offset[buffer] + shift
        if buffer.state.name not in self.state_offset:
            return None
        return self.state_offset[buffer.state.name] + shift


def place_states(entries: Mapping[str, Graph]) -> tuple[dict[str, int], int]:
    """Offsets of the states that change, and the bytes they take. Slots follow their parameter.

    These are the states that some entry updates, and the counters: a session sets learning rate and seed, and its
    checkpoints keep them.
    """
    mutable: dict[str, Value] = {}
    for graph in entries.values():
        counters = [value for value, state in graph.states.items() if state.kind == "counter"]
        for state in (*graph.updates, *counters):
            mutable.setdefault(state.name, state)
    offsets: dict[str, int] = {}
    top = 0
    for name, value in mutable.items():
        offsets[name] = top
        top += aligned(value.type.nbytes)
    return offsets, top


def states(entries: Mapping[str, Graph]) -> dict[str, tuple[Value, State]]:
    """All states but constants, by name. Entries that use a state must agree on its type and layout."""
    found: dict[str, tuple[Value, State]] = {}
    unused: dict[str, tuple[Value, State]] = {}
    for graph in entries.values():
        used = {*graph.updates, *graph.results(), *(value for node in graph.nodes for value in node.inputs)}
        for value, state in graph.states.items():
            if state.kind == "constant":
                continue
            if value not in used:
                unused.setdefault(value.name, (value, state))
                continue
            known_value, known = found.setdefault(value.name, (value, state))
            if known_value.type != value.type or known.permutation != state.permutation:
                raise InternalError(f"entries disagree on state {value.name}: {known_value.type} and {value.type}")
    return {**unused, **found}
