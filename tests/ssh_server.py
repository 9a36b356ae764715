"""An ssh server of this user on the loopback interface, for one test, that may stand for a board."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp /usr/lib/openssh/sftp-server
"""

_CLIENT = """
Host *
  HostName 127.0.0.1
  Port {port}
  IdentityFile "{folder}/user_key"
  StrictHostKeyChecking no
  UserKnownHostsFile "{folder}/known"
  LogLevel ERROR
"""

# What a board does with a command: in its home, where `uname` is its own, and its programs are emulated. qemu-user
# starts one program, and what that starts is this machine's again: so the shell is not emulated.
_BOARD = """#!/bin/sh
export HOME="{home}" PATH="{folder}/board-bin:$PATH"
cd "$HOME" || exit 1
eval "$(echo "$SSH_ORIGINAL_COMMAND" | sed 's|\\./pock-run |{emulator} ./pock-run |')"
"""


def find() -> str | None:
    """The sshd program, which is not on every user's path."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def missing() -> str:
    """Why there can be no server, in one sentence; empty if there can."""
    if find() is None or shutil.which("ssh") is None:
        return "sshd or ssh is not installed: `make qemu` installs them where that is permitted"
    return ""


@contextmanager
def running(folder: Path, board: Path | None = None, machine: str = "", emulator: str = "") -> Iterator[str]:
    """The ssh command that reaches the server, whatever the name of the host; scp takes the same options.

    Args:
        folder: For keys and logs.
        board: None for this machine, else the home folder of a board.
        machine: What ``uname`` says on the board.
        emulator: The command that runs the board's `pock-run`.
    """
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = _CONFIG.format(port=port, folder=folder)
    if board is not None:
        config += f"ForceCommand {_board_shell(folder, board, machine, emulator)}\n"
    (folder / "sshd_config").write_text(config)
    (folder / "ssh_config").write_text(_CLIENT.format(port=port, folder=folder))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where its unprivileged part lives
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([str(find()), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
        try:
            _wait(port, server, folder / "sshd.log")
            yield f"ssh -F {folder}/ssh_config"
        finally:
            server.terminate()
            server.wait(timeout=10)


def _board_shell(folder: Path, home: Path, machine: str, emulator: str) -> Path:
    (folder / "board-bin").mkdir()
    shell = folder / "board-shell"
    shell.write_text(_BOARD.format(home=home, folder=folder, emulator=emulator))
    (folder / "board-bin" / "uname").write_text(f"#!/bin/sh\necho {machine}\n")
    for script in (shell, folder / "board-bin" / "uname"):
        script.chmod(0o755)
    return shell


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")
