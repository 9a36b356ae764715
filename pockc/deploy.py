"""`pockc deploy`: copy a built folder to a board over ssh, and let the board judge and time itself.

The system's own programs do it: ssh, and rsync where both sides have it, else tar through ssh. So keys, host names and
jump hosts are those of the user's ssh configuration.
"""

from __future__ import annotations

import shlex
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pockc.errors import UserError
from pockc.targets.devices import ARCHITECTURES

_ELF_MACHINES = {62: "x86_64", 183: "aarch64", 40: "armv7l", 243: "riscv64"}
_ALSO_RUNS = {"aarch64": ("armv7l",), "armv8l": ("armv7l",)}  # by `uname -m`
_SSH_FAILED = 255


@dataclass(frozen=True)
class Board:
    """A machine that ssh reaches.

    Args:
        host: As ssh takes it, ``user@`` included.
        folder: On the board, relative to the home directory unless absolute.
        ssh: The ssh command with options, such as ``("ssh", "-p", "2222")``.
        launcher: What to put before `pock-run` on the board, such as ``taskset -c 3``.
    """

    host: str
    folder: str
    ssh: tuple[str, ...] = ("ssh",)
    launcher: tuple[str, ...] = field(default=())

    @classmethod
    def parse(cls, destination: str, ssh: str = "ssh", launcher: str = "") -> Board:
        """A board from ``user@host:folder``. Raises UserError where it is not that."""
        host, colon, folder = destination.rpartition(":")
        if not colon or not host or not folder or host.startswith("-"):
            raise UserError(f"{destination!r} is no destination", supported="user@host:folder, such as pi@board:pock")
        command = tuple(shlex.split(ssh))
        if not command or shutil.which(command[0]) is None:
            raise UserError(f"there is no program {ssh!r} here", instead="Install an ssh client (openssh-client).")
        folder = folder.removeprefix("~/").rstrip("/") or "/"  # quoted, a tilde would be a name
        return cls(host, folder, command, tuple(shlex.split(launcher)))

    def run(self, command: str, data: bytes = b"") -> str:
        """What a shell command on the board prints, given ``data`` to read.

        Raises:
            UserError: ssh cannot reach the board, or the command fails; the message has all that it printed.
        """
        done = subprocess.run([*self.ssh, self.host, command], input=data, capture_output=True, check=False)
        printed, message = (text.decode(errors="replace").strip() for text in (done.stdout, done.stderr))
        if done.returncode == _SSH_FAILED:
            raise UserError(f"ssh cannot reach {self.host}: {message}")
        if done.returncode != 0:
            said = "\n".join(filter(None, (printed, message)))
            raise UserError(f"{self.host} failed to run `{command}` (exit code {done.returncode}): {said}")
        return printed

    def pock_run(self, verb: str) -> str:
        """Run a verb of the copied program on the board; what it says."""
        words = (*self.launcher, "./pock-run", verb, "model.pock")
        return self.run(f"cd {shlex.quote(self.folder)} && {shlex.join(words)}")


def deploy(folder: Path, board: Board) -> str:
    """Copy a folder that `pockc build` wrote; returns what the board is, in a few words.

    Raises:
        UserError: the folder is not complete, its binary is for another machine, or the copy fails.
    """
    check_folder(folder)
    machine = board.run("uname -m")
    check_machine(folder / "pock-run", machine, board)
    board.run(f"mkdir -p {shlex.quote(board.folder)}")
    if shutil.which("rsync") and board.run("command -v rsync || true"):
        _rsync(folder, board)
    else:
        _tar(folder, board)
    model = board.run(r"tr -d '\0' < /proc/device-tree/model 2>/dev/null || true")
    memory = board.run("grep MemTotal /proc/meminfo || true").split()
    described = f"{model or 'a machine'} ({machine}"
    return described + (f", {int(memory[1]) / 2**20:.1f} GiB of memory)" if len(memory) > 1 else ")")


def check_folder(folder: Path) -> None:
    """Raise UserError unless the folder has a program and its runner."""
    for name in ("model.pock", "pock-run"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}", instead=f"Make it: pockc build model.py:make --device rpi4 -o {folder}."
            )


def check_machine(runner: Path, machine: str, board: Board) -> None:
    """Raise UserError where the binary is not for what ``uname -m`` says; a launcher may emulate another machine."""
    made_for = architecture_of(runner)
    runs = (machine, *_ALSO_RUNS.get(machine, ()))
    if made_for in runs or board.launcher:
        return
    raise UserError(
        f"{runner} is for {made_for}, and {board.host} is {machine}",
        instead="Build it for a device of that architecture: see pockc devices."
        if machine in ARCHITECTURES
        else "The runtime has no build for that architecture.",
    )


def architecture_of(runner: Path) -> str:
    """The machine that an ELF program is for, as ``uname -m`` says it. Raises UserError where it is no such program."""
    with runner.open("rb") as file:
        start = file.read(20)
    if len(start) < 20 or start[:4] != b"\x7fELF":
        raise UserError(f"{runner} is not a program for Linux")
    code = struct.unpack_from("<H", start, 18)[0]
    return _ELF_MACHINES.get(code, f"ELF machine {code}")


def _rsync(folder: Path, board: Board) -> None:
    target = f"{board.host}:{board.folder}/"
    _call(["rsync", "-a", "-e", shlex.join(board.ssh), f"{folder}/", target], "rsync")


def _tar(folder: Path, board: Board) -> None:
    packed = subprocess.run(["tar", "-C", str(folder), "-cf", "-", "."], capture_output=True, check=False)
    if packed.returncode != 0:
        raise UserError(f"tar failed: {packed.stderr.decode(errors='replace').strip()}")
    board.run(f"tar -C {shlex.quote(board.folder)} -xf -", data=packed.stdout)


def _call(command: Sequence[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"{name} failed: {lines[0] if lines else f'exit code {done.returncode}'}")
