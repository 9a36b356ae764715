"""A dynamic loss scale: the steps of torch.amp.GradScaler, and what a skipped step leaves alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pockc.abi import runtime_file
from pockc.build import build
from pockc.errors import InternalError, UserError
from pockc.interp import evaluate
from pockc.ir import Array, Builder, TensorType
from pockc.optim import SGD, AdamW, Optimizer
from pockc.parity import verify_against_torch
from pockc.program import Program
from pockc.session import Session
from pockc.verify import verify
from tests.shell import Shell

COUNTERS = SCALE, STREAK, SKIPPED = "pockc.loss_scale", "pockc.finite_steps", "pockc.skipped_steps"
TOO_LARGE = np.float32(2.0**126)  # gradients of ordinary size overflow float32 with it
INTERVAL = 3
Step = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # a batch -> all states after it


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def compiled(optimizer: Optimizer, **options: Any) -> Program:
    options = {"loss_scale": "dynamic", "loss_scale_interval": INTERVAL, "entries": ("train_step",), **options}
    return build(network(), (torch.zeros(8, 12),), "mse", optimizer, **options)


def batches(count: int) -> list[dict[str, Array]]:
    """Of which one has gradients that no scale makes finite."""
    random = np.random.default_rng(0)
    found = [
        {"input": random.standard_normal((8, 12)), "labels": 99 * random.standard_normal((8, 4))} for _ in range(count)
    ]
    found[count // 2]["labels"][3, 2] = np.inf
    return [{name: array.astype(np.float32) for name, array in batch.items()} for batch in found]


def interpreted(program: Program) -> Step:
    """Steps in the interpreter, from the scale that is too large."""
    states: dict[str, Array] = {SCALE: np.asarray(TOO_LARGE)}
    names = ["accumulate"] * (program.accumulation - 1) + ["train_step"]
    done = 0

    def step(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        nonlocal done
        graph = program.entries[names[done % len(names)]]
        given = {value.name: batch["labels" if value.name == "labels" else "input"] for value in graph.inputs}
        states.update(evaluate(graph, given, states)[1])
        done += 1
        return {name: array.copy() for name, array in states.items()}

    return step


def running(session: Session) -> Step:
    session.set_state(SCALE, TOO_LARGE)

    def step(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        session.train_step(**batch)
        return {name: session.state(name) for name in session.states}

    return step


def torch_steps(
    make: Callable[[Any], torch.optim.Optimizer], given: list[dict[str, Array]], accumulation: int
) -> tuple[list[float], list[Array]]:
    """The scale after each optimizer step, and the parameters after the last."""
    model = network()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=float(TOO_LARGE), growth_interval=INTERVAL)
    scales = []
    for i, batch in enumerate(given):
        loss = F.mse_loss(model(torch.from_numpy(batch["input"])), torch.from_numpy(batch["labels"]))
        scaler.scale(loss / accumulation).backward()  # type: ignore[no-untyped-call]
        if i % accumulation == accumulation - 1:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
    return scales, [parameter.detach().numpy() for parameter in model.parameters()]


CASES: list[tuple[Optimizer, Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD(lr=0.01, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), {}),
    (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01), {}),
    (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01), {"accumulation": 2}),
    (SGD(lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01), {"micro_batch": 2}),
]


@pytest.mark.torch
@pytest.mark.native
@pytest.mark.parametrize(("optimizer", "make", "options"), CASES)
def test_scales_and_parameters_are_those_of_grad_scaler(
    optimizer: Optimizer, make: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    accumulation = options.get("accumulation", 1)
    given = batches(16 * accumulation)
    scales, parameters = torch_steps(make, given, accumulation)
    changes = set(np.divide(scales[1:], scales[:-1]))
    assert changes == {0.5, 1.0, 2.0}, "the batches show no growth, or no skipped step"
    taken = sum(after >= before for before, after in zip([float(TOO_LARGE), *scales], scales, strict=False))

    program = compiled(optimizer, **options)
    program.save(tmp_path / "model.pock")
    with Session(tmp_path / "model.pock") as session:
        for step in (interpreted(program), running(session)):
            found = [step(batch) for batch in given][accumulation - 1 :: accumulation]
            last = found[-1]
            assert [float(states[SCALE]) for states in found] == scales
            assert int(last[SKIPPED]) == len(scales) - taken
            assert int(last["pockc.step" if accumulation == 1 else "pockc.updates"]) == taken
            for name, expected in zip(("0.weight", "0.bias", "2.weight", "2.bias"), parameters, strict=True):
                np.testing.assert_allclose(last[name], expected, rtol=1e-4, atol=1e-6)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2))
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()


PART = (
    "name: part\nupdate:\n  - tensors: '3.weight'\n    channels: {fraction: 0.5, select: first}\n  - tensors: '7.*'\n"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": SGD(lr=0.1)},
    "clipped": {"optimizer": AdamW(lr=1e-2, clip_norm=1.0)},
    "bytes": {"optimizer": AdamW(lr=1e-2), "state_dtype": "int8"},
    "statistics": {"batchnorm": "train"},
    "micro-batches": {"micro_batch": 2},
    "accumulated": {"accumulation": 2, "micro_batch": 2},
    "channels": {"scheme": PART},
    "encoded": {"scheme": "last-k:2", "cache_prefix": True},
    "unordered": {"disabled": frozenset({"reorder", "fit-memory"}), "accumulation": 3},
    "f32": {"dtype": "f32", "loss": lambda output, labels: 999 * F.cross_entropy(output, labels)},
}


@pytest.mark.torch
@pytest.mark.native
@pytest.mark.parametrize("name", OPTIONS)
def test_a_skipped_step_changes_nothing_but_scale_and_counters(name: str, tmp_path: Path) -> None:
    options = {"dtype": "fp16", "loss_scale": "dynamic", **OPTIONS[name]}
    if options.get("scheme") == PART:
        (tmp_path / "part.yaml").write_text(PART)
        options["scheme"] = str(tmp_path / "part.yaml")
    model = convolutional().train(name == "statistics")
    torch.manual_seed(1)
    example = {"input": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    program = build(model, example if "loss" in options else {"input": example["input"]}, **options)
    program.save(tmp_path / "model.pock")
    batch = {key: value.numpy() for key, value in example.items()}
    group = options.get("accumulation", 1)
    with Session(tmp_path / "model.pock") as session:

        def states() -> dict[str, Array]:
            return {state: session.state(state) for state in session.states}

        def step() -> list[float]:
            """One optimizer step: the losses of its micro-steps."""
            if name != "encoded":
                return [session.train_step(**batch) for _ in range(group)]
            encoded = session.encode(input=batch["input"])
            return [float(session.run("train_step_encoded", labels=batch["labels"], **encoded)["loss"])]

        step()
        before = states()
        session.set_state(SCALE, TOO_LARGE)
        assert np.isfinite(step()).all()
        skipped = states()
        assert [float(skipped[state]) for state in COUNTERS] == [TOO_LARGE / 2, 0, before[SKIPPED] + 1]
        # Earlier micro-steps, which end before gradients are complete, count for dropout.
        untouched = set(before) - set(COUNTERS) - ({"pockc.step"} if group > 1 else set())
        for state in untouched:
            assert skipped[state].tobytes() == before[state].tobytes(), state
        assert skipped["pockc.step"] == before["pockc.step"] + group - 1
        session.set_state(SCALE, np.float32(1024))
        step()
        after = states()
    assert [float(after[state]) for state in COUNTERS] == [1024, 1, before[SKIPPED] + 1]
    assert all(np.isfinite(after[state]).all() for state in after)
    moved = {state for state in untouched if after[state].tobytes() != before[state].tobytes()}
    assert moved >= set(program.metadata["trained"])
    assert ("1.running_mean" in moved) is (name == "statistics")


@pytest.mark.torch
@pytest.mark.native
def test_a_resumed_run_goes_on_with_its_scale(tmp_path: Path) -> None:
    compiled(AdamW(lr=0.01), accumulation=2).save(file := tmp_path / "model.pock")
    given = batches(20)
    with Session(file) as first, Session(file, threads=2) as second:
        first_step = running(first)
        for batch in given[:7]:
            states = first_step(batch)
        assert float(states[SCALE]) < TOO_LARGE
        first.save_checkpoint(tmp_path / "a.ckpt")
        second.load_checkpoint(tmp_path / "a.ckpt")
        for batch in given[7:]:
            assert first.train_step(**batch) == second.train_step(**batch)
        for name in first.states:
            assert first.state(name).tobytes() == second.state(name).tobytes(), name


@pytest.mark.torch
@pytest.mark.native
def test_a_scale_stays_a_number_that_has_a_reciprocal(tmp_path: Path) -> None:
    compiled(SGD(lr=0.1), loss_scale_interval=1).save(tmp_path / "model.pock")
    x = np.ones((8, 12), np.float32)
    with Session(tmp_path / "model.pock") as session:
        for name in ("2.weight", "2.bias"):
            session.set_state(name, np.zeros_like(session.state(name)))  # gradients are zero, where labels are
        for label, limit in ((np.nan, 2.0**-126), (0.0, 2.0**126)):
            session.set_state(SCALE, np.float32(limit))
            session.train_step(input=x, labels=np.full((8, 4), label, np.float32))
            assert float(session.state(SCALE)) == limit


def test_a_gate_ends_a_graph_and_what_it_does_not_order_is_an_internal_error() -> None:
    builder = Builder()
    x = builder.input("x", TensorType(()))
    first, second = (builder.state(name, "slot", np.zeros((), np.float32)) for name in ("first", "second"))
    doubled = builder("add", x, x)
    passed = builder("gate", builder("all_finite", x), doubled)
    product = builder("mul", doubled, passed)
    graph = builder.build({"y": doubled}, {first: doubled, second: product})
    verify(graph, "training")
    for given, expected in ((2.0, {"first": 4.0, "second": 4.0}), (np.inf, {"first": np.inf, "second": 0.0})):
        outputs, states = evaluate(graph, {"x": np.asarray(given, np.float32)})
        assert float(outputs["y"]) == 2 * given
        assert {name: float(array) for name, array in states.items()} == expected
    loose = builder("neg", x)
    for y, new in ((product, doubled), (doubled, loose)):
        with pytest.raises(InternalError, match="may come behind it"):
            verify(builder.build({"y": y}, {first: new, second: product}), "training")


@pytest.mark.torch
@pytest.mark.native
def test_the_command_line_builds_shows_and_trains_with_it(shell: Shell) -> None:
    given = ("--dtype", "fp16", "--loss-scale", "dynamic", "--loss-scale-interval", "7")
    code, out, err = shell("build", "model.py:make", *given, "-o", "out")
    assert (code, err) == (0, "")
    assert "65536, dynamic: doubled after 7 finite steps" in out
    assert "65536, dynamic: doubled after 7 finite steps" in shell("inspect", "out/model.pock")[1]
    random = np.random.default_rng(0)
    x = random.standard_normal((80, 6)).astype(np.float32)
    np.savez("train.npz", x=x, labels=random.integers(0, 4, 80))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(runtime_file("pock-run")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    assert "dynamic, 65536 to begin with" in run("info", "out/model.pock").stdout
    done = run("train", "out/model.pock", "--data", "train.npz", "--epochs", "3", "--json", "report.json")
    assert "loss scale 1048576; 0 steps skipped" in done.stderr
    report = json.loads(Path("report.json").read_text())
    assert (report["loss_scale"], report["skipped_steps"], report["roll_backs"]) == (2.0**20, 0, 0)

    # Scaled gradients overflow, losses do not: steps are skipped, and the run does not go back.
    with Session("out/model.pock") as session:
        session.set_state(SCALE, TOO_LARGE)
        session.save_checkpoint("a.ckpt", cursor={"epoch": 0, "step": 0, "seed": 0, "samples": 80, "loss_sum": 0})
    np.savez("train.npz", x=1000 * x, labels=random.integers(0, 4, 80))
    run("train", "out/model.pock", "--data", "train.npz", "--resume", "--save", "a.ckpt", "--json", "report.json")
    report = json.loads(Path("report.json").read_text())
    assert report["loss_scale"] == TOO_LARGE / 2 ** report["skipped_steps"] < TOO_LARGE
    assert (report["steps"], report["roll_backs"]) == (10, 0)
    assert shell("build", "model.py:make", "--loss-scale", "large")[2].count("--loss-scale is 'large'") == 1


@pytest.mark.torch
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_scale": "adaptive", "loss_scale_interval": None}, "loss_scale is adaptive"),
        ({"loss_scale_interval": 0}, "loss_scale_interval is 0"),
        ({"loss_scale": 2.0, "loss_scale_interval": 5}, "loss_scale_interval is for loss_scale 'dynamic'"),
        ({"target": "onnxruntime"}, "the target onnxruntime has no loss_scale"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compiled(SGD(lr=0.1), **options)


@pytest.mark.torch
def test_a_comparison_with_pytorch_is_refused() -> None:
    with pytest.raises(UserError, match="it skips steps"):
        verify_against_torch(network(), (torch.zeros(8, 12),), "mse", loss_scale="dynamic")
