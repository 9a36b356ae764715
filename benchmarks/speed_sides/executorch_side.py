"""ExecuTorch as a side of the speed benchmark: the joint graph of forward and backward pass, as its documentation does.

The model and its loss are exported together; freezing is by `requires_grad`, and the optimizer is that of its runtime.
Batch norms are folded before, as for ONNX Runtime: it cannot export one with a backward pass.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from executorch.exir import to_edge
from executorch.extension import training
from torch import Tensor, nn
from torch.export import export
from torch.export.experimental import _export_forward_backward
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import memory_peer, pytorch_peer, zoo
from benchmarks.speed_sides import protocol
from benchmarks.speed_sides.folding import fold


class WithLoss(nn.Module):
    """A model whose first output is its loss: what ExecuTorch differentiates."""

    def __init__(self, model: nn.Module, names: list[str], loss: str) -> None:
        super().__init__()
        self.model, self.names, self.loss = model, names, loss

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, labels last."""
        return pytorch_peer.training_loss(self.model, dict(zip(self.names, batch, strict=True)), self.loss)


class ExecuTorchStep:
    """A program for ExecuTorch's runtime, in this process."""

    def __init__(self, task: protocol.Task) -> None:
        model, inputs = getattr(zoo, task.model)(**task.arguments)
        renamed = fold(model)
        self.trained = task.trained
        trained = {renamed.get(name, name) for name in task.trained}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        batch = memory_peer.batch_of(inputs, task.loss)
        self.batch = tuple(batch.values())
        with sdpa_kernel(SDPBackend.MATH):  # of fused attention it has no gradient
            joint = _export_forward_backward(export(WithLoss(model, list(batch), task.loss), self.batch, strict=True))
        self.buffer = to_edge(joint).to_executorch().buffer  # the module reads it, and does not keep it alive
        self.module = training._load_for_executorch_for_training_from_buffer(self.buffer)
        self.module.forward_backward("forward", self.batch)  # it knows no parameter before
        self.optimizer_with: Callable[[float], Any] = lambda rate: training.get_sgd_optimizer(
            self.module.named_parameters(), rate, 0.0, 0.0, 0.0, False
        )
        self.optimizer = self.optimizer_with(task.learning_rate)

    def run(self) -> float:
        """One step."""
        loss = self.module.forward_backward("forward", self.batch)[0]
        self.optimizer.step(self.module.named_gradients())
        return float(loss)

    def stop_learning(self) -> None:
        """Sets the learning rate to zero."""
        self.optimizer = self.optimizer_with(0.0)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.exit(protocol.serve(ExecuTorchStep))
