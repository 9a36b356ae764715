"""The part of the memory benchmark that builds under a budget, against a compiler that knows two programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pockc
from benchmarks import memory, memory_budget
from pockc.errors import BudgetError

pytestmark = [pytest.mark.torch, pytest.mark.native]

MODEL = "mcunet_5fps"


class TwoPrograms:
    """Stands for `pockc.build`: without a budget it makes no effort; under one it makes all that it can."""

    def __init__(self, *, lies: bool = False) -> None:
        self.build, self.lies = pockc.build, lies
        self.budgets: list[int | None] = []

    def __call__(self, *arguments: Any, memory_budget: int | None = None) -> pockc.Program:
        self.budgets.append(memory_budget)
        free = self.build(*arguments, disabled=frozenset({"reorder", "split-prefix"}))
        if memory_budget is None:
            return free
        peak = free.memory.peak_bytes
        program = free if peak <= memory_budget else self.build(*arguments)
        smallest = program.memory.peak_bytes
        if smallest > memory_budget or (self.lies and memory_budget < peak):
            raise BudgetError(f"nothing fits {memory_budget} bytes", smallest=smallest)
        note = {
            "bytes": memory_budget, "unconstrained_bytes": peak, "micro_batch": 2, "batch": 2, "recomputed": [],
            "saved_bits": 32, "estimated_slowdown": 1.0,
        }  # fmt: skip
        return replace(program, metadata={**program.metadata, "budget": note})


@pytest.mark.slow
def test_every_share_is_built_or_the_least_that_the_error_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = TwoPrograms()
    monkeypatch.setattr(pockc, "build", compiler)

    found = memory_budget.measure([MODEL], small=True)

    assert [result.share for result in found] == [1.0, 0.75, 0.5, 0.35]
    met, least = found[0], found[-1]
    assert met.smallest_bytes is None and met.limit_bytes == met.budget_bytes == met.unconstrained_bytes
    assert least.smallest_bytes == least.limit_bytes == least.peak_bytes
    assert least.budget_bytes == int(0.35 * least.unconstrained_bytes) < least.limit_bytes
    assert compiler.budgets.count(least.smallest_bytes) == 1  # built once for all shares that it stands for
    refused = [budget for budget in compiler.budgets if budget and budget < least.smallest_bytes]
    assert refused == [next(result.budget_bytes for result in found if result.smallest_bytes)]
    for result in found:
        assert result.runtime_bytes is not None and result.slowdown is not None
        assert result.runtime_bytes <= result.limit_bytes
        assert result.loss_error < 1e-5
        assert all(bar.met for bar in result.bars())
    memory_budget.print_budgets(found)
    assert "mcunet_5fps within 35%" in capsys.readouterr().out
    assert memory_budget.summary(found).startswith("4 budgets, at most ")


@pytest.mark.slow
def test_least_budget_that_is_refused_misses_its_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pockc, "build", TwoPrograms(lies=True))
    monkeypatch.setattr(memory_budget, "SHARES", (0.5,))

    [result] = memory_budget.measure([MODEL], small=True)

    assert result.smallest_bytes is not None and result.peak_bytes is None
    assert len([bar for bar in result.bars() if not bar.met]) == 2
    memory_budget.print_budgets([result])
    captured = capsys.readouterr()
    assert "refused" in captured.out
    assert "what was named as the least is refused: nothing fits" in captured.err


def row(**changes: Any) -> memory_budget.Constrained:
    kept = memory_budget.Constrained(
        MODEL, {}, 0.5, 500, None, 1000, 490, 480, {"unconstrained_bytes": 1000}, 1e-6, 2.0, 1.5, 3.0
    )
    return replace(kept, **changes)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"runtime_bytes": 501}, ["mcunet_5fps within 50%: bytes on the runtime's count / the budget"]),
        ({"loss_error": 2e-4}, ["mcunet_5fps within 50%: worst of 5 losses"]),
        ({"loss_error": float("inf")}, ["mcunet_5fps within 50%: worst of 5 losses"]),
        ({"smallest_bytes": 600, "runtime_bytes": 600}, []),
        ({"smallest_bytes": 499}, ["mcunet_5fps within 50%: the least that can be met / the refused budget"]),
        ({"decisions": {"unconstrained_bytes": 999}}, ["mcunet_5fps within 50%: noted / true peak without a budget"]),
    ],
)
def test_bars_hold_a_program_to_its_budget_and_its_losses(changes: dict[str, Any], missed: list[str]) -> None:
    assert [bar.what for bar in row(**changes).bars() if not bar.met] == missed


def test_errors_of_losses_are_relative_and_infinite_where_one_is_not_finite() -> None:
    assert memory_budget.worst_error((2.0, 4.4), (2.0, 4.0)) == pytest.approx(0.1)
    assert memory_budget.worst_error((2.0, float("nan")), (2.0, 4.0)) == float("inf")


@pytest.mark.slow
def test_budgets_alone_make_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pockc, "build", TwoPrograms())
    monkeypatch.setattr(memory_budget, "SHARES", (1.0,))
    output = tmp_path / "memory.json"

    code = memory.main(["--quick", "--budget-only", "--budget-models", MODEL, "--output", str(output)])

    content = json.loads(output.read_text())
    assert (content["cases"], content["tightness"], content["published"]) == ([], [], [])
    assert [entry["model"] for entry in content["budgets"]] == [MODEL]
    assert content["complete"] and code == 0 and all(bar["met"] for bar in content["bars"])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("bench-memory: 1 budgets, ")
    assert not output.with_suffix(".png").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = TwoPrograms()

    def stopped(*arguments: Any, memory_budget: int | None = None) -> pockc.Program:
        if len(compiler.budgets) == 2:  # without a budget, and with the first
            raise KeyboardInterrupt
        return compiler(*arguments, memory_budget=memory_budget)

    monkeypatch.setattr(pockc, "build", stopped)
    output = tmp_path / "memory.json"

    with pytest.raises(KeyboardInterrupt):
        memory.main(["--quick", "--budget-only", "--budget-models", MODEL, "--output", str(output)])

    content = json.loads(output.read_text())
    assert not content["complete"]
    assert [(entry["model"], entry["share"]) for entry in content["budgets"]] == [(MODEL, 1.0)]
    assert "mcunet_5fps within 100%: without MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("switches", "models"),
    [
        ([], list(memory_budget.MODELS)),
        (["--no-budgets"], []),
        (["--budget-models", "resnet50"], ["resnet50"]),
        (["--cases", "mobilenet-full"], []),
        (["--cases", "mobilenet-full", "--budget-models", "resnet50"], ["resnet50"]),
        (["--budget-only"], list(memory_budget.MODELS)),
        (["--plans-only"], []),
    ],
)
def test_switches_choose_the_models_under_budgets(
    switches: list[str], models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cases: list[memory.Case], output: Path, *, budgets: list[str], **options: Any) -> int:
        assert budgets == models
        assert bool(cases) == (not {"--budget-only", "--plans-only"} & set(switches))
        return 7

    monkeypatch.setattr(memory, "run", run)
    assert memory.main(switches) == 7
