"""`pockc.build`: from a PyTorch model to a compiled training program."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pockc.errors import UserError
from pockc.ir import Graph
from pockc.losses import LOSSES
from pockc.optim import AdamW, Optimizer
from pockc.passes import memory
from pockc.pipeline import ACCUMULATE, COMMON, EVAL, INFER, LOWER, TRAIN, Manager, Pass
from pockc.program import Program, place_states
from pockc.recipe import BatchNorm, Recipe, StateDtype
from pockc.scheme import Channels, Scheme, detect_family, resolve
from pockc.targets import devices
from pockc.targets.native import NATIVE, workspace_of


def build(
    model: Any,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    loss: str | Callable[..., Any] | None = "cross_entropy",
    optimizer: Optimizer | None = None,
    scheme: str | Path | Scheme = "full",
    batchnorm: BatchNorm = "fold",
    device: str = "x86-64",
    *,
    accumulation: int = 1,
    state_dtype: StateDtype = "f32",
    loss_options: Mapping[str, float] | None = None,
    seed: int = 0,
    disabled: frozenset[str] = frozenset(),
    compare_full: bool = False,
) -> Program:
    """Compile one training step of a PyTorch model.

    Args:
        model: a ``torch.nn.Module``. In eval mode it is fine-tuned with dropout off.
        example_inputs: keyword inputs, or a tuple in the order of ``forward``. Their shapes are fixed, batch included.
        loss: the name of a built-in loss, which adds the input ``labels``; a callable ``loss(output, labels)``, with
            ``labels`` among the example inputs; or None where the model returns the loss.
        optimizer: `pockc.SGD`, `Adam`, `AdamW` or `Lion`; ``AdamW()`` if None.
        scheme: what is updated: a preset, a YAML file, or a `Scheme`.
        batchnorm: ``fold`` and ``freeze`` keep the statistics, ``fold`` also gamma; ``train`` updates them.
        device: a name of `pockc devices`.
        accumulation: micro-steps whose mean gradient makes one optimizer step.
        state_dtype: how optimizer slots are stored: ``f32``, or ``int8``, a byte each and a scale for every 256.
        loss_options: ``label_smoothing``, ``ignore_index`` (cross entropy), ``delta`` (huber).
        seed: of dropout and of random channel selections in presets.
        disabled: names of optional passes to switch off.
        compare_full: also plan the scheme ``full``, and keep its memory in the metadata for comparison.

    Returns:
        The program: ``save`` it, look at ``memory`` and ``text("train_step")``.

    Raises:
        UserError: something in the model, scheme or options is not supported, or makes no sense together.
    """
    from pockc.frontend.torch import trace  # torch is an extra: only building needs it

    optimizer = optimizer or AdamW()
    _check_options(loss, batchnorm, accumulation)
    _check_state_dtype(state_dtype, optimizer)
    started = time.perf_counter()
    target = devices.find(device)
    imported = trace(model, example_inputs, loss=loss, batchnorm=batchnorm)
    needs_eval_graph = bool(getattr(model, "training", False)) or batchnorm == "train"
    evaluated = (
        trace(model, example_inputs, loss=loss, batchnorm="freeze", training=False) if needs_eval_graph else None
    )

    parameters = {
        value.name: state.original().shape
        for value, state in imported.graph.states.items()
        if state.kind == "parameter"
    }
    family = detect_family(imported.modules)
    frozen = _batchnorm_scales(imported.modules) if batchnorm == "fold" else frozenset()

    def resolved(chosen: str | Path | Scheme) -> dict[str, Channels | None]:
        modules, aliases = imported.modules, imported.aliases
        return resolve(chosen, parameters, modules=modules, family=family, aliases=aliases, frozen=frozen)

    recipe = Recipe(
        trained=resolved(scheme),
        optimizer=optimizer,
        loss=loss if isinstance(loss, str) else None,
        loss_options=dict(loss_options or {}),
        batchnorm=batchnorm,
        accumulation=accumulation,
        state_dtype=state_dtype,
        threads=target.threads,
        workspace=workspace_of(target.threads),
        updated_buffers=frozenset(state.name for state in imported.graph.updates),
        disabled=disabled,
    )
    manager = Manager(recipe, NATIVE.supports)
    graphs = imported.graph, evaluated.graph if evaluated else None
    program, without_gradient = _plan(manager, graphs, seed)
    metadata = {
        "model": type(model).__name__,
        "family": family,
        "scheme": str(scheme),
        "loss": loss if isinstance(loss, str) else ("callable" if loss else "model"),
        "classifies": isinstance(loss, str) and LOSSES[loss].classifies,
        "optimizer": _describe(optimizer),
        "state_dtype": state_dtype,
        "batchnorm": batchnorm,
        "device": target.name,
        "aliases": dict(imported.aliases),
        "trained": [name for name in recipe.trained if name not in without_gradient],
        "without_gradient": sorted(without_gradient),
        "trained_elements": _trained_elements(program.entries["train_step"]),
        "parameters": {name: list(shape) for name, shape in parameters.items()},
        "buffers": _persistent_buffers(model, parameters, imported.aliases),
        "passes": [
            {"entry": entry, "pass": name, "ms": round(ms, 3), "nodes": nodes}
            for entry, name, ms, nodes in manager.timings
        ],
        "build_seconds": round(time.perf_counter() - started, 3),
    }
    if compare_full:
        full = replace(recipe, trained=resolved("full"))
        planned = program if full.trained == recipe.trained else _plan(Manager(full, NATIVE.supports), graphs, seed)[0]
        metadata["full_memory"] = planned.memory.totals()
    return replace(program, metadata=metadata)


def _plan(manager: Manager, graphs: tuple[Graph, Graph | None], seed: int) -> tuple[Program, set[str]]:
    """A program without metadata from training and evaluation graph; the trained parameters without a gradient."""
    threads = manager.recipe.threads
    entries, without_gradient = _entries(manager, *graphs, seed)
    placements = {name: memory.run(graph, workspace_of(threads)) for name, graph in entries.items()}
    state_offset, state_bytes = place_states(entries)
    transient = max(placement.nbytes for placement in placements.values())
    program = Program(
        entries=entries,
        placements=placements,
        state_offset=state_offset,
        state_bytes=state_bytes,
        arena_bytes=state_bytes + transient,
        max_threads=threads,
        accumulation=manager.recipe.accumulation,
        metadata={},
    )
    return program, without_gradient


def _persistent_buffers(model: Any, parameters: Mapping[str, Any], aliases: Mapping[str, str]) -> list[str]:
    """What else than parameters the model's ``state_dict`` holds, and an export must hold."""
    return [name for name in model.state_dict() if name not in parameters and name not in aliases]


