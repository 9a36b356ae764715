"""`pockc bench`: time and memory of a program, and what each pass buys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import pockc
from benchmarks import zoo
from pockc import ablation, pipeline
from pockc.abi import runtime_file
from pockc.artifact import Call, read
from pockc.bench import batch_of, made_up, measure, time_steps
from pockc.cli_model import load_model
from pockc.errors import UserError
from pockc.inspect import print_ablation
from pockc.ir import TensorType
from pockc.passes import cost
from pockc.session import Session
from tests.shell import Shell

pytestmark = [pytest.mark.torch, pytest.mark.native]

# A frozen prefix with large activations, so that micro-batches pay; batch norms; a residual; a trained end.
NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.down = nn.Sequential(nn.Conv2d(16, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU6())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.down(x + self.block(x)).mean((2, 3)))


def make(batch_size=8):
    torch.manual_seed(0)
    return Net().eval(), {"x": torch.randn(batch_size, 3, 16, 16)}
"""


@pytest.fixture
def network(shell: Shell) -> Shell:
    (shell.folder / "net.py").write_text(NETWORK)
    return shell


def report(file: str) -> Any:
    return json.loads(Path(file).read_text())


def arguments(shell: Shell, **changes: Any) -> dict[str, Any]:
    model, inputs = load_model(str(shell.folder / "net.py") + ":make", None)
    return {"model": model, "example_inputs": inputs, "scheme": "head", **changes}


# --- Times and memory -------------------------------------------------------------------------------------------------


def test_program_is_timed_and_its_memory_is_the_plan(network: Shell) -> None:
    network("build", "net.py:make", "--scheme", "head", "--batch-size", "6")
    code, out, err = network("bench", "out/model.pock", "--steps", "7", "--json", "made/bench.json")

    assert (code, err) == (0, "")
    for part in ("7 times train_step of out/model.pock", "batch 6", "samples per second", "planned peak"):
        assert part in out
    figures, memory = report("made/bench.json"), read("out/model.pock").metadata["memory"]
    assert (figures["steps"], figures["batch"], figures["threads"]) == (7, 6, 1)
    assert 0 < figures["cpu_ms_median"] <= figures["cpu_ms_p95"]
    assert figures["samples_per_second"] == pytest.approx(6e3 / figures["wall_ms_median"])
    assert figures["planned_peak_bytes"] == memory["peak_bytes"]
    assert figures["arena_bytes"] == memory["arena_bytes"] >= figures["used_peak_bytes"] > 0


def test_model_is_built_to_be_timed_and_other_entries_are_as_well(network: Shell) -> None:
    code, out, err = network("bench", "net.py:make", "--entry", "infer", "--batch-size", "3", "--steps", "2")
    assert (code, err) == (0, "")
    assert "2 times infer of net.py:make: batch 3" in out
    assert not (network.folder / "out").exists()


def test_steps_do_not_train(network: Shell) -> None:
    network("build", "net.py:make", "--learning-rate", "100")
    inputs = made_up(read("out/model.pock").entry("train_step"))
    with Session("out/model.pock") as session:
        before = session.parameters()
        times, outputs = time_steps(session, "train_step", inputs, 4, warm_up=0)
        after = session.parameters()
        assert outputs["loss"] == session.run("eval_step", **inputs)["loss"]
    assert len(times.cpu) == len(times.wall) == 4
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_made_up_inputs_have_the_types_of_the_entry(network: Shell) -> None:
    network("build", "net.py:make")
    entry = read("out/model.pock").entry("train_step")
    made = made_up(entry)
    assert {name: array.shape for name, array in made.items()} == {"x": (8, 3, 16, 16), "labels": (8,)}
    assert made["labels"].dtype == np.int64 and made["x"].min() < -0.9 < 0.9 < made["x"].max()
    assert batch_of(entry) == 8
    assert batch_of(read("out/model.pock").entry("infer")) == 8


