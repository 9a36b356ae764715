"""The memory benchmark on small models, and the arithmetic of its figures."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import memory, memory_int8, memory_peer, memory_plans, zoo
from pockc.memory_report import LiveTensor

pytestmark = pytest.mark.torch

ANSWER = memory_peer.Answer(1000, 5000, 0, 10, (2.0,))


def plan_of(**changes: Any) -> memory.Plan:
    plan = memory.Plan(
        trained=("a",), trained_elements=25, model_bytes=500, trained_bytes=100, arena_bytes=1100, mapped_bytes=400,
        by_kind={}, at_peak=(), tightness=memory_plans.Tightness("m", "s", 1000, 1000), entries={"train_step": 1000},
        allocated_bytes=1100, allocated_mapped_bytes=400, used_peak_bytes=1000, loss=2.0,
        process={"rss_before_load_bytes": 10, "rss_peak_bytes": 1510},
    )  # fmt: skip
    return replace(plan, **changes)


def test_what_is_added_leaves_parameters_out_and_counts_constants_beyond_them() -> None:
    assert plan_of().added_bytes == 1000
    assert plan_of(mapped_bytes=300).added_bytes == 1000
    assert plan_of(mapped_bytes=450).added_bytes == 1050


def test_bars_judge_the_better_layout_of_pytorch() -> None:
    worse = replace(ANSWER, peak_bytes=9000)
    case = replace(memory.CASES[0], at_least=4.0)
    result = memory.Result(case, plan_of(), {"contiguous": worse, "channels_last": ANSWER})

    assert result.ratio == 4.0
    assert all(bar.met for bar in result.bars(judged=True))
    stricter = replace(result, case=replace(case, at_least=4.1))
    assert [bar.what for bar in stricter.bars(judged=True) if not bar.met] == [f"{case.title}: PyTorch / pockc"]
    assert all(bar.met for bar in stricter.bars(judged=False))


@pytest.mark.parametrize(
    "changes", [{"allocated_bytes": 1164}, {"used_peak_bytes": 1164}, {"allocated_mapped_bytes": 464}, {"loss": 3.0}]
)
def test_figure_that_the_runtime_contradicts_misses_a_bar(changes: dict[str, Any]) -> None:
    result = memory.Result(memory.CASES[0], plan_of(**changes), {"contiguous": ANSWER})

    assert len([bar for bar in result.bars(judged=False) if not bar.met]) == 1


def test_tensors_that_differ_by_a_number_count_as_one_group() -> None:
    names = [("conv2d_1", "features.1.conv"), ("conv2d_22", "features.2.conv"), ("add", "features.2")]
    tensors = [LiveTensor(name, "f32[16]", 64, "saved_activations", module, "") for name, module in names]
    parameter = LiveTensor("features.1.conv.weight", "f32[99]", 448, "parameters", "features.1.conv", "")

    groups = memory.group_tensors([*tensors, parameter])

    assert [(group["name"], group["module"], group["count"], group["nbytes"]) for group in groups] == [
        ("conv2d", "features.#.conv", 2, 128),
        ("add", "features.#", 1, 64),
    ]


def test_high_water_mark_sees_memory_that_is_freed_again() -> None:
    size = 64 << 20
    before = memory_peer._start_of_measurement()
    block = np.ones(size, np.uint8)
    del block
    grown = memory_peer._status()["VmHWM"] - before["VmRSS"]

    assert size - (1 << 20) <= grown < size + (8 << 20)
    assert memory_peer._start_of_measurement()["VmHWM"] < before["VmRSS"] + size // 2


def test_random_schemes_are_the_same_in_every_run_and_differ_from_each_other() -> None:
    model, _ = zoo.mobilenet_v2(**zoo.SMALL["mobilenet_v2"])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def schemes() -> list[str]:
        generator = random.Random(0)
        made = [memory_plans.random_scheme(shapes, generator, "random") for _ in range(5)]
        return [scheme.model_dump_json() for scheme in made]

    assert schemes() == schemes()
    assert len(set(schemes())) == 5


@pytest.mark.parametrize(("switches", "schemes"), [([], 200), (["--quick"], 12), (["--random-schemes", "7"], 7)])
def test_plans_alone_make_a_report(
    switches: list[str],
    schemes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(random_schemes: int, *, small: bool) -> list[memory_plans.Tightness]:
        assert (random_schemes, small) == (schemes, "--quick" in switches)
        return [memory_plans.Tightness("m", name, planned, 1000) for name, planned in (("a", 1000), ("b", 1040))]

    monkeypatch.setattr(memory_plans, "measure_tightness", measured)
    output = tmp_path / "memory.json"

    code = memory.main(["--plans-only", *switches, "--output", str(output)])

    content = json.loads(output.read_text())
    assert (content["cases"], content["budgets"], content["published"], content["eight_bits"]) == ([], [], [], [])
    assert [entry["ratio"] for entry in content["tightness"]] == [1.0, 1.04]
    assert code == 1 and [bar["met"] for bar in content["bars"]] == [False, False]
    assert "2 plans, at most 1.0400 of what is alive, 1.0200 in the median" in capsys.readouterr().out


@pytest.mark.native
@pytest.mark.slow
def test_eight_bits_take_less_memory_and_change_the_loss_a_little() -> None:
    results = memory_int8.measure(small=False)  # of small images the peak is behind the prefix
    plain, _, prefix = results

    assert all(bar.met for bar in memory_int8.bars(results))
    assert prefix.arena_bytes < plain.arena_bytes
    assert prefix.mapped_bytes < 0.3 * plain.mapped_bytes
    assert prefix.transient_bytes_of_one_thread <= prefix.transient_bytes
    differences = [entry["loss_difference"] for entry in memory_int8.as_json(results)]
    assert differences[0] == 0 < differences[1] < differences[2] < 0.1


@pytest.mark.native
@pytest.mark.slow
def test_quick_run_reports_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "memory.json"

    code = memory.main(["--quick", "--cases", "mobilenet-sparse", "--output", str(output)])

    content = json.loads(output.read_text())
    [entry] = content["cases"]
    assert set(entry["pytorch"]) == {"contiguous", "channels_last"}
    assert all(len(answer["losses"]) == memory_peer.STEPS for answer in entry["pytorch"].values())
    assert entry["pockc"]["allocated_bytes"] == entry["pockc"]["arena_bytes"]
    assert 0 < entry["pockc"]["added_bytes"] < entry["pockc"]["arena_bytes"]
    exact = [bar for bar in content["bars"] if "planned arena" in bar["what"] or "first loss" in bar["what"]]
    assert len(exact) == 3
    assert all(bar["met"] for bar in exact)
    assert code == (0 if all(bar["met"] for bar in content["bars"]) else 1)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("bench-memory: ")

    again = tmp_path / "again.json"
    memory.main(["--quick", "--cases", "mobilenet-sparse", "--output", str(again), "--pytorch-from", str(output)])
    assert json.loads(again.read_text())["cases"][0]["pytorch"] == entry["pytorch"]
