"""The fine-tuning tasks of the demo and of the learning-rate sweep: a pretrained model, data, and how to train."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import pockc
from benchmarks import datasets, zoo

SCHEMES = ("head", "bias-only", "sparse", "full")
SEED = 0
WARMUP_FRACTION = 0.05  # of all steps; then the learning rate decays to zero along a cosine
_VALIDATION_SIZE = 2000  # images; a standard error of 0.7 points at 90% accuracy

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Task:
    """One model on one data set.

    Attributes:
        key: Short name, as in the results of the sweep.
        title: What is trained on what, for people.
        model: Pretrained, with a new head, in eval mode.
        example: Example inputs of one batch, without labels.
        train: Training arrays by input name, with int64 `labels`; a multiple of the batch size.
        validation: The same, of examples of the training set that `train` leaves out: for choosing learning rates.
        test: The same for the test set.
        epochs: Passes over the training set.
    """

    key: str
    title: str
    model: nn.Module
    example: dict[str, Tensor]
    train: Arrays
    validation: Arrays
    test: Arrays
    epochs: int

    @property
    def batch_size(self) -> int:
        """Examples per step."""
        return len(next(iter(self.example.values())))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.epochs * (len(self.train["labels"]) // self.batch_size)


def vision(
    image_size: int = 64, train_size: int = 4000, test_size: int = 10000, batch_size: int = 16, epochs: int = 4
) -> Task:
    """EfficientNet-Lite0 with its ImageNet weights on Fashion-MNIST.

    Raises:
        DataUnavailableError: The weights or images cannot be downloaded.
    """
    x_train, y_train, x_test, y_test = datasets.fashion_mnist()
    model, example = zoo.efficientnet_lite0(batch_size, image_size, num_classes=10, pretrained=True)
    order = np.random.default_rng(SEED).permutation(len(x_train))
    chosen, left_out = order[:train_size], order[train_size : train_size + _VALIDATION_SIZE]
    return Task(
        "vision",
        f"EfficientNet-Lite0 on Fashion-MNIST, {image_size} px",
        model,
        example,
        {"pixel_values": pixels(x_train[chosen], image_size), "labels": y_train[chosen]},
        {"pixel_values": pixels(x_train[left_out], image_size), "labels": y_train[left_out]},
        {"pixel_values": pixels(x_test[:test_size], image_size), "labels": y_test[:test_size]},
        epochs,
    )


def pixels(images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Grey images [N, H, W] of 0..255 as the network expects them: float32 [N, 3, size, size], (x - 127) / 128."""
    grey = torch.from_numpy(images.astype(np.float32)).unsqueeze(1)
    resized = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    return np.ascontiguousarray(((resized - 127) / 128).expand(-1, 3, -1, -1).numpy())


def text(
    train_size: int = 1600, test_size: int = 1600, length: int = 24, batch_size: int = 16, epochs: int = 3
) -> Task:
    """MiniLM-L6 on the six question types of TREC.

    Raises:
        DataUnavailableError: The weights or questions cannot be downloaded.
    """
    split = datasets.trec(seed=SEED, test_size=test_size)
    model, example = zoo.minilm_l6(batch_size, length, pretrained=True)
    left_out = len(split.train_texts) - (len(split.train_texts) - train_size) % batch_size

    def arrays(texts: list[str], labels: NDArray[np.int64]) -> Arrays:
        return {**datasets.tokenize_for_minilm(texts, length), "labels": labels}

    return Task(
        "text",
        f"MiniLM-L6 on TREC, {length} tokens",
        model,
        example,
        arrays(split.train_texts[:train_size], split.train_labels[:train_size]),
        arrays(split.train_texts[train_size:left_out], split.train_labels[train_size:left_out]),
        arrays(split.test_texts, split.test_labels),
        epochs,
    )


def optimizer(learning_rate: float, steps: int) -> pockc.AdamW:
    """AdamW with a short warm-up and a cosine decay over `steps`."""
    schedule = pockc.Schedule("cosine", warmup_steps=max(1, int(WARMUP_FRACTION * steps)), total_steps=steps)
    return pockc.AdamW(lr=learning_rate, schedule=schedule)


def compile_scheme(task: Task, scheme: str, learning_rate: float, steps: int, path: Path) -> pockc.Program:
    """Builds a task's training program for one scheme and writes it to `path`."""
    program = pockc.build(
        task.model,
        task.example,
        loss="cross_entropy",
        optimizer=optimizer(learning_rate, steps),
        scheme=scheme,
        batchnorm="fold",
    )
    program.save(path)
    return program
