"""The default target: a .pock file and the `pock-run` program that runs it on any CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pockc.abi import runtime_file
from pockc.errors import UserError
from pockc.ir import Graph, Node
from pockc.program import Program
from pockc.targets import devices, refuse_unsupported
from pockc.targets.native import workspace
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
        return [file, copy_runner(devices.find(program.metadata["device"]), path)]


def copy_runner(device: devices.Device, folder: Path) -> Path:
    """Copy `pock-run` into a folder. Raises UserError for a device that this machine has no binary for."""
    if not device.is_x86:
        raise UserError(
            f"there is no pock-run for {device.name} ({device.triple}) here: cross-compiling it is not supported yet",
            instead="model.pock runs there as it is: build runtime/ with CMake on the board.",
        )
    source, target = runtime_file("pock-run"), folder / "pock-run"
    try:
        target.unlink(missing_ok=True)  # one that is running may be replaced, but not written to
        shutil.copy2(source, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return target


def workspace_of(threads: int) -> Callable[[Node], int]:
    """For `passes.memory`: bytes of scratch memory that a node's kernel wants with that many threads."""

    def bytes_of(node: Node) -> int:
        inputs, outputs = [v.type for v in node.inputs], [v.type for v in node.outputs]
        return workspace.workspace_bytes(node.op, inputs, outputs, node.attrs, threads)

    return bytes_of


NATIVE = Native()

__all__ = ["NATIVE", "Native", "copy_runner", "workspace_of"]
