"""Removes nodes that do nothing and brings the rest into the one form that later passes look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pockc.ir import Graph, Node, TensorType, Value
from pockc.passes.rewrite import Rewriter, constant_scalar
from pockc.recipe import Recipe


class Call(NamedTuple):
    """An op applied to rewritten operands: a node before it is built, with the type of its one output."""

    op: str
    inputs: tuple[Value, ...]
    attrs: Mapping[str, Any]
    type: TensorType
    like: Node  # the old node that it comes from: its origin and name


# A rule returns an equivalent value that exists, an equivalent call that does less, or None where it does not apply.
Rule = Callable[[Rewriter, Call], Value | Call | None]


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Simplify every node by the rules of its op, until none applies.

    Pre:  any level but `planned`.
    Post: no movement, arithmetic or reduction that returns its operand unchanged; no reshape of a reshape, no transpose
          of a transpose; no transpose that `matmul` can do itself; no spatial zero padding in front of a conv2d; no
          dead nodes.
    """
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node.op not in RULES:
            rewriter.keep(node)
            continue
        call = Call(node.op, rewriter.inputs(node), node.attrs, node.outputs[0].type, node)
        found = _simplified(rewriter, call)
        if found is call:
            rewriter.keep(node)
        else:
            rewriter.replace(node.outputs[0], _built(rewriter, found))
    return rewriter.finish()


def _simplified(rewriter: Rewriter, call: Call) -> Value | Call:
    """What is left of a call when no rule applies any more."""
    while call.op in RULES:
        found = RULES[call.op](rewriter, call)
        if found is None:
            return call
        if isinstance(found, Value):
            return found
        call = found
    return call


def _built(rewriter: Rewriter, found: Value | Call) -> Value:
    return found if isinstance(found, Value) else rewriter.emit(found.like, found.op, found.inputs, found.attrs)


# Movement


def _reshape(rewriter: Rewriter, call: Call) -> Value | Call | None:
    x = call.inputs[0]
    if x.type == call.type:
        return x
    inner = rewriter.producer(x, "reshape")
    return call._replace(inputs=inner.inputs) if inner else None


def _transpose(rewriter: Rewriter, call: Call) -> Value | Call | None:
    x, outer = call.inputs[0], call.attrs["permutation"]
    if outer == tuple(range(len(outer))):
        return x
    inner = rewriter.producer(x, "transpose")
    if inner is None:
        return None
    composed = tuple(inner.attrs["permutation"][axis] for axis in outer)
    return call._replace(inputs=inner.inputs, attrs={"permutation": composed})


def _expand(rewriter: Rewriter, call: Call) -> Value | Call | None:
    x = call.inputs[0]
    if x.type == call.type:
        return x
    inner = rewriter.producer(x, "expand")
    return call._replace(inputs=inner.inputs) if inner else None


def _same_type(rewriter: Rewriter, call: Call) -> Value | None:
    """For slice, pad, cast and concat: an output as large as the first operand is that operand."""
    x = call.inputs[0]
    return x if x.type == call.type else None


def _reduction(rewriter: Rewriter, call: Call) -> Value | Call | None:
    """Over axes of size one there is nothing to reduce."""
    x = call.inputs[0]
    if any(x.type.shape[axis] != 1 for axis in call.attrs["axes"]):
        return None
    return call._replace(op="reshape", attrs={"shape": call.type.shape})


# Arithmetic


def _neutral(rewriter: Rewriter, call: Call, number: float, commutes: bool = True) -> Value | None:
    """The other operand, where one operand is a constant filled with the neutral element of the op."""
    a, b = call.inputs
    states = rewriter.builder.states
    if a.type == call.type and constant_scalar(states, b) == number:
        return a
    return b if commutes and b.type == call.type and constant_scalar(states, a) == number else None


def _add(rewriter: Rewriter, call: Call) -> Value | None:
    return _neutral(rewriter, call, 0)


def _sub(rewriter: Rewriter, call: Call) -> Value | None:
    return _neutral(rewriter, call, 0, commutes=False)


def _div(rewriter: Rewriter, call: Call) -> Value | None:
    return _neutral(rewriter, call, 1, commutes=False)


def _mul(rewriter: Rewriter, call: Call) -> Value | Call | None:
    kept = _neutral(rewriter, call, 1)
    if kept is not None:
        return kept
    for masked, factor in (call.inputs, call.inputs[::-1]):
        mask = rewriter.producer(masked, "apply_mask")
        number = constant_scalar(rewriter.builder.states, factor)
        if mask and number is not None and masked.type == call.type and rewriter.uses[masked] == 1:
            scale = mask.attrs["scale"] * number
            return call._replace(op="apply_mask", inputs=mask.inputs, attrs={"scale": scale})
    return None


def _pow_scalar(rewriter: Rewriter, call: Call) -> Value | None:
    return call.inputs[0] if call.attrs["exponent"] == 1 else None


def _neg(rewriter: Rewriter, call: Call) -> Value | None:
    inner = rewriter.producer(call.inputs[0], "neg")
    return inner.inputs[0] if inner else None


# Convolutions and products


def _conv2d(rewriter: Rewriter, call: Call) -> Call | None:
    """Zeros around the image are the convolution's own padding; asymmetric ones too.

    In an imported graph the pad is still NCHW, on the far side of the transpose.
    """
    x, *rest = call.inputs
    moved = rewriter.producer(x, "transpose")
    permutation = moved.attrs["permutation"] if moved else (0, 1, 2, 3)
    pad = rewriter.producer(moved.inputs[0] if moved else x, "pad")
    if pad is None or pad.attrs["value"] != 0:
        return None
    before, after = (tuple(pad.attrs[side][axis] for axis in permutation) for side in ("before", "after"))
    if any((before[0], after[0], before[3], after[3])):
        return None
    added = (before[1], after[1], before[2], after[2])
    padding = tuple(a + b for a, b in zip(call.attrs["padding"], added, strict=True))
    source = pad.inputs[0]
    if moved:
        type_ = TensorType(tuple(source.type.shape[axis] for axis in permutation))
        source = _built(rewriter, _simplified(rewriter, Call("transpose", pad.inputs, moved.attrs, type_, call.like)))
    return call._replace(inputs=(source, *rest), attrs={**call.attrs, "padding": padding})


def _matmul(rewriter: Rewriter, call: Call) -> Call | None:
    """A transpose of the last two axes is the product's own."""
    for index, flag in enumerate(("transpose_a", "transpose_b")):
        moved = rewriter.producer(call.inputs[index], "transpose")
        if moved and _swaps_matrix(moved.attrs["permutation"]):
            inputs = (*call.inputs[:index], moved.inputs[0], *call.inputs[index + 1 :])
            return call._replace(inputs=inputs, attrs={**call.attrs, flag: not call.attrs[flag]})
    return None


def _swaps_matrix(permutation: tuple[int, ...]) -> bool:
    rank = len(permutation)
    return permutation == (*range(rank - 2), rank - 1, rank - 2)


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "expand": _expand,
    "slice": _same_type,
    "pad": _same_type,
    "cast": _same_type,
    "concat": _same_type,
    "reduce_sum": _reduction,
    "reduce_mean": _reduction,
    "reduce_max": _reduction,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "pow_scalar": _pow_scalar,
    "neg": _neg,
    "conv2d": _conv2d,
    "matmul": _matmul,
}
