"""Models for ONNX Runtime against PyTorch, at real size: `python -m benchmarks.verify_onnx`.

Ten SGD steps of three models are trained by ONNX Runtime and by PyTorch on the same batches. Then steps of both are
timed in turns, on one thread: CPU time of the process, medians; PyTorch eager with the same tensors trained, in the
faster of its memory layouts. Weights are random.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import pockc
from benchmarks import report, verify_zoo, zoo
from pockc.frontend.torch_parity import Reference, model_names, named_arrays
from pockc.parity import LOSS_TOLERANCE, batches, verify_against_torch
from pockc.scheme import resolve
from pockc.session import open_session

TARGET, STEPS = "onnxruntime", 10
OPTIMIZER = pockc.SGD(lr=1e-3)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MobileNetV2 224 px": ("mobilenet_v2", {"batch_size": 8, "image_size": 224}),
    "MobileNetV2 96 px": ("mobilenet_v2", {"batch_size": 8, "image_size": 96}),
    "MiniLM-L6 128 tokens": ("minilm_l6", {"batch_size": 8, "sequence_length": 128}),
    "Llama 128 tokens": ("llama_tiny", {"batch_size": 8, "sequence_length": 128}),
}
TIMED = "MobileNetV2"  # whose sparse step must take at most PyTorch's time


@dataclass(frozen=True, slots=True)
class Result:
    """Agreement with PyTorch, and median CPU milliseconds of a step by who runs it."""

    model: str
    scheme: str
    loss_error: float
    tensor_error: float
    cpu_ms: dict[str, float]

    @property
    def ratio(self) -> float:
        """ONNX Runtime's time over PyTorch's better one."""
        return self.cpu_ms[TARGET] / min(ms for name, ms in self.cpu_ms.items() if name != TARGET)

    def bars(self) -> list[report.Bar]:
        """The losses; of sparse MobileNetV2 also the time."""
        name = f"{self.model} {self.scheme}"
        bars = [report.Bar(f"{name}: worst loss error", self.loss_error, at_most=LOSS_TOLERANCE)]
        if self.scheme == "sparse" and self.model.startswith(TIMED):
            bars.append(report.Bar(f"{name}: CPU time / PyTorch's", self.ratio, at_most=1.0))
        return bars


def compare(title: str, scheme: str, rounds: int) -> Result:
    """One model and scheme."""
    name, arguments = MODELS[title]
    model, inputs = zoo.ZOO[name](**arguments)
    loss = verify_zoo.loss_of(name)
    parity = verify_against_torch(
        model, inputs, loss, OPTIMIZER, scheme, steps=STEPS, seed=verify_zoo.SEED, target=TARGET
    )
    times = time_steps(model, inputs, loss, scheme, rounds)
    return Result(title, scheme, parity.worst_loss_error, parity.worst_tensor_error, times)


def time_steps(model: Any, inputs: Any, loss: str, scheme: str, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of a step of each, in turns after a warm-up."""
    program = pockc.build(model, inputs, loss, OPTIMIZER, scheme, target=TARGET, entries=("train_step",))
    names, updated = model_names(model), set(program.metadata["trained"])
    frozen = frozenset(names.parameters) - updated
    trained = resolve(scheme, names.parameters, modules=names.modules, aliases=names.aliases, frozen=frozen)
    (batch,) = batches(named_arrays(model, inputs), program.entries["train_step"], loss, 1, verify_zoo.SEED)
    runs: dict[str, Callable[[], float]] = {}
    layouts = {"PyTorch": torch.contiguous_format, "PyTorch, channels last": torch.channels_last}
    for layout, memory_format in layouts.items():
        reference = Reference(model.to(memory_format=memory_format), trained, loss, OPTIMIZER)
        runs[layout] = lambda reference=reference: reference.train_step(batch)  # type: ignore[misc] # bound at once
    with tempfile.TemporaryDirectory(prefix="pockc-onnx-") as folder:
        program.save(file := Path(folder, "model.pock"))
        with open_session(file) as session:
            runs[TARGET] = lambda: session.train_step(**batch)
            return _medians(runs, rounds)


def _medians(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, step in runs.items():
            started = time.process_time()
            step()
            if turn > 0:
                times[name].append((time.process_time() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify_onnx", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--schemes", nargs="+", default=["sparse", "bias-only"], metavar="SCHEME")
    parser.add_argument("--rounds", type=int, default=9, help="steps that are timed")
    parser.add_argument("--output", type=Path, default=report.OUT / "verify_onnx.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for title in options.models:
        for scheme in (scheme for scheme in options.schemes if verify_zoo.applies(MODELS[title][0], scheme)):
            results.append(result := compare(title, scheme, options.rounds))
            print(f"{title} {scheme}: {result}", file=sys.stderr, flush=True)
    report.print_table(
        f"ONNX Runtime and PyTorch: {STEPS} SGD steps, then CPU ms of a step on one thread",
        ["model", "scheme", "loss error", "tensor error", "ONNX Runtime", "PyTorch", "channels last", "ratio"],
        [
            [
                result.model,
                result.scheme,
                f"{result.loss_error:.1e}",
                f"{result.tensor_error:.1e}",
                *(f"{result.cpu_ms[name]:.1f}" for name in (TARGET, "PyTorch", "PyTorch, channels last")),
                f"{result.ratio:.2f}",
            ]
            for result in results
        ],
    )
    report.write_json(options.output, {"steps": STEPS, "results": [asdict(result) for result in results]})
    bars = [bar for result in results for bar in result.bars()]
    return report.finish("verify-onnx", f"{len(results)} cases", bars)


if __name__ == "__main__":
    sys.exit(main())
