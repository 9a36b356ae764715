"""The PyTorch side of the benchmarks: the same training step in eager mode, timed and evaluated."""

import copy
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import pockc

Arrays = Mapping[str, NDArray[np.generic]]
Layout = Literal["contiguous", "channels_last"]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Peer:
    """A PyTorch model that is fine-tuned with the same maths as a compiled program.

    The model stays in eval mode: dropout off, batch norm with its stored statistics. What the program does not train
    is frozen, so that autograd leaves it out too.

    Args:
        model: Copied; the caller's model is not changed.
        trained: Names of the trained parameters, `program.metadata["trained"]`.
        optimizer: Of these SGD, Adam and AdamW, at their base learning rate, exist in PyTorch.
        layout: Memory format of the weights and of images.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Collection[str],
        optimizer: pockc.Optimizer,
        layout: Layout = "contiguous",
    ) -> None:
        self.layout = layout
        # PyTorch's type stubs do not have this overload.
        self.model = copy.deepcopy(model).eval().to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.optimizer = make_optimizer([p for p in self.model.parameters() if p.requires_grad], optimizer)

    def tensors(self, arrays: Arrays) -> dict[str, Tensor]:
        """Inputs as tensors; images in the peer's memory format."""
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return {
            name: value.contiguous(memory_format=MEMORY_FORMATS[self.layout]) if value.ndim == 4 else value
            for name, value in tensors.items()
        }

    def train_step(self, inputs: Mapping[str, Tensor], labels: Tensor) -> float:
        """Forward, backward, update; the cross entropy before the update."""
        loss = F.cross_entropy(_logits(self.model, inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())


def training_loss(model: nn.Module, batch: Mapping[str, Tensor], loss: str) -> Tensor:
    """The mean cross entropy of a batch with labels, for the loss names `cross_entropy` and `causal_lm`.

    Of a language model the labels are shifted, as its own library does it: shifted logits would be a copy.
    """
    logits = _logits(model, {name: value for name, value in batch.items() if name != "labels"})
    labels = batch["labels"]
    if loss == "causal_lm":
        return F.cross_entropy(logits.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten())
    return F.cross_entropy(logits, labels)


def make_optimizer(parameters: list[nn.Parameter], optimizer: pockc.Optimizer) -> torch.optim.Optimizer:
    """The PyTorch optimizer of the same name and settings. PyTorch chooses its implementation itself."""
    match optimizer:
        case pockc.AdamW(lr=lr, betas=betas, eps=eps, weight_decay=decay):
            return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        case pockc.Adam(lr=lr, betas=betas, eps=eps, weight_decay=decay):
            return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        case pockc.SGD(lr=lr, momentum=momentum, dampening=damp, nesterov=nesterov, weight_decay=decay):
            return torch.optim.SGD(parameters, lr, momentum, damp, decay, nesterov)
    raise ValueError(f"PyTorch has no {type(optimizer).__name__}")


def median_cpu_ms(steps: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median CPU milliseconds of each step function.

    The functions take turns, so that all see the same state of a shared machine, and CPU time is the process's, so
    that other processes count little. Set the number of threads before.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def logits(model: nn.Module, arrays: Arrays, batch_size: int = 64) -> NDArray[np.float32]:
    """Logits of all examples, float32 [N, classes]."""
    count = len(next(iter(arrays.values())))
    parts = []
    for first in range(0, count, batch_size):
        batch = {name: torch.from_numpy(np.array(array[first : first + batch_size])) for name, array in arrays.items()}
        parts.append(_logits(model, batch).numpy())
    return np.concatenate(parts)


def load_tuned(model: nn.Module, path: Path) -> nn.Module:
    """A copy of the model with the parameters of an exported safetensors file, in eval mode.

    Raises:
        ValueError: The file has a tensor that the model does not have.
    """
    tuned = copy.deepcopy(model).eval()
    unexpected = tuned.load_state_dict(load_file(path), strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} has tensors that are not the model's: {', '.join(unexpected)}")
    return tuned


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(**inputs)
    result = getattr(output, "logits", output)
    assert isinstance(result, Tensor)
    return result
