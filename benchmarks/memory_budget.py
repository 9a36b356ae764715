"""Builds under a memory budget: that they keep it on the runtime's own count, train alike, and what they cost in time.

For each model a program without a budget is built first, then one within each share of that program's peak. Where the
compiler says that a budget cannot be met, the least that it names has to be met instead; smaller shares are then not
asked for again, since a refusal takes the builds of all that it advises.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite, nan
from pathlib import Path
from statistics import median
from typing import Any

import pockc
from benchmarks import memory_peer, report, zoo
from benchmarks.verify_zoo import loss_of
from pockc.bench import time_in_turn
from pockc.errors import BudgetError
from pockc.frontend.torch_parity import named_arrays
from pockc.ir import Array
from pockc.parity import LOSS_TOLERANCE, batches

SHARES = (1.0, 0.75, 0.5, 0.35)  # of the peak without a budget
LOSS_STEPS = 5
ROUNDS = (3, 15)  # of timing, at the least and at the most: in each, both programs run a step after an untimed one
TIMED_SECONDS = 20  # about: slow programs get fewer rounds
SEED = 0  # of the batches

# Every parameter is trained, with plain SGD: there is no optimizer state, and activations are most of the peak.
MODELS: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {"batch_size": 8, "image_size": 224},
    "resnet50": {"batch_size": 8, "image_size": 112},
    "mcunet_5fps": {"batch_size": 8, "image_size": 128},
    "minilm_l6": {"batch_size": 8, "sequence_length": 128},
    "llama_tiny": {"batch_size": 2, "sequence_length": 256},
}


@dataclass(frozen=True, slots=True)
class Built:
    """A program in a file, and what it says of itself.

    ``runtime_bytes`` is what the runtime counts after its steps, arena and mapped weights; ``losses`` are those steps'.
    """

    file: Path
    peak_bytes: int
    runtime_bytes: int
    losses: tuple[float, ...]
    decisions: Mapping[str, Any]  # metadata["budget"]
    seconds: float  # of the processor, to build it
    step_seconds: float  # about


@dataclass(frozen=True, slots=True)
class Constrained:
    """A program under a budget beside the one without, all sizes in bytes.

    ``smallest_bytes`` is set where the compiler refused ``budget_bytes`` and named this instead; the rest is then about
    the program with exactly that budget, and None where it was refused as well.
    """

    model: str
    arguments: dict[str, Any]
    share: float
    budget_bytes: int
    smallest_bytes: int | None
    unconstrained_bytes: int
    peak_bytes: int | None = None
    runtime_bytes: int | None = None
    decisions: Mapping[str, Any] | None = None
    loss_error: float = inf  # the largest relative difference of a step's loss
    cpu_ms: float | None = None
    slowdown: float | None = None  # CPU time of a step over that without a budget
    build_seconds: float | None = None

    @property
    def title(self) -> str:
        """What a bar and a row are about."""
        return f"{self.model} within {100 * self.share:.0f}%"

    @property
    def limit_bytes(self) -> int:
        """The budget that the program was built with."""
        return self.smallest_bytes or self.budget_bytes

    def bars(self) -> list[report.Bar]:
        """That there is a program, that it keeps its budget, and that it trains like the one without."""
        what = "the least that can be met" if self.smallest_bytes else "the budget"
        used = self.runtime_bytes / self.limit_bytes if self.runtime_bytes is not None else nan
        bars = [
            report.Bar(f"{self.title}: bytes on the runtime's count / {what}", used, at_most=1.0),
            report.Bar(f"{self.title}: worst of {LOSS_STEPS} losses", self.loss_error, at_most=LOSS_TOLERANCE),
        ]
        if self.smallest_bytes:
            least = self.smallest_bytes / self.budget_bytes
            bars.append(report.Bar(f"{self.title}: the least that can be met / the refused budget", least, at_least=1))
        if self.decisions:
            known = self.decisions["unconstrained_bytes"] / self.unconstrained_bytes
            bars.append(report.Bar(f"{self.title}: noted / true peak without a budget", known, 1.0, 1.0))
        return bars

    def as_json(self) -> dict[str, Any]:
        """All figures; a loss error that is not finite, which JSON has no number for, is null."""
        return {**asdict(self), "loss_error": self.loss_error if isfinite(self.loss_error) else None}


def measure(
    models: Sequence[str], *, small: bool, each: Callable[[list[Constrained]], None] = lambda found: None
) -> list[Constrained]:
    """Every share of every model; after each, ``each`` is called with what has been found up to there."""
    found: list[Constrained] = []
    for name in models:
        arguments = zoo.SMALL[name] if small else MODELS[name]
        with tempfile.TemporaryDirectory(prefix="pockc-budget-") as folder:
            for result in _Model(name, dict(arguments), Path(folder)).constrained():
                found.append(result)
                each(found)
    return found


class _Model:
    """A model with its programs by budget; None is the one without."""

    def __init__(self, name: str, arguments: dict[str, Any], folder: Path) -> None:
        self.name, self.arguments, self.folder = name, arguments, folder
        self.model, self.inputs = zoo.ZOO[name](**arguments)
        self.loss = loss_of(name)
        self.built: dict[int | None, Built] = {}
        self.times: dict[int, tuple[float, float]] = {}  # by budget, CPU milliseconds of a step, and without a budget
        self.least: int | None = None  # what the first refusal named
        self.refused: set[int] = set()  # of what was named as the least

    def constrained(self) -> Iterator[Constrained]:
        """All shares."""
        free = self._build(None)
        for share in SHARES:
            yield self._with_figures(self._share(share, free), free)

    def _share(self, share: float, free: Built) -> Constrained:
        """Builds what the share needs; the figures follow."""
        budget = int(share * free.peak_bytes)
        known = self.least is not None and budget < self.least
        if not known:
            try:
                self._build(budget)
            except BudgetError as error:
                self.least = error.smallest
                self._build_least(error.smallest)
                known = True
        return Constrained(self.name, self.arguments, share, budget, self.least if known else None, free.peak_bytes)

    def _build_least(self, budget: int) -> None:
        if budget in self.built or budget in self.refused:
            return
        try:
            self._build(budget)
        except BudgetError as error:
            self.refused.add(budget)
            print(f"{self.name}: what was named as the least is refused: {error}", file=sys.stderr, flush=True)

    def _with_figures(self, row: Constrained, free: Built) -> Constrained:
        if row.limit_bytes in self.refused:
            return row
        built = self.built[row.limit_bytes]
        if row.limit_bytes not in self.times:
            self.times[row.limit_bytes] = self._timed(built, free)
        taken, taken_free = self.times[row.limit_bytes]
        return replace(
            row,
            peak_bytes=built.peak_bytes,
            runtime_bytes=built.runtime_bytes,
            decisions=built.decisions,
            loss_error=worst_error(built.losses, free.losses),
            cpu_ms=taken,
            slowdown=taken / taken_free,
            build_seconds=built.seconds,
        )

    def _timed(self, built: Built, free: Built) -> tuple[float, float]:
        """CPU milliseconds of a step of both, in turns, so that a busy spell of the machine hits them alike."""
        files = {"within": built.file, "without": free.file}
        least, most = ROUNDS
        rounds = max(least, min(most, int(TIMED_SECONDS / (2 * (built.step_seconds + free.step_seconds)))))
        by_round, _ = time_in_turn(files, "train_step", rounds, rounds=rounds, warm_up=1)
        within, without = (median(sum(by_round[name], ())) for name in files)
        return within, without

    def _build(self, budget: int | None) -> Built:
        """The program within a budget, run for its losses. Raises BudgetError."""
        started = time.process_time()
        limit: dict[str, Any] = {} if budget is None else {"memory_budget": budget}
        optimizer = pockc.SGD(lr=memory_peer.LEARNING_RATE)
        program = pockc.build(self.model, self.inputs, self.loss, optimizer, "full", **limit)
        seconds = time.process_time() - started
        file = self.folder / f"{budget}.pock"
        program.save(file)
        started = time.process_time()
        with pockc.Session(file) as session:
            losses = tuple(session.train_step(**batch) for batch in self._batches(program))
            memory = session.memory
        taken = memory.arena_bytes + memory.mapped_bytes
        decisions = program.metadata.get("budget", {})
        step_seconds = (time.process_time() - started) / LOSS_STEPS
        peak = program.memory.peak_bytes
        self.built[budget] = Built(file, peak, taken, losses, decisions, seconds, step_seconds)
        limits = "no budget" if budget is None else f"{report.megabytes(budget)} MB"
        print(
            f"{self.name}, {limits}: {report.megabytes(taken)} MB, built in {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return self.built[budget]

    def _batches(self, program: pockc.Program) -> list[dict[str, Array]]:
        examples = named_arrays(self.model, self.inputs)
        return list(batches(examples, program.entries["train_step"], self.loss, LOSS_STEPS, SEED))


def worst_error(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of losses; inf where one is not finite."""
    errors = [abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True)]
    return max(error if isfinite(error) else inf for error in errors)


