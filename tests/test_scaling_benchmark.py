"""The benchmark of growing sizes: it runs on small models, and its bar is on operations per second."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.speed import Result, Timing

pytestmark = pytest.mark.torch

SERIES = scaling.SERIES[0]


def point_of(size: int, operations: int, milliseconds: float) -> scaling.Point:
    timing = Timing((milliseconds,), (milliseconds,), 1, (1.0,), 0.0)
    return scaling.Point(size, operations, Result(SERIES.case(size), "full", 1, {"pockc": timing}, {}))


def test_small_sizes_are_measured_and_drawn(tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    arguments = ["--small", "--series", "batch", "--schemes", "sparse", "--sizes", "1", "2", "--seconds", "0.1"]

    assert scaling.main([*arguments, "--output", str(output)]) == 0

    first, second = json.loads(output.read_text())["results"]
    assert second["operations"] == 2 * first["operations"] > 0
    assert set(first["sides"]) == {"pockc", "contiguous"}
    assert output.with_suffix(".png").stat().st_size > 0


def test_twice_the_work_in_twice_the_time_is_linear_and_in_thrice_is_not() -> None:
    points = [point_of(1, 1_000_000, 1.0), point_of(2, 2_000_000, 2.0), point_of(4, 4_000_000, 6.0)]

    assert points[0].speed("pockc") == pytest.approx(1.0)
    linear, slower = scaling.bars_of(SERIES, "full", points)

    assert linear.met and linear.value == pytest.approx(1.0)
    assert not slower.met and slower.value == pytest.approx(2 / 3)


def test_what_is_frozen_costs_fewer_operations() -> None:
    case = scaling.SERIES[0].case(1)
    small = {"batch_size": 1, "image_size": 32, "num_classes": 10, "width": 0.25}
    case = type(case)(case.key, case.title, case.model, small, case.vision, case.learning_rate)

    head = scaling.operations(case, ["classifier.1.weight"])
    convolutions = scaling.operations(case, ["features.0.0.weight", "classifier.1.weight"])

    assert convolutions > 1.5 * head


def test_gradients_of_a_depthwise_convolution_count_one_channel_each() -> None:
    image, weight = (1, 8, 4, 4), (8, 1, 3, 3)

    assert scaling._convolution_gradients(image, image, weight, 8, [True, False, False]) == 2 * 8 * 16 * 9
    assert scaling._convolution_gradients(image, image, weight, 8, [True, True, True]) == 2 * 2 * 8 * 16 * 9


def test_attention_counts_and_grows_with_the_square_of_the_sequence() -> None:
    small = {"layers": 1, "width": 64, "vocab_size": 64}
    cases = [replace(scaling.SERIES[1], arguments={"batch_size": 1, **small}).case(length) for length in (32, 64)]
    trained = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]

    short, long = (scaling.operations(case, trained) for case in cases)

    # Seven products of 8 heads 8 wide with all pairs of positions: two forward, five backward.
    assert long - 2 * short == 7 * 2 * 8 * 8 * (64**2 - 2 * 32**2)
