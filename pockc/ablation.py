"""What each pass buys, in bytes and milliseconds: the same program built with one of them switched off at a time."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from pockc.bench import time_in_turn
from pockc.build import build
from pockc.errors import UserError
from pockc.parity import LOSS_TOLERANCE
from pockc.passes import memory
from pockc.pipeline import switches
from pockc.program import Program
from pockc.targets.native import workspace_of

# What the planner does is no pass: it is switched off on the program that all passes made.
PLANNER: Mapping[str, dict[str, bool]] = {"in-place": {"in_place": False}, "placement search": {"search": False}}


@dataclass(frozen=True, slots=True)
class Variant:
    """The program without one pass, or with all of them where ``without`` is empty.

    ``cpu_ms`` is the median of a step. Where the pass changed nothing, the program is that of the baseline
    (``same_program``), with its times. Where there is no program without the pass, ``problem`` says why.
    ``build_seconds`` is unknown of what is switched off in the planner alone.
    """

    without: str
    peak_bytes: int = 0
    arena_bytes: int = 0
    cpu_ms: float = 0.0
    build_seconds: float | None = None
    same_program: bool = False
    loss: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Ablation:
    """The program with all passes, and what it would be without each.

    ``noise`` is what two medians of the same program may differ by, as a part of them: less says nothing.
    """

    entry: str
    steps: int
    threads: int
    noise: float
    baseline: Variant
    variants: tuple[Variant, ...]
    text: str  # of the baseline's entry, to compare with another build

    def differs(self, variant: Variant) -> bool:
        """Whether a program's loss is not the baseline's, beyond rounding: then the two do not compute the same."""
        ours, theirs = variant.loss, self.baseline.loss
        return ours is not None and theirs is not None and not abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs)

    def as_json(self) -> dict[str, Any]:
        """All figures as plain values. Differences are variant minus baseline: what the pass saves."""
        head = {"entry": self.entry, "steps": self.steps, "threads": self.threads, "noise": self.noise}
        rows = [self._row(variant) for variant in (self.baseline, *self.variants)]
        return {**head, "baseline": rows[0], "variants": rows[1:]}

    def _row(self, variant: Variant) -> dict[str, Any]:
        fields = {name: getattr(variant, name) for name in Variant.__slots__}
        if variant is self.baseline or variant.problem:
            return fields
        more_bytes, more_ms = variant.peak_bytes - self.baseline.peak_bytes, variant.cpu_ms - self.baseline.cpu_ms
        return {
            **fields,
            "more_bytes": more_bytes,
            "more_bytes_percent": 100 * more_bytes / self.baseline.peak_bytes,
            "more_ms": more_ms,
            "more_ms_percent": 100 * more_ms / self.baseline.cpu_ms,
        }


def ablate(
    arguments: Mapping[str, Any],
    entry: str = "train_step",
    steps: int = 20,
    threads: int = 1,
    progress: Progress | None = None,
) -> Ablation:
    """Build with everything, then without each of `pipeline.switches` and `PLANNER`, and run all of them in turn.

    Args:
        arguments: Those of `pockc.build`.
        entry: Which entry to time; bytes are those of the program.
        steps: To time of each program, at least; the median counts.
        threads: Of the runtime.
        progress: Shows how far it is.

    Raises:
        UserError: as `pockc.build`; or there is no such entry.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; at least one is needed")
    progress = progress or Progress(disable=True)
    with tempfile.TemporaryDirectory(prefix="pockc-ablation-") as folder:
        program = build(**arguments)
        files = {"": Path(folder, "0.pock")}
        program.text(entry)  # raises where there is no such entry
        program.save(files[""])
        found = {"": _variant("", program, program.metadata["build_seconds"])}
        for name, make in progress.track(_makers(program, arguments).items(), description="Building"):
            variant, other = _attempt(name, make)
            if other is not None and _placed(other) == _placed(program):
                variant = replace(variant, same_program=True)
            elif other is not None:
                files[name] = Path(folder, f"{len(files)}.pock")
                other.save(files[name])
            found[name] = variant
        times, losses = time_in_turn(files, entry, steps, threads, progress)
    for name, variant in found.items():
        timed = "" if variant.same_program else name
        if timed in times:
            cpu_ms = statistics.median(sum(times[timed], ()))
            found[name] = replace(variant, cpu_ms=cpu_ms, loss=losses[timed])
    baseline = found.pop("")
    timed_steps = sum(map(len, times[""]))
    return Ablation(
        entry, timed_steps, threads, _noise(times[""]), baseline, tuple(found.values()), program.text(entry)
    )


def _noise(rounds: Sequence[Sequence[float]]) -> float:
    """Two standard errors of the difference of two medians, as a part of the median.

    Of n independent values with deviation s, the median has a standard error of about 1.25 s / sqrt(n), and the
    difference of two such medians sqrt(2) times that. Steps of one round share what the machine does meanwhile, so n
    counts rounds; s is 1.48 times the median absolute deviation, which outliers do not move.
    """
    medians = [statistics.median(one_round) for one_round in rounds]
    middle = statistics.median(medians)
    deviation = 1.48 * statistics.median(abs(value - middle) for value in medians)
    return 2 * math.sqrt(2) * 1.25 * deviation / math.sqrt(len(medians)) / middle


def _makers(program: Program, arguments: Mapping[str, Any]) -> dict[str, Callable[[], Program]]:
    """How to make the program without each."""
    already = arguments.get("disabled", frozenset())

    def without_pass(name: str) -> Callable[[], Program]:
        return lambda: build(**{**arguments, "disabled": already | {name}})

    def without_planning(options: Mapping[str, bool]) -> Callable[[], Program]:
        return lambda: _planned_again(program, **options)

    passes = {name: without_pass(name) for name in switches() if name not in already}
    return passes | {name: without_planning(options) for name, options in PLANNER.items()}


def _attempt(name: str, make: Callable[[], Program]) -> tuple[Variant, Program | None]:
    try:
        program = make()
    except UserError as error:  # a budget, for instance, that cannot be met without the pass
        return Variant(name, problem=str(error)), None
    seconds = program.metadata["build_seconds"] if name not in PLANNER else None
    return _variant(name, program, seconds), program


def _variant(name: str, program: Program, seconds: float | None) -> Variant:
    return Variant(name, program.memory.peak_bytes, program.memory.arena_bytes, build_seconds=seconds)


def _planned_again(program: Program, **options: bool) -> Program:
    """The same calls in the same order, with other places in memory."""
    workspace = workspace_of(program.max_threads)
    placements = {name: memory.run(graph, workspace, **options) for name, graph in program.entries.items()}
    transient = max(placement.nbytes for placement in placements.values())
    return replace(program, placements=placements, arena_bytes=program.state_bytes + transient)


def _placed(program: Program) -> list[tuple[str, tuple[int, ...]]]:
    """Calls and places: equal for programs that run alike."""
    return [(str(graph), tuple(program.placements[name].offset.values())) for name, graph in program.entries.items()]
