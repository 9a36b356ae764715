"""What the import promises beyond the values of outputs: names, states, origins, modes, updates, patterns."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pockc.frontend.torch import trace
from pockc.interp import evaluate
from pockc.ir import Graph, State, op_counts, substitute
from pockc.verify import verify

pytestmark = pytest.mark.torch


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.head = nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.norm(self.stem(pixel_values))
        x = self.body(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def pixels(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def states_of(graph: Graph) -> dict[str, State]:
    return {value.name: state for value, state in graph.states.items()}


def test_states_have_the_names_kinds_and_order_of_the_model() -> None:
    imported = trace(Network().eval(), {"pixel_values": pixels()}, loss="cross_entropy", batchnorm="fold")

    named = {name: state.kind for name, state in states_of(imported.graph).items() if state.kind != "constant"}
    assert named == {
        **dict.fromkeys(["stem.weight", "stem.bias", "norm.weight", "norm.bias"], "parameter"),
        **dict.fromkeys(["body.0.weight", "body.0.bias", "head.weight", "head.bias"], "parameter"),
        **dict.fromkeys(["norm.running_mean", "norm.running_var"], "buffer"),
    }
    assert list(named)[:4] == ["stem.weight", "stem.bias", "norm.weight", "norm.bias"]
    assert [value.name for value in imported.graph.inputs] == ["pixel_values"]
    assert list(imported.graph.outputs) == ["logits"]
    assert imported.loss_output is None
    assert imported.aliases == {}
    assert list(imported.modules.items())[:3] == [("", "Network"), ("stem", "Conv2d"), ("norm", "BatchNorm2d")]


def test_state_data_is_contiguous_and_not_shared_with_the_model() -> None:
    model = Network().eval()
    imported = trace(model, {"pixel_values": pixels()}, loss="cross_entropy", batchnorm="fold")
    data = states_of(imported.graph)["stem.weight"].data
    assert data is not None
    before = data.copy()

    with torch.no_grad():
        model.stem.weight.add_(1)

    np.testing.assert_array_equal(data, before)
    assert data.flags.c_contiguous


def test_nodes_carry_module_path_and_line_of_this_file() -> None:
    imported = trace(Network().eval(), {"pixel_values": pixels()}, loss="cross_entropy", batchnorm="fold")

    convolutions = [node.origin for node in imported.graph.nodes if node.op == "conv2d"]
    lines, start = inspect.getsourcelines(Network.forward)
    wanted = start + next(i for i, line in enumerate(lines) if "self.stem" in line)
    assert convolutions[0].module == "stem"
    assert convolutions[0].file.endswith("tests/frontend/test_trace.py")
    assert convolutions[0].line == wanted
    assert convolutions[0].phase == "forward"
    assert convolutions[1].module == "body.0"


def test_tuple_inputs_take_the_names_of_the_parameters_of_forward() -> None:
    imported = trace(Network().eval(), (pixels(),), loss="cross_entropy", batchnorm="fold")

    assert [value.name for value in imported.graph.inputs] == ["pixel_values"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids))
        return logits


def test_tied_parameters_become_one_state_and_an_alias() -> None:
    imported = trace(Tied(), {"ids": torch.tensor([[1, 2]])}, loss="cross_entropy", batchnorm="fold")

    assert imported.aliases == {"head.weight": "embed.weight"}
    assert [name for name, state in states_of(imported.graph).items() if state.kind == "parameter"] == ["embed.weight"]


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_in_its_mode(training: bool) -> None:
    model = Network().train(training)
    model.body.eval()

    trace(model, {"pixel_values": pixels()}, loss="cross_entropy", batchnorm="train", training=False)

    assert (model.training, model.stem.training, model.body.training) == (training, training, False)


@pytest.mark.parametrize("policy", ["fold", "freeze"])
def test_frozen_batch_norm_uses_running_statistics_even_in_train_mode(policy: str) -> None:
    model = Network().train()
    assert model.norm.running_mean is not None
    model.norm.running_mean.uniform_(-1, 1)

    imported = trace(model, {"pixel_values": pixels()}, loss="cross_entropy", batchnorm=policy)

    outputs, _ = evaluate(imported.graph, {"pixel_values": pixels().numpy()})
    np.testing.assert_allclose(outputs["logits"], model.eval()(pixels()).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert imported.graph.updates == {}


def test_trained_batch_norm_updates_its_running_statistics_as_pytorch_does() -> None:
    model = Network().eval()  # a model in eval mode is fine-tuned with dropout off, batch norm as the policy says
    imported = trace(model, {"pixel_values": pixels()}, loss="cross_entropy", batchnorm="train")
    verify(imported.graph, "training")  # of all levels the first that may have updates

    outputs, states = evaluate(imported.graph, {"pixel_values": pixels().numpy()})

    reference = copy.deepcopy(model).train()
    logits = reference(pixels())
    np.testing.assert_allclose(outputs["logits"], logits.detach().numpy(), rtol=1e-5, atol=1e-5)
    assert {state.name for state in imported.graph.updates} == {"norm.running_mean", "norm.running_var"}
    for name, buffer in reference.named_buffers():
        if "num_batches" not in name:
            np.testing.assert_allclose(states[name], buffer.numpy(), rtol=1e-5, atol=1e-6)


def test_trained_batch_norm_evaluates_with_running_statistics() -> None:
    imported = trace(Network(), {"pixel_values": pixels()}, loss="mse", batchnorm="train", training=False)

    assert imported.graph.updates == {}
    assert "batch_norm" not in op_counts(imported.graph.nodes)


# ---- dropout ----


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.channels = nn.Dropout(0.25), nn.Dropout(0.5), nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.channels(self.second(self.first(x)))
        return y


def test_dropout_in_train_mode_draws_from_numbered_streams() -> None:
    imported = trace(Dropped().train(), {"x": torch.ones(2, 8, 16, 16)}, loss="mse", batchnorm="fold")
    verify(imported.graph, "imported")

    masks = [node.attrs for node in imported.graph.nodes if node.op == "dropout_mask"]
    assert [(mask["stream"], mask["probability"], mask["elements"]) for mask in masks] == [
        (0, 0.25, 4096), (1, 0.5, 4096), (2, 0.5, 16),
    ]  # fmt: skip
    counters = {name for name, state in states_of(imported.graph).items() if state.kind == "counter"}
    assert counters == {"pockc.seed", "pockc.step"}
    outputs, _ = evaluate(imported.graph, {"x": np.ones((2, 8, 16, 16), np.float32)})
    values = np.unique(outputs["logits"])
    np.testing.assert_allclose(values, [0, 16 / 3], rtol=1e-5)


def test_dropout_is_absent_in_eval_mode() -> None:
    imported = trace(Dropped().eval(), {"x": torch.ones(2, 8, 4, 4)}, loss="mse", batchnorm="fold")

    assert "dropout_mask" not in op_counts(imported.graph.nodes)
    assert imported.graph.states == {}


class DroppedAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, mask, dropout_p=0.2 if self.training else 0.0, enable_gqa=True)


def test_attention_with_dropout_is_spelled_out() -> None:
    inputs = {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 5, 8), "mask": torch.rand(2, 1, 5, 5) > 0.2}
    inputs["mask"][..., 0] = True
    model = DroppedAttention()

    imported = trace(model.train(), inputs, loss="mse", batchnorm="fold")

    counts = op_counts(imported.graph.nodes)
    assert (counts["dropout_mask"], counts["softmax"]) == (1, 1)
    plain = [node for node in imported.graph.nodes if node.op == "apply_mask"]
    assert len(plain) == 1
    # Without the mask it is the attention of PyTorch.
    graph = substitute(imported.graph, {plain[0].outputs[0]: plain[0].inputs[0]})
    outputs, _ = evaluate(graph, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(outputs["logits"], model.eval()(**inputs).numpy(), rtol=1e-5, atol=1e-5)


# ---- losses and outputs ----


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "features": x * 2}


def labelled() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(2)), "labels": torch.tensor([0, 2])}


def test_a_model_may_return_its_loss() -> None:
    model = WithLoss()
    imported = trace(model, labelled(), loss=None, batchnorm="fold")

    outputs, _ = evaluate(imported.graph, {name: value.numpy() for name, value in labelled().items()})

    wanted = model(**labelled())
    assert imported.loss_output == "loss"
    assert list(outputs) == ["loss", "logits", "features"]
    np.testing.assert_allclose(outputs["loss"], wanted["loss"].detach().numpy(), rtol=1e-5)


def test_a_loss_may_be_a_callable_of_output_and_labels() -> None:
    model = WithLoss()
    imported = trace(model, labelled(), loss=_scaled_error, batchnorm="fold")

    outputs, _ = evaluate(imported.graph, {name: value.numpy() for name, value in labelled().items()})
    wanted = _scaled_error(model(labelled()["x"]), labelled()["labels"])
    assert [value.name for value in imported.graph.inputs] == ["x", "labels"]
    assert list(outputs) == ["loss", "logits", "features"]
    np.testing.assert_allclose(outputs["loss"], wanted.detach().numpy(), rtol=1e-5)


def _scaled_error(output: dict[str, Tensor], labels: Tensor) -> Tensor:
    return 2 * F.cross_entropy(output["logits"], labels)


def test_a_named_loss_leaves_labels_out_and_takes_the_logits_first() -> None:
    imported = trace(WithLoss(), labelled(), loss="cross_entropy", batchnorm="fold")

    assert [value.name for value in imported.graph.inputs] == ["x"]
    assert list(imported.graph.outputs) == ["logits", "features"]


# ---- patterns ----


class Block(nn.Module):
    """One attention block in the way of language models: spelled-out norm, rotary embedding, repeated heads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.query, self.key = nn.Linear(16, 32), nn.Linear(16, 16)
        angles = torch.arange(5.0)[:, None] * torch.rand(4)
        self.register_buffer("angles", torch.cat([angles, angles], -1)[None, None], persistent=False)
        self.angles: Tensor

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        q = self.turn(self.query(y).view(2, 5, 4, 8).transpose(1, 2))
        k = self.turn(self.key(y).view(2, 5, 2, 8).transpose(1, 2))
        k = k[:, :, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8)
        visible = (mask[:, None, None, :] > 0).expand(2, 1, 5, 5)
        return F.scaled_dot_product_attention(q, k, k, visible)

    def turn(self, x: Tensor) -> Tensor:
        halves = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * self.angles.cos() + halves * self.angles.sin()


