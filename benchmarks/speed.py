"""The time of a training step, pockc and its peers side by side: `python -m benchmarks.speed`.

Every side is a process of its own (speed_sides/), which prepares the same step, from the same model, weights, batch,
trained parameters and optimizer (plain SGD), and runs it on command. First each takes some real steps; its losses have
to be those of the others, within `LOSS_TOLERANCE`, before any of its times is believed. Then the learning rate is set
to zero, so that all further steps do the same work, and the sides take turns: A B C A B C ..., so that a busy spell of
a shared machine hits them all. A figure is CPU time of the process on one thread, the median of the medians of its
turns; a ratio is one of such figures of the same run. With `--threads 2` there is time by the clock on the wall as
well, which other work on the machine does disturb.

pockc has a memory budget of 4 GiB, which no case fills: PyTorch takes what it wants as well. A program that is built
without a budget computes again what is cheap to compute: its arena is up to 22% smaller, a step up to 12% longer.

PyTorch runs in three ways: eager with contiguous tensors, eager with channels-last ones (where there are convolutions),
and `torch.compile`. "Best" is the fastest of those for a case. Batch norms are in eval mode there; pockc folds them.
`pockc-bf16` and PyTorch's `autocast`, with either layout, keep activations in bf16, and multiply so where the CPU can:
their losses may differ by its roundoff, and they are compared with each other.
Compiling takes minutes per case; what was compiled is kept in .cache/peers/inductor, so the next run is quick. With
`--compile-minutes` a run compiles no longer than that in all, and lists the cases that it had no time for.
"""

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import report, speed_report, zoo
from benchmarks.speed_sides.protocol import ROOT, Side, SideError, Steps, Task
from pockc.parity import LOSS_TOLERANCE, tolerances

PEERS = ROOT / ".cache" / "peers"
REAL_STEPS = 2  # that are taken with a learning rate, and one more loss is seen after them
SCHEMES = ("full", "bias-only", "sparse")
PYTORCH = ("contiguous", "channels-last", "compile")
BF16 = speed_report.BF16
CACHED = speed_report.CACHED
OTHER_LOSSES = "its losses"  # how an error of that kind begins
TURN_MS = 250.0  # a turn has as many steps as fit, at least one
LEAST_ROUNDS, MOST_ROUNDS = 3, 12


@dataclass(frozen=True, slots=True)
class Case:
    """A model at a size, and the schemes that it is measured with."""

    key: str
    title: str
    model: str
    arguments: dict[str, Any]
    vision: bool
    learning_rate: float
    loss: str = "cross_entropy"
    schemes: tuple[str, ...] = SCHEMES


def _images(size: int, batch: int) -> dict[str, Any]:
    return {"batch_size": batch, "image_size": size}


def _tokens(batch: int) -> dict[str, Any]:
    return {"batch_size": batch, "sequence_length": 128}


# The learning rates move the loss of random weights well beyond the tolerance, and not so far that rounding decides.
CASES = (
    Case("mobilenet-b1", "MobileNetV2 224 px b1", "mobilenet_v2", _images(224, 1), True, 1e-4),
    Case("mobilenet-b8", "MobileNetV2 224 px b8", "mobilenet_v2", _images(224, 8), True, 1e-4),
    Case("efficientnet-b8", "EfficientNet-Lite0 96 px b8", "efficientnet_lite0", _images(96, 8), True, 1e-4),
    Case("resnet-b1", "ResNet-50 224 px b1", "resnet50", _images(224, 1), True, 3e-4),
    Case("resnet-b8", "ResNet-50 224 px b8", "resnet50", _images(224, 8), True, 3e-4),
    Case("minilm-b8", "MiniLM-L6 128 tokens b8", "minilm_l6", _tokens(8), False, 1e-2),
    Case("bert-b8", "BERT-base 128 tokens b8", "bert_base", _tokens(8), False, 1e-2),
    Case("distilbert-b8", "DistilBERT 128 tokens b8", "distilbert", _tokens(8), False, 1e-2),
    Case("llama-b4", "Llama 8x512 128 tokens b4", "llama_8l", _tokens(4), False, 1e-2, loss="causal_lm",
         schemes=("full", "sparse")),  # it has no biases
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Way:
    """How to start a side. ``environment`` is the folder in PEERS of a peer that needs its own Python."""

    module: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    compiles: bool = False
    loss_tolerance: float = LOSS_TOLERANCE

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return PEERS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)


