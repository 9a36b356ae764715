"""How the time of a training step grows with the batch and with the sequence: `python -m benchmarks.scaling`.

Sizes are measured one after the other as `benchmarks.speed` measures its cases, PyTorch in turns with pockc. Where the
maths is linear, twice the batch may cost twice the time and no more. Attention is quadratic in the sequence, so that
the bar is on operations per second: those that PyTorch counts in a step of the same model with the same trained
parameters. It knows attention from other kernels than those of a CPU; the same formulas are used for these. They know
no causal mask. Either way, a size has to reach what the size before it did, but for `NOISE`.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch.utils import flop_counter

from benchmarks import memory_peer, pytorch_peer, report, zoo
from benchmarks.speed import Case, Clock, Result, Sides, measure

NOISE = 1.05  # the same step measured twice here differs by that much
WAYS = ("pockc", "contiguous")
SCHEMES = ("full", "sparse")


@dataclass(frozen=True, slots=True)
class Series:
    """A model in growing sizes: ``axis`` is the argument that grows."""

    key: str
    title: str
    model: str
    axis: str
    sizes: tuple[int, ...]
    arguments: dict[str, Any]
    vision: bool
    loss: str = "cross_entropy"

    def case(self, size: int) -> Case:
        """One of its sizes, as the speed benchmark knows cases."""
        rate = 1e-4 if self.vision else 1e-2
        arguments = {**self.arguments, self.axis: size}
        return Case(f"{self.key}-{size}", f"{self.title} {size}", self.model, arguments, self.vision, rate, self.loss)


SERIES = (
    Series("batch", "MobileNetV2 224 px, batch", "mobilenet_v2", "batch_size", (1, 2, 4, 8, 16),
           {"image_size": 224}, vision=True),
    Series("sequence", "Llama 4x256, tokens", "llama_tiny", "sequence_length", (64, 128, 256, 512, 1024),
           {"batch_size": 1}, vision=False, loss="causal_lm"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """A measured size. ``operations`` are floating-point operations of a step, as PyTorch counts them."""

    size: int
    operations: int
    result: Result

    def speed(self, way: str) -> float:
        """Operations per second, in 1e9: GF/s."""
        return self.operations / (1e6 * self.result.timings[way].cpu)


def operations(case: Case, trained: Sequence[str]) -> int:
    """What PyTorch counts in forward and backward pass: products and convolutions, no elementwise operations."""
    model, inputs = getattr(zoo, case.model)(**case.arguments)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    counts = {
        # PyTorch's own count of this gradient knows no groups: a depthwise one would count as a dense one.
        torch.ops.aten.convolution_backward: _convolution_gradients,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_gradients,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=counts) as counter:
        loss = pytorch_peer.training_loss(model, memory_peer.batch_of(inputs, case.loss), case.loss)
        loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def _convolution_gradients(ct: Sequence[int], x: Sequence[int], w: Sequence[int], *rest: Any, **_: Any) -> int:
    """Of shapes [N, O, ...], [N, C, ...] and [O, C / groups, ...]: each gradient takes what the convolution took."""
    wanted = rest[-1]
    return 2 * math.prod(ct) * math.prod(w[1:]) * int(sum(wanted[:2]))


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_gradients(
    ct: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any
) -> int:
    return int(flop_counter.sdpa_backward_flop_count(ct, q, k, v))  # type: ignore[no-untyped-call]


def measure_series(series: Series, scheme: str, sides: Sides, seconds: float) -> list[Point]:
    """All sizes of a series with one scheme, with a line of progress for each."""
    points = []
    for size in series.sizes:
        case = series.case(size)
        with tempfile.TemporaryDirectory(prefix="pockc-scaling-") as folder:
            result = measure(case, scheme, sides, Path(folder), seconds)
        points.append(Point(size, operations(case, result.trained), result))
        figures = ", ".join(f"{way} {timing.cpu:.1f}" for way, timing in result.timings.items())
        print(f"{result.title}: CPU ms {figures}", file=sys.stderr, flush=True)
    return points


def bars_of(series: Series, scheme: str, points: Sequence[Point]) -> list[report.Bar]:
    """The speed at each size, against the size before."""
    return [
        report.Bar(
            f"{series.title} {after.size}, {scheme}: GF/s against {before.size}",
            after.speed("pockc") / before.speed("pockc"),
            at_least=1 / NOISE,
        )
        for before, after in itertools.pairwise(points)
    ]


def print_points(series: Series, scheme: str, points: Sequence[Point]) -> None:
    """Milliseconds of a step, and the operations per second that they are."""
    ways = [way for way in WAYS if all(way in point.result.timings for point in points)]
    columns = [f"{series.title}, {scheme}", "1e9 operations"]
    columns += [f"{way}: {unit}" for way in ways for unit in ("CPU ms", "GF/s")]
    rows = []
    for point in points:
        cells = [cell for way in ways for cell in (f"{point.result.timings[way].cpu:.1f}", f"{point.speed(way):.1f}")]
        rows.append([point.size, f"{point.operations / 1e9:.2f}", *cells])
    report.print_table("One thread, plain SGD", columns, rows)


def plot(measured: Sequence[tuple[Series, str, Sequence[Point]]], path: Path) -> None:
    """Per series the time of a step against its size, both logarithmic; dotted: in proportion to the operations."""
    keys = list(dict.fromkeys(series.key for series, _, _ in measured))
    figure, plots = pyplot.subplots(
        1, len(keys), figsize=(5 * len(keys), 4), dpi=150, layout="constrained", squeeze=False
    )
    for series, scheme, points in measured:
        axes = plots[0][keys.index(series.key)]
        sizes = [point.size for point in points]
        for way, style in zip(WAYS, ("o-", "s--"), strict=True):
            if all(way in point.result.timings for point in points):
                axes.plot(sizes, [p.result.timings[way].cpu for p in points], style, label=f"{way}, {scheme}")
        first = points[0].result.timings["pockc"].cpu / points[0].operations
        axes.plot(sizes, [first * point.operations for point in points], ":", color="grey")
        axes.set(xscale="log", yscale="log", xlabel=series.title, ylabel="CPU ms of a step, one thread")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, measures, prints, writes the report and a picture."""
    keys = [series.key for series in SERIES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", nargs="+", choices=keys, default=keys)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--sizes", nargs="+", type=int, help="the sizes of every series (default: its own)")
    parser.add_argument("--small", action="store_true", help="small models: shows that all works, judges no time")
    parser.add_argument("--seconds", type=float, default=6.0, help="of turns per size and scheme, both sides together")
    parser.add_argument("--output", type=Path, default=report.OUT / "scaling.json")
    options = parser.parse_args(arguments)
    measured = []
    with Sides(WAYS, 1, report.OUT / "speed", Clock()) as sides:
        for series in (_chosen(series, options) for series in SERIES if series.key in options.series):
            for scheme in options.schemes:
                points = measure_series(series, scheme, sides, options.seconds)
                print_points(series, scheme, points)
                measured.append((series, scheme, points))
    bars = (
        [] if options.small else [bar for series, scheme, points in measured for bar in bars_of(series, scheme, points)]
    )
    results = [
        {"series": series.key, "size": point.size, "operations": point.operations, **point.result.as_json()}
        for series, _, points in measured
        for point in points
    ]
    report.write_json(
        options.output, {"machine": report.machine(), "results": results, "bars": [bar.as_json() for bar in bars]}
    )
    plot(measured, options.output.with_suffix(".png"))
    print(f"Report: {options.output}, picture: {options.output.with_suffix('.png')}")
    return report.finish("bench-scaling", f"{len(results)} sizes", bars)


def _chosen(series: Series, options: argparse.Namespace) -> Series:
    small = {key: value for key, value in zoo.SMALL[series.model].items() if key != series.axis}
    return replace(
        series,
        sizes=tuple(options.sizes or series.sizes),
        arguments=small if options.small else series.arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
