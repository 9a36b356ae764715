"""Ten optimizer steps of every zoo model, scheme and optimizer against PyTorch, at small size.

POCKC_TRAJECTORY_SAMPLE=n runs a sample of n cases; POCKC_TRAJECTORY_SEED chooses another one.
"""

import os
import random

import pytest

from benchmarks import verify_zoo, zoo

pytestmark = [pytest.mark.torch, pytest.mark.native]

CASES = [
    (model, scheme, optimizer)
    for model in sorted(zoo.ZOO)
    for scheme in verify_zoo.SCHEMES
    for optimizer in verify_zoo.OPTIMIZERS
    if verify_zoo.applies(model, scheme)
]


def sampled(cases: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    size = min(int(os.environ.get("POCKC_TRAJECTORY_SAMPLE", len(cases))), len(cases))
    chosen = random.Random(int(os.environ.get("POCKC_TRAJECTORY_SEED", "0"))).sample(cases, size)
    return sorted(chosen)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "scheme", "optimizer"), sampled(CASES))
def test_ten_steps_agree_with_pytorch(model: str, scheme: str, optimizer: str) -> None:
    result = verify_zoo.check_parity(model, scheme, optimizer, steps=10, small=True)

    missed = [str(bar) for bar in result.bars() if not bar.met]
    assert not missed, "; ".join(missed)
    # Were all tensors excused for a zero gradient, the loss alone would be compared.
    assert result.tensors > len(result.zero_gradient)


@pytest.mark.parametrize(("model", "scheme"), sorted({(model, scheme) for model, scheme, _ in CASES}))
def test_plan_is_tight_and_is_what_the_runtime_allocates(model: str, scheme: str) -> None:
    result = verify_zoo.check_memory(model, scheme, small=True)

    assert result.allocated_bytes == result.arena_bytes
    assert result.fragmentation <= verify_zoo.FRAGMENTATION_LIMIT
