"""How the speed benchmark talks to a side: one JSON object per line, a question on its input, an answer on its output.

A side is a process that lives as long as the benchmark. It prepares a training step (`open`), and then runs some
steps on command (`step`), so that sides can take turns and see the same state of a shared machine. Times are those of
the side itself: CPU time of its process, all threads together, and time by the clock on the wall.

This file needs nothing but Python: it runs in the environment of every peer.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Task:
    """A training step: a function of the zoo with its arguments, the loss, what is trained, plain SGD.

    ``folder`` is where sides leave files for each other: pockc, which is the first to open a task, writes the model's
    weights (`weights.npz`, by their PyTorch names) and the batch (`batch.npz`) there if ``exported``.
    ``trained`` is empty for pockc, which finds out from the scheme and tells.
    """

    model: str
    arguments: dict[str, Any]
    loss: str
    scheme: str
    learning_rate: float
    threads: int
    folder: str
    exported: bool = False
    trained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Steps:
    """Milliseconds and losses of consecutive steps; a loss is that before the step's update."""

    cpu_ms: tuple[float, ...]
    wall_ms: tuple[float, ...]
    losses: tuple[float, ...]


class Step(Protocol):
    """A prepared training step."""

    trained: tuple[str, ...]

    def run(self) -> float:
        """One step on the task's batch; its loss before the update."""

    def stop_learning(self) -> None:
        """Sets the learning rate to zero: a step does the same work, and every later one the same again."""


class Opener(Protocol):
    """Makes the step of a task."""

    def __call__(self, task: Task) -> Step:
        """Prepares everything that can be prepared before the first step."""


class SideError(RuntimeError):
    """A side cannot do what it was asked; the message is its own."""


def serve(opener: Opener) -> int:
    """Answers questions until the input ends. What a library prints goes to the standard error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step: Step | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["do"] == "open":
                step = None
                gc.collect()  # of the one before
                step = opener(Task(**{**question["task"], "trained": tuple(question["task"]["trained"])}))
                answer: dict[str, Any] = {"trained": step.trained}
            elif step is None:
                raise SideError("no task is open")
            elif question["do"] == "stop_learning":
                step.stop_learning()
                answer = {}
            else:
                answer = asdict(_timed(step, question["count"]))
        except Exception as error:
            lines = [part for part in str(error).splitlines() if part.strip()]
            kind = "" if isinstance(error, SideError) else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{lines[0] if lines else ''}"[:500]}
            print(f"{question['do']}: {error!r}", file=sys.stderr, flush=True)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def _timed(step: Step, count: int) -> Steps:
    cpu, wall, losses = [], [], []
    for _ in range(count):
        started = time.process_time(), time.perf_counter()
        losses.append(step.run())
        cpu.append((time.process_time() - started[0]) * 1e3)
        wall.append((time.perf_counter() - started[1]) * 1e3)
    return Steps(tuple(cpu), tuple(wall), tuple(losses))


class Side:
    """The process of a side, seen from the benchmark.

    Args:
        python: The interpreter of its environment.
        module: What it runs; ``arguments`` are its command line.
        threads: For libraries that read it from their environment.
        log: Where its error stream goes.
        environment: More variables.
    """

    def __init__(
        self,
        python: Path,
        module: str,
        arguments: Sequence[str],
        threads: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        with log.open("a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=variables,
                start_new_session=True,  # so that its compilers end with it
            )

    def open(self, task: Task, seconds: float | None = None) -> tuple[str, ...]:
        """Prepares a task within some seconds; returns the names of the trained parameters.

        Raises:
            SideError: The side cannot do it, or not in time; the process has ended then.
        """
        return tuple(self._ask({"do": "open", "task": asdict(task)}, seconds)["trained"])

    def step(self, count: int, seconds: float | None = None) -> Steps:
        """Runs some steps. Raises SideError."""
        answer = self._ask({"do": "step", "count": count}, seconds)
        return Steps(tuple(answer["cpu_ms"]), tuple(answer["wall_ms"]), tuple(answer["losses"]))

    def stop_learning(self) -> None:
        """Sets the learning rate to zero. Raises SideError."""
        self._ask({"do": "stop_learning"})

    def close(self) -> None:
        """Ends the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _ask(self, question: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, give_up) if seconds is not None else None
        try:
            if timer is not None:
                timer.start()
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            if timer is not None:
                timer.cancel()
        if not line:
            code = self.process.wait()
            ended = f"not done within {seconds:.0f} s" if late.is_set() else f"ended with exit code {code}"
            raise SideError(f"{ended}: see {self.log}" if not late.is_set() else ended)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer
