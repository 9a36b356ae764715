"""The same training steps in PyTorch eager: the reference that `pockc verify` compares a program with."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pockc.errors import UserError
from pockc.ir import Array
from pockc.optim import SGD, Adam, AdamW, Lion, Optimizer, Schedule
from pockc.scheme import Channels, channel_axis, select_channels


@dataclass(frozen=True, slots=True)
class ModelNames:
    """What schemes resolve against: shapes of parameters, other names of tied ones, class names of modules."""

    parameters: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    modules: dict[str, str]


def model_names(model: nn.Module) -> ModelNames:
    """The names of a model, in order of definition."""
    parameters = dict(model.named_parameters())
    first = {id(parameter): name for name, parameter in parameters.items()}
    everything = model.named_parameters(remove_duplicate=False)
    aliases = {name: first[id(p)] for name, p in everything if name not in parameters}
    modules = {path: type(module).__name__ for path, module in model.named_modules()}
    return ModelNames({name: tuple(p.shape) for name, p in parameters.items()}, aliases, modules)


def named_arrays(model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, Array]:
    """Example inputs as numpy arrays, by the names of the parameters of ``forward``."""
    if isinstance(example_inputs, tuple):
        names = list(inspect.signature(model.forward).parameters)
        example_inputs = dict(zip(names, example_inputs, strict=False))
    return {name: torch.as_tensor(value).detach().numpy().copy() for name, value in example_inputs.items()}


def model_tensors(model: nn.Module) -> dict[str, Array]:
    """Parameters and buffers of a model by name, tied ones under their first name alone."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().numpy().copy() for name, tensor in named}


class _FloatIsDouble(TorchFunctionMode):
    """Lets a model that converts its inputs to float32 by itself, such as images of bytes, run in float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {name: torch.float64 if v is torch.float32 else v for name, v in (kwargs or {}).items()}
        return function(*args, **named)


@dataclass
class Reference:
    """A copy of a model, trained step by step with PyTorch's own optimizer.

    Args:
        model: Left as it is.
        trained: Names of the updated parameters with their channel selections.
        loss, loss_options, optimizer, batchnorm, accumulation: As for ``pockc.build``.
        double: Compute in float64, to see how far float32 itself is from exact arithmetic.
        weights: Tensors by name that replace the model's.

    Raises:
        UserError: the model would apply dropout, whose random numbers differ between the two.
    """

    model: nn.Module
    trained: Mapping[str, Channels | None]
    loss: str | Callable[..., Any] | None
    optimizer: Optimizer
    loss_options: Mapping[str, float] = field(default_factory=dict)
    batchnorm: str = "fold"
    accumulation: int = 1
    double: bool = False
    weights: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_dropout(self.model)
        self.model = copy.deepcopy(self.model)
        own: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, array in self.weights.items():
                own[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        if self.double:
            self.model.double()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(self.batchnorm == "train")
        self.masks: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained)
            if channels := self.trained.get(name):
                self.masks[name] = _channel_mask(parameter, channels)
        self.micro_steps = 0
        self.torch_optimizer = _torch_optimizer(self.optimizer, self._trained())

    def train_step(self, inputs: Mapping[str, Array]) -> float:
        """One (micro-)step; returns the loss before the update."""
        with _FloatIsDouble() if self.double else nullcontext():
            loss = self._loss(_doubled(inputs) if self.double else _tensors(inputs))
        (loss / self.accumulation).backward()  # type: ignore[no-untyped-call]
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self._update()
        return float(loss.detach())

    def arrays(self) -> dict[str, Array]:
        """The trained parameters."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self._trained()}

    def zero_gradients(self, inputs: Mapping[str, Array]) -> frozenset[str]:
        """Trained parameters whose gradient is zero in exact arithmetic, judged by rounding noise in float64.

        The bias of an attention's keys is one: softmax does not see it.
        """
        double = copy.deepcopy(self.model).double()
        with _FloatIsDouble():
            loss = self._loss(_doubled(inputs), double)
        loss.backward()  # type: ignore[no-untyped-call]
        norms = {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in double.named_parameters()}
        total = math.sqrt(sum(norm * norm for norm in norms.values()))
        return frozenset(name for name in self.trained if norms[name] <= 1e-12 * total)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if name in self.trained]

    def _loss(self, inputs: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        model = model or self.model
        if self.loss is None:
            return _named_output(model(**inputs), "loss")
        labels = inputs["labels"]
        output = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if isinstance(self.loss, str):
            return named_loss(self.loss, _named_output(output, "logits"), labels, self.loss_options)
        result: Tensor = self.loss(output, labels)
        return result

    def _update(self) -> None:
        before = {name: p.detach().clone() for name, p in self._trained() if name in self.masks}
        for name, parameter in self._trained():
            if name in self.masks and parameter.grad is not None:
                parameter.grad *= self.masks[name]
        if self.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for _, p in self._trained()], self.optimizer.clip_norm)
        step = self.micro_steps // self.accumulation - 1
        for group in self.torch_optimizer.param_groups:
            group["lr"] = learning_rate(self.optimizer.schedule, self.optimizer.lr, step) * group["factor"]
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in self._trained():
                if name in self.masks:  # weight decay reached the channels that are not updated
                    parameter.copy_(torch.where(self.masks[name].bool(), parameter, before[name]))


