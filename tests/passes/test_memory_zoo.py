"""How close plans come to their lower bound: zoo models at test size, with random trainable sets."""

from __future__ import annotations

import random
import statistics

from benchmarks import zoo
from pockc.frontend.torch import trace
from pockc.optim import SGD, AdamW
from pockc.passes import memory
from pockc.pipeline import COMMON, LOWER, TRAIN, Manager
from pockc.recipe import Recipe
from pockc.targets.native import NATIVE, workspace_of

MODELS = ("mcunet_5fps", "distilbert", "minilm_l6", "llama_tiny", "smollm2_135m")
SCHEMES = 3  # per model


def ratios(name: str) -> list[float]:
    """Planned bytes by bytes alive at the worst call, for the full scheme and random ones."""
    rng = random.Random(name)
    loss = "causal_lm" if name in ("llama_tiny", "smollm2_135m") else "cross_entropy"
    model, inputs = getattr(zoo, name)(**zoo.SMALL[name])
    graph = trace(model, inputs, loss=loss, batchnorm="freeze").graph
    parameters = [value.name for value, state in graph.states.items() if state.kind == "parameter"]
    found = []
    for scheme in range(SCHEMES):
        share = rng.random() ** 2 if scheme else 1.0
        trained = [p for p in parameters if rng.random() < share] or parameters[-1:]
        recipe = Recipe(
            trained=dict.fromkeys(trained),
            optimizer=rng.choice((SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), AdamW())),
            loss=loss,
            batchnorm="freeze",
            workspace=workspace_of(2),
        )
        manager = Manager(recipe, NATIVE.supports)
        step = manager.run("train_step", (*COMMON, *TRAIN, *LOWER), graph)
        placement = memory.run(step, recipe.workspace)
        found.append(placement.nbytes / placement.max_live_bytes)
    return found


def test_plans_come_close_to_the_bytes_that_are_alive() -> None:
    found = [ratio for name in MODELS for ratio in ratios(name)]
    assert statistics.median(found) <= 1.01
    assert max(found) <= 1.03
