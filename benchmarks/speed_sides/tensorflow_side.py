"""TensorFlow as a side of the speed benchmark: a `tf.function` (graph mode) with a gradient tape and the update."""

import os
import sys
from typing import Any

import tensorflow as tf

from benchmarks.speed_sides import mobilenet, protocol


class TensorFlowStep:
    """MobileNetV2 in TensorFlow."""

    def __init__(self, task: protocol.Task) -> None:
        model = mobilenet.load(task)
        self.trained = task.trained
        variables = {name: tf.Variable(model.parameters[name]) for name in task.trained}
        frozen = {name: tf.constant(model.parameters[name]) for name in model.parameters if name not in variables}
        self.rate = tf.Variable(task.learning_rate, trainable=False, dtype=tf.float32)
        images, labels = tf.constant(model.images), tf.constant(model.labels)

        def step(images: Any, labels: Any) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(list(variables.values()))
                parameters = {**frozen, **variables}
                logits = model.logits(parameters, images, _convolution, tf.nn.relu6, _mean)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            gradients = tape.gradient(loss, list(variables.values()))
            for variable, gradient in zip(variables.values(), gradients, strict=True):
                variable.assign_sub(self.rate * gradient)
            return loss

        self.batch = images, labels
        self.step: Any = tf.function(step).get_concrete_function(*self.batch)

    def run(self) -> float:
        """One step."""
        return float(self.step(*self.batch))

    def stop_learning(self) -> None:
        """Sets the learning rate to zero."""
        self.rate.assign(0.0)


def _convolution(x: Any, weight: Any, bias: Any, stride: int, depthwise: bool) -> Any:
    half = weight.shape[0] // 2
    padding = [[0, 0], [half, half], [half, half], [0, 0]]
    if depthwise:
        filters = tf.reshape(weight, (*weight.shape[:2], weight.shape[3], 1))  # the same order in memory
        x = tf.pad(x, padding) if half else x  # this operator has no explicit padding
        return tf.nn.depthwise_conv2d(x, filters, (1, stride, stride, 1), "VALID") + bias
    return tf.nn.bias_add(tf.nn.conv2d(x, weight, stride, padding), bias)


def _mean(x: Any) -> Any:
    return tf.reduce_mean(x, axis=(1, 2))


if __name__ == "__main__":
    threads = int(os.environ["OMP_NUM_THREADS"])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    sys.exit(protocol.serve(TensorFlowStep))
