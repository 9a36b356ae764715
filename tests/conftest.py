"""Shared by all tests: golden files, the command line, and PyTorch on one thread."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import pockc.frontend.torch
from tests import browser, traces
from tests.shell import Shell

torch.set_num_threads(1)
pockc.frontend.torch.trace = traces.remembered

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_report_header() -> str:
    missing = "none, so the tests of the memory page in a browser are skipped: `make test-page` installs it"
    return f"chromium: {browser.find() or missing}"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``golden(text, suffix="")`` compares a text with the file of tests/golden that is named after the test."""
    stem = re.sub(r"[^\w.-]+", "-", f"{request.path.stem}.{request.node.name}").strip("-")

    def compare(text: str, suffix: str = "") -> None:
        path = GOLDEN / f"{stem}{suffix}.txt"
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path.name} is missing: run pytest with --update-golden, then review the file"
        assert text == path.read_text()

    return compare


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """The command line in a temporary folder."""
    return Shell(tmp_path, monkeypatch, capsys)
