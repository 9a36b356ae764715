"""Instructions of convolutions on 64-bit ARM in float32, stored in fp16, and multiplied in fp16.

`python -m benchmarks.instruction_counts_fp16` counts as `benchmarks.instruction_counts_int8` does, its layers, on a
Cortex-A76: frozen ones, which have a forward pass alone, and trained ones with their gradients.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pockc
from benchmarks import emulation, instruction_counts, report
from benchmarks.instruction_counts_int8 import LAYERS, PIXELS, Layers, of_layer
from pockc.passes import place

CORE = "cortex-a76"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "stored in fp16": {"dtype": "fp16"},
    "multiplied in fp16": {"dtype": "fp16", "half_arithmetic": True},
}
PASSES = {"forward": "head", "forward and backward": "full"}  # by the scheme that makes a layer do that
AT_MOST = 0.75  # of the instructions in float32


def main() -> None:
    """Count, print, write JSON; exit code 1 where fp16 saves too little."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=report.OUT / "instruction_counts_fp16.json")
    arguments = parser.parse_args()
    if reason := emulation.missing("aarch64"):
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="pockc-count-") as folder:
        plugin = instruction_counts.build_plugin(Path(folder))
        counts = {
            f"{layer}, {passes}": {
                way: of_layer(partial(compiled, layer, scheme, way), CORE, Path(folder), plugin) for way in WAYS
            }
            for layer in LAYERS
            for passes, scheme in PASSES.items()
        }
    ratios = {layer: by_way["multiplied in fp16"] / by_way["float32"] for layer, by_way in counts.items()}
    report.print_table(
        f"Thousands of instructions of a layer, {PIXELS} x {PIXELS} pixels",
        ["layer", *WAYS, "ratio"],
        [
            [name, *(f"{number / 1e3:.0f}" for number in by.values()), f"{ratios[name]:.3f}"]
            for name, by in counts.items()
        ],
    )
    report.write_json(arguments.output, {"instructions": counts, "ratios": ratios})
    worst = max(ratios.values())
    bar = report.Bar("instructions with products in fp16 over those in float32", worst, at_most=AT_MOST)
    sys.exit(report.finish("fp16 instruction counts", f"products in fp16 leave {worst:.3f} at most", [bar]))


def compiled(layer: str, scheme: str, way: str, count: int) -> pockc.Program:
    """A program of that many layers and a head, without Winograd's algorithm, which 16 bits have not."""
    channels, options = LAYERS[layer]
    return pockc.build(
        Layers(channels, options, count).eval(),
        {"x": torch.randn(1, channels, PIXELS, PIXELS)},
        scheme=scheme,
        optimizer=pockc.SGD(lr=0.1),
        device="rpi5",
        entries=("train_step",),
        disabled=frozenset(place.KERNELS),
        **WAYS[way],
    )


if __name__ == "__main__":
    main()
