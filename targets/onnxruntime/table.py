"""How each op becomes ONNX nodes: one line per family. An op that is in none of them has no lowering."""

from __future__ import annotations

from pockc.targets.onnxruntime import (
    attention,
    conv,
    dropout,
    elementwise,
    linear,
    loss,
    masks,
    norm,
    optimizer,
    pool,
    reduce,
    shape,
)
from pockc.targets.onnxruntime.emitter import Lowering

LOWERINGS: dict[str, Lowering] = {
    **elementwise.OPS,
    **masks.OPS,
    **dropout.OPS,
    **reduce.OPS,
    **shape.OPS,
    **linear.OPS,
    **conv.OPS,
    **pool.OPS,
    **norm.OPS,
    **attention.OPS,
    **loss.OPS,
    **optimizer.OPS,
}
