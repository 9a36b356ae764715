"""The whole training step as ordinary ONNX models: plain ONNX Runtime runs it, without a training build."""

from __future__ import annotations

from pathlib import Path

from pockc.ir import Graph, Node
from pockc.program import Program
from pockc.targets import refuse_unsupported
from pockc.targets.onnxruntime.container import write_models
from pockc.targets.onnxruntime.table import LOWERINGS


class OnnxRuntime:
    """Standard operators, which ONNX Runtime orders and places by itself."""

    name = "onnxruntime"

    def supports(self, node: Node) -> bool:
        """Whether there is a lowering for this op, with operands that ONNX has."""
        return node.op in LOWERINGS and not any(value.type.is_compact for value in node.inputs)

    def lower(self, graph: Graph) -> Graph:
        """The graph itself: what becomes of its nodes is decided when models are written."""
        refuse_unsupported(self, graph)
        return graph

    def emit(self, program: Program, path: Path) -> list[Path]:
        """Writes ``model.pock`` and ``<entry>.onnx`` for each entry.

        Raises:
            UserError: the package `onnx` is not installed, or the system refuses the write.
        """
        return write_models(program, path / "model.pock")


ONNXRUNTIME = OnnxRuntime()

__all__ = ["ONNXRUNTIME", "OnnxRuntime"]
