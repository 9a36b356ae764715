"""Reverse-mode differentiation, driven by need: the sparse backward pass exists by construction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

from pockc.errors import UserError
from pockc.ir import Builder, Graph, Node, Value
from pockc.ops import OPS
from pockc.passes import loss_scale
from pockc.recipe import Recipe

PREFIX = "gradient:"


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Add d loss / d p, as output ``gradient:<p>``, for every trained parameter p that reaches the loss.

    Pre:  the graph has a scalar output ``loss``; it holds forward nodes only.
    Post: exactly the nodes that those gradients need are added. A value is differentiated only when it lies on a
          path from a trained parameter to the loss; a missing gradient is absent, never a tensor of zeros.
    """
    targets = [graph.state(name) for name in recipe.trained if any(v.name == name for v in graph.states)]
    builder = Builder(graph)
    gradients = differentiate(builder, graph, graph.outputs["loss"], targets, loss_scale.seed(builder, recipe))
    outputs = {PREFIX + target.name: gradients[target] for target in targets if target in gradients}
    if not outputs:
        raise UserError(
            "no trained parameter reaches the loss",
            where=f"scheme ({', '.join(list(recipe.trained)[:3])}, ...)",
            instead="Check that the scheme names parameters of the part that the loss depends on.",
        )
    return builder.build({**graph.outputs, **outputs}, graph.updates)


def differentiate(
    builder: Builder, graph: Graph, loss: Value, targets: Iterable[Value], seed: Value
) -> dict[Value, Value]:
    """Append the gradient of ``seed * loss`` to the builder, which must hold the graph's nodes already.

    Returns the gradient of each target that reaches the loss. Fan-out sums.
    """
    wanted = set(targets)
    active = _active(graph.nodes, wanted)
    if loss not in active:
        return {}
    cotangents: dict[Value, Value] = {loss: seed}
    for node in reversed(graph.nodes):
        need = frozenset(i for i, value in enumerate(node.inputs) if value in active)
        if not need or not any(output in cotangents for output in node.outputs):
            continue
        builder.origin = replace(node.origin, phase="backward")
        for value, gradient in _pull_back(builder, node, cotangents, need):
            if value in cotangents:
                gradient = builder("add", cotangents[value], gradient, hint="gradient")
            cotangents[value] = gradient
    return {target: cotangents[target] for target in wanted if target in cotangents}


def _active(nodes: Iterable[Node], targets: set[Value]) -> set[Value]:
    """The floating-point values that depend on a target."""
    active = set(targets)
    for node in nodes:
        if any(value in active for value in node.inputs):
            if node.op == "quantize":  # codes would end the path to the loss without a word
                _refuse(node)
            active.update(output for output in node.outputs if output.type.dtype == "f32")
    return active


def _refuse(node: Node) -> NoReturn:
    raise UserError(
        f"op {node.op} has no gradient, but the scheme trains a parameter that it depends on",
        where=node.origin,
        instead="Freeze what comes before it, or replace it in the model.",
    )


def _pull_back(
    builder: Builder, node: Node, cotangents: dict[Value, Value], need: frozenset[int]
) -> list[tuple[Value, Value]]:
    """The gradients that one node contributes, per wanted operand (a value read twice comes twice)."""
    rule = OPS[node.op].vjp
    if rule is None:
        _refuse(node)
    results = rule(builder, node, tuple(cotangents.get(output) for output in node.outputs), need)
    pairs = []
    for index in sorted(need):
        gradient = results[index]
        if gradient is not None:
            pairs.append((node.inputs[index], gradient))
    return pairs
