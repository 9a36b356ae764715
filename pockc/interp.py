"""The numpy interpreter: the meaning of a graph, by the references of its ops. For tests and for small models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pockc.errors import InternalError
from pockc.halves import narrow, widen
from pockc.ir import Array, Graph, Node, State, Value, contents
from pockc.ops import OPS, load_families


def evaluate(
    graph: Graph, inputs: Mapping[str, Array], states: Mapping[str, Array] | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run a graph once.

    Args:
        graph: any graph whose states carry data, or get it from ``states``.
        inputs: an array per graph input, by name. Arrays of f32 values may be float64: references keep the precision
            that they are given, which is what gradient checks want.
        states: contents by state name, in the layout of the graph, instead of the initial ones.

    Returns:
        The outputs by name, and the new contents of every state but the constants, by name.

    Raises:
        InternalError: an input or a state is missing or has the wrong shape, or an op fails.
    """
    load_families()
    known: dict[Value, Array] = {}
    for value in graph.inputs:
        known[value] = _checked(value, inputs.get(value.name), "input")
    for value, state in graph.states.items():
        known[value] = _checked(value, _initial(value, state, states or {}), "state")
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            known.update(_run(node, [known[v] for v in node.inputs]))
            if node.op == "gate" and not known[node.outputs[0]]:
                break  # what would have come behind it is not updated
    outputs = {name: known[value] for name, value in graph.outputs.items()}
    kept = (v for v, state in graph.states.items() if state.kind != "constant")
    return outputs, {v.name: known.get(graph.updates.get(v, v), known[v]) for v in kept}


def _initial(value: Value, state: State, given: Mapping[str, Array]) -> Array | None:
    return given[value.name] if value.name in given and state.kind != "constant" else contents(value, state)


def _checked(value: Value, array: Array | None, what: str) -> Array:
    if array is None:
        raise InternalError(f"{what} {value!r} has no contents")
    array = np.asarray(array)
    if array.shape != value.type.shape:
        raise InternalError(f"{what} {value!r} is given an array of shape {array.shape}")
    return array


def _run(node: Node, operands: list[Array]) -> dict[Value, Array]:
    types = [value.type for value in node.inputs]
    given = [widen(x, type_.dtype) if type_.is_half else x for x, type_ in zip(operands, types, strict=True)]
    try:
        results = OPS[node.op].reference(*given, **node.attrs)
    except Exception as error:
        raise InternalError(f"{node.origin}: the reference of {node.op} failed: {error}") from error
    results = results if isinstance(results, tuple) else (results,)
    return {
        value: narrow(result, value.type.dtype) if value.type.is_half else np.asarray(result)
        for value, result in zip(node.outputs, results, strict=True)
    }