# Headings of a row.
COLUMNS = (
    "program", "without MB", "budget MB", "least MB", "planned MB", "runtime MB", "micro-batch", "computed again",
    "saved bits", "loss error", "ms per step", "slowdown", "estimated", "build CPU s",
)  # fmt: skip


def print_budgets(found: Sequence[Constrained]) -> None:
    """A row for every share of every model."""
    title = "Builds under a memory budget: all parameters trained, SGD; CPU time on one thread"
    report.print_table(title, COLUMNS, [_row(result) for result in found])


def progress(result: Constrained) -> str:
    """A row as a line of text."""
    pairs = zip(COLUMNS[1:], _row(result)[1:], strict=False)
    return f"{result.title}: " + ", ".join(f"{name} {value}" for name, value in pairs if value)


def _row(result: Constrained) -> list[str]:
    head = [
        result.title,
        report.megabytes(result.unconstrained_bytes),
        report.megabytes(result.budget_bytes),
        report.megabytes(result.smallest_bytes) if result.smallest_bytes else "",
    ]
    if result.peak_bytes is None or result.runtime_bytes is None or result.decisions is None:
        return [*head, "refused"]
    choice = result.decisions
    return [
        *head,
        report.megabytes(result.peak_bytes),
        report.megabytes(result.runtime_bytes),
        f"{choice['micro_batch']} of {choice['batch']}",
        str(len(choice["recomputed"])),
        str(choice["saved_bits"]),
        f"{result.loss_error:.1e}",
        f"{result.cpu_ms:.1f}",
        f"{result.slowdown:.2f}",
        f"{choice['estimated_slowdown']:.2f}",
        f"{result.build_seconds:.0f}",
    ]


def summary(found: Sequence[Constrained]) -> str:
    """The figures in one clause."""
    slowdowns = [result.slowdown for result in found if result.slowdown is not None]
    errors = [result.loss_error for result in found]
    slowest = f"at most {max(slowdowns, default=0):.2f} times the time"
    return f"{len(found)} budgets, {slowest}, losses within {max(errors):.1e}"
