"""What training adds to the memory of a model, in pockc and in PyTorch: `python -m benchmarks.memory`.

The measure is everything that a training step needs beside the parameters themselves: saved activations, other
temporaries, workspace, gradients, optimizer state, the inputs. The optimizer is plain SGD.

pockc: `arena_bytes` of the plan, minus the bytes of the trained parameters, which lie in the arena. Frozen parameters
are mapped from the file; constants that the build made of them (folded batch norms) count as parameters up to the bytes
that the model has as frozen parameters and buffers, and what goes beyond is added to pockc's figure. The arena holds
all entries of the program, evaluation and inference at the same batch size included, has workspace for the threads of
the device (4), and a copy of the batch. Only the programs of the two Llama cases have no entry for inference, the
output of which is 66 MB of logits: PyTorch's process does training steps alone. They have evaluation, which counts
correct predictions instead of giving logits. One step is run, and what the runtime says that it allocated has to be the
plan, and its loss PyTorch's.

PyTorch: peak resident memory of a fresh process over three steps minus that right before the first one
(memory_peer.py), on one thread, the smaller figure of contiguous and channels-last. There the batch exists already.
Frozen tensors have `requires_grad` off, batch norm is in eval mode with a frozen gamma; of a weight that a scheme
updates in part, PyTorch trains the whole.

Process: what `pock-run` itself says about its resident memory at the peak, minus that before it loads the program,
against planned arena plus mapped weights. It makes its batch in the arena, and reads every page of the mapped weights
first: of an embedding table a step reads only the rows of its tokens, and the plan counts them all.

Builds under a memory budget have a table of their own (memory_budget.py). How close plans come to what is alive, over
the zoo and random schemes, is measured alone with `--plans-only`; `--random-schemes` says how many.

MCUNet with weights and activations of eight bits in its frozen prefix has a table of its own (memory_int8.py), beside
the figure that was published for it. That the chosen order of a small graph is the
best one is a matter of exact comparison: tests/passes/test_schedule.py.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pockc
from benchmarks import memory_budget, memory_int8, memory_peer, memory_plans, memory_tables, report, zoo
from pockc import abi
from pockc.entries import ENTRIES
from pockc.memory_report import LiveTensor
from pockc.parity import LOSS_TOLERANCE

PROCESS_SHARE, PROCESS_BYTES = 0.03, 1 << 20  # that resident memory may differ from the plan
GROUPS_SHOWN = 12  # of the tensors alive at the peak, per case


@dataclass(frozen=True, slots=True)
class Case:
    """A model and scheme with the bar that it is held to."""

    key: str
    title: str
    model: str
    arguments: dict[str, Any]
    scheme: str
    at_least: float | None = None  # PyTorch's added bytes over pockc's
    arena_at_most: int | None = None  # bytes of the arena; frozen weights are not in it
    loss: str = "cross_entropy"
    entries: tuple[str, ...] = ENTRIES


_MOBILENET = {"batch_size": 8, "image_size": 224}
_RESNET = {"batch_size": 8, "image_size": 224}
_BERT = {"batch_size": 8, "sequence_length": 128}
_LLAMA = {"batch_size": 1, "sequence_length": 512}
_WITHOUT_LOGITS = ENTRIES[:2]

CASES = (
    Case("mobilenet-full", "MobileNetV2 224 px b8 full", "mobilenet_v2", _MOBILENET, "full", 3.0),
    Case("mobilenet-bias", "MobileNetV2 224 px b8 bias-only", "mobilenet_v2", _MOBILENET, "bias-only", 10.0),
    Case("mobilenet-sparse", "MobileNetV2 224 px b8 sparse", "mobilenet_v2", _MOBILENET, "sparse", 20.0),
    Case("mobilenet-b1-sparse", "MobileNetV2 224 px b1 sparse", "mobilenet_v2", {**_MOBILENET, "batch_size": 1},
         "sparse", 8.0),
    Case("resnet-full", "ResNet-50 224 px b8 full", "resnet50", _RESNET, "full", 2.5),
    Case("resnet-sparse", "ResNet-50 224 px b8 sparse", "resnet50", _RESNET, "sparse", 4.0),
    Case("bert-full", "BERT-base 128 tokens b8 full", "bert_base", _BERT, "full", 1.8),
    Case("bert-sparse", "BERT-base 128 tokens b8 sparse", "bert_base", _BERT, "sparse", 2.0),
    Case("llama-full", "Llama 8x512 512 tokens b1 full", "llama_8l", _LLAMA, "full", 2.0, loss="causal_lm",
         entries=_WITHOUT_LOGITS),
    Case("llama-sparse", "Llama 8x512 512 tokens b1 sparse", "llama_8l", _LLAMA, "sparse", 4.0, loss="causal_lm",
         entries=_WITHOUT_LOGITS),
    Case("mcunet-b1-sparse", "MCUNet-5fps 128 px b1 sparse", "mcunet_5fps", {"batch_size": 1, "image_size": 128},
         "sparse", arena_at_most=1_000_000),
    # As it is fine-tuned: of the arena above, 0.64 MB are the head for ImageNet's classes.
    Case("mcunet-b1-sparse-10", "MCUNet-5fps 128 px b1 sparse, 10 classes", "mcunet_5fps",
         {"batch_size": 1, "image_size": 128, "num_classes": 10}, "sparse", arena_at_most=1_000_000),
    Case("mcunet-b1-sparse-bytes", "MCUNet-5fps 128 px b1 sparse, 10 classes, uint8 images", "mcunet_5fps",
         {"batch_size": 1, "image_size": 128, "num_classes": 10, "uint8_images": True}, "sparse",
         arena_at_most=1_000_000),
)  # fmt: skip

# A quick run takes the sizes of the tests; the bars of real sizes say nothing about those.
_QUICK_ARGUMENTS = {**zoo.SMALL, "llama_8l": {"batch_size": 1, "sequence_length": 16}}


@dataclass(frozen=True, slots=True)
class Plan:
    """The pockc side of a case, in bytes."""

    trained: tuple[str, ...]
    trained_elements: int
    model_bytes: int  # parameters and buffers of the model
    trained_bytes: int
    arena_bytes: int
    mapped_bytes: int
    by_kind: dict[str, int]
    at_peak: tuple[dict[str, Any], ...]
    tightness: memory_plans.Tightness
    entries: dict[str, int]  # transient bytes of each entry
    allocated_bytes: int
    allocated_mapped_bytes: int
    used_peak_bytes: int
    loss: float
    process: dict[str, Any]  # the report of `pock-run bench`

    @property
    def added_bytes(self) -> int:
        """What training adds to the parameters."""
        more_than_the_model = max(0, self.mapped_bytes - (self.model_bytes - self.trained_bytes))
        return self.arena_bytes - self.trained_bytes + more_than_the_model

    @property
    def mapped_shortfall(self) -> float:
        """Bytes that the runtime maps less than planned, as a share of the model."""
        return (self.mapped_bytes - self.allocated_mapped_bytes) / self.model_bytes

    @property
    def process_bytes(self) -> int:
        """Resident memory of `pock-run` at its peak beyond that before loading."""
        return int(self.process["rss_peak_bytes"] - self.process["rss_before_load_bytes"])

    @property
    def process_excess(self) -> float:
        """How far that is from the plan, in units of the tolerance."""
        planned = self.arena_bytes + self.mapped_bytes
        return abs(self.process_bytes - planned) / (PROCESS_SHARE * planned + PROCESS_BYTES)


@dataclass(frozen=True, slots=True)
class Result:
    """One case, measured on both sides."""

    case: Case
    plan: Plan
    pytorch: dict[str, memory_peer.Answer]  # by memory layout

    @property
    def best(self) -> memory_peer.Answer:
        """The layout in which PyTorch adds the least."""
        return min(self.pytorch.values(), key=lambda answer: answer.added_bytes)

    @property
    def ratio(self) -> float:
        """PyTorch's added bytes over pockc's."""
        return self.best.added_bytes / self.plan.added_bytes

    @property
    def loss_error(self) -> float:
        """Relative difference of the first loss, which is computed before any update."""
        error = abs(self.plan.loss - self.best.losses[0]) / abs(self.best.losses[0])
        return error if math.isfinite(error) else math.inf

    def bars(self, judged: bool) -> list[report.Bar]:
        """Of the case if `judged`, and of the truth of the figures in any case."""
        title, plan = self.case.title, self.plan
        bars = [
            report.Bar(f"{title}: allocated / planned arena", plan.allocated_bytes / plan.arena_bytes, 1.0, 1.0),
            report.Bar(f"{title}: used / planned arena", plan.used_peak_bytes / plan.arena_bytes, 1.0),
            # The plan counts the padding between tensors, the runtime does not.
            report.Bar(f"{title}: mapped less than planned, share of the model", plan.mapped_shortfall, 1e-3, 0.0),
            report.Bar(f"{title}: first loss, relative difference to PyTorch's", self.loss_error, LOSS_TOLERANCE),
            report.Bar(f"{title}: resident - planned bytes of pock-run, share of 3% + 1 MB", plan.process_excess, 1.0),
        ]  # fmt: skip
        if judged and self.case.at_least is not None:
            bars.append(report.Bar(f"{title}: PyTorch / pockc", self.ratio, at_least=self.case.at_least))
        if judged and self.case.arena_at_most is not None:
            bars.append(report.Bar(f"{title}: arena bytes", plan.arena_bytes, at_most=self.case.arena_at_most))
        return bars

    def as_json(self) -> dict[str, Any]:
        """Everything measured, and the figures derived from it."""
        return {
            "case": asdict(self.case),
            "pockc": {**asdict(self.plan), "added_bytes": self.plan.added_bytes},
            "pytorch": {
                layout: {**asdict(answer), "added_bytes": answer.added_bytes} for layout, answer in self.pytorch.items()
            },
            "ratio": self.ratio,
        }


def plan_case(case: Case) -> Plan:
    """Builds the program, lets the runtime allocate it and run one step, and runs it in a process of its own."""
    model, inputs = getattr(zoo, case.model)(**case.arguments)
    optimizer = pockc.SGD(lr=memory_peer.LEARNING_RATE)
    program = pockc.build(model, inputs, loss=case.loss, optimizer=optimizer, scheme=case.scheme, entries=case.entries)
    batch = memory_peer.batch_of(inputs, case.loss)
    with tempfile.TemporaryDirectory(prefix="pockc-memory-") as folder:
        path = Path(folder, "model.pock")
        program.save(path)
        with pockc.Session(path) as session:
            loss = session.train_step(**batch)
            allocated = session.memory
        process = bench_process(path)
    memory = program.memory
    return Plan(
        trained=tuple(program.metadata["trained"]),
        trained_elements=program.metadata["trained_elements"],
        model_bytes=_model_bytes(model),
        trained_bytes=memory_int8.trained_bytes(program),
        arena_bytes=memory.arena_bytes,
        mapped_bytes=memory.peak_bytes - memory.arena_bytes,
        by_kind=dict(memory.by_kind),
        at_peak=tuple(group_tensors(memory.tensors_at_peak)[:GROUPS_SHOWN]),
        tightness=memory_plans.tightness_of(program, case.model, case.scheme),
        entries={name: placement.nbytes for name, placement in program.placements.items()},
        allocated_bytes=allocated.arena_bytes,
        allocated_mapped_bytes=allocated.mapped_bytes,
        used_peak_bytes=allocated.used_peak_bytes,
        loss=loss,
        process=process,
    )


def group_tensors(tensors: Sequence[LiveTensor]) -> list[dict[str, Any]]:
    """Tensors with trained parameters left out, those that differ by a number in their names as one, largest first."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for tensor in tensors:
        if tensor.kind == "parameters":
            continue
        name, module = re.sub(r"_\d+$", "", tensor.name), re.sub(r"\d+", "#", tensor.module)
        labels = {"kind": tensor.kind, "name": name, "type": tensor.type, "module": module}
        group = groups.setdefault(tuple(labels.values()), {**labels, "count": 0, "nbytes": 0})
        group["count"] += 1
        group["nbytes"] += tensor.nbytes
    return sorted(groups.values(), key=lambda group: -int(group["nbytes"]))


