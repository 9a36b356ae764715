"""Fetching checks what it gets, and the data sets have the shapes that their readers expect."""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from benchmarks import datasets, fetch

Result = TypeVar("Result")


def available(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except fetch.DataUnavailableError as error:
        pytest.skip(f"data is not available: {error}")


def local_package(tmp_path: Path) -> fetch.Package:
    """A package whose download is a file made here."""

    def download(package: fetch.Package, directory: Path) -> Path:
        archive = directory / "archive.whl"
        archive.write_bytes(source.read_bytes())
        return archive

    source = tmp_path / "source.whl"
    with zipfile.ZipFile(source, "w") as wheel:
        wheel.writestr("wanted/a.txt", "first")
        wheel.writestr("wanted/b.txt", "second")
        wheel.writestr("unwanted/code.py", "raise SystemExit")
    return fetch.Package(
        name="toy",
        version="1.0",
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        members=("wanted/",),
        download=download,
        unpack=fetch._unpack_wheel,
    )


def test_fetch_unpacks_only_the_members(tmp_path: Path) -> None:
    folder = fetch.fetch(local_package(tmp_path), tmp_path / "cache")

    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["wanted/a.txt", "wanted/b.txt"]
    assert (folder / "wanted/a.txt").read_text() == "first"


def test_second_fetch_downloads_nothing(tmp_path: Path) -> None:
    def refuse(package: fetch.Package, directory: Path) -> Path:
        raise AssertionError("downloaded again")

    package = local_package(tmp_path)
    first = fetch.fetch(package, tmp_path / "cache")

    assert fetch.fetch(replace(package, download=refuse), tmp_path / "cache") == first


def test_archive_with_another_digest_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    package = replace(local_package(tmp_path), sha256="0" * 64)

    with pytest.raises(fetch.DataUnavailableError, match="not the pinned file"):
        fetch.fetch(package, tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_debian_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(fetch.DataUnavailableError, match="apt-get or dpkg-deb is not installed"):
        fetch.fetch(fetch.FASHION_MNIST, tmp_path / "cache")


def test_failing_download_says_which_command_failed(tmp_path: Path) -> None:
    with pytest.raises(fetch.DataUnavailableError, match="exit code 3:\nno route"):
        fetch._run(["sh", "-c", "echo no route >&2; exit 3"], tmp_path)


def test_fashion_mnist_is_whole_and_balanced() -> None:
    x_train, y_train, x_test, y_test = available(datasets.fashion_mnist)

    assert x_train.shape == (60000, 28, 28) and x_train.dtype == np.uint8
    assert x_test.shape == (10000, 28, 28) and x_test.dtype == np.uint8
    assert y_train.dtype == np.int64 and np.bincount(y_train).tolist() == [6000] * 10
    assert y_test.dtype == np.int64 and np.bincount(y_test).tolist() == [1000] * 10
    assert x_train.max() == 255 and x_train.min() == 0


def test_trec_split_has_no_question_twice() -> None:
    split = available(datasets.trec)

    questions = split.train_texts + split.test_texts
    assert len(questions) == len(set(questions)) == 5381
    assert len(split.test_texts) == len(split.test_labels) == 800
    assert len(split.train_texts) == len(split.train_labels)
    assert set(split.train_labels.tolist()) == set(range(len(datasets.TREC_LABELS)))


def test_trec_split_depends_on_the_seed_alone() -> None:
    available(datasets.trec)
    first, again, other = datasets.trec(seed=0), datasets.trec(seed=0), datasets.trec(seed=1)

    assert first.test_texts == again.test_texts and (first.test_labels == again.test_labels).all()
    assert first.test_texts != other.test_texts


def test_trec_refuses_a_split_without_training_part() -> None:
    available(datasets.trec)

    with pytest.raises(ValueError, match="test_size is 5381"):
        datasets.trec(test_size=5381)


def test_minilm_tokens_start_and_end_with_the_special_ones() -> None:
    tokens = available(lambda: datasets.tokenize_for_minilm(["What is a dolphin ?", "word " * 50], length=8))

    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (2, 8)
    assert tokens["input_ids"].dtype == np.int64
    assert tokens["input_ids"][:, 0].tolist() == [101, 101]
    assert tokens["input_ids"][1, -1] == 102
    assert tokens["attention_mask"].sum(axis=1).tolist() == [7, 8]


def test_shared_data_is_found_through_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_bytes(b"content")
    monkeypatch.setenv("POCKC_DATA", str(tmp_path))

    assert datasets.shared_data("set.npz") == tmp_path / "set.npz"
    with pytest.raises(fetch.DataUnavailableError, match=r"other\.npz is not here; set POCKC_DATA"):
        datasets.shared_data("other.npz")
