"""Products of bfloat16 through AMX, in an emulated computer that has it: the instructions, and what the system grants.

The arithmetic of all shapes is tested with emulated instructions, by runtime/test/test_amx.cpp.
"""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import emulation, zoo
from pockc.build import build
from pockc.halves import UNIT_ROUNDOFF
from pockc.optim import SGD
from pockc.parity import tolerances
from pockc.program import Program
from tests.amx import machine
from tests.cross.test_halves import Net, Products, product

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(3600)]

ROUNDOFF = UNIT_ROUNDOFF["b16"]
NAMES = ("net", "llama")  # the second has attention


def compiled(model: nn.Module, examples: Any, **options: Any) -> Program:
    return build(model, examples, optimizer=SGD(lr=0.05), dtype="bf16", half_arithmetic=True, **options)


def net() -> tuple[Program, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    examples = {"x": torch.randn(4, 3, 16, 16)}
    return compiled(Net().eval(), examples), examples


def llama() -> tuple[Program, dict[str, torch.Tensor]]:
    model, examples = zoo.llama_tiny(batch_size=2, sequence_length=40, layers=2, width=64, vocab_size=128)
    return compiled(model, examples, loss="causal_lm"), examples


def products() -> tuple[Program, nn.Module, torch.Tensor]:
    """Weights and inputs are numbers of bfloat16: the kernels then round nothing but results."""
    torch.manual_seed(0)
    model, x = Products().eval(), torch.randn(8, 75, 8, 8).bfloat16().float()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return compiled(model, (x,), loss="mse"), model, x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on the disk of the computer."""
    if "POCKC_AMX" not in os.environ:
        pytest.skip("`make test-amx` boots an emulated computer with AMX, for some minutes")
    try:
        machine.prepare()
    except machine.UnavailableError as error:
        pytest.skip(str(error))
    made = tmp_path_factory.mktemp("disk")
    (made / "pock-run").write_bytes(emulation.native_runner().read_bytes())
    for name, make in zip(NAMES, (net, llama), strict=True):
        program, examples = make()
        program.save(made / f"{name}.pock", golden=examples)
        emulation.write_batch(program, examples, made / f"{name}.npz")
    program, _, x = products()
    program.save(made / "products.pock")
    np.savez(made / "products.npz", allow_pickle=False, **{program.entries["infer"].inputs[0].name: x.numpy()})
    return made


def boot(folder: Path, commands: list[str], own: Path, without: str = "") -> dict[str, str]:
    """What each command prints."""
    lines = [line for command in commands for line in (f"echo '== {command}'", command)]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    printed = machine.run(files, lines, own, without)
    parts = [part.replace("\r", "").partition("\n") for part in printed.split("== ")[1:]]
    return {command: output for command, _, output in parts}


def train(name: str, threads: int) -> list[str]:
    made = f"/{name}{threads}"
    command = f"/pock-run train /{name}.pock --data /{name}.npz --epochs {emulation.STEPS} --threads {threads}"
    return [f"{command} --quiet --save {made}.ckpt --json {made}.json", f"/busybox cat {made}.json"]


SELFTESTS = [f"/pock-run selftest /{name}.pock" for name in NAMES]
SUM = "/busybox sha256sum"
INFER = "/pock-run infer /products.pock --data /products.npz -o /y.npz --quiet; /busybox base64 /y.npz"


@pytest.fixture(scope="module")
def printed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    runs = [command for name in NAMES for threads in (1, 2) for command in train(name, threads)]
    sums = [f"{SUM} /{name}{threads}.ckpt" for name in NAMES for threads in (1, 2)]
    return boot(folder, [*SELFTESTS, *runs, *sums, INFER], tmp_path_factory.mktemp("booted"))


@pytest.mark.parametrize("command", SELFTESTS)
def test_selftest_multiplies_through_amx(printed: dict[str, str], command: str) -> None:
    assert "selftest passed (instruction set avx512, products in bf16 (AMX))" in printed[command]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_this_machine_within_bfloat16(
    printed: dict[str, str], folder: Path, tmp_path: Path, name: str
) -> None:
    ours = [epoch["loss"] for epoch in json.loads(printed[f"/busybox cat /{name}1.json"])["epochs"]]
    runner, files = emulation.native_runner(), (folder / f"{name}.pock", folder / f"{name}.npz")
    theirs = emulation.train(runner, *files, tmp_path).losses
    assert emulation.worst_difference(np.array(ours), theirs) <= tolerances("bf16")[0]
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_threads(printed: dict[str, str], name: str) -> None:
    one, two = (printed[f"{SUM} /{name}{threads}.ckpt"].split()[0] for threads in (1, 2))
    assert len(one) == 64
    assert one == two


def test_products_keep_to_the_bound_of_sums_of_floats(printed: dict[str, str]) -> None:
    _, model, x = products()
    exact, sizes = product(model, x), product(model, x, torch.abs)
    with np.load(io.BytesIO(base64.b64decode(printed[INFER]))) as outputs:
        got = np.asarray(next(iter(outputs.values())), np.float64)
    sums = 75 * 9 * 2.0**-24 * sizes  # the deepest has 9 taps of 75 channels
    assert np.all(np.abs(got - exact) <= sums + ROUNDOFF * (np.abs(exact) + sums))


def test_process_to_which_the_system_grants_no_tiles_does_without(folder: Path, tmp_path: Path) -> None:
    printed = boot(folder, SELFTESTS, tmp_path, without="amx_tile")
    for command in SELFTESTS:
        assert "selftest passed (instruction set avx512, products in bf16)" in printed[command]
