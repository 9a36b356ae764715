"""An ssh server of this user on the loopback interface, for one test."""

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
def running(folder: Path) -> Iterator[str]:
    """The ssh command that reaches the server, with its options."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(_CONFIG.format(port=port, folder=folder))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where its unprivileged part lives
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([str(find()), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
        try:
            _wait(port, server, folder / "sshd.log")
            options = ("StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known", "LogLevel=ERROR")
            flags = " ".join(f"-o {option}" for option in options)
            yield f"ssh -F none -p {port} -i {folder}/user_key {flags}"
        finally:
            server.terminate()
            server.wait(timeout=10)


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")
