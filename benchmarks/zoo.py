"""The model zoo: each function returns a model in eval mode and example inputs by keyword, without labels.

They are what `pockc build benchmarks/zoo.py:mobilenet_v2 --batch-size 8` names. Weights are random, the same in every
call, unless `pretrained` is set; the sizes can be reduced for tests.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

# Loaded by its path, this file has no package: make its siblings importable.
if not __package__:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import datasets, zoo_mcunet, zoo_text, zoo_vision

ModelAndInputs = tuple[nn.Module, dict[str, Tensor]]
Parameters = ParamSpec("Parameters")

# Every configuration takes this keyword, though its own signature does not name it.
_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}


def _seeded(make: Callable[Parameters, ModelAndInputs]) -> Callable[Parameters, ModelAndInputs]:
    """Runs `make` with a fixed seed, without touching the caller's generator, and puts the model into eval mode."""

    @functools.wraps(make)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> ModelAndInputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = make(*args, **kwargs)
        return model.eval(), inputs

    return wrapper


def _images(batch_size: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch_size, 3, size, size)}


def _load(model: nn.Module, state: dict[str, Tensor], head: str) -> None:
    """Loads all of `state`, or all but the head where the model has another number of classes."""
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith(f"{head}.")}
    if any(state[name].shape != value.shape for name, value in fresh.items()):
        state = {**state, **fresh}
    model.load_state_dict(state, strict=True)


@_seeded
def mobilenet_v2(
    batch_size: int = 8, image_size: int = 224, num_classes: int = 1000, width: float = 1.0
) -> ModelAndInputs:
    """MobileNetV2; `width` multiplies the channels."""
    model = zoo_vision.MobileNetV2(num_classes, width)
    zoo_vision.randomize_batchnorm(model)
    return model, _images(batch_size, image_size)


@_seeded
def efficientnet_lite0(
    batch_size: int = 8, image_size: int = 224, num_classes: int = 1000, pretrained: bool = False
) -> ModelAndInputs:
    """EfficientNet-Lite0; `pretrained` takes its ImageNet weights, with a new head unless num_classes is 1000."""
    model = zoo_vision.EfficientNetLite0(num_classes)
    if pretrained:
        _load(model, torch.load(datasets.efficientnet_lite0_weights(), weights_only=True), head="_fc")
    else:
        zoo_vision.randomize_batchnorm(model)
    return model, _images(batch_size, image_size)


@_seeded
def resnet50(batch_size: int = 8, image_size: int = 224, num_classes: int = 1000, width: int = 64) -> ModelAndInputs:
    """ResNet-50; `width` is the number of channels of its stem."""
    model = zoo_vision.ResNet50(num_classes, width)
    zoo_vision.randomize_batchnorm(model)
    return model, _images(batch_size, image_size)


@_seeded
def mcunet_5fps(
    batch_size: int = 8,
    image_size: int = 128,
    num_classes: int = 1000,
    pretrained: bool = False,
    uint8_images: bool = False,
) -> ModelAndInputs:
    """MCUNet-5fps; `pretrained` takes its dequantised ImageNet weights from `mcu/mcunet-5fps.npz` (datasets.py).

    With `uint8_images` the program takes them as a camera gives them, in a quarter of the memory.
    """
    model = zoo_mcunet.McuNet(num_classes)
    if pretrained:
        state = zoo_mcunet.dequantized_state(datasets.shared_data("mcu/mcunet-5fps.npz"))
        _load(model, state, head="classifier")
    if uint8_images:
        return model, {"pixel_values": torch.randint(0, 256, (batch_size, 3, image_size, image_size)).byte()}
    return model, _images(batch_size, image_size)


@_seeded
def minilm_l6(
    batch_size: int = 8,
    sequence_length: int = 64,
    num_classes: int = 6,
    layers: int = 6,
    width: int = 384,
    vocab_size: int = 30522,
    pretrained: bool = False,
) -> ModelAndInputs:
    """all-MiniLM-L6-v2 with a classifier on the masked mean; six classes as in TREC."""
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        **_ATTENTION,
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    model = zoo_text.SentenceClassifier(encoder, width, num_classes)
    if pretrained:
        state = load_file(datasets.minilm_dir() / "model.safetensors")
        # The file has the pooler, which masked mean pooling replaces, and the position numbers, which are constants.
        unused = ("pooler.", "embeddings.position_ids")
        encoder.load_state_dict({name: value for name, value in state.items() if not name.startswith(unused)})
    else:
        zoo_text.perturb_vectors(model)
    return model, zoo_text.masked_token_inputs(batch_size, sequence_length, vocab_size)


