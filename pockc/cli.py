"""The command line: ``pockc build | inspect | verify | bench | tune | export | deploy | devices``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import pockc
from pockc.artifact_writer import write_atomically
from pockc.cli_options import BUILT_FROM, FUNCTION, Choices, record, with_choices
from pockc.errors import InternalError, UserError
from pockc.targets import devices

app = typer.Typer(
    help="Compile PyTorch models into sparse fine-tuning programs that run on small devices without Python.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="A name of `pockc devices`, or a YAML file that describes a board.")]
Tuning = Annotated[
    Path | None, typer.Option(help="Times of the device that `pockc tune` wrote; default: the device's.")
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Print the version, or go on to the command."""
    if version:
        typer.echo(f"pockc {pockc.__version__}")
        raise typer.Exit


@app.command()
@with_choices()
def build(
    choices: Choices,
    device: Device = devices.DEFAULT,
    tuning: Tuning = None,
    selftest: Annotated[bool, typer.Option(help="Store inputs and outputs for `pock-run selftest`.")] = True,
    compare_full: Annotated[bool, typer.Option(help="Also plan full backpropagation, to compare memory.")] = True,
    toolchain: Annotated[
        str | None,
        typer.Option(help="To cross-compile pock-run: zig, or a CMake toolchain file; default: zig where needed."),
    ] = None,
    library: Annotated[bool, typer.Option("--library", help="Add libpockrt and its headers for the board.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the program's files.")] = Path("out"),
) -> None:
    """Compile a model into a training program."""
    from pockc.build import build as build_program  # the compiler loads what the other commands do without
    from pockc.frontend.torch_parity import named_arrays
    from pockc.targets.native.toolchain import for_device

    board = devices.tuned(devices.find(device), tuning)
    if toolchain is not None:
        for_device(board, toolchain)  # a wrong name is better known before the build
    arguments = choices.arguments()
    program = build_program(**arguments, device=board, compare_full=compare_full)
    metadata = {**program.metadata, BUILT_FROM: record(choices, arguments["scheme"])}
    program = replace(program, metadata=metadata)
    console = Console()
    from pockc.inspect import print_summary

    file = output / "model.pock"
    examples = named_arrays(arguments["model"], arguments["example_inputs"]) if selftest else None
    program.save(file, golden=examples)
    if program.target == "native":
        print_summary(console, {**metadata, "memory": program.memory.as_json()})
        _say_written(console, file)
    else:
        print_summary(console, metadata)
        for written in (file, *(output / f"{entry}.onnx" for entry in program.entries)):
            _say_written(console, written)
    _deliver(console, program, board, output, toolchain, library)


