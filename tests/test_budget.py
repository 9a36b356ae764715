"""The search for a program within a budget, with a compiler that counts; and the passes that it need not repeat."""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pockc
from benchmarks import zoo
from pockc.budget import LADDER, within
from pockc.entries import Traced
from pockc.errors import BudgetError
from pockc.ir import Builder, Graph, Origin, Phase, TensorType
from pockc.optim import SGD
from pockc.pipeline import Known, Manager, Pass
from pockc.recipe import Recipe

build_module = importlib.import_module("pockc.build")  # `pockc.build` is the function
STATES = 1000
pytestmark = [pytest.mark.torch, pytest.mark.native]


@dataclass(frozen=True)
class Planned:
    """Stands for a `Program`."""

    transient: int
    metadata: dict[str, Any] = field(default_factory=dict)
    state_bytes: int = STATES
    phase: Phase = "recompute"

    @property
    def entries(self) -> dict[str, Any]:
        return {"train_step": SimpleNamespace(nodes=[SimpleNamespace(op="gelu", origin=Origin(phase=self.phase))])}

    @property
    def arena_bytes(self) -> int:
        return STATES + self.transient

    @property
    def memory(self) -> Any:
        return SimpleNamespace(peak_bytes=self.arena_bytes)


@dataclass
class Compiler:
    """Misses every target by ``miss`` bytes, from ``most`` to ``least``; the other entries take ``others`` bytes."""

    miss: int = 0
    least: int = 100
    others: int = 0
    most: int = 5000
    phase: Phase = "recompute"
    asked: list[tuple[int | None, int | None]] = field(default_factory=list)

    def plan(self, recipe: Recipe, limit: int | None) -> Planned:
        target = recipe.transient_target
        self.asked.append((target, limit))
        step = 5000 if target is None else max(self.least, min(target, self.most) + self.miss)
        recipe.decisions["estimated_seconds"] = 1 / step
        transient = step if limit is not None and STATES + step > limit else max(step, self.others)
        return Planned(transient, phase=self.phase)


def fitted(compiler: Compiler, budget: int) -> Any:
    return within(budget, Recipe(trained={}, optimizer=SGD(lr=0.1)), compiler.plan)  # type: ignore[arg-type]


def test_the_peak_as_a_budget_takes_one_plan() -> None:
    compiler = Compiler()
    assert fitted(compiler, 6000).transient == 5000
    assert compiler.asked == [(None, None)]


@pytest.mark.parametrize(("miss", "most", "transient"), [(0, 7000, 7000), (0, 5000, 5000), (600, 9000, 5000)])
def test_room_beyond_the_peak_is_used_where_that_is_faster_and_fits(miss: int, most: int, transient: int) -> None:
    compiler = Compiler(miss=miss, most=most)
    assert fitted(compiler, 9500 if miss else 9000).transient == transient
    assert compiler.asked == [(None, None), (8500 if miss else 8000, 9500 if miss else 9000)]


def test_room_is_no_use_where_nothing_is_computed_again() -> None:
    compiler = Compiler(most=7000, phase="backward")
    assert fitted(compiler, 9000).transient == 5000
    assert compiler.asked == [(None, None)]


def test_a_language_model_with_room_computes_less_again() -> None:
    model, inputs = zoo.llama_tiny(batch_size=4, sequence_length=64)
    options: dict[str, Any] = {"loss": "causal_lm", "entries": ("train_step",)}
    plain = pockc.build(model, inputs, **options)
    roomy = pockc.build(model, inputs, memory_budget=4 * plain.memory.peak_bytes, **options)
    assert plain.memory.peak_bytes < roomy.memory.peak_bytes <= 4 * plain.memory.peak_bytes
    again = [sum(node.origin.phase == "recompute" for node in p.entries["train_step"].nodes) for p in (plain, roomy)]
    assert again[1] < again[0]


def test_targets_are_corrected_until_the_plan_fits() -> None:
    compiler = Compiler(miss=40)
    program = fitted(compiler, 3000)
    assert 2900 < program.memory.peak_bytes <= 3000
    assert program.metadata["budget"]["unconstrained_bytes"] == 6000
    # The highest target of the ladder below the budget, the budget itself, and what that missed it by less.
    assert compiler.asked == [(None, None), (1250, 3000), (2000, 3000), (1960, 3000)]


