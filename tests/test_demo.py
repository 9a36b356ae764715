"""The demo on a few hundred small images, and the helpers that all benchmarks share."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks import datasets, demo, fetch, report, sweep, tasks

pytestmark = [pytest.mark.torch, pytest.mark.native]

Result = TypeVar("Result")

REPORT_FIELDS = {
    "scheme", "trainable_parameters", "planned_peak_bytes", "used_peak_bytes", "memory_by_kind", "ms_per_step",
    "pytorch_ms_per_step", "accuracy_before", "accuracy",
}  # fmt: skip


def available(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except fetch.DataUnavailableError as error:
        pytest.skip(f"data is not available: {error}")


@pytest.mark.slow
def test_demo_pipeline_reports_every_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = available(lambda: tasks.vision(image_size=32, train_size=320, test_size=160, epochs=1))
    rates = {"head": 3e-3, "bias-only": 1e-2, "sparse": 1e-3, "full": 3e-4}

    code = demo.run(task, rates, tmp_path, threads=1)

    content = json.loads((tmp_path / "report.json").read_text())
    bars = {bar["what"]: bar for bar in content["bars"]}
    schemes = {entry["scheme"]: entry for entry in content["schemes"]}
    assert list(schemes) == ["head", "bias-only", "sparse", "full"]
    for entry in schemes.values():
        assert set(entry) == REPORT_FIELDS
        assert sum(entry["memory_by_kind"].values()) == entry["planned_peak_bytes"]
        assert 0 < entry["used_peak_bytes"] <= entry["planned_peak_bytes"]
        assert entry["accuracy_before"] == schemes["head"]["accuracy_before"]
    assert schemes["head"]["trainable_parameters"] == 1280 * 10 + 10
    assert schemes["full"]["accuracy"] > schemes["full"]["accuracy_before"]
    assert schemes["sparse"]["planned_peak_bytes"] < schemes["full"]["planned_peak_bytes"]
    # Accuracy and speed of so short a run say nothing; what is exact has to hold here too.
    exact = [bar for what, bar in bars.items() if "logit" in what or "arena" in what]
    assert len(exact) == 5
    assert all(bar["met"] for bar in exact)
    assert (tmp_path / "accuracy_vs_memory.png").stat().st_size > 10_000
    assert code == (0 if all(bar["met"] for bar in bars.values()) else 1)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("demo: ")


def test_texts_stand_in_for_images_without_a_package_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise fetch.DataUnavailableError("apt-get is not installed here")

    monkeypatch.setattr(datasets, "fashion_mnist", refuse)

    task = available(demo.choose_task)

    assert task.key == "text"
    assert "apt-get is not installed here" in capsys.readouterr().out


@pytest.mark.parametrize("key", sorted(sweep.TASKS))
def test_committed_sweep_fits_the_task_and_its_grids(key: str) -> None:
    results = json.loads(sweep.RESULT.read_text())[key]
    task = available(sweep.TASKS[key])

    assert set(results["schemes"]) == set(tasks.SCHEMES)
    assert (results["epochs"], results["batch_size"]) == (task.epochs, task.batch_size)
    assert results["train_examples"] == len(task.train["labels"])
    assert len(task.train["labels"]) % task.batch_size == 0
    for scheme, rate in sweep.best_learning_rates(key).items():
        assert rate in sweep.GRIDS[key][scheme]


def test_bar_is_met_within_its_bounds_only() -> None:
    assert report.Bar("a ratio", 1.0, at_most=1.0, at_least=1.0).met
    assert not report.Bar("a ratio", 1.1, at_most=1.0).met
    assert not report.Bar("a ratio", 0.9, at_least=1.0).met
    assert not report.Bar("a ratio", math.nan, at_most=1.0).met


def test_missed_bar_fails_the_benchmark_and_is_named_before_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    bars = [report.Bar("speed", 2.0, at_most=1.5), report.Bar("accuracy", 0.9, at_least=0.8)]

    assert report.finish("bench", "a summary", bars) == 1
    assert report.finish("bench", "a summary", bars[1:]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "speed: 2, at most 1.5 is MISSED",
        "bench: a summary; 1 of 2 bars MISSED",
        "bench: a summary; all 1 bars met",
    ]


def test_picture_has_room_for_labels_of_points_side_by_side(tmp_path: Path) -> None:
    points = {"head": (20.0, 0.83), "bias-only": (20.5, 0.831), "sparse": (21.0, 0.832), "full": (60.0, 0.885)}

    report.plot_points(tmp_path / "plot.png", "points", ("x", "y"), points)

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
