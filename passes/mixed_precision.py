"""Keeps activations and their gradients in 16 bits, and everything that sums over samples in float32."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import groupby

from pockc.ir import Builder, Graph, Node, Value
from pockc.ops.halves import MOVES, NARROWS, SUMS, is_weight_gradient
from pockc.passes.lifetimes import storages
from pockc.passes.rewrite import live_nodes
from pockc.recipe import Recipe

HALVES: Mapping[str, str] = {"bf16": "b16", "fp16": "f16"}  # the dtype of the IR, by `Recipe.dtype`
MOST_TAPS = 32  # of a convolution's window, per axis
LEAST_BYTES = 4096  # of an activation: less saves less than its rounding is worth
PRODUCTS = frozenset({"matmul", "conv2d", "conv2d_grad_input", "attention"})  # these take any mix of dtypes
REDUCTIONS = frozenset({"reduce_sum", "reduce_mean", "reduce_max", "argmax", "cumsum"})
OF_LOGITS = frozenset({"cross_entropy_tile", "cross_entropy_grad_tile"})  # a part of a loss that holds no sums
# What becomes of activations and is none: gradients of weights, sums of samples, losses.
SUMS_OF_SAMPLES = frozenset({"embedding_grad", "sum_squares", "cross_entropy", "batch_norm_grad_gamma"})


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Where `Recipe.dtype` is bf16 or fp16, store activations and their gradients in 16 bits.

    Those are the results of what runs on samples, forward and backward, down to the logits. An op that has a form for
    16 bits (pockc/ops/halves.py) takes them as they are, computes in float32, and rounds its result; any other reads
    them through a `cast` to float32 of its own, right in front of it, and a `cast` rounds its result. In float32 stay
    parameters, which kernels read as they are, gradients of parameters, optimizer states, what a named loss computes
    (but for logits of large vocabularies, and their gradients), statistics of norms, and what is small.

    Pre:  nodes are fused, losses tiled; nothing merges equal nodes afterwards.
    Post: types of inputs, states and results are the same. Outputs and gradients are those of rounded activations.
    """
    if recipe.dtype == "f32":
        return graph
    halver = _Halver(graph, HALVES[recipe.dtype])
    for node in graph.nodes:
        halver.append(node)
    return halver.finish()


class _Halver:
    """Copies a graph, and has what it chose in 16 bits."""

    def __init__(self, graph: Graph, dtype: str) -> None:
        self.graph = graph
        self.dtype = dtype
        self.builder = Builder(replace(graph, nodes=()))
        self.chosen = _chosen(graph)
        self.halves: dict[Value, Value] = {}
        self.floats: dict[Value, Value] = {}
        for value in graph.inputs:
            self._made(value, value)

    def append(self, node: Node) -> None:
        """The node, in its 16-bit form where it has one for what it reads."""
        self.builder.origin = node.origin
        positions = self._positions(node)
        inputs = tuple(
            self._half(value) if i in positions else self._float(value) for i, value in enumerate(node.inputs)
        )
        if inputs == node.inputs:
            self.builder.nodes.append(node)
            outputs = node.outputs
        else:
            outputs = self.builder.multi(node.op, *inputs, hint=node.outputs[0].name, **node.attrs)
        for old, new in zip(node.outputs, outputs, strict=True):
            self._made(old, new)

    def finish(self) -> Graph:
        """The new graph, without what nothing reads."""
        outputs = {name: self._float(value) for name, value in self.graph.outputs.items()}
        updates = {state: self._float(value) for state, value in self.graph.updates.items()}
        self.builder.nodes = live_nodes(self.builder.nodes, (*outputs.values(), *updates.values()))
        return self.builder.build(outputs, updates)

    def _positions(self, node: Node) -> set[int]:
        """The operands that the node reads in 16 bits: none, or all of the samples."""
        taken = [i for i in taken_by(node) if node.inputs[i].type.dtype == "f32"]
        chosen = {i for i in taken if node.inputs[i] in self.chosen}
        if not chosen or node.op in PRODUCTS:
            return chosen
        shape = node.outputs[0].type.shape
        alike = node.op in MOVES or node.op in SUMS
        return chosen | {i for i in taken if alike or node.inputs[i].type.shape == shape}

    def _made(self, old: Value, new: Value) -> None:
        if new.type.is_half:
            self.halves[old] = new
        else:
            self.floats[old] = new
        if old in self.chosen and not new.type.is_half:
            self.halves[old] = self._cast(new, self.dtype)

    def _half(self, value: Value) -> Value:
        return self.halves[value] if value in self.halves else self._cast(self._float(value), self.dtype)

    def _float(self, value: Value) -> Value:
        """In float32: as it was made, unless that is to be forgotten; else widened for this reader alone."""
        if value in self.halves and (value in self.chosen or value not in self.floats):
            return self._cast(self.halves[value], "f32")
        return self.floats.get(value, value)

    def _cast(self, value: Value, dtype: str) -> Value:
        return self.builder("cast", value, hint=value.name, dtype=dtype)


