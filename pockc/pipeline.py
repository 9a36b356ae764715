"""The compiler as lists of passes, and the manager that verifies, times and dumps between them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pockc.errors import InternalError, UserError
from pockc.ir import Graph, Node
from pockc.passes import (
    attach_loss,
    attach_optimizer,
    canonicalize,
    compress_saved,
    cse,
    dce,
    differentiate,
    duplicate,
    fit_memory,
    fold,
    fold_batchnorm,
    fuse,
    layout,
    mask_gradients,
    mixed_precision,
    narrow,
    place,
    quantize_frozen,
    quantize_prefix,
    reorder,
    scale_cotangents,
    slice_updates,
    split_backward,
    split_prefix,
    split_rows,
    tile_channels,
    tile_updates,
    tile_vocabulary,
)
from pockc.recipe import Recipe
from pockc.verify import Level, verify

Run = Callable[[Graph, Recipe], Graph]

# By pass, graph and what of the recipe differs: the graph after the pass, and the decisions that it noted.
Known = dict[tuple[Any, ...], tuple[Graph, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Pass:
    """One line of a pipeline.

    ``optional`` passes can be switched off to see what they buy; ``reducible`` ones too, but they still run then, and
    do only what the next step cannot do without. ``targeted`` ones heed what a memory budget leaves.
    """

    name: str
    run: Run
    level: Level = "training"
    optional: bool = False
    reducible: bool = False
    targeted: bool = False


@dataclass(frozen=True, slots=True)
class ProgramPass:
    """A pass that sees all entries of a program at once, after they are lowered."""

    name: str
    run: Callable[[Mapping[str, Graph], Recipe], dict[str, Graph]]


# What every entry shares: the user's forward graph, in the layout and parameterisation that the kernels want.
COMMON: tuple[Pass, ...] = (
    Pass("canonicalize", canonicalize.run, "imported"),  # one spelling of everything, before patterns are matched
    Pass("fold", fold.run, "imported"),  # masks and tables of the frontend become constants
    Pass("layout", layout.run, "imported", optional=True),  # channels-last throughout; needs canonical transposes
    Pass("canonicalize", canonicalize.run, "imported"),  # pads meet their convolution once transposes are gone
    Pass("fold-batchnorm", fold_batchnorm.run, "imported", optional=True),  # wants conv -> mul, channels last
    Pass("fold", fold.run, "imported"),  # the folded scales and shifts of frozen parameters
    Pass("cse", cse.run, "imported"),
    Pass("dce", dce.run, "imported"),
    Pass("narrow", narrow.run, "imported", optional=True),  # on canonical slices, and before gradients are made
    Pass("quantize-prefix", quantize_prefix.run, "imported"),  # before entries part: all shall see the same numbers
)

# From forward graph to training step.
TRAIN: tuple[Pass, ...] = (
    Pass("attach-loss", attach_loss.run),
    Pass("differentiate", differentiate.run),
    Pass("attach-optimizer", attach_optimizer.run),
    Pass("slice-updates", slice_updates.run, optional=True),  # needs the takes that attach-optimizer made
)
ACCUMULATE: tuple[Pass, ...] = (*TRAIN[:2], Pass("accumulate", attach_optimizer.accumulate), TRAIN[3])
EVAL: tuple[Pass, ...] = (Pass("attach-loss", attach_loss.evaluation),)
INFER: tuple[Pass, ...] = ()

# To kernels, in the order they will run.
LOWER: tuple[Pass, ...] = (
    Pass("canonicalize", canonicalize.run),  # what differentiation left: reshapes of reshapes, sums of one
    Pass("fold", fold.run),
    Pass("cse", cse.run),
    Pass("dce", dce.run),
    Pass("scale-cotangents", scale_cotangents.run, optional=True),  # before masks are fused, and weights duplicated
    Pass("fuse", fuse.run, "lowered", optional=True),  # after differentiation: gradients read unfused nodes
    Pass("duplicate", duplicate.run, "lowered", optional=True),  # before the order is chosen
    # Gradients and updates are final by now.
    Pass("tile-vocabulary", tile_vocabulary.run, "lowered", optional=True, targeted=True),
    Pass("mixed-precision", mixed_precision.run, "lowered"),  # every activation is known, and no memory weighed yet
    Pass("compress-saved", compress_saved.run, "lowered"),  # before what is saved is weighed
    Pass("fit-memory", fit_memory.run, "lowered", optional=True, targeted=True),  # after cse, which would undo it
    Pass("split-backward", split_backward.run, "lowered", optional=True),  # before what is fitted below the rest
    Pass("tile-updates", tile_updates.run, "lowered", optional=True),  # as is what follows
    # Before tiles, of which strips may need none.
    Pass("split-rows", split_rows.run, "lowered", optional=True, targeted=True),
    Pass("tile-channels", tile_channels.run, "lowered", optional=True),  # of fused products, while each is there once
    Pass("split-prefix", split_prefix.run, "lowered", optional=True),  # after the last pass that adds readers
    Pass("reorder", reorder.run, "lowered", reducible=True),
    Pass("place", place.run, "lowered", reducible=True),  # asks what memory the order leaves for scratch
    Pass("mask-gradients", mask_gradients.run, "lowered", optional=True),  # of the kernels that were chosen, in place
)

# For ONNX Runtime, which orders nodes, fuses elementwise chains and plans memory by itself. Unsupported nodes are
# refused when all passes are done, with the places where they are.
LOWER_ONNX: tuple[Pass, ...] = (*LOWER[:4], Pass("fuse", fuse.run, optional=True))

# By target.
LOWERINGS: Mapping[str, tuple[Pass, ...]] = {"native": LOWER, "onnxruntime": LOWER_ONNX}

# Over all entries of a program. Last: what is compact must be agreed between entries that were lowered one by one, and
# neither order nor plan depends on it.
TOGETHER: tuple[ProgramPass, ...] = (ProgramPass("quantize-frozen", quantize_frozen.run),)


def switches() -> tuple[str, ...]:
    """The names that `Recipe.disabled` knows, in the order in which the passes run."""
    passes = (*COMMON, *TRAIN, *ACCUMULATE, *EVAL, *INFER, *LOWER)
    return (*dict.fromkeys(step.name for step in passes if step.optional or step.reducible), *place.KERNELS)


@dataclass(slots=True)
class Manager:
    """Runs passes: verifies after each, records milliseconds and node counts, dumps where POCKC_DUMP says.

    POCKC_DUMP=dir writes the graph after every pass; POCKC_VERIFY=0 never verifies, 1 after each pass (default),
    2 also round-trips the text; POCKC_STOP_AFTER=n runs only the first n passes that may be skipped, to bisect.
    """

    recipe: Recipe
    supports: Callable[[Node], bool]  # the target's: nothing unsupported survives the level `lowered`
    known: Known | None = None  # shared by managers whose recipes differ in the memory target alone
    timings: list[tuple[str, str, float, int]] = field(default_factory=list)  # entry, pass, ms, nodes after
    optional_run: int = 0
    checked: set[Node] = field(default_factory=set)  # by the verifier, which finds most nodes again after each pass

    def run(self, entry: str, passes: Sequence[Pass], graph: Graph) -> Graph:
        """The graph after these passes. UserErrors pass through; anything else becomes an InternalError."""
        done: list[str] = []
        for step in passes:
            if self._skipped(step):
                continue
            started = time.perf_counter()
            try:
                after = self._after(step, graph)
            except UserError:
                raise
            except Exception as error:
                raise self._failure(entry, step.name, done, graph, error) from error
            graph = after
            done.append(step.name)
            self._record(entry, step.name, graph, started)
        return graph

    def run_together(self, passes: Sequence[ProgramPass], entries: Mapping[str, Graph]) -> dict[str, Graph]:
        """The entries after these passes; errors as for `run`. The time of a pass counts for the first entry."""
        for step in passes:
            started = time.perf_counter()
            try:
                after = step.run(entries, self.recipe)
                for graph in {*after.values()}.difference(entries.values()):
                    self._verify(graph, "lowered")
            except UserError:
                raise
            except Exception as error:
                entry, graph = next(iter(entries.items()))
                raise self._failure(entry, step.name, [], graph, error) from error
            entries = after
            for entry, graph in entries.items():
                self._record(entry, step.name, graph, started)
                started = time.perf_counter()
        return dict(entries)

    def _after(self, step: Pass, graph: Graph) -> Graph:
        """The graph that a pass makes of another, verified. Passes are pure: one that is known need not run again."""
        recipe = replace(self.recipe, decisions={})
        tiles = None if recipe.tiles is None else tuple(recipe.tiles.items())
        key = (step.run, graph, recipe.transient_target if step.targeted else None, recipe.sufficient, tiles)
        if self.known is None or key not in self.known:
            after = step.run(graph, recipe)
            self._verify(after, step.level)
            notes = recipe.decisions
            if self.known is not None:
                self.known[key] = after, notes
        else:
            after, notes = self.known[key]
        self.recipe.decisions.update(notes)
        return after

    def _skipped(self, step: Pass) -> bool:
        if not step.optional:
            return False
        if step.name in self.recipe.disabled:
            return True
        self.optional_run += 1
        fuel = os.environ.get("POCKC_STOP_AFTER")
        return fuel is not None and self.optional_run > int(fuel)

    def _verify(self, graph: Graph, legality: Level) -> None:
        level = os.environ.get("POCKC_VERIFY", "1")
        if level == "0":
            return
        verify(graph, legality, self.supports, self.checked)
        if level == "2":
            from pockc.text import parse, show  # only this debugging level needs the parser

            if show(parse(show(graph))) != show(graph):
                raise InternalError("the text of the graph does not round-trip")

    def _record(self, entry: str, name: str, graph: Graph, started: float) -> None:
        self.timings.append((entry, name, (time.perf_counter() - started) * 1e3, len(graph.nodes)))
        if folder := os.environ.get("POCKC_DUMP"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{len(self.timings):02d}-{entry}-{name}.txt").write_text(str(graph))

    def _failure(self, entry: str, name: str, done: list[str], graph: Graph, error: Exception) -> InternalError:
        with tempfile.NamedTemporaryFile("w", prefix="pockc-", suffix=".txt", delete=False) as dump:
            dump.write(str(graph))
        before = ", ".join(done) or "no other pass"
        return InternalError(
            f"pass {name} of {entry} failed after {before}: {error} "
            f"The graph it was given is in {dump.name}. Please report this."
        )
