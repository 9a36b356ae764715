"""Which ops treat the rows of axis 0 independently: one rule per op, for the passes that run parts of the batch.

A tensor is *batched* if its axis 0 has ``batch * k`` rows, and rows ``[i k, (i + 1) k)`` depend on sample ``i`` alone.
An op is batch-parallel if batched operands make batched results: then it may run on some of the samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from pockc.ir import Node, Value

Batched = AbstractSet[Value]
Roles = tuple[bool, ...]  # per operand: whether a micro-batch reads its own rows of it, else all of it
Rule = Callable[[Node, Batched], Roles | None]  # None: needs the whole batch

BITS = 8  # of a byte of a mask: a sample that does not fill its bytes shares one with its neighbour


def roles(node: Node, batched: Batched, batch: int) -> Roles | None:
    """How a micro-batch reads each operand of a node; None where the node needs the whole batch, or none of it.

    Operands outside ``batched`` must depend on no input. They are read whole, or by rows where they line up with the
    batch, as an expanded table does.
    """
    rule = RULES.get(node.op)
    if rule is None or batched.isdisjoint(node.inputs):
        return None
    found = rule(node, batched)
    if found is None:
        return None
    by_rows = [value for value, sliced in zip(node.inputs, found, strict=True) if sliced]
    shapes = [value.type.shape for value in (*by_rows, *node.outputs)]
    return found if all(shape and shape[0] % batch == 0 for shape in shapes) and _fills_bytes(node, batch) else None


def rescaled(node: Node, batch: int, start: int, samples: int) -> Mapping[str, Any]:
    """The attributes of a node for the samples ``[start, start + samples)``."""
    if "first_row" in node.attrs:
        logits = node.inputs[1 if node.op == "cross_entropy_grad" else 0]
        return {**node.attrs, "first_row": max(0, node.attrs["first_row"]) + start * (logits.type.shape[0] // batch)}
    if node.op not in ("reshape", "expand", "unpack8"):
        return node.attrs
    rows, *rest = node.attrs["shape"]
    return {**node.attrs, "shape": (rows // batch * samples, *rest)}


def _fills_bytes(node: Node, batch: int) -> bool:
    return node.op not in ("range_mask", "apply_mask") or node.inputs[0].type.elements % (BITS * batch) == 0


def _aligned(node: Node, batched: Batched) -> Roles | None:
    """Operands that broadcast: those that have all rows of the result are read by rows, the others whole."""
    shape = node.outputs[0].type.shape
    found = tuple(_has_rows(value, shape) for value in node.inputs)
    stretched = any(value in batched and not sliced for value, sliced in zip(node.inputs, found, strict=True))
    return None if stretched else found


def _has_rows(value: Value, shape: tuple[int, ...]) -> bool:
    return len(value.type.shape) == len(shape) and value.type.shape[:1] == shape[:1] != ()


def _only(position: int, keeps_rows: Callable[[Node], bool] = lambda node: True) -> Rule:
    """The rule of ops with one batched operand, where ``keeps_rows`` holds."""

    def rule(node: Node, batched: Batched) -> Roles | None:
        found = tuple(i == position for i in range(len(node.inputs)))
        whole = [value for value, sliced in zip(node.inputs, found, strict=True) if not sliced]
        return None if not batched.isdisjoint(whole) or not keeps_rows(node) else found

    return rule


def _masked(node: Node, batched: Batched) -> Roles | None:
    """A tensor and its bits, which have rows of another size."""
    return (True, True)


def _concat(node: Node, batched: Batched) -> Roles | None:
    rows = node.outputs[0].type.shape[0]
    fits = node.attrs["axis"] != 0 and all(value.type.shape[0] == rows for value in node.inputs)
    return tuple(True for _ in node.inputs) if fits else None


def _matmul(node: Node, batched: Batched) -> Roles | None:
    """The rows of a matrix on the left, or a leading axis."""
    left, right, *bias = node.inputs
    if len(node.outputs[0].type.shape) == 2:
        return None if node.attrs["transpose_a"] else _only(0)(node, batched)
    shape = node.outputs[0].type.shape
    found = (_has_rows(left, shape), _has_rows(right, shape))
    stretched = any(value in batched and not sliced for value, sliced in zip((left, right), found, strict=True))
    return None if stretched or not batched.isdisjoint(bias) else (*found, *(False for _ in bias))


def _attention(node: Node, batched: Batched) -> Roles | None:
    """Queries, keys and values by rows, and what the gradient reads besides; a mask by rows or for all."""
    shape = node.inputs[0].type.shape
    count = 6 if node.op == "attention_grad" else 3
    found = (*(True for _ in range(count)), *(_has_rows(mask, shape) for mask in node.inputs[count:]))
    stretched = any(value in batched and not sliced for value, sliced in zip(node.inputs, found, strict=True))
    return None if stretched else found


def _insert(node: Node, batched: Batched) -> Roles | None:
    """What is filled, and the part, where the parts lie along another axis."""
    return None if node.attrs["axis"] == 0 else (True, True)


def _all_rows(node: Node, batched: Batched) -> Roles | None:
    return tuple(True for _ in node.inputs)


def _logits_gradient(node: Node, batched: Batched) -> Roles | None:
    """Logits by rows; all labels, since the gradient's scale is the number of those that count."""
    return False, True, False


