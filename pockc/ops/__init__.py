"""The op table. An op is a record: type rule, numpy reference, gradient rule and test samples, side by side.

Each family lives in one file of this package and calls :func:`define` for its ops. Adding an op touches four places:
its family file here, one kernel file, one line in ``runtime/kernels/kernels.inc``, one line per target table.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pockc.errors import InternalError, UserError
from pockc.ops.halves import half_types

if TYPE_CHECKING:
    from pockc.ir import Array, Builder, Node, Origin, TensorType, Value

    TypeRule = Callable[..., TensorType | tuple[TensorType, ...]]
    Reference = Callable[..., Array | tuple[Array, ...]]
    # vjp(builder, node, cotangents, need) -> one gradient per input; None where not needed or not differentiable.
    # A cotangent is None where nothing flows into that output. `need` holds the input indices that are wanted.
    Vjp = Callable[[Builder, Node, tuple[Value | None, ...], frozenset[int]], Sequence[Value | None]]

FAMILIES = (
    "elementwise", "activation", "masks", "reduce", "shape", "linear", "conv", "winograd", "pool", "norm", "softmax",
    "attention", "embedding", "dropout", "loss", "loss_tiles", "gate", "optimizer", "optimizer8", "quantized", "saved8",
)  # fmt: skip


# The values that a string attribute may take; program files store the index, so the order is fixed and only grows.
ENUM_VALUES = (
    "none", "clip", "gelu", "gelu_tanh", "silu", "hardswish",
    "constant", "linear", "cosine", "step",
    "f32", "i64", "i32", "u8", "bool", "f16", "b16",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One test case of an op: operand arrays come from ``inputs`` (a TensorType is filled at random, see tests)."""

    inputs: tuple[Any, ...]  # TensorType or ndarray each
    attrs: Mapping[str, Any] = field(default_factory=dict)
    torch: Callable[..., Any] | None = None  # the same on torch tensors: torch(module torch, *tensors); or None
    differentiable: tuple[int, ...] = ()  # inputs whose gradient is checked against torch and finite differences
    low: float = -2.0  # random f32 operands are uniform in [low, high)
    high: float = 2.0
    tolerance: float = 1e-5  # relative, of kernels and torch against the reference


@dataclass(frozen=True, slots=True)
class OpDef:
    """One op. ``type_rule`` takes operand types and keyword attributes, which it validates, raising ValueError.

    Attributes are exactly the keyword-only parameters of ``type_rule``, in that order; their defaults apply.
    ``in_place`` lists the inputs whose buffer the first output may take over when nothing reads them later.
    ``view`` marks ops whose output is the same bytes as their first input (reshape).
    ``weight`` is the input, if any, that may be a compact frozen weight (pockc/compact.py); references get it as f32.
    """

    name: str
    type_rule: TypeRule
    reference: Reference
    vjp: Vjp | None = None
    samples: tuple[Sample, ...] = ()
    in_place: tuple[int, ...] = ()
    view: bool = False
    saves: str = ""  # what the gradient keeps of the forward pass, for `pockc inspect`
    weight: int | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """Attribute names in canonical order, with defaults (``inspect.Parameter.empty`` where required)."""
        return {p.name: p.default for p in _keyword_only(self.type_rule)}


OPS: dict[str, OpDef] = {}


@functools.cache
def _keyword_only(rule: TypeRule) -> tuple[inspect.Parameter, ...]:
    """The parameters that declare the attributes; cached, since every node of every pass asks."""
    parameters = inspect.signature(rule).parameters.values()
    return tuple(p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def _plain(parameter: inspect.Parameter, value: Any) -> Any:
    """The attribute value as the Python type that its rule declares: 1 for a float is 1.0, a list a tuple."""
    if value is inspect.Parameter.empty:
        return value
    match parameter.annotation:
        case "float":
            return float(value)
        case "int":
            return operator.index(value)
        case "bool":
            return bool(value)
        case "str":
            return str(value)
        case _:
            return tuple(operator.index(item) for item in value)


def define(
    name: str,
    *,
    type_rule: TypeRule,
    reference: Reference,
    vjp: Vjp | None = None,
    samples: Sequence[Sample] = (),
    in_place: tuple[int, ...] = (),
    view: bool = False,
    saves: str = "",
    weight: int | None = None,
) -> None:
    """Add an op to the table; InternalError if the name is taken."""
    if name in OPS:
        raise InternalError(f"op {name!r} is defined twice")
    OPS[name] = OpDef(name, type_rule, reference, vjp, tuple(samples), in_place, view, saves, weight)


def infer(
    op: str, types: Sequence[TensorType], attrs: Mapping[str, Any], origin: Origin | str = ""
) -> tuple[tuple[TensorType, ...], dict[str, Any]]:
    """Output types, and the attributes completed with defaults in canonical order.

    Raises:
        UserError: the operands or attributes break the op's type rule; the message starts with ``origin``.
        InternalError: there is no such op, or no such attribute.
    """
    complete = complete_attributes(op, attrs, origin)
    try:
        result = half_types(OPS[op].type_rule, op, types, complete)
    except ValueError as error:
        raise UserError(f"{op}: {error}", where=origin) from None
    return (result if isinstance(result, tuple) else (result,)), complete


def complete_attributes(op: str, attrs: Mapping[str, Any], origin: Origin | str = "") -> dict[str, Any]:
    """The attributes with defaults, in canonical order and as plain Python values.

    Raises:
        InternalError: there is no such op or attribute, or a required attribute is missing.
    """
    load_families()
    if op not in OPS:
        raise InternalError(f"{origin}: there is no op {op!r}")
    declared = _keyword_only(OPS[op].type_rule)
    unknown = set(attrs) - {p.name for p in declared}
    if unknown:
        raise InternalError(f"{origin}: {op} has no attribute {', '.join(sorted(unknown))}")
    complete = {p.name: _plain(p, attrs.get(p.name, p.default)) for p in declared}
    missing = [name for name, value in complete.items() if value is inspect.Parameter.empty]
    if missing:
        raise InternalError(f"{origin}: {op} needs attribute {', '.join(missing)}")
    return complete


_loaded = False


def load_families() -> None:
    """Import every family once, so that the table is complete whichever module was imported first."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for family in FAMILIES:
        importlib.import_module(f"pockc.ops.{family}")
