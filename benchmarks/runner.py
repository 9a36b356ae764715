"""`pock-run` as its own process: no Python takes part in training."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pockc import abi


class RunError(RuntimeError):
    """`pock-run` ended with an error, which it has printed."""


def pock_run(command: str, model: Path, report: Path, *, quiet: bool = False, **options: Any) -> dict[str, Any]:
    """Runs one command of `pock-run` and returns the JSON report that it writes.

    Args:
        command: `train`, `eval` or `infer`.
        model: The .pock file.
        report: Where the JSON report goes.
        quiet: Hide the progress bar and messages; errors are shown nevertheless.
        options: Command-line options; underscores become hyphens.

    Raises:
        RunError: The exit code is not zero.
    """
    arguments = [str(abi.runtime_file("pock-run")), command, str(model)]
    for name, value in {**options, "report": report}.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    result = subprocess.run(arguments, check=False, text=True, capture_output=quiet)
    if result.returncode != 0:
        detail = f": {result.stderr.strip()}" if quiet else ""
        raise RunError(f"`{' '.join(arguments)}` ended with exit code {result.returncode}{detail}")
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return content


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> Path:
    """Writes an uncompressed .npz, the data format of `pock-run`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path
