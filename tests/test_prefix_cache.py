"""Training from what the frozen prefix makes of each sample: `cache_prefix`, and `pock-run train --cache-prefix`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pockc.abi import runtime_file
from pockc.build import build
from pockc.errors import UserError
from pockc.ir import Array
from pockc.optim import SGD, AdamW
from pockc.program import Program
from pockc.scheme import Scheme
from pockc.session import Session
from tests.shell import Shell

pytestmark = [pytest.mark.torch, pytest.mark.native]

BATCH, SAMPLES, CLASSES = 4, 30, 3  # the last two samples of an epoch fill no batch
WORDS, WIDTH, TOKENS = 20, 8, 6


class Images(nn.Module):
    """Two convolutions, the second a residual one, with batch norm; pooling; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.drop(torch.relu(self.conv(x)))
        logits: Tensor = self.head((x + self.last(x)).mean((2, 3)))
        return logits


class Layer(nn.Module):
    """Attention under a mask, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.project(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y: Tensor = self.norm(x + mixed.squeeze(1))
        return y


class Text(nn.Module):
    """Two such layers, which read the same mask, over embeddings; the mean goes to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        logits: Tensor = self.head(x.mean(1))
        return logits


SCHEMES: Mapping[type[nn.Module], Scheme] = {
    Images: Scheme.model_validate({"name": "last", "update": ["last.*", "head.*"]}),
    Text: Scheme.model_validate({"name": "last", "update": ["layers.1.*", "head.*"]}),
}


