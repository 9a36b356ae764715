"""Golden vectors: inputs and expected outputs in the program file, for ``pock-run selftest`` on the board."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_bytes

from pockc.artifact import Call, Entry, read
from pockc.errors import UserError
from pockc.ir import Array
from pockc.losses import LOSSES
from pockc.parity import batches
from pockc.program import Program
from pockc.session import Session, open_session

ENTRIES = ("train_step", "eval_step", "infer")  # in the order in which they get room
MAX_BYTES = 16 << 20  # of all vectors: a self-test must not outgrow the weights
MAX_OUTPUT_BYTES = 1 << 20  # larger outputs (logits over a vocabulary) are left to the loss
MAX_REFERENCE_WORK = 2e10  # multiply-adds of an entry: some ten seconds in plain kernels


def golden_vectors(program: Program, examples: Mapping[str, Any], seed: int = 0) -> bytes:
    """The GOLDEN section: what each entry makes of one seeded batch, alone, from the initial states.

    The expected outputs come from the reference kernels, so that no fast kernel is its own judge; for entries that
    would take those minutes, they come from the fast kernels of this machine, and for another target from its library.

    Args:
        program: What to run.
        examples: Example inputs by name, as arrays of the program's shapes; the batch is varied from them.
        seed: Of noise, order of rows, and labels.

    Returns:
        A safetensors blob; empty where not even one entry's inputs fit into `MAX_BYTES`.

    Raises:
        UserError: an input that is not among the examples, or the compiled runtime is not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pock")
        program.save(file)
        entries = read(file).entries
        loss = program.metadata.get("loss")
        arrays = {name: np.asarray(value) for name, value in examples.items()}
        batch = next(batches(arrays, program.entries["train_step"], loss if loss in LOSSES else None, 1, seed))
        vectors: dict[str, Array] = {}
        for name in ENTRIES:
            if name not in entries or (program.accumulation > 1 and name == "train_step"):
                continue
            inputs = _inputs(name, entries[name], batch)
            if sum(array.nbytes for array in (*vectors.values(), *inputs.values())) <= MAX_BYTES:
                vectors |= _vectors(program, file, name, entries[name], inputs)
    return save_bytes(vectors) if vectors else b""


def _inputs(name: str, entry: Entry, batch: Mapping[str, Array]) -> dict[str, Array]:
    if missing := [key for key in entry.inputs if key not in batch]:
        raise UserError(f"no golden vectors: {name} needs an example of {missing[0]!r}", supported=", ".join(batch))
    return {key: batch[key] for key in entry.inputs}


def _vectors(program: Program, file: Path, name: str, entry: Entry, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs and outputs of one entry as the self-test looks for them; none where no output is worth keeping."""
    plain = sum(map(_work, entry.calls)) <= MAX_REFERENCE_WORK
    native, threads = program.target == "native", program.max_threads
    with Session(file, threads, reference_kernels=plain) if native else open_session(file, threads) as session:
        outputs = session.run(name, **inputs)
    kept = {key: array for key, array in outputs.items() if array.nbytes <= MAX_OUTPUT_BYTES}
    if not kept:
        return {}
    given = {f"{name}/input/{key}": np.array(array, order="C") for key, array in inputs.items()}
    return given | {f"{name}/output/{key}": array for key, array in kept.items()}


def _work(call: Call) -> float:
    """About the multiply-adds of a matrix product or convolution; other calls are cheap.

    A product of m×k and k×n has sqrt(mk · kn · mn) = mkn of them; of a convolution that misses a factor, at most the
    extent of its kernel.
    """
    if not call.op.startswith(("matmul", "conv2d", "attention")) or len(call.inputs) < 2:
        return 0.0
    sizes = [float(np.prod(tensor.shape)) for tensor in (*call.inputs[:2], call.outputs[0])]
    return float(np.sqrt(np.prod(sizes)))
