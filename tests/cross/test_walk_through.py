"""The README's commands for a board, one by one, against an ssh server that stands for a Raspberry Pi.

Its `uname` says aarch64, and its `pock-run` runs under qemu-user: what is cross-compiled, copied and run is what a
board would get.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import emulation
from pockc.deploy import architecture_of
from tests import ssh_server
from tests.cross.boards import need

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
NOT_TRIED = ("pip install", "ssh-copy-id")  # they are done, or would change this machine
MODEL = """
from benchmarks import zoo


def make():
    return zoo.mobilenet_v2(batch_size=2, image_size=32)
"""


def commands() -> list[str]:
    """The first block of commands of the README's section on boards."""
    section = (ROOT / "README.md").read_text().partition("\n## On a board\n")[2]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [line.partition("  #")[0].rstrip() for line in block[1].splitlines()]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """A folder of programs `ssh`, `scp` and `pockc` that know the board."""
    need("aarch64")
    if reason := ssh_server.missing():
        pytest.skip(reason)
    server, home, programs = (tmp_path / name for name in ("server", "home", "bin"))
    for folder in (server, home, programs):
        folder.mkdir()
    qemu = shlex.join([str(shutil.which("qemu-aarch64")), "-cpu", "cortex-a72"])
    with ssh_server.running(server, home, "aarch64", qemu) as ssh:
        options = ssh.removeprefix("ssh ")
        scripts = {name: f"{shutil.which(name)} {options}" for name in ("ssh", "scp")}
        scripts["pockc"] = f"{sys.executable} -c 'from pockc.cli import main; main()'"
        for name, command in scripts.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (programs / name).chmod(0o755)
        yield programs


def test_every_command_of_the_readme_works_with_an_emulated_board(host: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "model.py").write_text(MODEL)
    random = np.random.default_rng(0)
    for name, count in (("train.npz", 4), ("test.npz", 2)):
        images = random.standard_normal((count, 3, 32, 32)).astype(np.float32)
        np.savez(work / name, pixel_values=images, labels=random.integers(0, 10, count))
    environment = {**os.environ, "PATH": f"{host}:{os.environ['PATH']}", "PYTHONPATH": python_path()}

    printed = ""
    for command in commands():
        if command.startswith(NOT_TRIED):
            continue
        local = command.replace("pi@raspberrypi.local", "board")
        done = subprocess.run(local, shell=True, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        printed += done.stdout

    on_board = tmp_path / "home" / "pock"
    assert {"model.pock", "pock-run", "README.md", "train.npz", "tuned.ckpt"} <= {
        file.name for file in on_board.iterdir()
    }
    assert architecture_of(on_board / "pock-run") == "aarch64"
    assert "selftest passed (instruction set neon)" in printed and "ms/step median" in printed
    assert "epoch 3/3" in printed
    assert any(name.startswith("features.") for name in load_file(work / "tuned.safetensors"))


def python_path() -> str:
    """The tree that is tested, for programs that are started."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def test_binary_for_this_machine_is_refused_by_the_emulated_board(host: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy2(emulation.native_runner(), folder / "pock-run")
    (folder / "model.pock").write_bytes(b"not read")
    environment = {**os.environ, "PATH": f"{host}:{os.environ['PATH']}", "PYTHONPATH": python_path()}

    done = subprocess.run(
        ["pockc", "deploy", str(folder), "board:pock"], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "and board is aarch64" in done.stderr
    assert not (tmp_path / "home" / "pock").exists()
