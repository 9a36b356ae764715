"""The time and memory of a program's steps on made-up inputs, through the same runtime as on the device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from pockc.artifact import Entry, read
from pockc.base_session import BaseSession
from pockc.errors import UserError
from pockc.ir import NUMPY_DTYPES, Array
from pockc.session import Memory, open_session
from pockc.timeline import mapped_bytes

WARM_UP = 3  # steps that are not counted: they touch the arena's pages for the first time
ROUNDS = 10  # in each of which every program runs in its turn, so that a busy spell of the machine hits them all


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each step: of the process's CPU time, all its threads together, and by the clock on the wall."""

    cpu: tuple[float, ...]
    wall: tuple[float, ...]

    def as_json(self) -> dict[str, float]:
        """Medians and 95th percentiles."""
        return {
            "cpu_ms_median": float(np.median(self.cpu)),
            "cpu_ms_p95": float(np.quantile(self.cpu, 0.95)),
            "wall_ms_median": float(np.median(self.wall)),
            "wall_ms_p95": float(np.quantile(self.wall, 0.95)),
        }


@dataclass(frozen=True, slots=True)
class Measurement:
    """One entry of a program, run some times. ``planned_bytes`` is the planned peak: arena and mapped weights."""

    entry: str
    batch: int
    threads: int
    times: Times
    planned_bytes: int
    memory: Memory

    @property
    def samples_per_second(self) -> float:
        """By the clock on the wall, at the median step."""
        return 1e3 * self.batch / float(np.median(self.times.wall))

    def as_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        return {
            "entry": self.entry,
            "batch": self.batch,
            "threads": self.threads,
            "steps": len(self.times.cpu),
            **self.times.as_json(),
            "samples_per_second": self.samples_per_second,
            "planned_peak_bytes": self.planned_bytes,
            **self.memory._asdict(),
        }


def measure(path: Path, entry: str = "train_step", steps: int = 20, threads: int = 1) -> Measurement:
    """Run an entry of a .pock file on made-up inputs.

    Raises:
        UserError: the file cannot be read or run, or has no such entry.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; at least one is needed")
    artifact = read(path)
    inputs = made_up(artifact.entry(entry))
    with open_session(path, threads) as session:
        times, _ = time_steps(session, entry, inputs, steps)
        memory = session.memory
    planned = artifact.arena_bytes + mapped_bytes(artifact)
    return Measurement(entry, batch_of(artifact.entry(entry)), threads, times, planned, memory)


def made_up(entry: Entry) -> dict[str, Array]:
    """Inputs like those of `pock-run bench`: reals in [-1, 1); zeros, which are valid ids and labels, for the rest."""
    random = np.random.default_rng(0)

    def made(dtype: str, shape: tuple[int, ...]) -> Array:
        if dtype == "f32":
            return random.uniform(-1, 1, shape).astype(np.float32)
        return np.zeros(shape, NUMPY_DTYPES[dtype])

    return {name: made(tensor.dtype, tensor.shape) for name, tensor in entry.inputs.items()}


def batch_of(entry: Entry) -> int:
    """The leading size that most inputs share; 1 without one."""
    sizes = [tensor.shape[0] for tensor in entry.inputs.values() if tensor.shape]
    return max(sizes, key=sizes.count, default=1)


def time_steps(
    session: BaseSession, entry: str, inputs: Mapping[str, Array], steps: int, warm_up: int = WARM_UP
) -> tuple[Times, dict[str, Array]]:
    """Times of some steps, and the outputs of the last one.

    The learning rate is zero meanwhile, so that every step does the same: trained again and again on one made-up batch,
    weights would become infinite or gradients so small that arithmetic slows down.
    """
    session.set_learning_rate(0)
    cpu, wall = [], []
    outputs: dict[str, Array] = {}
    for step in range(warm_up + steps):
        started = time.process_time(), time.perf_counter()
        outputs = session.run(entry, **inputs)
        if step >= warm_up:
            cpu.append((time.process_time() - started[0]) * 1e3)
            wall.append((time.perf_counter() - started[1]) * 1e3)
    return Times(tuple(cpu), tuple(wall)), outputs


def time_in_turn(
    files: Mapping[str, Path],
    entry: str,
    steps: int,
    threads: int = 1,
    progress: Progress | None = None,
    *,
    rounds: int = ROUNDS,
    warm_up: int = 2,
) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, float | None]]:
    """CPU milliseconds of each program's steps by round, and its last loss; the programs take the same inputs.

    One program is in memory at a time. ``steps`` is rounded up to a multiple of ``rounds``; ``warm_up`` of a round are
    not counted.
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in files}
    losses: dict[str, float | None] = dict.fromkeys(files)
    inputs = made_up(read(next(iter(files.values()))).entry(entry))
    turns = [turn for _ in range(rounds) for turn in files.items()]
    for name, file in (progress or Progress(disable=True)).track(turns, description="Timing"):
        with open_session(file, threads) as session:
            measured, outputs = time_steps(session, entry, inputs, -(-steps // rounds), warm_up)
        times[name].append(measured.cpu)
        losses[name] = float(outputs["loss"]) if "loss" in outputs else None
    return times, losses
