from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pockc import __version__
from pockc.artifact import read
from pockc.errors import InternalError
from pockc.session import Session
from tests.shell import Shell

pytestmark = [pytest.mark.torch, pytest.mark.native]


def network(shell: Shell) -> Any:
    from pockc.cli_model import load_model

    return load_model(str(shell.folder / "model.py") + ":make", None)[0]


def test_version_is_printed(shell: Shell) -> None:
    assert shell("--version") == (0, f"pockc {__version__}\n", "")


def test_devices_are_listed(shell: Shell) -> None:
    code, out, _ = shell("devices")
    assert code == 0
    assert "rpi4" in out and "jetson-orin" in out and "aarch64" in out
    code, out, _ = shell("devices", "--json")
    assert code == 0
    pi = next(device for device in json.loads(out) if device["name"] == "rpi4")
    assert (pi["triple"], pi["cores"], pi["features"]) == ("aarch64-linux-gnu", 4, ["neon"])
    assert pi["cost"]["gflops"] > 0


def test_build_writes_a_program_that_runs_and_prints_what_it_trains(shell: Shell) -> None:
    code, out, err = shell("build", "model.py:make", "--scheme", "head", "--batch-size", "3", "-o", "made")

    assert (code, err) == (0, "")
    assert re.search(r"trained parameters\s*│ 68 ", out)
    assert re.search(r"planned peak\s*│ [\d.]+ KiB", out)
    assert "attach-optimizer" in out
    with Session(shell.folder / "made" / "model.pock") as session:
        loss = session.train_step(x=np.zeros((3, 6)), labels=[0, 1, 2])
        assert np.isfinite(loss)
        assert session.metadata["optimizer"]["name"] == "adamw"


def test_build_copies_pock_run_beside_the_program(shell: Shell) -> None:
    from pockc.abi import runtime_file

    shell("build", "model.py:make")
    runner = shell.folder / "out" / "pock-run"
    assert runner.read_bytes() == runtime_file("pock-run").read_bytes()
    assert runner.stat().st_mode & 0o111


