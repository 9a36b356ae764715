"""What goes beside the models: the program that runs them without Python, and a page that says how."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pockc.errors import UserError
from pockc.program import Program
from pockc.targets.devices import Device
from pockc.targets.native import cross
from pockc.targets.native.delivery import copy_runner, write_readme

RUNNER = "pock-run-onnxruntime"


def deliver(program: Program, device: Device, folder: Path, toolchain: str | None = None) -> list[Path]:
    """Write ``pock-run-onnxruntime`` for a board, and a README.

    Args:
        program: What was built.
        device: The board. This machine's own architecture gets the installed program, unless a toolchain is named.
        folder: Where the models are.
        toolchain: ``zig``, or the path of a CMake toolchain file; None: zig where it is needed.

    Raises:
        UserError: there is no such program, or no toolchain for the board; the README is there nevertheless.
    """
    readme = write_readme(program, device, folder, _README, version=_version())
    if device.triple.endswith("-android"):
        raise UserError(
            f"there is no {RUNNER} for {device.name}: it needs the C library of a Linux distribution",
            instead="Run the models through ONNX Runtime's own package for Android.",
        )
    if toolchain is None and device.architecture == platform.machine():
        runner = copy_runner(folder, RUNNER)
    else:
        runner = cross.build_onnxruntime_runner(device, folder, toolchain)
    return [runner, readme]


def _version() -> str:
    """Of ONNX Runtime here, which is the one that the models were tried with."""
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return "1.31.1"


_README = """# {model} for ONNX Runtime on {device}, made by pockc

The `.onnx` files are the steps of training, `model.pock` their weights and states. Any ONNX Runtime from 1.20 on runs
them: from Python with `pockc.session.open_session("model.pock")`, without Python by `pock-run-onnxruntime`. That needs
`libonnxruntime.so.1` beside it, which is in the pip package (there is one for x86_64 and for aarch64):

```sh
pip download onnxruntime=={version} --no-deps --only-binary=:all: --python-version 311 \\
  --platform manylinux_2_28_{architecture}
unzip -j onnxruntime-*.whl 'onnxruntime/capi/libonnxruntime.so*' && mv libonnxruntime.so.* libonnxruntime.so.1
./pock-run-onnxruntime selftest model.pock
./pock-run-onnxruntime train model.pock --data train.npz --epochs 3 --eval test.npz --save tuned.ckpt
```

Where `pock-run-onnxruntime` is not in this folder, pockc's sources make it:

```sh
cmake -S runtime -B build -DPOCKC_ONNXRUNTIME=ON && cmake --build build --target pock-run-onnxruntime
```

- Scheme `{scheme}`. The data is an uncompressed `.npz` with the arrays {inputs}, samples along the first axis.
- `tuned.ckpt` goes back to the workstation: `pockc export model.pock --checkpoint tuned.ckpt -o tuned.safetensors`
  writes the weights under their original names.
"""
