"""Fine-tunes a real model on real data with four update schemes and compares them: `python -m benchmarks.demo`.

EfficientNet-Lite0 with its ImageNet weights learns Fashion-MNIST. Each scheme is compiled, and trained by `pock-run`,
a process without Python. Then the tuned weights go back into the PyTorch model, and both have to give the same logits.
Where Debian's package tool is absent, MiniLM-L6 learns TREC instead.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pockc
from benchmarks import fetch, pytorch_peer, report, runner, sweep, tasks

OUT = report.OUT / "demo"
PYTORCH_LIMIT = 1.5  # ms per step of the full scheme, times PyTorch's
ACCURACY_MARGIN = 0.01  # that sparse may stay below full
LOGITS_LIMIT = 1e-3  # largest difference of a logit between pock-run and PyTorch, of logits of about ten
TIMED_STEPS = 15

# What the table shows of `program.memory.by_kind`; the rest of the peak counts as workspace.
PARAMETERS = ("parameters", "frozen_parameters")


@dataclass(frozen=True, slots=True)
class Result:
    """What the demo found out about one scheme."""

    scheme: str
    trainable_parameters: int
    memory: pockc.MemoryReport
    allocated_bytes: int
    used_peak_bytes: int
    milliseconds: dict[str, float]  # CPU time of one step on one thread: pockc, and PyTorch by memory layout
    accuracy_before: float
    accuracy: float
    train_seconds: float
    learning_rate: float

    @property
    def pytorch_ms(self) -> float:
        """The faster of PyTorch's memory layouts."""
        return min(value for name, value in self.milliseconds.items() if name != "pockc")

    def memory_by_kind(self) -> dict[str, int]:
        """The planned peak, split without remainder."""
        kinds = self.memory.by_kind
        split = {
            "parameters": kinds.get("parameters", 0),
            "frozen_parameters": kinds.get("frozen_parameters", 0),
            "optimizer_state": kinds.get("optimizer_state", 0),
            "saved_activations": kinds.get("saved_activations", 0),
        }
        return {**split, "workspace": self.memory.peak_bytes - sum(split.values())}

    def as_json(self) -> dict[str, Any]:
        """The scheme's entry in report.json."""
        return {
            "scheme": self.scheme,
            "trainable_parameters": self.trainable_parameters,
            "planned_peak_bytes": self.memory.peak_bytes,
            "used_peak_bytes": self.used_peak_bytes,
            "memory_by_kind": self.memory_by_kind(),
            "ms_per_step": self.milliseconds["pockc"],
            "pytorch_ms_per_step": self.pytorch_ms,
            "accuracy_before": self.accuracy_before,
            "accuracy": self.accuracy,
        }


def choose_task() -> tasks.Task:
    """Images, or texts where the images cannot be had."""
    try:
        return tasks.vision()
    except fetch.DataUnavailableError as error:
        print(f"Fashion-MNIST is not available: {error}\nRunning the text pair instead: MiniLM-L6 on TREC.", flush=True)
        return tasks.text()


def run_scheme(task: tasks.Task, scheme: str, learning_rate: float, out: Path, threads: int) -> Result:
    """Compiles, times and trains one scheme. Its files are `out/<scheme>.*`."""
    print(f"\n{scheme}: learning rate {learning_rate:g}", flush=True)
    model = out / f"{scheme}.pock"
    program = tasks.compile_scheme(task, scheme, learning_rate, task.steps, model)
    milliseconds = time_steps(task, program, model)
    checkpoint = out / f"{scheme}.ckpt"
    before = runner.evaluate(model, out / "test.npz", threads=threads)
    started = time.perf_counter()
    trained = runner.train(model, out / "train.npz", checkpoint, epochs=task.epochs, seed=tasks.SEED, threads=threads)
    seconds = time.perf_counter() - started
    after = runner.evaluate(model, out / "test.npz", checkpoint=checkpoint, threads=threads)
    return Result(
        scheme,
        program.metadata["trained_elements"],
        program.memory,
        trained["arena_bytes"],
        trained["used_peak_bytes"] + trained["mapped_bytes"],
        milliseconds,
        before["accuracy"],
        after["accuracy"],
        seconds,
        learning_rate,
    )


