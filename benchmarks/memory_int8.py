"""MCUNet at batch 1 in eight bits, as far as the compiler goes, beside the figure that was published for it.

The paper (PockEngine, MCUNet-5fps at 128 px, batch 1, sparse, operators reordered) gives 173 KB. Not the same work:
there all is int8, the image, what is trained and its gradients included, and of the trained weights the selected
channels alone are in memory. Here the frozen prefix is int8, in weights and activations; the image, of 197 KB, and what
lies behind the prefix are f32; and the workspaces are sized for the threads of the device, 4, where the paper's has one
core: what one thread would need stands beside it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pockc
from benchmarks import memory_peer, report, zoo
from pockc.passes import memory
from pockc.program import states
from pockc.targets.native import workspace_of

PUBLISHED_BYTES = 173_000
MODEL, CASE = "mcunet_5fps", "mcunet-b1-sparse"
ARGUMENTS, SMALL_ARGUMENTS = ({"batch_size": 1, "image_size": size} for size in (128, 64))
CALIBRATION_SAMPLES = 32
OPTIONS: dict[str, dict[str, Any]] = {
    "f32": {},
    "frozen weights int8": {"frozen_dtype": "int8"},
    "the same, frozen prefix int8": {"frozen_dtype": "int8", "prefix_dtype": "int8"},
}


@dataclass(frozen=True, slots=True)
class EightBits:
    """One way to store and compute what is frozen, in bytes; losses are those of the first step."""

    title: str
    arena_bytes: int
    allocated_bytes: int
    trained_bytes: int  # of parameters, in the arena
    transient_bytes: int
    transient_bytes_of_one_thread: int
    image_bytes: int
    mapped_bytes: int
    loss: float

    @property
    def added_bytes(self) -> int:
        """What training adds to the parameters."""
        return self.arena_bytes - self.trained_bytes


def measure(*, small: bool) -> list[EightBits]:
    """Each way, built, allocated by the runtime, and run for one step."""
    model, inputs = zoo.ZOO[MODEL](**(SMALL_ARGUMENTS if small else ARGUMENTS))
    optimizer = pockc.SGD(lr=memory_peer.LEARNING_RATE)
    batch = memory_peer.batch_of(inputs, "cross_entropy")
    image = inputs["pixel_values"]
    random = np.random.default_rng(1)  # images like those of the zoo
    shape = (CALIBRATION_SAMPLES, *image.shape[1:])
    calibration = {"pixel_values": random.standard_normal(shape).astype(np.float32)}
    results = []
    for title, options in OPTIONS.items():
        measured = {**options, "calibration": calibration} if "prefix_dtype" in options else options
        program = pockc.build(model, inputs, optimizer=optimizer, scheme="sparse", **measured)
        with tempfile.TemporaryDirectory(prefix="pockc-memory-") as folder:
            program.save(Path(folder, "model.pock"))
            with pockc.Session(Path(folder, "model.pock")) as session:
                loss = session.train_step(**batch)
                allocated = session.memory
        results.append(
            EightBits(
                title=title,
                arena_bytes=program.arena_bytes,
                allocated_bytes=allocated.arena_bytes,
                trained_bytes=trained_bytes(program),
                transient_bytes=program.arena_bytes - program.state_bytes,
                transient_bytes_of_one_thread=_transient_bytes(program, threads=1),
                image_bytes=image.numel() * image.element_size(),
                mapped_bytes=program.memory.peak_bytes - program.arena_bytes,
                loss=loss,
            )
        )
    return results


def trained_bytes(program: pockc.Program) -> int:
    """Bytes of the trained parameters, which lie in the arena."""
    known = states(program.entries)
    return sum(known[name][0].type.nbytes for name in program.state_offset if known[name][1].kind == "parameter")


def _transient_bytes(program: pockc.Program, threads: int) -> int:
    """What the entries, in their order, need beside the states with workspaces for that many threads."""
    return max(memory.run(graph, workspace_of(threads)).nbytes for graph in program.entries.values())


def loss_difference(result: EightBits, exact: EightBits) -> float:
    """Relative, of the first loss."""
    return abs(result.loss - exact.loss) / abs(exact.loss)


def bars(results: Sequence[EightBits]) -> list[report.Bar]:
    """That the figures are true."""
    return [
        report.Bar(f"MCUNet b1, {result.title}: allocated / planned arena",
                   result.allocated_bytes / result.arena_bytes, 1.0, 1.0)
        for result in results
    ]  # fmt: skip


def as_json(results: Sequence[EightBits]) -> list[dict[str, Any]]:
    """Everything measured, and what is derived from it."""
    return [
        {
            **asdict(result),
            "added_bytes": result.added_bytes,
            "loss_difference": loss_difference(result, results[0]),
            "published_bytes": PUBLISHED_BYTES,
        }
        for result in results
    ]


def print_results(results: Sequence[EightBits]) -> None:
    """A row for each way."""
    rows = [
        [
            result.title,
            *(
                report.megabytes(nbytes)
                for nbytes in (
                    result.arena_bytes, result.trained_bytes, result.added_bytes,
                    result.transient_bytes_of_one_thread, result.image_bytes, result.mapped_bytes,
                )
            ),
            f"{loss_difference(result, results[0]):.1e}",
        ]
        for result in results
    ]  # fmt: skip
    columns = ["", "arena", "trained", "added", "with one thread", "image", "mapped", "loss against f32"]
    published = f"{PUBLISHED_BYTES / 1e6:.3f}"
    report.print_table(
        f"MCUNet-5fps b1 sparse in eight bits, MB; published, all of it int8: {published}", columns, rows
    )
