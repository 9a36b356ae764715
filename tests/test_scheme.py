from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import zoo
from pockc.errors import UserError
from pockc.frontend.torch_parity import ModelNames, model_names
from pockc.scheme import Channels, Scheme, channel_axis, detect_family, published, resolve, select_channels

PARAMETERS = {
    "stem.weight": (8, 3, 3, 3),
    "stem.bias": (8,),
    "blocks.0.weight": (8, 8),
    "blocks.0.bias": (8,),
    "blocks.1.weight": (8, 8),
    "blocks.1.bias": (8,),
    "depthwise.weight": (8, 1, 3, 3),
    "embedding.weight": (10, 8),
    "head.weight": (4, 8),
    "head.bias": (4,),
}
MODULES = {
    "": "Net",
    "stem": "Conv2d",
    "blocks": "Sequential",
    "blocks.0": "Linear",
    "blocks.1": "Linear",
    "depthwise": "Conv2d",
    "embedding": "Embedding",
    "head": "Linear",
    "dropout": "Dropout",
}
ALIASES = {"tied.weight": "embedding.weight"}


def resolved(scheme: str | Scheme, **options: Any) -> dict[str, Channels | None]:
    return resolve(scheme, PARAMETERS, modules=MODULES, aliases=ALIASES, **options)


def scheme(*rules: Any, **keys: Any) -> Scheme:
    return Scheme.model_validate({"name": "test", "update": list(rules), **keys})


# --- Presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("full", list(PARAMETERS)),
        ("bias-only", ["stem.bias", "blocks.0.bias", "blocks.1.bias", "head.bias"]),
        ("head", ["head.weight", "head.bias"]),
        ("head:stem", ["stem.weight", "stem.bias"]),
        ("last-k:2", ["embedding.weight", "head.weight", "head.bias"]),
        ("head+bias-only", ["stem.bias", "blocks.0.bias", "blocks.1.bias", "head.weight", "head.bias"]),
        ("head:tied", ["embedding.weight"]),
    ],
)
def test_preset_trains_exactly_these_whole_tensors_in_model_order(preset: str, expected: list[str]) -> None:
    assert list(resolved(preset).items()) == [(name, None) for name in expected]


def test_presets_leave_frozen_parameters_out_silently() -> None:
    assert list(resolved("head+bias-only", frozen=frozenset({"stem.bias", "head.weight"}))) == [
        "blocks.0.bias",
        "blocks.1.bias",
        "head.bias",
    ]


def test_scheme_prints_as_its_preset_text() -> None:
    assert str(Scheme.load("head + bias-only")) == "head+bias-only"


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_freeze_wins_over_update() -> None:
    assert list(resolved(scheme("blocks.*", freeze=["blocks.0.*"]))) == ["blocks.1.weight", "blocks.1.bias"]


def test_larger_channel_fraction_wins_whatever_the_order() -> None:
    quarter = {"tensors": "blocks.0.weight", "channels": {"fraction": 0.25}}
    half = {"tensors": "blocks.0.weight", "channels": {"fraction": 0.5, "select": "magnitude"}}

    for rules in [(quarter, half), (half, quarter)]:
        assert resolved(scheme(*rules)) == {"blocks.0.weight": Channels(0.5, "magnitude")}
    assert resolved(scheme(quarter, "blocks.0.weight", half)) == {"blocks.0.weight": None}


def test_fraction_of_one_is_the_whole_tensor() -> None:
    rule = {"tensors": "blocks.0.weight", "channels": {"fraction": 1.0}}
    assert resolved(scheme(rule)) == {"blocks.0.weight": None}


def test_glob_matches_other_names_of_tied_tensors_and_can_skip_them() -> None:
    assert list(resolved(scheme("tied.*"))) == ["embedding.weight"]
    assert list(resolved(scheme({"tensors": "*.weight", "tied": "skip"}))) == [
        "stem.weight",
        "blocks.0.weight",
        "blocks.1.weight",
        "depthwise.weight",
        "head.weight",
    ]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({"last": 1}, [11]),
        ({"last": 3}, [9, 10, 11]),
        ({"last": 20}, list(range(12))),
        ({"last": 6, "of": 12}, [6, 7, 8, 9, 10, 11]),
        ({"last": 2, "of": 6}, [8, 9, 10, 11]),
        ({"last": 1, "of": 100}, [11]),
    ],
)
def test_block_rule_takes_the_last_blocks_by_number_not_by_spelling(
    blocks: dict[str, int], expected: list[int]
) -> None:
    parameters: dict[str, tuple[int, ...]] = {f"encoder.layer.{i}.fc.weight": (2, 2) for i in range(12)}
    rule = {"blocks": {"pattern": "layer.{}.", **blocks}, "tensors": "fc.*"}

    found = resolve(scheme(rule), parameters, modules={"": "Net"})

    assert list(found) == [f"encoder.layer.{i}.fc.weight" for i in expected]


