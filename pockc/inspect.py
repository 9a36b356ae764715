"""What `pockc inspect`, `build` and `verify` print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pockc.artifact import Artifact, Entry
from pockc.errors import UserError, near_names
from pockc.memory_page import write_page
from pockc.parity import LOSS_TOLERANCE, TENSOR_TOLERANCE, Parity

_ROWS = 15  # of a table; the page has them all


def text(artifact: Artifact, entry: str) -> str:
    """The text IR of an entry."""
    _entry(artifact, entry)
    return str(artifact.metadata.get("text", {}).get(entry, ""))


def print_summary(console: Console, metadata: Mapping[str, Any]) -> None:
    """What was built: options, parameters, memory, passes."""
    console.print(_program_table(metadata), _memory_table(metadata["memory"]), sep="\n")
    table = Table("pass", "ms", "nodes after", title="Passes")
    for name, milliseconds, nodes in _passes(metadata.get("passes", ())):
        table.add_row(name, f"{milliseconds:.1f}", str(nodes))
    console.print(table)


def print_tables(console: Console, artifact: Artifact, entry: str) -> None:
    """The program as tables: options, memory, tensors at the peak, memory by module, the entry's calls by op."""
    chosen = _entry(artifact, entry)
    memory = artifact.metadata["memory"]
    console.print(_program_table(artifact.metadata), _memory_table(memory), sep="\n")
    _print_rows(console, "Tensors at the peak", ("tensor", "type", "size", "kind", "module", "source"), _peak(memory))
    _print_rows(console, "Peak memory by module", ("module", "size"), _by_module(memory))
    _print_rows(console, f"Tensors of {entry}", ("role", "name", "type"), _arguments(chosen))
    _print_rows(console, f"Calls of {entry} by op", ("op", "forward", "backward", "update"), _calls(chosen))


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
    console.print(
        f"[bold]{verdict} PyTorch[/]: worst loss error {parity.worst_loss_error:.1e} (at most {LOSS_TOLERANCE:.0e}), "
        f"worst tensor error {parity.worst_tensor_error:.1e} (at most {TENSOR_TOLERANCE:.0e})",
        soft_wrap=True,
        highlight=False,
    )


def write_html(artifact: Artifact, path: Path) -> None:
    """The interactive page of a program's memory."""
    write_page(artifact, [(name, value) for name, value in _facts(artifact.metadata) if name != "model"], path)


# --- Facts ------------------------------------------------------------------------------------------------------------


def _entry(artifact: Artifact, name: str) -> Entry:
    if name not in artifact.entries:
        raise UserError(
            f"{artifact.path} has no entry {name!r}",
            supported=", ".join(artifact.entries),
            instead=near_names(name, artifact.entries),
        )
    return artifact.entries[name]


def _size(nbytes: int) -> str:
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
    yield "loss", str(metadata.get("loss", ""))
    yield "batch norm", str(metadata.get("batchnorm", ""))
    if metadata.get("frozen_dtype", "f32") != "f32":
        yield "large frozen weights", str(metadata["frozen_dtype"])
    yield "device", str(metadata.get("device", ""))
    if metadata.get("without_gradient"):
        yield "no gradient reaches", ", ".join(metadata["without_gradient"])


def _kinds(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(kind.replace("_", " "), _size(nbytes)) for kind, nbytes in memory["by_kind"].items()]
    rows.append(("planned peak", _size(memory["peak_bytes"])))
    rows.append(("of it, the arena", _size(memory["arena_bytes"])))
    rows.append(("lower bound of the peak", _size(memory["lower_bound_bytes"])))
    return rows


def _peak(memory: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (t["name"], t["type"], _size(t["nbytes"]), t["kind"].replace("_", " "), t["module"], t["source"])
        for t in memory["tensors_at_peak"]
    ]


def _by_module(memory: Mapping[str, Any]) -> list[tuple[str, ...]]:
    sizes: dict[str, int] = {}
    for tensor in memory["tensors_at_peak"]:
        module = tensor["module"]
        if tensor["kind"] == "optimizer_state":  # it says which parameter it belongs to
            module = module.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + tensor["nbytes"]
    return [(module or "<model>", _size(n)) for module, n in sorted(sizes.items(), key=lambda item: -item[1])]


def _arguments(entry: Entry) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("input", name, str(tensor)) for name, tensor in entry.inputs.items()]
    return rows + [("output", name, str(tensor)) for name, tensor in entry.outputs.items()]


def _calls(entry: Entry) -> list[tuple[str, ...]]:
    phases = ("forward", "backward", "update")
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