def _model_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bench_process(model: Path) -> dict[str, Any]:
    """`pock-run bench`: some steps on made-up samples in a process of its own, all weights read, and its report."""
    output = model.with_suffix(".json")
    command = [str(abi.runtime_file("pock-run")), "bench", str(model), "--read-weights", "--steps", "1"]
    command += ["--json", str(output)]
    # Linux hands the peak of a process on to the program that it executes: let that be a small shell, not this one.
    subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], check=True, stdout=subprocess.DEVNULL)
    content: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return content


def ask_pytorch(case: Case, trained: Sequence[str]) -> dict[str, memory_peer.Answer]:
    """PyTorch's figures, by memory layout, each from a fresh process."""
    model, _ = getattr(zoo, case.model)(**case.arguments)
    layouts = memory_peer.layouts_of(model)
    del model
    return {
        layout: memory_peer.ask(memory_peer.Request(case.model, case.arguments, case.loss, tuple(trained), layout))
        for layout in layouts
    }


def known_answers(path: Path | None) -> dict[str, dict[str, memory_peer.Answer]]:
    """PyTorch's figures of an earlier report, by case."""
    if path is None:
        return {}
    fields = memory_peer.Answer.__dataclass_fields__
    return {
        entry["case"]["key"]: {
            layout: memory_peer.Answer(**{name: value for name, value in answer.items() if name in fields})
            for layout, answer in entry["pytorch"].items()
        }
        for entry in json.loads(path.read_text(encoding="utf-8"))["cases"]
    }