def test_block_pattern_begins_at_a_dot_and_may_hold_two_numbers() -> None:
    names = ["layer1.0.weight", "layer1.1.weight", "layer2.0.weight", "sublayer9.0.weight", "layer2.x.weight"]
    rule = {"blocks": {"pattern": "layer{}.{}.", "last": 2}, "tensors": "*"}

    found = resolve(scheme(rule), dict.fromkeys(names, (2, 2)), modules={"": "Net"})

    assert list(found) == ["layer1.1.weight", "layer2.0.weight"]


def test_optional_rule_may_match_nothing() -> None:
    optional = {"tensors": "nothing.*", "optional": True}
    assert list(resolved(scheme(optional, "head.bias"))) == ["head.bias"]


def test_glob_leaves_frozen_parameters_out_but_an_exact_name_is_an_error() -> None:
    frozen = frozenset({"stem.weight"})

    assert list(resolved(scheme("stem.*"), frozen=frozen)) == ["stem.bias"]
    with pytest.raises(UserError, match=r"updates stem\.weight, which the batchnorm policy freezes"):
        resolved(scheme("stem.weight"), frozen=frozen)


# --- Channels ---------------------------------------------------------------------------------------------------------


def test_channel_axis_is_the_input_axis_or_that_of_a_depthwise_weight() -> None:
    assert [channel_axis(shape) for shape in [(8, 3, 3, 3), (4, 8), (8, 1, 3, 3)]] == [1, 1, 0]


def test_selected_channels_are_sorted_int32_of_the_rounded_count() -> None:
    weight = np.array([[1.0, -5.0, 0.0, 3.0], [1.0, 0.0, 0.0, 3.0]])

    assert select_channels(weight, Channels(0.5, "first"), 1).tolist() == [0, 1]
    assert select_channels(weight, Channels(0.5, "magnitude"), 1).tolist() == [1, 3]
    assert select_channels(weight, Channels(0.01, "magnitude"), 1).tolist() == [1]
    assert select_channels(weight, Channels(0.5, "magnitude"), 0).tolist() == [0]
    assert select_channels(weight, Channels(0.5, "magnitude"), 1).dtype == np.int32


def test_random_channels_depend_on_the_seed_alone() -> None:
    weight = np.zeros((2, 64), np.float32)
    chosen = [select_channels(weight, Channels(0.25, "random", seed), 1).tolist() for seed in (1, 1, 2)]

    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(set(chosen[0])) and len(chosen[0]) == 16


def test_equal_magnitudes_take_the_first_channels() -> None:
    assert select_channels(np.ones((3, 8)), Channels(0.5, "magnitude"), 1).tolist() == [0, 1, 2, 3]


# --- Published schemes ------------------------------------------------------------------------------------------------

FAMILIES = {
    "mobilenet_v2": "mobilenet_v2",
    "efficientnet_lite0": "efficientnet_lite0",
    "resnet50": "resnet50",
    "mcunet_5fps": "mcunet",
    "minilm_l6": "bert",
    "bert_base": "bert",
    "distilbert": "distilbert",
    "llama_tiny": "llama",
    "smollm2_135m": "llama",
}


def zoo_names(name: str, **changes: Any) -> ModelNames:
    return model_names(zoo.ZOO[name](**{**zoo.SMALL[name], **changes})[0])


def sparse(names: ModelNames) -> dict[str, Channels | None]:
    return resolve("sparse", names.parameters, modules=names.modules, aliases=names.aliases)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_family_of_a_zoo_model_is_found_and_its_sparse_scheme_resolves(name: str) -> None:
    names = zoo_names(name)

    assert detect_family(names.modules) == FAMILIES[name]
    found = sparse(names)
    assert 0 < len(found) < len(names.parameters)
    # A tied head is the exception: see llama.yaml.
    assert name == "smollm2_135m" or set(resolve("head", names.parameters, modules=names.modules)) <= set(found)


def test_every_published_scheme_has_a_model_in_the_zoo() -> None:
    assert set(published()) == set(FAMILIES.values())


def test_mobilenet_sparse_trains_the_first_pointwise_weights_of_seven_blocks() -> None:
    weights = [n for n in sparse(zoo_names("mobilenet_v2")) if n.endswith("weight")]
    assert weights == [f"features.{i}.conv.0.0.weight" for i in range(11, 18)] + ["classifier.1.weight"]