def model_of(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def samples_of(kind: type[nn.Module], count: int = SAMPLES, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    if kind is Images:
        return {"x": random.standard_normal((count, 3, 8, 8)).astype(np.float32), "labels": labels}
    mask = np.arange(TOKENS) < random.integers(2, TOKENS + 1, count)[:, None]
    ids = random.integers(0, WORDS, (count, TOKENS))
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}


def inputs_of(kind: type[nn.Module]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(a[:BATCH]) for name, a in samples_of(kind).items() if name != "labels"}


def compiled(kind: type[nn.Module], **options: Any) -> Program:
    given: dict[str, Any] = {"optimizer": AdamW(lr=1e-2), "scheme": SCHEMES[kind], "cache_prefix": True}
    model = options.pop("model", None) or model_of(kind)
    return build(model, inputs_of(kind), **(given | options))


@dataclass(frozen=True, slots=True)
class Task:
    """A program and its samples in a folder."""

    folder: Path

    def train(self, name: str, *options: str, epochs: int = 3, cache: str = "") -> tuple[dict[str, Any], bytes]:
        """Report and checkpoint of a run, whose checkpoint has that name; with a cache in the folder ``cache``."""
        files = {key: str(self.folder / f"{name}.{key}") for key in ("ckpt", "json")}
        command = [str(runtime_file("pock-run")), "train", str(self.folder / "model.pock")]
        command += ["--data", str(self.folder / "train.npz"), "--save", files["ckpt"], "--json", files["json"]]
        command += ["--epochs", str(epochs), "--quiet", *options]
        command += ["--cache-prefix", str(self.folder / cache)] if cache else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(Path(files["json"]).read_text()), Path(files["ckpt"]).read_bytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[type[nn.Module], Path]:
    """Compiled programs and samples, to be read only."""
    found: dict[type[nn.Module], Path] = {}
    for kind in (Images, Text):
        found[kind] = tmp_path_factory.mktemp(kind.__name__)
        compiled(kind).save(found[kind] / "model.pock")
        np.savez(found[kind] / "train.npz", **samples_of(kind))  # type: ignore[arg-type] # stubs mistake names
        np.savez(found[kind] / "test.npz", **samples_of(kind, 10, seed=1))  # type: ignore[arg-type] # as above
    return found


@pytest.fixture
def task(folders: Mapping[type[nn.Module], Path], tmp_path: Path, request: pytest.FixtureRequest) -> Task:
    """The task of a kind of model, in a folder of its own."""
    for file in folders[request.param].iterdir():
        if file.suffix in (".pock", ".npz"):
            (tmp_path / file.name).symlink_to(file)
    return Task(tmp_path)


both = pytest.mark.parametrize("task", [Images, Text], indirect=True, ids=["images", "text"])
images = pytest.mark.parametrize("task", [Images], indirect=True, ids=["images"])


def losses(report: Mapping[str, Any]) -> list[tuple[float, ...]]:
    names = ("loss", "eval_loss", "accuracy", "validation_loss")
    return [tuple(epoch[name] for name in names) for epoch in report["epochs"]]


@both
def test_losses_and_checkpoint_are_the_same_bits_with_and_without_a_cache(task: Task) -> None:
    test = str(task.folder / "test.npz")
    options = ("--validation-split", "0.2", "--eval", test)
    report, checkpoint = task.train("plain", *options)
    first, with_cache = task.train("cached", *options, cache="cache")
    later, again = task.train("again", *options, cache="cache")
    assert losses(first) == losses(later) == losses(report)
    assert with_cache == again == checkpoint
    assert first["cache_encoded_samples"] == SAMPLES + 10
    assert later["cache_encoded_samples"] == 0
    assert {file.name for file in (task.folder / "cache").iterdir()} == {"train.cache", "eval.cache"}


@both
def test_a_run_goes_on_exactly_from_the_middle_of_an_epoch(task: Task) -> None:
    _, checkpoint = task.train("plain")
    task.train("cached", "--max-steps", "10", cache="cache")
    report, resumed = task.train("cached", "--resume", cache="cache")
    assert resumed == checkpoint
    assert report["cache_encoded_samples"] < SAMPLES


@images
@pytest.mark.parametrize("kept", [0, 7, 15])
def test_within_a_limit_the_rest_is_encoded_in_full_batches(task: Task, kept: int) -> None:
    _, checkpoint = task.train("plain")
    record = 4 * 4 * 8 * 4
    limit = 64 + 128 + kept * record
    report, cached = task.train("cached", "--cache-limit", str(limit), cache="cache")
    assert cached == checkpoint
    files = list((task.folder / "cache").iterdir())
    assert [file.stat().st_size for file in files] == ([limit] if kept else [])
    per_epoch = SAMPLES // BATCH * BATCH
    assert per_epoch <= report["cache_encoded_samples"] <= per_epoch + 2 + 2 * (SAMPLES - kept)


@both
@pytest.mark.parametrize(("dtype", "tolerance", "share"), [("f16", 2e-4, 0.5), ("int8", 5e-3, 0.3)])
def test_fewer_bytes_are_about_the_same_whatever_is_in_the_cache(
    task: Task, dtype: str, tolerance: float, share: float
) -> None:
    report, _ = task.train("exact", cache="exact")
    options = ("--cache-dtype", dtype)
    near, checkpoint = task.train("near", *options, cache="near")
    for (loss, *_), (other, *_) in zip(losses(report), losses(near), strict=True):
        assert 0 < abs(loss - other) < tolerance * loss
    sizes = [Path(task.folder, name, "train.cache").stat().st_size for name in ("exact", "near")]
    assert sizes[1] < share * sizes[0] + 1024
    assert task.train("tiny", *options, "--cache-limit", "1KB", cache="tiny")[1] == checkpoint
    assert task.train("later", *options, cache="near")[1] == checkpoint


@images
def test_other_frozen_weights_are_noticed_and_other_trained_ones_do_not_matter(task: Task) -> None:
    task.train("first", cache="cache")
    file = task.folder / "model.pock"
    for encoded in (0, SAMPLES):
        model = model_of(Images)
        nn.init.normal_(model.get_parameter("head.weight" if encoded == 0 else "stem.weight"))
        file.unlink()
        compiled(Images, model=model).save(file)
        _, checkpoint = task.train("plain")
        report, cached = task.train("cached", cache="cache")
        assert report["cache_encoded_samples"] == encoded
        assert cached == checkpoint


@pytest.mark.parametrize(
    "options",
    [
        {"accumulation": 2},
        {"micro_batch": 1},
        {"frozen_dtype": "int8"},
        {"prefix_dtype": "int8", "calibration": "example"},
        {"saved_dtype": "int8"},
        {"batchnorm": "freeze"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_combine_with_it(tmp_path: Path, options: dict[str, Any]) -> None:
    program = compiled(Images, **options)
    program.save(tmp_path / "model.pock")
    np.savez(tmp_path / "train.npz", **samples_of(Images))  # type: ignore[arg-type] # stubs mistake names
    task = Task(tmp_path)
    _, checkpoint = task.train("plain")
    assert task.train("cached", cache="cache")[1] == checkpoint
    (boundary,) = program.entries["encode"].outputs.values()
    assert boundary.type.dtype == ("u8" if "prefix_dtype" in options else "f32")


def test_a_budget_holds_for_all_entries() -> None:
    inputs = {"x": torch.zeros(8, 3, 16, 16)}
    scheme = Scheme.model_validate({"name": "two", "update": ["conv.*", "last.*", "head.*"]})
    slow = frozenset({"split-rows", "tile-channels", "reorder", "split-backward", "split-prefix"})
    make = partial(build, model_of(Images), inputs, scheme=scheme, optimizer=SGD(lr=0.1), cache_prefix=True)
    budget = make(disabled=slow).memory.peak_bytes // 2
    program = make(memory_budget=budget, disabled=slow)
    assert program.memory.peak_bytes <= budget
    assert program.metadata["budget"]["micro_batch"] < 8


def test_the_entries_run_from_python(tmp_path: Path) -> None:
    compiled(Text, optimizer=SGD(lr=0.1)).save(tmp_path / "model.pock")
    batch = {name: array[:BATCH] for name, array in samples_of(Text).items()}
    rest = {name: batch[name] for name in ("attention_mask", "labels")}
    with Session(tmp_path / "model.pock") as whole, Session(tmp_path / "model.pock") as parts:
        for _ in range(3):
            encoded = parts.encode(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            assert parts.run("train_step_encoded", **encoded, **rest)["loss"] == whole.train_step(**batch)
        evaluated = whole.eval_step(**batch)
        for name, array in parts.run("eval_step_encoded", **encoded, **rest).items():
            assert np.array_equal(array, evaluated[name])
        for name, array in whole.parameters().items():
            assert np.array_equal(array, parts.parameters()[name])


def test_a_program_without_it_has_no_such_entries(tmp_path: Path) -> None:
    program = compiled(Text, cache_prefix=False)
    assert set(program.entries) == {"train_step", "eval_step", "infer"}
    program.save(tmp_path / "model.pock")
    with Session(tmp_path / "model.pock") as session, pytest.raises(UserError, match="Build it with cache_prefix"):
        session.encode(**{name: array[:BATCH] for name, array in samples_of(Text).items()})


def refusal(**options: Any) -> str:
    with pytest.raises(UserError) as error:
        compiled(Images, **options)
    return str(error.value)


def test_what_cannot_be_cached_is_refused_in_a_sentence() -> None:
    assert "has nothing to cache" in refusal(scheme="full")
    text = refusal(scheme="head", model=model_of(Images).train())
    assert text.startswith("drop (") and "contains dropout" in text
    text = refusal(batchnorm="train")
    assert text.startswith("norm (") and "contains a batch norm that is updated" in text
    assert "onnxruntime has no cache_prefix" in refusal(target="onnxruntime")


def test_dropout_at_the_end_of_the_prefix_is_no_obstacle(tmp_path: Path) -> None:
    program = compiled(Images, model=model_of(Images).train())
    assert len(program.entries["encode"].outputs) == 2  # on both sides of the dropout
    program.save(tmp_path / "model.pock")
    np.savez(tmp_path / "train.npz", **samples_of(Images))  # type: ignore[arg-type] # stubs mistake names
    task = Task(tmp_path)
    test = ("--validation-split", "0.2")
    report, checkpoint = task.train("plain", *test)
    cached_report, cached = task.train("cached", *test, cache="cache")
    assert cached == checkpoint
    assert losses(cached_report) == losses(report)


def test_the_command_line_builds_and_trains_with_it(shell: Shell) -> None:
    code, _, err = shell("build", "model.py:make", "--scheme", "last-k:1", "--cache-prefix", "-o", "out")
    assert code == 0, err
    random = np.random.default_rng(0)
    np.savez("train.npz", x=random.standard_normal((16, 6)).astype(np.float32), labels=random.integers(0, 4, 16))
    command = ["out/pock-run", "train", "out/model.pock", "--data", "train.npz"]
    subprocess.run([*command, "--cache-prefix", "cache", "--cache-limit", "1.5MiB", "--quiet"], check=True)
    assert Path("cache", "train.cache").stat().st_size == 64 + 64 + 16 * 16 * 4
    for flags, message in (
        (("--cache-limit", "1GB"), "--cache-limit needs --cache-prefix DIR"),
        (("--cache-prefix", "c", "--cache-dtype", "f64"), "--cache-dtype wants f32, f16 or int8"),
        (("--cache-prefix", "c", "--cache-limit", "2XB"), "--cache-limit wants a size"),
    ):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