WAYS: dict[str, Way] = {
    "pockc": Way("pockc_side", ("whole",)),
    CACHED: Way("pockc_side", ("cached",)),
    BF16: Way("pockc_side", ("bf16",), loss_tolerance=tolerances("bf16")[0]),
    "contiguous": Way("pytorch_side", ("contiguous",)),
    "channels-last": Way("pytorch_side", ("channels-last",)),
    "compile": Way("pytorch_side", ("compile",), compiles=True),
    "autocast": Way("pytorch_side", ("autocast",), loss_tolerance=tolerances("bf16")[0]),
    "autocast-channels-last": Way("pytorch_side", ("autocast-channels-last",), loss_tolerance=tolerances("bf16")[0]),
    "tensorflow": Way("tensorflow_side", environment="tensorflow"),
    "jax": Way("jax_side", environment="jax"),
    "onnxruntime": Way("onnxruntime_side", environment="onnxruntime"),
    "executorch": Way("executorch_side", environment="executorch"),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """What a side took: the median step of each turn, in milliseconds."""

    cpu_ms: tuple[float, ...]
    wall_ms: tuple[float, ...]
    steps: int
    losses: tuple[float, ...]
    loss_error: float

    @property
    def cpu(self) -> float:
        """CPU milliseconds of a step."""
        return statistics.median(self.cpu_ms)

    @property
    def wall(self) -> float:
        """Milliseconds of a step by the clock on the wall."""
        return statistics.median(self.wall_ms)


@dataclass(frozen=True, slots=True)
class Result:
    """A case with a scheme on some threads: what each side took, or why it has no figure; the trained parameters."""

    case: Case
    scheme: str
    threads: int
    timings: dict[str, Timing]
    errors: dict[str, str]
    trained: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Case and scheme."""
        return f"{self.case.title} {self.scheme}"

    def best_pytorch(self) -> str | None:
        """The fastest of PyTorch's ways that were measured."""
        ways = [way for way in PYTORCH if way in self.timings]
        return min(ways, key=lambda way: self.timings[way].cpu, default=None)

    def ratio(self, way: str | None) -> float | None:
        """CPU time of a side over pockc's."""
        if way not in self.timings or "pockc" not in self.timings:
            return None
        return self.timings[way].cpu / self.timings["pockc"].cpu

    def as_json(self) -> dict[str, Any]:
        """All turns, and the figures derived from them."""
        sides = {
            way: {"cpu_ms_per_step": timing.cpu, "wall_ms_per_step": timing.wall, **asdict(timing)}
            for way, timing in self.timings.items()
        }
        return {
            "case": asdict(self.case),
            "scheme": self.scheme,
            "threads": self.threads,
            "sides": sides,
            "errors": self.errors,
            "best_pytorch": self.best_pytorch(),
            "ratios": {way: self.ratio(way) for way in self.timings if way != "pockc"},
        }


@dataclass(slots=True)
class Clock:
    """The time that is left for compiling, in seconds; None: no end."""

    left: float | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts what happens inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.left is not None:
                self.left = max(0.0, self.left - (time.perf_counter() - started))


@dataclass(slots=True)
class Sides:
    """The processes of a run, started as they are needed: importing a library takes longer than most steps."""

    ways: Sequence[str]
    threads: int
    logs: Path
    compiling: Clock
    running: dict[str, Side] = field(default_factory=dict)

    def open(self, way: str, task: Task) -> tuple[str, ...]:
        """Prepares a task. Raises SideError; a side whose process has ended is started anew by the next task."""
        definition = WAYS[way]
        if not definition.python.exists():
            raise SideError(f"{definition.python.relative_to(ROOT)} is missing: run `make peers`")
        if definition.compiles and self.compiling.left == 0:
            raise SideError("the time for compiling was used up by earlier cases")
        if way not in self.running:
            self.running[way] = self._start(way)
        try:
            with self.compiling.running() if definition.compiles else contextlib.nullcontext():
                return self.running[way].open(task, self.compiling.left if definition.compiles else None)
        except SideError:
            self.close(way)
            raise

    def _start(self, way: str) -> Side:
        definition = WAYS[way]
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(PEERS / "inductor")} if definition.compiles else {}
        module = f"benchmarks.speed_sides.{definition.module}"
        log = self.logs / f"{way}.log"
        return Side(definition.python, module, definition.arguments, self.threads, log, variables)

    def close(self, way: str) -> None:
        """Ends a side, if it runs."""
        if side := self.running.pop(way, None):
            side.close()

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *error: object) -> None:
        for way in list(self.running):
            self.close(way)


