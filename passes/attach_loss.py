"""Attach a named loss: the input ``labels`` and the scalar output ``loss``; for evaluation also what it got right."""

from __future__ import annotations

from dataclasses import replace

from pockc.errors import UserError, near_names
from pockc.ir import Builder, Graph, Origin
from pockc.losses import LOSSES
from pockc.recipe import Recipe


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Add the loss that the recipe names to the graph's first output.

    Pre:  the graph has an output; or, with ``recipe.loss`` None, an output called ``loss``.
    Post: there is a scalar f32 output ``loss``, first in the list; the other outputs are kept.
    """
    if recipe.loss is None:
        return _check_own_loss(graph)
    if recipe.loss not in LOSSES:
        raise UserError(
            f"there is no loss called {recipe.loss!r}",
            supported=", ".join(LOSSES),
            instead=near_names(recipe.loss, LOSSES) or "Or pass a callable loss(output, labels).",
        )
    if any(value.name == "labels" for value in graph.inputs):
        raise UserError(
            "the model has an input called labels, which a named loss adds by itself",
            instead="Leave labels out of the example inputs, or use loss=None when the model returns its own loss.",
        )
    prediction = next(iter(graph.outputs.values()))
    builder = Builder(graph)
    builder.origin = Origin(module=f"<loss {recipe.loss}>")
    loss = LOSSES[recipe.loss]
    labels = builder.input("labels", loss.labels(prediction.type))
    value = loss.attach(builder, prediction, labels, recipe.loss_options)
    return builder.build({"loss": value, **graph.outputs}, graph.updates)


def evaluation(graph: Graph, recipe: Recipe) -> Graph:
    """As `run`, for the entry that evaluates: where every token has a label, it counts instead of giving predictions.

    Post: with a loss over classes and labels of more than one axis, the first prediction is no output; there are the
          outputs ``correct`` and ``counted`` instead, i64[samples]: how many labels of each sample are predicted, and
          how many there are without the ignored ones. Logits over a vocabulary are the largest tensor of all.
    """
    attached = run(graph, recipe)
    labels = next((value for value in attached.inputs if value.name == "labels"), None)
    if recipe.loss is None or not LOSSES[recipe.loss].classifies or labels is None or len(labels.type.shape) < 2:
        return attached
    loss = attached.producers()[attached.outputs["loss"]]
    builder = Builder(attached)
    builder.origin = loss.origin
    attrs = {"samples": labels.type.shape[0], "ignore_index": loss.attrs["ignore_index"]}
    correct, counted = builder.multi("count_correct", *loss.inputs, **attrs)
    predicted = next(iter(graph.outputs))
    kept = {name: value for name, value in attached.outputs.items() if name != predicted}
    return builder.build({**kept, "correct": correct, "counted": counted}, attached.updates)


def _check_own_loss(graph: Graph) -> Graph:
    value = graph.outputs.get("loss")
    if value is None or value.type.dtype != "f32" or value.type.elements != 1:
        found = ", ".join(f"{name}: {v.type}" for name, v in graph.outputs.items())
        raise UserError(
            f"with loss=None the model must return a scalar loss, found outputs {found}",
            instead="Return the loss first, or name one of the built-in losses.",
        )
    others = {name: v for name, v in graph.outputs.items() if name != "loss"}
    if value.type.shape == ():
        return replace(graph, outputs={"loss": value, **others})
    builder = Builder(graph)
    return builder.build({"loss": builder("reshape", value, shape=(), hint="loss"), **others}, graph.updates)
