"""Finds the learning rates that the demo uses: `python -m benchmarks.sweep`.

Every scheme is trained by `pock-run` with each learning rate of its grid, exactly as in the demo, and judged on
examples of the training set that it was not trained on; the test set is never touched. The results go to
`benchmarks/results/sweep.json`, which the demo reads.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, runner, tasks

RESULT = report.RESULTS / "sweep.json"
TASKS: dict[str, Callable[[], tasks.Task]] = {"vision": tasks.vision, "text": tasks.text}

# Fewer parameters want larger steps. Should an end of a grid win, extend the grid there.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "vision": {
        "head": (1e-3, 3e-3, 1e-2, 3e-2),
        "bias-only": (1e-3, 3e-3, 1e-2, 3e-2),
        "sparse": (1e-3, 2e-3, 4e-3, 8e-3),
        "full": (1e-4, 3e-4, 6e-4, 1e-3),
    },
    "text": {
        "head": (3e-3, 1e-2, 3e-2),
        "bias-only": (3e-3, 1e-2, 3e-2),
        "sparse": (2e-4, 5e-4, 1e-3, 2e-3),
        "full": (1e-4, 2e-4, 5e-4),
    },
}


def best_learning_rates(task_key: str, path: Path = RESULT) -> dict[str, float]:
    """The learning rate per scheme that won the committed sweep. LookupError where the task has not been swept."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if task_key not in results:
        raise LookupError(
            f"{path} has no learning rates for {task_key}: `python -m benchmarks.sweep --tasks {task_key}`"
        )
    schemes = results[task_key]["schemes"]
    return {name: float(result["best_learning_rate"]) for name, result in schemes.items()}


def sweep(task: tasks.Task, grids: dict[str, tuple[float, ...]], threads: int) -> dict[str, Any]:
    """Trains and judges every scheme with every learning rate of its grid."""
    with tempfile.TemporaryDirectory(prefix="pockc-sweep-") as folder:
        directory = Path(folder)
        runner.save_arrays(directory / "train.npz", task.train)
        runner.save_arrays(directory / "validation.npz", task.validation)
        schemes = {scheme: _sweep_scheme(task, scheme, grid, directory, threads) for scheme, grid in grids.items()}
    return {
        "task": task.title,
        "train_examples": len(task.train["labels"]),
        "validation_examples": len(task.validation["labels"]),
        "batch_size": task.batch_size,
        "epochs": task.epochs,
        "schemes": schemes,
    }


def _sweep_scheme(
    task: tasks.Task, scheme: str, grid: Sequence[float], directory: Path, threads: int
) -> dict[str, Any]:
    model, checkpoint = directory / f"{scheme}.pock", directory / "tuned.ckpt"
    tasks.compile_scheme(task, scheme, grid[0], task.steps, model)
    trials = []
    for rate in grid:
        runner.train(
            model,
            directory / "train.npz",
            checkpoint,
            quiet=True,
            epochs=task.epochs,
            seed=tasks.SEED,
            threads=threads,
            learning_rate=rate,
        )
        judged = runner.evaluate(model, directory / "validation.npz", checkpoint=checkpoint, threads=threads)
        trials.append({"learning_rate": rate, "accuracy": judged["accuracy"], "loss": judged["loss"]})
        accuracy, loss = judged["accuracy"], judged["loss"]
        print(f"{task.key} {scheme} {rate:g}: accuracy {accuracy:.4f}, loss {loss:.4f}", file=sys.stderr, flush=True)
    return _scheme_result(trials)


def _scheme_result(trials: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The best accuracy wins; of equal ones the lower loss."""
    best = max(trials, key=lambda trial: (trial["accuracy"], -trial["loss"]))
    return {"best_learning_rate": best["learning_rate"], "trials": list(trials)}


def _rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            scheme,
            f"{trial['learning_rate']:g}",
            f"{trial['accuracy']:.4f}",
            f"{trial['loss']:.4f}",
            "best" if trial["learning_rate"] == found["best_learning_rate"] else "",
        ]
        for scheme, found in result["schemes"].items()
        for trial in found["trials"]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sweep of the chosen tasks; the others keep their results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--schemes", nargs="+", choices=tasks.SCHEMES, default=list(tasks.SCHEMES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)

    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    bars = []
    for key in options.tasks:
        task = TASKS[key]()
        found = sweep(task, {name: GRIDS[key][name] for name in options.schemes}, options.threads)
        found["schemes"] = {**results.get(key, {}).get("schemes", {}), **found["schemes"]}
        results[key] = found
        report.write_json(options.output, results)
        report.print_table(task.title, ["scheme", "learning rate", "accuracy", "loss", ""], _rows(found))
        bars += [_interior(key, scheme, result) for scheme, result in found["schemes"].items()]
    return report.finish("sweep", f"learning rates are in {options.output}", bars)


def _interior(key: str, scheme: str, result: dict[str, Any]) -> report.Bar:
    """Winning at the upper end of a grid means that the grid is too short."""
    highest = max(trial["learning_rate"] for trial in result["trials"])
    ratio = result["best_learning_rate"] / highest
    return report.Bar(f"{key} {scheme}: best learning rate / highest of the grid", ratio, at_most=0.99)


if __name__ == "__main__":
    sys.exit(main())
