"""The default target: a .pock file and the `pock-run` program that runs it on any CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pockc.ir import Graph, Node
from pockc.program import Program
from pockc.targets import devices, refuse_unsupported
from pockc.targets.native import workspace
from pockc.targets.native.delivery import copy_runner, deliver
from pockc.targets.native.table import OPS


class Native:
    """Kernel calls over one arena, walked by the C++ runtime."""

    name = "native"

    def supports(self, node: Node) -> bool:
        """Whether the runtime has a kernel for this op; it then takes every operand that the op's type rule takes."""
        return node.op in OPS

    def lower(self, graph: Graph) -> Graph:
        """The graph itself: the pipeline's ops are the kernels'."""
        refuse_unsupported(self, graph)
        return graph

    def emit(self, program: Program, path: Path) -> list[Path]:
        """Writes ``model.pock`` and, beside it, the `pock-run` of the program's device.

        Raises:
            UserError: there is no `pock-run` for the device here; ``model.pock`` is written nevertheless.
        """
        file = path / "model.pock"
        program.save(file)
        return [file, *deliver(program, devices.recorded(program.metadata), path)]


def workspace_of(threads: int) -> Callable[[Node], int]:
    """For `passes.memory`: bytes of scratch memory that a node's kernel wants with that many threads."""

    def bytes_of(node: Node) -> int:
        inputs, outputs = [v.type for v in node.inputs], [v.type for v in node.outputs]
        return workspace.workspace_bytes(node.op, inputs, outputs, node.attrs, threads)

    return bytes_of


NATIVE = Native()

__all__ = ["NATIVE", "Native", "copy_runner", "deliver", "workspace_of"]
