"""From the records of an entry to an ONNX model file: the only module that needs the package `onnx`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import pockc
from pockc.ir import Array, Origin
from pockc.targets.onnxruntime.elementwise import ELEMENT_TYPES
from pockc.targets.onnxruntime.entry import Argument, OnnxEntry

OPSET, IR_VERSION = 21, 10  # what ONNX Runtime 1.20 reads


def make_model(
    entry: OnnxEntry, metadata: Mapping[str, str], location: str, offset_of: Callable[[Array], int | None]
) -> onnx.ModelProto:
    """The model of an entry.

    Args:
        entry: Its records.
        metadata: For the properties of the model.
        location: The file, beside the model, that holds the large initializers.
        offset_of: Where in that file an array begins; None for one that goes into the model itself.
    """
    used: dict[str, int] = {}
    graph = helper.make_graph(
        [_node(node.op, node.inputs, node.outputs, node.attrs, node.origin, used) for node in entry.nodes],
        entry.name,
        [_argument(argument) for argument in (*entry.inputs, *entry.states)],
        [_argument(argument) for argument in (*entry.outputs, *entry.updates)],
        [_initializer(name, array, location, offset_of(array)) for name, array in entry.constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name, model.producer_version = "pockc", pockc.__version__
    helper.set_model_props(model, dict(metadata))
    return model


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model whose large initializers are in place, and have `onnx.checker` look at it, types included."""
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _node(
    op: str, inputs: list[str], outputs: list[str], attrs: Mapping[str, Any], origin: Origin, used: dict[str, int]
) -> onnx.NodeProto:
    node = helper.make_node(op, inputs, outputs, name=_name(origin, op, used), **attrs)
    for key, value in (("pockc.origin", str(origin)), ("pockc.phase", origin.phase)):
        node.metadata_props.add(key=key, value=value)
    return node


def _name(origin: Origin, op: str, used: dict[str, int]) -> str:
    """The module path, then the phase and the op: ``features.3.conv/backward/ConvTranspose``; numbered if need be."""
    phase = "" if origin.phase == "forward" else f"/{origin.phase}"
    name = f"{origin.module or '<model>'}{phase}/{op}"
    count = used[name] = used.get(name, 0) + 1
    return name if count == 1 else f"{name}#{count}"


def _argument(argument: Argument) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(argument.tensor, ELEMENT_TYPES[argument.type.dtype], argument.type.shape)


def _initializer(name: str, array: Array, location: str, offset: int | None) -> onnx.TensorProto:
    array = np.ascontiguousarray(array) if array.ndim else array
    if offset is None:
        return numpy_helper.from_array(array, name)
    tensor = onnx.TensorProto(
        name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )  # fmt: skip
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
