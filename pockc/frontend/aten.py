"""The table of ATen operators, and what every handler works with.

A handler takes a :class:`Call` and the operator's own arguments, under the names and defaults of its ATen schema, with
tensors as values of the graph. It appends nodes to the call's builder and returns the value, or the tuple of values,
that the operator returns. Handlers live in the ``aten_*`` modules beside this one; none of them imports PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pockc.errors import InternalError, UserError
from pockc.ir import Array, Builder, TensorType, Value

Operand = Value | float | int | bool
Handler = Callable[..., "Value | tuple[Value | None, ...]"]
AnyHandler = TypeVar("AnyHandler", bound=Handler)

FAMILIES = (
    "aten_elementwise", "aten_reduce", "aten_shape", "aten_index", "aten_linear", "aten_conv", "aten_norm", "aten_nn",
)  # fmt: skip

# Composite operators that have a handler of their own: torch.export must not take them apart.
KEEP_WHOLE = frozenset(
    {
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "conv1d", "conv2d", "cross_entropy_loss",
        "dropout", "embedding", "gelu", "hardsigmoid", "hardswish", "hardtanh",
        "layer_norm", "leaky_relu", "linear", "matmul", "mish", "nll_loss_nd", "relu6", "rms_norm",
        "scaled_dot_product_attention", "silu", "softplus",
    }
)  # fmt: skip

HANDLERS: dict[str, Handler] = {}


@dataclass(frozen=True, slots=True)
class Call:
    """One ATen call on its way into the graph: where its nodes go, and the types that PyTorch says it returns."""

    builder: Builder
    operator: str  # e.g. "aten.add.Tensor"
    results: tuple[TensorType | None, ...]
    frozen: frozenset[str] = frozenset()  # names of the buffers that nothing changes

    @property
    def result(self) -> TensorType:
        """Type of the first result."""
        first = self.results[0]
        if first is None:
            raise InternalError(f"{self.operator} returns no tensor")
        return first

    def constant(self, value: Value | None) -> Array | None:
        """The contents of a value that never changes; None where they are only known at run time."""
        state = self.builder.states.get(value) if value is not None else None
        if state is None or value is None:
            return None
        fixed = state.kind == "constant" or (state.kind == "buffer" and value.name in self.frozen)
        return state.data if fixed else None

    def value(self, operand: Operand, dtype: str) -> Value:
        """The operand as a value of this dtype: numbers become constants, other dtypes are cast."""
        if not isinstance(operand, Value):
            return self.builder.constant(operand, dtype)
        return self.cast(operand, dtype)

    def cast(self, value: Value, dtype: str) -> Value:
        """The value in another dtype; the value itself where it has that dtype already."""
        return value if value.type.dtype == dtype else self.builder("cast", value, dtype=dtype)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The value in another shape; the value itself where it has that shape already."""
        return value if value.type.shape == tuple(shape) else self.builder("reshape", value, shape=tuple(shape))

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """The value broadcast to a shape."""
        return value if value.type.shape == tuple(shape) else self.builder("expand", value, shape=tuple(shape))

    def transpose(self, value: Value, permutation: Sequence[int]) -> Value:
        """The value with its axes permuted; the value itself for the identity."""
        if tuple(permutation) == tuple(range(len(value.type.shape))):
            return value
        return self.builder("transpose", value, permutation=tuple(permutation))

    def channels_last(self, value: Value) -> Value:
        """From [N, C, ...], the order of PyTorch, to [N, ..., C], the order of our image operators."""
        rank = len(value.type.shape)
        return self.transpose(value, (0, *range(2, rank), 1)) if rank > 2 else value

    def channels_first(self, value: Value) -> Value:
        """From [N, ..., C] back to [N, C, ...]."""
        rank = len(value.type.shape)
        return self.transpose(value, (0, rank - 1, *range(1, rank - 1))) if rank > 2 else value


def handles(*operators: str) -> Callable[[AnyHandler], AnyHandler]:
    """Decorator: enters a handler under the names of the operators, given without the leading ``aten.``."""

    def register(handler: AnyHandler) -> AnyHandler:
        for operator in operators:
            if f"aten.{operator}" in HANDLERS:
                raise InternalError(f"two handlers for aten.{operator}")
            HANDLERS[f"aten.{operator}"] = handler
        return handler

    return register


def load_handlers() -> dict[str, Handler]:
    """The complete table, by full operator name."""
    for family in FAMILIES:
        importlib.import_module(f"pockc.frontend.{family}")
    return HANDLERS


def refuse(found: str, *, supported: str = "", instead: str = "") -> UserError:
    """The error of a handler that cannot express this use of its operator; the importer adds where it was."""
    return UserError(found, supported=supported, instead=instead)


def axis_of(dim: int, rank: int) -> int:
    """A non-negative axis from PyTorch's, which may count from the end; scalars count as rank 1."""
    return dim % max(rank, 1)


def axes_of(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Sorted non-negative axes; None and the empty list mean all of them, as in PyTorch's reductions."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return tuple(range(rank))
    chosen = (dims,) if isinstance(dims, int) else dims
    return tuple(sorted({axis_of(dim, rank) for dim in chosen}))


def pair(numbers: int | Sequence[int]) -> tuple[int, int]:
    """Two numbers from PyTorch's one-or-two."""
    if isinstance(numbers, int):
        return numbers, numbers
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def shape_of(value: Value) -> tuple[int, ...]:
    """Short for the shape of a value's type."""
    return value.type.shape


def check_results(name: str, result: Value | tuple[Value | None, ...], types: Sequence[TensorType | None]) -> None:
    """Our type rules and PyTorch must agree on every result."""
    values = result if isinstance(result, tuple) else (result,)
    for value, expected in zip(values, types, strict=False):
        if value is not None and expected is not None and value.type != expected:
            raise InternalError(f"the handler of {name} returns {value.type}; PyTorch returns {expected}")


HINTS: dict[str, str] = {
    "gather": "Use an embedding lookup, or index with constants.",
    "scatter": "Write the result with torch.where or torch.cat.",
    "index_put": "Write the result with torch.where or torch.cat instead of assigning to indexed elements.",
    "sort": "Sort before the data reaches the model.",
    "topk": "Select before the data reaches the model, or after it.",
    "nonzero": "Keep the shape and multiply by a mask: shapes must not depend on data.",
    "bernoulli": "Use torch.nn.Dropout, the one source of random numbers that can be compiled.",
    "rand": "Use torch.nn.Dropout, the one source of random numbers that can be compiled.",
    "randn": "Use torch.nn.Dropout, the one source of random numbers that can be compiled.",
    "upsample_bilinear2d": "Resize in preprocessing, or use nearest-neighbour interpolation.",
    "prod": "Write it as exp(sum(log(x))), or as multiplications.",
}


def hint_for(operator: str) -> str:
    """A way out for an operator without a handler."""
    stem = operator.split(".")[1].lstrip("_") if "." in operator else operator
    return HINTS.get(stem, "Replace it in the model by supported operators, or move it to preprocessing.")


def refuse_unless(condition: Any, found: str, *, supported: str = "", instead: str = "") -> None:
    """Guard of a handler: raises the error of :func:`refuse` where the condition does not hold."""
    if not condition:
        raise refuse(found, supported=supported, instead=instead)