def test_build_for_another_board_notes_the_missing_binary(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pockc.targets.native.toolchain.importlib.util.find_spec", lambda name: None)  # no zig
    code, out, _ = shell("build", "model.py:make", "--device", "rpi4")
    assert code == 0
    assert "Note: there is no pock-run for rpi4" in out
    assert not (shell.folder / "out" / "pock-run").exists()


def test_options_reach_the_optimizer(shell: Shell) -> None:
    options = "--optimizer sgd --learning-rate 0.5 --momentum 0.9 --weight-decay 0.1 --clip-norm 2 --accumulate 2"
    schedule = "--schedule cosine --warmup 3 --total-steps 30 --label-smoothing 0.1"
    code, _, err = shell("build", "model.py:make", *options.split(), *schedule.split())

    assert (code, err) == (0, "")
    with Session(shell.folder / "out" / "model.pock") as session:
        optimizer = session.metadata["optimizer"]
        text = session.metadata["text"]["train_step"]
    assert (optimizer["momentum"], optimizer["weight_decay"], optimizer["clip_norm"]) == (0.9, 0.1, 2.0)
    assert (optimizer["schedule"]["kind"], optimizer["schedule"]["warmup_steps"]) == ("cosine", 3)
    assert "label_smoothing=0.1" in text


def test_state_dtype_reaches_the_program(shell: Shell) -> None:
    code, out, err = shell("build", "model.py:make", "--optimizer", "lion", "--state-dtype", "int8")

    assert (code, err) == (0, "")
    assert re.search(r"optimizer state\s*│ int8 ", out)
    with Session(shell.folder / "out" / "model.pock") as session:
        assert session.metadata["state_dtype"] == "int8"
        assert session.state("fc.weight.lion_m").dtype == np.uint8


def test_verify_compares_state_of_one_byte_with_pytorch(shell: Shell) -> None:
    """The codes cost more than rounding to float32 does, and the comparison says how much."""
    code, out, err = shell("verify", "model.py:make", "--state-dtype", "int8", "--steps", "3")
    assert (code, err) == (1, "")
    assert "DIFFERS from PyTorch" in out


def test_inspect_shows_memory_peak_and_calls(shell: Shell) -> None:
    shell("build", "model.py:make")
    code, out, err = shell("inspect", "out/model.pock")

    assert (code, err) == (0, "")
    for part in ("Planned memory at the peak", "fc.weight", "Peak memory by module", "cross_entropy_grad"):
        assert part in out


def test_inspect_text_is_the_ir_alone(shell: Shell) -> None:
    shell("build", "model.py:make")
    with Session("out/model.pock") as session:
        expected = session.metadata["text"]["infer"]
    assert shell("inspect", "out/model.pock", "--text", "--entry", "infer")[1] == expected + "\n"


def test_inspect_writes_a_page_and_a_trace(shell: Shell) -> None:
    shell("build", "model.py:make", "--scheme", "head")
    code, out, err = shell("inspect", "out/model.pock", "--html", "memory.html", "--trace", "memory.json")

    assert (code, err) == (0, "")
    assert "Wrote memory.html" in out and "Wrote memory.json" in out
    page = (shell.folder / "memory.html").read_text()
    assert "fc.weight" not in page and "head.weight" in page  # what is frozen is not in the arena
    assert '"full":{"arena_bytes":' in page
    assert json.loads((shell.folder / "memory.json").read_text())["traceEvents"]


def test_build_leaves_out_self_test_and_comparison_on_request(shell: Shell) -> None:
    shell("build", "model.py:make", "-o", "with")
    code, _, err = shell("build", "model.py:make", "--no-selftest", "--no-compare-full", "-o", "without")

    assert (code, err) == (0, "")
    found, missing = (shell.folder / name / "model.pock" for name in ("with", "without"))
    assert b"infer/output/logits" in found.read_bytes()
    assert b"infer/output/logits" not in missing.read_bytes()
    assert "full_memory" in read(found).metadata
    assert "full_memory" not in read(missing).metadata


def test_build_leaves_out_entries_on_request(shell: Shell) -> None:
    code, _, err = shell("build", "model.py:make", "--entries", "train_step,infer", "-o", "lean")

    assert (code, err) == (0, "")
    assert list(read(shell.folder / "lean" / "model.pock").entries) == ["train_step", "infer"]


def test_verify_agrees_with_pytorch_and_counts_steps(shell: Shell) -> None:
    code, out, err = shell("verify", "model.py:make", "--scheme", "full", "--steps", "4")

    assert (code, err) == (0, "")
    assert "agrees with PyTorch" in out
    assert len(re.findall(r"^│ \d+ +│ \d+\.\d{6}", out, re.MULTILINE)) == 4


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer lion --learning-rate 0.001 --accumulate 3 --clip-norm 0.1",
        "--optimizer adam --weight-decay 0.1 --schedule linear --total-steps 20 --warmup 2",
        "--optimizer sgd --learning-rate 0.1 --momentum 0.9 --schedule step --step-size 2",
        "--loss model.py:own_loss",
        "--scheme sliced.yaml --weight-decay 0.5",
    ],
)
def test_verify_agrees_with_pytorch_for(options: str, shell: Shell) -> None:
    rule = "{tensors: fc.weight, channels: {fraction: 0.5, select: magnitude}}"
    (shell.folder / "sliced.yaml").write_text(f"update: [head.*, {rule}]\n")
    function = "with_labels" if "own_loss" in options else "make"

    code, out, err = shell("verify", f"model.py:{function}", *options.split())

    assert (code, err) == (0, "")
    assert "agrees with PyTorch" in out


