"""What `pockc bench` does with a program, or with a model that it builds first."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from pockc import bench, tune_board
from pockc.ablation import ablate as run_ablation
from pockc.artifact import read
from pockc.build import build
from pockc.cli_options import Choices, recorded
from pockc.errors import UserError
from pockc.inspect import print_ablation, print_measurement, print_tuning
from pockc.targets import devices
from pockc.targets.devices import DEFAULT, Device
from pockc.tune import tune as run_tune


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be timed: a program, if ``program`` is set, else a model with options."""

    program: Path | None
    choices: Choices
    device: Device

    @property
    def name(self) -> str:
        """As the user gave it."""
        return self.choices.model

    def arguments(self) -> dict[str, Any]:
        """Those of `pockc.build`, which of a program are in its metadata. Raises UserError."""
        if self.program is None:
            return {**self.choices.arguments(), "device": self.device}
        metadata = read(self.program).metadata
        choices, scheme = recorded(metadata, self.program)
        return {**choices.arguments(scheme), "device": devices.recorded(metadata)}


def source_of(choices: Choices, device: str, tuning: Path | None = None) -> Source:
    """The source that the command line names. Raises UserError where a program is given options of a build."""
    if ":" in choices.model:
        return Source(None, choices, devices.tuned(devices.find(device), tuning))
    given = {"--device": device != DEFAULT, "--tuning": tuning is not None}
    if unused := [*choices.changed(), *(name for name, is_given in given.items() if is_given)]:
        raise UserError(
            f"{choices.model} is built already, so {unused[0]} has no effect",
            instead="Drop the option, or name the model as file.py:function.",
        )
    return Source(Path(choices.model), choices, devices.find(device))


def measure(source: Source, console: Console, entry: str, steps: int, threads: int) -> Mapping[str, Any]:
    """Time a program, built first where a model is named; print the figures and return them."""
    with tempfile.TemporaryDirectory(prefix="pockc-bench-") as folder:
        file = source.program
        if file is None:
            file = Path(folder, "model.pock")
            build(**source.arguments()).save(file)
        measurement = bench.measure(file, entry, steps, threads)
        target = read(file).metadata.get("target", "native")
    print_measurement(console, source.name, measurement)
    if target != "native":
        note = f"Note: what {target} allocates for activations and weights is not counted."
        console.print(Text(note, style="yellow"), soft_wrap=True)
    return {"program": source.name, **measurement.as_json()}


def ablate(source: Source, console: Console, entry: str, steps: int, threads: int) -> Mapping[str, Any]:
    """Build the program without each pass in turn; print what each buys and return the figures."""
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        ablation = run_ablation(source.arguments(), entry, steps, threads, progress)
    print_ablation(console, source.name, ablation)
    if source.program and read(source.program).metadata["text"][entry] != ablation.text:
        what = f"built again, {source.program} is another program (pockc changed, or modules that its model imports)"
        console.print(Text(f"Note: {what}: the table is about the new one.", style="yellow"), soft_wrap=True)
    return {"program": source.name, **ablation.as_json()}


def prepare(arguments: Mapping[str, Any], device: Device, console: Console, folder: Path) -> None:
    """Write what a board without Python measures, and say how it does that."""
    for made in tune_board.prepare(arguments, device, folder):
        console.print(f"Wrote {made}", soft_wrap=True, highlight=False)
    console.print(
        f"On the board, in each of them: ./pock-run bench model.pock --profile --json {tune_board.PROFILE}\n"
        f"Then here, with these files beside the programs: pockc tune --profiles {folder} and the same options.",
        soft_wrap=True,
        highlight=False,
    )


def tune(
    arguments: Mapping[str, Any],
    device: Device,
    console: Console,
    output: Path,
    seconds: float = 60.0,
    profiles: Path | None = None,
) -> None:
    """Measure the candidates of a model's calls, or take a board's profiles; write the table and print it."""
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        if profiles is not None:
            table = tune_board.collect(arguments, device, profiles)
        else:
            table = run_tune(arguments, device, seconds, progress)
    table.save(output)
    print_tuning(console, table)
    console.print(f"Wrote {output}", soft_wrap=True, highlight=False)
