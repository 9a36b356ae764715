"""The options that `pockc build`, `verify` and `bench` share: each is one field of one record."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pockc.calibration import load_samples
from pockc.cli_model import load_model, make_loss, make_optimizer
from pockc.errors import UserError
from pockc.optim import Schedule
from pockc.recipe import LossScale
from pockc.scheme import Scheme
from pockc.sizes import parse_size

BUILT_FROM = "built_from"  # in a program's metadata: the record that `record` makes and `recorded` reads
EXAMPLE = "example"  # calibration by the example inputs
FUNCTION = "A function that returns (model, example_inputs), as model.py:make."


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What to compile, and how, as the command line has it: the fields are the arguments and options."""

    model: Annotated[str, typer.Argument(help=FUNCTION)]
    scheme: Annotated[
        str, typer.Option(help="full, bias-only, head, last-k:N, sparse, joined with +, or a YAML file.")
    ] = "full"
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw or lion.")] = "adamw"
    learning_rate: Annotated[float | None, typer.Option(help="Base learning rate; default: the optimizer's.")] = None
    loss: Annotated[
        str, typer.Option(help="A named loss, `model` if the model returns its loss, or file.py:function.")
    ] = "cross_entropy"
    batch_size: Annotated[int | None, typer.Option(min=1, help="Passed to the function as batch_size.")] = None
    batchnorm: Annotated[str, typer.Option(help="fold, freeze or train.")] = "fold"
    clip_norm: Annotated[float | None, typer.Option(help="Clip gradients by this global norm.")] = None
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-steps whose mean gradient makes one optimizer step.")
    ] = 1
    weight_decay: Annotated[float | None, typer.Option(help="Default: the optimizer's.")] = None
    momentum: Annotated[float | None, typer.Option(help="Of sgd.")] = None
    dtype: Annotated[str, typer.Option(help="How activations and their gradients are stored: f32, bf16 or fp16.")] = (
        "f32"
    )
    half_arithmetic: Annotated[
        bool, typer.Option("--half-arithmetic", help="With --dtype bf16 or fp16: multiply so too where the CPU can.")
    ] = False
    loss_scale: Annotated[
        str | None,
        typer.Option(help="Of the gradients: a power of two, by default 1024 with fp16, else 1; or dynamic."),
    ] = None
    loss_scale_interval: Annotated[
        int | None, typer.Option(help="Steps with finite gradients that double a dynamic loss scale; default: 2000.")
    ] = None
    state_dtype: Annotated[
        str, typer.Option(help="f32, or int8: a byte per element of momenta and second moments.")
    ] = "f32"
    schedule: Annotated[str, typer.Option(help="constant, linear, cosine or step.")] = "constant"
    warmup: Annotated[int, typer.Option(min=0, help="Steps over which the learning rate grows to its base.")] = 0
    total_steps: Annotated[int, typer.Option(min=0, help="Optimizer steps until linear and cosine schedules end.")] = 0
    step_size: Annotated[int, typer.Option(min=0, help="Optimizer steps between drops of the step schedule.")] = 0
    seed: Annotated[int, typer.Option(help="Of dropout; of `verify`, of its data.")] = 0
    label_smoothing: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of cross entropy.")] = 0.0
    frozen_dtype: Annotated[str, typer.Option(help="How large frozen weights are stored: f32, bf16, int8 or int4.")] = (
        "f32"
    )
    prefix_dtype: Annotated[
        str, typer.Option(help="How what lies in front of everything trained is computed: f32, or int8.")
    ] = "f32"
    calibrate: Annotated[
        str | None, typer.Option(help="Samples that int8 activations shall cover: an .npz file, or `example`.")
    ] = None
    saved_dtype: Annotated[str, typer.Option(help="How activations wait for the backward pass: f32, or int8.")] = "f32"
    entries: Annotated[str, typer.Option(help="What the program can do; train_step is needed.")] = (
        "train_step,eval_step,infer"
    )
    memory_budget: Annotated[
        str | None, typer.Option(help="Most that arena and weights may take, as 32MiB: the fastest program within it.")
    ] = None
    micro_batch: Annotated[
        int,
        typer.Option(min=0, help="Samples that run through the step at a time; 0: what is best for memory and time."),
    ] = 0
    cache_prefix: Annotated[
        bool, typer.Option("--cache-prefix", help="Also make the entries that `pock-run train --cache-prefix` needs.")
    ] = False
    target: Annotated[
        str, typer.Option(help="native, or onnxruntime: the same steps as ONNX models for plain ONNX Runtime.")
    ] = "native"

    def arguments(self, scheme: Scheme | None = None) -> dict[str, Any]:
        """Keyword arguments that `pockc.build` and `verify_against_torch` have in common.

        Args:
            scheme: Where it is known already: its file may have changed or gone.

        Raises:
            UserError: something is not there, or unknown.
        """
        schedule = Schedule(self.schedule, self.warmup, self.total_steps, self.step_size)  # type: ignore[arg-type] # checked by Schedule
        optimizer = make_optimizer(
            self.optimizer,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            schedule=schedule,
        )
        chosen_scheme = scheme or Scheme.load(self.scheme)
        chosen_loss = make_loss(self.loss)
        network, example_inputs = load_model(self.model, self.batch_size)
        return {
            "model": network,
            "example_inputs": example_inputs,
            "scheme": chosen_scheme,
            "batchnorm": self.batchnorm,
            "loss": chosen_loss,
            "optimizer": optimizer,
            "loss_options": {"label_smoothing": self.label_smoothing} if self.label_smoothing else {},
            "accumulation": self.accumulate,
            "seed": self.seed,
            "dtype": self.dtype,
            "half_arithmetic": self.half_arithmetic,
            "loss_scale": _scale(self.loss_scale),
            "loss_scale_interval": self.loss_scale_interval,
            "state_dtype": self.state_dtype,
            "frozen_dtype": self.frozen_dtype,
            "prefix_dtype": self.prefix_dtype,
            "calibration": self.calibration(),
            "saved_dtype": self.saved_dtype,
            "entries": tuple(name.strip() for name in self.entries.split(",")),
            "memory_budget": parse_size(self.memory_budget) if self.memory_budget else None,
            "micro_batch": self.micro_batch,
            "target": self.target,
            "cache_prefix": self.cache_prefix,
        }

    def calibration(self) -> Any:
        """What `pockc.build` takes as such. Raises UserError where the file cannot be read."""
        return load_samples(Path(self.calibrate)) if self.calibrate not in (None, EXAMPLE) else self.calibrate

    def changed(self) -> list[str]:
        """The options that are not at their defaults, as they are written."""
        given = [
            field.name for field in fields(self) if field.name != "model" and getattr(self, field.name) != field.default
        ]
        return [f"--{name.replace('_', '-')}" for name in given]

    def sources(self) -> dict[str, str]:
        """The files that the build reads beside the scheme, each with the SHA-256 of its contents."""
        named = [text.rpartition(":")[0] for text in (self.model, self.loss) if ":" in text]
        named += [self.calibrate] if self.calibrate not in (None, EXAMPLE) else []
        return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in named}


