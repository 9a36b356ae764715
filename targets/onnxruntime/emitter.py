"""ONNX nodes under construction: what the lowerings of single ops write into, and read each other's results from.

The IR's images are channels-last, ONNX's are channels-first. So a value of the IR may be known in several orders of its
axes: an ONNX tensor in the order ``permutation`` of a value is ``value.transpose(permutation)``. Convolutions leave
their results channels-first, elementwise ops work in whatever order their operands have, a transpose is nothing but
another order, and a Transpose node appears only where some op insists on an order that nobody made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pockc.errors import InternalError
from pockc.ir import Array, Graph, Node, Origin, Value

Permutation = tuple[int, ...]
CHANNELS_FIRST: Permutation = (0, 3, 1, 2)  # of NHWC activations, and of OHWI weights


@dataclass(slots=True)
class OnnxNode:
    """One node of the model: names of tensors, plain attributes, and where it comes from."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: Mapping[str, Any]
    origin: Origin


@dataclass(slots=True)
class Emitter:
    """The nodes and constants of one entry so far.

    ``orders`` has, for each value, the tensors that hold it by the order of their axes, the one it was made in first.
    ``later`` makes the tensor of a value that hardly anybody reads, such as a packed bit mask, when somebody does.
    ``notes`` is what the lowering of one op leaves for that of another: the statistics of a norm for its gradient.
    """

    nodes: list[OnnxNode] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    orders: dict[Value, dict[Permutation, str]] = field(default_factory=dict)
    later: dict[Value, Callable[[], str]] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    _taken: dict[str, int] = field(default_factory=dict)
    _shared: dict[tuple[bytes, str, tuple[int, ...]], str] = field(default_factory=dict)

    # --- Nodes and constants ------------------------------------------------------------------------------------------

    def __call__(self, op: str, *inputs: str, **attrs: Any) -> str:
        """Append a node with one output; its name."""
        return self.multi(op, 1, *inputs, **attrs)[0]

    def multi(self, op: str, outputs: int, *inputs: str, **attrs: Any) -> list[str]:
        """Append a node; the names of its outputs."""
        names = [self.unique(f"{self.place()}/{op}:{i}") for i in range(outputs)]
        self.nodes.append(OnnxNode(op, list(inputs), names, attrs, self.origin))
        return list(names)

    def place(self) -> str:
        """The module path, with the phase unless that is the forward pass."""
        phase = "" if self.origin.phase == "forward" else f"/{self.origin.phase}"
        return f"{self.origin.module or '<model>'}{phase}"

    def unique(self, name: str) -> str:
        """The name, with a number where it is taken."""
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else self.unique(f"{name}#{count}")

    def constant(self, data: Any, dtype: Any = np.float32, name: str = "constant") -> str:
        """An initializer; equal small ones are shared."""
        array = np.asarray(data, dtype, order="C")
        key = (array.tobytes() if array.size <= 1024 else b"", str(array.dtype), array.shape)
        if array.size <= 1024 and key in self._shared:
            return self._shared[key]
        self._shared[key] = found = self.unique(name)
        self.constants[found] = array
        return found

    def ints(self, *values: int) -> str:
        """A vector of axes, sizes or indices."""
        return self.constant(np.array(values, np.int64), np.int64, "indices")

    def note(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is noted under a key; made and noted at the first call."""
        if key not in self.notes:
            self.notes[key] = make()
        return self.notes[key]

    # --- Values of the IR ---------------------------------------------------------------------------------------------

    def write(self, value: Value, tensor: str, order: Permutation | None = None) -> None:
        """Say which tensor holds a value, in which order of its axes; without ``order`` in the value's own."""
        self.orders.setdefault(value, {})[identity(value) if order is None else order] = tensor

    def read(self, value: Value, order: Permutation | None = None) -> str:
        """The tensor that holds a value in this order, by default its own."""
        wanted = identity(value) if order is None else order
        if value not in self.orders:
            if value not in self.later:
                raise InternalError(f"{value!r} is read before it is made")
            self.write(value, self.later.pop(value)())
        known = self.orders[value]
        if wanted not in known:
            made, tensor = next(iter(known.items()))
            shape = tuple(value.type.shape[axis] for axis in made)
            known[wanted] = self.transposed(tensor, shape, tuple(made.index(axis) for axis in wanted))
        return known[wanted]

    def order(self, *values: Value) -> Permutation:
        """The order in which most of these values of one rank are known; of equally good ones that of the first."""
        for value in values:
            if value not in self.orders:
                self.read(value)
        candidates = dict.fromkeys(order for value in values for order in self.orders[value])
        return max(candidates, key=lambda order: sum(order in self.orders[value] for value in values))

    # --- Moving elements ----------------------------------------------------------------------------------------------

    def transposed(self, tensor: str, shape: Sequence[int], permutation: Permutation) -> str:
        """The tensor of this shape with its axes in another order; at once where it is a constant."""
        if permutation == tuple(range(len(permutation))):
            return tensor
        if tensor in self.constants:
            return self.constant(
                self.constants[tensor].transpose(permutation), self.constants[tensor].dtype, f"{tensor}.transposed"
            )
        moved = tuple(shape[axis] for axis in permutation)
        if [axis for axis in permutation if shape[axis] != 1] == [i for i, size in enumerate(shape) if size != 1]:
            return self.reshaped(tensor, moved)  # only axes of one element move
        return self("Transpose", tensor, perm=permutation)

    def reshaped(self, tensor: str, shape: Sequence[int]) -> str:
        """The tensor in another shape; at once where it is a constant."""
        if tensor in self.constants:
            array = self.constants[tensor]
            return tensor if array.shape == tuple(shape) else self.constant(array.reshape(shape), array.dtype, tensor)
        return self("Reshape", tensor, self.ints(*shape))

    def aligned(self, value: Value, rank: int, order: Permutation) -> str:
        """An operand of an op that broadcasts to this rank, with its axes in the order that the result will have.

        A scalar stays one. Other operands of lower rank get leading axes of one element, then that order.
        """
        own = len(value.type.shape)
        if own == rank:
            return self.read(value, order)
        if own == 0 or order == tuple(range(rank)):
            return self.read(value)
        shape = (1,) * (rank - own) + value.type.shape

        def make() -> str:
            return self.transposed(self.reshaped(self.read(value), shape), shape, order)

        return str(self.note(("aligned", value, rank, order), make))


def identity(value: Value) -> Permutation:
    """The value's own order."""
    return tuple(range(len(value.type.shape)))


def in_order(shape: Sequence[int], order: Permutation) -> tuple[int, ...]:
    """The sizes of a tensor that holds a value of this shape in that order."""
    return tuple(shape[axis] for axis in order)


def broadcast_order(emitter: Emitter, node: Node) -> Permutation:
    """The order in which an elementwise node does least: that of its operands of full rank."""
    output = node.outputs[0].type
    full = [value for value in node.inputs if len(value.type.shape) == len(output.shape)]
    largest = [value for value in full if value.type.elements == output.elements] or full
    return emitter.order(*largest) if largest else tuple(range(len(output.shape)))


Lowering = Callable[[Emitter, Node], None]


def emit_graph(graph: Graph, table: Mapping[str, Lowering], emitter: Emitter) -> None:
    """Lower every node of a graph whose inputs and states the emitter knows already."""
    for node in graph.nodes:
        emitter.origin = node.origin
        table[node.op](emitter, node)
