"""What `pockc inspect`, `build`, `verify` and `bench` print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pockc.ablation import Ablation, Variant
from pockc.artifact import Artifact, Entry
from pockc.bench import Measurement
from pockc.memory_page import write_page
from pockc.parity import Parity, tolerances
from pockc.tuning import Table as Times

_ROWS = 15  # of a table; the page has them all


def text(artifact: Artifact, entry: str) -> str:
    """The text IR of an entry."""
    artifact.entry(entry)
    return str(artifact.metadata.get("text", {}).get(entry, ""))


def print_summary(console: Console, metadata: Mapping[str, Any]) -> None:
    """What was built: options, parameters, memory, passes."""
    console.print(_program_table(metadata))
    if "memory" in metadata:
        console.print(_memory_table(metadata["memory"]))
    table = Table("pass", "ms", "nodes after", title="Passes")
    for name, milliseconds, nodes in _passes(metadata.get("passes", ())):
        table.add_row(name, f"{milliseconds:.1f}", str(nodes))
    console.print(table)


def print_tables(console: Console, artifact: Artifact, entry: str) -> None:
    """The program as tables: options, memory, tensors at the peak, memory by module, the entry's calls by op."""
    chosen = artifact.entry(entry)
    console.print(_program_table(artifact.metadata))
    if memory := artifact.metadata.get("memory"):
        console.print(_memory_table(memory))
        columns = ("tensor", "type", "size", "kind", "module", "source")
        _print_rows(console, "Tensors at the peak", columns, _peak(memory))
        _print_rows(console, "Peak memory by module", ("module", "size"), _by_module(memory))
    _print_rows(console, f"Tensors of {entry}", ("role", "name", "type"), _arguments(chosen))
    _print_rows(
        console, f"Calls of {entry} by op", ("op", "forward", "backward", "recompute", "update"), _calls(chosen)
    )


def print_parity(console: Console, parity: Parity) -> None:
    """Losses and errors of `pockc verify`, then a verdict."""
    losses = Table("step", "loss", "PyTorch", "relative difference", title="Losses")
    for step, (ours, theirs) in enumerate(parity.losses, 1):
        difference = abs(ours - theirs) / max(abs(theirs), 1e-12)
        losses.add_row(str(step), f"{ours:.6f}", f"{theirs:.6f}", f"{difference:.1e}")
    console.print(losses)
    rows = [(t.name, f"{t.error:.1e}", f"{t.change:.1e}") for t in parity.tensors if not t.gradient_is_zero]
    _print_rows(console, "Trained tensors", ("tensor", "error / own change", "own change"), rows)
    zero = [t.name for t in parity.tensors if t.gradient_is_zero]
    if zero:
        console.print(Text(f"Gradient zero in exact arithmetic, judged by the loss alone: {', '.join(zero)}"))
    verdict = "agrees with" if parity.passed else "DIFFERS from"
    loss, tensor = tolerances(parity.dtype)
    console.print(
        f"[bold]{verdict} PyTorch[/]: worst loss error {parity.worst_loss_error:.1e} (at most {loss:.0e}), "
        f"worst tensor error {parity.worst_tensor_error:.1e} (at most {tensor:.0e})",
        soft_wrap=True,
        highlight=False,
    )


def print_measurement(console: Console, program: str, measured: Measurement) -> None:
    """Time and memory of a program's steps."""
    times, memory = measured.times.as_json(), measured.memory
    what = f"{len(measured.times.cpu)} times {measured.entry} of {program}"
    table = Table("", "median", "95th percentile", title=f"{what}: batch {measured.batch}, threads {measured.threads}")
    for label, clock in (("CPU time, ms", "cpu"), ("wall time, ms", "wall")):
        table.add_row(label, f"{times[f'{clock}_ms_median']:.3f}", f"{times[f'{clock}_ms_p95']:.3f}")
    table.add_row("samples per second", f"{measured.samples_per_second:.1f}", "")
    console.print(table)
    sizes = Table(show_header=False, title="Memory")
    sizes.add_row("planned peak", size(measured.planned_bytes))
    sizes.add_row("arena", size(memory.arena_bytes))
    sizes.add_row("of it, used", size(memory.used_peak_bytes))
    sizes.add_row("weights mapped from the file", size(memory.mapped_bytes))
    console.print(sizes)


