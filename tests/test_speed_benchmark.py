"""The speed benchmark: its sides agree on a small model, and the arithmetic of its figures."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import speed, speed_report
from benchmarks.speed_sides import pockc_side, protocol, pytorch_side

pytestmark = pytest.mark.torch

# A side without any library: its losses fall by a tenth per step, and a task of the model "none" is refused.
FAKE_SIDE = """
import sys
from benchmarks.speed_sides import protocol

class Falling:
    def __init__(self, task):
        if task.model == "none":
            raise ValueError("no such model\\nthe second line")
        print("a library prints this")
        self.trained, self.loss, self.factor = ("weight",), 1.0, 0.9

    def run(self):
        loss, self.loss = self.loss, self.loss * self.factor
        return loss

    def stop_learning(self):
        self.factor = 1.0

sys.exit(protocol.serve(Falling))
"""


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> protocol.Side:
    (tmp_path / "fake_side.py").write_text(FAKE_SIDE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{protocol.ROOT}")
    return protocol.Side(Path(sys.executable), "fake_side", (), 1, tmp_path / "log")


def task_of(model: str = "mobilenet_v2", folder: str = "") -> protocol.Task:
    return protocol.Task(model, {}, "cross_entropy", "full", 0.1, 1, folder)


def timing_of(*cpu_ms: float) -> speed.Timing:
    return speed.Timing(cpu_ms, cpu_ms, len(cpu_ms), (2.0, 1.0), 0.0)


def result_of(index: int, scheme: str, **cpu_ms: float) -> speed.Result:
    timings = {name.replace("_", "-"): timing_of(value) for name, value in cpu_ms.items()}
    return speed.Result(speed.CASES[index], scheme, 1, timings, {})


def test_side_answers_until_it_is_closed_and_survives_a_task_that_it_refuses(side: protocol.Side) -> None:
    with pytest.raises(protocol.SideError, match="no task is open"):
        side.step(1)
    with pytest.raises(protocol.SideError, match=r"^ValueError: no such model$"):
        side.open(task_of("none"))
    assert side.open(task_of()) == ("weight",)
    assert side.step(2).losses == (1.0, 0.9)
    side.stop_learning()
    steps = side.step(2)
    side.close()

    assert steps.losses[0] == steps.losses[1] == pytest.approx(0.81)
    assert len(steps.cpu_ms) == len(steps.wall_ms) == 2
    assert "a library prints this" in side.log.read_text()


def test_side_whose_process_is_gone_says_where_to_look(side: protocol.Side) -> None:
    side.process.kill()
    with pytest.raises(protocol.SideError, match=f"ended with exit code -9: see {side.log}"):
        side.step(1)
    side.close()


def test_side_that_takes_too_long_is_ended(side: protocol.Side) -> None:
    with pytest.raises(protocol.SideError, match="not done within 0 s"):
        side.step(1, seconds=0.01)  # less than Python takes to start
    side.close()


def test_sides_take_the_same_steps_on_a_small_model(tmp_path: Path) -> None:
    case = speed.quick_case(speed.CASES[0])
    task = protocol.Task(case.model, case.arguments, case.loss, "bias-only", case.learning_rate, 1, str(tmp_path), True)
    ours = pockc_side.PockcStep(task)
    task = replace(task, trained=ours.trained)
    theirs = pytorch_side.PyTorchStep(task, layout="channels_last", compiled=False)
    losses = {step: [step.run(), step.run()] for step in (ours, theirs)}
    for step in losses:
        step.stop_learning()
        losses[step] += [step.run(), step.run()]

    assert speed.loss_error(losses[ours], losses[theirs]) < 1e-5
    assert losses[ours][1] < losses[ours][0]
    assert losses[ours][3] == losses[ours][2]
    assert all(name.endswith("bias") for name in ours.trained)
    assert {"weights.npz", "batch.npz"} <= {file.name for file in tmp_path.iterdir()}


def test_loss_that_is_not_finite_is_no_agreement() -> None:
    assert speed.loss_error((1.0, 2.002), (1.0, 2.0)) == pytest.approx(1e-3)
    assert speed.loss_error((1.0, float("nan")), (1.0, 2.0)) == float("inf")


def test_best_pytorch_is_the_fastest_way_of_each_case() -> None:
    result = result_of(0, "full", pockc=10.0, contiguous=30.0, channels_last=20.0, compile=25.0, jax=1.0)

    assert result.best_pytorch() == "channels-last"
    assert result.ratio("channels-last") == 2.0
    assert result.ratio("tensorflow") is None


def test_summaries_are_geometric_means_with_their_worst_case() -> None:
    results = [
        result_of(0, "full", pockc=10.0, contiguous=20.0),
        result_of(1, "full", pockc=10.0, contiguous=5.0),
        result_of(0, "sparse", pockc=5.0, contiguous=10.0),
    ]
    found = {summary.what: summary for summary in speed_report.summaries(results)}

    full = found["full: best PyTorch / pockc"]
    assert full.mean == pytest.approx(1.0)
    assert (full.worst, full.worst_case) == (0.5, "MobileNetV2 224 px b8 full")
    assert found["vision: full best PyTorch / sparse pockc"].mean == pytest.approx(4.0)
    assert "text: full best PyTorch / sparse pockc" not in found
    missed = [bar.what for bar in speed.bars_of(results) if not bar.met]
    assert missed == ["full: best PyTorch / pockc, geometric mean", "full: best PyTorch / pockc, worst case"]


def test_a_side_with_other_losses_misses_a_bar() -> None:
    result = replace(result_of(0, "full", pockc=10.0), errors={"jax": "its losses 1 are not those of the others, 2"})

    assert [bar.met for bar in speed.truth_bars([result])] == [True, False]


def test_channels_last_is_a_way_of_images_alone_and_a_cache_one_of_sparse_schemes() -> None:
    ways = ("channels-last", "contiguous", "pockc", "pockc-cached")

    assert speed.ways_of(speed.CASES[0], "full", ways) == ["pockc", "contiguous", "channels-last"]
    assert speed.ways_of(speed.CASES[-1], "sparse", ways) == ["pockc", "pockc-cached", "contiguous"]


def test_the_cached_step_has_bars_of_its_own() -> None:
    full = result_of(0, "full", pockc=10.0, contiguous=20.0, tensorflow=30.0)
    sparse = result_of(0, "sparse", pockc=5.0, pockc_cached=4.0)
    missed = {bar.what: bar for bar in speed.bars_of([full, sparse]) if "cached" in bar.what}

    assert missed["vision: full best PyTorch / sparse, cached, geometric mean"].value == pytest.approx(5.0)
    assert missed["full TensorFlow / sparse, cached, worst case"].value == pytest.approx(7.5)