def test_mcunet_sparse_is_the_published_100_kilobyte_scheme() -> None:
    found = sparse(zoo_names("mcunet_5fps"))

    weights = {n: c and c.fraction for n, c in found.items() if n.endswith("pointwise1.weight")}
    assert weights == {
        "blocks.7.pointwise1.weight": None,
        "blocks.8.pointwise1.weight": None,
        "blocks.9.pointwise1.weight": None,
        "blocks.10.pointwise1.weight": None,
        "blocks.12.pointwise1.weight": 0.125,
        "blocks.13.pointwise1.weight": 0.25,
    }
    assert sum(n.endswith("bias") for n in found) == 22 + 1


@pytest.mark.parametrize(("layers", "biases", "weights"), [(12, 6, 4), (6, 3, 2), (4, 2, 1)])
def test_bert_sparse_scales_with_the_depth(layers: int, biases: int, weights: int) -> None:
    found = sparse(zoo_names("bert_base", layers=layers))

    assert sum(n.endswith("attention.self.query.bias") for n in found) == biases
    assert sum(n.endswith("intermediate.dense.weight") for n in found) == weights
    assert not any(n.endswith("layer.0.output.dense.weight") for n in found)
    assert not any("LayerNorm.weight" in n or "embeddings" in n for n in found)


def test_llama_sparse_trains_the_head_unless_it_is_the_embedding() -> None:
    assert "lm_head.weight" in sparse(zoo_names("llama_tiny"))
    assert "model.embed_tokens.weight" not in sparse(zoo_names("smollm2_135m"))


# --- Errors -----------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "not-a-list": "update: 3",
    "empty": "update: []",
    "nothing": "",
    "a-list": "- head.*",
    "unknown-key": "update:\n  - head.*\nfreez: stem.*\n",
    "unknown-rule-key": "update:\n  - tensorz: head.*\n",
    "unknown-channel-key": "update:\n  - tensors: head.weight\n    channels: {fraction: 0.5, selekt: first}\n",
    "fraction": "name: x\nupdate:\n  - tensors: head.weight\n    channels:\n      fraction: 1.5\n",
    "block-pattern": "update:\n  - blocks: {pattern: blocks, last: 1}\n    tensors: '*'\n",
    "two-kinds": "update:\n  - preset: head\n    tensors: '*'\n",
    "yaml": "update: [\n",
    "no-match": "update:\n  - heads.weight\n",
    "no-match-freeze": "update: ['*']\nfreeze: [steem.*]\n",
    "no-block": "update:\n  - blocks: {pattern: 'block.{}.', last: 1}\n    tensors: '*'\n",
    "no-match-in-block": "update:\n  - blocks: {pattern: 'blocks.{}.', last: 1}\n    tensors: wait\n",
    "all-frozen": "update: [head.*]\nfreeze: [head.*]\n",
    "bias-channels": "update:\n  - tensors: 'blocks.0.*'\n    channels: {fraction: 0.5}\n",
    "embedding-channels": "update:\n  - tensors: 'embedding.weight'\n    channels: {fraction: 0.5}\n",
    "bad-preset": "update:\n  - preset: haed\n",
}
BAD_TEXTS = ["fulll", "last-k", "last-k:0", "head:", "head:stemm", "sparse", "full+nothing", "missing.yaml"]


def message(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_messages_about_scheme_files(golden: Callable[..., None], tmp_path: Path) -> None:
    lines = []
    for name, content in BAD_FILES.items():
        file = tmp_path / "scheme.yaml"
        file.write_text(content)
        text = message(lambda file=file: resolved(Scheme.load(file)))  # type: ignore[misc]
        lines.append(f"{name}: {text.replace(str(tmp_path) + '/', '')}\n")
    golden("".join(lines))


def test_messages_about_preset_texts(golden: Callable[..., None]) -> None:
    golden("".join(f"{text}: {message(lambda text=text: resolved(text))}\n" for text in BAD_TEXTS))  # type: ignore[misc]


def test_scheme_of_another_family_is_refused() -> None:
    names = zoo_names("bert_base")
    with pytest.raises(UserError, match="is for models of the family llama, this one is of bert"):
        resolve(published()["llama"], names.parameters, modules=names.modules)


def test_scheme_file_without_a_name_is_called_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("update: head.*\n")
    with pytest.raises(UserError, match="update: it should be a list"):
        Scheme.load(tmp_path / "mine.yml")
    (tmp_path / "mine.yml").write_text("update: [head.*]\n")
    assert str(Scheme.load(str(tmp_path / "mine.yml"))) == "mine"
