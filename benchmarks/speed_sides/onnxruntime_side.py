"""ONNX Runtime Training as a side of the speed benchmark: artifacts from an exported model, as its documentation does.

It has no gradient of a batch norm in eval mode, so these are folded into the convolutions before.
"""

import os
import sys
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.training import api, artifacts

from benchmarks import zoo
from benchmarks.speed_sides import protocol
from benchmarks.speed_sides.folding import fold


class OnnxRuntimeStep:
    """A model that PyTorch exports, trained by ONNX Runtime."""

    def __init__(self, task: protocol.Task) -> None:
        if task.loss != "cross_entropy":
            raise protocol.SideError(f"the loss {task.loss} is not among its losses")
        model, inputs = getattr(zoo, task.model)(**task.arguments)
        renamed = fold(model)
        folder = Path(task.folder, f"onnxruntime-{task.scheme}")
        folder.mkdir()
        self.trained = task.trained
        trained = [renamed.get(name, name) for name in task.trained]
        file = folder / "forward.onnx"
        torch.onnx.export(
            model,
            (inputs,),
            str(file),
            input_names=list(inputs),
            output_names=["logits"],
            opset_version=15,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            export_params=True,
            keep_initializers_as_inputs=False,
            dynamo=False,
        )
        forward = onnx.load(str(file))
        known = {initializer.name for initializer in forward.graph.initializer}
        if missing := set(trained) - known:
            raise protocol.SideError(f"the exported model has no parameter {min(missing)}")
        artifacts.generate_artifacts(
            forward,
            requires_grad=trained,
            frozen_params=sorted(known - set(trained)),
            loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=artifacts.OptimType.SGD,
            artifact_directory=str(folder),
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = task.threads
        options.inter_op_num_threads = 1
        state = api.CheckpointState.load_checkpoint(str(folder / "checkpoint"))
        self.module = api.Module(str(folder / "training_model.onnx"), state, device="cpu", session_options=options)
        self.optimizer = api.Optimizer(str(folder / "optimizer_model.onnx"), self.module)
        self.optimizer.set_learning_rate(task.learning_rate)
        self.module.train()
        labels = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.int64)
        self.batch = [value.numpy() for value in (*inputs.values(), labels)]

    def run(self) -> float:
        """One step."""
        loss = self.module(*self.batch)
        self.optimizer.step()
        self.module.lazy_reset_grad()
        return float(loss)

    def stop_learning(self) -> None:
        """Sets the learning rate to zero."""
        self.optimizer.set_learning_rate(0.0)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.exit(protocol.serve(OnnxRuntimeStep))
