"""pockc as a side of the speed benchmark: builds the program, then runs it through the C ABI in this process."""

import gc
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from torch import nn

import pockc
from benchmarks import memory_peer, runner, zoo
from benchmarks.speed_sides import protocol

ROOM = 4 << 30  # bytes, more than any program needs


class PockcStep:
    """A compiled program in a session, with activations of a dtype.

    If ``cached``, a step is as later epochs have it with the prefix cache: what the frozen prefix makes of the batch is
    then computed before the first step.
    """

    def __init__(self, task: protocol.Task, *, cached: bool = False, dtype: Literal["f32", "bf16"] = "f32") -> None:
        model, inputs = getattr(zoo, task.model)(**task.arguments)
        program = pockc.build(
            model,
            inputs,
            loss=task.loss,
            optimizer=pockc.SGD(lr=task.learning_rate),
            scheme=task.scheme,
            entries=("train_step",),
            memory_budget=ROOM,
            cache_prefix=cached,
            dtype=dtype,
            half_arithmetic=dtype != "f32",
        )
        self.trained = tuple(program.metadata["trained"])
        batch = memory_peer.batch_of(inputs, task.loss)
        self.batch = {name: value.numpy() for name, value in batch.items()}
        file = Path(task.folder, f"{task.scheme}-{dtype}{'-cached' if cached else ''}.pock")
        program.save(file)
        self.entry = "train_step_encoded" if cached else "train_step"
        wanted = {entry: [value.name for value in graph.inputs] for entry, graph in program.entries.items()}
        if task.exported and not cached and dtype == "f32":
            _export(model, self.batch, Path(task.folder))
        del program, model, inputs, batch
        gc.collect()
        self.session = pockc.Session(file, task.threads)
        if cached:
            self.batch |= self.session.encode(**{name: self.batch[name] for name in wanted["encode"]})
        self.batch = {name: self.batch[name] for name in wanted[self.entry]}

    def run(self) -> float:
        """One step."""
        return float(self.session.run(self.entry, **self.batch)["loss"])

    def stop_learning(self) -> None:
        """Sets the learning rate to zero."""
        self.session.set_learning_rate(0)


def _export(model: nn.Module, batch: dict[str, NDArray[Any]], folder: Path) -> None:
    """What peers without PyTorch need of it."""
    runner.save_arrays(folder / "weights.npz", {name: value.numpy() for name, value in model.state_dict().items()})
    runner.save_arrays(folder / "batch.npz", batch)


# By the argument on the command line.
WAYS: dict[str, protocol.Opener] = {
    "whole": PockcStep,
    "cached": partial(PockcStep, cached=True),
    "bf16": partial(PockcStep, dtype="bf16"),
}

if __name__ == "__main__":
    sys.exit(protocol.serve(WAYS[sys.argv[1]]))
