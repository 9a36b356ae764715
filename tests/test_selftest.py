"""Golden vectors in program files, and `pock-run selftest`, which judges a machine by them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch import Tensor, nn

from pockc.abi import runtime_file
from pockc.artifact import read, write
from pockc.build import build
from pockc.errors import UserError
from pockc.golden import MAX_BYTES, golden_vectors
from pockc.optim import SGD
from pockc.program import Program
from pockc.session import Session

pytestmark = [pytest.mark.torch, pytest.mark.native]


@pytest.fixture(scope="module")
def runner() -> Path:
    try:
        return runtime_file("pock-run")
    except UserError as error:
        pytest.skip(str(error))


class Convolutions(nn.Module):
    """Strided, depthwise and pointwise convolutions with batch norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(pixel_values).mean((2, 3)))
        return logits


class Encoder(nn.Module):
    """The shape of BERT: embeddings, attention with a mask, feed-forward with GELU, layer norms, a pooled head."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.positions = nn.Embedding(30, width), nn.Embedding(12, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.classifier = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows, length = input_ids.shape
        x = self.norms[0](self.words(input_ids) + self.positions.weight[:length])
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = attention_mask[:, None, None, :].bool()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norms[1](x + self.out(mixed.transpose(1, 2).reshape(rows, length, -1)))
        x = self.norms[2](x + self.down(nn.functional.gelu(self.up(x))))
        logits: Tensor = self.classifier(torch.tanh(x[:, 0]))
        return logits


def convolutions() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Convolutions().eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    return Encoder().eval(), {"input_ids": torch.randint(0, 30, (2, 12)), "attention_mask": mask}


@pytest.fixture(scope="module")
def program() -> Program:
    return build(*convolutions(), optimizer=SGD(lr=0.1))


def selftest(runner: Path, file: Path) -> tuple[int, str]:
    done = subprocess.run([runner, "selftest", file], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("make", [convolutions, encoder])
@pytest.mark.parametrize("scheme", ["full", "bias-only"])
def test_program_passes_its_own_test_in_every_entry(make: Any, scheme: str, runner: Path, tmp_path: Path) -> None:
    model, examples = make()
    file = tmp_path / "model.pock"
    build(model, examples, scheme=scheme).save(file, golden=examples)

    code, printed = selftest(runner, file)

    assert code == 0, printed
    assert "selftest passed" in printed
    for output in ("train_step/loss", "eval_step/loss", "eval_step/logits", "infer/logits"):
        assert f"ok   {output} " in printed


def test_programs_that_accumulate_test_what_runs_alone(runner: Path, tmp_path: Path) -> None:
    model, examples = convolutions()
    build(model, examples, accumulation=2).save(tmp_path / "model.pock", golden=examples)

    code, printed = selftest(runner, tmp_path / "model.pock")

    assert code == 0, printed
    assert "infer/logits" in printed and "train_step" not in printed


def test_expected_outputs_are_those_of_pytorch(program: Program) -> None:
    vectors = load(golden_vectors(program, convolutions()[1]))
    with torch.no_grad():
        logits = convolutions()[0](torch.from_numpy(vectors["infer/input/pixel_values"])).numpy()
    np.testing.assert_allclose(vectors["infer/output/logits"], logits, rtol=1e-4, atol=1e-5)


def test_vectors_do_not_change_the_program_and_are_the_same_each_time(program: Program, tmp_path: Path) -> None:
    examples = convolutions()[1]
    program.save(tmp_path / "plain.pock")
    program.save(tmp_path / "tested.pock", golden=examples)
    program.save(tmp_path / "again.pock", golden=examples)

    assert read(tmp_path / "plain.pock").model_hash == read(tmp_path / "tested.pock").model_hash
    assert (tmp_path / "tested.pock").read_bytes() == (tmp_path / "again.pock").read_bytes()


def test_changed_expectation_fails(program: Program, runner: Path, tmp_path: Path) -> None:
    vectors = load(golden_vectors(program, convolutions()[1]))
    vectors["infer/output/logits"] = vectors["infer/output/logits"] + 0.01
    write(program, tmp_path / "model.pock", golden=save(vectors))

    code, printed = selftest(runner, tmp_path / "model.pock")

    assert code == 1
    assert "FAIL infer/logits" in printed and "selftest FAILED" in printed
    assert "ok   eval_step/loss" in printed


def test_flipped_bit_of_a_weight_is_found(program: Program, runner: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pock"
    program.save(file, golden=convolutions()[1])
    artifact = read(file)
    weight = artifact.contents(artifact.state_by_name["head.weight"]).tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(weight) + 5] ^= 1
    file.write_bytes(content)

    code, printed = selftest(runner, file)

    assert code != 0
    assert "checksum" in printed


def test_program_without_vectors_says_so(program: Program, runner: Path, tmp_path: Path) -> None:
    program.save(tmp_path / "model.pock")
    code, printed = selftest(runner, tmp_path / "model.pock")
    assert code != 0
    assert "holds no golden vectors" in printed


def test_vectors_stay_small(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    examples = convolutions()[1]
    one_entry = examples["pixel_values"].nbytes + 100
    monkeypatch.setattr("pockc.golden.MAX_BYTES", one_entry)
    entries = {name.partition("/")[0] for name in load(golden_vectors(program, examples))}
    monkeypatch.setattr("pockc.golden.MAX_BYTES", 10)
    nothing = golden_vectors(program, examples)

    assert one_entry < MAX_BYTES
    assert entries == {"train_step"}
    assert nothing == b""


def test_large_outputs_are_left_to_the_loss(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    monkeypatch.setattr("pockc.golden.MAX_OUTPUT_BYTES", 8)
    names = {name for name in load(golden_vectors(program, convolutions()[1])) if "/output/" in name}
    assert names == {"train_step/output/loss", "eval_step/output/loss"}


def test_example_of_every_input_is_needed(program: Program) -> None:
    with pytest.raises(UserError, match="train_step needs an example of 'pixel_values'"):
        golden_vectors(program, {"labels": np.zeros(2, np.int64)})


def test_expectations_come_from_the_reference_kernels_unless_that_takes_minutes(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[bool] = []

    class Recorder(Session):
        def __init__(self, path: Path, threads: int, *, reference_kernels: bool) -> None:
            plain.append(reference_kernels)
            super().__init__(path, threads, reference_kernels=reference_kernels)

    monkeypatch.setattr("pockc.golden.Session", Recorder)
    golden_vectors(program, convolutions()[1])
    monkeypatch.setattr("pockc.golden.MAX_REFERENCE_WORK", 1000)
    golden_vectors(program, convolutions()[1])
    assert plain == [True] * 3 + [False] * 3
