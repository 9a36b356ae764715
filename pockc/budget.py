"""Builds under a memory budget: the fastest program whose planned peak is within it, or an error that says what fits.

The budget is for everything that a program occupies: the arena and the frozen weights that are mapped from the file. A
pass chooses by estimates (:mod:`pockc.passes.fit_memory`); here its target is corrected until the finished plan fits.

What finished plans take does not fall with their targets step by step. Whether a budget can be met is therefore decided
by a few targets that all budgets have in common, the `LADDER`: the least that an error names can be met, and nothing
below it. Targets between these only make programs faster, and so do targets above what a program takes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pockc.errors import BudgetError, UserError
from pockc.program import Program
from pockc.recipe import Recipe

LADDER = (0.5, 0.25, 0.0)  # targets, of the transient bytes without a budget
REFINEMENTS = 3  # targets between two of the ladder
TIGHT = 0.92  # of the budget: a plan that uses as much is not worth another attempt

Plan = Callable[[Recipe, int | None], Program]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of a target; ``recipe`` has the decisions."""

    target: int
    program: Program
    recipe: Recipe

    @property
    def peak(self) -> int:
        """Bytes of all that was planned."""
        return self.program.memory.peak_bytes

    @property
    def seconds(self) -> float:
        """The estimated time of a step."""
        return float(self.recipe.decisions["estimated_seconds"])


def within(budget: int, recipe: Recipe, plan: Plan) -> Program:
    """The fastest program within the budget among a few, which ``plan`` makes of the recipe with different targets.

    ``metadata["budget"]`` of the result says what was chosen and what it costs.

    Args:
        budget: bytes that arena and mapped weights may occupy together.
        recipe: everything else.
        plan: makes a program; where its training step alone takes more bytes than the limit that is given, the other
            entries may be left out. Notes its choice in the recipe's ``decisions``.

    Raises:
        BudgetError: no program of the ladder is within the budget; ``smallest`` is the same for every such budget.
    """
    unconstrained = plan(recipe, None)
    peak = unconstrained.memory.peak_bytes
    transient = unconstrained.arena_bytes - unconstrained.state_bytes
    fixed = peak - transient  # states and mapped weights

    def attempt(target: int, limit: int | None = budget) -> Attempt:
        trial = replace(recipe, transient_target=target, decisions={})
        return Attempt(target, plan(trial, limit), trial)

    if peak <= budget:
        found = Attempt(transient, unconstrained, recipe)
        if budget - fixed > transient and _computes_again(unconstrained):
            roomy = attempt(budget - fixed)
            found = roomy if roomy.peak <= budget and roomy.seconds < found.seconds else found
        return _noted(found.program, found.recipe, budget, peak)
    tried = []
    for target in _ladder(transient, budget - fixed):
        tried.append(attempt(target))
        if tried[-1].peak <= budget:
            found = _faster(tried, budget, budget - fixed, attempt)
            return _noted(found.program, found.recipe, budget, peak)
    smallest = _smallest(tried, peak, attempt)
    raise BudgetError(
        f"no program fits into {budget:,} bytes: the smallest for this model, scheme and batch size takes "
        f"{smallest:,}, of which {fixed:,} are parameters, optimizer state and weights",
        smallest=smallest,
    )


def _computes_again(program: Program) -> bool:
    """Whether there is something to keep where there is room: results of the forward pass, or logits of tiles."""
    nodes = (node for graph in program.entries.values() for node in graph.nodes)
    return any(node.origin.phase == "recompute" or node.op == "cross_entropy_grad_tile" for node in nodes)


def _ladder(transient: int, room: int) -> list[int]:
    """The targets: from the highest that leaves room for the rest of the program downwards, then the others."""
    targets = [int(share * transient) for share in LADDER]
    return [target for target in targets if target <= room] + [target for target in reversed(targets) if target > room]


def _faster(tried: list[Attempt], budget: int, room: int, attempt: Callable[[int], Attempt]) -> Attempt:
    """The fastest of the last attempt, which is within the budget, and of some with higher targets."""
    best = fits = tried[-1]
    missed = next((other for other in reversed(tried) if other.target > fits.target), None)
    target = _corrected(missed, fits, budget) if missed else room
    for _ in range(REFINEMENTS):
        if target <= fits.target or fits.peak > TIGHT * budget:
            break
        found = attempt(target)
        if found.peak > budget:
            missed = found
            target = _corrected(found, fits, budget)
            continue
        fits, best = found, min(best, found, key=lambda attempt: attempt.seconds)
        if missed is None:
            break
        target = (target + missed.target) // 2
    return best


def _corrected(missed: Attempt, fits: Attempt, budget: int) -> int:
    """A target for less by what a plan misses the budget by; between the two where that is too low."""
    target = missed.target - (missed.peak - budget)
    return target if target > fits.target else (fits.target + missed.target) // 2


def _smallest(tried: Iterable[Attempt], peak: int, attempt: Callable[[int, int | None], Attempt]) -> int:
    """The least that a program takes, of the ladder's and of the one without a budget, which takes ``peak``.

    Other entries may not have been planned: they can only add to what a training step takes.
    """
    smallest = peak
    for step in sorted(tried, key=lambda attempt: attempt.peak):
        if step.peak >= smallest:
            break
        smallest = min(smallest, attempt(step.target, None).peak)
    return smallest


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
