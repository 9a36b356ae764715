"""Computes at build time what depends on frozen states alone."""

from __future__ import annotations

import numpy as np

from pockc.ir import NUMPY_DTYPES, Array, Graph, Node, State, Value
from pockc.ops import OPS
from pockc.passes.rewrite import Rewriter, is_frozen
from pockc.recipe import Recipe

MAXIMUM_GROWTH = 1 << 20  # bytes by which a result may exceed its operands


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Replace nodes whose operands are all frozen by constants, by means of the numpy references.

    Pre:  any level but `planned`; states that carry no data are left alone.
    Post: no node has only frozen operands, except those whose result is more than ``MAXIMUM_GROWTH`` larger than its
          operands. A constant made from a parameter is called ``<parameter>.folded``.
    """
    rewriter = Rewriter(graph)
    known = {v: s.data for v, s in graph.states.items() if s.data is not None and is_frozen(graph, recipe, v)}
    stems = {v: v.name for v in known}
    for node in graph.nodes:
        inputs = rewriter.inputs(node)
        if not inputs or any(v not in known for v in inputs) or _grows(node):
            rewriter.keep(node)
            continue
        stem = stems[_main_operand(rewriter, inputs)]
        for old, result in zip(node.outputs, _evaluate(node, [known[v] for v in inputs]), strict=True):
            constant = Value(stem.removesuffix(".folded") + ".folded", old.type)
            rewriter.builder.states[constant] = State("constant", result)
            known[constant], stems[constant] = result, constant.name
            rewriter.replace(old, constant)
    return rewriter.finish()


def _grows(node: Node) -> bool:
    before, after = (sum(v.type.nbytes for v in values) for values in (node.inputs, node.outputs))
    return after > before + MAXIMUM_GROWTH


def _main_operand(rewriter: Rewriter, inputs: tuple[Value, ...]) -> Value:
    """The operand to name the result after: a parameter's descendant rather than a constant, then the largest."""

    def rank(value: Value) -> tuple[bool, int]:
        named = rewriter.builder.states[value].kind != "constant" or value.name.endswith(".folded")
        return named, value.type.nbytes

    return max(inputs, key=rank)


def _evaluate(node: Node, operands: list[Array]) -> list[Array]:
    with np.errstate(all="ignore"):  # infinities of a frozen expression are the model's own
        result = OPS[node.op].reference(*operands, **node.attrs)
    results = result if isinstance(result, tuple) else (result,)
    return [
        np.ascontiguousarray(array, NUMPY_DTYPES[output.type.dtype]).reshape(output.type.shape)
        for array, output in zip(results, node.outputs, strict=True)
    ]