def named_loss(name: str, logits: Tensor, labels: Tensor, options: Mapping[str, float]) -> Tensor:
    """The named losses of pockc/losses.py in PyTorch."""
    if name == "causal_lm":
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    if name in ("cross_entropy", "causal_lm"):
        return F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1),
            ignore_index=int(options.get("ignore_index", -100)),
            label_smoothing=float(options.get("label_smoothing", 0.0)),
        )
    if name == "huber":
        return F.huber_loss(logits, labels, delta=float(options.get("delta", 1.0)))
    simple: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "bce_with_logits": F.binary_cross_entropy_with_logits,
        "mse": F.mse_loss,
        "l1": F.l1_loss,
    }
    return simple[name](logits, labels)


def learning_rate(schedule: Schedule, base: float, step: int) -> float:
    """The rate of an optimizer step, counted from 0."""
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    done = step - schedule.warmup_steps
    fraction = min(1.0, done / max(1, schedule.total_steps - schedule.warmup_steps))
    floor = schedule.minimum * base
    if schedule.kind == "linear":
        return floor + (base - floor) * (1 - fraction)
    if schedule.kind == "cosine":
        return floor + (base - floor) * (1 + math.cos(math.pi * fraction)) / 2
    if schedule.kind == "step":
        return float(base * schedule.factor ** (done // schedule.step_size))
    return base


class _Lion(torch.optim.Optimizer):
    """Chen et al., 2023, algorithm 2; PyTorch has none."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter.grad is None:
            return
        beta1, beta2 = group["betas"]
        momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        direction = (beta1 * momentum + (1 - beta1) * parameter.grad).sign()
        parameter -= group["lr"] * (direction + group["weight_decay"] * parameter)
        momentum.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)


def _torch_optimizer(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for name, parameter in named:
        group = optimizer.group(name)
        decay = {"weight_decay": group.weight_decay, "factor": group.learning_rate_factor}
        groups.append({"params": [parameter], "lr": optimizer.lr, **decay})
    if isinstance(optimizer, SGD):
        return torch.optim.SGD(
            groups, optimizer.lr, optimizer.momentum, optimizer.dampening, nesterov=optimizer.nesterov
        )
    if isinstance(optimizer, Adam):
        kind = torch.optim.AdamW if isinstance(optimizer, AdamW) else torch.optim.Adam
        return kind(groups, betas=optimizer.betas, eps=optimizer.eps)
    if isinstance(optimizer, Lion):
        return _Lion(groups, {"betas": optimizer.betas})
    raise UserError(f"there is no PyTorch counterpart of {type(optimizer).__name__}")


def _channel_mask(parameter: Tensor, channels: Channels) -> Tensor:
    axis = channel_axis(tuple(parameter.shape))
    chosen = select_channels(parameter.detach().numpy(), channels, axis)
    mask = torch.zeros_like(parameter)
    return mask.index_fill(axis, torch.from_numpy(chosen.astype(np.int64)), 1.0)


def _refuse_dropout(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise UserError(
                f"{path} ({type(module).__name__}) applies dropout, whose random numbers are not PyTorch's",
                instead="Verify the model in eval mode: model.eval().",
            )


def _named_output(output: Any, name: str) -> Tensor:
    """What the frontend takes for the loss or the logits: the output of that name, else the first."""
    if isinstance(output, Mapping):
        result: Tensor = output[name] if name in output else next(iter(output.values()))
    elif isinstance(output, (tuple, list)):
        result = output[0]
    else:
        result = getattr(output, name, output)
    return result


def _tensors(inputs: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}


def _doubled(inputs: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: v.double() if v.is_floating_point() else v for name, v in _tensors(inputs).items()}
