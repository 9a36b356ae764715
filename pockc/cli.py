"""The command line: ``pockc build | inspect | verify | export | devices``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pockc
from pockc.errors import InternalError, UserError

app = typer.Typer(
    help="Compile PyTorch models into sparse fine-tuning programs that run on small devices without Python.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A function that returns (model, example_inputs), as model.py:make.")]
SchemeText = Annotated[
    str, typer.Option(help="full, bias-only, head, last-k:N, sparse, joined with +, or a YAML file.")
]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="sgd, adam, adamw or lion.")]
LearningRate = Annotated[float | None, typer.Option(help="Base learning rate; default: the optimizer's.")]
LossName = Annotated[
    str, typer.Option("--loss", help="A named loss, `model` if the model returns its loss, or file.py:function.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Passed to the function as batch_size.")]
BatchNormPolicy = Annotated[str, typer.Option("--batchnorm", help="fold, freeze or train.")]
ClipNorm = Annotated[float | None, typer.Option(help="Clip gradients by this global norm.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Micro-steps whose mean gradient makes one optimizer step.")]
WeightDecay = Annotated[float | None, typer.Option(help="Default: the optimizer's.")]
StateDtype = Annotated[str, typer.Option(help="f32, or int8: a byte per element of momenta and second moments.")]
Momentum = Annotated[float | None, typer.Option(help="Of sgd.")]
ScheduleKind = Annotated[str, typer.Option("--schedule", help="constant, linear, cosine or step.")]
Warmup = Annotated[int, typer.Option(min=0, help="Steps over which the learning rate grows to its base.")]
TotalSteps = Annotated[int, typer.Option(min=0, help="Optimizer steps until linear and cosine schedules end.")]
StepSize = Annotated[int, typer.Option(min=0, help="Optimizer steps between drops of the step schedule.")]
Seed = Annotated[int, typer.Option(help="Of dropout; of `verify`, of its data.")]
LabelSmoothing = Annotated[float, typer.Option(min=0.0, max=1.0, help="Of cross entropy.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Print the version, or go on to the command."""
    if version:
        typer.echo(f"pockc {pockc.__version__}")
        raise typer.Exit


@app.command()
def build(
    model: Model,
    scheme: SchemeText = "full",
    optimizer: OptimizerName = "adamw",
    learning_rate: LearningRate = None,
    loss: LossName = "cross_entropy",
    batch_size: BatchSize = None,
    batchnorm: BatchNormPolicy = "fold",
    device: Annotated[str, typer.Option(help="A name of `pockc devices`.")] = "x86-64",
    clip_norm: ClipNorm = None,
    accumulate: Accumulate = 1,
    weight_decay: WeightDecay = None,
    momentum: Momentum = None,
    state_dtype: StateDtype = "f32",
    schedule: ScheduleKind = "constant",
    warmup: Warmup = 0,
    total_steps: TotalSteps = 0,
    step_size: StepSize = 0,
    seed: Seed = 0,
    label_smoothing: LabelSmoothing = 0.0,
    selftest: Annotated[bool, typer.Option(help="Store inputs and outputs for `pock-run selftest`.")] = True,
    compare_full: Annotated[bool, typer.Option(help="Also plan full backpropagation, to compare memory.")] = True,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model.pock and pock-run.")] = Path("out"),
) -> None:
    """Compile a model into a training program."""
    from pockc.build import build as build_program  # the compiler loads what the other commands do without
    from pockc.frontend.torch_parity import named_arrays
    from pockc.targets import devices
    from pockc.targets.native import copy_runner

    board = devices.find(device)
    options = _options(
        model, scheme, batchnorm, loss, optimizer, learning_rate, batch_size, clip_norm, weight_decay, momentum,
        (schedule, warmup, total_steps, step_size), label_smoothing,
    )  # fmt: skip
    program = build_program(
        **options,
        device=device,
        accumulation=accumulate,
        state_dtype=state_dtype,  # type: ignore[arg-type] # checked by build
        seed=seed,
        compare_full=compare_full,
    )
    file = output / "model.pock"
    program.save(file, golden=named_arrays(options["model"], options["example_inputs"]) if selftest else None)
    console = Console()
    from pockc.inspect import print_summary

    print_summary(console, {**program.metadata, "memory": program.memory.as_json()})
    console.print(f"Wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True, highlight=False)
    try:
        runner = copy_runner(board, output)
    except UserError as error:
        console.print(Text(f"Note: {error}", style="yellow"), soft_wrap=True)
    else:
        console.print(f"Wrote {runner}", soft_wrap=True, highlight=False)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .pock file.")],
    html: Annotated[Path | None, typer.Option(help="Write memory over time as an interactive page.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write it as a Chrome trace, which Perfetto opens.")] = None,
    entry: Annotated[str, typer.Option(help="Which entry to show.")] = "train_step",
    text: Annotated[bool, typer.Option("--text", help="Print the entry's IR, and nothing else.")] = False,
) -> None:
    """Show a program: memory, the tensors at its peak, the schedule."""
    from pockc import inspect as views
    from pockc.artifact import read
    from pockc.memory_page import write_trace

    artifact = read(file)
    if text:
        typer.echo(views.text(artifact, entry))
        return
    views.print_tables(Console(), artifact, entry)
    if html is not None:
        views.write_html(artifact, html)
        Console().print(f"Wrote {html}", soft_wrap=True, highlight=False)
    if trace is not None:
        write_trace(artifact, trace)
        Console().print(f"Wrote {trace}", soft_wrap=True, highlight=False)


