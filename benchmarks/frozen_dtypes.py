"""What storing frozen weights in fewer bytes buys and costs: mapped bytes, time of a training step, first loss.

    python -m benchmarks.frozen_dtypes mobilenet_v2 bert_base

Times are CPU milliseconds of one step on one thread, medians of rounds in which all dtypes take turns. Models have
their default size, batch 8, random weights, the scheme `sparse` and AdamW.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch

from benchmarks import report, verify_zoo, zoo
from pockc.build import build
from pockc.frontend.torch_parity import named_arrays
from pockc.parity import batches
from pockc.recipe import FrozenDtype
from pockc.session import Session


@dataclass(frozen=True, slots=True)
class Row:
    """One model with one storage of its frozen weights."""

    model: str
    frozen_dtype: str
    mapped_bytes: int
    arena_bytes: int
    milliseconds: float
    first_loss: float
    loss_difference: float  # relative, to f32


def measure(name: str, scheme: str, rounds: int) -> list[Row]:
    """Build a model once per dtype, then step all of them in turns."""
    torch.set_num_threads(1)
    model, inputs = zoo.ZOO[name]()
    loss = verify_zoo.loss_of(name)
    with tempfile.TemporaryDirectory(prefix="pockc-frozen-") as folder:
        files = {}
        for dtype in get_args(FrozenDtype):
            files[dtype] = Path(folder, f"{dtype}.pock")
            optimizer = verify_zoo.OPTIMIZERS["adamw"]
            program = build(model, inputs, loss, optimizer, scheme, frozen_dtype=dtype)
            program.save(files[dtype])
        (batch,) = batches(named_arrays(model, inputs), program.entries["train_step"], loss, 1, verify_zoo.SEED)
        sessions = {dtype: Session(file) for dtype, file in files.items()}
        first = {dtype: session.train_step(**batch) for dtype, session in sessions.items()}
        times: dict[str, list[float]] = {dtype: [] for dtype in files}
        for _ in range(rounds):
            for dtype, session in sessions.items():
                started = time.process_time()
                session.train_step(**batch)
                times[dtype].append((time.process_time() - started) * 1e3)
        rows = [
            Row(
                name,
                dtype,
                session.memory.mapped_bytes,
                session.memory.arena_bytes,
                statistics.median(times[dtype]),
                first[dtype],
                abs(first[dtype] - first["f32"]) / abs(first["f32"]),
            )
            for dtype, session in sessions.items()
        ]
        for session in sessions.values():
            session.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mobilenet_v2", "bert_base"], choices=[*zoo.ZOO])
    parser.add_argument("--scheme", default="sparse")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=report.ROOT / "out" / "frozen_dtypes.json")
    options = parser.parse_args(arguments)
    rows = [row for name in options.models for row in measure(name, options.scheme, options.rounds)]
    columns = ("model", "frozen weights", "mapped MB", "arena MB", "ms per step", "first loss", "relative difference")
    table = [
        (
            row.model, row.frozen_dtype, report.megabytes(row.mapped_bytes), report.megabytes(row.arena_bytes),
            f"{row.milliseconds:.1f}", f"{row.first_loss:.6f}", f"{row.loss_difference:.1e}",
        )
        for row in rows
    ]  # fmt: skip
    report.print_table(f"Scheme {options.scheme}, batch 8, AdamW", columns, table)
    content = {"scheme": options.scheme, "rounds": options.rounds, "rows": [*map(asdict, rows)]}
    report.write_json(options.output, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
