"""Illegal operands and attributes: each type rule says in one sentence what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pockc.errors import InternalError, UserError
from pockc.ir import TensorType
from pockc.ops import infer
from pockc.ops.common import boolean, f32, i64

WINDOW = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}
HEADS = f32(1, 2, 3, 4)
ILLEGAL: tuple[tuple[str, tuple[TensorType, ...], dict[str, Any]], ...] = (
    ("exp", (i64(3),), {}),
    ("add", (f32(3), f32(4)), {}),
    ("add", (f32(3), i64(3)), {}),
    ("where", (f32(3), f32(3), f32(3)), {}),
    ("where", (boolean(3), f32(3), i64(3)), {}),
    ("cast", (f32(3),), {"dtype": "u8"}),
    ("clip", (f32(3),), {"low": 1.0, "high": 0.0}),
    ("tanh_grad", (f32(3), f32(4)), {}),
    ("apply_mask", (f32(9), TensorType((1,), "u8")), {}),
    ("reduce_sum", (f32(3, 4),), {"axes": ()}),
    ("reduce_sum", (f32(3, 4),), {"axes": (1, 0)}),
    ("reduce_max", (f32(3, 4),), {"axes": (2,)}),
    ("argmax", (f32(3, 4),), {"axis": -1}),
    ("reshape", (f32(3, 4),), {"shape": (5, 2)}),
    ("reshape", (f32(3, 4),), {"shape": (-1, 2)}),
    ("transpose", (f32(3, 4),), {"permutation": (0, 0)}),
    ("slice", (f32(3, 4),), {"axis": 0, "start": 2, "stop": 2}),
    ("slice", (f32(3, 4),), {"axis": 0, "start": 0, "stop": 3, "step": 0}),
    ("slice_grad", (f32(3, 4),), {"axis": 0, "start": 2, "step": 1, "size": 4}),
    ("concat", (f32(3, 4), f32(2, 5)), {"axis": 0}),
    ("concat", (), {"axis": 0}),
    ("expand", (f32(3, 4),), {"shape": (3, 5)}),
    ("expand", (f32(3, 4),), {"shape": (4,)}),
    ("pad", (f32(3),), {"before": (-1,), "after": (0,)}),
    ("take", (f32(3), i64(2)), {"axis": 0}),
    ("matmul", (f32(3, 4), f32(5, 4)), {}),
    ("matmul", (f32(4), f32(4, 5)), {}),
    ("matmul", (f32(3, 4), f32(4, 5), f32(3)), {}),
    ("matmul", (f32(3, 4), f32(4, 5)), {"activation": "tanh"}),
    ("conv2d", (f32(1, 5, 5, 3), f32(4, 3, 3, 2)), {}),
    ("conv2d", (f32(1, 5, 5, 3), f32(4, 3, 3, 3)), {"groups": 2}),
    ("conv2d", (f32(1, 2, 2, 3), f32(4, 3, 3, 3)), {}),
    ("conv2d", (f32(1, 5, 5, 3), f32(4, 3, 3, 3)), {"padding": (1, 1)}),
    ("conv2d", (f32(1, 5, 5, 3), f32(4, 3, 3, 3)), {"stride": (0, 1)}),
    ("conv2d_grad_input", (f32(1, 4, 4, 4), f32(4, 3, 3, 3)), {"size": (5, 5)}),
    ("max_pool2d", (f32(1, 4, 4, 3),), {**WINDOW, "padding": (2, 0, 0, 0)}),
    ("max_pool2d", (f32(1, 20, 20, 3),), {**WINDOW, "kernel": (16, 16)}),
    ("avg_pool2d", (f32(4, 4),), WINDOW),
    ("batch_norm", (f32(3, 4), f32(3), f32(4)), {"epsilon": 1e-5}),
    ("layer_norm", (f32(3, 4), f32(4)), {"epsilon": 1e-5}),
    ("rms_norm", (f32(),), {"epsilon": 1e-5}),
    ("attention", (f32(1, 3, 3, 4), HEADS, HEADS), {"scale": 1.0}),
    ("attention", (HEADS, HEADS, f32(1, 2, 5, 4)), {"scale": 1.0}),
    ("attention", (HEADS, HEADS, HEADS, boolean(3, 3)), {"scale": 1.0}),
    ("attention", (HEADS, HEADS, HEADS, boolean(1, 1, 3, 2)), {"scale": 1.0}),
    ("rotary", (f32(1, 2, 3, 5), f32(3, 5), f32(3, 5)), {}),
    ("embedding", (f32(5, 3), f32(2)), {}),
    ("embedding", (f32(5, 3), i64(2)), {"padding_index": 5}),
    ("dropout_mask", (i64(), i64()), {"elements": 8, "probability": 1.0, "stream": 0}),
    ("cross_entropy", (f32(4, 3), i64(5)), {}),
    ("cross_entropy", (f32(4, 3), i64(4)), {"label_smoothing": 1.5}),
    ("sgd", (f32(4), f32(3), f32()), {}),
    ("momentum", (f32(4), f32(4), f32(4), f32(), i64()), {"momentum": 0.0, "nesterov": True}),
    ("sgd", (f32(4, 3), f32(2, 3), f32()), {"start": 3}),
    ("sgd", (f32(4, 3), f32(2, 2), f32()), {"start": 0}),
    ("lion", (f32(4, 3), f32(2, 3), f32(2, 3), f32()), {"beta1": 0.9, "beta2": 0.9, "start": 0}),
    ("cross_entropy_tile", (f32(2, 3), i64(2), f32(2, 4)), {"start": 0}),
    ("cross_entropy_grad_tile", (f32(), f32(2, 3), i64(2), f32(2, 5)), {"start": 3, "classes": 5}),
    ("count_correct", (f32(4, 3), i64(4)), {"samples": 3}),
    ("all_finite", (), {}),
    ("all_finite", (f32(4), i64(4)), {}),
    ("gate", (f32(),), {}),
    ("gate", (boolean(), TensorType((4,), "f16")), {}),
    ("embedding_grad", (f32(2, 3), i64(2), f32(4, 2)), {"rows": 4}),
    ("adam", (f32(4),) * 4 + (f32(), i64(), TensorType((5,), "i32")), {"beta1": 0.9, "beta2": 0.9, "epsilon": 0.0}),
    ("learning_rate", (f32(), i64()), {"schedule": "exponential"}),
    ("learning_rate", (f32(), i64()), {"schedule": "cosine"}),
)


def test_illegal_operands_get_a_clear_sentence(golden: Callable[..., None]) -> None:
    messages = []
    for op, types, attrs in ILLEGAL:
        with pytest.raises(UserError) as error:
            infer(op, types, attrs, "features.3")
        messages.append(f"{error.value}\n")
    golden("".join(messages))


@pytest.mark.parametrize(
    ("op", "attrs", "message"),
    [("nothing", {}, "no op"), ("exp", {"base": 2.0}, "no attribute base"), ("cumsum", {}, "needs attribute axis")],
)
def test_unknown_op_or_attribute_is_an_internal_error(op: str, attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(InternalError, match=message):
        infer(op, [f32(3)], attrs)