def time_steps(task: tasks.Task, program: pockc.Program, model: Path) -> dict[str, float]:
    """Median CPU ms per training step on one thread: pockc's and PyTorch's, in turns, on the same batch."""
    batch = {name: array[: task.batch_size] for name, array in task.train.items()}
    labels = torch.from_numpy(batch["labels"])
    optimizer = pockc.AdamW(lr=1e-5)  # repeating one batch must not run away
    steps: dict[str, Any] = {}
    layouts: tuple[pytorch_peer.Layout, ...] = ("contiguous", "channels_last")
    for layout in layouts if any(value.ndim == 4 for value in task.example.values()) else layouts[:1]:
        peer = pytorch_peer.Peer(task.model, program.metadata["trained"], optimizer, layout)
        inputs = peer.tensors({name: array for name, array in batch.items() if name != "labels"})
        steps[f"PyTorch {layout}"] = lambda peer=peer, inputs=inputs: peer.train_step(inputs, labels)
    with pockc.Session(model, threads=1) as session:
        session.set_learning_rate(1e-5)
        steps["pockc"] = lambda: session.train_step(**batch)
        return pytorch_peer.median_cpu_ms(steps, TIMED_STEPS)


def compare_logits(task: tasks.Task, out: Path, scheme: str, threads: int) -> tuple[float, float, float]:
    """Exports the tuned weights, loads them into PyTorch and compares the logits of test examples.

    Returns:
        The largest difference of a logit, the largest logit, and the share of examples whose prediction is the same.
    """
    count = min(len(task.test["labels"]), 32 * task.batch_size)
    inputs = {name: array[:count] for name, array in task.test.items() if name != "labels"}
    data = runner.save_arrays(out / "infer.npz", inputs)
    model, checkpoint = out / f"{scheme}.pock", out / f"{scheme}.ckpt"
    exported = runner.export(model, checkpoint, out / f"{scheme}.safetensors")
    outputs = runner.infer(model, data, out / "logits.npz", checkpoint=checkpoint, threads=threads)
    ours = np.asarray(outputs["logits"], np.float32)
    theirs = pytorch_peer.logits(pytorch_peer.load_tuned(task.model, exported), inputs)
    same = float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1)))
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()), same


def bars_of(results: Mapping[str, Result], logits_error: float, same: float) -> list[report.Bar]:
    """What the demo has to show."""
    accuracy = {name: result.accuracy for name, result in results.items()}
    least = min(accuracy[name] for name in ("bias-only", "sparse", "full"))
    full = results["full"]
    bars = [
        report.Bar("accuracy of full - sparse", accuracy["full"] - accuracy["sparse"], at_most=ACCURACY_MARGIN),
        _above("sparse", accuracy["sparse"], "bias-only", accuracy["bias-only"]),
        _above("full", accuracy["full"], "bias-only", accuracy["bias-only"]),
        _above("every other scheme", least, "head", accuracy["head"]),
        report.Bar("full: ms per step / PyTorch's", full.milliseconds["pockc"] / full.pytorch_ms, PYTORCH_LIMIT),
        report.Bar("largest difference of a logit", logits_error, at_most=LOGITS_LIMIT),
        report.Bar("share of equal predictions", same, at_least=1.0),
    ]
    for name, result in results.items():
        ratio = result.allocated_bytes / result.memory.arena_bytes
        bars.append(report.Bar(f"{name}: allocated / planned arena", ratio, at_most=1.0, at_least=1.0))
    return bars


def _above(one: str, higher: float, other: str, lower: float) -> report.Bar:
    return report.Bar(f"accuracy of {one} - {other}", higher - lower, at_least=1e-9)


