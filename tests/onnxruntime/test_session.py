"""Sessions over ONNX Runtime: states, checkpoints, exports, and which updates are in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pockc.base_session import BaseSession
from pockc.checkpoint import export
from pockc.errors import UserError
from pockc.ir import Builder, Graph, TensorType, Value
from pockc.optim import Lion
from pockc.session import open_session
from pockc.targets.onnxruntime.entry import make_entry
from tests.onnxruntime.models import batch, saved

pytestmark = [pytest.mark.torch]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("session"), optimizer=Lion(lr=1e-3), accumulation=2)


def trained(session: BaseSession, *seeds: int) -> list[float]:
    return [session.train_step(**batch(seed)) for seed in seeds]


def test_a_resumed_run_continues_bit_for_bit(file: Path, tmp_path: Path) -> None:
    with open_session(file) as whole, open_session(file) as first, open_session(file) as second:
        losses = trained(whole, 0, 1, 2, 3, 4)
        begun = trained(first, 0, 1, 2)  # the last is half of an optimizer step
        first.save_checkpoint(tmp_path / "half.ckpt", cursor={"epoch": 2})

        assert second.load_checkpoint(tmp_path / "half.ckpt") == {"epoch": 2}
        assert begun + trained(second, 3, 4) == losses
        for name in whole.states:
            np.testing.assert_array_equal(whole.state(name), second.state(name))


def test_micro_steps_leave_the_parameters_alone_until_the_last(file: Path) -> None:
    with open_session(file) as session:
        before = session.state("head.weight")
        trained(session, 0)
        np.testing.assert_array_equal(session.state("head.weight"), before)
        trained(session, 1)
        assert not np.array_equal(session.state("head.weight"), before)


def test_export_has_the_tuned_parameters(file: Path, tmp_path: Path) -> None:
    with open_session(file) as session:
        trained(session, 0, 1)
        session.save_checkpoint(tmp_path / "tuned.ckpt")
        parameters = session.parameters()
    export(file, tmp_path / "tuned.safetensors", checkpoint=tmp_path / "tuned.ckpt")

    exported = load_file(str(tmp_path / "tuned.safetensors"))
    np.testing.assert_array_equal(exported["block.3.weight"], parameters["block.3.weight"])
    assert exported["block.3.weight"].shape == (32, 1, 3, 3)


def test_written_state_is_what_the_next_step_reads(file: Path) -> None:
    with open_session(file) as session:
        session.set_learning_rate(0.0)
        before = session.parameters()
        trained(session, 0, 1)
        for name, array in session.parameters().items():
            np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.run("accumulate", **batch(0)), "it takes care of accumulate"),
        (lambda s: s.train_step(**{**batch(0), "labels": np.full(4, 7)}), "ONNX Runtime failed in accumulate"),
        (lambda s: s.run("encode"), "the program has no entry 'encode'"),
        (lambda s: s.state("nothing"), "has no state 'nothing'"),
        (lambda s: (s.close(), s.train_step(**batch(0))), "this session is closed"),
    ],
)
def test_mistakes_end_in_one_sentence(file: Path, act: Callable[[BaseSession], object], message: str) -> None:
    with open_session(file) as session, pytest.raises(UserError, match=message):
        act(session)


def test_a_checkpoint_of_another_program_changes_nothing(file: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "other").mkdir()
    with open_session(saved(folder)) as other:
        other.save_checkpoint(tmp_path / "other.ckpt")
    with open_session(file) as session:
        before = session.state("head.weight")
        with pytest.raises(UserError, match="is a checkpoint of another program"):
            session.load_checkpoint(tmp_path / "other.ckpt")
        np.testing.assert_array_equal(session.state("head.weight"), before)


def test_models_of_another_build_are_refused(file: Path, tmp_path: Path) -> None:
    other = saved(tmp_path, scheme="bias-only")
    (tmp_path / "infer.onnx").write_bytes((file.parent / "infer.onnx").read_bytes())
    with open_session(other) as session, pytest.raises(UserError, match="are not of one build"):
        session.infer(x=batch(0)["x"])


# --- Updates in place -------------------------------------------------------------------------------------------------


def updating(make: Callable[[Builder, Value, Value], tuple[Value, Value]]) -> Graph:
    """A graph with an output and a new value of the state w: what ``make(builder, x, w)`` returns."""
    builder = Builder()
    x = builder.input("x", TensorType((4, 4)))
    w = builder.state("w", "parameter", np.ones((4, 4), np.float32))
    output, new = make(builder, x, w)
    return builder.build({"y": output}, {w: new})


def in_place(make: Callable[[Builder, Value, Value], tuple[Value, Value]]) -> bool:
    return make_entry("test", updating(make), {"w"}).in_place == {"w"}


def test_an_update_behind_every_reader_is_in_place() -> None:
    def make(b: Builder, x: Value, w: Value) -> tuple[Value, Value]:
        y = b("matmul", x, w)
        return y, b("sub", w, b("exp", y))

    assert in_place(make)


def test_an_update_that_does_not_wait_for_a_reader_is_not() -> None:
    def make(b: Builder, x: Value, w: Value) -> tuple[Value, Value]:
        return b("matmul", x, w), b("sub", w, x)

    assert not in_place(make)


def test_who_reads_a_view_reads_the_state() -> None:
    def make(b: Builder, x: Value, w: Value) -> tuple[Value, Value]:
        return b("exp", b("reshape", w, shape=(16,))), b("sub", w, x)

    assert not in_place(make)


def test_a_product_may_not_overwrite_what_it_still_reads() -> None:
    def make(b: Builder, x: Value, w: Value) -> tuple[Value, Value]:
        return b("exp", x), b("matmul", w, x)

    assert not in_place(make)
