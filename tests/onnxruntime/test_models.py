"""Programs for ONNX Runtime: what is in the files, and that they train as PyTorch and the native target do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import verify_zoo
from pockc.build import build
from pockc.errors import UserError
from pockc.optim import SGD, AdamW, Lion, Optimizer, Schedule
from pockc.parity import LOSS_TOLERANCE, TENSOR_TOLERANCE, verify_against_torch
from pockc.session import Session, open_session
from tests.onnxruntime.models import batch, examples, mobile_net, saved

pytestmark = [pytest.mark.torch]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models"))


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)


def properties(model: onnx.ModelProto) -> dict[str, str]:
    return {item.key: item.value for item in model.metadata_props}


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["train_step", "eval_step", "infer"])
def test_models_have_standard_operators_alone_and_pass_the_checker(file: Path, entry: str) -> None:
    path = file.parent / f"{entry}.onnx"
    onnx.checker.check_model(str(path), full_check=True)

    model = load(path)
    assert [(imported.domain, imported.version) for imported in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}


def test_nodes_are_named_by_module_path_and_carry_their_origin(file: Path) -> None:
    nodes = load(file.parent / "train_step.onnx").graph.node
    names = [node.name for node in nodes]

    assert len(set(names)) == len(names)
    assert {"stem.0/Conv", "block.3/Conv", "block.3/backward/Conv", "head/update/Sub"} <= set(names)
    origin = {item.key: item.value for item in nodes[names.index("block.3/Conv")].metadata_props}
    assert origin["pockc.phase"] == "forward"
    assert origin["pockc.origin"].startswith("block.3 (") and "models.py:" in origin["pockc.origin"]


def test_model_says_what_its_arguments_are(file: Path) -> None:
    model = load(file.parent / "train_step.onnx")
    found = properties(model)
    states, updates = json.loads(found["pockc.states"]), json.loads(found["pockc.updates"])

    assert json.loads(found["pockc.entries"]) == ["train_step", "eval_step", "infer"]
    assert json.loads(found["pockc.program"])["optimizer"]["name"] == "adamw"
    assert [value.name for value in model.graph.input] == ["x", "labels", *(state["input"] for state in states)]
    assert [value.name for value in model.graph.output] == ["loss", *(update["output"] for update in updates)]
    assert {"name": "head.weight", "input": "head.weight", "type": "f32[3,8]"} in states


def test_large_frozen_weights_lie_once_in_the_program_file(tmp_path: Path) -> None:
    file = saved(tmp_path, scheme="head", model=mobile_net(width=32))
    places = []
    for entry in ("train_step", "eval_step", "infer"):
        external = [t for t in load(tmp_path / f"{entry}.onnx").graph.initializer if t.external_data]
        places.append({tuple(item.value for item in tensor.external_data) for tensor in external})

    assert places[0] == places[1] == places[2] and len(places[0]) == 4
    assert {location for location, _, _ in places[0]} == {file.name}
    assert all(path.stat().st_size < 1 << 16 for path in tmp_path.glob("*.onnx"))


# --- Steps ------------------------------------------------------------------------------------------------------------

CASES = [
    ("mobilenet_v2", "sparse"),
    ("mobilenet_v2", "bias-only"),
    ("minilm_l6", "sparse"),
    ("minilm_l6", "bias-only"),
    ("llama_tiny", "sparse"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_ten_steps_of_the_zoo_agree_with_pytorch(name: str, scheme: str) -> None:
    result = verify_zoo.check_parity(name, scheme, "sgd", steps=10, small=True, target="onnxruntime")

    missed = [str(bar) for bar in result.bars() if not bar.met]
    assert not missed, "; ".join(missed)
    assert result.tensors > len(result.zero_gradient)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (AdamW(lr=1e-2, weight_decay=0.1, clip_norm=0.5), {}),
        (SGD(lr=1e-2, momentum=0.9, nesterov=True, schedule=Schedule("cosine", 2, 8)), {"batchnorm": "freeze"}),
        (Lion(lr=1e-3), {"accumulation": 2}),
        (SGD(lr=1e-2, weight_decay=0.1), {"batchnorm": "train", "loss_options": {"label_smoothing": 0.1}}),
    ],
)
def test_steps_agree_with_pytorch(optimizer: Optimizer, options: dict[str, Any]) -> None:
    parity = verify_against_torch(
        mobile_net(), examples(), optimizer=optimizer, steps=5, target="onnxruntime", **options
    )

    assert parity.worst_loss_error <= LOSS_TOLERANCE
    assert parity.worst_tensor_error <= TENSOR_TOLERANCE


@pytest.mark.native
def test_dropout_drops_what_the_native_target_drops(tmp_path: Path) -> None:
    model = mobile_net(dropout=0.5).train()
    losses = []
    for target in ("native", "onnxruntime"):
        (folder := tmp_path / target).mkdir()
        with open_session(saved(folder, target, model=model, seed=3, batchnorm="train")) as session:
            losses.append([session.train_step(**batch(seed)) for seed in range(4)])

    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(set(losses[0])) == 4


@pytest.mark.native
def test_evaluation_and_inference_are_those_of_the_native_target(tmp_path: Path) -> None:
    found = []
    for target in ("native", "onnxruntime"):
        (folder := tmp_path / target).mkdir()
        with open_session(saved(folder, target)) as session:
            evaluated = session.eval_step(**batch(0))
            found.append((*evaluated.values(), *session.run("infer", x=batch(0)["x"]).values()))

    for ours, native in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(ours, native, rtol=1e-4, atol=1e-6)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_options_that_the_target_lacks_are_refused() -> None:
    for options in ({"memory_budget": 1 << 30}, {"micro_batch": 1}, {"state_dtype": "int8"}, {"frozen_dtype": "int8"}):
        with pytest.raises(UserError, match=f"the target onnxruntime has no {next(iter(options))}"):
            build(mobile_net(), examples(), target="onnxruntime", **options)
    with pytest.raises(UserError, match=r"there is no target 'onnx' to build for. Supported: native, onnxruntime"):
        build(mobile_net(), examples(), target="onnx")


def test_an_op_without_lowering_is_refused_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from pockc.targets.onnxruntime.table import LOWERINGS

    monkeypatch.delitem(LOWERINGS, "max_pool2d")
    with pytest.raises(UserError, match=r"the target onnxruntime cannot run: max_pool2d at pool \(.*models.py:\d+\)"):
        build(mobile_net(), examples(), target="onnxruntime")


@pytest.mark.native
def test_the_native_session_refuses_the_program_in_one_sentence(file: Path) -> None:
    with pytest.raises(UserError, match="op `onnxruntime` at <train_step> is not in this runtime"):
        Session(file)


def test_the_memory_of_the_target_is_not_ours_to_tell() -> None:
    program = build(mobile_net(), examples(), target="onnxruntime")
    with pytest.raises(UserError, match="not planned here"):
        _ = program.memory
