"""Which ops add up over the samples of a batch: weight gradients, bias gradients, losses.

Run on some of the samples at a time, such an op makes partial results whose sum is the whole: what
:mod:`pockc.passes.split_step` adds up. See `batch_rules` for the ops that treat samples independently.
"""

from __future__ import annotations

from collections.abc import Callable

from pockc.ir import Node
from pockc.passes.batch_rules import Batched, Roles

Rule = Callable[[Node, Batched], Roles | None]


def sum_roles(node: Node, batched: Batched, batch: int) -> Roles | None:
    """How a micro-batch reads each operand of a node that sums over the batch; None for any other node."""
    rule = RULES.get(node.op)
    if rule is None or batched.isdisjoint(node.inputs):
        return None
    found = rule(node, batched)
    if found is None:
        return None
    shapes = [value.type.shape for value, sliced in zip(node.inputs, found, strict=True) if sliced]
    return found if all(shape and shape[0] % batch == 0 for shape in shapes) else None


def is_mean(node: Node) -> bool:
    """Whether partial results count by their share of the samples."""
    return node.op == "reduce_mean"


def _all_rows(node: Node, batched: Batched) -> Roles | None:
    """Every operand has the rows of the batch."""
    rows = {value.type.shape[:1] for value in node.inputs}
    return tuple(True for _ in node.inputs) if len(rows) == 1 else None


def _matmul(node: Node, batched: Batched) -> Roles | None:
    """The gradient of a weight: columns of rows that are summed over."""
    plain = len(node.inputs) == 2 and all(len(value.type.shape) == 2 for value in node.inputs)
    summed = node.attrs["transpose_a"] and not node.attrs["transpose_b"]
    return (True, True) if plain and summed and node.attrs["activation"] == "none" else None


def _reduction(node: Node, batched: Batched) -> Roles | None:
    return (True,) if 0 in node.attrs["axes"] else None


def _per_row(node: Node, batched: Batched) -> Roles | None:
    """A normalisation along the last axis, which is not that of the batch."""
    return _all_rows(node, batched) if len(node.inputs[0].type.shape) > 1 else None


def _loss(node: Node, batched: Batched) -> Roles | None:
    """Its share of the mean needs all labels: how many count."""
    return True, False


RULES: dict[str, Rule] = {
    "conv2d_grad_weight": _all_rows,
    "matmul": _matmul,
    "reduce_sum": _reduction,
    "reduce_mean": _reduction,
    "layer_norm_grad_gamma": _per_row,
    "rms_norm_grad_gamma": _per_row,
    "embedding_grad": _all_rows,
    "cross_entropy": _loss,
}
