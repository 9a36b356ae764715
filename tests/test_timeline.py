"""What a program file says about memory, against what the planner planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pockc.artifact import Artifact, read
from pockc.build import build
from pockc.program import Program
from pockc.timeline import Live, Timeline, mapped_bytes, timeline

pytestmark = pytest.mark.torch


class Residual(nn.Module):
    """Convolutions with a skip connection, batch norm, max-pool, and a view before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = nn.functional.max_pool2d(x + self.block(x), 2)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def compiled(folder: Path, **options: Any) -> tuple[Program, Artifact]:
    torch.manual_seed(0)
    program = build(Residual().eval(), {"x": torch.randn(4, 3, 8, 8)}, **options)
    program.save(folder / "model.pock")
    return program, read(folder / "model.pock")


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "full"},
        {"scheme": "bias-only"},
        {"scheme": "head"},
        {"scheme": "last-k:2", "batchnorm": "freeze"},
        {"batchnorm": "train"},
        {"accumulation": 3},
        {"disabled": frozenset({"fuse"})},
    ],
    ids=str,
)
def test_calls_of_the_file_tell_the_planned_peak_and_its_kinds(options: dict[str, Any], tmp_path: Path) -> None:
    program, artifact = compiled(tmp_path, **options)

    for entry, live in program.memory.timeline.items():
        assert timeline(artifact, entry).total().max() == max(live), entry
    line = timeline(artifact, "train_step")
    peak = int(line.total().argmax())
    kinds = {kind: int(layer[peak]) for kind, layer in line.by_kind().items() if layer[peak]}
    kinds["frozen_parameters"] = mapped_bytes(artifact)
    assert kinds == {kind: nbytes for kind, nbytes in program.memory.by_kind.items() if nbytes}
    assert sorted(v.nbytes for v in line.alive(peak)) == sorted(t.nbytes for t in program.memory.tensors_at_peak)


def test_every_output_of_a_call_is_alive_then(tmp_path: Path) -> None:
    _, artifact = compiled(tmp_path)
    line = timeline(artifact, "train_step")
    for index, call in enumerate(line.calls):
        made = {value.type for value in line.values if value.call == index and value.first == index}
        assert {str(t) for t in call.outputs if t.offset >= artifact.state_bytes} <= made, index
    assert np.all(line.total() <= artifact.arena_bytes)


def test_values_know_where_they_come_from(tmp_path: Path) -> None:
    _, artifact = compiled(tmp_path)
    line = timeline(artifact, "train_step")

    inputs = {value.name for value in line.values if value.kind == "inputs"}
    assert inputs == {"x", "labels"}
    assert {"stem.weight", "head.bias"} <= {v.name for v in line.values if v.kind == "parameters"}
    saved = next(value for value in line.values if value.kind == "saved_activations")
    assert line.calls[saved.call].module.startswith(("stem", "block", "<model>"))
    assert "test_timeline.py:" in line.calls[saved.call].source
    update = next(call for call in line.calls if call.phase == "update")
    assert update.module


def test_entry_without_calls_has_what_is_always_alive() -> None:
    line = Timeline((), (Live(0, 0, 64, "parameters", "w", "f32[16]", -1),))
    assert line.total().tolist() == [64]
    assert [value.name for value in line.alive(0)] == ["w"]


def test_comparison_with_full_backpropagation_is_that_of_a_full_build(tmp_path: Path) -> None:
    sparse, _ = compiled(tmp_path, scheme="bias-only", compare_full=True)
    full, _ = compiled(tmp_path, scheme="full", compare_full=True)

    assert sparse.metadata["full_memory"] == full.memory.totals() == full.metadata["full_memory"]
    assert sparse.memory.arena_bytes < full.memory.arena_bytes
    assert "full_memory" not in compiled(tmp_path, scheme="bias-only")[0].metadata