def taken_by(node: Node) -> tuple[int, ...]:
    """The operands that a node takes in 16 bits, where it has such a form: what the kernels accept, and no loss."""
    if node.origin.module.startswith("<loss") and node.op not in OF_LOGITS:
        return ()
    if not _REQUIRED.get(node.op, _always)(node):
        return ()
    if node.op in MOVES:
        return tuple(range(len(node.inputs)))
    return NARROWS.get(node.op, SUMS.get(node.op, ()))


def _always(node: Node) -> bool:
    return True


def _has_window(node: Node) -> bool:
    """Whether a convolution's window is one that vectorised kernels take.

    Depthwise ones apply no activation but a clip before they round.
    """
    weight = node.outputs[0] if node.op == "conv2d_grad_weight" else node.inputs[1]
    rounds_late = node.attrs["groups"] == 1 or node.attrs.get("activation", "none") in ("none", "clip")
    return rounds_late and max(weight.type.shape[1:3]) <= MOST_TAPS


def _is_one_run(node: Node) -> bool:
    """Whether the axes that a node reduces are neighbours but for axes of one element."""
    axes, shape = node.attrs["axes"], node.inputs[0].type.shape
    return all(i in axes or shape[i] == 1 for i in range(axes[0], axes[-1]))


def _broadcasts_simply(node: Node) -> bool:
    """Whether one operand is as large as the result, and the other broadcast along one run of axes at most."""
    out = node.outputs[0].type
    full = next((i for i, value in enumerate(node.inputs) if value.type.elements == out.elements), None)
    if full is None:
        return False
    other = node.inputs[1 - full].type.shape
    own = (1,) * (len(out.shape) - len(other)) + other
    stretched = [length == 1 for length, size in zip(own, out.shape, strict=True) if size != 1]
    return sum(is_stretched for is_stretched, _ in groupby(stretched)) <= 1


# By op, what its vectorised kernels ask for: there are no others for 16 bits.
_REQUIRED: Mapping[str, Callable[[Node], bool]] = {
    **dict.fromkeys(("conv2d", "conv2d_grad_input", "conv2d_grad_weight"), _has_window),
    **dict.fromkeys(("reduce_sum", "reduce_mean"), _is_one_run),
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), _broadcasts_simply),
}


def _chosen(graph: Graph) -> set[Value]:
    """What is stored in 16 bits: activations of some size that a node takes in that form."""
    samples = _samples(graph)
    root = storages(graph)
    kept = {root[value] for value in graph.results()}
    found: set[Value] = set()
    for node in graph.nodes:
        for i in taken_by(node):
            value = node.inputs[i]
            if value in samples and value.type.nbytes >= LEAST_BYTES and value not in kept:
                found.add(value)
    return found


def _samples(graph: Graph) -> Collection[Value]:
    """Inputs in float32, and what is computed from them row by row."""
    found = set(graph.inputs)
    for node in graph.nodes:
        if node.origin.phase != "update" and not found.isdisjoint(node.inputs) and not _sums_samples(node):
            found.update(node.outputs)
    return {value for value in found if value.type.dtype == "f32" and len(value.type.shape) >= 2}


def _sums_samples(node: Node) -> bool:
    if node.op in REDUCTIONS:
        return 0 in node.attrs.get("axes", (node.attrs.get("axis"),))
    if is_weight_gradient(node.op, node.attrs, [value.type for value in node.inputs]):
        return True
    return node.op in SUMS_OF_SAMPLES or (node.op in SUMS and node.op != "attention_grad")