def test_verify_fails_where_the_two_differ(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from pockc.frontend import torch_parity

    right = torch_parity.learning_rate
    monkeypatch.setattr(torch_parity, "learning_rate", lambda *arguments: 1.01 * right(*arguments))

    code, out, _ = shell("verify", "model.py:make")

    assert code == 1
    assert "DIFFERS from PyTorch" in out


def test_exported_weights_load_into_the_model_and_give_the_same_logits(shell: Shell) -> None:
    shell("build", "model.py:make", "--learning-rate", "0.05")
    images = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    with Session("out/model.pock") as session:
        for _ in range(5):
            session.train_step(x=images, labels=np.arange(8) % 4)
        session.save_checkpoint("tuned.ckpt")
        expected = session.run("infer", x=images)["logits"]

    code, out, err = shell("export", "out/model.pock", "--checkpoint", "tuned.ckpt", "-o", "tuned.safetensors")

    assert (code, out, err) == (0, "Wrote tuned.safetensors\n", "")
    model = network(shell)
    model.load_state_dict(load_file("tuned.safetensors"), strict=True)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(images)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_export_with_weights_of_another_model_as_base_is_refused(shell: Shell) -> None:
    shell("build", "model.py:make")
    save_file({"fc.weight": torch.zeros(2, 2)}, "base.safetensors")
    code, _, err = shell("export", "out/model.pock", "--base", "base.safetensors", "-o", "tuned.safetensors")
    assert code == 2
    assert "fc.weight has shape [2, 2], the program's has [16, 6]" in err


BAD = {
    "no such file": "build none.py:make",
    "no function named": "build model.py",
    "no such function": "build model.py:mak",
    "function fails": "build model.py:broken",
    "function returns one thing": "build model.py:single",
    "no batch size": "build model.py:fixed --batch-size 4",
    "scheme": "build model.py:make --scheme heads",
    "scheme that matches nothing": "build model.py:make --scheme none.yaml",
    "optimizer": "build model.py:make --optimizer adamww",
    "sgd without a rate": "build model.py:make --optimizer sgd",
    "momentum of adam": "build model.py:make --momentum 0.9",
    "loss": "build model.py:make --loss crossentropy",
    "schedule": "build model.py:make --schedule cosin",
    "schedule without an end": "build model.py:make --schedule cosine",
    "batchnorm": "build model.py:make --batchnorm folded",
    "device": "build model.py:make --device rpi6",
    "entries": "build model.py:make --entries train_step,evaluate",
    "entries without training": "build model.py:make --entries infer",
    "no such program": "inspect none.pock",
    "not a program": "inspect model.py",
    "entry": "inspect out/model.pock --entry train",
    "checkpoint": "export out/model.pock --checkpoint none.ckpt -o x.safetensors",
    "not a checkpoint": "export out/model.pock --checkpoint model.py -o x.safetensors",
    "output folder is a file": "export out/model.pock -o model.py/x.safetensors",
}


def test_bad_commands_end_with_one_sentence_and_code_2(shell: Shell, golden: Callable[..., None]) -> None:
    shell("build", "model.py:make")
    (shell.folder / "none.yaml").write_text("update: [haed.*]\n")
    lines = []
    for name, command in BAD.items():
        code, out, err = shell(*command.split())
        assert (code, out) == (2, ""), name
        assert err.count("\n") == 1, name
        lines.append(f"{name}: {err.replace(str(shell.folder) + '/', '')}")
    golden("".join(lines))


def test_internal_error_asks_for_a_report(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise InternalError("pass fuse broke an invariant")

    monkeypatch.setattr(sys.modules["pockc.build"], "build", fail)
    code, _, err = shell("build", "model.py:make")
    assert code == 3
    assert "pass fuse broke an invariant" in err and "please report it" in err


def test_frozen_weights_in_fewer_bytes_are_built_verified_and_exported(shell: Shell) -> None:
    code, out, err = shell("build", "model.py:wide", "--scheme", "head", "--frozen-dtype", "int8")
    assert (code, err) == (0, "")
    assert re.search(r"large frozen weights\s*│ int8 ", out)
    code, out, _ = shell("inspect", "out/model.pock", "--text")
    assert code == 0 and "state %0.weight: q8[128,16] parameter" in out
    code, out, _ = shell("export", "out/model.pock", "-o", "tuned.safetensors")
    assert code == 0 and "Note: 1 frozen tensors are approximations" in out and "0.weight" in out
    code, out, _ = shell("verify", "model.py:wide", "--scheme", "head", "--frozen-dtype", "int8")
    assert code == 0 and "agrees with PyTorch" in out
    code, _, err = shell("build", "model.py:wide", "--frozen-dtype", "int2")
    assert code == 2 and "f32, bf16, int8, int4" in err
