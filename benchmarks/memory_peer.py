"""What a training step in PyTorch adds to the resident memory of a process, measured in a fresh one.

`python -m benchmarks.memory_peer` reads a request as JSON from its input and prints the answer as JSON. The kernel
keeps the high-water mark of a process's resident memory, so no peak is missed (`VmHWM`; its counters are exact to some
hundred KB), and sets it back to the present value on request. So the figure is: high-water mark over the steps, minus
resident memory right before the first one. Memory that loading the model left behind free in the heap is given back to
the system before, so that it does not hide what the steps take. The settings of the allocator are the default ones.
"""

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import pytorch_peer, report, zoo

STEPS = 3
LEARNING_RATE = 1e-4  # of plain SGD, which keeps no state


@dataclass(frozen=True, slots=True)
class Request:
    """One training run: a function of the zoo with its arguments, what it trains, and its layout in memory."""

    model: str
    arguments: dict[str, Any]
    loss: str
    trained: tuple[str, ...]
    layout: pytorch_peer.Layout = "contiguous"


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes of resident memory, and the loss of each step before its update.

    ``library_bytes`` is how much of the growth is pages of files, that is, code of libraries that the first step
    touched. Training needs them, but they are neither activations nor gradients.
    """

    baseline_bytes: int
    peak_bytes: int
    library_bytes: int
    trained_elements: int
    losses: tuple[float, ...]

    @property
    def added_bytes(self) -> int:
        """What the steps added at most."""
        return self.peak_bytes - self.baseline_bytes


def ask(request: Request) -> Answer:
    """Measures in a fresh process.

    Raises:
        subprocess.CalledProcessError: The process failed; its error is on the standard error stream.
    """
    command = [sys.executable, "-m", "benchmarks.memory_peer"]
    question = json.dumps(asdict(request))
    done = subprocess.run(command, input=question, stdout=subprocess.PIPE, text=True, check=True, cwd=report.ROOT)
    answer = json.loads(done.stdout)
    return Answer(**{**answer, "losses": tuple(answer["losses"])})


def layouts_of(model: nn.Module) -> tuple[pytorch_peer.Layout, ...]:
    """The memory layouts that make a difference: channels-last is one of convolutions."""
    convolves = any(parameter.ndim == 4 for parameter in model.parameters())
    return ("contiguous", "channels_last") if convolves else ("contiguous",)


def batch_of(inputs: dict[str, Tensor], loss: str) -> dict[str, Tensor]:
    """Example inputs with labels: the next token of a language model, else class 0."""
    if loss == "causal_lm":
        return {**inputs, "labels": inputs["input_ids"]}
    return {**inputs, "labels": torch.zeros(len(next(iter(inputs.values()))), dtype=torch.int64)}


def measure(request: Request) -> Answer:
    """Trains three steps in this process, which should not have done anything else before."""
    memory_format = pytorch_peer.MEMORY_FORMATS[request.layout]
    model, inputs = getattr(zoo, request.model)(**request.arguments)
    model = model.to(memory_format=memory_format)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in request.trained)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    batch = {
        name: value.contiguous(memory_format=memory_format) if value.ndim == 4 else value
        for name, value in batch_of(inputs, request.loss).items()
    }
    del inputs
    before = _start_of_measurement()
    losses = [_train_step(model, optimizer, batch, request.loss) for _ in range(STEPS)]
    after = _status()
    return Answer(
        baseline_bytes=before["VmRSS"],
        peak_bytes=after["VmHWM"],
        library_bytes=after["RssFile"] - before["RssFile"],
        trained_elements=sum(parameter.numel() for parameter in trained),
        losses=tuple(losses),
    )


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], loss: str) -> float:
    """Forward, backward, update. Gradients are freed before the next forward pass, as is PyTorch's default."""
    value = pytorch_peer.training_loss(model, batch, loss)
    optimizer.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return float(value.detach())


def _start_of_measurement() -> dict[str, int]:
    """Returns freed memory to the system, and sets the high-water mark to what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status()


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def main() -> int:
    """Answers the request on the standard input."""
    torch.set_num_threads(1)
    print(json.dumps(asdict(measure(Request(**json.load(sys.stdin))))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
