"""What the command line names: a function in a file, an optimizer, a loss."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pockc.errors import PockcError, UserError, near_names
from pockc.losses import LOSSES
from pockc.optim import OPTIMIZERS, Optimizer, Schedule


def load_model(text: str, batch_size: int | None) -> tuple[Any, Any]:
    """Model and example inputs from ``model.py:make``; ``batch_size`` is passed on where the function takes it.

    Raises:
        UserError: there is no such file or function, it fails, or it returns something else than two things.
    """
    make = load_function(text)
    takes_batch_size = "batch_size" in inspect.signature(make).parameters
    if batch_size is not None and not takes_batch_size:
        raise UserError(
            f"{text} takes no batch_size, so --batch-size cannot be passed on",
            instead="Give the function a parameter batch_size, or drop the option.",
        )
    arguments = {"batch_size": batch_size} if batch_size is not None else {}
    result = _guarded(f"calling {text}", lambda: make(**arguments))
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(f"{text} returned {type(result).__name__}", supported="a pair (model, example_inputs)")
    return result


def load_function(text: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` names. Raises UserError."""
    file, _, name = text.rpartition(":")
    if not file or not name:
        raise UserError(f"{text!r} does not name a function in a file", supported="file.py:function")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no file {file}", supported="file.py:function")
    module = _guarded(f"importing {file}", lambda: _import(path))
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{file} has no function {name!r}", instead=near_names(name, functions))
    found: Callable[..., Any] = function
    return found


def make_loss(text: str) -> str | Callable[..., Any] | None:
    """A named loss, None for ``model`` (the model returns its loss), or the function that ``file.py:name`` names."""
    if text == "model":
        return None
    if ":" in text:
        return load_function(text)
    if text not in LOSSES:
        names = [*LOSSES, "model", "file.py:function"]
        raise UserError(f"there is no loss {text!r}", supported=", ".join(names), instead=near_names(text, names))
    return text


def make_optimizer(
    name: str,
    *,
    learning_rate: float | None,
    momentum: float | None,
    weight_decay: float | None,
    clip_norm: float | None,
    schedule: Schedule,
) -> Optimizer:
    """The optimizer of that name; what is None keeps its default. Raises UserError."""
    if name not in OPTIMIZERS:
        raise UserError(
            f"there is no optimizer {name!r}", supported=", ".join(OPTIMIZERS), instead=near_names(name, OPTIMIZERS)
        )
    if momentum is not None and name != "sgd":
        raise UserError(f"{name} has no momentum", instead="Use --momentum with --optimizer sgd.")
    if name == "sgd" and learning_rate is None:
        raise UserError("sgd has no default learning rate", instead="Give one with --learning-rate.")
    given = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay, "clip_norm": clip_norm}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return OPTIMIZERS[name](schedule=schedule, **settings)


def _import(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _guarded(doing: str, action: Callable[[], Any]) -> Any:
    """Run the user's code; what it raises becomes one sentence with the line that raised it."""
    try:
        return action()
    except PockcError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}"
        raise UserError(f"{doing} failed: {type(error).__name__}: {error}", where=where) from error
