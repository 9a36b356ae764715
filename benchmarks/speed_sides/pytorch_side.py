"""PyTorch as a side of the speed benchmark: eager with either memory layout, `torch.compile`, or bf16 by autocast.

The model is in eval mode, so batch norms use their statistics; what is not trained has `requires_grad` off, so autograd
leaves it out. Compiled are forward pass and loss, and the backward pass with them; the optimizer is PyTorch's own.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import memory_peer, pytorch_peer, zoo
from benchmarks.speed_sides import protocol


class PyTorchStep:
    """A PyTorch model with its optimizer."""

    def __init__(
        self, task: protocol.Task, *, layout: pytorch_peer.Layout, compiled: bool = False, autocast: bool = False
    ) -> None:
        torch.set_num_threads(task.threads)
        memory_format = pytorch_peer.MEMORY_FORMATS[layout]
        model, inputs = getattr(zoo, task.model)(**task.arguments)
        self.model = model.to(memory_format=memory_format)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in task.trained)
        self.trained = task.trained
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=task.learning_rate)
        self.batch = {
            name: value.contiguous(memory_format=memory_format) if value.ndim == 4 else value
            for name, value in memory_peer.batch_of(inputs, task.loss).items()
        }
        self.autocast = autocast
        self.loss: Callable[[dict[str, Tensor]], Tensor]
        self.loss = partial(pytorch_peer.training_loss, self.model, loss=task.loss)
        if compiled:
            torch._dynamo.reset()
            self.loss = torch.compile(self.loss, fullgraph=True, dynamic=False)
            self._backward()  # both passes are compiled now, and no step has been taken

    def run(self) -> float:
        """One step."""
        value = self._backward()
        self.optimizer.step()
        return float(value.detach())

    def _backward(self) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            value = self.loss(self.batch)
        self.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    def stop_learning(self) -> None:
        """Sets the learning rate to zero."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0


# By the argument on the command line.
WAYS: dict[str, protocol.Opener] = {
    "contiguous": partial(PyTorchStep, layout="contiguous"),
    "channels-last": partial(PyTorchStep, layout="channels_last"),
    "compile": partial(PyTorchStep, layout="contiguous", compiled=True),
    "autocast": partial(PyTorchStep, layout="contiguous", autocast=True),
    "autocast-channels-last": partial(PyTorchStep, layout="channels_last", autocast=True),
}

if __name__ == "__main__":
    sys.exit(protocol.serve(WAYS[sys.argv[1]]))
