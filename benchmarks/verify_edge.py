"""Three models on five processor cores under emulation, against this machine: `python -m benchmarks.verify_edge`.

Each case is built for its board, cross-compiled, self-tested and trained for ten steps by qemu-user; the loss of every
step is compared with that of this machine's own `pock-run`, and the final checkpoint byte by byte.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pockc
from benchmarks import emulation, report, zoo
from benchmarks.emulation import CORES, Core
from benchmarks.verify_zoo import loss_of
from pockc.program import Program
from pockc.targets import devices
from pockc.targets.native import deliver

LOSS_TOLERANCE = 1e-5
SCHEMES = ("full", "sparse")

# Modest sizes: qemu runs vector code some fifty times slower than a processor does.
MODELS: dict[str, tuple[Callable[..., zoo.ModelAndInputs], dict[str, Any]]] = {
    "mobilenet_v2": (zoo.mobilenet_v2, {"batch_size": 1, "image_size": 96, "num_classes": 10}),
    "minilm_l6": (zoo.minilm_l6, {"batch_size": 1, "sequence_length": 16, "vocab_size": 2000}),
    "llama_tiny": (zoo.llama_tiny, {"batch_size": 1, "sequence_length": 16, "vocab_size": 512}),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What one case gave; ``bytes_of_runner`` is of the specialised, stripped `pock-run`."""

    model: str
    scheme: str
    core: str
    device: str
    selftest: bool
    worst_loss_difference: float
    same_losses: bool
    same_checkpoint: bool
    bytes_of_runner: int
    delivery_seconds: float
    emulated_seconds: float

    def bars(self, core: Core) -> list[report.Bar]:
        """The self-test, the losses, and the same bits where they are promised."""
        name = f"{self.model} {self.scheme} {self.core}"
        bars = [
            report.Bar(f"{name}: self-test", float(self.selftest), at_least=1.0),
            report.Bar(f"{name}: loss difference", self.worst_loss_difference, at_most=LOSS_TOLERANCE),
            report.Bar(f"{name}: bytes of pock-run", self.bytes_of_runner, at_most=1 << 20),
        ]
        if core.same_bits:
            bars.append(report.Bar(f"{name}: same bits", float(self.same_checkpoint), at_least=1.0))
        return bars


def main() -> None:
    """Run the cases that were asked for; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--cores", nargs="+", choices=[core.name for core in CORES], default=None)
    parser.add_argument("--output", type=Path, default=report.OUT / "edge.json")
    arguments = parser.parse_args()
    cores = [core for core in CORES if arguments.cores is None or core.name in arguments.cores]
    for core in cores:
        if reason := emulation.missing(core.architecture):
            sys.exit(f"{core.name} cannot be emulated: {reason}")
    results, bars = [], []
    for model in arguments.models:
        for scheme in arguments.schemes:
            for core, result in _cases(model, scheme, cores):
                results.append(result)
                bars += result.bars(core)
                print(_line(result), flush=True)
    report.print_table(
        "Ten steps under emulation, against this machine",
        ["model", "scheme", "core", "self-test", "loss difference", "checkpoint", "pock-run KiB", "s"],
        [_row(result) for result in results],
    )
    report.write_json(
        arguments.output,
        {
            "sizes": {name: MODELS[name][1] for name in arguments.models},
            "results": [asdict(result) for result in results],
        },
    )
    same = sum(result.same_checkpoint for result in results)
    summary = f"{len(results)} emulated runs, {same} of them with the same bits as this machine"
    sys.exit(report.finish("edge", summary, bars))


def _cases(model: str, scheme: str, cores: list[Core]) -> Iterator[tuple[Core, Result]]:
    """One program, run here and then on each core."""
    make, sizes = MODELS[model]
    network, inputs = make(**sizes)
    program = pockc.build(
        network, inputs, loss=loss_of(model), optimizer=pockc.AdamW(lr=1e-3), scheme=scheme, device="rpi4"
    )
    with tempfile.TemporaryDirectory(prefix="pockc-edge-") as name:
        folder = Path(name)
        file, data = folder / "model.pock", folder / "batch.npz"
        program.save(file, golden=inputs)
        emulation.write_batch(program, inputs, data)
        expected = emulation.train(emulation.native_runner(), file, data, folder)
        for core in cores:
            yield core, _run(model, scheme, program, core, folder, expected)


def _run(model: str, scheme: str, program: Program, core: Core, folder: Path, expected: emulation.Run) -> Result:
    before = emulation.emulated(core.architecture, core.name)
    started = time.perf_counter()
    deliver(program, devices.find(core.device), folder, "zig")
    delivered = time.perf_counter()
    runner, file = folder / "pock-run", folder / "model.pock"
    selftest = emulation.run(runner, ["selftest", file], before)
    got = emulation.train(runner, file, folder / "batch.npz", folder, before)
    return Result(
        model,
        scheme,
        core.name,
        core.device,
        "selftest passed" in selftest,
        emulation.worst_difference(got.losses, expected.losses),
        list(got.losses) == list(expected.losses),
        got.checkpoint == expected.checkpoint,
        runner.stat().st_size,
        round(delivered - started, 1),
        round(time.perf_counter() - delivered, 1),
    )


def _row(result: Result) -> list[str]:
    return [
        result.model,
        result.scheme,
        result.core,
        "passed" if result.selftest else "FAILED",
        "none" if result.same_losses else f"{result.worst_loss_difference:.1e}",
        "same bits" if result.same_checkpoint else "differs",
        f"{result.bytes_of_runner / 1024:.0f}",
        f"{result.emulated_seconds:.1f}",
    ]


def _line(result: Result) -> str:
    return "  ".join(_row(result))


if __name__ == "__main__":
    main()
