"""Products of 16-bit numbers on x86: kernels against the reference, by the bound of gemm_bf16.h, and whole steps.

Those of 64-bit ARM are tested under emulation: tests/cross/test_halves.py.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pockc
from pockc.halves import UNIT_ROUNDOFF, narrow, widen
from pockc.ir import Array, TensorType
from pockc.ops import complete_attributes, infer
from pockc.ops.common import f32
from pockc.parity import tolerances
from pockc.targets.native.workspace import workspace_bytes
from tests.native import kernels
from tests.native.test_half_kernels import CASES, Operands, expected, prepared

pytestmark = pytest.mark.native

PRODUCTS = ("matmul", "conv2d", "conv2d_grad_input", "conv2d_grad_weight")
STEEPEST = 1.2  # of the activations
Case = tuple[str, Operands, Mapping[str, Any], tuple[int, ...] | None]
# Rows, columns and depths around the tiles, panels and blocks of the microkernel; odd depths, whose last step is alone.
LARGER: list[Case] = [
    ("matmul", (f32(29, 257), f32(257, 33)), {}, None),
    ("matmul", (f32(43, 511), f32(511, 401)), {}, (0,)),
    ("matmul", (f32(200, 70), f32(49, 70)), {"transpose_b": True}, (0,)),
    ("matmul", (f32(301, 211), f32(301, 97)), {"transpose_a": True}, None),
    ("matmul", (f32(64, 2048), f32(2048, 16)), {}, None),
    ("matmul", (f32(70, 1301), f32(1301, 130)), {}, None),
    ("matmul", (f32(300, 1100), f32(97, 1100)), {"transpose_b": True}, (0,)),
    ("matmul", (f32(1101, 70), f32(1101, 200)), {"transpose_a": True}, (0,)),
    ("conv2d", (f32(2, 9, 9, 35), f32(33, 3, 3, 35), f32(33)), {"padding": (1, 1, 1, 1)}, (0,)),
    ("conv2d_grad_input", (f32(2, 9, 9, 33), f32(33, 3, 3, 35)), {"size": (9, 9), "padding": (1, 1, 1, 1)}, None),
    ("conv2d_grad_weight", (f32(2, 12, 12, 50), f32(2, 10, 10, 203)), {"kernel": (3, 3)}, None),
]


def _multiplies(case: Case) -> bool:
    """Whether it is a product whose left operand has 16 bits, and not depthwise."""
    op, _, attrs, positions = case
    left = 1 if op == "conv2d_grad_weight" else 0
    return op in PRODUCTS and attrs.get("groups", 1) <= 2 and (positions is None or left in positions)


TESTED = [case for case in [*CASES, *LARGER] if _multiplies(case)]


def need_bf16() -> None:
    cpu = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpu.exists() or " avx512_bf16" not in cpu.read_text():
        pytest.skip("this CPU has no products of bfloat16 (AVX512_BF16)")


def rounded(exact: list[Array]) -> list[Array]:
    """The operands of the product as such numbers; a bias stays."""
    return [widen(narrow(x, "b16"), "b16") if index < 2 else x for index, x in enumerate(exact)]


@pytest.mark.parametrize(("op", "operands", "attrs", "positions"), TESTED)
def test_products_keep_to_the_bound_of_sums_of_floats(
    op: str, operands: Operands, attrs: Mapping[str, Any], positions: tuple[int, ...] | None
) -> None:
    need_bf16()
    stored, types, exact, results, complete = prepared(op, operands, attrs, positions, "b16")
    (type_,) = results
    room = workspace_bytes(op, types, results, complete, 3)
    found = []
    for threads in (1, 3):
        status, (got,) = kernels.run_typed(op, "half-b16", stored, types, results, complete, threads, room)
        assert status == kernels.OK
        found.append(got)
    assert found[0].tobytes() == found[1].tobytes(), "the result depends on the number of threads"

    exact = rounded(exact)
    (want,) = expected(op, exact, complete)
    linear = {**complete, **({"activation": "none"} if "activation" in complete else {})}
    (sizes,) = expected(op, [np.abs(x) for x in exact], linear)
    (depths,) = expected(op, [np.ones_like(x) for x in exact], linear)
    bound = STEEPEST * depths * 2.0**-23 * sizes + 1e-6  # twice: the reference adds floats too
    close = widen(found[0], "b16") if type_.is_half else found[0]
    if type_.is_half:
        bound = bound + 1.001 * UNIT_ROUNDOFF["b16"] * np.abs(want) + UNIT_ROUNDOFF["b16"] * bound
    assert np.all(np.abs(close - want) <= bound)


ATTENTIONS = [  # batch, heads, key heads, queries, keys, depth, causal
    (2, 4, 2, 5, 7, 9, False),
    (1, 2, 2, 70, 70, 32, True),
    (1, 2, 1, 67, 301, 16, False),
    (1, 1, 1, 130, 259, 20, True),
]


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_rounds_probabilities_once(case: tuple[int, int, int, int, int, int, bool]) -> None:
    need_bf16()
    batch, heads, key_heads, queries, keys, depth, causal = case
    attrs = {"scale": 0.4, "causal": causal}
    query, key = f32(batch, heads, queries, depth), f32(batch, key_heads, keys, depth)
    q, k, v, ct = (_stored(shape, seed) for seed, shape in enumerate((query, key, key, query)))
    forward = _run("attention", [q, k, v], attrs)
    exact_q, exact_k, exact_v, exact_ct = (widen(x, "b16") for x in (q, k, v, ct))
    out, log_sum = expected("attention", [exact_q, exact_k, exact_v], complete_attributes("attention", attrs))
    sizes = expected("attention", [exact_q, exact_k, np.abs(exact_v)], complete_attributes("attention", attrs))[0]
    unit = UNIT_ROUNDOFF["b16"]
    assert np.all(np.abs(widen(forward[0], "b16") - out) <= 1.05 * unit * (sizes + np.abs(out)) + 1e-4)
    np.testing.assert_allclose(forward[1], log_sum, rtol=1e-5, atol=1e-5)

    exact_out = widen(narrow(out, "b16"), "b16")
    found = _run("attention_grad", [ct, q, k, v, narrow(out, "b16"), log_sum], attrs)
    operands = [exact_ct, exact_q, exact_k, exact_v, exact_out, log_sum]
    wanted = expected("attention_grad", operands, complete_attributes("attention_grad", attrs))
    group = heads // key_heads
    wide_k, wide_v = (np.repeat(x, group, axis=1) for x in (exact_k, exact_v))
    seen = np.tril(np.ones((queries, keys), bool)) if causal else np.ones((queries, keys), bool)
    p = np.where(seen, np.exp(0.4 * exact_q @ wide_k.swapaxes(2, 3) - log_sum[..., None]), 0)
    ds = 0.4 * np.abs(p * (exact_ct @ wide_v.swapaxes(2, 3) - (exact_ct * exact_out).sum(-1, keepdims=True)))
    of_heads = [p.swapaxes(2, 3) @ np.abs(exact_ct), ds.swapaxes(2, 3) @ np.abs(exact_q)]
    dv, dk = (x.reshape(batch, key_heads, group, keys, depth).sum(2) for x in of_heads)
    for got, want, size in zip(found, wanted, (ds @ np.abs(wide_k), dk, dv), strict=True):
        assert np.all(np.abs(got - want) <= 1.05 * unit * size + 1e-4)
        assert np.abs(got - want).max() > 1e-5, "the products are those of floats"


def _stored(type_: TensorType, seed: int) -> Array:
    values = np.random.default_rng(seed).uniform(-2, 2, type_.shape).astype(np.float32)
    return narrow(values, "b16")


def _run(op: str, operands: list[Array], attrs: Mapping[str, Any]) -> list[Array]:
    """By one thread and by three, whose results must be the same."""
    types = [TensorType(x.shape, "f32" if x.dtype == np.float32 else "b16") for x in operands]
    complete = complete_attributes(op, attrs)
    results, _ = infer(op, types, complete)
    room = workspace_bytes(op, types, list(results), complete, 3)
    found = []
    for threads in (1, 3):
        status, got = kernels.run_typed(op, "half-b16", operands, types, list(results), complete, threads, room)
        assert status == kernels.OK
        found.append(got)
    assert all(one.tobytes() == several.tobytes() for one, several in zip(*found, strict=True))
    return found[0]


def test_other_left_operands_are_left_to_other_kernels() -> None:
    types, results = [f32(8, 16), f32(16, 8)], [f32(8, 8)]
    operands = [np.ones(type_.shape, np.float32) for type_ in types]
    status, _ = kernels.run_typed("matmul", "half-b16", operands, types, results, {}, 1, kernels.WORKSPACE_BYTES)
    assert status == kernels.UNSUPPORTED


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 17, 3, stride=2, padding=1), nn.Conv2d(17, 40, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(x).relu()).relu()
        return self.head(hidden.mean((2, 3)))  # type: ignore[no-any-return]


def test_steps_with_such_products_stay_within_the_tolerance_of_bf16(tmp_path: Path) -> None:
    need_bf16()
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3, 16, 16)
    losses = {}
    for asked in (False, True):
        options: dict[str, Any] = {"dtype": "bf16", "half_arithmetic": asked}
        program = pockc.build(model, (x,), optimizer=pockc.SGD(lr=0.1, momentum=0.9), **options)
        program.save(tmp_path / "model.pock")
        batch = {"labels": np.arange(8) % 10, program.entries["infer"].inputs[0].name: x.numpy()}
        with pockc.Session(tmp_path / "model.pock") as session:
            losses[asked] = [session.train_step(**batch) for _ in range(10)]
    assert losses[True] != losses[False], "the products are those of floats"
    np.testing.assert_allclose(losses[True], losses[False], rtol=tolerances("bf16")[0])
    assert losses[True][-1] < losses[True][0]