def measure(case: Case, known: Mapping[str, dict[str, memory_peer.Answer]]) -> Result:
    """Both sides of a case."""
    started = time.perf_counter()
    plan = plan_case(case)
    result = Result(case, plan, known.get(case.key) or ask_pytorch(case, plan.trained))
    line = f"PyTorch {report.megabytes(result.best.added_bytes)} MB, pockc {report.megabytes(plan.added_bytes)} MB"
    print(f"{case.title}: {line}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return result


def run(
    cases: Sequence[Case],
    output: Path,
    *,
    quick: bool,
    random_schemes: int,
    budgets: Sequence[str],
    pytorch_from: Path | None = None,
) -> int:
    """Measures the cases, and models under budgets; plans zoo, random schemes (unless 0) and published work (if all).

    Returns:
        The exit code: 1 when a bar is missed.
    """
    started = time.perf_counter()
    known = known_answers(pytorch_from)
    results = [measure(case, known) for case in cases]
    eight_bits = memory_int8.measure(small=quick) if any(case.key == memory_int8.CASE for case in cases) else []
    keep = partial(_keep, output, results, quick=quick)
    constrained = memory_budget.measure(budgets, small=quick, each=keep)
    tightness = [result.plan.tightness for result in results]
    tightness += memory_plans.measure_tightness(random_schemes, small=quick) if random_schemes else []
    published = memory_plans.plan_published() if len(cases) == len(CASES) and not quick else []
    bars = [bar for result in results for bar in result.bars(judged=not quick)]
    bars += memory_int8.bars(eight_bits)
    bars += memory_plans.tightness_bars(tightness) if tightness else []
    bars += [bar for result in constrained for bar in result.bars()]
    if results:
        memory_tables.print_cases(results, judged=not quick)
        missed = [result for result in results if not all(bar.met for bar in result.bars(judged=not quick))]
        memory_tables.print_peaks(missed)
    if eight_bits:
        memory_int8.print_results(eight_bits)
    if constrained:
        memory_budget.print_budgets(constrained)
    if published:
        memory_plans.print_published(published)
    if quick:
        print("quick: small models, to which the bars of the cases do not apply")
    content = {
        "machine": report.machine(),
        "quick": quick,
        "complete": True,
        "seconds": time.perf_counter() - started,
        "pytorch_from_earlier_run": bool(known),
        "cases": [result.as_json() for result in results],
        "eight_bits": memory_int8.as_json(eight_bits),
        "budgets": [result.as_json() for result in constrained],
        "tightness": [{**asdict(result), "ratio": result.ratio} for result in tightness],
        "published": published,
        "bars": [bar.as_json() for bar in bars],
    }
    report.write_json(output, content)
    print(f"Report: {output}")
    if results:
        memory_tables.plot(results, output.with_suffix(".png"))
        print(f"Picture: {output.with_suffix('.png')}")
    parts = [_summary(results)] if results else []
    parts += [memory_budget.summary(constrained)] if constrained else []
    parts += [memory_plans.summary(tightness)] if tightness and not parts else []
    return report.finish("bench-memory", "; ".join(parts), bars)


def _keep(output: Path, results: Sequence[Result], found: Sequence[memory_budget.Constrained], *, quick: bool) -> None:
    """Shows the last budget that was measured, and writes what there is: a run that is stopped has told that much."""
    print(memory_budget.progress(found[-1]), flush=True)
    content = {
        "machine": report.machine(),
        "quick": quick,
        "complete": False,
        "cases": [result.as_json() for result in results],
        "budgets": [result.as_json() for result in found],
        "bars": [bar.as_json() for result in found for bar in result.bars()],
    }
    report.write_json(output, content)


def _summary(results: Sequence[Result]) -> str:
    ratios = [result.ratio for result in results]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return (
        f"{len(results)} cases, training adds {min(ratios):.2f} to {max(ratios):.2f} times less, {mean:.2f} in the mean"
    )


def quick_case(case: Case) -> Case:
    """The same case with a small model."""
    return Case(case.key, f"small {case.key}", case.model, _QUICK_ARGUMENTS[case.model], case.scheme, loss=case.loss)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line."""
    names = [case.key for case in CASES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="small models: shows that all works, judges no case")
    parser.add_argument(
        "--random-schemes",
        type=int,
        metavar="N",
        help="plans beside those of the zoo; 0: neither (200; 0 for some cases)",
    )
    parser.add_argument("--pytorch-from", type=Path, metavar="JSON", help="take PyTorch's figures from this report")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--budget-only", action="store_true", help="nothing but models under memory budgets")
    budgets.add_argument("--no-budgets", action="store_true", help="no models under memory budgets")
    budgets.add_argument("--plans-only", action="store_true", help="nothing but plans of the zoo and of random schemes")
    models = list(memory_budget.MODELS)
    parser.add_argument(
        "--budget-models", nargs="+", choices=models, metavar="MODEL", help=f"{', '.join(models)} (none for some cases)"
    )
    parser.add_argument("--output", type=Path, default=report.OUT / "memory.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [] if options.budget_only or options.plans_only else [case for case in CASES if case.key in options.cases]
    partial = len(chosen) < len(CASES)
    random_schemes = options.random_schemes
    if random_schemes is None:
        random_schemes = 0 if partial and not options.plans_only else 12 if options.quick else 200
    budget_models = options.budget_models or ([] if partial and not options.budget_only else models)
    return run(
        [quick_case(case) for case in chosen] if options.quick else chosen,
        options.output,
        quick=options.quick,
        random_schemes=random_schemes,
        budgets=[] if options.no_budgets or options.plans_only else budget_models,
        pytorch_from=options.pytorch_from,
    )


if __name__ == "__main__":
    sys.exit(main())
