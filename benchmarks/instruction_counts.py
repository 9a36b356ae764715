"""Instructions that a training step executes on 64-bit ARM: `python -m benchmarks.instruction_counts`.

`pock-run bench` runs under qemu-user with a plugin that counts by class, once with few and once with more steps; the
difference is what a step executes, the same on every machine and in every run but for a few hundred instructions. From
the counts follows a *modelled* time of a step on a Raspberry Pi 4 and 5: a model, and no measurement.

The bar holds the sparse step of a program that computes what PyTorch does. Other steps stand beside it: one from
the second epoch on, whose frozen prefix comes from the cache, and one of another program, whose frozen prefix computes
in eight bits, on cores without dot products and with them.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pockc
from benchmarks import emulation, report, zoo
from pockc.targets import devices
from pockc.targets.native import deliver

SPARSE_AT_MOST = 0.40  # of the instructions of a full step
CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class Step:
    """A training step that is counted."""

    scheme: str
    cached: bool = False  # as from the second epoch of `pock-run train --cache-prefix` on
    int8_prefix: bool = False
    core: str | None = None  # whose counts these are; None: those of every core

    @property
    def entry(self) -> str:
        """Which of the program's functions it is."""
        return "train_step_encoded" if self.cached else "train_step"

    def compiled(self, image_size: int) -> pockc.Program:
        """MobileNetV2 for a Raspberry Pi, batch 1."""
        model, inputs = zoo.mobilenet_v2(batch_size=1, image_size=image_size)
        options: dict[str, Any] = {"cache_prefix": self.cached}
        if self.int8_prefix:
            shape = (CALIBRATION_IMAGES, *inputs["pixel_values"].shape[1:])
            images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            options |= {"prefix_dtype": "int8", "calibration": {"pixel_values": images.numpy()}}
        return pockc.build(model, inputs, scheme=self.scheme, device="rpi4", entries=("train_step",), **options)


STEPS = {
    "full": Step("full"),
    "sparse": Step("sparse"),
    "sparse, prefix cached": Step("sparse", cached=True),
    "sparse, int8 prefix": Step("sparse", int8_prefix=True, core="cortex-a72"),
    "sparse, int8 prefix, dot products": Step("sparse", int8_prefix=True, core="cortex-a76"),
}
FEW_STEPS, MORE_STEPS = 1, 3  # steps; both runs have the same start and the same warm-up


@dataclass(frozen=True)
class CoreModel:
    """What a core starts per cycle at most, from its software optimisation guide.

    The modelled time is that of the busiest resource, with no cache miss and no wait for a result: a lower bound.
    """

    board: str
    name: str
    gigahertz: float
    instructions: int
    vector: int  # 128-bit operations
    memory: int  # loads and stores

    def milliseconds(self, counts: Mapping[str, float]) -> float:
        """Of one step on one core."""
        vector = (counts["vector_fma"] + counts["other_float_and_vector"]) / self.vector
        memory = (counts["load"] + counts["store"]) / self.memory
        cycles = max(counts["total"] / self.instructions, vector, memory)
        return cycles / self.gigahertz / 1e6


CORE_MODELS = (
    CoreModel("Raspberry Pi 4", "cortex-a72", 1.5, 3, 1, 2),
    CoreModel("Raspberry Pi 5", "cortex-a76", 2.4, 4, 2, 2),
)


def main() -> None:
    """Count, print, write JSON; exit code 1 where the sparse step executes too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--output", type=Path, default=report.OUT / "instruction_counts.json")
    arguments = parser.parse_args()
    if reason := emulation.missing("aarch64"):
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="pockc-count-") as folder:
        plugin = build_plugin(Path(folder))
        counts = {
            name: of_program(
                step.compiled(arguments.image_size), Path(folder), plugin, step.core or "cortex-a72", step.entry
            )
            for name, step in STEPS.items()
        }
    times = {
        core.board: {
            name: core.milliseconds(counts[name]) for name, step in STEPS.items() if step.core in (None, core.name)
        }
        for core in CORE_MODELS
    }
    title = f"Millions of instructions of a step: MobileNetV2, {arguments.image_size} px, batch 1, one thread"
    report.print_table(
        title,
        ["class", *STEPS, "sparse / full"],
        [[name, *(f"{counts[c][name] / 1e6:.1f}" for c in STEPS), _ratio(counts, name)] for name in counts["full"]],
    )
    report.print_table(
        "Modelled milliseconds of a step (a lower bound, not a measurement)",
        ["board", *STEPS],
        [[board, *(f"{of[name]:.1f}" if name in of else "-" for name in STEPS)] for board, of in times.items()],
    )
    report.write_json(arguments.output, {"image_size": arguments.image_size, "counts": counts, "modelled_ms": times})
    ratio = counts["sparse"]["total"] / counts["full"]["total"]
    bar = report.Bar("instructions of a sparse step over a full one", ratio, at_most=SPARSE_AT_MOST)
    others = ", ".join(f"{counts[name]['total'] / counts['full']['total']:.3f} {name}" for name in STEPS if "," in name)
    found = f"of a full step, {ratio:.3f} sparse, {others}"
    sys.exit(report.finish("instruction counts", found, [bar]))


def build_plugin(folder: Path, name: str = "count_instructions.c") -> Path:
    """Compile a plugin with the system's C compiler."""
    plugin = folder / "libcount.so"
    source = Path(__file__).with_name(name)
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", str(source), "-o", str(plugin)], check=True)
    return plugin


def of_program(
    program: pockc.Program, folder: Path, plugin: Path, core: str = "cortex-a72", entry: str = "train_step"
) -> dict[str, float]:
    """Executed instructions of one step of a program, by class."""
    program.save(folder / "model.pock")
    deliver(program, devices.find("rpi4"), folder, "zig")
    few, more = (count(folder, plugin, steps, core, entry) for steps in (FEW_STEPS, MORE_STEPS))
    return {name: (more[name] - few[name]) / (MORE_STEPS - FEW_STEPS) for name in few}


def count(folder: Path, plugin: Path, steps: int, core: str, entry: str) -> dict[str, int]:
    """Instructions by class of a whole `pock-run bench`."""
    log = folder / "counts.txt"
    before = [*emulation.emulated("aarch64", core), "-plugin", str(plugin), "-d", "plugin", "-D", str(log)]
    emulation.run(folder / "pock-run", ["bench", folder / "model.pock", "--steps", steps, "--entry", entry], before)
    return {name: int(number) for name, number in re.findall(r"^count (\w+) (\d+)$", log.read_text(), re.MULTILINE)}


def _ratio(counts: Mapping[str, Mapping[str, float]], name: str) -> str:
    return f"{counts['sparse'][name] / counts['full'][name]:.3f}" if counts["full"][name] else "-"


if __name__ == "__main__":
    main()
