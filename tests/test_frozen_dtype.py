"""Programs whose frozen weights are stored as bf16, int8 or int4: agreement with PyTorch, memory, files, exports."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import verify_zoo, zoo
from pockc.artifact import read
from pockc.artifact_writer import HEADER, SECTION
from pockc.build import build
from pockc.checkpoint import decoded_names, export
from pockc.compact import COMPACT_DTYPES
from pockc.errors import UserError
from pockc.interp import evaluate
from pockc.ir import Graph, TensorType
from pockc.optim import SGD
from pockc.parity import verify_against_torch
from pockc.program import Program
from pockc.recipe import FrozenDtype
from pockc.session import Session

pytestmark = [pytest.mark.torch, pytest.mark.native]
COMPACT: tuple[FrozenDtype, ...] = ("bf16", "int8", "int4")
STORED = {"bf16": "bf16", "int8": "q8", "int4": "q4"}
LARGE = ((64, 96), (96, 96), (64, 3, 3, 96), (96, 64))  # frozen weights of `Net`


class Net(nn.Module):
    """A tied table, a convolution under a batch norm, frozen layers on both sides of a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 96)
        self.first = nn.Linear(96, 96)
        self.middle = nn.Linear(96, 96)
        self.conv = nn.Conv2d(96, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.last = nn.Linear(64, 96)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.first(self.table(ids))))
        x = torch.relu(self.norm(self.conv(x.mT.reshape(len(ids), 96, 4, 4))))
        logits: Tensor = self.last(x.mean((2, 3))) @ self.table.weight.mT
        return logits


def network() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for tensor, low, high in (
        (net.norm.running_var, 0.5, 2.0),
        (net.norm.running_mean, -0.5, 0.5),
        (net.norm.weight, 0.5, 1.5),
    ):
        assert tensor is not None
        nn.init.uniform_(tensor, low, high)
    return net.eval()


