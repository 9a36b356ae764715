"""Batch norms in eval mode folded into the convolutions before them, for sides that have no gradient of such a norm.

As pockc folds them: the weight is multiplied by the norm's frozen factor inside the graph, the bias is beta.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

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
