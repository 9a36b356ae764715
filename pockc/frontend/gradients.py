"""Gradients that the model stops itself: a graph of values cannot show that, so they are found before it is made."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pockc.errors import UserError
from pockc.frontend.source import Problem, place_of


def stopped_gradients(graph: Any, parameters: Collection[str]) -> Iterator[Problem]:
    """Uses of ``detach`` and ``torch.no_grad`` that would keep a gradient from a parameter.

    Args:
        graph: The fx graph as torch.export returns it, before decompositions, which make such cuts invisible.
        parameters: Names of its placeholders that are parameters.

    Yields:
        One problem for each cut through floating-point values that depend on parameters and that are read later.
    """
    trainable: set[Any] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            trainable.update([node] if node.name in parameters else [])
            continue
        if trainable.isdisjoint(node.all_input_nodes):
            continue
        what = _cut(node)
        if what and _is_read(node):
            yield Problem(place_of(node), "", _error(what))
        if not what and _has_floats(node):
            trainable.add(node)


def _cut(node: Any) -> str:
    if str(node.target).startswith(("aten.detach.", "aten.detach_.")):
        return "detach() of a value that depends on parameters"
    if "set_grad_enabled" in str(node.target) and node.args[0] is False:
        return "torch.no_grad() around a computation that depends on parameters"
    return ""


def _has_floats(node: Any) -> bool:
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return any(getattr(getattr(tensor, "dtype", None), "is_floating_point", True) for tensor in tensors)


def _is_read(node: Any) -> bool:
    """Whether floats of the node go anywhere else than to the outputs of the model."""
    readers = [reader for reader in node.users if reader.op != "output"]
    if "getitem" in {getattr(reader.target, "__name__", "") for reader in readers}:
        return any(_is_read(reader) for reader in readers)
    return bool(readers) and _has_floats(node)


def _error(what: str) -> UserError:
    return UserError(
        what,
        supported="gradients through the whole model",
        instead="Remove it, and freeze by the scheme what must not be trained.",
    )
