"""Builds under a memory budget: the fastest program whose planned peak is within it, or an error that says what fits.

The budget is for everything that a program occupies: the arena and the frozen weights that are mapped from the file. A
pass chooses by estimates (:mod:`pockc.passes.fit_memory`); here its target is corrected until the finished plan fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pockc.errors import BudgetError, UserError
from pockc.program import Program
from pockc.recipe import Recipe

ATTEMPTS = 5  # targets that are tried before the smallest program
TIGHT = 0.92  # of the budget: a plan that uses as much is not worth another attempt

Plan = Callable[[Recipe, int | None], Program]


def within(budget: int, recipe: Recipe, plan: Plan) -> Program:
    """The program that ``plan`` makes of the recipe with the loosest target that keeps the budget.

    ``metadata["budget"]`` of the result says what was chosen and what it costs.

    Args:
        budget: bytes that arena and mapped weights may occupy together.
        recipe: everything else.
        plan: makes a program; where its training step alone takes more bytes than the limit that is given, the other
            entries may be left out. Notes its choice in the recipe's ``decisions``.

    Raises:
        BudgetError: even the smallest program is larger.
    """
    unconstrained = plan(recipe, None)
    peak = unconstrained.memory.peak_bytes
    if peak <= budget:
        return _noted(unconstrained, recipe, budget, peak)
    fixed = peak - (unconstrained.arena_bytes - unconstrained.state_bytes)  # states and mapped weights
    if found := _fastest(budget, budget - fixed, recipe, plan):
        return _noted(*found, budget, peak)
    trial = replace(recipe, transient_target=0, decisions={})
    program = plan(trial, None)
    smallest = program.memory.peak_bytes
    if smallest > budget:
        raise BudgetError(
            f"no program fits into {budget:,} bytes: the smallest for this model, scheme and batch size takes "
            f"{smallest:,}, of which {fixed:,} are parameters, optimizer state and weights",
            smallest=smallest,
        )
    return _noted(program, trial, budget, peak)


def _fastest(budget: int, target: int, recipe: Recipe, plan: Plan) -> tuple[Program, Recipe] | None:
    """The fastest program within the budget of a few targets: lower ones while plans are too large, then between."""
    best: tuple[Program, Recipe] | None = None
    too_high = fits = 0
    for _ in range(ATTEMPTS):
        if target <= 0:
            break
        trial = replace(recipe, transient_target=target, decisions={})
        program = plan(trial, budget)
        peak = program.memory.peak_bytes
        if peak > budget:
            too_high = target
            target = (fits + target) // 2 if fits else target - (peak - budget)
            continue
        fits = target
        if best is None or trial.decisions["estimated_seconds"] < best[1].decisions["estimated_seconds"]:
            best = program, trial
        if not too_high or peak > TIGHT * budget:
            break
        target = (target + too_high) // 2
    return best


def _noted(program: Program, recipe: Recipe, budget: int, unconstrained: int) -> Program:
    note = {"bytes": budget, "unconstrained_bytes": unconstrained, "saved_bits": 32, **recipe.decisions}
    return replace(program, metadata={**program.metadata, "budget": note})


@dataclass(frozen=True, slots=True)
class Alternative:
    """Something that the user could change, and the build of it under the same budget."""

    text: str
    build: Callable[[], Program]


def advised(error: BudgetError, alternatives: Iterable[Alternative]) -> BudgetError:
    """The error with what would fit: every alternative is built to see."""
    fitting = []
    for alternative in alternatives:
        try:
            program = alternative.build()
        except UserError:
            continue  # it does not fit either, or the model does not take it
        fitting.append(f"{alternative.text} ({program.memory.peak_bytes:,} bytes)")
    found = (
        f"What would fit: {'; '.join(fitting)}." if fitting else "No preset scheme and no smaller batch fits either."
    )
    return BudgetError(error.found, smallest=error.smallest, instead=f"Allow {error.smallest:,} bytes. {found}")