def ways_of(case: Case, scheme: str, ways: Collection[str]) -> list[str]:
    """Those that make a difference: pockc first, channels-last only where there are images, a cache where it helps."""
    image_layouts = ("channels-last", "autocast-channels-last")
    left_out = {*(() if case.vision else image_layouts), *(() if scheme == "sparse" else (CACHED,))}
    return [way for way in WAYS if way in ways and way not in left_out]


def measure(case: Case, scheme: str, sides: Sides, folder: Path, seconds: float) -> Result:
    """One case with one scheme. Raises SideError where pockc itself fails."""
    task = Task(case.model, case.arguments, case.loss, scheme, case.learning_rate, sides.threads, str(folder),
                exported=any(WAYS[way].environment for way in sides.ways))  # fmt: skip
    errors: dict[str, str] = {}
    taken: dict[str, Steps] = {}
    for way in ways_of(case, scheme, sides.ways):
        try:
            trained = sides.open(way, task)
            task = replace(task, trained=trained)
            taken[way] = _real_steps(sides.running[way])
        except SideError as error:
            if way == "pockc":
                raise
            errors[way] = str(error)
    reference = taken.get("contiguous", taken["pockc"]).losses
    differences = {way: loss_error(steps.losses, reference) for way, steps in taken.items()}
    errors |= {
        way: f"{OTHER_LOSSES} {_shown(taken[way].losses)} are not those of the others, {_shown(reference)}"
        for way, difference in differences.items()
        if not difference <= WAYS[way].loss_tolerance
    }
    believed = {way: steps for way, steps in taken.items() if way not in errors}
    turns = take_turns({way: sides.running[way] for way in believed}, believed, seconds)
    timings = {
        way: Timing(
            cpu_ms=tuple(statistics.median(turn.cpu_ms) for turn in turns[way]),
            wall_ms=tuple(statistics.median(turn.wall_ms) for turn in turns[way]),
            steps=sum(len(turn.cpu_ms) for turn in turns[way]),
            losses=taken[way].losses,
            loss_error=differences[way],
        )
        for way in believed
    }
    return Result(case, scheme, sides.threads, timings, errors, task.trained)


def _real_steps(side: Side) -> Steps:
    """Steps that learn, and one that shows where they led; from then on nothing is learned."""
    learning = side.step(REAL_STEPS)
    side.stop_learning()
    after = side.step(1)
    return Steps(after.cpu_ms, after.wall_ms, (*learning.losses, *after.losses))


def take_turns(sides: Mapping[str, Side], known: Mapping[str, Steps], seconds: float) -> dict[str, list[Steps]]:
    """Rounds in which every side has its turn, about ``seconds`` in all, but at least LEAST_ROUNDS."""
    counts = {way: max(1, int(TURN_MS / steps.cpu_ms[-1])) for way, steps in known.items()}
    round_seconds = sum(1e-3 * counts[way] * steps.cpu_ms[-1] for way, steps in known.items())
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, round(seconds / max(round_seconds, 1e-9))))
    turns: dict[str, list[Steps]] = {way: [] for way in sides}
    for _ in range(rounds):
        for way, side in sides.items():
            turns[way].append(side.step(counts[way]))
    return turns


