from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pockc import abi, targets
from pockc.build import build
from pockc.errors import UserError
from pockc.ir import Builder, Origin, TensorType
from pockc.ops import OPS, load_families
from pockc.optim import SGD
from pockc.program import Program
from pockc.targets import devices
from pockc.targets.native import copy_runner, table, workspace_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return build(model, (torch.randn(2, 4),), optimizer=SGD(lr=0.1), device="rpi4")


def message(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_every_promised_device_is_there() -> None:
    promised = "rpi3 rpi4 rpi5 rpi-armv7 jetson-nano jetson-orin android-arm64 x86-64 x86-64-avx2 x86-64-avx512 riscv64"
    assert list(devices.DEVICES) == promised.split()


@pytest.mark.parametrize("name", list(devices.DEVICES))
def test_device_has_a_target_that_exists_and_sensible_facts(name: str) -> None:
    device = devices.find(name)

    assert device.name == name
    assert targets.find(device.target).name == device.target
    assert 1 <= device.threads <= device.cores <= 16
    assert device.dtype == "f32"
    assert device.architecture in devices.ARCHITECTURES
    assert device.cost.gflops > device.cost.gigabytes_per_second > 0
    assert device.is_x86 == name.startswith("x86")


def test_messages_about_unknown_names(golden: Callable[..., None]) -> None:
    golden(message(lambda: devices.find("rpi44")) + "\n" + message(lambda: targets.find("nativ")) + "\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nlike: rpi44\n", "there is no device 'rpi44'"),
        ("name: a\nlike: rpi4\ncoers: 2\n", "unknown field 'coers'"),
        ("name: a\nlike: rpi4\ncost: {gflop: 2}\n", "unknown field 'cost.gflop'"),
        ("name: a\nlike: rpi4\ncores: 0\n", "field 'cores'"),
        ("name: a\nlike: rpi4\nmemory: lots\n", "'lots' is not a size of memory"),
        ("name: a\nlike: rpi4\nthreads: 8\n", "8 threads on 4 cores"),
        ("name: a\ncores: 2\n", "the description lacks triple, memory"),
        ("name: rpi4\nlike: rpi5\n", "'rpi4' is the name of a known device"),
        ("name: a b\nlike: rpi4\n", "field 'name'"),
        ("name: a\nlike: rpi4\ntriple: mips-linux-gnu\n", "the triple 'mips-linux-gnu' names no machine"),
        ("- a\n", "valid dictionary"),
        ("name: [\n", "not valid YAML"),
    ],
)
def test_wrong_description_of_a_board_says_what_is_wrong(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "board.yaml"
    file.write_text(text)
    assert expected in message(lambda: devices.find(str(file)))


def test_missing_description_of_a_board_is_an_error() -> None:
    assert "cannot read the device file nowhere.yaml" in message(lambda: devices.find("nowhere.yaml"))


def test_board_of_ones_own_takes_the_rest_from_one_that_it_is_like(tmp_path: Path) -> None:
    file = tmp_path / "board.yaml"
    file.write_text("name: mine\nlike: rpi4\ncores: 2\nmemory: 512MiB\ncost: {gflops: 6}\n")

    device = devices.find(str(file))

    assert (device.name, device.cores, device.threads, device.memory_bytes) == ("mine", 2, 2, 512 << 20)
    assert device.cost == devices.Cost(6.0, devices.find("rpi4").cost.gigabytes_per_second)
    assert (device.triple, device.features) == ("aarch64-linux-gnu", ("neon",))


def test_board_of_ones_own_may_say_everything(tmp_path: Path) -> None:
    file = tmp_path / "board.yaml"
    file.write_text("name: mine\ntriple: riscv64-linux-musl\ncores: 8\nthreads: 3\nmemory: 2GiB\n")
    device = devices.find(str(file))
    assert (device.architecture, device.cores, device.threads) == ("riscv64", 8, 3)


def test_program_knows_the_board_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "board.yaml"
    file.write_text("name: mine\nlike: rpi4\ncores: 2\n")
    model = nn.Sequential(nn.Linear(4, 3)).eval()

    built = build(model, (torch.randn(2, 4),), device=str(file))

    assert (built.metadata["device"], built.max_threads) == ("mine", 2)
    assert devices.recorded(json.loads(json.dumps(dict(built.metadata)))) == devices.find(str(file))


def test_build_for_another_board_writes_the_program_and_says_what_is_missing(
    program: Program, golden: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pockc.targets.native.toolchain.importlib.util.find_spec", lambda name: None)  # no zig
    text = message(lambda: targets.find("native").emit(program, tmp_path))

    assert [file.name for file in tmp_path.iterdir()] == ["model.pock"]
    assert program.max_threads == devices.find("rpi4").threads
    golden(text + "\n")


def test_missing_runtime_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Callable[..., None]
) -> None:
    monkeypatch.setattr(abi, "__file__", str(tmp_path / "pockc" / "abi.py"))
    monkeypatch.setattr("sys.path", [])
    golden(message(lambda: copy_runner(tmp_path)) + "\n")


def test_null_target_takes_everything_and_emits_the_text_of_every_entry(program: Program, tmp_path: Path) -> None:
    null = targets.find("null")
    graph = program.entries["train_step"]

    assert all(null.supports(node) for node in graph.nodes)
    assert null.lower(graph) is graph
    files = null.emit(program, tmp_path / "text")
    assert {file.stem: file.read_text() for file in files} == {n: program.text(n) for n in program.entries}


def test_native_table_is_the_list_of_reference_kernels() -> None:
    listed = re.findall(r"^POCKC_REF\((\w+)\)", (ROOT / "runtime/kernels/kernels.inc").read_text(), re.MULTILINE)
    assert sorted(table.OPS) == sorted(listed)


def test_native_table_has_every_op() -> None:
    load_families()
    assert set(OPS) == table.OPS


def test_unsupported_op_is_refused_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder()
    builder.origin = Origin("features.3", "model.py", 12)
    x = builder.input("x", TensorType((2, 3)))
    graph = builder.build({"y": builder("exp", x)})
    native = targets.find("native")
    assert native.lower(graph) is graph

    monkeypatch.setattr("pockc.targets.native.OPS", table.OPS - {"exp"})

    assert "native cannot run: exp at features.3 (model.py:12)" in message(lambda: native.lower(graph))


def test_workspace_of_large_products_grows_with_the_threads_of_the_device(program: Program) -> None:
    small = next(node for node in program.entries["train_step"].nodes if node.op == "matmul")
    assert workspace_of(4)(small) == workspace_of(1)(small) > 0  # it runs on one thread
    builder = Builder()
    large = builder.input("x", TensorType((2048, 512)))
    builder("matmul", large, builder.input("w", TensorType((512, 512))))
    assert workspace_of(4)(builder.nodes[0]) > workspace_of(1)(builder.nodes[0]) > 0


def test_package_refuses_to_be_imported_under_another_name() -> None:
    specification = importlib.util.spec_from_file_location("targets", ROOT / "targets" / "__init__.py")
    assert specification is not None and specification.loader is not None
    with pytest.raises(ImportError, match=r"import this package as pockc\.targets"):
        specification.loader.exec_module(importlib.util.module_from_spec(specification))