@_seeded
def bert_base(
    batch_size: int = 8,
    sequence_length: int = 128,
    num_classes: int = 2,
    layers: int = 12,
    width: int = 768,
    vocab_size: int = 30522,
) -> ModelAndInputs:
    """BERT-base (uncased) with its classification head."""
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        **_ATTENTION,
    )
    config.num_labels = num_classes
    model = transformers.BertForSequenceClassification(config)
    zoo_text.perturb_vectors(model)
    return model, zoo_text.masked_token_inputs(batch_size, sequence_length, vocab_size)


@_seeded
def distilbert(
    batch_size: int = 8,
    sequence_length: int = 128,
    num_classes: int = 2,
    layers: int = 6,
    width: int = 768,
    vocab_size: int = 30522,
) -> ModelAndInputs:
    """DistilBERT (uncased) with its classification head."""
    config = transformers.DistilBertConfig(
        vocab_size=vocab_size,
        dim=width,
        n_layers=layers,
        n_heads=12,
        hidden_dim=4 * width,
        **_ATTENTION,
    )
    config.num_labels = num_classes
    model = transformers.DistilBertForSequenceClassification(config)
    zoo_text.perturb_vectors(model)
    return model, zoo_text.masked_token_inputs(batch_size, sequence_length, vocab_size)


def _llama(config: transformers.LlamaConfig, batch_size: int, sequence_length: int) -> ModelAndInputs:
    model = transformers.LlamaForCausalLM(config)
    zoo_text.perturb_vectors(model)
    return model, zoo_text.token_inputs(batch_size, sequence_length, config.vocab_size)


@_seeded
def llama_tiny(
    batch_size: int = 8, sequence_length: int = 64, layers: int = 4, width: int = 256, vocab_size: int = 4096
) -> ModelAndInputs:
    """A small Llama with grouped-query attention: twice as many query heads as key heads."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        use_cache=False,
        **_ATTENTION,
    )
    return _llama(config, batch_size, sequence_length)


def llama_8l(batch_size: int = 8, sequence_length: int = 64) -> ModelAndInputs:
    """A Llama of 8 layers, 512 wide, with the vocabulary of Llama 2."""
    return llama_tiny(batch_size, sequence_length, layers=8, width=512, vocab_size=32000)


@_seeded
def smollm2_135m(
    batch_size: int = 8, sequence_length: int = 64, layers: int = 30, width: int = 576, vocab_size: int = 49152
) -> ModelAndInputs:
    """SmolLM2-135M: a Llama with 9 query heads, 3 key heads and tied embeddings; `width` in multiples of 18."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        use_cache=False,
        **_ATTENTION,
    )
    return _llama(config, batch_size, sequence_length)


ZOO: dict[str, Callable[..., ModelAndInputs]] = {
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_lite0": efficientnet_lite0,
    "resnet50": resnet50,
    "mcunet_5fps": mcunet_5fps,
    "minilm_l6": minilm_l6,
    "bert_base": bert_base,
    "distilbert": distilbert,
    "llama_tiny": llama_tiny,
    "smollm2_135m": smollm2_135m,
}

# Arguments that make each model of ZOO small enough for a test that takes a few seconds.
SMALL: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {"batch_size": 2, "image_size": 32, "num_classes": 10, "width": 0.25},
    "efficientnet_lite0": {"batch_size": 2, "image_size": 32, "num_classes": 10},
    "resnet50": {"batch_size": 2, "image_size": 32, "num_classes": 10, "width": 8},
    "mcunet_5fps": {"batch_size": 2, "image_size": 32, "num_classes": 10},
    "minilm_l6": {"batch_size": 2, "sequence_length": 8, "layers": 2, "width": 24, "vocab_size": 64},
    "bert_base": {"batch_size": 2, "sequence_length": 8, "layers": 2, "width": 24, "vocab_size": 64},
    "distilbert": {"batch_size": 2, "sequence_length": 8, "layers": 2, "width": 24, "vocab_size": 64},
    "llama_tiny": {"batch_size": 2, "sequence_length": 8, "layers": 2, "width": 64, "vocab_size": 64},
    "smollm2_135m": {"batch_size": 2, "sequence_length": 8, "layers": 2, "width": 72, "vocab_size": 64},
}
