"""Figures that the memory benchmark takes from plans alone: tightness of placements, and the published comparison."""

import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pockc
from benchmarks import report, zoo
from benchmarks.verify_zoo import SCHEMES, SIZES, applies, loss_of
from pockc.scheme import Channels, Rule

TIGHTNESS_MEDIAN = 1.01
TIGHTNESS_WORST = 1.03

# Models of random schemes: the cheapest to compile of each kind.
RANDOM_MODELS = ("mcunet_5fps", "mobilenet_v2", "minilm_l6", "llama_tiny", "efficientnet_lite0", "distilbert")
SEED = 0


@dataclass(frozen=True, slots=True)
class Tightness:
    """How close a plan comes to what is alive at the worst call of its order, in bytes.

    Only what the planner places is counted: transient tensors and workspaces, not parameters and optimizer state,
    which lie side by side below them.
    """

    model: str
    scheme: str
    planned_bytes: int
    live_bytes: int

    @property
    def ratio(self) -> float:
        """Planned over alive, at least 1."""
        return self.planned_bytes / self.live_bytes


def tightness_of(program: pockc.Program, model: str, scheme: str) -> Tightness:
    """Of the entries of a program the largest plan, over the largest number of live bytes."""
    placements = program.placements.values()
    return Tightness(model, scheme, max(p.nbytes for p in placements), max(p.max_live_bytes for p in placements))


def zoo_tightness(small: bool) -> Iterator[Tightness]:
    """Every zoo model with every scheme that applies to it."""
    for name, make in zoo.ZOO.items():
        model, inputs = make(**(zoo.SMALL if small else SIZES)[name])
        for scheme in (scheme for scheme in SCHEMES if applies(name, scheme)):
            program = pockc.build(model, inputs, loss=loss_of(name), optimizer=pockc.SGD(lr=1e-3), scheme=scheme)
            yield tightness_of(program, name, scheme)


def random_tightness(count: int, small: bool) -> Iterator[Tightness]:
    """Random schemes over several models, the same in every run."""
    generator = random.Random(SEED)
    made = {name: zoo.ZOO[name](**(zoo.SMALL if small else SIZES)[name]) for name in RANDOM_MODELS[:count]}
    for index in range(count):
        name = RANDOM_MODELS[index % len(RANDOM_MODELS)]
        model, inputs = made[name]
        shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
        scheme = random_scheme(shapes, generator, f"random-{index}")
        program = pockc.build(model, inputs, loss=loss_of(name), optimizer=pockc.SGD(lr=1e-3), scheme=scheme)
        yield tightness_of(program, name, scheme.name)


def random_scheme(shapes: dict[str, tuple[int, ...]], generator: random.Random, name: str) -> pockc.Scheme:
    """A random share of the parameters; of some convolution weights among them a random share of the channels."""
    share = generator.uniform(0.03, 1.0)
    chosen = [key for key in shapes if generator.random() < share] or [generator.choice(list(shapes))]
    partial = {key for key in chosen if len(shapes[key]) == 4 and generator.random() < 0.4}
    rules = [_partial_rule(key, generator) for key in chosen if key in partial]
    # A glob, because only exact names must not be those of batch norm scales, which stay frozen.
    globs = tuple(f"[{key[0]}]{key[1:]}" for key in chosen if key not in partial)
    head = Rule(preset="head")  # so that something is left to train in any case
    return pockc.Scheme(name=name, update=(head, *rules, *([Rule(tensors=globs)] if globs else [])))


def _partial_rule(name: str, generator: random.Random) -> Rule:
    fraction = generator.choice((0.125, 0.25, 0.5))
    return Rule(tensors=(name,), channels=Channels(fraction, "first"))


def measure_tightness(random_schemes: int, small: bool) -> list[Tightness]:
    """Of the zoo and of random schemes, with a line of progress per plan."""
    found = []
    for part in (zoo_tightness(small), random_tightness(random_schemes, small)):
        for result in part:
            found.append(result)
            print(f"plan of {result.model} {result.scheme}: {result.ratio:.4f}", file=sys.stderr, flush=True)
    return found


def tightness_bars(found: Sequence[Tightness]) -> list[report.Bar]:
    """Of the median and of the worst plan."""
    ratios = [result.ratio for result in found]
    worst = max(found, key=lambda result: result.ratio)
    return [
        report.Bar(f"planned / live bytes, median of {len(found)} plans", statistics.median(ratios), TIGHTNESS_MEDIAN),
        report.Bar(f"planned / live bytes, worst plan ({worst.model} {worst.scheme})", worst.ratio, TIGHTNESS_WORST),
    ]


def summary(found: Sequence[Tightness]) -> str:
    """One line over all plans."""
    ratios = [result.ratio for result in found]
    worst, median = max(ratios), statistics.median(ratios)
    return f"{len(found)} plans, at most {worst:.4f} of what is alive, {median:.4f} in the median"