@app.command()
def verify(
    model: Model,
    scheme: SchemeText = "full",
    optimizer: OptimizerName = "adamw",
    learning_rate: LearningRate = None,
    loss: LossName = "cross_entropy",
    batch_size: BatchSize = None,
    batchnorm: BatchNormPolicy = "fold",
    clip_norm: ClipNorm = None,
    accumulate: Accumulate = 1,
    weight_decay: WeightDecay = None,
    momentum: Momentum = None,
    schedule: ScheduleKind = "constant",
    warmup: Warmup = 0,
    total_steps: TotalSteps = 0,
    step_size: StepSize = 0,
    seed: Seed = 0,
    label_smoothing: LabelSmoothing = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 10,
    reference_kernels: Annotated[bool, typer.Option(help="Use the plain kernels only.")] = False,
) -> None:
    """Train a few steps here and in PyTorch, and compare. Exit code 1 where they differ too much."""
    from pockc.parity import verify_against_torch

    options = _options(
        model, scheme, batchnorm, loss, optimizer, learning_rate, batch_size, clip_norm, weight_decay, momentum,
        (schedule, warmup, total_steps, step_size), label_smoothing,
    )  # fmt: skip
    parity = verify_against_torch(
        **options,
        accumulation=accumulate,
        steps=steps,
        seed=seed,
        reference_kernels=reference_kernels,
    )
    from pockc.inspect import print_parity

    print_parity(Console(), parity)
    if not parity.passed:
        raise typer.Exit(1)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A .pock file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint of this program; default: initial values.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Original weights (safetensors), for what is not in the file.")
    ] = None,
) -> None:
    """Write tuned parameters under their original names, for the original model to load."""
    from pockc.checkpoint import export as export_parameters

    missing = export_parameters(file, output, checkpoint=checkpoint, base=base)
    console = Console()
    console.print(f"Wrote {output}", soft_wrap=True, highlight=False)
    if missing:
        what = f"{len(missing)} of the model's tensors are not in the program"
        lacking = f"{base} lacks {missing[0]}" if base else f"{missing[0]} for instance; --base adds them"
        note = f"Note: {what}: {lacking}, or load with strict=False."
        console.print(Text(note, style="yellow"), soft_wrap=True)


@app.command()
def devices() -> None:
    """List the known devices."""
    from pockc.targets.devices import DEVICES

    table = Table("name", "toolchain", "CPU features", "threads", "memory", "target", "dtype")
    for device in DEVICES.values():
        memory = f"{device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else "varies"
        features = " ".join(device.features)
        row = (device.name, device.triple, features, str(device.threads), memory, device.target, device.dtype)
        table.add_row(*row)
    Console().print(table)


def _options(
    model: str,
    scheme: str,
    batchnorm: str,
    loss: str,
    optimizer: str,
    learning_rate: float | None,
    batch_size: int | None,
    clip_norm: float | None,
    weight_decay: float | None,
    momentum: float | None,
    schedule: tuple[str, int, int, int],
    label_smoothing: float,
) -> dict[str, Any]:
    """Keyword arguments that `build` and `verify_against_torch` have in common."""
    from pockc.cli_model import load_model, make_loss, make_optimizer
    from pockc.optim import Schedule
    from pockc.scheme import Scheme

    kind, warmup, total_steps, step_size = schedule
    settings = make_optimizer(
        optimizer,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        schedule=Schedule(kind, warmup, total_steps, step_size),  # type: ignore[arg-type] # checked by Schedule
    )
    chosen_scheme = Scheme.load(scheme)
    chosen_loss = make_loss(loss)
    network, example_inputs = load_model(model, batch_size)
    return {
        "model": network,
        "example_inputs": example_inputs,
        "scheme": chosen_scheme,
        "batchnorm": batchnorm,
        "loss": chosen_loss,
        "optimizer": settings,
        "loss_options": {"label_smoothing": label_smoothing} if label_smoothing else {},
    }


def main() -> None:
    """The entry point: errors end with one sentence and exit code 2, bugs of ours with a request and code 3."""
    console = Console(stderr=True)
    try:
        app()
    except UserError as error:
        console.print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(2)
    except InternalError as error:
        console.print(Text(f"Internal error: {error}", style="red"), soft_wrap=True)
        console.print("This is a bug in pockc: please report it with the command that you ran.", soft_wrap=True)
        sys.exit(3)
