"""The programs of a device and of a workstation, `pock-run` and `pockc`, as processes of their own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pockc import abi

# The `pockc` command of this very environment, whichever folder its scripts are in.
POCKC = (sys.executable, "-c", "from pockc.cli import main; main()")


class RunError(RuntimeError):
    """A program ended with an error, which this message has or which it has printed."""


def train(model: Path, data: Path, checkpoint: Path, *, quiet: bool = False, **options: Any) -> dict[str, Any]:
    """`pock-run train`: fine-tunes, writes a checkpoint, returns the JSON report. Shows its progress unless quiet."""
    return _run("train", model, capture=quiet, report=True, quiet=quiet, data=data, save=checkpoint, **options)


def evaluate(model: Path, data: Path, **options: Any) -> dict[str, Any]:
    """`pock-run eval`: the JSON report with loss and accuracy on labelled examples."""
    return _run("eval", model, capture=True, report=True, quiet=True, data=data, **options)


def infer(model: Path, data: Path, output: Path, **options: Any) -> dict[str, NDArray[np.generic]]:
    """`pock-run infer`: writes the outputs for all examples to an .npz and returns them by name."""
    _run("infer", model, capture=True, report=False, quiet=True, data=data, output=output, **options)
    with np.load(output) as arrays:
        return dict(arrays)


def profile(model: Path) -> dict[str, Any]:
    """`pock-run bench --profile`: the JSON report with the time of each op and the limits of a core."""
    return _run("bench", model, capture=True, report=True, profile=True, steps=1)


def export(model: Path, checkpoint: Path, output: Path) -> Path:
    """`pockc export`: the tuned weights as safetensors, under their original names."""
    command = [*POCKC, "export", str(model), "--checkpoint", str(checkpoint), "-o", str(output)]
    _check(subprocess.run(command, check=False, text=True, capture_output=True))
    return output


def _run(command: str, model: Path, *, capture: bool, report: bool, **options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pockc-run-") as folder:
        arguments = [str(abi.runtime_file("pock-run")), command, str(model)]
        options |= {"json": Path(folder, "report.json")} if report else {}
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] * value if isinstance(value, bool) else [flag, str(value)]
        _check(subprocess.run(arguments, check=False, text=True, capture_output=capture))
        content: dict[str, Any] = json.loads(options["json"].read_text(encoding="utf-8")) if report else {}
    return content


def _check(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode != 0:
        detail = f": {result.stderr.strip()}" if result.stderr else ""
        raise RunError(f"`{' '.join(result.args)}` ended with exit code {result.returncode}{detail}")


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> Path:
    """Writes an uncompressed .npz, the data format of `pock-run`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path
