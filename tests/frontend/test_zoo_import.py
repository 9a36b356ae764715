"""Every model of the zoo, small: imported, verified, evaluated, compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import zoo
from pockc.frontend.torch import trace
from pockc.interp import evaluate
from pockc.ir import op_counts
from pockc.verify import verify

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo_model_equals_pytorch(name: str) -> None:
    model, inputs = zoo.ZOO[name](**zoo.SMALL[name])

    imported = trace(model, inputs, loss="cross_entropy", batchnorm="fold")

    verify(imported.graph, "imported")
    outputs, _ = evaluate(imported.graph, {key: value.numpy() for key, value in inputs.items()})
    with torch.no_grad():
        result = model(**inputs)
    wanted = getattr(result, "logits", result).numpy()
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(outputs["logits"] / scale, wanted / scale, atol=5e-5)


@pytest.mark.parametrize("name", ["llama_tiny", "smollm2_135m"])
def test_language_models_arrive_as_few_operators(name: str) -> None:
    model, inputs = zoo.ZOO[name](**zoo.SMALL[name])

    graph = trace(model, inputs, loss="causal_lm", batchnorm="fold").graph

    counts = op_counts(graph.nodes)
    assert (counts["rms_norm"], counts["rotary"], counts["attention"]) == (5, 4, 2)
    attention = [node for node in graph.nodes if node.op == "attention"]
    for node in attention:
        query, key = node.inputs[:2]
        assert node.attrs["causal"] is True
        assert len(node.inputs) == 3
        assert key.type.shape[1] < query.type.shape[1]


def test_bert_masks_stay_one_row_per_text() -> None:
    model, inputs = zoo.bert_base(**zoo.SMALL["bert_base"])

    graph = trace(model, inputs, loss="cross_entropy", batchnorm="fold").graph

    masks = [node.inputs[3].type.shape for node in graph.nodes if node.op == "attention"]
    assert masks == [(2, 1, 1, 8)] * 2