def _row_norm_gradient(node: Node, batched: Batched) -> Roles | None:
    return _aligned(node, batched) if _has_more_axes(node) else None


def _beyond_rows(node: Node) -> bool:
    """Whether axis 0 is none of the axes that the node works along."""
    if "permutation" in node.attrs:
        return bool(node.attrs["permutation"][0] == 0)
    if "before" in node.attrs:
        return bool(node.attrs["before"][0] == node.attrs["after"][0] == 0)
    return 0 not in node.attrs.get("axes", (node.attrs.get("axis"),))


def _keeps_first_axis(node: Node) -> bool:
    """Whether an expand only stretches later axes."""
    return _has_rows(node.inputs[0], node.outputs[0].type.shape)


def _has_more_axes(node: Node) -> bool:
    """Whether the last axis, which the node works along, is not the first."""
    return len(node.inputs[0].type.shape) > 1


def _table(rule: Rule, *ops: str) -> dict[str, Rule]:
    return dict.fromkeys(ops, rule)


RULES: dict[str, Rule] = {
    **_table(
        _only(0),
        "neg", "abs", "sign", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid", "erf",
        "softplus", "floor", "silu", "hardswish", "hardsigmoid", "gelu", "leaky_relu", "elu", "pow_scalar", "clip",
        "logical_not", "cast", "copy", "reshape", "range_mask", "conv2d", "max_pool2d", "avg_pool2d",
        "conv2d_grad_input", "avg_pool2d_grad", "quantize", "dequantize", "lookup_int8", "conv2d_int8",
        "max_pool2d_int8", "pack8", "unpack8",
    ),
    **_table(
        _aligned,
        "add", "sub", "mul", "div", "pow", "maximum", "minimum", "equal", "not_equal", "less", "less_equal", "greater",
        "greater_equal", "logical_and", "logical_or", "where", "rotary", "tanh_grad", "sigmoid_grad", "gelu_grad",
        "silu_grad", "hardswish_grad", "hardsigmoid_grad", "leaky_relu_grad", "elu_grad",
        "add_int8",
    ),
    **_table(
        _only(0, _beyond_rows),
        "transpose", "slice", "slice_grad", "take", "take_grad", "pad", "cumsum", "argmax", "reduce_sum", "reduce_mean",
        "reduce_max",
    ),
    **_table(_only(0, _has_more_axes), "softmax", "log_softmax", "layer_norm", "rms_norm"),
    **_table(_only(0, _keeps_first_axis), "expand"),
    **_table(_only(1), "embedding"),
    **_table(_masked, "apply_mask"),
    **_table(_concat, "concat"),
    **_table(_insert, "insert"),
    **_table(_matmul, "matmul"),
    **_table(_attention, "attention", "attention_grad"),
    **_table(_all_rows, "max_pool2d_grad"),
    **_table(_row_norm_gradient, "layer_norm_grad_input", "rms_norm_grad_input", "softmax_grad", "log_softmax_grad"),
    **_table(_logits_gradient, "cross_entropy_grad"),
}  # fmt: skip
