"""pockc as a side of the speed benchmark: builds the program, then runs it through the C ABI in this process."""

import gc
import sys
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

import pockc
from benchmarks import memory_peer, runner, zoo
from benchmarks.speed_sides import protocol


class PockcStep:
    """A compiled program in a session."""

    def __init__(self, task: protocol.Task) -> None:
        model, inputs = getattr(zoo, task.model)(**task.arguments)
        program = pockc.build(
            model,
            inputs,
            loss=task.loss,
            optimizer=pockc.SGD(lr=task.learning_rate),
            scheme=task.scheme,
            entries=("train_step",),
        )
        self.trained = tuple(program.metadata["trained"])
        batch = memory_peer.batch_of(inputs, task.loss)
        self.batch = {name: value.numpy() for name, value in batch.items()}
        file = Path(task.folder, f"{task.scheme}.pock")
        program.save(file)
        if task.exported:
            _export(model, self.batch, Path(task.folder))
        del program, model, inputs, batch
        gc.collect()
        self.session = pockc.Session(file, task.threads)

    def run(self) -> float:
        """One step."""
        return self.session.train_step(**self.batch)

    def stop_learning(self) -> None:
        """Sets the learning rate to zero."""
        self.session.set_learning_rate(0)


def _export(model: nn.Module, batch: dict[str, NDArray[Any]], folder: Path) -> None:
    """What peers without PyTorch need of it."""
    runner.save_arrays(folder / "weights.npz", {name: value.numpy() for name, value in model.state_dict().items()})
    runner.save_arrays(folder / "batch.npz", batch)


if __name__ == "__main__":
    sys.exit(protocol.serve(PockcStep))
