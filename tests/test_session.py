from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from torch import Tensor, nn

from pockc.artifact import read
from pockc.build import build
from pockc.checkpoint import export, read_checkpoint
from pockc.errors import UserError
from pockc.ir import Array
from pockc.optim import SGD, AdamW
from pockc.program import Program
from pockc.session import Session

pytestmark = [pytest.mark.torch, pytest.mark.native]

BATCH, CLASSES = 4, 3


class TiedText(nn.Module):
    """Embedding, a normalisation, a linear layer, and a head that is the embedding again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.fc(self.norm(self.embedding(ids)))))
        return logits


class ConvNet(nn.Module):
    """Convolution, batch norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def conv_net() -> nn.Module:
    torch.manual_seed(0)
    model = ConvNet()
    model(torch.randn(32, 2, 6, 6))  # moves the running statistics
    return model.eval()


@pytest.fixture(scope="module")
def program(conv_net: nn.Module) -> Program:
    return build(conv_net, {"x": torch.randn(BATCH, 2, 6, 6)}, optimizer=AdamW(lr=1e-2), scheme="full")


@pytest.fixture(scope="module")
def file(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "model.pock"
    program.save(path)
    return path


@pytest.fixture
def session(file: Path) -> Iterator[Session]:
    with Session(file) as opened:
        yield opened


def batch(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    images = random.standard_normal((BATCH, 2, 6, 6)).astype(np.float32)
    return {"x": images, "labels": random.integers(0, CLASSES, BATCH)}


def logits(session: Session, images: Array) -> Array:
    output = session.infer(x=images)
    assert isinstance(output, np.ndarray)
    return output


# --- Steps ------------------------------------------------------------------------------------------------------------


def test_training_on_one_batch_lowers_its_loss(session: Session) -> None:
    losses = [session.train_step(**batch()) for _ in range(30)]

    assert losses[-1] < 0.8 * losses[0]
    assert session.state("pockc.step") == 30


def test_eval_step_gives_loss_and_logits_and_changes_nothing(session: Session) -> None:
    before = session.parameters()
    outputs = session.eval_step(**batch())

    assert outputs["loss"] == pytest.approx(session.train_step(**batch()), rel=1e-6)
    assert outputs["logits"].shape == (BATCH, CLASSES)
    with Session(read_path(session)) as fresh:
        fresh.eval_step(**batch())
        assert all(np.array_equal(before[name], value) for name, value in fresh.parameters().items())


def read_path(session: Session) -> Path:
    return Path(session.path)


def test_inference_equals_pytorch(session: Session, conv_net: nn.Module) -> None:
    images = batch()["x"]
    with torch.no_grad():
        expected = conv_net(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(logits(session, images), expected, rtol=1e-5, atol=1e-6)


def test_inputs_may_be_tensors_narrower_integers_and_doubles(session: Session) -> None:
    given = batch()
    expected = session.eval_step(**given)["loss"]
    for images, labels in [
        (torch.from_numpy(given["x"]), torch.from_numpy(given["labels"])),
        (given["x"].astype(np.float64), given["labels"].astype(np.int32)),
        (np.asfortranarray(given["x"]), given["labels"].tolist()),
    ]:
        assert session.eval_step(x=images, labels=labels)["loss"] == expected


def test_reference_kernels_agree_with_the_fast_ones(file: Path, session: Session) -> None:
    with Session(file, reference_kernels=True) as plain:
        for seed in range(3):
            assert plain.train_step(**batch(seed)) == pytest.approx(session.train_step(**batch(seed)), rel=1e-5)


def test_threads_do_not_change_a_bit(file: Path, session: Session) -> None:
    with Session(file, threads=3) as other:
        for seed in range(3):
            assert other.train_step(**batch(seed)) == session.train_step(**batch(seed))


def test_a_batch_made_in_the_sessions_memory_gives_the_same_bits(file: Path, session: Session) -> None:
    with Session(file) as other:
        for seed in range(3):
            given = batch(seed)
            place = other.input_buffer("train_step", "x")
            place[...] = given["x"]
            assert other.train_step(x=place, labels=given["labels"]) == session.train_step(**given)
            np.testing.assert_array_equal(logits(other, given["x"]), logits(session, given["x"]))


def test_the_buffer_of_an_input_belongs_to_its_entry(session: Session) -> None:
    place = session.input_buffer("infer", "x")
    assert place.ctypes.data == session.input_buffer("infer", "x").ctypes.data
    assert place.shape == batch()["x"].shape
    assert place.dtype == np.float32
    assert "no entry `dance`" in message(lambda: session.input_buffer("dance", "x"))
    assert "no input `labels`" in message(lambda: session.input_buffer("infer", "labels"))
    labels = session.input_buffer("train_step", "labels")
    assert labels.dtype == np.int64
    session.close()
    assert "closed" in message(lambda: session.input_buffer("infer", "x"))


def test_allocated_arena_is_the_planned_one(program: Program, session: Session) -> None:
    session.train_step(**batch())

    assert session.memory.arena_bytes == program.memory.arena_bytes == program.arena_bytes
    assert session.memory.state_bytes == program.state_bytes
    assert 0 < session.memory.used_peak_bytes <= program.arena_bytes


# --- States -----------------------------------------------------------------------------------------------------------


def test_parameters_have_the_users_names_layout_and_values(session: Session, conv_net: nn.Module) -> None:
    parameters = session.parameters()
    expected = {n: p.detach().numpy() for n, p in conv_net.named_parameters() if n != "norm.weight"}  # folded

    assert {name for name in parameters if name != "norm.weight"} == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(parameters[name], value)


def test_tied_parameters_are_listed_under_each_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TiedText().eval()
    build(model, {"ids": torch.randint(0, 16, (2, 5))}, "causal_lm", SGD(lr=0.1)).save(tmp_path / "model.pock")

    with Session(tmp_path / "model.pock") as opened:
        ids = np.random.default_rng(0).integers(0, 16, (2, 5))
        opened.train_step(ids=ids, labels=ids)
        parameters = opened.parameters()
        with pytest.raises(UserError, match=r"head\.weight is tied\. Ask for embedding\.weight\."):
            opened.state("head.weight")

    assert set(parameters) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert not np.array_equal(parameters["embedding.weight"], model.embedding.weight.detach().numpy())
    np.testing.assert_array_equal(parameters["embedding.weight"], parameters["head.weight"])


def test_learning_rate_of_zero_stops_learning(session: Session) -> None:
    session.set_learning_rate(0.0)
    before = session.state("head.weight")
    session.train_step(**batch())

    np.testing.assert_array_equal(session.state("head.weight"), before)
    session.set_learning_rate(1e-2)
    session.train_step(**batch())
    assert not np.array_equal(session.state("head.weight"), before)


def test_written_state_reads_back_in_the_users_layout(session: Session) -> None:
    value = np.arange(6 * 2 * 9, dtype=np.float32).reshape(6, 2, 3, 3)
    session.set_state("conv.weight", value)
    np.testing.assert_array_equal(session.state("conv.weight"), value)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_resumed_training_continues_to_the_last_bit(file: Path, session: Session, tmp_path: Path) -> None:
    for seed in range(3):
        session.train_step(**batch(seed))
    session.save_checkpoint(tmp_path / "tuned.ckpt", cursor={"epoch": 1})
    straight = [session.train_step(**batch(seed)) for seed in range(3, 6)]

    with Session(file) as resumed:
        assert resumed.load_checkpoint(tmp_path / "tuned.ckpt") == {"epoch": 1}
        assert [resumed.train_step(**batch(seed)) for seed in range(3, 6)] == straight
        for name, value in session.parameters().items():
            np.testing.assert_array_equal(resumed.parameters()[name], value)


def test_checkpoint_without_a_cursor_gives_none(session: Session, tmp_path: Path) -> None:
    session.save_checkpoint(tmp_path / "tuned.ckpt")
    assert session.load_checkpoint(tmp_path / "tuned.ckpt") is None


def test_checkpoint_read_by_numpy_has_the_session_states(file: Path, session: Session, tmp_path: Path) -> None:
    session.train_step(**batch())
    session.save_checkpoint(tmp_path / "tuned.ckpt")

    tensors = read_checkpoint(tmp_path / "tuned.ckpt", read(file))

    assert {"conv.weight", "conv.weight.adam_m", "pockc.step"} <= set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, session.state(name))


def test_export_loads_into_the_original_model_with_the_same_logits(
    file: Path, session: Session, conv_net: nn.Module, tmp_path: Path
) -> None:
    for seed in range(5):
        session.train_step(**batch(seed))
    session.save_checkpoint(tmp_path / "tuned.ckpt")
    base = tmp_path / "base.safetensors"
    from safetensors.torch import save_file

    save_file(conv_net.state_dict(), base)

    missing = export(file, tmp_path / "tuned.safetensors", checkpoint=tmp_path / "tuned.ckpt", base=base)

    assert missing == []
    tuned = ConvNet().eval()
    tuned.load_state_dict(load_torch_file(tmp_path / "tuned.safetensors"), strict=True)
    with torch.no_grad():
        expected = tuned(torch.from_numpy(batch()["x"])).numpy()
    np.testing.assert_allclose(logits(session, batch()["x"]), expected, rtol=1e-4, atol=1e-5)


def test_export_without_base_says_what_is_missing(file: Path, tmp_path: Path) -> None:
    missing = export(file, tmp_path / "tuned.safetensors")

    written = load_file(tmp_path / "tuned.safetensors")
    assert sorted(missing) == ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "norm.weight"]
    assert {"conv.weight", "norm.bias", "head.weight", "head.bias"} <= set(written)


# --- Errors -----------------------------------------------------------------------------------------------------------


def message(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_messages_about_wrong_inputs_and_states(golden: Callable[..., None], session: Session) -> None:
    images, labels = batch()["x"], batch()["labels"]
    attempts: dict[str, Callable[[], object]] = {
        "missing": lambda: session.train_step(x=images),
        "unknown": lambda: session.infer(xx=images),
        "shape": lambda: session.infer(x=images[:, :1]),
        "batch size": lambda: session.infer(x=images[:2]),
        "dtype": lambda: session.infer(x=images.astype(np.int64)),
        "float labels": lambda: session.train_step(x=images, labels=labels.astype(np.float32)),
        "label out of range": lambda: session.train_step(x=images, labels=labels + 100),
        "entry": lambda: session.run("forward", x=images),
        "state": lambda: session.state("conv.weigth"),
        "learning rate": lambda: session.set_learning_rate(-1.0),
        "shape of a state": lambda: session.set_state("head.bias", np.zeros(5, np.float32)),
    }
    golden("".join(f"{name}: {message(action)}\n" for name, action in attempts.items()))


def test_failed_step_can_be_followed_by_a_good_one(session: Session) -> None:
    message(lambda: session.train_step(x=batch()["x"], labels=np.full(BATCH, 99)))
    assert np.isfinite(session.train_step(**batch()))


def test_checkpoint_of_another_program_is_refused_and_changes_nothing(
    file: Path, session: Session, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(4, 3)).eval()
    build(other, (torch.randn(2, 4),), optimizer=SGD(lr=0.1)).save(tmp_path / "other.pock")
    with Session(tmp_path / "other.pock") as opened:
        opened.save_checkpoint(tmp_path / "other.ckpt")
    before = session.parameters()

    assert "checkpoint of another program" in message(lambda: session.load_checkpoint(tmp_path / "other.ckpt"))
    assert "checkpoint of another program" in message(lambda: read_checkpoint(tmp_path / "other.ckpt", read(file)))

    assert all(np.array_equal(value, before[name]) for name, value in session.parameters().items())


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "not a checkpoint"])
def test_damaged_checkpoint_is_refused(damage: str, file: Path, session: Session, tmp_path: Path) -> None:
    path = tmp_path / "tuned.ckpt"
    session.save_checkpoint(path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "flipped":
        path.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    else:
        path.write_bytes(json.dumps({"a": 1}).encode())

    assert message(lambda: session.load_checkpoint(path))
    assert message(lambda: read_checkpoint(path, read(file)))


def test_closed_session_says_so(file: Path) -> None:
    session = Session(file)
    session.close()
    session.close()
    assert (
        message(lambda: session.train_step(**batch())) == "this session is closed. Make a new one: pockc.Session(path)."
    )


def test_more_threads_than_planned_are_refused(file: Path, program: Program) -> None:
    assert "threads" in message(lambda: Session(file, threads=program.max_threads + 1))
    assert "threads" in message(lambda: Session(file, threads=0))


def test_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    assert "none.pock" in message(lambda: Session(tmp_path / "none.pock"))
