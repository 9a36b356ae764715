"""The memory page: its contents always; in a headless Chromium where there is one (`make test-page` installs it)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pockc.artifact import Artifact, read
from pockc.build import build
from pockc.memory_page import page_data, write_page, write_trace
from pockc.timeline import KINDS, timeline
from tests import browser

pytestmark = pytest.mark.torch

HOSTILE = "</script><img src=x onerror=alert(1)>"
FACTS = [("scheme", "bias-only"), ("optimizer", "adamw & <friends>")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


def artifact_of(folder: Path, **options: Any) -> Artifact:
    torch.manual_seed(0)
    build(Net().eval(), {"x": torch.randn(4, 3, 16, 16)}, **options).save(folder / "model.pock")
    return read(folder / "model.pock")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact_of(tmp_path_factory.mktemp("page"), scheme="bias-only", compare_full=True)


@pytest.fixture(scope="module")
def file(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "memory.html"
    write_page(artifact, FACTS, path)
    return path


# --- Contents ---------------------------------------------------------------------------------------------------------


def embedded(file: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_page_is_one_small_file_that_refers_to_no_other(file: Path) -> None:
    page = file.read_text()
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(|fetch\(|XMLHttpRequest|innerHTML", page)
    assert "default-src 'none'" in page
    assert len(files("pockc").joinpath("memory_page.html").read_bytes()) < 40_000


def test_page_holds_every_call_with_its_module_and_source(file: Path, artifact: Artifact) -> None:
    data = embedded(file)
    text = data["strings"]
    for name, entry in artifact.entries.items():
        rows = [tuple(text[i] for i in row) for row in data["entries"][name]["calls"]]
        assert rows == [(call.op, call.module, call.source, call.phase) for call in entry.calls]
    assert any(source.startswith("tests/test_memory_page.py:") or "test_memory_page.py:" in source for source in text)


def test_page_has_the_planned_totals_and_those_of_full_backpropagation(file: Path, artifact: Artifact) -> None:
    data, memory = embedded(file), artifact.metadata["memory"]
    assert data["arena_bytes"] == memory["arena_bytes"]
    assert data["frozen_bytes"] == memory["by_kind"]["frozen_parameters"]
    assert data["live_bytes"] + data["frozen_bytes"] == memory["lower_bound_bytes"]
    assert data["full"]["arena_bytes"] > data["arena_bytes"]


def test_names_of_a_model_cannot_leave_the_data(artifact: Artifact, tmp_path: Path) -> None:
    write_page(hostile(artifact), FACTS, tmp_path / "memory.html")
    page = (tmp_path / "memory.html").read_text()
    assert HOSTILE not in page and "<img" not in page and "<friends>" not in page
    assert embedded(tmp_path / "memory.html")["model"] == HOSTILE


def hostile(artifact: Artifact) -> Artifact:
    return replace(artifact, metadata={**artifact.metadata, "model": HOSTILE})


def test_trace_has_a_slice_and_the_live_bytes_of_every_call(artifact: Artifact, tmp_path: Path) -> None:
    write_trace(artifact, tmp_path / "memory.json")
    trace = json.loads((tmp_path / "memory.json").read_text())

    processes = {e["args"]["name"].split()[0]: e["pid"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert set(processes) == set(artifact.entries)
    for entry, process in processes.items():
        line = timeline(artifact, entry)
        events = [event for event in trace["traceEvents"] if event["pid"] == process]
        slices = [event for event in events if event["ph"] == "X"]
        counters = [sum(event["args"].values()) for event in events if event["ph"] == "C"]
        assert [event["name"] for event in slices] == [call.op for call in line.calls]
        assert [event["args"]["live_bytes"] for event in slices] == counters == line.total().tolist()
        assert all(event["ts"] == index for index, event in enumerate(slices))


def test_page_of_a_file_without_metadata_is_made_from_its_calls(artifact: Artifact) -> None:
    data = page_data(replace(artifact, metadata={}), [])
    assert data["model"] == "model.pock"
    assert data["full"] is None
    assert data["entries"]["train_step"]["values"]


# --- In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    path = browser.find()
    if path is None:
        pytest.skip("there is no Chromium: `make test-page` installs Debian's")
    with browser.Page(path, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium: browser.Page, file: Path) -> Iterator[browser.Page]:
    """The page at desktop size; the test fails if anything was logged as an error."""
    chromium.problems.clear()
    chromium.open(file)
    yield chromium
    chromium.run("0")  # collects what is still on its way
    assert chromium.problems == []


def text_of(page: browser.Page, selector: str) -> str:
    return str(page.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def place(page: browser.Page, call: int) -> tuple[float, float]:
    """The middle of a call in the chart, scrolled into view."""
    found = page.run(
        f"""(() => {{
          const chart = byId("chart");
          chart.scrollIntoView({{block: "center", behavior: "instant"}});
          const box = chart.getBoundingClientRect(), g = geometry(timeline(view.entry));
          return [box.left + (g.x({call}) + g.x({call + 1})) / 2, box.top + box.height / 2];
        }})()"""
    )
    return found[0], found[1]


def colors(page: browser.Page) -> int:
    """How many different colours the chart has: one, where nothing was drawn."""
    return int(
        page.run(
            """(() => {
              const chart = byId("chart"), paint = chart.getContext("2d");
              const pixels = new Uint32Array(paint.getImageData(0, 0, chart.width, chart.height).data.buffer);
              return new Set(pixels).size;
            })()"""
        )
    )


def shows(page: browser.Page, artifact: Artifact, call: int, entry: str = "train_step") -> bool:
    """Whether op, phase, module, source and the tensors alive at a call are shown."""
    line = timeline(artifact, entry)
    expected, alive = line.calls[call], line.alive(call)
    heading, details = text_of(page, "#call h3"), text_of(page, "#call dl")
    rows = page.run("[...document.querySelectorAll('#call td:first-child code')].map(cell => cell.textContent)")
    sizes = page.run("described, alive(timeline(view.entry), view.call).map(value => value[2])")
    return (
        heading == expected.op + expected.phase
        and expected.module in details
        and (expected.source or "none") in details
        and len(rows) == min(8, len(alive))
        and rows[0] in {value.name for value in alive if value.nbytes == alive[0].nbytes}
        and sizes == [value.nbytes for value in alive]
    )


def test_page_draws_the_timeline_and_starts_at_the_peak(page: browser.Page, artifact: Artifact) -> None:
    peak = int(np.argmax(timeline(artifact, "train_step").total()))

    assert text_of(page, "h1") == "Net"
    assert "adamw & <friends>" in text_of(page, "#facts")
    assert colors(page) > 8
    assert shows(page, artifact, peak)
    assert "the peak" in text_of(page, "#position")
    assert text_of(page, "#tensors-title").startswith(f"{len(timeline(artifact, 'train_step').alive(peak))} tensors")
    assert "× the arena" in text_of(page, "#tiles")
    assert f"{artifact.metadata['memory']['peak_bytes']:,} bytes" in text_of(page, "#tiles")
    assert f"{artifact.arena_bytes:,} bytes" in text_of(page, "#tiles")
    assert "test_memory_page.py:" in text_of(page, "#tensors")


def test_hovering_shows_the_call_under_the_pointer(page: browser.Page, artifact: Artifact) -> None:
    for call in (0, 3, len(artifact.entries["train_step"].calls) - 1):
        page.hover(*place(page, call))
        assert shows(page, artifact, call)
        assert text_of(page, "#tip").startswith(artifact.entries["train_step"].calls[call].op)
        assert page.run("byId('tip').hidden") is False
    page.hover(1, 1)
    assert "the peak" in text_of(page, "#position")
    assert page.run("byId('tip').hidden") is True


def test_click_pins_a_call_until_it_is_released(page: browser.Page, artifact: Artifact) -> None:
    page.click(*place(page, 4))
    assert "call 5 of" in text_of(page, "#position") and "pinned" in text_of(page, "#position")
    page.hover(*place(page, 9))
    assert shows(page, artifact, 4)
    page.run("byId('chart').focus()")
    page.press("ArrowRight")
    assert shows(page, artifact, 5)
    page.press("Home")
    assert shows(page, artifact, 0)
    page.press("End")
    assert shows(page, artifact, len(artifact.entries["train_step"].calls) - 1)
    page.press("Escape")
    page.hover(*place(page, 9))
    assert shows(page, artifact, 9)


def test_buttons_step_through_the_calls(page: browser.Page, artifact: Artifact) -> None:
    page.click(*place(page, 4))
    page.run("byId('next').click(), byId('next').click(), byId('back').click()")
    assert shows(page, artifact, 5)
    page.run("byId('peak').click()")
    assert "the peak" in text_of(page, "#position")


def test_tap_on_a_phone_shows_the_call_and_nothing_is_cut_off(
    page: browser.Page, artifact: Artifact, file: Path
) -> None:
    for width in (390, 320):
        page.open(file, width, 700, phone=True, dark=True)
        assert page.run("document.documentElement.scrollWidth") <= width
        page.tap(*place(page, 6))
        page.wait("view.pinned")
        assert shows(page, artifact, 6)


def test_chart_stays_where_it_is_while_the_pointer_changes_the_numbers_above(
    page: browser.Page, artifact: Artifact, file: Path
) -> None:
    for width in (390, 1200):
        page.open(file, width, 900)
        tops = set()
        for call in range(0, len(artifact.entries["train_step"].calls), 5):
            page.run(f"choose({call}, false)")
            tops.add(page.run("byId('chart').getBoundingClientRect().top + scrollY"))
        assert len(tops) == 1


def test_kind_and_type_are_told_in_words_at_any_width(page: browser.Page, file: Path) -> None:
    told = "[...document.querySelectorAll('#tensors tr')].find(row => row.querySelector('td')).innerText"
    for width in (390, 1200):
        page.open(file, width, 900)
        row = page.run(told)
        assert len(re.findall(r"\w+\[[\d,]+\]", row)) == 1
        assert any(kind.replace("_", " ") in row for kind in KINDS)


def test_kinds_add_up_beside_those_of_full_backpropagation(page: browser.Page, artifact: Artifact) -> None:
    expected = [sum(artifact.metadata[key]["by_kind"].values()) for key in ("memory", "full_memory")]
    cells = "[...document.querySelectorAll('#kinds .total .size')].map(cell => cell.textContent)"
    assert page.run(cells) == page.run(f"{expected}.map(size)")


def test_other_entries_and_hidden_kinds_are_drawn(page: browser.Page, artifact: Artifact) -> None:
    page.run("[...byId('entries').children].find(tab => tab.textContent === 'infer').click()")
    assert "of infer" in text_of(page, "#tensors-title")
    page.hover(*place(page, 1))
    assert shows(page, artifact, 1, "infer")

    page.run("[...byId('entries').children][0].click()")
    before = page.run("byId('chart').toDataURL()")
    page.run("document.querySelector('[data-kind=frozen_parameters]').click()")
    assert page.run("byId('chart').toDataURL()") != before
    assert page.run("limits().map(mark => mark.bytes)[0]") == page.run("data.arena_bytes + data.frozen_bytes")
    page.run("document.querySelector('[data-kind=saved_activations]').click()")
    assert page.run("limits().length") == 0


def test_all_tensors_can_be_listed(page: browser.Page, artifact: Artifact) -> None:
    line = timeline(artifact, "train_step")
    alive = line.alive(int(line.total().argmax()))
    page.run("document.querySelector('#call .more').click()")
    assert page.run("document.querySelectorAll('#call td:first-child code').length") == len(alive)


def test_all_modules_can_be_listed(page: browser.Page) -> None:
    page.run("moduleTable([['a.b', 3], ['c', 2], ['', 1]], 2)")
    assert text_of(page, "#modules .more") == "Show 1 more"
    page.run("document.querySelector('#modules .more').click()")
    assert page.run("[...document.querySelectorAll('#modules code')].map(cell => cell.textContent)") == [
        "a.b",
        "c",
        "<model>",
    ]


def test_dark_scheme_has_other_colours(page: browser.Page, file: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    page.open(file, dark=True)
    assert page.run(background) != light
    assert colors(page) > 8


def test_hostile_names_are_shown_as_text(page: browser.Page, artifact: Artifact, tmp_path: Path) -> None:
    write_page(hostile(artifact), FACTS, tmp_path / "memory.html")
    page.open(tmp_path / "memory.html")
    assert text_of(page, "h1") == HOSTILE
    assert page.run("document.images.length") == 0


def test_missing_comparison_is_named(page: browser.Page, tmp_path: Path) -> None:
    write_page(artifact_of(tmp_path, scheme="head"), FACTS, tmp_path / "memory.html")
    page.open(tmp_path / "memory.html")
    assert "unknown" in text_of(page, "#tiles") and "--compare-full" in text_of(page, "#tiles")


def test_an_error_on_a_page_would_be_noticed(chromium: browser.Page, tmp_path: Path) -> None:
    ready = "<script>document.documentElement.dataset.ready = 'yes'; nothing.here</script>"
    (tmp_path / "broken.html").write_text(f"<!doctype html><html>{ready}</html>")
    chromium.problems.clear()
    chromium.open(tmp_path / "broken.html")
    chromium.run("0")
    assert any("nothing is not defined" in problem for problem in chromium.problems)
