"""Moves biases and activations into the product in front of them, and a sum into an embedding's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pockc.ir import Graph, Node, Value
from pockc.passes.rewrite import Rewriter
from pockc.recipe import Recipe

PRODUCTS = frozenset({"conv2d", "matmul"})


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Fuse ``activation(product + bias)``, and each half of it, where nothing else reads what lies between.

    A backward pass that needs the value in front of an activation (gelu, silu) is such a reader: there only the bias is
    fused. One that is satisfied with the activation's result (ReLU and its kin) is none.

    Pre:  gradients are attached, if any: a fused node has no gradient rule.
    Post: no add of a [channels] bias, and no clip, gelu, silu or hardswish, is the only reader of a conv2d or matmul
          that could take it. An embedding_grad that is added to something adds to it in place.
    """
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node.op == "add":
            fused = _with_bias(rewriter, node) or _onto_base(rewriter, node)
        else:
            fused = _with_activation(rewriter, node)
        if fused is None:
            rewriter.keep(node)
        else:
            rewriter.replace(node.outputs[0], fused)
    return rewriter.finish()


def _product(rewriter: Rewriter, value: Value) -> Node | None:
    """The conv2d or matmul without activation that makes ``value`` for a single reader."""
    node = rewriter.producers.get(value)
    if node is None or node.op not in PRODUCTS or rewriter.uses[value] != 1:
        return None
    return node if node.attrs["activation"] == "none" else None


def _with_bias(rewriter: Rewriter, node: Node) -> Value | None:
    """The product with a bias operand; at the place of the addition, where the bias is known to be computed.

    An addition that updates a state stays: it runs in the state's own buffer, which a product cannot.
    """
    if node.origin.phase == "update":
        return None
    inputs = rewriter.inputs(node)
    for y, bias in (inputs, inputs[::-1]):
        product = _product(rewriter, y)
        if product is None or len(product.inputs) > 2 or y.type != node.outputs[0].type:
            continue
        channels = y.type.shape[-1]
        if bias.type.elements != channels or bias.type.shape[-1:] != (channels,):
            continue
        if bias.type.shape != (channels,):
            bias = rewriter.emit(product, "reshape", (bias,), {"shape": (channels,)})
        return rewriter.emit(product, product.op, (*product.inputs, bias), product.attrs)
    return None


def _onto_base(rewriter: Rewriter, node: Node) -> Value | None:
    """The gradient of a table that has another one already, as tied embeddings do: one tensor instead of two."""
    inputs = rewriter.inputs(node)
    for gradient, base in (inputs, inputs[::-1]):
        scatter = rewriter.producer(gradient, "embedding_grad")
        if scatter is None or len(scatter.inputs) > 2 or rewriter.uses[gradient] != 1 or base.type != gradient.type:
            continue
        return rewriter.emit(scatter, scatter.op, (*scatter.inputs, base), scatter.attrs)
    return None


def _with_activation(rewriter: Rewriter, node: Node) -> Value | None:
    epilogue = _epilogue(node)
    product = _product(rewriter, rewriter[node.inputs[0]]) if epilogue else None
    if product is None or epilogue is None:
        return None
    return rewriter.emit(product, product.op, product.inputs, {**product.attrs, **epilogue})


def _epilogue(node: Node) -> Mapping[str, Any] | None:
    """The attributes that make a product apply this activation; None for any other node."""
    if node.op == "clip":
        return {"activation": "clip", "low": node.attrs["low"], "high": node.attrs["high"]}
    if node.op == "gelu":
        return {"activation": "gelu_tanh" if node.attrs["approximate"] else "gelu"}
    return {"activation": node.op} if node.op in ("silu", "hardswish") else None