def batch(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {"ids": random.integers(0, 64, (3, 16)), "labels": random.integers(0, 64, 3)}


def compile_model(model: nn.Module, frozen_dtype: FrozenDtype) -> Program:
    example = {"ids": torch.from_numpy(batch(0)["ids"])}
    return build(model, example, optimizer=SGD(lr=0.05), scheme="head:middle", frozen_dtype=frozen_dtype)


@cache
def compiled(frozen_dtype: FrozenDtype) -> Program:
    return compile_model(network(), frozen_dtype)


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", COMPACT)
@pytest.mark.parametrize("name", ["mobilenet_v2", "llama_tiny"])
def test_ten_sparse_steps_agree_with_pytorch_on_the_decoded_weights(name: str, frozen_dtype: FrozenDtype) -> None:
    model, inputs = zoo.ZOO[name](**verify_zoo.arguments_of(name, small=True))
    optimizer = verify_zoo.OPTIMIZERS["adamw"]
    parity = verify_against_torch(
        model, inputs, verify_zoo.loss_of(name), optimizer, "sparse", seed=verify_zoo.SEED, frozen_dtype=frozen_dtype
    )
    assert parity.passed, (parity.worst_loss_error, parity.worst_tensor_error)
    assert any(not tensor.gradient_is_zero for tensor in parity.tensors)


@pytest.mark.parametrize("frozen_dtype", COMPACT)
@pytest.mark.parametrize("reference_kernels", [False, True])
def test_ten_steps_of_every_kind_of_weight_agree(frozen_dtype: FrozenDtype, reference_kernels: bool) -> None:
    example = {"ids": torch.from_numpy(batch(0)["ids"])}
    parity = verify_against_torch(
        network(), example, optimizer=SGD(lr=0.05), scheme="head:middle", frozen_dtype=frozen_dtype,
        reference_kernels=reference_kernels,
    )  # fmt: skip
    assert parity.passed, (parity.worst_loss_error, parity.worst_tensor_error)


@pytest.mark.parametrize("frozen_dtype", COMPACT)
def test_mapped_bytes_fall_and_are_what_the_runtime_maps(frozen_dtype: FrozenDtype, tmp_path: Path) -> None:
    plain, program = compiled("f32"), compiled(frozen_dtype)
    before, after = (p.memory.by_kind["frozen_parameters"] for p in (plain, program))
    saved = sum(4 * prod(shape) - TensorType(shape, STORED[frozen_dtype]).nbytes for shape in LARGE)
    assert before - after == saved
    assert before / after > {"bf16": 1.9, "int8": 3.8, "int4": 6.8}[frozen_dtype]
    assert program.arena_bytes == plain.arena_bytes
    program.save(tmp_path / "model.pock")
    with Session(tmp_path / "model.pock") as session:
        assert session.memory.arena_bytes == program.arena_bytes
        rounding = 64 * len(read(tmp_path / "model.pock").tensors)
        assert after - rounding <= session.memory.mapped_bytes <= after


def test_float_frozen_weights_leave_the_program_section_and_the_version_as_they_were(tmp_path: Path) -> None:
    example = {"ids": torch.from_numpy(batch(0)["ids"])}
    build(network(), example, optimizer=SGD(lr=0.05), scheme="head:middle").save(tmp_path / "default.pock")
    compiled("f32").save(tmp_path / "f32.pock")
    compiled("int8").save(tmp_path / "int8.pock")
    versions = [struct.unpack_from("<8xI", (tmp_path / f).read_bytes())[0] for f in ("default.pock", "int8.pock")]
    assert versions == [1, 2]
    assert read(tmp_path / "default.pock").model_hash == read(tmp_path / "f32.pock").model_hash
    assert read(tmp_path / "default.pock").model_hash != read(tmp_path / "int8.pock").model_hash


@pytest.mark.parametrize("frozen_dtype", COMPACT)
def test_entries_agree_and_the_interpreter_sees_decoded_weights(frozen_dtype: FrozenDtype, tmp_path: Path) -> None:
    program = compiled(frozen_dtype)
    program.save(tmp_path / "model.pock")
    given = batch(3)
    with Session(tmp_path / "model.pock") as session:
        evaluated = session.eval_step(**given)
        logits = session.infer(ids=given["ids"])
        loss = session.train_step(**given)
    expected, _ = evaluate(program.entries["train_step"], given)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(evaluated["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_array_equal(evaluated["logits"], logits)
    compact = [state.tensor for state in read(tmp_path / "model.pock").states if state.tensor.dtype in COMPACT_DTYPES]
    assert len(compact) == 3  # table, first, last; the convolution's is a constant


@pytest.mark.parametrize("frozen_dtype", COMPACT)
def test_parameters_come_back_decoded_under_their_names_in_the_users_layout(
    frozen_dtype: FrozenDtype, tmp_path: Path
) -> None:
    program = compiled(frozen_dtype)
    program.save(tmp_path / "model.pock")
    artifact = read(tmp_path / "model.pock")
    model = dict(network().named_parameters())
    with Session(tmp_path / "model.pock") as session:
        found = session.parameters()
        with pytest.raises(UserError, match="frozen"):
            session.set_state("first.weight", found["first.weight"])
    np.testing.assert_array_equal(found["first.bias"], model["first.bias"].detach().numpy())
    for name in ("table.weight", "first.weight", "last.weight"):
        original = model[name].detach().numpy()
        error = np.abs(found[name] - original).max() / np.abs(original).max()
        assert found[name].dtype == np.float32 and found[name].shape == original.shape
        assert 0 < error < {"bf16": 1 / 256, "int8": 1 / 250, "int4": 0.13}[frozen_dtype]
        np.testing.assert_array_equal(artifact.contents(artifact.state_by_name[name]), found[name])


@pytest.mark.parametrize("frozen_dtype", COMPACT)
def test_a_permuted_compact_state_is_read_in_the_users_layout(frozen_dtype: FrozenDtype, tmp_path: Path) -> None:
    program = compiled(frozen_dtype)
    program.save(tmp_path / "plain.pock")
    turned: dict[str, Graph] = {}
    for name, graph in program.entries.items():
        value = graph.state("last.weight")
        states = {**graph.states, value: replace(graph.states[value], permutation=(1, 0))}
        turned[name] = replace(graph, states=states)
    replace(program, entries=turned).save(tmp_path / "turned.pock")
    with Session(tmp_path / "plain.pock") as plain, Session(tmp_path / "turned.pock") as session:
        np.testing.assert_array_equal(session.state("last.weight"), plain.state("last.weight").T)
    artifact = read(tmp_path / "turned.pock")
    assert artifact.contents(artifact.state_by_name["last.weight"]).shape == (64, 96)


def test_exports_take_frozen_weights_from_the_base_and_say_where_they_cannot(tmp_path: Path) -> None:
    model = network()
    file, base, output = (tmp_path / name for name in ("model.pock", "base.safetensors", "tuned.safetensors"))
    save_file(model.state_dict(), base)
    compile_model(model, "int4").save(file)
    with Session(file) as session:
        for seed in range(3):
            session.train_step(**batch(seed))
        session.save_checkpoint(tmp_path / "tuned.ckpt")
        tuned = session.parameters()
    saved = load_file(tmp_path / "tuned.ckpt")
    assert not any(name in saved for name in ("table.weight", "first.weight", "last.weight"))

    assert export(file, output, checkpoint=tmp_path / "tuned.ckpt", base=base) == []
    assert decoded_names(file, base) == []
    exported = load_file(output)
    for name, tensor in model.state_dict().items():
        kept = torch.equal(exported[name], tensor)
        assert kept != name.startswith("middle"), name
    np.testing.assert_array_equal(exported["middle.weight"].numpy(), tuned["middle.weight"])

    export(file, output, checkpoint=tmp_path / "tuned.ckpt")
    assert sorted(decoded_names(file)) == ["first.weight", "last.weight", "table.weight"]
    np.testing.assert_array_equal(load_file(output)["first.weight"].numpy(), tuned["first.weight"])
    assert not np.array_equal(tuned["first.weight"], model.state_dict()["first.weight"].numpy())


def test_a_parameter_that_one_entry_reads_in_another_way_stays_float() -> None:
    """A tied table that is also summed is no weight operand alone; a trained table is none at all."""

    class Summed(Net):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            return logits + (self.table.weight * logits.mean()).sum(1)

    torch.manual_seed(0)
    program = compile_model(Summed().eval(), "int8")
    assert program.entries["train_step"].state("table.weight").type.dtype == "f32"
    assert program.entries["train_step"].state("first.weight").type.dtype == "q8"
    assert program.entries["train_step"].state("middle.weight").type.dtype == "f32"
    assert program.entries["infer"].state("middle.weight").type.dtype == "f32"


def test_unknown_frozen_dtype_is_told() -> None:
    with pytest.raises(UserError, match="f32, bf16, int8, int4"):
        compiled("fp8")


# Damaged files: what a tensor says of itself must fit, whatever it says


def _with_tensor(content: bytes, row: bytes, changed: bytes) -> bytes:
    """The file with one tensor's row replaced, all checksums made right again."""
    count = struct.unpack_from("<12xI", content)[0]
    sections = [SECTION.unpack_from(content, HEADER.size + i * SECTION.size) for i in range(count)]
    (index,) = (i for i, section in enumerate(sections) if section[0] == 2)
    code, _, offset, size = sections[index]
    body = content[offset : offset + size]
    assert row in body and len(row) == len(changed)
    body = body.replace(row, changed)
    sections[index] = (code, zlib.crc32(body), offset, size)
    table = b"".join(SECTION.pack(*section) for section in sections)
    head = content[:24] + struct.pack("<I", zlib.crc32(table))
    head += struct.pack("<I", zlib.crc32(head)) + content[32:64]
    return head + table + content[64 + len(table) : offset] + body + content[offset + size :]


def test_compact_tensors_that_lie_about_themselves_are_refused(tmp_path: Path) -> None:
    file, damaged = tmp_path / "model.pock", tmp_path / "damaged.pock"
    compiled("int4").save(file)
    content = file.read_bytes()
    tensor = read(file).state_by_name["table.weight"].tensor

    def row(dtype: int, storage: int, shape: tuple[int, ...], offset: int) -> bytes:
        return bytes([dtype, storage, len(shape), 0]) + struct.pack(f"<{len(shape)}qQ", *shape, offset)

    own = row(7, 1, (64, 96), tensor.offset)
    for changed in (
        row(8, 1, (64, 96), tensor.offset),  # no such dtype
        row(7, 0, (64, 96), 0),  # in the arena
        row(7, 1, (1 << 30, 96), tensor.offset),  # outside of DATA
        row(7, 1, (1 << 40, 1 << 40), tensor.offset),  # more than any number of bytes
        row(7, 1, (64, 1 << 22), tensor.offset),
        row(0, 1, (1 << 20, 96), tensor.offset),
        row(5, 1, (63, 96), tensor.offset),  # fits, but no longer the ops
        row(7, 1, (64, 97), tensor.offset),
    ):
        damaged.write_bytes(_with_tensor(content, own, changed))
        with pytest.raises(UserError):
            Session(damaged)
    damaged.write_bytes(_with_tensor(content, own, own))
    Session(damaged).close()
