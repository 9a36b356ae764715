"""What all benchmarks share: bars that are met or missed, tables, JSON, a picture, the last line."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # benchmarks run without a display

from matplotlib import pyplot
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.table import Table

import pockc

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out"
RESULTS = ROOT / "benchmarks" / "results"

# Those that decide how fast a processor multiplies, of x86 and ARM.
_INSTRUCTIONS = ("sse2", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "asimdhp", "sve")

# Where a point's label may stand: offset in points, alignment. The first place without a collision is taken.
_LABEL_PLACES = (
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (8, 12, "left", "bottom"),
    (8, -12, "left", "top"),
    (-8, 12, "right", "bottom"),
    (-8, -12, "right", "top"),
)


@dataclass(frozen=True, slots=True)
class Bar:
    """A measured value and the bound it is held to, either an upper or a lower one. A value of NaN misses it."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value lies within the bounds that are given."""
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below and self.value == self.value

    def __str__(self) -> str:
        bounds = [f"at most {self.at_most:.6g}"] if self.at_most is not None else []
        bounds += [f"at least {self.at_least:.6g}"] if self.at_least is not None else []
        return f"{self.what}: {self.value:.6g}, {' and '.join(bounds)} {'is met' if self.met else 'is MISSED'}"

    def as_json(self) -> dict[str, Any]:
        """The bar as a JSON object."""
        bounds = {"at_most": self.at_most, "at_least": self.at_least}
        return {"what": self.what, "value": self.value, **bounds, "met": self.met}


def megabytes(nbytes: float) -> str:
    """Bytes as decimal megabytes with two digits after the point."""
    return f"{nbytes / 1e6:.2f}"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # A log has no width of its own; cutting a number would make it wrong.
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=200)
    console.print(table)


def machine() -> dict[str, Any]:
    """What the figures may depend on."""
    sizes = Path("/proc/meminfo").read_text(encoding="ascii").split()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return {
        "processor": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "memory_bytes": int(sizes[1]) * 1024,
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "pockc": pockc.__version__,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON, making the directory first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def finish(name: str, summary: str, bars: Sequence[Bar]) -> int:
    """Prints the bars that are missed, then one line, the last one.

    Returns:
        The exit code: 0, or 1 when a bar is missed.
    """
    missed = [bar for bar in bars if not bar.met]
    for bar in missed:
        print(bar)
    verdict = f"{len(missed)} of {len(bars)} bars MISSED" if missed else f"all {len(bars)} bars met"
    print(f"{name}: {summary}; {verdict}")
    return 1 if missed else 0


def plot_points(path: Path, title: str, axes: tuple[str, str], points: Mapping[str, tuple[float, float]]) -> None:
    """A PNG with one labelled point per name; labels keep clear of points and of each other."""
    figure, plot = pyplot.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    for name, (x, y) in points.items():
        plot.scatter(x, y, s=45, label=name, zorder=3)
    plot.set(title=title, xlabel=axes[0], ylabel=axes[1])
    plot.margins(0.18)
    plot.set_xlim(left=0)
    plot.grid(alpha=0.3)
    figure.canvas.draw()
    centers = [plot.transData.transform(point) for point in points.values()]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in centers]
    for index, (name, point) in enumerate(points.items()):
        others = taken[:index] + taken[index + 1 :]
        taken.append(_place_label(plot, name, point, others))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _place_label(plot: Any, name: str, point: tuple[float, float], taken: Sequence[Bbox]) -> Bbox:
    """Writes a label at the first free place beside its point; returns the box that it fills."""
    renderer = plot.figure.canvas.get_renderer()
    inside = plot.get_window_extent(renderer)
    for x, y, horizontal, vertical in _LABEL_PLACES:
        label: Annotation = plot.annotate(
            name, point, xytext=(x, y), textcoords="offset points", ha=horizontal, va=vertical
        )
        box = label.get_window_extent(renderer)
        fits = inside.contains(*box.min) and inside.contains(*box.max)
        if fits and not any(box.overlaps(other) for other in taken):
            return box
        label.remove()
    raise ValueError(f"no free place for the label {name!r}")