def loss_error(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference; infinite where a loss is not finite."""
    errors = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses, reference, strict=True)]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=math.inf)


def _shown(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.6g}" for loss in losses)


def measure_all(
    cases: Sequence[Case], schemes: Sequence[str], ways: Sequence[str], threads: int, seconds: float, compiling: Clock
) -> list[Result]:
    """Every case with every scheme, with a line of progress for each."""
    results = []
    with Sides(ways, threads, report.OUT / "speed", compiling) as sides:
        for case in cases:
            with tempfile.TemporaryDirectory(prefix="pockc-speed-") as folder:
                for scheme in (name for name in case.schemes if name in schemes):
                    started = time.perf_counter()
                    result = measure(case, scheme, sides, Path(folder), seconds)
                    results.append(result)
                    figures = ", ".join(f"{way} {timing.cpu:.1f}" for way, timing in result.timings.items())
                    line = f"{result.title}, threads {threads}: CPU ms {figures}; {time.perf_counter() - started:.0f} s"
                    print(line, file=sys.stderr, flush=True)
    return results


def bars_of(results: Sequence[Result]) -> list[report.Bar]:
    """What the ratios on one thread are held to."""
    bars = [
        bar
        for summary in speed_report.summaries(results)
        for bar in (
            report.Bar(f"{summary.what}, geometric mean", summary.mean, at_least=summary.mean_at_least),
            report.Bar(f"{summary.what}, worst case", summary.worst, at_least=summary.worst_at_least),
        )
        if bar.at_least is not None
    ]
    return bars


def truth_bars(results: Sequence[Result]) -> list[report.Bar]:
    """Whether figures may be believed: losses agree, and did move."""
    bars = []
    for result in results:
        losses = result.timings["pockc"].losses if "pockc" in result.timings else (math.nan, math.nan)
        moved = abs(losses[-1] - losses[0]) / abs(losses[0])
        wrong = sum(error.startswith(OTHER_LOSSES) for error in result.errors.values())
        bars.append(report.Bar(f"{result.title}: relative move of the loss", moved, at_least=LOSS_TOLERANCE))
        bars.append(report.Bar(f"{result.title}: sides with other losses", wrong, at_most=0))
    return bars


def run(
    cases: Sequence[Case],
    schemes: Sequence[str],
    ways: Sequence[str],
    threads: Sequence[int],
    output: Path,
    *,
    seconds: float,
    compile_minutes: float | None,
    judged: bool,
) -> int:
    """Measures, prints, writes the report and pictures.

    Returns:
        The exit code: 1 when a bar is missed.
    """
    started = time.perf_counter()
    clock = Clock(None if compile_minutes is None else 60 * compile_minutes)
    results = [r for count in threads for r in measure_all(cases, schemes, ways, count, seconds, clock)]
    single = [result for result in results if result.threads == 1]
    bars = truth_bars(results) + (bars_of(single) if judged else [])
    for count in threads:
        speed_report.print_cases([result for result in results if result.threads == count], count)
    speed_report.print_errors(results)
    if single:
        speed_report.print_summaries(single, judged)
    content = {
        "machine": report.machine(),
        "ways": {way: speed_report.versions(WAYS[way].python) for way in ways},
        "threads": list(threads),
        "judged": judged,
        "loss_tolerance": LOSS_TOLERANCE,
        "seconds": time.perf_counter() - started,
        "cases": [result.as_json() for result in results],
        "summaries": [asdict(summary) for summary in speed_report.summaries(single)],
        "bars": [bar.as_json() for bar in bars],
    }
    report.write_json(output, content)
    print(f"Report: {output}")
    if single:
        speed_report.plot(single, output.with_suffix(".png"))
        print(f"Picture: {output.with_suffix('.png')}")
    summary = f"{len(results)} cases in {(time.perf_counter() - started) / 60:.1f} minutes"
    return report.finish("bench-speed", summary, bars)


def quick_case(case: Case) -> Case:
    """The same case with a small model."""
    small = {**zoo.SMALL, "llama_8l": {"batch_size": 1, "sequence_length": 8}}
    return replace(case, title=f"small {case.key}", arguments=small[case.model])


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line."""
    keys = [case.key for case in CASES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=keys, default=keys, metavar="CASE", help=", ".join(keys))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES, metavar="SCHEME")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "all"], default=["pockc", *PYTORCH], metavar="WAY",
                        help=f"{', '.join(WAYS)} or all (default: pockc and PyTorch's)")  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N", help="one thread is what is judged")
    parser.add_argument("--seconds", type=float, default=6.0, help="of turns per case and scheme, all sides together")
    parser.add_argument("--compile-minutes", type=float, help="that torch.compile may take in all (no limit)")
    parser.add_argument("--quick", action="store_true", help="small models: shows that all works, judges no time")
    parser.add_argument("--output", type=Path, default=report.OUT / "speed.json")
    options = parser.parse_args(arguments)
    if not {"pockc", "all"}.intersection(options.ways):
        parser.error("pockc has to be one of the ways: the others train what it trains")
    chosen = [case for case in CASES if case.key in options.cases]
    ways = list(WAYS) if "all" in options.ways else options.ways
    return run(
        [quick_case(case) for case in chosen] if options.quick else chosen,
        options.schemes,
        ways,
        options.threads,
        options.output,
        seconds=options.seconds,
        compile_minutes=options.compile_minutes,
        judged=not options.quick,
    )


if __name__ == "__main__":
    sys.exit(main())
