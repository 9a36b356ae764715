"""The fuzz targets on changed real programs and archives, for seconds (`make fuzz`: ten minutes)."""

import subprocess
from pathlib import Path

import pytest

from tests import fuzz_corpus
from tests.native import kernels

FOLDER = kernels.ROOT / "build" / "asan" / "fuzz"

pytestmark = [pytest.mark.torch, pytest.mark.native]


def fuzz(target: str, corpus: Path, seconds: int) -> str:
    """Runs a target on the files of a folder; returns what it printed, or fails with the sanitizer's report."""
    program = FOLDER / f"fuzz_{target}"
    if not program.exists():
        pytest.skip("there is no build/asan: `make asan` makes it")
    command = [str(program), "--seconds", str(seconds), str(corpus)]
    done = subprocess.run(command, cwd=corpus.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_no_changed_program_crashes_the_runtime(tmp_path: Path) -> None:
    names = ("convolutions-train-lion8", "attention-head-int4", "small-huber-adam")
    fuzz_corpus.write_programs(tmp_path / "program", names)

    assert fuzz("program", tmp_path / "program", 8).startswith("6 seeds, ")


def test_no_changed_archive_crashes_its_reader(tmp_path: Path) -> None:
    fuzz_corpus.write_archives(tmp_path / "npz")

    assert fuzz("npz", tmp_path / "npz", 3).startswith("3 seeds, ")
