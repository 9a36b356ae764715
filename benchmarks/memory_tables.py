"""What the memory benchmark prints and draws of its cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot

from benchmarks import report
from pockc.entries import ENTRIES

if TYPE_CHECKING:
    from benchmarks.memory import Result


def print_cases(results: Sequence[Result], judged: bool) -> None:
    """What training adds, the totals, and what is alive at the peak."""
    rows = []
    for result in results:
        plan, best = result.plan, result.best
        layout = next(name for name, answer in result.pytorch.items() if answer is best)
        rows.append(
            [
                result.case.title,
                report.megabytes(plan.model_bytes),
                report.megabytes(plan.added_bytes),
                f"{report.megabytes(best.added_bytes)} {layout}",
                f"{result.ratio:.2f}",
                _bar_text(result) if judged else "",
                report.megabytes(plan.arena_bytes + plan.mapped_bytes),
                report.megabytes(plan.model_bytes + best.added_bytes),
                report.megabytes(best.library_bytes),
            ]
        )
    columns = [
        "case", "model MB", "pockc adds MB", "PyTorch adds MB", "PyTorch / pockc", "bar", "pockc total MB",
        "PyTorch total MB", "of it library code MB",
    ]  # fmt: skip
    report.print_table("What a training step adds to the parameters; SGD", columns, rows)
    report.print_table(
        "The plan of pockc, MB",
        ["case", "arena", "mapped", *(f"{name} part" for name in ENTRIES), "at the peak",
         "pock-run resident", "of tolerance"],
        [_plan_row(result) for result in results],
    )  # fmt: skip


def print_peaks(results: Sequence[Result]) -> None:
    """What is alive at the peak of each case, trained parameters left out."""
    for result in results:
        rows = [
            [group["name"], group["module"], group["kind"], group["type"], group["count"],
             report.megabytes(group["nbytes"])]
            for group in result.plan.at_peak
            if group["nbytes"] >= 0.01 * result.plan.added_bytes
        ]  # fmt: skip
        columns = ["tensor", "module", "kind", "type", "count", "MB"]
        report.print_table(f"Alive at the peak of {result.case.title}, from 1% on", columns, rows)


def _bar_text(result: Result) -> str:
    case = result.case
    if case.arena_at_most is not None:
        met = result.plan.arena_bytes <= case.arena_at_most
        return f"arena <= {report.megabytes(case.arena_at_most)} MB {'met' if met else 'MISSED'}"
    if case.at_least is None:
        return ""
    return f">= {case.at_least:g} {'met' if result.ratio >= case.at_least else 'MISSED'}"


def _plan_row(result: Result) -> list[str]:
    plan = result.plan
    kinds = [(name, size) for name, size in plan.by_kind.items() if name != "frozen_parameters" and size >= 5e3]
    kinds.sort(key=lambda item: -item[1])
    return [
        result.case.title,
        report.megabytes(plan.arena_bytes),
        report.megabytes(plan.mapped_bytes),
        *(report.megabytes(plan.entries[name]) if name in plan.entries else "no entry" for name in ENTRIES),
        ", ".join(f"{name} {report.megabytes(size)}" for name, size in kinds),
        report.megabytes(plan.process_bytes),
        f"{plan.process_excess:.2f}",
    ]


def plot(results: Sequence[Result], path: Path) -> None:
    """Bars on a logarithmic axis, PyTorch above pockc, with their values and the ratio."""
    figure, axes = pyplot.subplots(figsize=(9, 0.62 * len(results) + 1.3), dpi=150, layout="constrained")
    places = np.arange(len(results))
    sides = {
        "PyTorch": [result.best.added_bytes / 1e6 for result in results],
        "pockc": [result.plan.added_bytes / 1e6 for result in results],
    }
    for (name, values), shift, colour in zip(sides.items(), (-0.2, 0.2), ("#b0b0b0", "#1f77b4"), strict=True):
        drawn = axes.barh(places + shift, values, height=0.38, label=name, color=colour)
        axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, [f"{result.case.title}\n{result.ratio:.1f} times less" for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    largest = max(value for values in sides.values() for value in values)
    axes.set_xlim(left=0.5 * min(value for values in sides.values() for value in values), right=2.5 * largest)
    axes.set(title="What a training step adds to the parameters", xlabel="MB, logarithmic")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
