"""Where in the user's code a node comes from, and the one error that lists all that cannot be imported."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pockc.errors import UserError
from pockc.ir import Origin

MODEL = "model."  # the prefix that the frontend's wrapper puts before every name of the user's model
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGES = "site-packages" + os.sep


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that cannot be imported: where, in which operator if in one, and why."""

    place: str
    operator: str
    error: UserError

    @property
    def found(self) -> str:
        """What was found, with the operator in front."""
        return f"{self.operator}: {self.error.found}" if self.operator else self.error.found

    def raised(self) -> UserError:
        """The problem as an error of its own."""
        return UserError(self.found, where=self.place, supported=self.error.supported, instead=self.error.instead)


def combined(problems: Sequence[Problem]) -> UserError:
    """One error that lists every problem, each once."""
    lines = list(dict.fromkeys(str(problem.raised()) for problem in problems))
    if len(lines) == 1:
        return problems[0].raised()
    listing = "".join(f"\n  {line}" for line in lines)
    return UserError(f"{len(lines)} things in this model cannot be compiled:{listing}")


def user_frame(frames: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """File and line of the innermost frame that is neither PyTorch's nor ours; empty and 0 if there is none."""
    for file, line in reversed(frames):
        if not file.startswith((_OURS, "<")) and f"{_PACKAGES}torch{os.sep}" not in file:
            return _short(file), line
    return "", 0


def _short(file: str) -> str:
    """A file name that is the same on every machine, where that is possible."""
    if _PACKAGES in file:
        return file.rpartition(_PACKAGES)[2]
    relative = os.path.relpath(file)
    return file if relative.startswith(os.pardir) else relative


def export_error(error: Exception) -> UserError:
    """What torch.export, or the model under it, raised: its first line, the user's line, and a way out."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    file, line = user_frame(frames)
    dynamic = "data-dependent" in str(error) or "data dependent" in str(error)
    return UserError(
        f"torch.export cannot capture this model: {type(error).__name__}: {first}",
        where=f"{file}:{line}" if file else "",
        instead=(
            "Shapes and control flow must not depend on the values of tensors: use torch.where or masks."
            if dynamic
            else "Check that the model runs on the example inputs, and that torch.export.export accepts it."
        ),
    )


def origin_of(node: Any) -> Origin:
    """Module path, file and line of an fx node."""
    path = _module(node)[0]
    file, line = user_frame([(file, int(line)) for file, line in _FRAME.findall(node.meta.get("stack_trace") or "")])
    return Origin(path, file, line, "forward")


def place_of(node: Any) -> str:
    """The origin of an fx node with the class of its module: ``features.3.pool (AvgPool2d, model.py:12)``."""
    origin, kind = origin_of(node), _module(node)[1]
    source = f"{origin.file}:{origin.line}" if origin.file else ""
    return f"{origin.module or '<model>'} ({', '.join(filter(None, (kind, source)))})"


def _module(node: Any) -> tuple[str, str]:
    """Path and class name of the innermost module around an fx node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    # A module that is called a second time has "@1" after its path.
    path = re.sub(r"@\d+", "", str(stack[-1][0]))
    return "" if path == MODEL[:-1] else path.removeprefix(MODEL), str(stack[-1][1]).rpartition(".")[2]
