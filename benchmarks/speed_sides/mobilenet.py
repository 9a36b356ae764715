"""MobileNetV2 of the zoo as plain data, for libraries that it has to be written in once more.

Needs nothing but numpy. Batch norms are folded as pockc folds them: a convolution's weight is multiplied by the frozen
factor of its norm in every step, its bias is beta minus what the frozen mean makes; so each library is spared the pass
over the activations that a norm in eval mode would be.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.speed_sides.protocol import SideError, Task

# Repeats and the stride of the first repeat, as in zoo_vision.py.
_STAGES = ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution and its batch norm by their PyTorch names; ``clipped``: a ReLU6 follows."""

    weight: str
    norm: str
    stride: int
    depthwise: bool
    clipped: bool


@dataclass(frozen=True, slots=True)
class Block:
    """Layers in a row; ``skip``: their input is added to their output."""

    layers: tuple[Layer, ...]
    skip: bool = False


@dataclass(frozen=True, slots=True)
class MobileNet:
    """Blocks, then the mean over all pixels, then the classifier.

    Arrays are in the order of axes that the libraries want: weights [height, width, channels in, channels out], of a
    depthwise convolution [height, width, 1, channels]. ``parameters`` are what is trained or frozen, ``factors`` and
    ``shifts`` (by norm) what the norms' frozen part makes: factor = gamma / deviation, shift = -mean factor.
    """

    blocks: tuple[Block, ...]
    parameters: dict[str, NDArray[np.float32]]
    factors: dict[str, NDArray[np.float32]]
    shifts: dict[str, NDArray[np.float32]]
    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def logits(
        self, parameters: Mapping[str, Any], x: Any, convolution: Callable[..., Any], clip: Any, mean: Any
    ) -> Any:
        """The forward pass in terms of a library: ``convolution(x, weight, bias, stride, depthwise)``."""
        for block in self.blocks:
            y = x
            for layer in block.layers:
                weight = parameters[layer.weight] * self.factors[layer.norm]
                bias = parameters[f"{layer.norm}.bias"] + self.shifts[layer.norm]
                y = convolution(y, weight, bias, layer.stride, layer.depthwise)
                y = clip(y) if layer.clipped else y
            x = x + y if block.skip else y
        return mean(x) @ parameters["classifier.1.weight"] + parameters["classifier.1.bias"]


def load(task: Task) -> MobileNet:
    """The model and batch that pockc has left in the task's folder. Raises SideError for another model."""
    if task.model != "mobilenet_v2":
        raise SideError(f"{task.model} is not written for this library")
    with np.load(Path(task.folder, "weights.npz")) as file:
        state = dict(file)
    with np.load(Path(task.folder, "batch.npz")) as file:
        images, labels = file["pixel_values"].transpose(0, 2, 3, 1), file["labels"]
    blocks = _blocks(state)
    layers = [layer for block in blocks for layer in block.layers]
    norms = {
        layer.norm: {k: state[f"{layer.norm}.{k}"] for k in ("weight", "running_mean", "running_var")}
        for layer in layers
    }
    factors = {name: n["weight"] / np.sqrt(n["running_var"] + np.float32(_EPSILON)) for name, n in norms.items()}
    shifts = {name: -n["running_mean"] * factors[name] for name, n in norms.items()}
    parameters = {layer.weight: np.ascontiguousarray(state[layer.weight].transpose(2, 3, 1, 0)) for layer in layers}
    parameters |= {f"{layer.norm}.bias": state[f"{layer.norm}.bias"] for layer in layers}
    parameters["classifier.1.weight"] = np.ascontiguousarray(state["classifier.1.weight"].T)
    parameters["classifier.1.bias"] = state["classifier.1.bias"]
    if unknown := set(task.trained) - set(parameters):
        raise SideError(f"{min(unknown)} is not a parameter that is written for this library")
    return MobileNet(tuple(blocks), parameters, factors, shifts, np.ascontiguousarray(images), labels)


def _blocks(state: Mapping[str, NDArray[np.float32]]) -> list[Block]:
    blocks = [Block((Layer("features.0.0.weight", "features.0.1", 2, False, True),))]
    for repeats, first_stride in _STAGES:
        for repeat in range(repeats):
            blocks.append(_inverted_residual(state, len(blocks), first_stride if repeat == 0 else 1))
    last = f"features.{len(blocks)}"
    return [*blocks, Block((Layer(f"{last}.0.weight", f"{last}.1", 1, False, True),))]


def _inverted_residual(state: Mapping[str, NDArray[np.float32]], index: int, stride: int) -> Block:
    name = f"features.{index}.conv"
    first = 1 if f"{name}.1.0.weight" in state else 0  # where the depthwise layer is: an expansion may come before
    expansion = [Layer(f"{name}.0.0.weight", f"{name}.0.1", 1, False, True)] if first else []
    depthwise = Layer(f"{name}.{first}.0.weight", f"{name}.{first}.1", stride, True, True)
    projection = Layer(f"{name}.{first + 1}.weight", f"{name}.{first + 2}", 1, False, False)
    inputs = state[(expansion or [depthwise])[0].weight].shape[1 if expansion else 0]
    skip = stride == 1 and inputs == state[projection.weight].shape[0]
    return Block((*expansion, depthwise, projection), skip)
