"""`pockc tune`: times the candidate kernels of a model's calls on this machine, for `passes.place` to choose by."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from pockc.build import build
from pockc.errors import UserError
from pockc.ir import Array, Graph, Node, State
from pockc.passes import memory, place
from pockc.program import Program
from pockc.session import Session
from pockc.targets.devices import Device
from pockc.targets.native import workspace_of
from pockc.tuning import Table

LEAST_ROUNDS = 3  # in each of which every candidate runs once; the median counts
MOST_ROUNDS = 25
ENTRY = "train_step"  # of the programs of one call: every program has it
COLD_BYTES = 32 << 20  # written before each run: in a step, other tensors have taken the caches meanwhile
MASKS = "mask-gradients"  # the pass


def tune(
    arguments: Mapping[str, Any], device: Device, seconds: float = 60.0, progress: Progress | None = None
) -> Table:
    """Measure every distinct call of a model that has several candidates, on one thread by CPU time.

    Args:
        arguments: Those of `pockc.build`, without the device.
        device: What the table is of; this machine has to be one.
        seconds: About how long to measure in all; each call gets its share, and `LEAST_ROUNDS` at least.
        progress: Shows how far it is.

    Raises:
        UserError: as `pockc.build`; or the device has another processor than this machine.
    """
    if device.architecture != platform.machine():
        raise UserError(
            f"{device.name} has a processor of the kind {device.architecture}, this machine {platform.machine()}",
            instead="Run `pockc tune` on the board, or --prepare programs for it. Without a table, a model decides.",
        )
    calls = distinct_calls(arguments, device)
    share = seconds / max(1, len(calls))
    tracked = (progress or Progress(disable=True)).track(calls.items(), description="Measuring")
    return Table(device.name, machine(), {key: measure(node, share) for key, node in tracked})


def distinct_calls(arguments: Mapping[str, Any], device: Device) -> dict[str, Node]:
    """By key, one node of each kind that has several candidates, over all entries of the program."""
    program = build(**untuned(arguments, device, without=place.KERNELS))
    nodes = (node for graph in program.entries.values() for node in graph.nodes if len(place.candidates(node)) > 1)
    return {place.key(node): node for node in nodes}


def untuned(arguments: Mapping[str, Any], device: Device, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments of a build for the device that reads no table and stores weights as floats, without some kernels.

    Input gradients have no masks there: with one, a call is no longer among those that have several candidates.
    """
    disabled = frozenset({*arguments.get("disabled", ()), *without, MASKS})
    return {**arguments, "device": replace(device, tuning=""), "frozen_dtype": "f32", "disabled": disabled}


def machine() -> dict[str, Any]:
    """What the times are of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "model\t"))]
    return {"processor": names[-1] if names else platform.processor(), "architecture": platform.machine()}


def measure(node: Node, seconds: float) -> dict[str, float]:
    """CPU milliseconds of each candidate of a node, the median over rounds in which they take turns."""
    random = np.random.default_rng(0)
    operands = [random.uniform(-1, 1, value.type.shape).astype(np.float32) for value in node.inputs]
    times: dict[str, list[float]] = {name: [] for name in place.candidates(node)}
    cold = np.zeros(COLD_BYTES, np.uint8)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pockc-tune-")))
        sessions = {}
        for name, candidate in place.candidates(node).items():
            _program_of(candidate, operands).save(folder / f"{name}.pock")
            sessions[name] = stack.enter_context(Session(folder / f"{name}.pock"))
            sessions[name].run(ENTRY, x=operands[0])  # touches its pages
        ends = time.perf_counter() + seconds
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > ends:
                break
            for name, session in sessions.items():
                cold += 1
                started = time.process_time()
                session.run(ENTRY, x=operands[0])
                times[name].append((time.process_time() - started) * 1e3)
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def _program_of(node: Node, operands: list[Array]) -> Program:
    """A program that runs one node: its first operand is the input, the others are frozen."""
    x, *rest = node.inputs
    image = replace(x, name="x")
    states = {
        replace(value, name=f"w{i}"): State("buffer", data)
        for i, (value, data) in enumerate(zip(rest, operands[1:], strict=True))
    }
    alone = replace(node, inputs=(image, *states))
    graph = Graph((image,), states, (alone,), {"y": node.outputs[0]})
    placement = memory.run(graph, workspace_of(1))
    return Program(
        entries={ENTRY: graph},
        placements={ENTRY: placement},
        state_offset={},
        state_bytes=0,
        arena_bytes=placement.nbytes,
        max_threads=1,
        accumulation=1,
        metadata={},
    )
