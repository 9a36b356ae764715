"""Instructions of single layers on 64-bit ARM in several ways, counted as `benchmarks.instruction_counts` does.

Models of one and of three layers are counted: half of the difference is a layer alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pockc
from benchmarks import emulation, instruction_counts, report

PIXELS = 14
LAYERS: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "1x1, 96 to 96 channels": (96, {"kernel_size": 1}),
    "3x3, 64 to 64 channels": (64, {"kernel_size": 3, "padding": 1}),
}


class Layers(nn.Module):
    """Convolutions and a head."""

    def __init__(self, channels: int, options: Mapping[str, Any], count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential()
        for _ in range(count):
            self.body.extend(nn.Sequential(nn.Conv2d(channels, channels, **options), nn.ReLU6()))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Comparison:
    """Layers in several ways, of which the last shall execute fewer instructions than the first."""

    what: str  # in file names and messages
    ways: Mapping[str, str]  # the core of each
    layers: Collection[str]
    compiled: Callable[[str, str, int], pockc.Program]  # of a layer, a way, and how many layers
    at_most: float  # of the instructions of the first way

    def run(self, description: str | None) -> None:
        """Count, print, write JSON; exit code 1 where the last way saves too little."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--output", type=Path, default=report.OUT / f"instruction_counts_{self.what}.json")
        arguments = parser.parse_args()
        if reason := emulation.missing("aarch64"):
            sys.exit(reason)
        with tempfile.TemporaryDirectory(prefix="pockc-count-") as folder:
            plugin = instruction_counts.build_plugin(Path(folder))
            counts = {
                layer: {way: self._of_layer(layer, way, Path(folder), plugin) for way in self.ways}
                for layer in self.layers
            }
        first, *_, last = self.ways
        ratios = {layer: by_way[last] / by_way[first] for layer, by_way in counts.items()}
        report.print_table(
            f"Thousands of instructions of a layer, {PIXELS} x {PIXELS} pixels",
            ["layer", *self.ways, "ratio"],
            [
                [name, *(f"{number / 1e3:.0f}" for number in counts[name].values()), f"{ratios[name]:.3f}"]
                for name in counts
            ],
        )
        report.write_json(arguments.output, {"instructions": counts, "ratios": ratios})
        worst = max(ratios.values())
        bar = report.Bar(f"instructions of {last} over those of {first}", worst, at_most=self.at_most)
        sys.exit(report.finish(f"{self.what} instruction counts", f"{last} leaves {worst:.3f} at most", [bar]))

    def _of_layer(self, layer: str, way: str, folder: Path, plugin: Path) -> float:
        """Executed instructions of one layer."""
        one, three = (
            instruction_counts.of_program(self.compiled(layer, way, count), folder, plugin, self.ways[way])["total"]
            for count in (1, 3)
        )
        return (three - one) / 2
