"""What `pockc.build` says to dtypes that are unknown, or make no sense together."""

from __future__ import annotations

import math
from typing import get_args

from pockc.errors import UserError
from pockc.optim import Optimizer
from pockc.recipe import Dtype, LossScale, PrefixDtype, StateDtype

FP16_SCALE = 1024.0  # keeps gradients down to 2^-34 above zero, and overflows from 64 on
DYNAMIC_SCALE, DYNAMIC_INTERVAL = 65536.0, 2000  # to begin with, and to double: torch.amp.GradScaler's


def check_dtype(dtype: str, half_arithmetic: bool, prefix_dtype: str, saved_dtype: str) -> None:
    """Raise UserError for activations that do not exist, or not together."""
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype is {dtype!r}", supported=", ".join(get_args(Dtype)))
    if half_arithmetic and dtype == "f32":
        raise UserError(
            f"half_arithmetic is for activations in 16 bits, but dtype is {dtype!r}",
            instead="Leave half_arithmetic out, or give dtype 'bf16' or 'fp16'.",
        )
    for name, value in (("prefix_dtype", prefix_dtype), ("saved_dtype", saved_dtype)):
        if dtype != "f32" and value != "f32":
            raise UserError(
                f"dtype is {dtype!r} and {name} {value!r}: there is no such mixture of activations",
                supported="either of the two, the other as 'f32'; frozen_dtype goes with every dtype",
                instead=f"Leave {name} out, or dtype.",
            )


def resolved_scale(dtype: str, loss_scale: LossScale | None, interval: int | None) -> tuple[float, int]:
    """The first scale of the loss, and what doubles it: so many steps in a row, or 0 where the scale is constant.

    Raises UserError for a scale that is no power of two, and for an interval that is none.
    """
    if loss_scale == "dynamic":
        if interval is not None and interval < 1:
            raise UserError(f"loss_scale_interval is {interval}; it counts steps and is at least 1")
        return DYNAMIC_SCALE, interval or DYNAMIC_INTERVAL
    if interval is not None:
        raise UserError(
            f"loss_scale_interval is for loss_scale 'dynamic', but that is {loss_scale}",
            instead="Leave loss_scale_interval out, or give loss_scale 'dynamic'.",
        )
    if loss_scale is None:
        return (FP16_SCALE if dtype == "fp16" else 1.0), 0
    if isinstance(loss_scale, str) or loss_scale <= 0 or math.frexp(loss_scale)[0] != 0.5:
        raise UserError(f"loss_scale is {loss_scale}", supported="dynamic; powers of two above 0, such as 1024")
    return loss_scale, 0


def check_prefix(prefix_dtype: str, calibration: object, batchnorm: str) -> None:
    """Raise UserError for a prefix in eight bits without samples, or with statistics that are updated."""
    if prefix_dtype not in get_args(PrefixDtype):
        raise UserError(f"prefix_dtype is {prefix_dtype!r}", supported=", ".join(get_args(PrefixDtype)))
    if prefix_dtype == "f32" and calibration is not None:
        raise UserError("calibration samples are for prefix_dtype 'int8', but it is 'f32'")
    if prefix_dtype == "f32":
        return
    if calibration is None:
        raise UserError(
            "prefix_dtype is 'int8', but there are no samples to measure the ranges of activations with",
            supported="calibration: an array of samples per model input; or 'example', the example inputs",
            instead="Give tens to hundreds of training samples, as --calibrate data.npz or --calibrate example.",
        )
    if isinstance(calibration, str) and calibration != "example":
        raise UserError(f"calibration is the text {calibration!r}", supported="arrays by input name, or 'example'")
    if batchnorm == "train":
        raise UserError(
            "prefix_dtype is 'int8', but batchnorm 'train' updates the statistics that it would fold",
            supported="batchnorm fold, freeze",
        )


def check_state_dtype(state_dtype: str, optimizer: Optimizer) -> None:
    """Raise UserError for slots that do not exist."""
    if state_dtype not in get_args(StateDtype):
        raise UserError(f"state_dtype is {state_dtype!r}", supported=", ".join(get_args(StateDtype)))
    if state_dtype == "int8" and not optimizer.slots:
        name = type(optimizer).__name__
        raise UserError(
            f"state_dtype is 'int8', but {name} without momentum keeps no state",
            supported="SGD with momentum, Adam, AdamW, Lion",
            instead="Leave state_dtype out.",
        )
