"""How `layout` carries a pending transpose through each op: the op on the base, and what is pending afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pockc.ir import Node, Value
from pockc.passes.permutation import (
    Permutation,
    Shape,
    identity,
    inverted,
    is_channels_first,
    keeps_order,
    permute,
)

if TYPE_CHECKING:
    from pockc.passes.layout import Layout


class Carried(NamedTuple):
    """Operands and attributes for the same op in the layout of the base, and the permutation back to the user's."""

    inputs: tuple[Value, ...]
    attrs: Mapping[str, Any]
    permutation: Permutation


Rule = Callable[["Layout", Node], Carried | None]  # None: the op needs its operands in the user's layout


def _elementwise(layout: Layout, node: Node) -> Carried | None:
    """An operand of full size decides; the others, which may broadcast, are aligned with it."""
    full = node.outputs[0].type.shape
    views = (layout.view(v) for v in node.inputs if v.type.shape == full)
    permutation = next((p for _, p in views if is_channels_first(p)), None)
    if permutation is None:
        return None
    return Carried(tuple(layout.aligned(v, permutation, node) for v in node.inputs), node.attrs, permutation)


def _concat(layout: Layout, node: Node) -> Carried | None:
    """Worth it if at least half of the elements are pending: the rest is transposed for it."""
    views = [(v.type.elements, layout.view(v)[1]) for v in node.inputs]
    permutation = next((p for _, p in views if is_channels_first(p)), None)
    if permutation is None or 2 * sum(size for size, p in views if p == permutation) < node.outputs[0].type.elements:
        return None
    inputs = tuple(layout.aligned(v, permutation, node) for v in node.inputs)
    return Carried(inputs, {"axis": permutation[node.attrs["axis"]]}, permutation)


def _along_axis(layout: Layout, node: Node) -> Carried | None:
    """For slice, take and cumsum: the same along wherever the axis is in the base."""
    base, permutation = layout.view(node.inputs[0])
    if not is_channels_first(permutation):
        return None
    others = tuple(layout.plain(v, node) for v in node.inputs[1:])
    return Carried((base, *others), {**node.attrs, "axis": permutation[node.attrs["axis"]]}, permutation)


def _pad(layout: Layout, node: Node) -> Carried | None:
    base, permutation = layout.view(node.inputs[0])
    if not is_channels_first(permutation):
        return None
    inverse = inverted(permutation)
    sides = {side: permute(node.attrs[side], inverse) for side in ("before", "after")}
    return Carried((base,), {**node.attrs, **sides}, permutation)


def _expand(layout: Layout, node: Node) -> Carried | None:
    base, permutation = layout.view(node.inputs[0])
    shape = node.attrs["shape"]
    if not is_channels_first(permutation) or len(shape) != len(permutation):
        return None
    return Carried((base,), {"shape": permute(shape, inverted(permutation))}, permutation)


def _reduction(layout: Layout, node: Node) -> Carried | None:
    base, permutation = layout.view(node.inputs[0])
    if not is_channels_first(permutation):
        return None
    axes = node.attrs["axes"]
    attrs = {**node.attrs, "axes": tuple(sorted(permute(permutation, axes)))}
    if node.attrs["keepdims"]:
        return Carried((base,), attrs, permutation)
    kept = [permutation[axis] for axis in range(len(permutation)) if axis not in axes]
    return Carried((base,), attrs, tuple(sorted(kept).index(axis) for axis in kept))


def _reshape(layout: Layout, node: Node) -> Carried | None:
    """Splitting and merging axes works on the base where the merged ones are neighbours there, in the same order.

    Where they are not (channel shuffle), the base is transposed once if the result stays channels-last; else the user's
    layout is as cheap.
    """
    base, permutation = layout.view(node.inputs[0])
    source, target = node.inputs[0].type.shape, node.attrs["shape"]
    if permutation == identity(len(permutation)):
        return None
    groups = sorted(axis_groups(source, target), key=lambda group: min(permutation[axis] for axis in group[0]))
    needed = tuple(permutation[axis] for taken, _ in groups for axis in taken)
    made = tuple(axis for _, given in groups for axis in given)
    result = inverted(made)
    if not keeps_order(base.type.shape, needed):
        if len(target) < 4 or not is_channels_first(result):
            return None
        base = layout.transposed(base, needed, node)
    return Carried((base,), {"shape": permute(target, made)}, result)


def axis_groups(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """The finest split of a reshape into (source axes, target axes) that hold the same elements, in order.

    (2, 3, 4) to (2, 12) gives ([0], [0]) and ([1, 2], [1]). Every group has a source axis.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source):
        taken, given = [i], []
        before, after = source[i], 1
        i += 1
        while before != after or (i == len(source) and j < len(target)):  # the last group gets what is left over
            if after <= before and j < len(target):
                after *= target[j]
                given.append(j)
                j += 1
            else:
                before *= source[i]
                taken.append(i)
                i += 1
        groups.append((taken, given))
    return groups


_ELEMENTWISE = (
    "neg abs sign exp log sqrt rsqrt reciprocal sin cos tanh sigmoid erf softplus floor silu hardswish hardsigmoid "
    "gelu leaky_relu elu pow_scalar clip cast add sub mul div pow maximum minimum where "
    "equal not_equal less less_equal greater greater_equal logical_and logical_or logical_not"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("reduce_sum", "reduce_mean", "reduce_max"), _reduction),
    **dict.fromkeys(("slice", "take", "cumsum"), _along_axis),
    "concat": _concat,
    "pad": _pad,
    "expand": _expand,
    "reshape": _reshape,
}