def test_no_steps_are_refused(network: Shell) -> None:
    with pytest.raises(UserError, match="at least one"):
        measure(network.folder / "out" / "model.pock", steps=0)


# --- Ablation ---------------------------------------------------------------------------------------------------------


def test_switches_are_the_passes_that_can_be_switched_off() -> None:
    optional = {step.name for step in (*pipeline.COMMON, *pipeline.TRAIN, *pipeline.LOWER) if step.optional}
    assert set(pipeline.switches()) == optional | {"reorder", "place", "winograd"}
    assert {"fold-batchnorm", "fuse", "split-prefix"} <= optional
    order = [step.name for step in pipeline.LOWER if step.name in pipeline.switches()]
    assert [name for name in pipeline.switches() if name in order] == order


def test_each_pass_is_switched_off_once_and_the_prefix_buys_bytes(network: Shell) -> None:
    found = ablation.ablate(arguments(network), steps=5)

    assert [variant.without for variant in found.variants] == [*pipeline.switches(), *ablation.PLANNER]
    rows = {variant.without: variant for variant in found.variants}
    base = found.baseline
    assert rows["split-prefix"].peak_bytes > 1.2 * base.peak_bytes
    assert rows["slice-updates"].same_program and rows["slice-updates"].cpu_ms == base.cpu_ms
    assert not rows["split-prefix"].same_program
    for variant in (base, *found.variants):
        assert variant.cpu_ms > 0 and not variant.problem
        assert variant.loss == pytest.approx(base.loss, rel=1e-4)
        assert variant.arena_bytes <= variant.peak_bytes
        assert not found.differs(variant)
    built = pockc.build(**arguments(network))
    assert (base.peak_bytes, base.arena_bytes) == (built.memory.peak_bytes, built.memory.arena_bytes)
    without = pockc.build(**arguments(network), disabled=frozenset({"split-prefix"}))
    assert rows["split-prefix"].peak_bytes == without.memory.peak_bytes


def test_order_buys_bytes_of_full_backpropagation(network: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "switches", lambda: ("reorder",))
    found = ablation.ablate(arguments(network, scheme="full", optimizer=pockc.SGD(lr=0.1)), steps=1)
    rows = {variant.without: variant for variant in found.variants}
    assert list(rows) == ["reorder", *ablation.PLANNER]
    assert rows["reorder"].peak_bytes > found.baseline.peak_bytes
    assert all(variant.peak_bytes >= found.baseline.peak_bytes for variant in rows.values())
    assert rows["in-place"].build_seconds is None and rows["reorder"].build_seconds is not None


def test_ablation_of_a_program_builds_it_as_it_was_built(network: Shell) -> None:
    (network.folder / "mine.yaml").write_text("update: [head.*]\n")
    (network.folder / "board.yaml").write_text("{name: my-board, like: x86-64, cores: 2}\n")
    options = "--scheme mine.yaml --batch-size 5 --optimizer sgd --learning-rate 0.5 --momentum 0.9 --accumulate 2"
    options += " --label-smoothing 0.1 --device board.yaml"
    assert network("build", "net.py:make", *options.split())[0] == 0
    (network.folder / "mine.yaml").unlink()  # the program has it
    code, out, err = network("bench", "out/model.pock", "--ablate", "--steps", "1", "--json", "ablation.json")

    assert (code, err) == (0, "")
    assert "Note" not in out
    figures, memory = report("ablation.json"), read("out/model.pock").metadata["memory"]
    assert figures["program"] == "out/model.pock"
    assert figures["baseline"]["peak_bytes"] == memory["peak_bytes"]
    rows = {row["without"]: row for row in figures["variants"]}
    assert list(rows) == [*pipeline.switches(), *ablation.PLANNER]
    for name, row in rows.items():
        assert row["more_bytes"] == row["peak_bytes"] - memory["peak_bytes"]
        assert re.search(rf"│ {name} +│", out)
    assert rows["split-prefix"]["more_bytes_percent"] > 10


