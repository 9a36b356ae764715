"""`pockc tune`: what it measures, the table that it writes, and builds that obey it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pockc
from pockc.artifact import read
from pockc.errors import UserError
from pockc.ir import Node, op_counts
from pockc.parity import verify_against_torch
from pockc.passes import place
from pockc.targets import devices
from pockc.tune import distinct_calls, tune
from pockc.tune_board import collect, prepare
from pockc.tuning import Table, load, times_of
from tests.shell import Shell

HOST = devices.find(devices.DEFAULT)
NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(128, 16, 1))
        self.block = Block(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.stem(x))).mean((2, 3)))  # the peak is in the stem


def make(batch_size=4):
    torch.manual_seed(0)
    return Net().eval(), {"x": torch.randn(batch_size, 3, 32, 32)}
"""


@pytest.fixture(scope="module")
def model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    scope: dict[str, Any] = {}
    exec(compile(NETWORK, "net.py", "exec"), scope)
    network, inputs = scope["make"]()
    return network, inputs


@pytest.fixture
def arguments(model: tuple[nn.Module, dict[str, torch.Tensor]]) -> dict[str, Any]:
    return arguments_of(model)


def arguments_of(model: tuple[nn.Module, dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {"model": model[0], "example_inputs": model[1], "scheme": "bias-only", "optimizer": pockc.SGD(lr=0.05)}


def message(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


@pytest.fixture(scope="module")
def calls(model: tuple[nn.Module, dict[str, torch.Tensor]]) -> dict[str, Node]:
    return distinct_calls(arguments_of(model), HOST)


def preferring(kind: str, calls: dict[str, Node]) -> Table:
    """A table by which one candidate is the fastest for every call of the model."""
    return Table(HOST.name, {}, {key: {other: 1.0 + (other != kind) for other in place.KINDS} for key in calls})


def test_every_candidate_of_every_distinct_call_is_timed(
    arguments: dict[str, Any], calls: dict[str, Node], tmp_path: Path
) -> None:
    table = tune({**arguments, "frozen_dtype": "int8"}, HOST, seconds=0)  # weights are timed as floats

    assert table.device == HOST.name and table.machine["architecture"]
    assert set(table.times) == set(calls)
    assert {key.partition("(")[0] for key in table.times} == set(place.REPLACED)
    for times in table.times.values():
        assert tuple(times) == place.KINDS
        assert all(0 < ms < 1000 for ms in times.values())
    table.save(tmp_path / "made" / "table.json")
    assert load(tmp_path / "made" / "table.json") == table


def test_a_build_obeys_the_table(arguments: dict[str, Any], calls: dict[str, Node], tmp_path: Path) -> None:
    preferring("winograd2", calls).save(tmp_path / "table.json")
    program = pockc.build(**arguments, device=devices.tuned(HOST, tmp_path / "table.json"))

    nodes = [node for graph in program.entries.values() for node in graph.nodes]
    assert {node.attrs["outputs"] for node in nodes if node.op == "conv2d_winograd"} == {2}


def test_ten_steps_with_winograd_agree_with_pytorch(
    arguments: dict[str, Any], calls: dict[str, Node], tmp_path: Path
) -> None:
    preferring("winograd4", calls).save(tmp_path / "table.json")
    device = devices.tuned(HOST, tmp_path / "table.json")
    placed = op_counts(pockc.build(**arguments, device=device).entries["train_step"].nodes)
    assert placed["conv2d_winograd"] >= 3  # two of them forward, at least

    parity = verify_against_torch(**arguments, steps=10, device=device)

    assert parity.passed, (parity.worst_loss_error, parity.worst_tensor_error)


def test_the_table_of_another_device_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    Table("rpi4", {}, {}).save(tmp_path / "table.json")
    text = message(lambda: pockc.build(**arguments, device=devices.tuned(HOST, tmp_path / "table.json")))
    assert "are of the device 'rpi4', and this build is for 'x86-64'" in text


def test_another_machine_is_refused(arguments: dict[str, Any]) -> None:
    assert "Run `pockc tune` on the board" in message(lambda: tune(arguments, devices.find("riscv64")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "Invalid JSON"),
        ('{"format": 2, "device": "x86-64", "machine": {}, "times": {}}', "format"),
        ('{"format": 1, "device": "x86-64", "machine": {}, "times": {"a": {"direct": 0}}}', "times.a.direct"),
        ('{"format": 1, "device": "x86-64", "machine": {}, "times": {"a": {"direct": NaN}}}', "times.a.direct"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    text = message(lambda: times_of(devices.tuned(HOST, path)))
    assert said in text and str(path) in text


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert "Make one with `pockc tune`" in message(lambda: times_of(devices.tuned(HOST, tmp_path / "none.json")))


def test_a_board_names_its_table_beside_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "board.yaml").write_text("name: my-board\nlike: rpi4\ntuning: board.json\n")
    Table("my-board", {}, {"call": {"direct": 1.5}}).save(tmp_path / "board.json")

    board = devices.find(str(tmp_path / "board.yaml"))

    assert times_of(board) == {"call": {"direct": 1.5}}
    assert devices.recorded({"device": board.name, "board": board.as_json()}) == board
    assert times_of(replace(board, tuning="")) == {}


def test_a_board_without_python_profiles_programs(
    arguments: dict[str, Any], calls: dict[str, Node], tmp_path: Path
) -> None:
    made = prepare(arguments, HOST, tmp_path)
    assert [path.name for path in made] == ["direct", "winograd2", "winograd4"]
    assert "direct/profile.json: No such file" in message(lambda: collect(arguments, HOST, tmp_path))
    for path in made:
        command = ["./pock-run", "bench", "model.pock", "--profile", "--steps", "2", "--json", "profile.json"]
        subprocess.run(command, cwd=path, check=True, capture_output=True)

    table = collect(arguments, HOST, tmp_path)

    assert table.device == HOST.name
    assert set(table.times) <= set(calls)
    complete = [key for key, times in table.times.items() if set(times) == set(place.KINDS)]
    assert {key.partition("(")[0] for key in complete} == set(place.REPLACED)
    other = {**arguments, "example_inputs": {"x": arguments["example_inputs"]["x"][:2]}}
    assert "is of another program" in message(lambda: collect(other, HOST, tmp_path))
    (tmp_path / "direct" / "profile.json").write_text("[]")
    assert "is not what `pock-run bench" in message(lambda: collect(arguments, HOST, tmp_path))


def test_command_line(shell: Shell) -> None:
    (shell.folder / "net.py").write_text(NETWORK)
    common = ("net.py:make", "--scheme", "bias-only", "--batch-size", "2")
    code, out, err = shell("tune", *common, "--seconds", "0", "-o", "table.json")
    assert (code, err) == (0, "")
    assert "Wrote table.json" in out and "winograd4" in out
    table = json.loads(Path("table.json").read_text())
    table["times"] = {key: {**times, "winograd2": 1e-6} for key, times in table["times"].items()}
    Path("table.json").write_text(json.dumps(table))

    assert shell("build", *common, "--tuning", "table.json")[0] == 0

    metadata = read("out/model.pock").metadata
    assert "conv2d_winograd" in metadata["text"]["train_step"]
    assert devices.recorded(metadata).tuning == "table.json"  # so that `bench --ablate` builds the same again
    code, _, err = shell("bench", "out/model.pock", "--tuning", "table.json")
    assert code == 2 and "--tuning has no effect" in err
