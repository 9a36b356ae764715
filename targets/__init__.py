"""Backends: what can run a graph, and which files a program becomes. The boards are in devices.py."""

if __name__ != "pockc.targets":
    raise ImportError("import this package as pockc.targets: under two names it would define every class twice")

from pathlib import Path
from typing import Protocol

from pockc.errors import UserError, near_names
from pockc.ir import Graph, Node
from pockc.program import Program


class Target(Protocol):
    """A backend."""

    name: str

    def supports(self, node: Node) -> bool:
        """Whether the backend can run this node."""
        ...

    def lower(self, graph: Graph) -> Graph:
        """The graph in the backend's own ops. Raises UserError, with the origins, for nodes it cannot run."""
        ...

    def emit(self, program: Program, path: Path) -> list[Path]:
        """Write the program's files into the folder ``path``; returns them, the program itself first."""
        ...


def find(name: str) -> Target:
    """The target of that name. Raises UserError if there is none."""
    from pockc.targets.native import NATIVE  # targets depend on this module, so it imports them when asked
    from pockc.targets.null import NULL
    from pockc.targets.onnxruntime import ONNXRUNTIME

    targets: dict[str, Target] = {target.name: target for target in (NATIVE, ONNXRUNTIME, NULL)}
    if name not in targets:
        raise UserError(f"there is no target {name!r}", supported=", ".join(targets), instead=near_names(name, targets))
    return targets[name]


def refuse_unsupported(target: Target, graph: Graph) -> None:
    """Raise one UserError that lists every kind of node the target cannot run, each with the first place it is at."""
    places: dict[str, str] = {}
    for node in graph.nodes:
        if not target.supports(node):
            places.setdefault(node.op, str(node.origin))
    if places:
        listing = "; ".join(f"{op} at {place}" for op, place in places.items())
        raise UserError(f"the target {target.name} cannot run: {listing}", instead="Freeze or replace these modules.")
