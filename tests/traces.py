"""Tracing is two thirds of most builds, and tests build the same models again and again: a process traces each once."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import OrderedDict
from typing import Any

import torch

import pockc.frontend.torch as frontend

KEPT = 8  # traces: each holds the weights of its model

_trace = frontend.trace
_known: OrderedDict[str, frontend.Imported] = OrderedDict()


class _Fingerprint(pickle.Pickler):
    """Pickles tensors as their values, since their own pickle has names that change, and says which are the same."""

    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        self.tensors: dict[int, int] = {}  # id to position
        super().__init__(self.bytes)

    def persistent_id(self, found: object) -> object:
        if not isinstance(found, torch.Tensor):
            return None
        position = self.tensors.setdefault(id(found), len(self.tensors))
        values = hashlib.sha256(found.detach().contiguous().numpy().tobytes()).hexdigest()
        kind = type(found).__name__, str(found.dtype), found.requires_grad, tuple(found.shape), found.stride()
        return position, kind, values


def remembered(model: Any, example_inputs: Any, **options: Any) -> frontend.Imported:
    """`pockc.frontend.torch.trace`, or what it gave for a model, inputs and options with the same fingerprint.

    What does not pickle, such as a class inside a function or a loss that is one, is traced as ever.
    """
    fingerprint = _Fingerprint()
    try:
        fingerprint.dump((model, example_inputs, sorted(options.items())))
    except (pickle.PicklingError, AttributeError, TypeError):
        return _trace(model, example_inputs, **options)
    key = hashlib.sha256(fingerprint.bytes.getbuffer()).hexdigest()
    if key not in _known:
        _known[key] = _trace(model, example_inputs, **options)
        if len(_known) > KEPT:
            _known.popitem(last=False)
    _known.move_to_end(key)
    return _known[key]
