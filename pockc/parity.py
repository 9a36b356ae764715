"""Proof per build: the compiled step against PyTorch's, loss by loss and tensor by tensor."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pockc.build import build
from pockc.errors import InternalError, UserError
from pockc.halves import UNIT_ROUNDOFF
from pockc.ir import NUMPY_DTYPES, Array, Graph, State, contents
from pockc.optim import AdamW, Optimizer
from pockc.passes import mixed_precision
from pockc.program import Program
from pockc.recipe import Dtype, FrozenDtype
from pockc.scheme import Scheme, resolve
from pockc.session import open_session

LOSS_TOLERANCE = 1e-4  # relative, of every step's loss
TENSOR_TOLERANCE = 1e-3  # norm of the difference over the norm of the tensor's own change

# The same with activations in 16 bits, of unit roundoff u. Each stored tensor moves by independent errors whose root
# mean square is u / sqrt(3) of its own. Up to some 50 of them lie on a path to the loss, whose errors add up to
# sqrt(50 / 3) u = 4 u; twice that is asked for. A gradient goes as far once more, but what counts there is that a unit
# within that distance of its ReLU's kink passes all of its gradient or none: a share of about 4 u of the units, which
# is sqrt(4 u) of the norm. Dividing by the root of the second moment, as Adam does, turns the signs of as many
# elements, a change of 2 each: 2 sqrt(4 u). Twice that again is asked for.
HALF_LOSS_TOLERANCE = 8  # times u
HALF_TENSOR_TOLERANCE = 8  # times sqrt(u): 0.5 with bf16, where a tensor that stays where it was is off by 1


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
    dtype: Dtype = "f32"  # of activations

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
        loss, tensor = tolerances(self.dtype)
        return self.worst_loss_error <= loss and self.worst_tensor_error <= tensor


def tolerances(dtype: Dtype) -> tuple[float, float]:
    """Of losses and of trained tensors, by the dtype of activations."""
    if dtype == "f32":
        return LOSS_TOLERANCE, TENSOR_TOLERANCE
    roundoff = UNIT_ROUNDOFF[mixed_precision.HALVES[dtype]]
    return HALF_LOSS_TOLERANCE * roundoff, HALF_TENSOR_TOLERANCE * math.sqrt(roundoff)


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
    frozen_dtype: FrozenDtype = "f32",
    target: str = "native",
    **memory_options: Any,
) -> Parity:
    """Train a model for some steps in a session and in PyTorch eager, on the same seeded batches.

    The batches are the example inputs with their rows shuffled and, where they are real-valued, with noise; labels of a
    named loss are random. Model, loss, optimizer, scheme and batchnorm are those of `pockc.build`, and so are
    ``memory_options``: ``memory_budget``, ``micro_batch``, which change no result beyond rounding, and ``dtype``,
    ``state_dtype``, ``prefix_dtype`` and ``saved_dtype``, which do: PyTorch keeps to float32, and the comparison shows
    the cost of fewer bits. With a ``dtype`` of 16 bits other tolerances hold.
    ``with_noise`` also trains PyTorch in float64, and fills in `Parity.noise`. With a compact ``frozen_dtype`` PyTorch
    gets the frozen weights that the program's kernels see: `decoded_weights`.

    Raises:
        UserError: as `pockc.build`; or the model applies dropout.
    """
    from pockc.frontend.torch_parity import Reference, model_names, model_tensors, named_arrays

    if steps < 1:
        raise UserError(f"steps is {steps}; at least one is needed")
    if memory_options.get("loss_scale") == "dynamic":
        raise UserError(
            "loss_scale is 'dynamic': it skips steps that PyTorch in float32 takes, so that the two cannot be compared",
            instead="Verify with a constant loss scale: all else of the program is the same.",
        )
    optimizer = optimizer or AdamW()
    options = dict(loss_options or {})
    compiled = partial(
        build, model, example_inputs, loss, optimizer, scheme, batchnorm,
        accumulation=accumulation, loss_options=options, disabled=disabled, target=target,
    )  # fmt: skip
    program = compiled(frozen_dtype=frozen_dtype, **memory_options)
    dtype = memory_options.get("dtype", "f32")
    names = model_names(model)
    decoded: dict[str, Array] = {}
    if frozen_dtype != "f32":
        decoded = decoded_weights(program, compiled(), model_tensors(model))
    updated = set(program.metadata["trained"]) | set(program.metadata["without_gradient"])
    frozen = frozenset(names.parameters) - updated
    trained = resolve(scheme, names.parameters, modules=names.modules, aliases=names.aliases, frozen=frozen)
    reference = Reference(model, trained, loss, optimizer, options, batchnorm, accumulation, weights=decoded)
    initial = reference.arrays()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pock")
        program.save(file)
        examples = named_arrays(model, example_inputs)
        given = list(batches(examples, program.entries["train_step"], loss, steps * accumulation, seed))
        zero = reference.zero_gradients(given[0])
        with open_session(file, threads, reference_kernels=reference_kernels) as session:
            losses = [(session.train_step(**batch), reference.train_step(batch)) for batch in given]
            ours = session.parameters()
    theirs = reference.arrays()
    parity = replace(_compare(losses, ours, theirs, initial, zero), dtype=dtype)
    if not with_noise:
        return parity
    exact = Reference(model, trained, loss, optimizer, options, batchnorm, accumulation, double=True, weights=decoded)
    exact_losses = [exact.train_step(batch) for batch in given]
    pairs = [(float32, float64) for (_, float32), float64 in zip(losses, exact_losses, strict=True)]
    return replace(parity, noise=_compare(pairs, theirs, exact.arrays(), initial, zero))


def decoded_weights(program: Program, plain: Program, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """What a program's training step makes of the frozen tensors that it stores in fewer bytes, by name.

    Where a weight was folded with its batch norm before it was encoded, it is divided by the same factors again, one
    per output channel: a model with these tensors then computes what the program does.

    Args:
        program: Built from a model.
        plain: The same with ``frozen_dtype="f32"``.
        tensors: The model's parameters and buffers by name.

    Raises:
        UserError: a constant was encoded that is no multiple, channel by channel, of a tensor of the model.
    """
    exact = {value.name: state.data for value, state in plain.entries["train_step"].states.items()}
    found: dict[str, Array] = {}
    for value, state in program.entries["train_step"].states.items():
        data = contents(value, state)
        if data is None or not value.type.is_compact:
            continue
        name, folded, _ = value.name.partition(".folded")
        if name not in tensors or name in found:
            raise UserError(
                f"{value.name} is no tensor of the model alone", instead="Compare with frozen weights as f32."
            )
        if folded:
            original = np.moveaxis(tensors[name], 1, -1) if data.ndim == 4 else tensors[name]
            data = data / _row_factors(value.name, exact[value.name], original)
            found[name] = np.moveaxis(data, -1, 1) if data.ndim == 4 else data
        else:
            found[name] = State(state.kind, data, state.permutation).original()
    return found


def _row_factors(name: str, scaled: Array | None, original: Array) -> Array:
    """The numbers f, one per row and shaped to broadcast, with which scaled = f * original."""
    factors = np.zeros(0)
    if scaled is not None and scaled.shape == original.shape:
        axes = tuple(range(1, original.ndim))
        squares = (original.astype(np.float64) ** 2).sum(axes, keepdims=True)
        factors = (scaled * original.astype(np.float64)).sum(axes, keepdims=True) / np.where(squares > 0, squares, 1.0)
        factors = np.where(factors == 0, 1.0, factors)  # of a row of zeros any will do
    if scaled is None or not factors.size or not np.allclose(scaled, factors * original, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"{name} is no multiple of a tensor of the model, channel by channel",
            instead="Compare with frozen weights as f32.",
        )
    return factors.astype(np.float32)


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


def batches(examples: Mapping[str, Array], step: Graph, loss: Any, count: int, seed: int) -> Iterator[dict[str, Array]]:
    """Seeded batches like the example inputs, with labels of their own for the training step ``step``.

    That is where ``loss`` names a built-in one.
    """
    random = np.random.default_rng(seed)
    rows = max((array.shape[0] for array in examples.values() if array.ndim), default=1)
    for _ in range(count):
        order = random.permutation(rows)
        batch = {name: _varied(array, order, random) for name, array in examples.items()}
        if isinstance(loss, str):
            batch["labels"] = _labels(step, loss, random)
        yield batch


def _varied(array: Array, order: Array, random: np.random.Generator) -> Array:
    """Rows in another order, alike for all inputs; noise on what is real-valued, which a float mask is not."""
    if array.ndim and array.shape[0] == len(order):
        array = array[order]
    if array.dtype.kind != "f" or len(np.unique(array[:1])) <= 2:
        return array
    noise = random.standard_normal(array.shape) * 0.5 * array.std()
    return np.asarray(array + noise, array.dtype)


def _classes(step: Graph) -> int:
    """How many classes the loss of a training step tells apart."""
    for node in step.nodes:
        if node.op == "cross_entropy":
            return node.inputs[0].type.shape[-1]
        if node.op == "cross_entropy_of_tiles":
            return int(node.attrs["classes"])
    raise InternalError("a loss with labels of classes has no cross entropy")


def _labels(step: Graph, loss: str, random: np.random.Generator) -> Array:
    labels = next(value.type for value in step.inputs if value.name == "labels")
    if labels.dtype == "i64":
        return random.integers(0, _classes(step), labels.shape, dtype=np.int64)
    if loss == "bce_with_logits":
        return random.integers(0, 2, labels.shape).astype(np.float32)
    return random.standard_normal(labels.shape).astype(NUMPY_DTYPES[labels.dtype])
