"""Optimizers, learning-rate schedules and parameter groups: plain records, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from pockc.errors import UserError


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise UserError(f"{what}, found {found!r}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate over optimizer steps, evaluated inside the program.

    ``warmup_steps`` grows linearly to the base rate; then ``linear`` and ``cosine`` decay over the rest of
    ``total_steps`` to ``minimum`` (a fraction of the base rate), ``step`` multiplies by ``factor`` every
    ``step_size`` steps, ``constant`` stays.
    """

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    step_size: int = 0
    minimum: float = 0.0
    factor: float = 0.1

    def __post_init__(self) -> None:
        kinds = ("constant", "linear", "cosine", "step")
        _require(self.kind in kinds, f"a schedule is one of {', '.join(kinds)}", self.kind)
        _require(self.warmup_steps >= 0, "warmup_steps must not be negative", self.warmup_steps)
        if self.kind in ("linear", "cosine"):
            _require(
                self.total_steps > self.warmup_steps, f"a {self.kind} schedule needs total_steps", self.total_steps
            )
        if self.kind == "step":
            _require(self.step_size > 0, "a step schedule needs step_size", self.step_size)

    @property
    def is_constant(self) -> bool:
        """Whether the base rate applies at every step."""
        return self.kind == "constant" and self.warmup_steps == 0


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters whose name matches ``pattern`` (a glob) get their own weight decay and learning-rate factor."""

    pattern: str
    weight_decay: float | None = None
    learning_rate_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """What all optimizers share. The first group that matches a parameter's name applies to it.

    ``clip_norm`` clips by the global norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` does; all
    gradients are then alive at once. Of accumulated micro-steps the mean gradient is clipped.
    """

    lr: float
    weight_decay: float = 0.0
    schedule: Schedule = field(default_factory=Schedule)
    groups: tuple[Group, ...] = ()
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _require(self.lr >= 0, "the learning rate must not be negative", self.lr)
        _require(self.weight_decay >= 0, "weight_decay must not be negative", self.weight_decay)
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive", self.clip_norm)

    def group(self, parameter: str) -> Group:
        """The settings of one parameter, by its original name."""
        for group in self.groups:
            if fnmatchcase(parameter, group.pattern):
                decay = self.weight_decay if group.weight_decay is None else group.weight_decay
                return Group(group.pattern, decay, group.learning_rate_factor)
        return Group("*", self.weight_decay)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the per-parameter tensors that the optimizer keeps."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD(Optimizer):
    """torch.optim.SGD: plain, with momentum, dampening and Nesterov."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        _require(0 <= self.momentum < 1, "momentum must lie in [0, 1)", self.momentum)
        plain = self.momentum > 0 and self.dampening == 0
        _require(plain or not self.nesterov, "nesterov needs a momentum and zero dampening", self.momentum)

    @property
    def slots(self) -> tuple[str, ...]:
        """The momentum, if there is one."""
        return ("momentum",) if self.momentum else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(Optimizer):
    """torch.optim.Adam: weight decay, if any, is added to the gradient."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        _require(all(0 <= beta < 1 for beta in self.betas), "betas must lie in [0, 1)", self.betas)
        _require(self.eps > 0, "eps must be positive", self.eps)

    @property
    def slots(self) -> tuple[str, ...]:
        """First and second moment."""
        return ("adam_m", "adam_v")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Adam):
    """torch.optim.AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    weight_decay: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion(Optimizer):
    """Chen et al., 2023: the sign of an interpolated momentum, decoupled weight decay, one slot."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    @property
    def slots(self) -> tuple[str, ...]:
        """The momentum."""
        return ("lion_m",)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "lion": Lion}
