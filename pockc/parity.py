"""Proof per build: the compiled step against PyTorch's, loss by loss and tensor by tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pockc.artifact import Entry, read
from pockc.build import build
from pockc.errors import InternalError, UserError
from pockc.ir import NUMPY_DTYPES, Array
from pockc.optim import AdamW, Optimizer
from pockc.scheme import Scheme, resolve
from pockc.session import Session

LOSS_TOLERANCE = 1e-4  # relative, of every step's loss
TENSOR_TOLERANCE = 1e-3  # norm of the difference over the norm of the tensor's own change


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a trained tensor ended from PyTorch's, as a fraction of how far PyTorch moved it.

    ``gradient_is_zero`` marks those whose gradient vanishes in exact arithmetic: what moved them is rounding noise, and
    the error says nothing.
    """

    name: str
    error: float
    change: float
    gradient_is_zero: bool


@dataclass(frozen=True, slots=True)
class Parity:
    """Losses of each step (pockc, PyTorch) and the error of each trained tensor after the last, largest first.

    ``noise`` is the same comparison of PyTorch in float32 with PyTorch in float64: what rounding alone does to these
    steps. Where it is as large as the error, the steps are ill-conditioned: a unit may lie on the kink of its ReLU.
    """

    losses: tuple[tuple[float, float], ...]
    tensors: tuple[TensorError, ...]
    noise: Parity | None = None

    @property
    def worst_loss_error(self) -> float:
        """The largest relative difference of a loss; inf where one is not finite."""
        errors = [abs(ours - theirs) / max(abs(theirs), 1e-12) for ours, theirs in self.losses]
        return max((error if np.isfinite(error) else float("inf") for error in errors), default=float("inf"))

    @property
    def worst_tensor_error(self) -> float:
        """The largest error of a tensor that has a gradient."""
        return max((t.error for t in self.tensors if not t.gradient_is_zero), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether both are within tolerance."""
        return self.worst_loss_error <= LOSS_TOLERANCE and self.worst_tensor_error <= TENSOR_TOLERANCE


def verify_against_torch(
    model: Any,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    loss: str | Callable[..., Any] | None = "cross_entropy",
    optimizer: Optimizer | None = None,
    scheme: str | Path | Scheme = "full",
    batchnorm: Any = "fold",
    *,
    steps: int = 10,
    seed: int = 0,
    accumulation: int = 1,
    loss_options: Mapping[str, float] | None = None,
    threads: int = 1,
    reference_kernels: bool = False,
    disabled: frozenset[str] = frozenset(),
    with_noise: bool = False,
) -> Parity:
    """Train a model for some steps in a session and in PyTorch eager, on the same seeded batches.

    The batches are the example inputs with their rows shuffled and, where they are real-valued, with noise; labels of a
    named loss are random. Model, loss, optimizer, scheme and batchnorm are those of `pockc.build`. ``with_noise`` also
    trains PyTorch in float64, and fills in `Parity.noise`.

    Raises:
        UserError: as `pockc.build`; or the model applies dropout.
    """
    from pockc.frontend.torch_parity import Reference, model_names, named_arrays

    if steps < 1:
        raise UserError(f"steps is {steps}; at least one is needed")
    optimizer = optimizer or AdamW()
    options = dict(loss_options or {})
    program = build(
        model, example_inputs, loss, optimizer, scheme, batchnorm,
        accumulation=accumulation, loss_options=options, disabled=disabled,
    )  # fmt: skip
    names = model_names(model)
    updated = set(program.metadata["trained"]) | set(program.metadata["without_gradient"])
    frozen = frozenset(names.parameters) - updated
    trained = resolve(scheme, names.parameters, modules=names.modules, aliases=names.aliases, frozen=frozen)
    reference = Reference(model, trained, loss, optimizer, options, batchnorm, accumulation)
    initial = reference.arrays()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pock")
        program.save(file)
        examples = named_arrays(model, example_inputs)
        given = list(batches(examples, read(file).entries, loss, steps * accumulation, seed))
        zero = reference.zero_gradients(given[0])
        with Session(file, threads, reference_kernels=reference_kernels) as session:
            losses = [(session.train_step(**batch), reference.train_step(batch)) for batch in given]
            ours = session.parameters()
    theirs = reference.arrays()
    parity = _compare(losses, ours, theirs, initial, zero)
    if not with_noise:
        return parity
    exact = Reference(model, trained, loss, optimizer, options, batchnorm, accumulation, double=True)
    exact_losses = [exact.train_step(batch) for batch in given]
    pairs = [(float32, float64) for (_, float32), float64 in zip(losses, exact_losses, strict=True)]
    return replace(parity, noise=_compare(pairs, theirs, exact.arrays(), initial, zero))


def _compare(
    losses: list[tuple[float, float]],
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    initial: Mapping[str, Array],
    zero: frozenset[str],
) -> Parity:
    errors = [_tensor_error(name, ours, theirs, initial, name in zero) for name in theirs]
    return Parity(tuple(losses), tuple(sorted(errors, key=lambda error: -error.error)))


def _tensor_error(
    name: str, ours: Mapping[str, Array], theirs: Mapping[str, Array], initial: Mapping[str, Array], zero: bool
) -> TensorError:
    # A tensor that no gradient reaches may be frozen in the file, or not be in it at all.
    difference = float(np.linalg.norm(ours.get(name, initial[name]).astype(np.float64) - theirs[name]))
    change = float(np.linalg.norm(theirs[name].astype(np.float64) - initial[name]))
    error = difference / change if change else (0.0 if difference == 0 else float("inf"))
    return TensorError(name, error if np.isfinite(error) else float("inf"), change, zero)


def batches(
    examples: Mapping[str, Array], entries: Mapping[str, Entry], loss: Any, count: int, seed: int
) -> Iterator[dict[str, Array]]:
    """Seeded batches like the example inputs, with labels of their own where ``loss`` names one."""
    random = np.random.default_rng(seed)
    rows = max((array.shape[0] for array in examples.values() if array.ndim), default=1)
    for _ in range(count):
        order = random.permutation(rows)
        batch = {name: _varied(array, order, random) for name, array in examples.items()}
        if isinstance(loss, str):
            batch["labels"] = _labels(entries, loss, random)
        yield batch


def _varied(array: Array, order: Array, random: np.random.Generator) -> Array:
    """Rows in another order, alike for all inputs; noise on what is real-valued, which a float mask is not."""
    if array.ndim and array.shape[0] == len(order):
        array = array[order]
    if array.dtype.kind != "f" or len(np.unique(array[:1])) <= 2:
        return array
    noise = random.standard_normal(array.shape) * 0.5 * array.std()
    return np.asarray(array + noise, array.dtype)


def _classes(step: Entry) -> int:
    """How many classes the loss of a training step tells apart."""
    for call in step.calls:
        if call.op == "cross_entropy":
            return call.inputs[0].shape[-1]
        if call.op == "cross_entropy_of_tiles":
            return call.ints[0]  # its first attribute
    raise InternalError("a loss with labels of classes has no cross entropy")


def _labels(entries: Mapping[str, Entry], loss: str, random: np.random.Generator) -> Array:
    labels = entries["train_step"].inputs["labels"]
    if labels.dtype == "i64":
        classes = _classes(entries["train_step"])
        return random.integers(0, classes, labels.shape, dtype=np.int64)
    if loss == "bce_with_logits":
        return random.integers(0, 2, labels.shape).astype(np.float32)
    return random.standard_normal(labels.shape).astype(NUMPY_DTYPES[labels.dtype])