def _say_written(console: Console, file: Path) -> None:
    console.print(f"Wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True, highlight=False)


def _deliver(
    console: Console, program: pockc.Program, board: devices.Device, output: Path, toolchain: str | None, library: bool
) -> None:
    """Put `pock-run` and what else the board needs beside the program, or say why it is not there."""
    from pockc.targets import native
    from pockc.targets.onnxruntime import delivery

    try:
        if program.target == "onnxruntime":
            delivered = delivery.deliver(program, board, output, toolchain)
        else:
            delivered = native.deliver(program, board, output, toolchain, library=library)
    except UserError as error:
        if toolchain is not None or library:
            raise
        console.print(Text(f"Note: {error}", style="yellow"), soft_wrap=True)
        return
    for made in delivered:
        console.print(f"Wrote {made} ({made.stat().st_size / 2**10:.0f} KiB)", soft_wrap=True, highlight=False)


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
    if (html or trace) and (target := artifact.metadata.get("target", "native")) != "native":
        raise UserError(f"the target {target} plans its own memory", instead="Look at the .onnx files in Netron.")
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
@with_choices()
def verify(
    choices: Choices,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 10,
    reference_kernels: Annotated[bool, typer.Option(help="Use the plain kernels only.")] = False,
) -> None:
    """Train a few steps here and in PyTorch, and compare. Exit code 1 where they differ too much."""
    from pockc.parity import verify_against_torch

    parity = verify_against_torch(**choices.arguments(), steps=steps, reference_kernels=reference_kernels)
    from pockc.inspect import print_parity

    print_parity(Console(), parity)
    if not parity.passed:
        raise typer.Exit(1)


@app.command()
@with_choices(f"A .pock file, then without the options of a build. Or: {FUNCTION[0].lower()}{FUNCTION[1:]}")
def bench(
    choices: Choices,
    device: Device = devices.DEFAULT,
    tuning: Tuning = None,
    entry: Annotated[str, typer.Option(help="Which entry to run.")] = "train_step",
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after a few to warm up.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Of the runtime.")] = 1,
    ablate: Annotated[bool, typer.Option("--ablate", help="Show what each pass buys: builds without each.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time steps on made-up inputs, and show the memory that they take."""
    from pockc import cli_bench

    source = cli_bench.source_of(choices, device, tuning)
    console = Console()
    figures = (cli_bench.ablate if ablate else cli_bench.measure)(source, console, entry, steps, threads)
    if json_file is not None:
        write_atomically(json_file, [json.dumps(figures, indent=2).encode() + b"\n"])
        console.print(f"Wrote {json_file}", soft_wrap=True, highlight=False)


@app.command()
@with_choices()
def tune(
    choices: Choices,
    device: Device = devices.DEFAULT,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long to measure.")] = 60.0,
    prepare: Annotated[Path | None, typer.Option(help="Instead write programs here for a board to profile.")] = None,
    profiles: Annotated[Path | None, typer.Option(help="Instead read what it made of them, in this folder.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write.")] = Path("tuning.json"),
) -> None:
    """Time the kernels that a model can choose among on this machine, for builds with --tuning."""
    from pockc import cli_bench

    if prepare is not None:
        cli_bench.prepare(choices.arguments(), devices.find(device), Console(), prepare)
        return
    cli_bench.tune(choices.arguments(), devices.find(device), Console(), output, seconds, profiles)


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
    from pockc.checkpoint import decoded_names
    from pockc.checkpoint import export as export_parameters

    missing = export_parameters(file, output, checkpoint=checkpoint, base=base)
    console = Console()
    console.print(f"Wrote {output}", soft_wrap=True, highlight=False)
    if inexact := decoded_names(file, base):
        what = f"{len(inexact)} frozen tensors are approximations, decoded from what the program stores of them"
        lacking = f"{base} lacks {inexact[0]}" if base else f"{inexact[0]} for instance; --base gives the original ones"
        console.print(Text(f"Note: {what}: {lacking}.", style="yellow"), soft_wrap=True)
    if missing:
        what = f"{len(missing)} of the model's tensors are not in the program"
        lacking = f"{base} lacks {missing[0]}" if base else f"{missing[0]} for instance; --base adds them"
        note = f"Note: {what}: {lacking}, or load with strict=False."
        console.print(Text(note, style="yellow"), soft_wrap=True)


@app.command()
def deploy(
    folder: Annotated[Path, typer.Argument(help="What `pockc build` wrote.")],
    destination: Annotated[str, typer.Argument(help="Where to, as user@board:folder.")],
    selftest: Annotated[bool, typer.Option("--selftest", help="Then let the board check its results.")] = False,
    bench: Annotated[bool, typer.Option("--bench", help="Then time a training step on the board.")] = False,
    ssh: Annotated[str, typer.Option(help="The ssh command, as 'ssh -p 2222'.")] = "ssh",
    launcher: Annotated[
        str, typer.Option(help="What runs pock-run on the board, as 'taskset -c 3' or an emulator.")
    ] = "",
) -> None:
    """Copy a built folder to a board over ssh, and print what the board measures."""
    from pockc import deploy as deployment

    board = deployment.Board.parse(destination, ssh, launcher)
    described = deployment.deploy(folder, board)
    Console().print(f"Copied {folder} to {destination}: {described}", soft_wrap=True, highlight=False)
    for verb in [*(["selftest"] if selftest else []), *(["bench"] if bench else [])]:
        typer.echo(board.pock_run(verb))


@app.command("devices")
def list_devices(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with what each board is assumed to do.")] = False,
) -> None:
    """List the known devices. Boards of your own are YAML files: see the README."""
    if as_json:
        typer.echo(json.dumps([device.as_json() for device in devices.DEVICES.values()], indent=2))
        return
    table = Table(Column("name", no_wrap=True), "machine", "core", "CPU features", "threads", "memory", "dtype")
    for device in devices.DEVICES.values():
        memory = f"{device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else "varies"
        features = " ".join(device.features)
        threads = str(device.threads) if device.threads == device.cores else f"{device.threads} of {device.cores}"
        table.add_row(device.name, device.architecture, device.cpu or "any", features, threads, memory, device.dtype)
    Console().print(table)


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
