"""Instructions of frozen int8 convolutions on 64-bit ARM, without dot products and with them.

`python -m benchmarks.instruction_counts_int8` counts by `benchmarks.layer_counts`, on a Cortex-A72 and on a Cortex-A76.
"""

import numpy as np
import torch

import pockc
from benchmarks.layer_counts import LAYERS, PIXELS, Comparison, Layers

CORES = {"NEON": "cortex-a72", "NEON and dot products": "cortex-a76"}
AT_MOST = 0.5  # of the instructions without dot products


def main() -> None:
    """Count; exit code 1 where dot products save too little."""
    Comparison("int8", CORES, LAYERS, compiled, AT_MOST).run(__doc__)


def compiled(layer: str, way: str, count: int) -> pockc.Program:
    """A program that trains the head behind frozen layers in eight bits; the same one for both cores."""
    channels, options = LAYERS[layer]
    images = np.random.default_rng(0).standard_normal((8, channels, PIXELS, PIXELS)).astype(np.float32)
    return pockc.build(
        Layers(channels, options, count).eval(),
        {"x": torch.from_numpy(images[:1])},
        scheme="head",
        device="rpi5",
        entries=("train_step",),
        prefix_dtype="int8",
        calibration={"x": images},
    )


if __name__ == "__main__":
    main()