def test_spelled_out_blocks_become_the_operators_for_them() -> None:
    model = Block().eval()
    inputs = {"x": torch.randn(2, 5, 16), "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}

    imported = trace(model, inputs, loss="mse", batchnorm="fold")

    verify(imported.graph, "imported")
    counts = op_counts(imported.graph.nodes)
    assert {op: counts.get(op, 0) for op in ("rms_norm", "rotary", "attention", "mul", "concat", "expand")} == {
        "rms_norm": 1, "rotary": 2, "attention": 1, "mul": 0, "concat": 0, "expand": 0,
    }  # fmt: skip
    attention = next(node for node in imported.graph.nodes if node.op == "attention")
    assert [value.type.shape for value in attention.inputs] == [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 1, 1, 5)]
    outputs, _ = evaluate(imported.graph, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(outputs["logits"], model(**inputs).detach().numpy(), rtol=1e-5, atol=1e-5)


class NearlyNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        over_rows = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)
        of_another = x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5)
        turned_wrongly = x * 2 + torch.cat((x[..., 4:], x[..., :4]), dim=-1) * 3
        return over_rows + of_another + turned_wrongly


def test_near_misses_of_patterns_are_left_alone() -> None:
    x = torch.randn(2, 2, 3, 8)
    imported = trace(NearlyNorm(), {"x": x}, loss="mse", batchnorm="fold")

    assert {"rms_norm", "rotary"}.isdisjoint(op_counts(imported.graph.nodes))
    outputs, _ = evaluate(imported.graph, {"x": x.numpy()})
    np.testing.assert_allclose(outputs["logits"], NearlyNorm()(x).numpy(), rtol=1e-5, atol=1e-5)


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 5, 5)
        return F.scaled_dot_product_attention(x, x, x, mask)


def test_a_constant_causal_mask_becomes_the_causal_attribute() -> None:
    x = torch.randn(2, 3, 5, 8)
    imported = trace(Causal(), {"x": x}, loss="mse", batchnorm="fold")

    (attention,) = [node for node in imported.graph.nodes if node.op == "attention"]
    assert attention.attrs["causal"] is True
    assert len(attention.inputs) == 3
    outputs, _ = evaluate(imported.graph, {"x": x.numpy()})
    np.testing.assert_allclose(outputs["logits"], Causal()(x).numpy(), rtol=1e-5, atol=1e-5)
