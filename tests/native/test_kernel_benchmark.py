"""The roofline benchmark: its calls are those that the vectorised kernels take, and its figures are what they say."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import kernel_cases, kernels
from benchmarks.kernel_cases import KernelCase
from pockc.ops import load_families

pytestmark = [pytest.mark.native, pytest.mark.torch]
load_families()

PEAK = kernels.Peak(gflops=50.0, gigabytes=10.0)
SMALLEST = {case.group: case for case in sorted(kernel_cases.CASES, key=lambda case: -case.work)}


@pytest.mark.parametrize("case", SMALLEST.values(), ids=SMALLEST)
def test_kernel_takes_the_call_and_pytorch_its_counterpart(case: KernelCase) -> None:
    operands = case.operands()
    kernels.prepare(case, operands)()

    assert case.pytorch is not None
    case.pytorch(*operands)()


def test_share_is_of_the_peak_in_the_unit_of_the_case() -> None:
    case = KernelCase("group", "title", "matmul", list, work=1e9)
    flops = kernels.Measured(case, ms=100.0, pytorch_ms=150.0, share=0.2)

    assert flops.rate == pytest.approx(10.0)
    assert flops.ratio == pytest.approx(1.5)
    assert replace(flops, pytorch_ms=None).ratio is None


def test_measured_kernel_is_judged_against_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take_turns", lambda sides: dict.fromkeys(sides, 2.0))
    case = KernelCase("gemm", "8", "matmul", lambda: [np.ones((8, 8), np.float32)] * 2, work=2e6)
    measured = kernels.measure(case, PEAK, alone=True)

    assert measured.share == pytest.approx(1.0 / 50.0)
    assert [bar.met for bar in kernels.bars_of([measured])] == [False]
    assert [bar.met for bar in kernels.bars_of([replace(measured, share=0.9)])] == [True]


def test_peak_is_what_the_profile_says_of_a_core() -> None:
    peak = kernels.measure_peak()

    assert peak.gflops > 0.1
    assert peak.gigabytes > 0.1
