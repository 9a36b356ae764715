"""Instructions of convolutions on 64-bit ARM in float32, stored in fp16, and multiplied in fp16.

`python -m benchmarks.instruction_counts_fp16` counts by `benchmarks.layer_counts`, on a Cortex-A76: frozen layers,
which have a forward pass alone, and trained ones, which have their gradients too.
"""

from collections.abc import Mapping
from typing import Any

import torch

import pockc
from benchmarks.layer_counts import LAYERS, PIXELS, Comparison, Layers
from pockc.passes import place

CORE = "cortex-a76"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "stored in fp16": {"dtype": "fp16"},
    "multiplied in fp16": {"dtype": "fp16", "half_arithmetic": True},
}
SCHEMES = {"frozen": "head", "trained": "full"}
AT_MOST = 0.65  # of the instructions in float32


def main() -> None:
    """Count; exit code 1 where fp16 saves too little."""
    layers = [f"{layer}, {kind}" for layer in LAYERS for kind in SCHEMES]
    Comparison("fp16", dict.fromkeys(WAYS, CORE), layers, compiled, AT_MOST).run(__doc__)


def compiled(layer: str, way: str, count: int) -> pockc.Program:
    """A program of that many layers and a head, without Winograd's algorithm, which there is for float32 alone."""
    name, _, kind = layer.rpartition(", ")
    channels, options = LAYERS[name]
    return pockc.build(
        Layers(channels, options, count).eval(),
        {"x": torch.randn(1, channels, PIXELS, PIXELS)},
        scheme=SCHEMES[kind],
        optimizer=pockc.SGD(lr=0.1),
        device="rpi5",
        entries=("train_step",),
        disabled=frozenset(place.KERNELS),
        **WAYS[way],
    )


if __name__ == "__main__":
    main()
