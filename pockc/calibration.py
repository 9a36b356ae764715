"""The ranges of a frozen prefix's activations, measured over samples: what its codes of eight bits have to cover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pockc.errors import UserError
from pockc.ir import NUMPY_DTYPES, Array, Graph, Node, Value
from pockc.ops import OPS
from pockc.passes.frozen_prefix import prefix_nodes, value_keys
from pockc.recipe import Recipe

Range = tuple[float, float]


def measure(graph: Graph, recipe: Recipe, samples: Mapping[str, Array]) -> dict[str, Range]:
    """The least and the largest number of every f32 value of the prefix, by its key (`frozen_prefix.value_keys`).

    Args:
        graph: The training graph behind the passes that all entries share, before any loss.
        recipe: Says what is trained.
        samples: An array per input, samples along the first axis: any number of them. What the prefix does not read
            may be left out.

    Raises:
        UserError: The prefix has no convolution, an input has no samples or samples of another shape, or some value is
            not finite.
    """
    nodes = prefix_nodes(graph, recipe)
    if not any(node.op == "conv2d" for node in nodes):
        raise UserError(
            "prefix_dtype is 'int8', but in front of what the scheme trains there is no convolution",
            supported="networks whose first convolutions are frozen",
            instead="Leave prefix_dtype out, or train only later layers.",
        )
    keys = value_keys(graph, nodes)
    read = {value for node in nodes for value in node.inputs}
    ranges: dict[str, Range] = {}
    for batch in _batches([value for value in graph.inputs if value in read], samples):
        for value, array, where in _evaluated(graph, nodes, batch):
            low, high = float(array.min()), float(array.max())
            if not np.isfinite(high - low):
                raise UserError(f"the calibration samples give values from {low} to {high}", where=where)
            before = ranges.get(keys[value], (low, high))
            ranges[keys[value]] = (min(low, before[0]), max(high, before[1]))
    return ranges


def _batches(inputs: list[Value], samples: Mapping[str, Array]) -> Iterator[dict[Value, Array]]:
    """The samples in batches of the graph's size; the last is filled up with its last sample."""
    arrays = {value: _checked(value, samples) for value in inputs}
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1:
        raise UserError(f"the calibration samples are {' and '.join(map(str, sorted(counts)))} of different inputs")
    count = counts.pop()
    size = inputs[0].type.shape[0]
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)
        yield {value: array[rows] for value, array in arrays.items()}


def _checked(value: Value, samples: Mapping[str, Array]) -> Array:
    if value.name not in samples:
        raise UserError(
            f"there are no calibration samples of the input {value.name!r}",
            supported=f"one array per input; found {', '.join(samples) or 'none'}",
        )
    array = np.asarray(samples[value.name])
    shape = value.type.shape
    if not shape or not array.size or array.shape[1:] != shape[1:]:
        wanted = ", ".join(("samples", *map(str, shape[1:])))
        raise UserError(
            f"the calibration samples of {value.name!r} have shape {list(array.shape)}", supported=f"[{wanted}]"
        )
    if array.dtype.kind == "f" and value.type.dtype != "f32":
        raise UserError(f"the calibration samples of {value.name!r} are {array.dtype}", supported=value.type.dtype)
    return array.astype(NUMPY_DTYPES[value.type.dtype])


def _evaluated(
    graph: Graph, nodes: tuple[Node, ...], batch: Mapping[Value, Array]
) -> Iterator[tuple[Value, Array, str]]:
    """Each f32 value of the prefix, its numbers for a batch, and where it is from; forgotten after its last reader."""
    known: dict[Value, Array] = dict(batch)
    last = {value: node for node in nodes for value in node.inputs}
    yield from ((value, array, f"input {value.name}") for value, array in batch.items() if value.type.dtype == "f32")
    for node in nodes:
        operands = [known[value] if value in known else _contents(graph, value) for value in node.inputs]
        with np.errstate(all="ignore"):
            results = OPS[node.op].reference(*operands, **node.attrs)
        for value, result in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=True):
            known[value] = np.asarray(result)
            if value.type.dtype == "f32":
                yield value, known[value], str(node.origin)
        for value in node.inputs:
            if last[value] is node:
                known.pop(value, None)


def _contents(graph: Graph, value: Value) -> Array:
    data = graph.states[value].data
    assert data is not None  # the frontend's states all carry data
    return data


def load_samples(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz`` file. Raises UserError where it is none."""
    try:
        with np.load(path) as arrays:
            return dict(arrays.items())
    except (OSError, ValueError, BadZipFile, AttributeError) as error:
        raise UserError(
            f"cannot read calibration samples from {path}: {error}",
            supported="an .npz file with one array per model input, or `example` for the example inputs",
        ) from None
