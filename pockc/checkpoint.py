"""Checkpoints (safetensors files of the runtime) and the export of tuned parameters for the original model."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save as save_bytes

from pockc.artifact import Artifact, read
from pockc.artifact_writer import write_atomically
from pockc.compact import COMPACT_DTYPES
from pockc.errors import UserError
from pockc.ir import Array

FORMAT = "pockc-checkpoint-1"


def read_checkpoint(path: str | Path, program: Artifact) -> dict[str, Array]:
    """The updated states of a checkpoint by name, in the user's layout.

    Raises:
        UserError: the file is missing, corrupt, or a checkpoint of another program.
    """
    return read_position(path, program)[0]


def read_position(path: str | Path, program: Artifact) -> tuple[dict[str, Array], dict[str, str]]:
    """As `read_checkpoint`, with the metadata: ``micro_step`` and ``cursor`` tell where in a run it was saved."""
    content = _file_bytes(path)
    tensors = _parse(path, content)
    metadata = _metadata(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version", supported=f"files that {FORMAT} marks")
    if metadata.get("model_hash") != program.model_hash:
        raise UserError(
            f"{path} is a checkpoint of another program than {program.path}",
            instead="Export it with the program that it was saved from.",
        )
    (header_bytes,) = struct.unpack_from("<Q", content)
    if metadata.get("crc32") != str(zlib.crc32(content[8 + header_bytes :])):
        raise UserError(f"{path} is corrupt: the checksum of its data is wrong", instead="Use an earlier checkpoint.")
    return tensors, metadata


def write_checkpoint(
    path: str | Path, program: Artifact, states: Mapping[str, Array], micro_step: int = 0, cursor: str = "null"
) -> None:
    """Write a checkpoint as the runtime does; an existing file is replaced whole or not at all.

    Args:
        path: Where to.
        program: What the states are of.
        states: All that the program updates, by name, in the user's layout.
        micro_step: Micro-steps done towards the next optimizer step.
        cursor: JSON, for whoever resumes.

    Raises:
        UserError: the system refuses the write.
    """
    metadata = {"format": FORMAT, "model_hash": program.model_hash, "micro_step": str(micro_step), "cursor": cursor}
    arrays = {name: np.asarray(array, order="C") for name, array in states.items()}
    content = save_bytes(arrays, metadata=metadata)  # the order of the data depends on the arrays alone
    (header_bytes,) = struct.unpack_from("<Q", content)
    metadata["crc32"] = str(zlib.crc32(content[8 + header_bytes :]))
    write_atomically(Path(path), [save_bytes(arrays, metadata=metadata)])


def export(
    program: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
) -> list[str]:
    """Write parameters and buffers under their original names to a safetensors file that the model loads.

    Trained ones come from the checkpoint (or have their initial values), frozen ones from the program; those that no
    entry of the program reads as they are (the build folded them into constants) come from ``base``, the model's
    original weights, or are left out. So do those that the program stores in fewer bytes; without ``base`` they are
    decoded, as `decoded_names` tells. Tied tensors are written under each of their names. With the model's own
    ``state_dict`` as ``base`` the file loads strictly.

    Returns:
        The names of parameters and buffers that the model has and the file lacks.

    Raises:
        UserError: a file is missing or corrupt, or the checkpoint is of another program.
    """
    artifact = read(program)
    tensors = _parse(base, _file_bytes(base)) if base else {}
    metadata = artifact.metadata
    aliases: Mapping[str, str] = metadata.get("aliases", {})
    stored = {*metadata.get("parameters", ()), *metadata.get("buffers", ())}  # others the model makes by itself
    own = {state.name: artifact.contents(state) for state in artifact.states if state.name in stored}
    inexact = {state.name for state in artifact.states if state.tensor.dtype in COMPACT_DTYPES}
    if checkpoint:
        tuned = read_checkpoint(checkpoint, artifact)
        own |= {name: tuned[name] for name in own if name in tuned}
    for name, array in own.items():
        if name in tensors and tensors[name].shape != array.shape:
            raise UserError(
                f"{base}: {name} has shape {list(tensors[name].shape)}, the program's has {list(array.shape)}",
                instead="Give the weights of the model that was built as --base.",
            )
    tensors |= {name: array for name, array in own.items() if name not in inexact or name not in tensors}
    tensors |= {other: tensors[name] for other, name in aliases.items() if name in tensors}
    contiguous = {name: array.copy(order="C") for name, array in tensors.items()}
    write_atomically(Path(output), [save_bytes(contiguous, metadata={"format": "pt"})])
    return [name for name in metadata.get("omitted", ()) if name in stored and name not in tensors]


def decoded_names(program: str | Path, base: str | Path | None = None) -> list[str]:
    """The frozen parameters and buffers of which an export has but what the program's compact storage kept.

    Raises:
        UserError: a file is missing or corrupt.
    """
    artifact = read(program)
    known = _parse(base, _file_bytes(base)) if base else {}
    stored = {*artifact.metadata.get("parameters", ()), *artifact.metadata.get("buffers", ())}
    compact = (state.name for state in artifact.states if state.tensor.dtype in COMPACT_DTYPES)
    return [name for name in compact if name in stored and name not in known]


def _file_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parse(path: str | Path, content: bytes) -> dict[str, Array]:
    try:
        return load_bytes(content)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or is cut off: {error}") from None


def _metadata(path: str | Path) -> dict[str, str]:
    with safe_open(str(path), "numpy") as file:
        return dict(file.metadata() or {})
