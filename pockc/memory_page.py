"""The memory of a program as a page (`pockc inspect --html`) and as a trace (`--trace`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from pockc.artifact import Artifact, Call
from pockc.artifact_writer import write_atomically
from pockc.timeline import KINDS, Live, Timeline, mapped_bytes, timeline

_PLACEHOLDER = '"@DATA@"'


def write_page(artifact: Artifact, facts: Iterable[tuple[str, str]], path: Path) -> None:
    """One self-contained page: timeline of every entry, peak, tensors, comparison with full backpropagation."""
    template = files("pockc").joinpath("memory_page.html").read_text(encoding="utf-8")
    content = json.dumps(page_data(artifact, facts), ensure_ascii=False, separators=(",", ":"))
    before, _, after = template.partition(_PLACEHOLDER)
    # No tag can end or begin inside the data, whatever names the model has.
    write_atomically(path, [(before + content.replace("<", "\\u003c") + after).encode()])


def page_data(artifact: Artifact, facts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """What the page's script reads. Names repeat often: rows hold indices into ``strings``."""
    strings: dict[str, int] = {}

    def index(text: str) -> int:
        return strings.setdefault(text, len(strings))

    def call_row(call: Call) -> list[int]:
        return [index(call.op), index(call.module), index(call.source), index(call.phase)]

    def value_row(value: Live) -> list[int]:
        place = [value.first, value.last, value.nbytes, KINDS.index(value.kind)]
        return [*place, index(value.name), index(value.type), value.call]

    lines = {entry: timeline(artifact, entry) for entry in artifact.entries}
    entries = {
        entry: {"calls": list(map(call_row, line.calls)), "values": list(map(value_row, line.values))}
        for entry, line in lines.items()
    }
    return {
        "model": str(artifact.metadata.get("model", artifact.path.name)),
        "facts": [list(fact) for fact in facts],
        "kinds": KINDS,
        "arena_bytes": artifact.arena_bytes,
        "live_bytes": max((int(line.total().max()) for line in lines.values()), default=artifact.state_bytes),
        "frozen_bytes": mapped_bytes(artifact),
        "full": artifact.metadata.get("full_memory"),
        "entries": entries,
        "strings": list(strings),
    }


def write_trace(artifact: Artifact, path: Path) -> None:
    """The timelines as Chrome trace events, for Perfetto: a process per entry, a slice per call, a counter by kind.

    A call takes one microsecond: the trace shows the order of calls and bytes, not time.
    """
    events: list[dict[str, Any]] = []
    for process, entry in enumerate(artifact.entries, 1):
        names = {"process_name": f"{entry} (1 µs per call)", "thread_name": "calls"}
        events += [
            {"ph": "M", "pid": process, "tid": 1, "name": what, "args": {"name": name}} for what, name in names.items()
        ]
        events += _events(timeline(artifact, entry), process)
    other = {"arena_bytes": artifact.arena_bytes, "frozen_bytes": mapped_bytes(artifact)}
    trace = {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}
    write_atomically(path, [json.dumps(trace, ensure_ascii=False).encode()])


def _events(line: Timeline, process: int) -> Iterable[dict[str, Any]]:
    by_kind, total = line.by_kind(), line.total()
    for index, call in enumerate(line.calls):
        common = {"pid": process, "tid": 1, "ts": index}
        live = {kind: int(layer[index]) for kind, layer in by_kind.items()}
        about = {"module": call.module, "source": call.source, "live_bytes": int(total[index])}
        yield {"ph": "X", **common, "dur": 1, "name": call.op, "cat": call.phase, "args": about}
        yield {"ph": "C", **common, "name": "live bytes", "args": live}
