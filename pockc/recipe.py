"""The options of one build, resolved: the record that every pass receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pockc.ir import Node
    from pockc.optim import Optimizer
    from pockc.scheme import Channels

StateDtype = Literal["f32", "int8"]
BatchNorm = Literal["fold", "freeze", "train"]
Dtype = Literal["f32", "bf16", "fp16"]
SavedDtype = Literal["f32", "int8"]
FrozenDtype = Literal["f32", "bf16", "int8", "int4"]
PrefixDtype = Literal["f32", "int8"]
LossScale = float | Literal["dynamic"]


def no_workspace(node: Node) -> int:
    """The scratch memory of kernels that have none."""
    return 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, and how.

    ``trained`` maps the name of each updated parameter to its channel selection, None for the whole tensor.
    ``loss`` is the name of a built-in loss, or None where the graph already has an output called ``loss``.
    ``accumulation`` is the number of micro-steps per optimizer step; ``threads`` sizes the kernels' workspaces,
    and ``workspace`` is the target's count of their bytes for a node: passes that weigh memory ask it.
    ``dtype`` is how activations and their gradients are stored; ``loss_scale`` multiplies those gradients, and the
    gradients of parameters are divided by it. Where ``scale_interval`` is not 0, that is the scale to begin with, and
    as many steps in a row with finite gradients double it.
    ``state_dtype`` is how optimizer slots are stored, ``frozen_dtype`` how frozen weights are, ``saved_dtype`` how
    activations wait for the backward pass.
    ``prefix_ranges`` is what the values of the frozen prefix were measured to lie between, by their keys
    (`passes.frozen_prefix`); where there are any, the prefix runs in eight bits.
    ``cache`` is how many bytes of the device's cache one core can count on.
    ``sufficient`` is what another entry of the program takes of the arena anyway: below it no byte is worth a search.
    ``transient_target`` is what the training step may need beside its states, in bytes: computing activations again and
    micro-batches are then worth any time; without it, next to none. ``micro_batch`` is the number of samples that run
    through the training step at a time; 0: whatever fits best. ``decisions`` is where passes note what they chose, for
    the report.
    ``times`` has milliseconds of the device, by node and candidate kernel (`passes.place`): a model stands in for more.
    ``tiles`` is how another entry cut its weights, by name, into how many tiles; None where the entry is the first.
    """

    trained: Mapping[str, Channels | None]
    optimizer: Optimizer
    loss: str | None = "cross_entropy"
    loss_options: Mapping[str, float] = field(default_factory=dict)
    batchnorm: BatchNorm = "fold"
    accumulation: int = 1
    dtype: Dtype = "f32"
    loss_scale: float = 1.0
    scale_interval: int = 0
    state_dtype: StateDtype = "f32"
    saved_dtype: SavedDtype = "f32"
    frozen_dtype: FrozenDtype = "f32"
    prefix_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    threads: int = 1
    workspace: Callable[[Node], int] = no_workspace
    cache: int = 0
    sufficient: int = 0
    transient_target: int | None = None
    micro_batch: int = 0
    decisions: dict[str, Any] = field(default_factory=dict)
    tiles: Mapping[str, int] | None = None
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    updated_buffers: frozenset[str] = frozenset()  # running statistics that a training entry updates
    disabled: frozenset[str] = frozenset()  # names of passes that the user switched off, for ablation

    @property
    def has_dynamic_scale(self) -> bool:
        """Whether the scale of the loss follows the gradients."""
        return self.scale_interval > 0
