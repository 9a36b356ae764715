"""MCUNet-5fps (Lin et al. 2020): a network for microcontrollers, found by architecture search.

Its published form is quantised to 8 bits with the batch norms folded, so every convolution has a bias.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STEM_CHANNELS = 16

# Expanded channels (None: no expanding convolution), kernel and stride of the depthwise convolution, output channels,
# whether the block adds its input.
BLOCKS: tuple[tuple[int | None, int, int, int, bool], ...] = (
    (None, 3, 1, 8, False),
    (32, 3, 2, 16, False),
    (48, 3, 1, 16, True),
    (48, 7, 2, 24, False),
    (120, 3, 1, 24, True),
    (120, 3, 2, 40, False),
    (160, 7, 1, 40, True),
    (160, 5, 1, 48, False),
    (144, 3, 1, 48, True),
    (192, 3, 1, 48, True),
    (240, 7, 2, 96, False),
    (384, 5, 1, 96, True),
    (384, 5, 1, 96, True),
    (576, 3, 1, 160, False),
)


class McuBlock(nn.Module):
    """Inverted bottleneck whose convolutions have biases."""

    def __init__(
        self, inputs: int, expanded: int | None, kernel: int, stride: int, outputs: int, residual: bool
    ) -> None:
        super().__init__()
        hidden = inputs if expanded is None else expanded
        self.pointwise1 = None if expanded is None else nn.Conv2d(inputs, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden)
        self.pointwise2 = nn.Conv2d(hidden, outputs, 1)
        self.activation = nn.ReLU6()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = x if self.pointwise1 is None else self.activation(self.pointwise1(x))
        projected: Tensor = self.pointwise2(self.activation(self.depthwise(y)))
        return x + projected if self.residual else projected


class McuNet(nn.Module):
    """MCUNet-5fps for images in [-1, 1] or of uint8, 128x128 by design."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.first_conv = nn.Conv2d(3, STEM_CHANNELS, 3, 2, 1)
        self.activation = nn.ReLU6()
        blocks, inputs = [], STEM_CHANNELS
        for expanded, kernel, stride, outputs, residual in BLOCKS:
            blocks.append(McuBlock(inputs, expanded, kernel, stride, outputs, residual))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.normal_(module.bias, 0.0, 0.1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps images [N, 3, H, W] to logits [N, num_classes]."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values.float() / 127.5 - 1
        x = self.activation(self.first_conv(pixel_values))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def dequantized_state(path: Path) -> dict[str, Tensor]:
    """Float parameters of a quantised checkpoint, under the names of McuNet.

    An output channel's weights share one scale; its bias is in units of that scale times the input's scale.

    Args:
        path: `.npz` with `<layer>.weight` int8, `.bias` int32, `.w_scales` float [outputs] and `.x_scale` per layer.
    """
    state: dict[str, Tensor] = {}
    with np.load(path) as arrays:
        for layer in [name.removesuffix(".weight") for name in arrays if name.endswith(".weight")]:
            scales = arrays[f"{layer}.w_scales"].astype(np.float64)
            quantized = arrays[f"{layer}.weight"]
            weight = quantized * scales.reshape(-1, *[1] * (quantized.ndim - 1))
            bias = arrays[f"{layer}.bias"] * scales * float(arrays[f"{layer}.x_scale"])
            state[f"{layer}.weight"] = torch.tensor(weight, dtype=torch.float32)
            state[f"{layer}.bias"] = torch.tensor(bias, dtype=torch.float32)
    # The checkpoint has the classifier as a 1x1 convolution.
    state["classifier.weight"] = state["classifier.weight"].flatten(1)
    return state


def architecture(path: Path) -> tuple[tuple[int | None, int, int, int, bool], ...]:
    """The block table that a quantised checkpoint describes, in the form of BLOCKS."""
    with np.load(path) as arrays:
        meta: dict[str, Any] = json.loads(bytes(arrays["meta"]))
    table = []
    for block in meta["blocks"]:
        layers = {layer["name"].rpartition(".")[2]: layer for layer in block["layers"]}
        expanded = layers["pointwise1"]["out_channel"] if "pointwise1" in layers else None
        depthwise, outputs = layers["depthwise"], layers["pointwise2"]["out_channel"]
        kernel, stride = depthwise["kernel_size"][0], depthwise["stride"]
        table.append((expanded, kernel, stride, outputs, block["residual"] is not None))
    return tuple(table)