def _check_options(loss: object, batchnorm: str, accumulation: int) -> None:
    if batchnorm not in get_args(BatchNorm):
        raise UserError(f"batchnorm is {batchnorm!r}", supported=", ".join(get_args(BatchNorm)))
    if accumulation < 1:
        raise UserError(f"accumulation is {accumulation}; it counts micro-steps and is at least 1")
    if not (loss is None or isinstance(loss, str) or callable(loss)):
        raise UserError(f"loss is {loss!r}", supported="a name, a callable loss(output, labels), or None")


def _check_state_dtype(state_dtype: str, optimizer: Optimizer) -> None:
    if state_dtype not in get_args(StateDtype):
        raise UserError(f"state_dtype is {state_dtype!r}", supported=", ".join(get_args(StateDtype)))
    if state_dtype == "int8" and not optimizer.slots:
        name = type(optimizer).__name__
        raise UserError(
            f"state_dtype is 'int8', but {name} without momentum keeps no state",
            supported="SGD with momentum, Adam, AdamW, Lion",
            instead="Leave state_dtype out.",
        )


def _batchnorm_scales(modules: Mapping[str, str]) -> frozenset[str]:
    """The gammas of all batch norms: policy ``fold`` freezes them."""
    return frozenset(f"{path}.weight" for path, kind in modules.items() if "BatchNorm" in kind)


def _entries(
    manager: Manager, train_graph: Graph, eval_graph: Graph | None, seed: int
) -> tuple[dict[str, Graph], set[str]]:
    """All entry graphs, scheduled, and the trained parameters that no gradient reaches."""
    common = manager.run("common", COMMON, _seeded(train_graph, seed))
    quiet = manager.run("common-eval", COMMON, eval_graph) if eval_graph is not None else common
    has_loss = manager.recipe.loss is not None

    def entry(name: str, passes: tuple[Pass, ...], graph: Graph) -> Graph:
        return manager.run(name, (*passes, *LOWER), graph)

    entries = {"train_step": entry("train_step", TRAIN, common)}
    planned = memory.run(entries["train_step"], manager.recipe.workspace).nbytes
    manager.recipe = replace(manager.recipe, sufficient=planned)
    if manager.recipe.accumulation > 1:
        entries["accumulate"] = entry("accumulate", ACCUMULATE, common)
    entries["eval_step"] = entry("eval_step", EVAL, _without_updates(quiet))
    predictions = {n: v for n, v in quiet.outputs.items() if has_loss or n != "loss"}
    if predictions:
        entries["infer"] = entry("infer", INFER, _only(_without_updates(quiet), predictions))
    updated = {state.name for state in entries["train_step"].updates}
    return entries, {name for name in manager.recipe.trained if name not in updated}


def _seeded(graph: Graph, seed: int) -> Graph:
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


def _describe(optimizer: Optimizer) -> dict[str, Any]:
    return {"name": type(optimizer).__name__.lower(), **asdict(optimizer)}


def _trained_elements(graph: Graph) -> int:
    """How many numbers a step updates: of a channel-sparse weight only the selected part counts."""
    makers = graph.producers()
    total = 0
    for state, value in graph.updates.items():
        if graph.states[state].kind == "parameter":
            total += makers[value].inputs[1].type.elements
    return total