@pytest.fixture
def planner_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass is switched off: saves the builds."""
    monkeypatch.setattr(ablation, "switches", tuple)


@pytest.mark.usefixtures("planner_only")
def test_ablation_of_a_model_takes_its_options(network: Shell) -> None:
    command = "bench net.py:make --scheme head --optimizer lion --batch-size 6 --ablate --steps 1 --json found.json"
    assert network(*command.split())[::2] == (0, "")
    built = pockc.build(*load_model("net.py:make", 6), scheme="head", optimizer=pockc.Lion())
    assert report("found.json")["baseline"]["peak_bytes"] == built.memory.peak_bytes


@pytest.mark.usefixtures("planner_only")
def test_program_of_another_build_of_the_same_sources_is_noted(network: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    (network.folder / "sizes.py").write_text("BATCH = 8\n")
    (network.folder / "net.py").write_text(NETWORK.replace("batch_size=8", "batch_size=__import__('sizes').BATCH"))
    network("build", "net.py:make", "--scheme", "head")
    monkeypatch.delitem(sys.modules, "sizes")
    (network.folder / "sizes.py").write_text("BATCH = 16\n")
    _, out, _ = network("bench", "out/model.pock", "--ablate", "--steps", "1")
    assert "Note: built again, out/model.pock is another program" in out


def test_variant_that_cannot_be_built_has_a_problem_and_no_figures(
    network: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pockc.build

    def build(*, disabled: frozenset[str] = frozenset(), **options: Any) -> Any:
        if "fuse" in disabled:
            raise UserError("no budget can be met")
        return right(**options, disabled=disabled)

    monkeypatch.setattr(ablation, "build", build)
    monkeypatch.setattr(ablation, "switches", lambda: ("fuse",))
    code, out, err = network("bench", "net.py:make", "--ablate", "--steps", "1", "--json", "found.json")
    assert (code, err) == (0, "")
    assert "Note: there is no program without fuse: no budget can be met." in out
    row = report("found.json")["variants"][0]
    assert row["without"] == "fuse" and row["problem"] and "more_bytes" not in row


def test_noise_is_that_of_rounds_and_not_moved_by_an_outlier() -> None:
    assert ablation._noise([(10.0, 10.0)] * 9 + [(90.0, 90.0)]) == 0
    few, many = [(9.0,), (10.0,), (11.0,)], [(9.0,), (10.0,), (11.0,)] * 4
    assert ablation._noise(few) == pytest.approx(2 * ablation._noise(many))


def test_program_that_computes_something_else_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    base = ablation.Variant("", 1000, 900, 2.0, 0.5, loss=1.5)
    variants = (replace(base, without="fuse", loss=1.5 + 1e-5), replace(base, without="reorder", loss=1.6))
    found = ablation.Ablation("train_step", 5, 1, 0.01, base, variants, "")
    print_ablation(Console(width=120), "net.py:make", found)
    assert re.findall(r"without (\S+) the loss is 1.6 instead of 1.5", capsys.readouterr().out) == ["reorder"]


BAD = {
    "no such program": "bench none.pock",
    "no such entry": "bench out/model.pock --entry train",
    "no such entry to ablate": "bench net.py:make --ablate --entry train",
    "too many threads": "bench out/model.pock --threads 99",
    "options for a program": "bench out/model.pock --learning-rate 0.1",
    "device for a program": "bench out/model.pock --device rpi4",
    "neither program nor function": "bench net.py",
    "unwritable report": "bench out/model.pock --steps 1 --json net.py/x.json",
    "made by save": "bench saved.pock --ablate",
    "made by another version": "bench other.pock --ablate",
    "changed model": "bench out/model.pock --ablate",
    "moved model": "bench out/model.pock --ablate",
}


def test_bad_commands_end_with_one_sentence_and_code_2(network: Shell, golden: Callable[..., None]) -> None:
    network("build", "net.py:make", "--scheme", "head")
    program = pockc.build(**arguments(network))
    program.save("saved.pock")
    object.__setattr__(program, "metadata", {**program.metadata, "built_from": {"options": {}}})
    program.save("other.pock")
    lines = []
    for name, command in BAD.items():
        if name == "changed model":
            (network.folder / "net.py").write_text(NETWORK + "\n")
        if name == "moved model":
            (network.folder / "net.py").rename("moved.py")
        code, _, err = network(*command.split())
        assert code == 2, name
        assert err.count("\n") == 1, name
        lines.append(f"{name}: {err.replace(str(network.folder) + '/', '')}")
    golden("".join(lines))


# --- Where the time goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_pock_run_shows_the_time_of_every_call(network: Shell, accumulation: int) -> None:
    network("build", "net.py:make", "--accumulate", str(accumulation))
    command = [str(runtime_file("pock-run")), "bench", "out/model.pock", "--steps", "4", "--profile"]
    done = subprocess.run([*command, "--json", "bench.json"], capture_output=True, text=True, check=True)

    calls = read("out/model.pock").entry("train_step").calls
    figures = report("bench.json")
    assert [call["op"] for call in figures["profile"]] == [call.op for call in calls]
    assert all(call["cpu_ms"] >= 0 for call in figures["profile"])
    assert 0 < sum(call["cpu_ms"] for call in figures["profile"]) < 1.5 * figures["cpu_ms_per_step_p95"]
    assert re.search(r"^conv2d +\d+ +[\d.]+ +[\d.]+% +[\d.]+ G[FB]/s +\d+%$", done.stdout, re.MULTILINE)
    assert "longest calls" in done.stdout
    stem = [call["shapes"] for call in figures["profile"] if call["origin"].startswith("stem.0 ")]
    assert any(re.fullmatch(r"\[\d,16,16,3\] \[16,3,3,3\] \[16\] > \[\d,16,16,16\]", shapes) for shapes in stem)


def node_of(call: Call) -> Any:
    """What `cost` asks of the node that the call was made of."""
    inputs, outputs = (
        [SimpleNamespace(type=TensorType(x.shape, x.dtype)) for x in side] for side in (call.inputs, call.outputs)
    )
    if call.op == "insert":
        inputs = [outputs[0], inputs[-1]]  # what it goes into may be new: then it is no operand of the call
    attrs = {"transpose_a": bool(call.ints[0])} if call.op == "matmul" else {}
    return SimpleNamespace(op=call.op, inputs=inputs, outputs=outputs, attrs=attrs)


@pytest.mark.parametrize("make", [zoo.mobilenet_v2, zoo.llama_tiny], ids=["images", "text"])
def test_roofline_knows_what_calls_do(make: Callable[..., Any], tmp_path: Path) -> None:
    size = {"image_size": 32} if make is zoo.mobilenet_v2 else {"sequence_length": 16, "layers": 1, "width": 64}
    model, examples = make(batch_size=2, **size)
    loss = "cross_entropy" if make is zoo.mobilenet_v2 else "causal_lm"
    pockc.build(model, examples, loss=loss, optimizer=pockc.AdamW(lr=1e-3)).save(tmp_path / "model.pock")
    command = [
        str(runtime_file("pock-run")),
        "bench",
        "model.pock",
        "--steps",
        "2",
        "--profile",
        "--json",
        "bench.json",
    ]
    subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    figures = json.loads((tmp_path / "bench.json").read_text())
    calls = read(tmp_path / "model.pock").entry("train_step").calls
    for call, found in zip(calls, figures["profile"], strict=True):
        if call.op != "conv2d_winograd":  # counted as the convolution that it is
            assert found["operations"] == 2 * cost.multiply_adds(node_of(call)), call
        assert found["bytes"] == cost.moved_bytes(node_of(call)), call
    assert ("conv2d_grad_weight" if make is zoo.mobilenet_v2 else "attention_grad") in {call.op for call in calls}
    assert figures["limit_gflops"] > 0.1
    assert figures["limit_gigabytes_per_second"] > 0.1
