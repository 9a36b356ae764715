"""The target that accepts everything and emits text IR: whole-pipeline tests in milliseconds."""

from __future__ import annotations

from pathlib import Path

from pockc.ir import Graph, Node
from pockc.program import Program


class Null:
    """Text instead of code."""

    name = "null"

    def supports(self, node: Node) -> bool:
        """Always."""
        return True

    def lower(self, graph: Graph) -> Graph:
        """The graph itself."""
        return graph

    def emit(self, program: Program, path: Path) -> list[Path]:
        """Writes ``<entry>.txt`` for each entry."""
        path.mkdir(parents=True, exist_ok=True)
        files = [path / f"{entry}.txt" for entry in program.entries]
        for file, entry in zip(files, program.entries, strict=True):
            file.write_text(program.text(entry), encoding="utf-8")
        return files


NULL = Null()
