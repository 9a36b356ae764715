"""The entry graphs of a program, from the traced model to what a target runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pockc.ir import Graph
from pockc.passes import memory, prefix_cut
from pockc.passes.channel_chains import tiles_of
from pockc.pipeline import ACCUMULATE, COMMON, EVAL, INFER, LOWERINGS, TRAIN, Manager, Pass

ENTRIES = ("train_step", "eval_step", "infer")
ENCODE = "encode"
ENCODED = "_encoded"  # behind the name of an entry: the same, started from the outputs of `encode`


@dataclass(frozen=True, slots=True)
class Traced:
    """A model as it was traced, and which entries are made of it.

    ``evaluation`` is the graph for evaluation where that is not the one for training.
    """

    training: Graph
    evaluation: Graph | None
    wanted: Collection[str]
    cache_prefix: bool


def lowered(target: str, manager: Manager, traced: Traced) -> tuple[dict[str, Graph], set[str]]:
    """The wanted entry graphs, lowered for the target, and the trained parameters that no gradient reaches."""
    common = manager.run("common", COMMON, traced.training)
    quiet = manager.run("common-eval", COMMON, traced.evaluation) if traced.evaluation is not None else common
    make = _Lowering(target, manager)
    entries = make.steps_in_two(common, quiet, traced.wanted) if traced.cache_prefix else make.steps(common)
    if "eval_step" in traced.wanted and "eval_step" not in entries:
        entries["eval_step"] = make.entry("eval_step", EVAL, _without_updates(quiet))
    has_loss = manager.recipe.loss is not None
    predictions = {n: v for n, v in quiet.outputs.items() if has_loss or n != "loss"}
    if predictions and "infer" in traced.wanted:
        entries["infer"] = make.entry("infer", INFER, _only(_without_updates(quiet), predictions))
    updated = {state.name for state in entries["train_step"].updates}
    return entries, {name for name in manager.recipe.trained if name not in updated}


@dataclass(frozen=True, slots=True)
class _Lowering:
    """Makes entries, of which the first says what later ones may need."""

    target: str
    manager: Manager

    def entry(self, name: str, passes: tuple[Pass, ...], graph: Graph) -> Graph:
        return self.manager.run(name, (*passes, *LOWERINGS[self.target]), graph)

    def steps(self, common: Graph) -> dict[str, Graph]:
        """The training step, and its variant for all micro-steps but the last."""
        entries = {"train_step": self.entry("train_step", TRAIN, common)}
        self.learn_from(entries["train_step"])
        if self.manager.recipe.accumulation > 1:
            entries["accumulate"] = self.entry("accumulate", ACCUMULATE, common)
        return entries

    def steps_in_two(self, common: Graph, quiet: Graph, wanted: Collection[str]) -> dict[str, Graph]:
        """The same with the frozen prefix and what starts behind it as entries of their own.

        Both parts are lowered once: `train_step` and `eval_step` are one after the other. So they have the very numbers
        of their parts, also where lowering may change the order of sums or the choice of kernels.
        """
        recipe = self.manager.recipe
        boundary = prefix_cut.find(common, recipe)
        rest = prefix_cut.behind(common, boundary.values)
        rests = self.steps(rest)
        self.manager.recipe = replace(self.manager.recipe, tiles=None)  # those of the prefix are its own to choose
        encode = self.entry(ENCODE, INFER, prefix_cut.encoder(common, boundary.values))
        names = [value.name for value in common.inputs]
        entries = {name: prefix_cut.joined(encode, graph, names) for name, graph in rests.items()}
        self.learn_from(entries["train_step"])
        entries |= {ENCODE: encode} | {name + ENCODED: graph for name, graph in rests.items()}
        evaluated = boundary.in_graph(quiet, recipe) if "eval_step" in wanted else None
        if evaluated is not None:
            name = f"eval_step{ENCODED}"
            entries[name] = self.entry(name, EVAL, prefix_cut.behind(_without_updates(quiet), evaluated))
            entries["eval_step"] = prefix_cut.joined(encode, entries[name], [value.name for value in quiet.inputs])
        return entries

    def learn_from(self, step: Graph) -> None:
        """Let later entries take the memory that this one needs, and cut weights into tiles as it does."""
        if self.target == "native":
            recipe = self.manager.recipe
            planned = memory.run(step, recipe.workspace).nbytes
            self.manager.recipe = replace(recipe, sufficient=planned, tiles=tiles_of(step))


def seeded(graph: Graph, seed: int) -> Graph:
    """The graph with its dropout seed, if it has one, set."""
    states = {
        value: replace(state, data=np.asarray(seed, np.int64)) if value.name == "pockc.seed" else state
        for value, state in graph.states.items()
    }
    return replace(graph, states=states)


def _without_updates(graph: Graph) -> Graph:
    return replace(graph, updates={})


def _only(graph: Graph, outputs: Mapping[str, Any]) -> Graph:
    """The part of a graph that some outputs need, inputs included."""
    live = set(outputs.values())
    for node in reversed(graph.nodes):
        if live.intersection(node.outputs):
            live.update(node.inputs)
    nodes = tuple(node for node in graph.nodes if live.intersection(node.outputs))
    inputs = tuple(value for value in graph.inputs if value in live)
    return replace(graph, inputs=inputs, nodes=nodes, outputs=dict(outputs))
