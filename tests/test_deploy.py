"""`pockc deploy` against an ssh server on the loopback interface."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pockc.abi import runtime_file
from pockc.deploy import Board, architecture_of, check_machine
from pockc.errors import UserError
from tests import ssh_server
from tests.shell import Shell

pytestmark = [pytest.mark.torch, pytest.mark.native]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if reason := ssh_server.missing():
        pytest.skip(reason)
    with ssh_server.running(tmp_path_factory.mktemp("sshd")) as command:
        yield command


def message(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


@pytest.fixture
def elf(tmp_path: Path) -> Path:
    """The start of a program for 64-bit ARM."""
    file = tmp_path / "pock-run"
    file.write_bytes(b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little"))
    return file


@pytest.mark.parametrize("with_rsync", [True, False])
def test_board_gets_the_folder_and_tests_and_times_itself(
    with_rsync: bool,
    ssh: str,
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if with_rsync and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    monkeypatch.setattr("pockc.deploy.shutil.which", lambda name: None if name == "rsync" and not with_rsync else name)
    board = tmp_path / "board with a space"
    assert shell("build", "model.py:make", "-o", "out")[0] == 0

    code, out, err = shell(
        "deploy", "out", f"{getpass.getuser()}@127.0.0.1:{board}", "--selftest", "--bench", "--ssh", ssh
    )

    assert (code, err) == (0, "")
    assert sorted(file.name for file in board.iterdir()) == ["README.md", "model.pock", "pock-run"]
    assert (board / "pock-run").read_bytes() == runtime_file("pock-run").read_bytes()
    assert out.startswith("Copied out to ") and "x86_64" in out
    assert "selftest passed" in out and "ms/step median" in out


def test_failure_on_the_board_is_the_command_s(ssh: str, shell: Shell, tmp_path: Path) -> None:
    (shell.folder / "out").mkdir()
    shutil.copy2(runtime_file("pock-run"), shell.folder / "out" / "pock-run")
    (shell.folder / "out" / "model.pock").write_text("no program")

    code, _, err = shell("deploy", "out", f"127.0.0.1:{tmp_path}/board", "--selftest", "--ssh", ssh)

    assert code == 2
    assert "failed to run `cd " in err


def test_unreachable_board_says_so(tmp_path: Path, elf: Path) -> None:
    if ssh_server.missing():
        pytest.skip("ssh is not installed")
    board = Board.parse("127.0.0.1:x", "ssh -F none -p 1 -o BatchMode=yes")
    assert "ssh cannot reach 127.0.0.1" in message(lambda: board.run("true"))


def test_messages_before_anything_is_copied(shell: Shell, elf: Path, golden: Callable[..., None]) -> None:
    shell.monkeypatch.setattr("pockc.deploy.shutil.which", lambda name: name if name == "ssh" else None)
    board = Board.parse("pi@board:~/pock/")
    assert board == Board("pi@board", "pock")
    missing = shell("deploy", "nowhere", "pi@board:pock")[2]
    texts = [
        missing,
        message(lambda: Board.parse("pock")) + "\n",
        message(lambda: Board.parse("-oProxyCommand=x:pock")) + "\n",
        message(lambda: Board.parse("pi@board:pock", "sssh")) + "\n",
        message(lambda: check_machine(elf, "armv7l", board)).replace(str(elf), "out/pock-run") + "\n",
        message(lambda: check_machine(elf, "mips", board)).replace(str(elf), "out/pock-run") + "\n",
        message(lambda: architecture_of(shell.folder / "model.py")).replace(str(shell.folder), "out") + "\n",
    ]
    golden("".join(texts))


def test_binary_runs_on_its_machine_and_under_a_launcher(elf: Path) -> None:
    board = Board("board", "pock")
    check_machine(elf, "aarch64", board)
    check_machine(elf, "x86_64", Board("board", "pock", launcher=("qemu-aarch64",)))
    narrow = elf.with_name("narrow")
    narrow.write_bytes(b"\x7fELF" + bytes(14) + (40).to_bytes(2, "little"))
    check_machine(narrow, "aarch64", board)  # a 64-bit kernel runs it
    with pytest.raises(UserError, match="is for aarch64, and board is armv7l"):
        check_machine(elf, "armv7l", board)
