"""Every hot kernel against the limits of this machine and against PyTorch: `python -m benchmarks.kernels`.

On one thread, by CPU time: billions of floating-point operations per second (GF/s) of products and convolutions against
what multiply-adds in registers reach here; bytes per second (GB/s) of the rest against what a large sum of two arrays
reaches. A byte is counted once where an operand or result passes; small cases stay in the cache and can be above that.
PyTorch does the same on tensors in the same layout (channels-last for images), in turns with the kernel; its gradients
are the operators that its autograd calls.

The kernels are called through the library of the kernel tests (tests/native/kernels.py), without a program around them.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pockc
from benchmarks import kernel_cases, report, runner
from benchmarks.kernel_cases import KernelCase
from pockc.ir import TensorType, dtype_of
from pockc.ops import complete_attributes, infer, load_families
from pockc.targets.native.workspace import workspace_bytes
from tests.native import kernels

TURN_MS = 40.0
ROUNDS = 7
TRIES = 5


@dataclass(frozen=True, slots=True)
class Peak:
    """What one core does at most."""

    gflops: float
    gigabytes: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds of a kernel and of PyTorch's, and what the kernel reaches of the machine's limit."""

    case: KernelCase
    ms: float
    pytorch_ms: float | None
    share: float  # of the peak

    @property
    def rate(self) -> float:
        """GF/s or GB/s."""
        return self.case.work / self.ms * 1e-6

    @property
    def ratio(self) -> float | None:
        """PyTorch's time over the kernel's."""
        return self.pytorch_ms / self.ms if self.pytorch_ms is not None else None

    def as_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        case = {"group": self.case.group, "title": self.case.title, "op": self.case.op, "unit": self.case.unit}
        rest = {"ms": self.ms, "pytorch_ms": self.pytorch_ms, "rate": self.rate, "share": self.share}
        return {**case, **rest, "ratio": self.ratio}


def measure_peak() -> Peak:
    """What `pock-run bench --profile` finds about a core, the best of a few tries; the program does not matter."""
    with tempfile.TemporaryDirectory(prefix="pockc-peak-") as folder:
        file = Path(folder, "model.pock")
        pockc.build(torch.nn.Linear(1, 2), (torch.ones(1, 1),), scheme="full").save(file)
        tries = [runner.profile(file) for _ in range(TRIES)]
    return Peak(
        gflops=max(found["limit_gflops"] for found in tries),
        gigabytes=max(found["limit_gigabytes_per_second"] for found in tries),
    )


def prepare(case: KernelCase, operands: Sequence[np.ndarray[Any, Any]], provider: str = "simd") -> Callable[[], object]:
    """A function that runs the kernel once on these operands, with nothing else around the call.

    Raises:
        ValueError: The kernel refuses the call.
    """
    types = [TensorType(tuple(x.shape), dtype_of(x)) for x in operands]
    outputs, _ = infer(case.op, tuple(types), dict(case.attrs))
    attributes = complete_attributes(case.op, dict(case.attrs))
    scratch = workspace_bytes(case.op, types, outputs, attributes, 1)
    prepared = kernels.Prepared(case.op, provider, operands, outputs, case.attrs, scratch, case.share)
    if (status := prepared()) != kernels.OK:
        raise ValueError(f"{case.title}: the kernel answers with status {status}")
    return prepared


def take_turns(sides: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """CPU milliseconds of one call, the median over turns."""
    counts = {}
    for name, call in sides.items():
        call()
        started = time.process_time()
        call()
        counts[name] = max(1, int(TURN_MS / max(1e-3, (time.process_time() - started) * 1e3)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, call in sides.items():
            started = time.process_time()
            for _ in range(counts[name]):
                call()
            found[name].append((time.process_time() - started) * 1e3 / counts[name])
    return {name: statistics.median(times) for name, times in found.items()}


def measure(case: KernelCase, peak: Peak, *, alone: bool) -> Measured:
    """One kernel; PyTorch beside it unless ``alone``."""
    operands = case.operands()
    sides: dict[str, Callable[[], object]] = {"pockc": prepare(case, operands)}
    if case.pytorch is not None and not alone:
        sides["pytorch"] = case.pytorch(*operands)
    times = take_turns(sides)
    limit = peak.gflops if case.unit == "GF/s" else peak.gigabytes
    ms = times["pockc"]
    return Measured(case, ms, times.get("pytorch"), case.work / ms * 1e-6 / limit)


def bars_of(results: Sequence[Measured]) -> list[report.Bar]:
    """What groups of kernels are held to."""
    bars = []
    for group, bound in kernel_cases.LEAST_SHARE.items():
        shares = [result.share for result in results if result.case.group == group]
        if shares:
            mean = math.exp(sum(map(math.log, shares)) / len(shares))
            bars.append(report.Bar(f"{group}: share of the peak, geometric mean", mean, at_least=bound))
    ratios = [r.ratio for r in results if r.case.group.startswith("depthwise") and r.ratio is not None]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        bars.append(report.Bar("depthwise: PyTorch / pockc, geometric mean", mean, at_least=1.0))
    return bars


def print_results(results: Sequence[Measured], peak: Peak) -> None:
    """One row per kernel."""
    rows = [
        [f"{r.case.group} {r.case.title}", f"{r.ms:.3f}", f"{r.rate:.1f} {r.case.unit}", f"{r.share:.2f}",
         f"{r.pytorch_ms:.3f}" if r.pytorch_ms is not None else "", f"{r.ratio:.2f}" if r.ratio is not None else ""]
        for r in results
    ]  # fmt: skip
    title = f"One core: {peak.gflops:.0f} GF/s, {peak.gigabytes:.1f} GB/s at most"
    report.print_table(title, ["kernel", "ms", "rate", "of the peak", "PyTorch ms", "PyTorch / pockc"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose group and title contain this")
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    parser.add_argument("--output", type=Path, default=report.OUT / "kernels.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load_families()
    peak = measure_peak()
    chosen = [case for case in kernel_cases.CASES if options.only in f"{case.group} {case.title}"]
    results = [measure(case, peak, alone=options.alone) for case in chosen]
    print_results(results, peak)
    bars = bars_of(results)
    content = {
        "machine": report.machine(),
        "peak": asdict(peak),
        "kernels": [result.as_json() for result in results],
        "bars": [bar.as_json() for bar in bars],
    }
    report.write_json(options.output, content)
    print(f"Report: {options.output}")
    return report.finish("bench-kernels", f"{len(results)} kernels", bars)


if __name__ == "__main__":
    sys.exit(main())