def print_results(task: tasks.Task, results: Sequence[Result]) -> None:
    """The table."""
    rows = []
    for result in results:
        split = result.memory_by_kind()
        parameters = "{} + {}".format(*(report.megabytes(split[kind]) for kind in PARAMETERS))
        rows.append(
            [
                result.scheme,
                f"{result.trainable_parameters:,}",
                report.megabytes(result.memory.peak_bytes),
                parameters,
                *(report.megabytes(split[kind]) for kind in ("optimizer_state", "saved_activations", "workspace")),
                report.megabytes(result.used_peak_bytes),
                f"{result.milliseconds['pockc']:.1f}",
                f"{result.pytorch_ms:.1f}",
                f"{result.accuracy_before:.4f}",
                f"{result.accuracy:.4f}",
            ]
        )
    columns = [
        "scheme", "trainable parameters", "planned peak MB", "parameters MB (trained + frozen)", "optimizer state MB",
        "saved activations MB", "workspace, temporaries MB", "used peak MB", "ms per step", "PyTorch ms per step",
        "accuracy before", "accuracy after",
    ]  # fmt: skip
    count = len(task.test["labels"])
    print()
    report.print_table(f"{task.title}: batch {task.batch_size}, {count} test examples", columns, rows)
    print("ms: CPU time of one step on one thread, median; PyTorch eager in its faster memory layout.")


def run(task: tasks.Task, learning_rates: Mapping[str, float], out: Path, threads: int) -> int:
    """The whole demo on one task; returns the exit code."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    runner.save_arrays(out / "train.npz", task.train)
    runner.save_arrays(out / "test.npz", task.test)
    results = {name: run_scheme(task, name, learning_rates[name], out, threads) for name in tasks.SCHEMES}
    print_results(task, list(results.values()))

    error, largest, same = compare_logits(task, out, "sparse", threads)
    print(
        f"Exported weights of sparse in PyTorch: largest difference of a logit {error:.2e} (largest logit "
        f"{largest:.1f}), equal predictions {same:.2%}."
    )
    bars = bars_of(results, error, same)
    seconds = time.perf_counter() - started
    content = {
        "task": task.title,
        "batch_size": task.batch_size,
        "epochs": task.epochs,
        "train_examples": len(task.train["labels"]),
        "test_examples": len(task.test["labels"]),
        "threads": threads,
        "seconds": seconds,
        "schemes": [result.as_json() for result in results.values()],
        "milliseconds": {name: result.milliseconds for name, result in results.items()},
        "train_seconds": {name: result.train_seconds for name, result in results.items()},
        "learning_rates": {name: result.learning_rate for name, result in results.items()},
        "export": {"largest_logit_difference": error, "largest_logit": largest, "equal_predictions": same},
        "bars": [bar.as_json() for bar in bars],
    }
    report.write_json(out / "report.json", content)
    plot(task, list(results.values()), out / "accuracy_vs_memory.png")
    print(f"Report: {out / 'report.json'}; picture: {out / 'accuracy_vs_memory.png'}")
    return report.finish("demo", _summary(results, seconds), bars)


def plot(task: tasks.Task, results: Sequence[Result], path: Path) -> None:
    """Test accuracy against planned peak memory."""
    points = {result.scheme: (result.memory.peak_bytes / 1e6, result.accuracy) for result in results}
    report.plot_points(path, task.title, ("planned peak memory of training, MB", "test accuracy"), points)


def _summary(results: Mapping[str, Result], seconds: float) -> str:
    sparse, full = results["sparse"], results["full"]
    memory = sparse.memory.peak_bytes / full.memory.peak_bytes
    speed = full.milliseconds["pockc"] / full.pytorch_ms
    return (
        f"sparse {sparse.accuracy:.4f} and full {full.accuracy:.4f} accurate, sparse with {memory:.0%} of the memory; "
        f"full takes {speed:.2f} times PyTorch's time per step; {seconds:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--task", choices=sweep.TASKS, help="default: vision, or text where images cannot be had")
    parser.add_argument("--threads", type=int, default=2, help="of training; steps are timed on one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task = sweep.TASKS[options.task]() if options.task else choose_task()
    return run(task, sweep.best_learning_rates(task.key), OUT, options.threads)


if __name__ == "__main__":
    sys.exit(main())
