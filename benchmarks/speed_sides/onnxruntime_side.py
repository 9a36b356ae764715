"""ONNX Runtime Training as a side of the speed benchmark: artifacts from an exported model, as its documentation does.

It has no gradient of a batch norm in eval mode. So convolutions and the norms behind them are folded before, as pockc
folds them: the weight is multiplied by the norm's frozen factor inside the graph, the bias is beta.
"""

import os
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.training import api, artifacts
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import zoo
from benchmarks.speed_sides import protocol


class FoldedConvolution(nn.Module):
    """A convolution with the batch norm that follows it, whose gamma and statistics are frozen."""

    factor: Tensor
    shift: Tensor

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.weight, self.bias = convolution.weight, norm.bias
        self.register_buffer("factor", factor.reshape(-1, 1, 1, 1))
        self.register_buffer("shift", -norm.running_mean * factor)
        self.window: tuple[Any, ...] = (convolution.stride, convolution.padding, 1, convolution.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] as the two did."""
        return F.conv2d(x, self.weight * self.factor, self.bias + self.shift, *self.window)


def fold(model: nn.Module) -> dict[str, str]:
    """Folds in place what is neighbours in an `nn.Sequential`; new names of parameters by their old ones.

    Raises:
        SideError: There is a batch norm elsewhere.
    """
    renamed = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        for index in range(len(module) - 1):
            convolution, norm = module[index], module[index + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[index], module[index + 1] = FoldedConvolution(convolution, norm), nn.Identity()
                renamed[f"{path}.{index + 1}.bias"] = f"{path}.{index}.bias"
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise protocol.SideError(
            "it has no gradient of a batch norm in eval mode, and this model's are not folded here"
        )
    return renamed


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
