"""Activations in 16 bits: what is stored so, how far that moves a step, and what it saves."""

from __future__ import annotations

import platform
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

import pockc
from pockc.artifact import read
from pockc.artifact_writer import SECTION_IDS
from pockc.errors import UserError
from pockc.interp import evaluate as interpret
from pockc.ir import Graph, op_counts
from pockc.ops.halves import is_weight_gradient
from pockc.optim import SGD, AdamW
from pockc.parity import tolerances, verify_against_torch
from pockc.passes import tile_vocabulary
from pockc.recipe import Dtype
from pockc.targets import devices
from pockc.targets.native.cross import kernel_list

pytestmark = pytest.mark.torch
Half = Literal["bf16", "fp16"]
HALVES: tuple[Half, ...] = ("bf16", "fp16")


def convolutional() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Dense, depthwise, strided and grouped convolutions, a residual, both kinds of pools, a head."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(), nn.MaxPool2d(2))
            self.wide = nn.Sequential(nn.Conv2d(16, 48, 1), nn.ReLU6(), nn.Conv2d(48, 48, 3, padding=1, groups=48))
            self.narrow = nn.Sequential(nn.Hardswish(), nn.Conv2d(48, 16, 1, groups=2))
            self.head = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x + self.narrow(self.wide(x))
            logits: torch.Tensor = self.head(nn.functional.relu(x).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    return Network().eval(), (torch.randn(8, 3, 32, 32),)


def transformer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """An encoder of two blocks with an embedding table."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 32)
            block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
            self.blocks = nn.ModuleList([block, nn.TransformerEncoderLayer(32, 4, 64, 0.0, "relu", batch_first=True)])
            self.head = nn.Linear(32, 6)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            for block in self.blocks:
                x = block(x)
            logits: torch.Tensor = self.head(x.mean(1))
            return logits

    torch.manual_seed(0)
    return Network().train(), (torch.randint(0, 50, (16, 24)),)


NETWORKS = {"convolutional": convolutional, "transformer": transformer}


def test_logits_of_a_large_vocabulary_are_never_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(1000, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 1000, bias=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(torch.tanh(self.body(self.table(input_ids))))
            return logits

    monkeypatch.setattr(tile_vocabulary, "TILE_BYTES", 4 * 400 * 4 * 24)
    monkeypatch.setattr(tile_vocabulary, "_worthwhile", lambda *_: True)
    torch.manual_seed(0)
    model, inputs = Words(), (torch.randint(0, 1000, (4, 24)),)
    options: dict[str, Any] = {"loss": "causal_lm", "optimizer": SGD(lr=0.5), "dtype": "bf16"}
    graph = pockc.build(model, inputs, entries=("train_step",), **options).entries["train_step"]
    assert op_counts(graph.nodes)["cross_entropy_grad_tile"] >= 1
    assert all(node.outputs[0].type.shape[-1] <= 32 for node in graph.nodes if node.op == "cast")
    parity = verify_against_torch(model, inputs, **options)
    assert parity.passed, (parity.worst_loss_error, parity.tensors[:3])


def step_of(name: str, **options: Any) -> Graph:
    model, inputs = NETWORKS[name]()
    return pockc.build(model, inputs, optimizer=SGD(lr=0.05), entries=("train_step",), **options).entries["train_step"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_ten_steps_stay_near_those_of_pytorch(name: str, dtype: Half) -> None:
    model, inputs = NETWORKS[name]()
    parity = verify_against_torch(model, inputs, optimizer=SGD(lr=0.05, momentum=0.9), dtype=dtype)
    assert parity.passed, (parity.worst_loss_error, parity.tensors[:3])
    assert parity.worst_tensor_error > tolerances("f32")[1]  # it is another program
    assert parity.losses[0][0] != parity.losses[0][1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_runtime_does_what_the_reference_says(name: str, dtype: Half, tmp_path: Path) -> None:
    model, inputs = NETWORKS[name]()
    program = pockc.build(model, inputs, optimizer=SGD(lr=0.05), entries=("train_step",), dtype=dtype)
    graph = program.entries["train_step"]
    batch: dict[str, Any] = {graph.inputs[0].name: inputs[0].numpy(), "labels": np.arange(len(inputs[0])) % 6}
    outputs, states = interpret(graph, batch)
    program.save(tmp_path / "model.pock")
    losses, trained = [], []
    for threads in (1, 2, 3, 4):
        with pockc.Session(tmp_path / "model.pock", threads=threads) as session:
            losses.append(session.train_step(**batch))
            trained.append(session.parameters())
    assert losses[0] == pytest.approx(float(outputs["loss"]), rel=1e-3)
    assert len(set(losses)) == 1
    for name_, found in trained[0].items():
        assert all(found.tobytes() == other[name_].tobytes() for other in trained[1:]), name_
    # The sums of the runtime are in another order: some round to a neighbour, which moves little.
    tensor = tolerances(dtype)[1] / 8
    for value, state in graph.states.items():
        if state.kind == "parameter" and value in graph.updates and state.data is not None:
            want = states[value.name] - state.data
            moved = pockc_layout(trained[0][value.name], state.permutation) - state.data
            assert np.linalg.norm(moved - want) <= tensor * np.linalg.norm(want) + 1e-7, value.name


def pockc_layout(array: np.ndarray[Any, Any], permutation: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return array.transpose(permutation) if permutation else array


@pytest.mark.parametrize("name", NETWORKS)
def test_what_sums_over_samples_is_float32(name: str) -> None:
    graph = step_of(name, dtype="bf16")
    assert not any(value.type.is_half for value in (*graph.results(), *graph.states, *graph.inputs))
    sums = [
        node
        for node in graph.nodes
        if node.op in ("conv2d_grad_weight", "layer_norm_grad_gamma")
        or is_weight_gradient(node.op, node.attrs, [value.type for value in node.inputs])
    ]
    assert any(value.type.is_half for node in sums for value in node.inputs)
    assert all(node.outputs[0].type.dtype == "f32" for node in sums)
    for node in graph.nodes:
        if node.op.startswith("cross_entropy") or node.origin.phase == "update":
            assert not any(value.type.is_half for value in (*node.inputs, *node.outputs)), node.op


@pytest.mark.parametrize("dtype", HALVES)
def test_activations_take_half_the_memory(dtype: Half) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(32, 32, 1), nn.GELU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    planned = {}
    for chosen in ("f32", dtype):
        program = pockc.build(
            model,
            (torch.randn(4, 32, 64, 64),),
            optimizer=SGD(lr=0.1),
            entries=("train_step",),
            dtype=chosen,
            micro_batch=4,  # as many samples at a time in both
        )
        planned[chosen] = program.placements["train_step"].nbytes
    assert planned[dtype] < 0.6 * planned["f32"]
    counts = op_counts(program.entries["train_step"].nodes)
    assert counts["cast"] <= 4  # of the input, of logits and of their gradient


def test_the_gradient_of_fp16_is_scaled_and_the_update_is_not() -> None:
    """Gradients of 1e-6 are below half of the least number of fp16 where nothing scales them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x = torch.randn(64, 64)
    moved = {}
    for scale in (1.0, 4096.0):
        program = pockc.build(
            model, (x,), loss=_faint, optimizer=SGD(lr=1e4), dtype="fp16", loss_scale=scale, entries=("train_step",)
        )
        graph = program.entries["train_step"]
        _, states = interpret(graph, {graph.inputs[0].name: x.numpy()})
        weight = graph.state("0.weight")
        moved[scale] = np.linalg.norm(states["0.weight"] - graph.states[weight].data)
    (gradient,) = torch.autograd.grad(_faint(model(x), None), [model.get_parameter("0.weight")])
    assert moved[1.0] < 0.5 * moved[4096.0]
    assert moved[4096.0] == pytest.approx(1e4 * float(gradient.norm()), rel=0.05)


def _faint(output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    return output.square().mean() * 1e-5


def test_micro_batches_budgets_and_frozen_weights_go_with_it(tmp_path: Path) -> None:
    model, inputs = convolutional()
    losses = []
    for options in ({}, {"micro_batch": 2}, {"frozen_dtype": "bf16", "scheme": "last-k:2", "accumulation": 2}):
        program = pockc.build(model, inputs, optimizer=AdamW(lr=1e-3), dtype="bf16", **options)
        program.save(path := tmp_path / "model.pock")
        with pockc.Session(path) as session:
            batch = {"labels": np.arange(8) % 10, program.entries["infer"].inputs[0].name: inputs[0].numpy()}
            losses.append(session.train_step(**batch))
            logits = session.infer(**{name: array for name, array in batch.items() if name != "labels"})
            assert next(iter(logits.values()) if isinstance(logits, dict) else iter([logits])).dtype == np.float32
    np.testing.assert_allclose(losses, losses[0], rtol=tolerances("bf16")[0])


BOARDS = ("rpi5", "x86-64-avx512")


def test_board_gets_the_products_of_its_processor() -> None:
    model, inputs = convolutional()
    program = pockc.build(model, inputs, optimizer=AdamW(lr=1e-3), dtype="bf16", half_arithmetic=True)
    listed = {name: "HALF_PRODUCTS(conv2d)\n" in kernel_list(program, devices.find(name)) for name in BOARDS}
    assert listed == {"rpi5": False, "x86-64-avx512": True}


@pytest.mark.parametrize(("dtype", "number"), [("fp16", 1), ("bf16", 2)])
def test_file_names_the_dtype_of_its_products(tmp_path: Path, dtype: Dtype, number: int) -> None:
    model, inputs = convolutional()
    pockc.build(model, inputs, dtype=dtype, half_arithmetic=True).save(path := tmp_path / "model.pock")
    file = path.read_bytes()
    table = [struct.unpack_from("<IIQQ", file, 64 + 24 * i) for i in range(struct.unpack_from("<I", file, 12)[0])]
    contents = {section: file[offset : offset + size] for section, _, offset, size in table}
    assert contents[SECTION_IDS["half_arithmetic"]] == struct.pack("<I", number)


@pytest.mark.native
def test_half_arithmetic_is_in_the_file_and_changes_nothing_on_a_cpu_without(tmp_path: Path) -> None:
    model, inputs = convolutional()
    losses, hashes = [], []
    for asked in (False, True):
        program = pockc.build(model, inputs, optimizer=AdamW(lr=1e-3), dtype="fp16", half_arithmetic=asked)
        program.save(path := tmp_path / "model.pock")
        assert read(path).metadata["half_arithmetic"] is asked
        listed = {name: "HALF_PRODUCTS(conv2d)\n" in kernel_list(program, devices.find(name)) for name in BOARDS}
        assert listed == {"rpi5": asked, "x86-64-avx512": False}
        hashes.append(read(path).model_hash)
        with pockc.Session(path) as session:
            batch = {"labels": np.arange(8) % 10, program.entries["infer"].inputs[0].name: inputs[0].numpy()}
            losses.append([session.train_step(**batch) for _ in range(2)])
    assert hashes[0] == hashes[1], "each can resume from the other's checkpoint"
    if platform.machine() == "x86_64":
        assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"dtype": "bf16", "target": "onnxruntime"}, "the target onnxruntime has no dtype"),
        ({"dtype": "bf16", "saved_dtype": "int8"}, "there is no such mixture"),
        ({"dtype": "fp16", "prefix_dtype": "int8", "calibration": "example"}, "there is no such mixture"),
        ({"dtype": "fp16", "loss_scale": 1000.0}, "loss_scale is 1000.0"),
        ({"half_arithmetic": True}, "half_arithmetic is for activations in 16 bits, but dtype is 'f32'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], message: str) -> None:
    model, inputs = convolutional()
    with pytest.raises(UserError, match=message):
        pockc.build(model, inputs, **options)
