"""What goes to the board beside ``model.pock``: the program that runs it, and a page that says how."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from pockc.abi import runtime_file
from pockc.errors import UserError
from pockc.program import Program
from pockc.targets.devices import Device
from pockc.targets.native import cross
from pockc.targets.native.toolchain import has_zig


def deliver(
    program: Program, device: Device, folder: Path, toolchain: str | None = None, *, library: bool = False
) -> list[Path]:
    """Write `pock-run` for a board, its README and, if wanted, ``libpockrt`` with headers.

    A board of this machine's own architecture gets a copy of the installed `pock-run`, with every kernel in every
    instruction set, unless a toolchain is named or, where zig is here, the board names its instruction set; any other
    is cross-compiled for.

    Args:
        program: What the binary is for: it has these kernels alone.
        device: The board.
        folder: Where the files go.
        toolchain: ``zig``, or the path of a CMake toolchain file; None: zig where it is needed.
        library: Whether to add the library for applications of one's own.

    Raises:
        UserError: there is no toolchain for the board here, or it fails.
    """
    if toolchain is None and _is_served_by_the_installed(device):
        runner = copy_runner(folder)
    else:
        runner = cross.build_runner(program, device, folder, toolchain)
    peak = program.memory.peak_bytes / 1e6
    readme = write_readme(program, device, folder, _README, peak=peak, threads=program.max_threads)
    return [runner, readme] + (cross.build_library(device, folder, toolchain) if library else [])


def _is_served_by_the_installed(device: Device) -> bool:
    own = device.architecture == platform.machine()
    return own and not (device.instruction_set and has_zig())


def copy_runner(folder: Path, name: str = "pock-run") -> Path:
    """Copy an installed program into a folder. Raises UserError where there is none, or it cannot be written."""
    source, target = runtime_file(name), folder / name
    try:
        target.unlink(missing_ok=True)  # one that is running may be replaced, but not written to
        shutil.copy2(source, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return target


def write_readme(program: Program, device: Device, folder: Path, template: str, **details: object) -> Path:
    """Write README.md for whoever finds the folder on the board: the template, with what is known of the program."""
    file = folder / "README.md"
    text = template.format(
        model=program.metadata.get("model", "a model"),
        scheme=program.metadata.get("scheme", ""),
        device=device.name,
        architecture=device.architecture,
        inputs=", ".join(f"`{value.name}`" for value in program.entries["train_step"].inputs),
        **details,
    )
    file.write_text(text)
    return file


_README = """# {model} for {device}, made by pockc

This folder is all that the board needs: `model.pock` is the training program with its weights, `pock-run` a static
program for {architecture} Linux that runs it. Nothing has to be installed.

```sh
./pock-run info model.pock                  # what the program holds
./pock-run selftest model.pock              # does this board compute what the workstation computed?
./pock-run bench model.pock                 # time and memory of a training step
./pock-run train model.pock --data train.npz --epochs 3 --eval test.npz --save tuned.ckpt
./pock-run eval model.pock --data test.npz --checkpoint tuned.ckpt
```

- Scheme `{scheme}`. Planned peak: {peak:.2f} MB (arena and frozen weights). At most {threads} threads (`--threads`).
- The data is an uncompressed `.npz` with the arrays {inputs}, samples along the first axis.
- `tuned.ckpt` goes back to the workstation: `pockc export model.pock --checkpoint tuned.ckpt -o tuned.safetensors`
  writes the weights under their original names.
- `pock-run` has the kernels of this program alone where it was cross-compiled: another program may need its own.
- "Exec format error" means that the board, or its operating system, is not {architecture}.
"""
