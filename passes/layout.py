"""Removes the transposes around channels-last ops, by carrying them forward until they cancel.

The frontend wraps every NHWC op into transposes from and to the user's NCHW. This pass drops a transpose where it
stands and remembers it as pending: the old value is ``transpose(base, permutation)`` of a new one. Ops that work in
any layout are applied to the base, and the result is pending in turn; the next wrapped op then finds the inverse
transpose, and the pair is gone. An op that needs the user's layout gets the transpose in front of it after all.
"""

from __future__ import annotations

import numpy as np

from pockc.ir import Graph, Node, State, TensorType, Value
from pockc.passes.layout_rules import RULES
from pockc.passes.permutation import (
    Permutation,
    Shape,
    compose,
    identity,
    inverted,
    keeps_order,
    permute,
    without_leading_ones,
)
from pockc.passes.rewrite import Rewriter
from pockc.recipe import Recipe


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Move activations to channels-last and convolution weights to OHWI for good.

    Pre:  `canonicalize` ran; no gradients yet.
    Post: between channels-last ops there is no transpose unless something in between depends on the user's order of
          elements. A parameter that only convolutions read is stored the way they read it (``State.permutation``).
          Reshapes of reshapes and the like may be left to another `canonicalize`.
    """
    return Layout(graph).sweep()


class Layout:
    """The sweep: what each old value is in terms of new ones."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rewriter = Rewriter(graph)
        self.pending: dict[Value, tuple[Value, Permutation]] = {}
        self.moved: dict[tuple[Value, Permutation], Value] = {}
        self.origins = graph.producers()

    def sweep(self) -> Graph:
        """The whole graph in its new layout."""
        self.store_weights_as_read()
        for node in self.graph.nodes:
            self.visit(node)
        for value in self.graph.results():
            if value in self.pending:
                self.rewriter.replace(value, self.plain(value, self.origins[value]))
        return self.rewriter.finish()

    def visit(self, node: Node) -> None:
        """Carry the transposes of the operands through a node, or put them in front of it."""
        if self.rewriter[node.outputs[0]] is not node.outputs[0]:
            return  # the transpose of a state that is stored that way now
        if node.op == "transpose":
            base, permutation = self.view(node.inputs[0])
            self.set(node, base, compose(permutation, node.attrs["permutation"]))
            return
        result = RULES[node.op](self, node) if node.op in RULES else None
        if result is not None:
            self.set(node, self.rewriter.emit(node, node.op, result.inputs, result.attrs), result.permutation)
            return
        for value in node.inputs:
            if value in self.pending:
                self.rewriter.replace(value, self.plain(value, node))
        self.rewriter.keep(node)

    def view(self, value: Value) -> tuple[Value, Permutation]:
        """An old value as a transposed new one."""
        return self.pending.get(value) or (self.rewriter[value], identity(len(value.type.shape)))

    def set(self, node: Node, value: Value, permutation: Permutation) -> None:
        """Say that the output of an old node is the transposed new ``value``."""
        if permutation == identity(len(permutation)):
            self.rewriter.replace(node.outputs[0], value)
        else:
            self.pending[node.outputs[0]] = (value, permutation)

    def plain(self, value: Value, node: Node) -> Value:
        """An old value in its own layout, for ``node``."""
        return self.transposed(*self.view(value), node)

    def transposed(self, base: Value, permutation: Permutation, node: Node) -> Value:
        """A transpose of a new value, made once; a reshape where only axes of size one move."""
        if not base.type.shape or permutation == identity(len(permutation)):
            return base
        if keeps_order(base.type.shape, permutation):
            return self.reshaped(base, permute(base.type.shape, permutation), node)
        if (base, permutation) not in self.moved:
            attrs = {"permutation": permutation}
            self.moved[base, permutation] = self.rewriter.emit(node, "transpose", (base,), attrs)
        return self.moved[base, permutation]

    def reshaped(self, base: Value, shape: Shape, node: Node) -> Value:
        """A new value in another shape; itself where it has that shape."""
        if base.type.shape == shape:
            return base
        return self.rewriter.emit(node, "reshape", (base,), {"shape": shape})

    def aligned(self, value: Value, permutation: Permutation, node: Node) -> Value:
        """An operand, broadcast or not, for an op on bases whose result is pending with ``permutation``."""
        base, own = self.view(value)
        if own == permutation:
            return base
        plain = self.transposed(base, own, node)
        shape = plain.type.shape
        if not shape:
            return plain
        full = (1,) * (len(permutation) - len(shape)) + shape
        inverse = inverted(permutation)
        if not keeps_order(full, inverse):
            return self.transposed(self.reshaped(plain, full, node), inverse, node)
        return self.reshaped(plain, without_leading_ones(permute(full, inverse)), node)

    def store_weights_as_read(self) -> None:
        """Permute the states that are only read through one and the same transpose, as weights of convolutions."""
        readers = self.graph.consumers()
        results = set(self.graph.results()) | set(self.graph.updates)

        def is_weight(value: Value) -> bool:
            return all(n.op == "conv2d" and n.inputs.index(value) == 1 for n in readers.get(value, []))

        states: dict[Value, State] = {}
        for value, state in self.graph.states.items():
            transposes = readers.get(value, [])
            permutations = {n.attrs["permutation"] if n.op == "transpose" else () for n in transposes}
            permuted = len(permutations) == 1 and () not in permutations and value not in results
            if not permuted or not all(is_weight(n.outputs[0]) for n in transposes):
                states[value] = state
                continue
            stored, stored_state = permuted_state(value, state, permutations.pop())
            states[stored] = stored_state
            for node in transposes:
                self.rewriter.replace(node.outputs[0], stored)
        self.rewriter.builder.states = states


def permuted_state(value: Value, state: State, permutation: Permutation) -> tuple[Value, State]:
    """The state stored as its transpose, under the same name."""
    data = None if state.data is None else np.ascontiguousarray(state.data.transpose(permutation))
    before = state.permutation or identity(len(permutation))
    type_ = TensorType(permute(value.type.shape, permutation), value.type.dtype)
    return Value(value.name, type_), State(state.kind, data, compose(before, permutation))
