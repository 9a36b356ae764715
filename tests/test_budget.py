"""The search for a program within a budget, with a compiler that counts; and the passes that it need not repeat."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from pockc.budget import within
from pockc.errors import BudgetError
from pockc.ir import Builder, Graph, TensorType
from pockc.optim import SGD
from pockc.pipeline import Known, Manager, Pass
from pockc.recipe import Recipe

STATES = 1000


@dataclass(frozen=True)
class Planned:
    """Stands for a `Program`."""

    transient: int
    metadata: dict[str, Any] = field(default_factory=dict)
    state_bytes: int = STATES

    @property
    def arena_bytes(self) -> int:
        return STATES + self.transient

    @property
    def memory(self) -> Any:
        return SimpleNamespace(peak_bytes=self.arena_bytes)


@dataclass
class Compiler:
    """Misses every target by ``miss`` bytes, down to ``least``; the other entries take ``others`` bytes."""

    miss: int = 0
    least: int = 100
    others: int = 0
    asked: list[tuple[int | None, bool]] = field(default_factory=list)

    def plan(self, recipe: Recipe, only_step: bool) -> Planned:
        target = recipe.transient_target
        self.asked.append((target, only_step))
        step = 5000 if target is None else max(self.least, min(target, 5000) + self.miss)
        recipe.decisions["estimated_seconds"] = 1 / step
        return Planned(step if only_step else max(step, self.others))


def fitted(compiler: Compiler, budget: int) -> Any:
    return within(budget, Recipe(trained={}, optimizer=SGD(lr=0.1)), compiler.plan)  # type: ignore[arg-type]


def test_a_budget_above_the_peak_takes_one_plan() -> None:
    compiler = Compiler()
    assert fitted(compiler, 6000).transient == 5000
    assert compiler.asked == [(None, False)]


def test_programs_whose_step_is_too_large_are_not_completed() -> None:
    compiler = Compiler(miss=40)
    program = fitted(compiler, 3000)
    assert program.memory.peak_bytes <= 3000 and program.metadata["budget"]["unconstrained_bytes"] == 6000
    assert compiler.asked[1:4] == [(2000, True), (1960, True), (1960, False)]
    complete = [target for target, only_step in compiler.asked[1:] if not only_step]
    assert all(target is not None and target + 40 <= 2000 for target in complete)


def test_other_entries_count_too() -> None:
    with pytest.raises(BudgetError) as raised:
        fitted(Compiler(others=2500), 3000)
    assert raised.value.smallest == STATES + 2500


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