def _scale(text: str | None) -> LossScale | None:
    """What `pockc.build` takes as the scale of the loss. Raises UserError for what is no number."""
    if text == "dynamic":
        return "dynamic"
    try:
        return None if text is None else float(text)
    except ValueError:
        raise UserError(f"--loss-scale is {text!r}", supported="dynamic; powers of two, such as 1024") from None


def with_choices(model: str = FUNCTION) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameter is a `Choices` takes its fields instead; ``model`` describes the argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(Choices, include_extras=True) | {"model": Annotated[str, typer.Argument(help=model)]}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(Choices(**{name: given.pop(name) for name in hints}), **given)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.name == "model" else field.default,
                annotation=hints[field.name],
            )
            for field in fields(Choices)
        ]
        parameters = [*shared, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what typer reads
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def record(choices: Choices, scheme: Scheme) -> dict[str, Any]:
    """How a program was built, for its metadata: enough to build it again where the model's file is at hand."""
    content = scheme.model_dump(mode="json", exclude_defaults=True)
    return {"choices": asdict(choices), "scheme": content, "sources": choices.sources()}


def recorded(metadata: Mapping[str, Any], program: Path) -> tuple[Choices, Scheme]:
    """What `record` put into a program's metadata.

    Raises:
        UserError: the program has no such record, or the files that it names have moved or changed.
    """
    again = f"with its options, as in `pockc bench model.py:make --scheme {metadata.get('scheme', 'full')}`."
    found = metadata.get(BUILT_FROM)
    if not found:
        what = f"{program} does not say how to build it again: `pockc build` did not make it"
        raise UserError(what, instead=f"Give the model {again}")
    try:
        choices, scheme = Choices(**found["choices"]), Scheme.model_validate(found["scheme"])
        sources = dict(found["sources"])
    except (TypeError, KeyError, ValueError):
        what = f"{program} was built by another version of pockc"
        raise UserError(what, instead=f"Build it again, or give the model {again}") from None
    for name, digest in sources.items():
        if not Path(name).is_file():
            what = f"there is no file {name} here, which {program} was built from"
            raise UserError(what, instead=f"Go to the folder where it was built, or give the model {again}")
        if hashlib.sha256(Path(name).read_bytes()).hexdigest() != digest:
            raise UserError(f"{name} has changed since {program} was built from it", instead="Build it again.")
    return choices, scheme