def test_a_plan_that_uses_the_budget_is_not_refined() -> None:
    compiler = Compiler()
    assert fitted(compiler, STATES + 1300).transient == 1250
    assert compiler.asked == [(None, None), (1250, STATES + 1300)]


def test_other_entries_count_too() -> None:
    with pytest.raises(BudgetError) as raised:
        fitted(Compiler(others=2500), 3000)
    assert raised.value.smallest == STATES + 2500


@dataclass
class Erratic(Compiler):
    """What a target comes to is anything between 1000 bytes and twice the target; ``seed`` chooses the compiler."""

    seed: int = 0

    def plan(self, recipe: Recipe, limit: int | None) -> Planned:
        target = recipe.transient_target
        self.asked.append((target, limit))
        step = 5000 if target is None else random.Random(f"{self.seed} {target}").randint(1000, max(1000, 2 * target))
        recipe.decisions["estimated_seconds"] = 1 / step
        transient = step if limit is not None and STATES + step > limit else max(step, self.others)
        return Planned(transient, phase=self.phase)


@pytest.mark.parametrize("others", [0, 2500])
@pytest.mark.parametrize("seed", range(5))
def test_the_least_is_the_same_for_all_budgets_and_none_below_it_can_be_met(seed: int, others: int) -> None:
    named = set()
    met = []
    for budget in range(1000, 6000, 50):
        compiler = Erratic(seed=seed, others=others)
        try:
            program = fitted(compiler, budget)
        except BudgetError as error:
            assert error.smallest is not None
            named.add(error.smallest)
        else:
            assert program.memory.peak_bytes <= budget
            met.append(budget)
        assert len(compiler.asked) <= 1 + 2 * len(LADDER)
    (least,) = named
    assert min(met) >= least
    assert fitted(Erratic(seed=seed, others=others), least).memory.peak_bytes <= least
    with pytest.raises(BudgetError) as raised:
        fitted(Erratic(seed=seed, others=others), least - 1)
    assert raised.value.smallest == least


def test_what_no_target_makes_smaller_is_the_least_itself() -> None:
    with pytest.raises(BudgetError) as raised:
        fitted(Compiler(miss=6000), 3000)
    assert raised.value.smallest == STATES + 5000


def test_the_whole_of_a_program_counts_where_the_step_is_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it is not, nothing else is planned."""
    planned: list[set[str]] = []
    lowered = build_module.lowered

    def noting(target: str, manager: Manager, traced: Traced) -> tuple[dict[str, Graph], set[str]]:
        entries, rest = lowered(target, manager, traced)
        planned.append(set(entries))
        return entries, rest

    monkeypatch.setattr(build_module, "lowered", noting)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten())
    images = {"input": torch.zeros(8, 3, 12, 12)}
    peak = pockc.build(model.eval(), images, optimizer=SGD(lr=0.1)).memory.peak_bytes
    program = pockc.build(model.eval(), images, optimizer=SGD(lr=0.1), memory_budget=int(0.7 * peak), compare_full=True)
    every = {"train_step", "eval_step", "infer"}
    assert program.memory.peak_bytes <= 0.7 * peak and set(program.entries) == every
    assert planned[:3] == [every, every, {"train_step"}] and every in planned[3:]
    assert program.metadata["full_memory"]["peak_bytes"] == peak


def test_passes_run_once_on_a_graph_where_only_the_target_differs() -> None:
    runs: list[str] = []

    def noting(name: str) -> Pass:
        def run(graph: Graph, recipe: Recipe) -> Graph:
            runs.append(name)
            recipe.decisions[name] = recipe.transient_target
            return replace(graph, outputs=dict(graph.outputs))

        return Pass(name, run, targeted=name == "targeted")

    builder = Builder()
    graph = builder.build({"y": builder("tanh", builder.input("x", TensorType((2,))))})
    passes = [noting("plain"), noting("targeted"), noting("last")]
    known: Known = {}
    found = []
    for target in (1, 2, 1):
        recipe = Recipe(trained={}, optimizer=SGD(lr=0.1), transient_target=target)
        found.append(Manager(recipe, lambda node: True, known).run("train_step", passes, graph))
        assert recipe.decisions["targeted"] == target
    assert runs == ["plain", "targeted", "last", "targeted", "last"]
    assert found[0] is found[2] and found[0] is not found[1]