@dataclass(frozen=True, slots=True)
class Published:
    """A figure of the literature beside a plan of ours. Bytes are in the unit that the source gives."""

    work: str
    figure: str
    source: str
    difference: str  # between their work and ours
    model: str
    arguments: dict[str, Any]
    scheme: str
    counts_weights: bool  # whether the figure includes frozen weights


_LADDER = "tiny-training repository (MCUNetV3, arXiv 2206.15472), memory ladder; the model's name is not checked"
_MCU = "tiny-training repository (MCUNetV3, arXiv 2206.15472), figure"
_TABLE = "PockEngine (arXiv 2310.17752), memory table; cell not checked against the paper"
_INT8 = "not the same: theirs is int8 with quantisation-aware scaling, ours float32"
_FP32_LADDER = "same engine duty; their input size is not given, ours is 128 px"
_PROCESS = (
    "not the same: theirs is a process on a GPU board with its libraries, ours planned arena and weights on a CPU"
)
_MOBILENET_035: dict[str, Any] = {"batch_size": 1, "image_size": 128, "width": 0.35}
_MCUNET: dict[str, Any] = {"batch_size": 1, "image_size": 128}


def _ladder(work: str, figure: str, difference: str, scheme: str = "full") -> Published:
    return Published(f"MobileNetV2-w0.35 b1, {work}", figure, _LADDER, difference, "mobilenet_v2", _MOBILENET_035,
                     scheme, counts_weights=False)  # fmt: skip


def _board(model: str, batch_size: int, scheme: str, figure: str) -> Published:
    work = f"{model} b{batch_size} {scheme}, Jetson"
    return Published(work, figure, _TABLE, _PROCESS, model, {"batch_size": batch_size}, scheme, counts_weights=True)


PUBLISHED = (
    _ladder("TensorFlow full", "652 MB", "theirs is another engine, a whole process; their input size is not given"),
    _ladder("PyTorch full", "303 MB", "theirs is another engine, a whole process; their input size is not given"),
    _ladder("MNN full", "41.5 MB", "theirs is another engine; their input size is not given, ours is 128 px"),
    _ladder("Tiny Training Engine full", "5.7 MB", _FP32_LADDER),
    _ladder("+ int8", "2.9 MB", _INT8),
    _ladder("+ int8, sparse", "355 KB", f"{_INT8}; their scheme was searched for this width", "sparse"),
    _ladder("+ int8, sparse, reordered", "141 KB", f"{_INT8}; their scheme was searched for this width", "sparse"),
    Published("MCUNet-5fps b1 full", "3650 KB", _MCU, _INT8, "mcunet_5fps", _MCUNET, "full", counts_weights=False),
    Published(
        "MCUNet-5fps b1 sparse, reordered", "173 KB", _MCU, f"{_INT8}; same model, size and 100 KB scheme",
        "mcunet_5fps", _MCUNET, "sparse", counts_weights=False,
    ),
    _board("mobilenet_v2", 1, "full", "729 MB"),
    _board("mobilenet_v2", 1, "sparse", "435 MB"),
    _board("mobilenet_v2", 16, "full", "1.2 GB"),
    _board("mobilenet_v2", 16, "sparse", "819 MB"),
    _board("resnet50", 1, "full", "827 MB"),
    _board("resnet50", 1, "sparse", "663 MB"),
    _board("resnet50", 16, "sparse", "885 MB"),
    _board("bert_base", 1, "full", "1.7 GB"),
    _board("bert_base", 1, "sparse", "1.4 GB"),
)  # fmt: skip


def plan_published() -> list[dict[str, Any]]:
    """Our bytes for every published figure; each distinct program is planned once."""
    planned: dict[str, pockc.MemoryReport] = {}
    rows = []
    for row in PUBLISHED:
        key = f"{row.model} {row.arguments} {row.scheme}"
        if key not in planned:
            planned[key] = _plan(row)
            print(f"plan of {key}", file=sys.stderr, flush=True)
        memory = planned[key]
        ours = memory.peak_bytes if row.counts_weights else memory.arena_bytes
        rows.append({**asdict(row), "ours_bytes": ours})
    return rows


def _plan(row: Published) -> pockc.MemoryReport:
    model, inputs = zoo.ZOO[row.model](**row.arguments)
    return pockc.build(model, inputs, optimizer=pockc.SGD(lr=1e-3), scheme=row.scheme).memory


def print_published(rows: Sequence[dict[str, Any]]) -> None:
    """The comparison with what other engines publish, and what is not the same about it."""
    report.print_table(
        "Published figures (float32 plans of ours: arena, with mapped weights where the published figure has them)",
        ["work", "published", "ours MB", "same work?", "source"],
        [
            [row["work"], row["figure"], report.megabytes(row["ours_bytes"]), row["difference"], row["source"]]
            for row in rows
        ],
    )
    print(
        "Not comparable at all, hence not in the table: Llama2-7B on a Jetson Orin, 45.1 GB in PyTorch, 43.1 GB full, "
        "31.2 GB sparse (half precision, GPU)."
    )
