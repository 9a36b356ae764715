"""JAX as a side of the speed benchmark: one jitted function per step, which owns the parameters that it updates."""

import os
import sys
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from benchmarks.speed_sides import mobilenet, protocol


class JaxStep:
    """MobileNetV2 in JAX."""

    def __init__(self, task: protocol.Task) -> None:
        model = mobilenet.load(task)
        self.trained = task.trained
        self.parameters = {name: jnp.asarray(model.parameters[name]) for name in task.trained}
        frozen = {name: value for name, value in model.parameters.items() if name not in self.parameters}
        self.images, self.labels = jnp.asarray(model.images), jnp.asarray(model.labels)
        self.rate = jnp.float32(task.learning_rate)

        def loss_of(parameters: dict[str, Any], images: Any, labels: Any) -> Any:
            logits = model.logits({**frozen, **parameters}, images, _convolution, _clip, _mean)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -chosen.mean()

        def step(parameters: dict[str, Any], images: Any, labels: Any, rate: Any) -> Any:
            loss, gradients = jax.value_and_grad(loss_of)(parameters, images, labels)
            return loss, {name: value - rate * gradients[name] for name, value in parameters.items()}

        arguments = (self.parameters, self.images, self.labels, self.rate)
        self.step = jax.jit(step, donate_argnums=0).lower(*arguments).compile()

    def run(self) -> float:
        """One step."""
        loss, self.parameters = self.step(self.parameters, self.images, self.labels, self.rate)
        jax.block_until_ready(self.parameters)
        return float(loss)

    def stop_learning(self) -> None:
        """Sets the learning rate to zero."""
        self.rate = jnp.float32(0)


def _convolution(x: Any, weight: Any, bias: Any, stride: int, depthwise: bool) -> Any:
    half = weight.shape[0] // 2
    groups = x.shape[3] if depthwise else 1
    padding = ((half, half), (half, half))
    layout = ("NHWC", "HWIO", "NHWC")
    return (
        lax.conv_general_dilated(
            x, weight, (stride, stride), padding, dimension_numbers=layout, feature_group_count=groups
        )
        + bias
    )


def _clip(x: Any) -> Any:
    return jnp.clip(x, 0, 6)


def _mean(x: Any) -> Any:
    return x.mean(axis=(1, 2))


if __name__ == "__main__":
    # XLA has as many threads as the process has processors.
    threads = int(os.environ["OMP_NUM_THREADS"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    sys.exit(protocol.serve(JaxStep))
