"""What the speed benchmark prints and draws, and the means that it is judged by."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot

from benchmarks import report

if TYPE_CHECKING:
    from benchmarks.speed import Result

# Libraries whose versions decide the times.
_LIBRARIES = ("pockc", "torch", "tensorflow-cpu", "jax", "jaxlib", "onnxruntime-training-cpu", "executorch", "numpy")

# pockc's step from the second epoch on, with the prefix cache: what the frozen prefix makes of the batch is there.
CACHED = "pockc-cached"

# pockc's step with activations in bf16, and what it is compared with.
BF16 = "pockc-bf16"

# Sides beside PyTorch; what they cannot run is listed with their error.
PEERS = ("tensorflow", "jax", "onnxruntime", "executorch")


@dataclass(frozen=True, slots=True)
class Summary:
    """A ratio of times over several cases: geometric mean and worst case, with their bounds if there are any."""

    what: str
    count: int
    mean: float
    worst: float
    worst_case: str
    mean_at_least: float | None = None
    worst_at_least: float | None = None


def summaries(results: Sequence[Result]) -> list[Summary]:
    """The measures of the results, those for which nothing was measured left out."""
    full = [result for result in results if result.scheme == "full"]
    by_scheme = {name: [result for result in results if result.scheme == name] for name in ("bias-only", "sparse")}
    found = [_summary("full: best PyTorch / pockc", full, _against_best, 1.25, 1.0)]
    found += [_summary(f"{name}: best PyTorch / pockc", of, _against_best, 1.5, 1.0) for name, of in by_scheme.items()]
    of_full = {result.case.key: result for result in full}

    def against_full(result: Result, ours: str = "pockc") -> float | None:
        whole = of_full.get(result.case.key)
        best = whole.best_pytorch() if whole else None
        if whole is None or best is None or ours not in result.timings:
            return None
        return whole.timings[best].cpu / result.timings[ours].cpu

    for kind, vision, bound in (("vision", True, 3.2), ("text", False, 2.1)):
        chosen = [result for result in by_scheme["sparse"] if result.case.vision == vision]
        found.append(_summary(f"{kind}: full best PyTorch / sparse pockc", chosen, against_full, bound))
        cached = partial(against_full, ours=CACHED)
        found.append(_summary(f"{kind}: full best PyTorch / sparse, cached", chosen, cached, 4.5 if vision else None))
    found.append(_summary("bf16: PyTorch autocast / pockc", results, _against_bf16, 1.3))
    found += [_summary(f"{way} / pockc, same scheme", results, _against(way), None, 1.0) for way in PEERS]
    of_tensorflow = {r.case.key: r.timings["tensorflow"].cpu for r in full if "tensorflow" in r.timings}

    def against_full_tensorflow(result: Result, ours: str = "pockc") -> float | None:
        theirs = of_tensorflow.get(result.case.key)
        return theirs / result.timings[ours].cpu if theirs and ours in result.timings else None

    found.append(_summary("full TensorFlow / sparse pockc", by_scheme["sparse"], against_full_tensorflow, None, 3.0))
    cached = partial(against_full_tensorflow, ours=CACHED)
    found.append(_summary("full TensorFlow / sparse, cached", by_scheme["sparse"], cached, None, 4.5))
    return [summary for summary in found if summary is not None]


def _against_best(result: Result) -> float | None:
    return result.ratio(result.best_pytorch())


def _against_bf16(result: Result) -> float | None:
    theirs = [result.timings[way].cpu for way in ("autocast", "autocast-channels-last") if way in result.timings]
    ours = result.timings.get(BF16)
    return min(theirs) / ours.cpu if theirs and ours is not None else None


def _against(way: str) -> Callable[[Result], float | None]:
    return lambda result: result.ratio(way)


def _summary(
    what: str,
    results: Sequence[Result],
    ratio_of: Callable[[Result], float | None],
    mean_at_least: float | None = None,
    worst_at_least: float | None = None,
) -> Summary | None:
    ratios = {result.title: ratio for result in results if (ratio := ratio_of(result)) is not None}
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    worst = min(ratios, key=lambda title: ratios[title])
    return Summary(what, len(ratios), mean, ratios[worst], worst, mean_at_least, worst_at_least)


def print_cases(results: Sequence[Result], threads: int) -> None:
    """Milliseconds of every side. On several threads the time on the wall follows that of the CPU."""
    ways = list(dict.fromkeys(way for result in results for way in (*result.timings, *result.errors)))
    rows = []
    for result in results:
        cells = [_times(result, way, threads) for way in ways]
        best = result.best_pytorch()
        ratio = result.ratio(best)
        rows.append([result.title, *cells, f"{ratio:.2f}" if ratio else "", _range(result, best)])
    kind = "CPU ms" if threads == 1 else "CPU ms / ms on the wall"
    columns = ["case", *ways, "best PyTorch / pockc", "by turn"]
    report.print_table(f"{kind} of a training step, {threads} threads; SGD", columns, rows)


def _times(result: Result, way: str, threads: int) -> str:
    if way not in result.timings:
        return "no" if way in result.errors else ""
    timing = result.timings[way]
    return f"{timing.cpu:.1f}" if threads == 1 else f"{timing.cpu:.1f} / {timing.wall:.1f}"


def _range(result: Result, way: str | None) -> str:
    """The smallest and largest ratio of neighbouring turns."""
    if way is None or "pockc" not in result.timings:
        return ""
    pairs = zip(result.timings[way].cpu_ms, result.timings["pockc"].cpu_ms, strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    return f"{min(ratios):.2f}-{max(ratios):.2f}"


def print_errors(results: Sequence[Result]) -> None:
    """What has no figure, and why."""
    rows = [[result.title, way, error] for result in results for way, error in result.errors.items()]
    if rows:
        report.print_table("Not measured", ["case", "side", "why"], rows)


def print_summaries(results: Sequence[Result], judged: bool) -> None:
    """Geometric means and worst cases, with their bars if judged."""
    rows = []
    for item in summaries(results):
        bounds = [f"{bound:g}" if bound and judged else "" for bound in (item.mean_at_least, item.worst_at_least)]
        mean, worst = f"{item.mean:.2f}", f"{item.worst:.2f}"
        rows.append([item.what, item.count, mean, bounds[0], worst, bounds[1], item.worst_case])
    columns = ["ratio of CPU times", "cases", "geometric mean", "bar", "worst", "bar", "worst case"]
    report.print_table("One thread", columns, rows)


def versions(python: Path) -> dict[str, str]:
    """The versions of the libraries in an environment; empty where it is not there."""
    if not python.exists():
        return {}
    program = (
        "import json, sys, importlib.metadata as m\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': sys.version.split()[0], **{n: have[n] for n in sys.argv[1:] if n in have}}))"
    )
    done = subprocess.run([str(python), "-c", program, *_LIBRARIES], stdout=subprocess.PIPE, text=True, check=True)
    content: dict[str, str] = json.loads(done.stdout)
    return content


def plot(results: Sequence[Result], path: Path) -> None:
    """Of every case the ratio of each side's time to pockc's, schemes beside each other; 1 is as fast as pockc."""
    schemes = list(dict.fromkeys(result.scheme for result in results))
    ways = [way for way in dict.fromkeys(way for result in results for way in result.timings) if way != "pockc"]
    height = 0.16 * max(1, len(ways)) * max(1, len(results) / max(1, len(schemes))) + 1.6
    figure, plots = pyplot.subplots(
        1, len(schemes), figsize=(4.4 * len(schemes), max(3.0, height)), dpi=150, layout="constrained", squeeze=False,
        sharex=True,
    )  # fmt: skip
    for axes, scheme in zip(plots[0], schemes, strict=True):
        chosen = [result for result in results if result.scheme == scheme]
        places = np.arange(len(chosen))
        thickness = 0.8 / max(1, len(ways))
        for index, way in enumerate(ways):
            values = [result.ratio(way) or math.nan for result in chosen]
            drawn = axes.barh(places + (index + 0.5) * thickness - 0.4, values, height=thickness, label=way)
            axes.bar_label(drawn, [f"{value:.2f}" if value == value else "" for value in values], padding=2, fontsize=6)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(places, [result.case.title for result in chosen], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(title=scheme, xlabel="CPU time / pockc's")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = plots[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=max(1, len(ways)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
