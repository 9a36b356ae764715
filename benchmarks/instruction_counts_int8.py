"""Instructions of frozen int8 convolutions on 64-bit ARM, without dot products and with them.

`python -m benchmarks.instruction_counts_int8` counts as `benchmarks.instruction_counts` does, on a Cortex-A72 and on a
Cortex-A76, models of one and of three layers: half of the difference is a layer alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pockc
from benchmarks import emulation, instruction_counts, report

PIXELS = 14
CORES = {"NEON": "cortex-a72", "NEON and dot products": "cortex-a76"}
LAYERS = {
    "1x1, 96 to 96 channels": (96, {"kernel_size": 1}),
    "3x3, 64 to 64 channels": (64, {"kernel_size": 3, "padding": 1}),
}
AT_MOST = 0.5  # of the instructions without dot products


class Layers(nn.Module):
    """Frozen convolutions and a head."""

    def __init__(self, channels: int, options: dict[str, int], count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Sequential()
        for _ in range(count):
            self.frozen.extend(nn.Sequential(nn.Conv2d(channels, channels, **options), nn.ReLU6()))  # type: ignore[arg-type]
        self.head = nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.head(self.frozen(x).mean((2, 3)))
        return logits


def main() -> None:
    """Count, print, write JSON; exit code 1 where dot products save too little."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=report.OUT / "instruction_counts_int8.json")
    arguments = parser.parse_args()
    if reason := emulation.missing("aarch64"):
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="pockc-count-") as folder:
        plugin = instruction_counts.build_plugin(Path(folder))
        counts = {
            layer: {isa: of_layer(partial(compiled, layer), core, Path(folder), plugin) for isa, core in CORES.items()}
            for layer in LAYERS
        }
    ratios = {layer: by_isa["NEON and dot products"] / by_isa["NEON"] for layer, by_isa in counts.items()}
    report.print_table(
        f"Thousands of instructions of a frozen int8 layer, {PIXELS} x {PIXELS} pixels",
        ["layer", *CORES, "ratio"],
        [
            [name, *(f"{number / 1e3:.0f}" for number in by.values()), f"{ratios[name]:.3f}"]
            for name, by in counts.items()
        ],
    )
    report.write_json(arguments.output, {"instructions": counts, "ratios": ratios})
    worst = max(ratios.values())
    bar = report.Bar("instructions with dot products over those without", worst, at_most=AT_MOST)
    sys.exit(report.finish("int8 instruction counts", f"dot products leave {worst:.3f} at most", [bar]))


def of_layer(compiled: Callable[[int], pockc.Program], core: str, folder: Path, plugin: Path) -> float:
    """Executed instructions of one layer, by programs with as many as `compiled` is told."""
    one, three = (instruction_counts.of_program(compiled(count), folder, plugin, core)["total"] for count in (1, 3))
    return (three - one) / 2


def compiled(layer: str, count: int) -> pockc.Program:
    """A program that trains the head behind frozen layers in eight bits."""
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
