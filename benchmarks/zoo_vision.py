"""Convolutional networks of the zoo, with the parameter names that their published weights have."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The images on which the statistics of randomly initialised networks are measured.
_CALIBRATION_SHAPE = (4, 3, 96, 96)
# Gamma at the end of a residual branch, relative to elsewhere. Trained networks start such branches near zero (Goyal et
# al., 2017). At full strength a random network amplifies one unit's rounding into other losses within a few steps.
_BRANCH_SCALE = 0.2


def randomize_batchnorm(model: nn.Module) -> None:
    """Gives every batch norm of an untrained network statistics and affine parameters as training leaves them.

    Fresh ones (mean 0, variance 1, gamma 1, beta 0) would hide every mistake in folding, and let the signal of a deep
    network fade out. The statistics are those of random images, then shifted a little, so that they are not exact.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = None  # running statistics become the plain average over batches, here of one
    with torch.no_grad():
        for norm in _branch_ends(model):
            norm.weight.mul_(_BRANCH_SCALE)
        model.train()(torch.randn(_CALIBRATION_SHAPE))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)


def _branch_ends(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The last norms of residual branches."""
    ends: list[nn.BatchNorm2d] = []
    for block in model.modules():
        if isinstance(block, Bottleneck):
            ends.append(block.bn3)
        if isinstance(block, (InvertedResidual, EfficientNetBlock)) and block.use_residual:
            ends.append([module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1])
    return ends


def _initialize_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")


def _round_channels(channels: float) -> int:
    """The nearest multiple of 8, but never more than a tenth below `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


# --- MobileNetV2 (Sandler et al. 2018); names as in torchvision -------------------------------------------------------

# Expansion factor, output channels, repeats, stride of the first repeat.
_MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvNormActivation(nn.Sequential):
    """Convolution without bias, batch norm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a skip where the shape does not change."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [ConvNormActivation(inputs, hidden, 1)]
        layers.append(ConvNormActivation(hidden, hidden, 3, stride, groups=hidden))
        layers.append(nn.Conv2d(hidden, outputs, 1, bias=False))
        layers.append(nn.BatchNorm2d(outputs))
        self.conv = nn.Sequential(*layers)
        self.use_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return x + y if self.use_residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2 for images of any size.

    Args:
        num_classes: Number of logits.
        width: Multiplier of all channel counts; 1.0 is the standard network.
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        channels = _round_channels(32 * width)
        layers: list[nn.Module] = [ConvNormActivation(3, channels, 3, stride=2)]
        for expansion, stage_channels, repeats, first_stride in _MOBILENET_V2_STAGES:
            outputs = _round_channels(stage_channels * width)
            for repeat in range(repeats):
                layers.append(InvertedResidual(channels, outputs, first_stride if repeat == 0 else 1, expansion))
                channels = outputs
        last = _round_channels(1280 * max(1.0, width))
        layers.append(ConvNormActivation(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        _initialize_convolutions(self)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.features(pixel_values)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


# --- ResNet-50 (He et al. 2015, stride in the 3x3 convolution); names as in torchvision -------------------------------

_RESNET_EXPANSION = 4


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * _RESNET_EXPANSION
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, 4 * channels, H / stride, W / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        activated: Tensor = self.relu(y)
        return activated


def _resnet_stage(inputs: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, channels, stride)
    rest = [Bottleneck(channels * _RESNET_EXPANSION, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class ResNet50(nn.Module):
    """ResNet-50 for images of any size.

    Args:
        num_classes: Number of logits.
        width: Channels of the stem; 64 is the standard network.
    """

    def __init__(self, num_classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _resnet_stage(width, width, blocks=3, stride=1)
        self.layer2 = _resnet_stage(4 * width, 2 * width, blocks=4, stride=2)
        self.layer3 = _resnet_stage(8 * width, 4 * width, blocks=6, stride=2)
        self.layer4 = _resnet_stage(16 * width, 8 * width, blocks=3, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32 * width, num_classes)
        _initialize_convolutions(self)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_values))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


# --- EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation); names as in the published weights ----------

# Repeats, kernel, stride of the first repeat, expansion factor, output channels.
_EFFICIENTNET_LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EFFICIENTNET_STEM, _EFFICIENTNET_HEAD = 32, 1280


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "same" padding of one axis (before, after): ceil(size / stride) outputs, an odd pixel goes last."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SamePadConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which differs between the two sides where the stride is 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        if (top, left) == (bottom, right):
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _efficientnet_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class EfficientNetBlock(nn.Module):
    """Inverted bottleneck of EfficientNet-Lite."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.has_expansion = expansion != 1
        self.use_residual = stride == 1 and inputs == outputs
        if self.has_expansion:
            self._expand_conv = SamePadConv2d(inputs, hidden, 1, bias=False)
            self._bn0 = _efficientnet_norm(hidden)
        self._depthwise_conv = SamePadConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _efficientnet_norm(hidden)
        self._project_conv = SamePadConv2d(hidden, outputs, 1, bias=False)
        self._bn2 = _efficientnet_norm(outputs)
        self._relu = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        y = self._relu(self._bn0(self._expand_conv(x))) if self.has_expansion else x
        y = self._relu(self._bn1(self._depthwise_conv(y)))
        projected: Tensor = self._bn2(self._project_conv(y))
        return projected + x if self.use_residual else projected


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for images of any size, (x - 127) / 128 with x in 0..255."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = SamePadConv2d(3, _EFFICIENTNET_STEM, 3, 2, bias=False)
        self._bn0 = _efficientnet_norm(_EFFICIENTNET_STEM)
        blocks, inputs = [], _EFFICIENTNET_STEM
        for repeats, kernel, first_stride, expansion, outputs in _EFFICIENTNET_LITE0_STAGES:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                blocks.append(EfficientNetBlock(inputs, outputs, kernel, stride, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SamePadConv2d(inputs, _EFFICIENTNET_HEAD, 1, bias=False)
        self._bn1 = _efficientnet_norm(_EFFICIENTNET_HEAD)
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(_EFFICIENTNET_HEAD, num_classes)
        self._relu = nn.ReLU6()
        _initialize_convolutions(self)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps images [N, 3, H, W] to logits [N, num_classes]."""
        x = self._relu(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = self._relu(self._bn1(self._conv_head(x)))
        x = self._avg_pooling(x).flatten(start_dim=1)
        logits: Tensor = self._fc(self._dropout(x))
        return logits