def print_ablation(console: Console, program: str, ablation: Ablation) -> None:
    """What each pass buys; the program with all of them on top."""
    title = f"{program} without one pass at a time: {ablation.entry}, threads {ablation.threads}"
    table = Table(
        Column("without", no_wrap=True),
        "planned peak",
        "difference",
        "CPU ms per step",
        "difference",
        "build s",
        title=title,
    )
    base = ablation.baseline
    table.add_row("nothing", size(base.peak_bytes), "", f"{base.cpu_ms:.3f}", "", _seconds(base), end_section=True)
    for variant in ablation.variants:
        if variant.problem:
            table.add_row(variant.without, "impossible")
            continue
        more_bytes, more_ms = variant.peak_bytes - base.peak_bytes, variant.cpu_ms - base.cpu_ms
        table.add_row(
            variant.without,
            size(variant.peak_bytes),
            "same program" if variant.same_program else _change(f"{size(more_bytes)}", more_bytes / base.peak_bytes),
            f"{variant.cpu_ms:.3f}",
            "" if variant.same_program else _change(f"{more_ms:.3f}", more_ms / base.cpu_ms),
            _seconds(variant),
        )
    console.print(table)
    console.print(
        f"Positive differences are what a pass saves. Times are medians of {ablation.steps} steps, taken in turn; "
        f"differences of less than {100 * ablation.noise:.1f}% may be chance.",
        soft_wrap=True,
        highlight=False,
    )
    for note in _notes(ablation):
        console.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)


def print_tuning(console: Console, tuned: Times) -> None:
    """The times of every call's candidates, the fastest of them in front."""
    table = Table("call", "CPU ms of each kernel", title=f"Kernels on {tuned.device}: {tuned.machine['processor']}")
    for call, times in tuned.times.items():
        ranked = sorted(times.items(), key=lambda item: item[1])
        table.add_row(call, ", ".join(f"{name} {ms:.3f}" for name, ms in ranked))
    console.print(table)


def write_html(artifact: Artifact, path: Path) -> None:
    """The interactive page of a program's memory."""
    write_page(artifact, [(name, value) for name, value in _facts(artifact.metadata) if name != "model"], path)


# --- Facts ------------------------------------------------------------------------------------------------------------


def size(nbytes: int) -> str:
    """Bytes in the unit that suits them; a negative number keeps its sign."""
    if nbytes < 0:
        return f"-{size(-nbytes)}"
    if nbytes < 2**10:
        return f"{nbytes} B"
    return f"{nbytes / 2**10:.1f} KiB" if nbytes < 2**20 else f"{nbytes / 2**20:.2f} MiB"


