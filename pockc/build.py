"""`pockc.build`: from a PyTorch model to a compiled training program."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from pockc import calibration as ranges
from pockc.budget import Alternative, advised, within
from pockc.dtype_checks import check_dtype, check_prefix, check_state_dtype, resolved_scale
from pockc.entries import ENTRIES, Traced, lowered, seeded
from pockc.errors import BudgetError, UserError, near_names
from pockc.ir import Graph
from pockc.losses import LOSSES
from pockc.optim import AdamW, Optimizer
from pockc.passes import memory
from pockc.passes.lifetimes import update_chains
from pockc.pipeline import COMMON, LOWERINGS, TOGETHER, Known, Manager
from pockc.program import Program, place_states
from pockc.recipe import BatchNorm, Dtype, FrozenDtype, LossScale, PrefixDtype, Recipe, SavedDtype, StateDtype
from pockc.scheme import Channels, Scheme, detect_family, resolve
from pockc.targets import devices
from pockc.targets import find as find_target
from pockc.targets.devices import Device
from pockc.targets.native import workspace_of
from pockc.tuning import times_of

if TYPE_CHECKING:  # torch is an extra: only building needs it
    from pockc.frontend.torch import Imported

Inputs = Mapping[str, Any] | tuple[Any, ...]
Calibration = Mapping[str, Any] | Literal["example"] | None


def build(
    model: Any,
    example_inputs: Inputs,
    loss: str | Callable[..., Any] | None = "cross_entropy",
    optimizer: Optimizer | None = None,
    scheme: str | Path | Scheme = "full",
    batchnorm: BatchNorm = "fold",
    device: str | Device = "x86-64",
    *,
    accumulation: int = 1,
    dtype: Dtype = "f32",
    half_arithmetic: bool = False,
    loss_scale: LossScale | None = None,
    loss_scale_interval: int | None = None,
    state_dtype: StateDtype = "f32",
    loss_options: Mapping[str, float] | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    micro_batch: int = 0,
    disabled: frozenset[str] = frozenset(),
    compare_full: bool = False,
    frozen_dtype: FrozenDtype = "f32",
    prefix_dtype: PrefixDtype = "f32",
    calibration: Calibration = None,
    saved_dtype: SavedDtype = "f32",
    entries: Collection[str] = ENTRIES,
    target: str = "native",
    cache_prefix: bool = False,
) -> Program:
    """Compile one training step of a PyTorch model.

    Args:
        model: a ``torch.nn.Module``. In eval mode it is fine-tuned with dropout off.
        example_inputs: keyword inputs, or a tuple in the order of ``forward``. Their shapes are fixed, batch included.
        loss: the name of a built-in loss, which adds the input ``labels``; a callable ``loss(output, labels)``, with
            ``labels`` among the example inputs; or None where the model returns the loss.
        optimizer: `pockc.SGD`, `Adam`, `AdamW` or `Lion`; ``AdamW()`` if None.
        scheme: what is updated: a preset, a YAML file, or a `Scheme`.
        batchnorm: ``fold`` and ``freeze`` keep the statistics, ``fold`` also gamma; ``train`` updates them.
        device: a name of `pockc devices`, a ``.yaml`` file that describes a board, or a record of
            `pockc.targets.devices`.
        accumulation: micro-steps whose mean gradient makes one optimizer step.
        dtype: how activations and their gradients are stored: ``f32``, or ``bf16`` or ``fp16`` in half the memory.
            Kernels compute in float32, in which parameters, their gradients, optimizer states and losses stay.
        half_arithmetic: also multiply in 16 bits where the CPU can: with ``dtype`` ``fp16`` on 64-bit ARM with the
            FP16 extension, with ``bf16`` on x86 with AVX512_BF16 or AMX. Results there differ from those on other
            CPUs, by a few roundings of storage.
        loss_scale: a power of two, by which gradients are multiplied on their way to the parameters; by default
            1024 with ``fp16``, whose least numbers gradients may fall below, and 1 otherwise. Or ``dynamic``, as
            ``torch.amp.GradScaler``, with any ``dtype``: 65536 to begin with; a step with gradients that are not finite
            updates nothing and halves the scale. All gradients are then in memory together, as with ``clip_norm``.
        loss_scale_interval: steps in a row with finite gradients that double a dynamic scale; 2000 by default.
        state_dtype: how optimizer slots are stored: ``f32``, or ``int8``, a byte each and a scale for every 256.
        loss_options: ``label_smoothing``, ``ignore_index`` (cross entropy), ``delta`` (huber).
        seed: of dropout and of random channel selections in presets.
        memory_budget: bytes that arena and mapped weights may occupy together. The fastest program within it is built,
            by computing activations again and by micro-batches whose gradients add up; without a budget, activations
            are computed again where that costs next to nothing.
        micro_batch: samples that run through the training step at a time; 0: what is best for memory and time.
        disabled: names of optional passes to switch off.
        compare_full: also plan the scheme ``full``, and keep its memory in the metadata for comparison.
        frozen_dtype: how the program stores large frozen weights: ``f32``, ``bf16``, ``int8`` (a scale per output
            channel) or ``int4`` (a scale per 32 elements). Kernels decode them; what is trained stays float32.
        prefix_dtype: ``int8`` computes what lies in front of everything trained with eight-bit weights and activations,
            the same in every entry.
        calibration: what ``int8`` activations have to cover, as samples: an array per input, samples along the first
            axis, of which tens to hundreds do; or ``example`` for the example inputs.
        saved_dtype: how activations wait for the backward pass: ``f32``, or ``int8``, a byte each and a scale for every
            128. Losses are those of the parameters, to the last bit; gradients become approximate.
        entries: what the program can do: ``train_step``, which is always there, ``eval_step`` and ``infer``. The arena
            has room for the largest of them.
        target: ``native``, or ``onnxruntime``: ONNX models of the same steps, which plain ONNX Runtime runs. It plans
            its own memory, so that ``memory_budget``, ``micro_batch`` and compact dtypes do not apply.
        cache_prefix: also make entries that take the step in two: ``encode``, what lies in front of everything trained,
            and ``train_step_encoded`` and ``eval_step_encoded``, which start from its outputs. What `encode` makes of a
            sample never changes: later epochs can start from there.

    Returns:
        The program: ``save`` it, look at ``memory`` and ``text("train_step")``.

    Raises:
        UserError: something in the model, scheme or options is not supported, or makes no sense together.
        BudgetError: nothing fits the memory budget; ``smallest`` is the least that something does fit.
    """
    optimizer = optimizer or AdamW()
    _check_options(loss, batchnorm, accumulation, frozen_dtype)
    check_dtype(dtype, half_arithmetic, prefix_dtype, saved_dtype)
    scale, scale_interval = resolved_scale(dtype, loss_scale, loss_scale_interval)
    if saved_dtype not in get_args(SavedDtype):
        raise UserError(f"saved_dtype is {saved_dtype!r}", supported=", ".join(get_args(SavedDtype)))
    check_prefix(prefix_dtype, calibration, batchnorm)
    check_state_dtype(state_dtype, optimizer)
    _check_entries(entries)
    if memory_budget is not None and memory_budget <= 0:
        raise UserError(f"the memory budget is {memory_budget} bytes; it must be above 0")
    options = Options(
        loss=loss,
        optimizer=optimizer,
        scheme=scheme,
        batchnorm=batchnorm,
        device=device if isinstance(device, Device) else devices.find(device),
        accumulation=accumulation,
        dtype=dtype,
        half_arithmetic=half_arithmetic,
        loss_scale=scale,
        scale_interval=scale_interval,
        state_dtype=state_dtype,
        loss_options=dict(loss_options or {}),
        seed=seed,
        memory_budget=memory_budget,
        micro_batch=micro_batch,
        disabled=disabled,
        compare_full=compare_full,
        frozen_dtype=frozen_dtype,
        prefix_dtype=prefix_dtype,
        calibration=calibration,
        saved_dtype=saved_dtype,
        entries=tuple(entries),
        target=target,
        cache_prefix=cache_prefix,
    )
    _check_target(options)
    imports = _trace(model, example_inputs, options)
    try:
        return _build(model, example_inputs, options, imports)
    except BudgetError as error:
        raise advised(error, _alternatives(model, example_inputs, options, imports)) from None


@dataclass(frozen=True, slots=True)
class Options:
    """What `build` was asked for, beside model and inputs."""

    loss: str | Callable[..., Any] | None
    optimizer: Optimizer
    scheme: str | Path | Scheme
    batchnorm: BatchNorm
    device: Device
    accumulation: int
    dtype: Dtype
    half_arithmetic: bool
    loss_scale: float
    scale_interval: int
    state_dtype: StateDtype
    loss_options: Mapping[str, float]
    seed: int
    memory_budget: int | None
    micro_batch: int
    disabled: frozenset[str]
    compare_full: bool
    frozen_dtype: FrozenDtype
    prefix_dtype: PrefixDtype
    calibration: Calibration
    saved_dtype: SavedDtype
    entries: tuple[str, ...]
    target: str
    cache_prefix: bool


@dataclass(frozen=True, slots=True)
class Imports:
    """A traced model, and how long that took. ``evaluated`` is None where training has the same graph."""

    training: Imported
    evaluated: Imported | None
    seconds: float


def _trace(model: Any, example_inputs: Inputs, options: Options) -> Imports:
    """The model as it trains, and as it is evaluated."""
    from pockc.frontend.torch import trace  # torch is an extra: only building needs it

    started = time.perf_counter()
    training = trace(model, example_inputs, loss=options.loss, batchnorm=options.batchnorm)
    evaluated = None
    if getattr(model, "training", False) or options.batchnorm == "train":
        evaluated = trace(model, example_inputs, loss=options.loss, batchnorm="freeze", training=False)
    return Imports(training, evaluated, time.perf_counter() - started)


def _build(model: Any, example_inputs: Inputs, options: Options, imports: Imports) -> Program:
    started = time.perf_counter() - imports.seconds
    loss, batchnorm = options.loss, options.batchnorm
    device = options.device
    imported, evaluated = imports.training, imports.evaluated

    parameters = {
        value.name: state.original().shape
        for value, state in imported.graph.states.items()
        if state.kind == "parameter"
    }
    family = detect_family(imported.modules)
    frozen = _batchnorm_scales(imported.modules) if batchnorm == "fold" else frozenset()

    def resolved(chosen: str | Path | Scheme) -> dict[str, Channels | None]:
        modules, aliases = imported.modules, imported.aliases
        return resolve(chosen, parameters, modules=modules, family=family, aliases=aliases, frozen=frozen)

    recipe = Recipe(
        trained=resolved(options.scheme),
        optimizer=options.optimizer,
        loss=loss if isinstance(loss, str) else None,
        loss_options=options.loss_options,
        batchnorm=batchnorm,
        accumulation=options.accumulation,
        dtype=options.dtype,
        loss_scale=options.loss_scale,
        scale_interval=options.scale_interval,
        state_dtype=options.state_dtype,
        frozen_dtype=options.frozen_dtype,
        saved_dtype=options.saved_dtype,
        threads=device.threads,
        workspace=workspace_of(device.threads),
        times=times_of(device),
        cache=device.cost.cache_bytes,
        micro_batch=options.micro_batch,
        updated_buffers=frozenset(state.name for state in imported.graph.updates),
        disabled=options.disabled,
    )

    if options.prefix_dtype == "int8":
        samples = _samples(model, example_inputs, options.calibration)
        common = Manager(recipe, find_target(options.target).supports).run("calibrate", COMMON, imported.graph)
        recipe = replace(recipe, prefix_ranges=ranges.measure(common, recipe, samples))

    eval_graph = evaluated.graph if evaluated else None
    training = seeded(imported.graph, options.seed)
    traced = Traced(training, eval_graph, options.entries, options.cache_prefix)

    budget = options.memory_budget
    known: Known | None = None if budget is None else {}  # plans under a budget have most of their graphs in common

    def planned(recipe: Recipe, limit: int | None = None) -> Program:
        if options.target != "native":
            return _lower(options.target, recipe, traced)
        if limit is not None and not traced.cache_prefix:
            step = _plan(recipe, replace(traced, wanted=("train_step",)), known)
            if step.memory.peak_bytes > limit:
                return step
        return _plan(recipe, traced, known)

    program = planned(recipe) if budget is None else within(budget, recipe, planned)
    without_gradient = program.metadata["without_gradient"]
    metadata = {
        "model": type(model).__name__,
        "family": family,
        "scheme": str(options.scheme),
        "loss": loss if isinstance(loss, str) else ("callable" if loss else "model"),
        "classifies": isinstance(loss, str) and LOSSES[loss].classifies,
        "optimizer": _describe(options.optimizer),
        "dtype": options.dtype,
        "half_arithmetic": options.half_arithmetic,
        "loss_scale": options.loss_scale,
        "loss_scale_interval": options.scale_interval,
        "state_dtype": options.state_dtype,
        "batchnorm": batchnorm,
        "frozen_dtype": options.frozen_dtype,
        "prefix_dtype": options.prefix_dtype,
        "saved_dtype": options.saved_dtype,
        "target": options.target,
        "device": device.name,
        **({} if device in devices.DEVICES.values() else {"board": device.as_json()}),
        "aliases": dict(imported.aliases),
        "trained": [name for name in recipe.trained if name not in without_gradient],
        "trained_elements": _trained_elements(program.entries["train_step"]),
        "parameters": {name: list(shape) for name, shape in parameters.items()},
        "buffers": _persistent_buffers(model, parameters, imported.aliases),
        **program.metadata,
        "build_seconds": round(time.perf_counter() - started, 3),
    }
    if options.compare_full and options.target == "native":
        full = replace(recipe, trained=resolved("full"), decisions={})
        same = full.trained == recipe.trained and budget is None
        memory_of_full = program if same else _plan(full, replace(traced, cache_prefix=False))
        metadata["full_memory"] = memory_of_full.memory.totals()
    return replace(program, metadata=metadata)


def _alternatives(model: Any, example_inputs: Inputs, options: Options, imports: Imports) -> Iterator[Alternative]:
    """Schemes, batch sizes and image sizes that may fit where the user's do not."""
    options = replace(options, compare_full=False)
    for scheme in ("sparse", "bias-only", "head"):
        if scheme != options.scheme:
            build_scheme = partial(_build, model, example_inputs, replace(options, scheme=scheme), imports)
            yield Alternative(f"scheme {scheme}", build_scheme)
    tensors = list(example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs)
    batch = tensors[0].shape[0] if tensors and tensors[0].shape else 1
    for size in sorted({batch // 2, 1} - {0, batch}, reverse=True):
        fewer = _mapped(example_inputs, lambda x, size=size: x[:size] if x.shape[:1] == (batch,) else x)
        yield Alternative(f"batch size {size}", partial(_build_anew, model, fewer, options))
    images = [x for x in tensors if len(x.shape) == 4 and x.shape[2] == x.shape[3] >= 64]
    for pixels in (images[0].shape[2] // 2,) if images else ():
        smaller = _mapped(example_inputs, lambda x, n=pixels: x[:, :, :n, :n] if len(x.shape) == 4 else x)
        # Samples are of another size; memory is the same with any.
        measured = replace(options, calibration="example") if options.calibration else options
        yield Alternative(f"images of {pixels} by {pixels} pixels", partial(_build_anew, model, smaller, measured))


def _build_anew(model: Any, example_inputs: Inputs, options: Options) -> Program:
    return _build(model, example_inputs, options, _trace(model, example_inputs, options))


def _mapped(example_inputs: Inputs, function: Callable[..., Any]) -> Inputs:
    if isinstance(example_inputs, Mapping):
        return {name: function(value) for name, value in example_inputs.items()}
    return tuple(map(function, example_inputs))


def _plan(recipe: Recipe, traced: Traced, known: Known | None = None) -> Program:
    """A program from training and evaluation graph, whose metadata says what the passes did."""
    manager = Manager(recipe, find_target("native").supports, known)
    entries, without_gradient = lowered("native", manager, traced)
    entries = manager.run_together(TOGETHER, entries)
    placements = {name: memory.run(graph, recipe.workspace) for name, graph in entries.items()}
    state_offset, state_bytes = place_states(entries)
    transient = max(placement.nbytes for placement in placements.values())
    return Program(
        entries=entries,
        placements=placements,
        state_offset=state_offset,
        state_bytes=state_bytes,
        arena_bytes=state_bytes + transient,
        max_threads=recipe.threads,
        accumulation=recipe.accumulation,
        metadata={
            "without_gradient": sorted(without_gradient),
            "memory_plan": recipe.decisions,
            "passes": _timings(manager),
        },
    )


def _lower(target: str, recipe: Recipe, traced: Traced) -> Program:
    """As `_plan`, for a target that places nothing but the states here."""
    backend = find_target(target)
    manager = Manager(recipe, backend.supports)
    entries, without_gradient = lowered(target, manager, traced)
    state_offset, state_bytes = place_states(entries)
    return Program(
        entries={name: backend.lower(graph) for name, graph in entries.items()},
        placements={},
        state_offset=state_offset,
        state_bytes=state_bytes,
        arena_bytes=state_bytes,
        max_threads=recipe.threads,
        accumulation=recipe.accumulation,
        metadata={"without_gradient": sorted(without_gradient), "passes": _timings(manager)},
        target=target,
    )


def _timings(manager: Manager) -> list[dict[str, Any]]:
    """What `pockc build` and `inspect` show of the passes."""
    return [
        {"entry": entry, "pass": name, "ms": round(ms, 3), "nodes": nodes} for entry, name, ms, nodes in manager.timings
    ]


def _persistent_buffers(model: Any, parameters: Mapping[str, Any], aliases: Mapping[str, str]) -> list[str]:
    """What else than parameters the model's ``state_dict`` holds, and an export must hold."""
    return [name for name in model.state_dict() if name not in parameters and name not in aliases]


def _check_options(loss: object, batchnorm: str, accumulation: int, frozen_dtype: str) -> None:
    if batchnorm not in get_args(BatchNorm):
        raise UserError(f"batchnorm is {batchnorm!r}", supported=", ".join(get_args(BatchNorm)))
    if frozen_dtype not in get_args(FrozenDtype):
        raise UserError(f"frozen_dtype is {frozen_dtype!r}", supported=", ".join(get_args(FrozenDtype)))
    if accumulation < 1:
        raise UserError(f"accumulation is {accumulation}; it counts micro-steps and is at least 1")
    if not (loss is None or isinstance(loss, str) or callable(loss)):
        raise UserError(f"loss is {loss!r}", supported="a name, a callable loss(output, labels), or None")


def _samples(model: Any, example_inputs: Inputs, calibration: Calibration) -> Mapping[str, Any]:
    """The calibration samples, as arrays by input name."""
    from pockc.frontend.torch_parity import named_arrays

    if isinstance(calibration, Mapping):
        return {name: np.asarray(array) for name, array in calibration.items()}
    return named_arrays(model, example_inputs)


def _check_target(options: Options) -> None:
    """Raise UserError for a target that is unknown, or options that it does not have."""
    target = options.target
    if target not in LOWERINGS:
        hint = near_names(target, LOWERINGS)
        raise UserError(f"there is no target {target!r} to build for", supported=", ".join(LOWERINGS), instead=hint)
    if target == "native":
        return
    given = {
        "memory_budget": options.memory_budget is not None,
        "micro_batch": options.micro_batch > 0,
        "dtype": options.dtype != "f32",
        "loss_scale": options.loss_scale != 1.0,
        "state_dtype": options.state_dtype != "f32",
        "frozen_dtype": options.frozen_dtype != "f32",
        "prefix_dtype": options.prefix_dtype != "f32",
        "saved_dtype": options.saved_dtype != "f32",
        "cache_prefix": options.cache_prefix,
    }
    if unused := next((name for name, is_given in given.items() if is_given), None):
        raise UserError(
            f"the target {target} has no {unused}: it plans its own memory, and computes in float32",
            instead=f"Leave {unused} out, or build for the target native.",
        )


def _check_entries(entries: Collection[str]) -> None:
    supported = ", ".join(ENTRIES)
    if isinstance(entries, str):
        raise UserError(f"entries is the text {entries!r}", supported=f"a list or tuple of {supported}")
    if unknown := [name for name in entries if name not in ENTRIES]:
        raise UserError(
            f"there is no entry {unknown[0]!r}", supported=supported, instead=near_names(unknown[0], ENTRIES)
        )
    if "train_step" not in entries:
        raise UserError(
            "the entries leave out train_step, without which there is nothing to train",
            supported=supported,
            instead="Add train_step.",
        )


def _batchnorm_scales(modules: Mapping[str, str]) -> frozenset[str]:
    """The gammas of all batch norms: policy ``fold`` freezes them."""
    return frozenset(f"{path}.weight" for path, kind in modules.items() if "BatchNorm" in kind)


def _describe(optimizer: Optimizer) -> dict[str, Any]:
    return {"name": type(optimizer).__name__.lower(), **asdict(optimizer)}


def _trained_elements(graph: Graph) -> int:
    """How many numbers a step updates: of a channel-sparse weight only the selected part counts."""
    makers = graph.producers()
    total = 0
    for state, chain in update_chains(graph).items():
        if graph.states[state].kind == "parameter":
            total += sum(makers[value].inputs[1].type.elements for value in chain)
    return total
