"""The zoo against published numbers, and its contract: keyword inputs, eval mode, the same weights in every call."""

import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import datasets, fetch, zoo, zoo_mcunet, zoo_vision

pytestmark = pytest.mark.torch

NAMES = sorted(zoo.ZOO)
NETWORKS_WITH_BATCHNORM = ("mobilenet_v2", "efficientnet_lite0", "resnet50")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor)
    return logits


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mobilenet_v2", 3_504_872),
        ("resnet50", 25_557_032),
        ("efficientnet_lite0", 4_652_008),
        ("bert_base", 109_483_778),  # with two classes
        ("distilbert", 66_955_010),  # with two classes
        ("minilm_l6", 22_713_216 - 384 * 385 + 6 * 385),  # six classes in place of the pooler
        ("smollm2_135m", 134_515_008),  # the tied embedding counts once
    ],
)
def test_full_size_model_has_published_parameter_count(name: str, published: int) -> None:
    model, _ = zoo.ZOO[name](batch_size=1)

    assert parameter_count(model) == published


@pytest.mark.parametrize("name", NAMES)
def test_small_model_gives_finite_logits_for_its_example(name: str) -> None:
    model, inputs = zoo.ZOO[name](**zoo.SMALL[name])

    logits = logits_of(model, inputs)

    assert not any(module.training for module in model.modules())
    assert "labels" not in inputs
    assert logits.shape[0] == zoo.SMALL[name]["batch_size"]
    assert torch.isfinite(logits).all()
    # The examples of the batch must be told apart, else a trajectory would test little.
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_small_model_survives_export(name: str) -> None:
    model, inputs = zoo.ZOO[name](**zoo.SMALL[name])

    program = torch.export.export(model, (), kwargs=inputs)

    exported = program.module()
    assert isinstance(exported, nn.Module)
    torch.testing.assert_close(logits_of(exported, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_two_calls_agree_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, first_inputs = zoo.ZOO[name](**zoo.SMALL[name])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    second, second_inputs = zoo.ZOO[name](**zoo.SMALL[name])

    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    for key, value in first_inputs.items():
        assert torch.equal(value, second_inputs[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_every_model_takes_batch_size_by_keyword(name: str) -> None:
    assert "batch_size" in inspect.signature(zoo.ZOO[name]).parameters

    _, inputs = zoo.ZOO[name](**{**zoo.SMALL[name], "batch_size": 3})

    assert {value.shape[0] for value in inputs.values()} == {3}


@pytest.mark.parametrize("name", ["minilm_l6", "bert_base", "distilbert", "llama_tiny", "smollm2_135m"])
def test_text_model_calls_fused_attention(name: str) -> None:
    model, inputs = zoo.ZOO[name](**zoo.SMALL[name])

    program = torch.export.export(model, (), kwargs=inputs)

    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == zoo.SMALL[name]["layers"]


def test_llama_8l_has_eight_layers_of_width_512() -> None:
    model, inputs = zoo.llama_8l(batch_size=1, sequence_length=4)

    names = [name for name, _ in model.named_parameters()]
    assert sum(name.endswith("q_proj.weight") for name in names) == 8
    assert model.get_parameter("model.embed_tokens.weight").shape == (32000, 512)
    assert inputs["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("name", NETWORKS_WITH_BATCHNORM)
def test_batchnorm_of_a_random_network_is_far_from_identity(name: str) -> None:
    model, _ = zoo.ZOO[name](**zoo.SMALL[name])

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.momentum is not None
        assert norm.weight.std() > 0.05 * norm.weight.mean() and norm.bias.std() > 0.02
        assert norm.running_mean.abs().max() > 1e-2
        assert (norm.running_var > 0).all() and (norm.running_var - 1).abs().max() > 1e-2


def test_encoder_example_has_padding_and_no_empty_text() -> None:
    _, inputs = zoo.bert_base(batch_size=4, sequence_length=8, layers=1, width=24, vocab_size=64)

    lengths = inputs["attention_mask"].sum(dim=1)
    assert lengths.tolist() == [8, 7, 6, 5]
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all()


def test_masked_mean_ignores_padding() -> None:
    model, inputs = zoo.minilm_l6(**zoo.SMALL["minilm_l6"])
    padded = inputs["attention_mask"] == 0
    assert padded.any()

    changed = torch.where(padded, 7, inputs["input_ids"])

    torch.testing.assert_close(
        logits_of(model, inputs), logits_of(model, {"input_ids": changed, "attention_mask": inputs["attention_mask"]})
    )


def test_zoo_file_works_when_loaded_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(zoo.__file__)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != path.parents[1]])
    spec = importlib.util.spec_from_file_location("model_file_of_a_user", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    spec.loader.exec_module(module)

    model, inputs = module.mobilenet_v2(batch_size=1, image_size=32)
    assert logits_of(model, inputs).shape == (1, 1000)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [(224, 3, 2, (0, 1)), (112, 5, 2, (1, 2)), (7, 3, 2, (1, 1)), (14, 5, 1, (2, 2)), (9, 1, 1, (0, 0))],
)
def test_same_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert zoo_vision.same_padding(size, kernel, stride) == expected


def test_efficientnet_loads_its_real_weights_strictly() -> None:
    try:
        path = datasets.efficientnet_lite0_weights()
    except fetch.DataUnavailableError as error:
        pytest.skip(f"EfficientNet-Lite0 weights are not available: {error}")
    state = torch.load(path, weights_only=True)

    model, inputs = zoo.efficientnet_lite0(batch_size=1, image_size=96, pretrained=True)

    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.isfinite(logits_of(model, inputs)).all()


def test_pretrained_network_with_other_classes_keeps_all_but_the_head() -> None:
    try:
        path = datasets.efficientnet_lite0_weights()
    except fetch.DataUnavailableError as error:
        pytest.skip(f"EfficientNet-Lite0 weights are not available: {error}")
    state = torch.load(path, weights_only=True)

    model, _ = zoo.efficientnet_lite0(batch_size=1, num_classes=10, pretrained=True)

    loaded = model.state_dict()
    assert loaded["_fc.weight"].shape == (10, 1280)
    assert all(torch.equal(loaded[name], value) for name, value in state.items() if not name.startswith("_fc."))


def test_pretrained_minilm_puts_paraphrases_nearer_than_strangers() -> None:
    texts = ["How far is the moon from the earth?", "What is the distance to the moon?", "Who painted the Mona Lisa?"]
    try:
        tokens = datasets.tokenize_for_minilm(texts, length=16)
    except fetch.DataUnavailableError as error:
        pytest.skip(f"MiniLM-L6 is not available: {error}")
    model, _ = zoo.minilm_l6(batch_size=1, pretrained=True)
    # With an identity head the logits are the sentence embedding.
    model.classifier = nn.Identity()

    embedding = logits_of(model, {name: torch.from_numpy(value) for name, value in tokens.items()})

    embedding = nn.functional.normalize(embedding, dim=1)
    assert embedding[0] @ embedding[1] > 0.7
    assert embedding[0] @ embedding[2] < 0.3


def test_mcunet_table_and_weights_match_the_published_checkpoint() -> None:
    try:
        path = datasets.shared_data("mcu/mcunet-5fps.npz")
    except fetch.DataUnavailableError as error:
        pytest.skip(f"the MCUNet checkpoint is not available: {error}")

    model, inputs = zoo.mcunet_5fps(batch_size=2, pretrained=True)

    assert zoo_mcunet.architecture(path) == zoo_mcunet.BLOCKS
    assert logits_of(model, inputs).shape == (2, 1000)
    # 8-bit weights are whole multiples of their output channel's scale.
    with np.load(path) as arrays:
        scales = torch.from_numpy(arrays["blocks.3.pointwise1.w_scales"]).reshape(-1, 1)
        quantized = torch.from_numpy(arrays["blocks.3.pointwise1.weight"]).flatten(1)
    weight = model.get_parameter("blocks.3.pointwise1.weight").detach().flatten(1)
    torch.testing.assert_close(weight / scales, quantized.to(torch.float32))