def _facts(metadata: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    optimizer = metadata.get("optimizer", {})
    yield "model", str(metadata.get("model", ""))
    yield "scheme", str(metadata.get("scheme", ""))
    yield "trained tensors", str(len(metadata.get("trained", ())))
    yield "trained parameters", f"{metadata.get('trained_elements', 0):,}"
    yield "optimizer", f"{optimizer.get('name', '')}, learning rate {optimizer.get('lr', '')}"
    if metadata.get("dtype", "f32") != "f32":
        products = ", products too where the CPU can" if metadata.get("half_arithmetic") else ""
        yield "activations", f"{metadata['dtype']}{products}"
    if metadata.get("loss_scale", 1.0) != 1.0:
        yield "loss scale", _scale(metadata)
    if metadata.get("state_dtype", "f32") != "f32":
        yield "optimizer state", str(metadata["state_dtype"])
    yield "loss", str(metadata.get("loss", ""))
    yield "batch norm", str(metadata.get("batchnorm", ""))
    if metadata.get("frozen_dtype", "f32") != "f32":
        yield "large frozen weights", str(metadata["frozen_dtype"])
    if metadata.get("prefix_dtype", "f32") != "f32":
        yield "frozen prefix", str(metadata["prefix_dtype"])
    if metadata.get("saved_dtype", "f32") != "f32":
        yield "saved activations", str(metadata["saved_dtype"])
    if metadata.get("target", "native") != "native":
        yield "target", str(metadata["target"])
    yield "device", str(metadata.get("device", ""))
    yield from _memory_facts(metadata)
    if metadata.get("without_gradient"):
        yield "no gradient reaches", ", ".join(metadata["without_gradient"])


def _scale(metadata: Mapping[str, Any]) -> str:
    interval = metadata.get("loss_scale_interval", 0)
    growth = f", dynamic: doubled after {interval} finite steps, halved after one that is not" if interval else ""
    return f"{metadata['loss_scale']:g}{growth}"


def _memory_facts(metadata: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The budget, if there is one, and what was chosen to need less memory, with its estimated cost."""
    if budget := metadata.get("budget"):
        yield "memory budget", f"{size(budget['bytes'])}; without it {size(budget['unconstrained_bytes'])}"
    plan = metadata.get("memory_plan", {})
    if plan.get("micro_batch", 0) < plan.get("batch", 0):
        yield "micro-batches", f"of {plan['micro_batch']}, {plan['batch']} samples in all"
    if again := plan.get("recomputed", ()):
        ops = sorted({item["op"] for item in again})
        nbytes = sum(item["nbytes"] for item in again)
        yield "computed again", f"{len(again)} results of {', '.join(ops)}: {size(nbytes)} are not kept"
    if plan.get("estimated_slowdown", 1.0) > 1.0:
        yield "cost of both, estimated", f"{plan['estimated_slowdown'] - 1:.0%} more time"


def _kinds(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(kind.replace("_", " "), size(nbytes)) for kind, nbytes in memory["by_kind"].items()]
    rows.append(("planned peak", size(memory["peak_bytes"])))
    rows.append(("of it, the arena", size(memory["arena_bytes"])))
    rows.append(("lower bound of the peak", size(memory["lower_bound_bytes"])))
    return rows


def _peak(memory: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (t["name"], t["type"], size(t["nbytes"]), t["kind"].replace("_", " "), t["module"], t["source"])
        for t in memory["tensors_at_peak"]
    ]


def _by_module(memory: Mapping[str, Any]) -> list[tuple[str, ...]]:
    sizes: dict[str, int] = {}
    for tensor in memory["tensors_at_peak"]:
        module = tensor["module"]
        if tensor["kind"] == "optimizer_state":  # it says which parameter it belongs to
            module = module.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + tensor["nbytes"]
    return [(module or "<model>", size(n)) for module, n in sorted(sizes.items(), key=lambda item: -item[1])]


def _arguments(entry: Entry) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("input", name, str(tensor)) for name, tensor in entry.inputs.items()]
    return rows + [("output", name, str(tensor)) for name, tensor in entry.outputs.items()]


def _calls(entry: Entry) -> list[tuple[str, ...]]:
    phases = ("forward", "backward", "recompute", "update")
    counts: dict[str, dict[str, int]] = {}
    for call in entry.calls:
        row = counts.setdefault(call.op, dict.fromkeys(phases, 0))
        row[call.phase] += 1
    ordered = sorted(counts.items(), key=lambda item: -sum(item[1].values()))
    return [(op, *(str(row[phase] or "") for phase in phases)) for op, row in ordered]


def _passes(passes: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """Each pass with its time over all entries, and the nodes of the training step after it."""
    totals: dict[str, tuple[float, int]] = {}
    for record in passes:
        spent, nodes = totals.get(record["pass"], (0.0, 0))
        known = record["entry"] in ("common", "train_step")
        totals[record["pass"]] = (spent + record["ms"], record["nodes"] if known else nodes)
    return [(name, spent, nodes) for name, (spent, nodes) in totals.items()]


def _seconds(variant: Variant) -> str:
    return "" if variant.build_seconds is None else f"{variant.build_seconds:.1f}"


def _change(difference: str, part: float) -> str:
    return f"{'' if difference.startswith('-') else '+'}{difference} ({100 * part:+.1f}%)"


def _notes(ablation: Ablation) -> Iterable[str]:
    """Variants that are not there, or that do not compute what the baseline does."""
    base = ablation.baseline
    for variant in ablation.variants:
        if variant.problem:
            yield f"there is no program without {variant.without}: {variant.problem}"
        elif ablation.differs(variant):
            yield f"without {variant.without} the loss is {variant.loss:.6g} instead of {base.loss:.6g}."


# --- On a terminal ----------------------------------------------------------------------------------------------------


def _program_table(metadata: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, title="Program")
    for name, value in _facts(metadata):
        table.add_row(name, Text(value))
    return table


def _memory_table(memory: Mapping[str, Any]) -> Table:
    table = Table("kind", "size", title="Planned memory at the peak")
    for kind, size in _kinds(memory):
        table.add_row(kind, size)
    return table


def _print_rows(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows[:_ROWS]:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(rows) > _ROWS:
        console.print(f"... and {len(rows) - _ROWS} more", highlight=False)
