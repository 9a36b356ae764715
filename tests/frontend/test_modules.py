"""Small modules, imported and evaluated by the interpreter, against their own output in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pockc.frontend.torch import Imported, trace
from pockc.interp import evaluate
from pockc.verify import verify

pytestmark = pytest.mark.torch


class Function(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 8)), generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, inputs: dict[str, Tensor], tolerance: float = 1e-5, **options: Any) -> Imported:
    """Imports, verifies, evaluates, and compares every output with PyTorch's."""
    options = {"loss": "mse", "batchnorm": "fold", **options}
    imported = trace(model, inputs, **options)
    verify(imported.graph, "imported")
    outputs, _ = evaluate(imported.graph, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        wanted = model(**inputs)
    tensors = [wanted] if isinstance(wanted, Tensor) else [t for t in wanted if isinstance(t, Tensor)]
    assert len(outputs) == len(tensors)
    for got, expected in zip(outputs.values(), tensors, strict=True):
        assert got.shape == tuple(expected.shape)
        np.testing.assert_allclose(got, expected.numpy(), rtol=tolerance, atol=tolerance)
    return imported


ACTIVATIONS: dict[str, nn.Module] = {
    str(module): module
    for module in (
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.Hardswish(), nn.Hardsigmoid(),
        nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softplus(2.0), 
        nn.LeakyReLU(0.2),
        nn.ELU(0.7), nn.SELU(), nn.CELU(0.6), nn.Mish(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.PReLU(4),
        nn.Threshold(0.1, 2.0), nn.GLU(dim=1), nn.Softmax(dim=-1), nn.Softmax(dim=1), nn.LogSoftmax(dim=1),
        nn.Hardshrink(0.3), nn.Softshrink(0.3), nn.Identity(), nn.Softmin(dim=1),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_equals_pytorch(name: str) -> None:
    check(nn.Sequential(ACTIVATIONS[name]), {"input": image()})


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "conv_grouped_dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False), (2, 4, 7, 8)),
    "conv_depthwise": (nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4), (2, 4, 7, 8)),
    "conv_same": (nn.Conv2d(4, 3, 4, padding="same"), (2, 4, 7, 8)),
    "conv_valid": (nn.Conv2d(4, 3, 2, padding="valid"), (2, 4, 7, 8)),
    "conv_unbatched": (nn.Conv2d(4, 3, 3), (4, 7, 8)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv1d_same": (nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "conv1d_unbatched": (nn.Conv1d(4, 6, 3), (4, 9)),
    "linear": (nn.Linear(8, 3), (2, 5, 8)),
    "linear_vector": (nn.Linear(8, 3, bias=False), (8,)),
    "mlp": (nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 2)), (2, 4, 6, 8)),
    "layer_norm": (nn.LayerNorm(8), (2, 4, 8)),
    "layer_norm_two_axes": (nn.LayerNorm((6, 8)), (2, 4, 6, 8)),
    "layer_norm_without_bias": (nn.LayerNorm(8, bias=False), (2, 4, 8)),
    "layer_norm_plain": (nn.LayerNorm(8, elementwise_affine=False), (2, 4, 8)),
    "rms_norm": (nn.RMSNorm(8), (2, 4, 8)),
    "rms_norm_plain": (nn.RMSNorm(8, eps=1e-3, elementwise_affine=False), (2, 4, 8)),
    "group_norm": (nn.GroupNorm(2, 4), (2, 4, 6, 8)),
    "instance_norm": (nn.InstanceNorm2d(4, affine=True), (2, 4, 6, 8)),
    "batch_norm_1d": (nn.BatchNorm1d(4), (5, 4)),
    "batch_norm_1d_length": (nn.BatchNorm1d(4), (5, 4, 3)),
    "batch_norm_2d": (nn.BatchNorm2d(4), (2, 4, 6, 8)),
    "batch_norm_plain": (nn.BatchNorm2d(4, affine=False), (2, 4, 6, 8)),
    "batch_norm_stateless": (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 6, 8)),
    "max_pool": (nn.MaxPool2d(3, 2, 1), (2, 4, 7, 8)),
    "max_pool_ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 4, 6, 8)),
    "max_pool_dilated": (nn.MaxPool2d(2, 1, dilation=2), (2, 4, 6, 8)),
    "avg_pool": (nn.AvgPool2d(3, 2, 1), (2, 4, 7, 8)),
    "avg_pool_exclusive": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 4, 7, 8)),
    "avg_pool_ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), (2, 4, 6, 8)),
    "avg_pool_ceil_exclusive": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 4, 6, 8)),
    "avg_pool_divisor": (nn.AvgPool2d(2, divisor_override=3), (2, 4, 6, 8)),
    "adaptive_avg_global": (nn.AdaptiveAvgPool2d(1), (2, 4, 6, 8)),
    "adaptive_avg": (nn.AdaptiveAvgPool2d((3, 2)), (2, 4, 6, 8)),
    "adaptive_avg_identity": (nn.AdaptiveAvgPool2d((6, 8)), (2, 4, 6, 8)),
    "adaptive_avg_1d": (nn.AdaptiveAvgPool1d(3), (2, 4, 6)),
    "adaptive_max": (nn.AdaptiveMaxPool2d((3, 2)), (2, 4, 6, 8)),
    "adaptive_max_global": (nn.AdaptiveMaxPool2d(1), (2, 4, 16, 18)),
    "zero_pad": (nn.ZeroPad2d((1, 2, 0, 3)), (2, 4, 6, 8)),
    "constant_pad": (nn.ConstantPad2d((1, -2, -1, 3), 0.5), (2, 4, 6, 8)),
    "upsample": (nn.Upsample(scale_factor=2), (2, 4, 6, 8)),
    "pixel_shuffle": (nn.PixelShuffle(2), (2, 4, 6, 8)),
    "dropout_off": (nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5)), (2, 4, 6, 8)),
    "channel_shuffle": (nn.ChannelShuffle(2), (2, 4, 6, 8)),
    "unflatten": (nn.Unflatten(1, (2, 2)), (2, 4, 6, 8)),
    "encoder_layer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    "encoder_layer_gelu": (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True), (5, 2, 8)),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layer_equals_pytorch(name: str) -> None:
    model, shape = LAYERS[name]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)

    check(nn.Sequential(model.eval()), {"input": image(*shape)})


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (2 * x + 1 - x / 3) * x - (1 - x) / (x * x + 1),
    "alpha": lambda x: torch.add(x, x, alpha=3) + torch.sub(x, 1, alpha=2) + torch.rsub(x, 1, alpha=2),
    "integers_times_floats": lambda x: x * torch.arange(8) + torch.arange(8) / 2,
    "powers": lambda x: x**2 + x**3 + x.abs() ** 0.5 + (x.abs() + 1) ** -0.5 + (x.abs() + 1) ** 1.7 + 2**x,
    "exponentials": lambda x: x.exp() + x.expm1() + x.exp2() + x.abs().log1p() + (x.abs() + 1).log2(),
    "trigonometry": lambda x: x.sin() + x.cos() + x.erf() + (x / 4).tan(),
    "rounding": lambda x: x.floor() + x.ceil() * 2 + x.trunc() * 3 + x.sign() + x.abs() + x.neg(),
    "modulo": lambda x: torch.div(x, 0.3, rounding_mode="floor") + torch.remainder(x, 0.7) + x % 1.5,
    "clamps": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp(max=0.2) + x.clamp_min(-1),
    "clamp_by_tensors": lambda x: x.clamp(x * 0 - 1, x * 0 + 0.5),
    "extrema": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "comparisons": lambda x: (x > 0).float() + (x <= 0.5).float() * 2 + (x != x.abs()) + x.eq(x).long() + (x < -x),
    "logic": lambda x: ((x > 0) & (x < 1) | ~(x > -1) ^ (x > 2)).float() + torch.logical_not(x),
    "where": lambda x: torch.where(x > 0, x, x * 0.1) + torch.where(x > 0, 1.0, 2.0) + torch.where(x > 1, x, 0),
    "masked_fill": lambda x: x.masked_fill(x < 0, -5.0),
    "in_place": lambda x: (x * 2).add_(1).mul_(x).clamp_(0, 3),
    "assigned_slice": lambda x: _assigned(x),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3) + torch.addcmul(x, x, x, value=0.5) + torch.addcdiv(x, x, x.exp()),
    "casts": lambda x: (x * 3).int().float() + (x * 3).long() + x.bool().float(),
    "sums": lambda x: x.sum() + x.sum(-1, keepdim=True) + x.sum((1, 2), keepdim=True) + (x > 0).sum(),
    "means": lambda x: x.mean(dim=(2, 3), keepdim=True) + x.mean(1, keepdim=True) + x.mean(),
    "spatial_mean": lambda x: x.mean((-1, -2)),
    "extreme_values": lambda x: x.amax(-1) + x.amin((3,)) + x.max(dim=3).values + x.min(dim=-1)[0] + x.max() + x.min(),
    "positions": lambda x: (x.argmax(-1), x.argmin(1, keepdim=True), x.argmax(), x.max(dim=2).indices),
    "moments": lambda x: x.var(1) + x.std(dim=1) + x.var((1,), correction=0) + torch.var_mean(x, 1)[1],
    "norms": lambda x: x.norm(dim=1) + x.norm(p=1, dim=1) + torch.linalg.vector_norm(x, float("inf"), 1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "truths": lambda x: (x > 2).any(-1).float() + (x < 2).all(-1).float() + (x > 0).any() + (x < 9).all(),
    "cumsum": lambda x: x.cumsum(1) + (x > 0).cumsum(-1),
    "logsumexp": lambda x: x.logsumexp(1) + x.logsumexp((1,), keepdim=False),
    "views": lambda x: x.view(2, -1).reshape(2, 4, 48).flatten(1).unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(),
    "permutations": lambda x: x.permute(0, -1, 1, 2).transpose(1, -1).transpose(0, 1).mT,
    "two_axes": lambda x: x[0, 0].t() @ x[1, 1],
    "expand": lambda x: x[:1, :, :1].expand(3, -1, 5, 8) + x[0, 0, 0].expand(3, 4, 5, 8),
    "repeats": lambda x: (x.repeat(2, 1, 3, 1), x[0, 0].repeat(2, 1, 2), x.tile(2, 2), x.repeat_interleave(2, dim=1)),
    "joins": lambda x: (torch.cat([x, x * 2], -1), torch.stack([x, x + 1], 1)),
    "join_with_constant": lambda x: torch.cat([x, torch.arange(8.0).expand(2, 4, 6, 8), torch.tensor([])]),
    "splits": lambda x: (*torch.split(x, 3, 3), *x.chunk(3, 2), *torch.split(x, [1, 3], 1), *x.unbind(1)[:2]),
    "slices": lambda x: (x[:, 1:3, ::2], x[..., -3:-1], x[1, :, 2], x[:, -1], x.narrow(3, 2, 4), x.select(1, -2)),
    "index_by_constants": lambda x: (x[:, [0, 2, 1]], x[:, :, [3, 3], [1, -1]], x.index_select(2, torch.tensor([5]))),
    "index_range": lambda x: x[:, torch.arange(1, 3)],
    "index_by_values": lambda x: (
        x[:, :, (x[0, 0, 0] > 0).long()],
        x[torch.arange(2), x[:, 0, 0].argmin(-1).clamp(max=3) - 4],
    ),
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "gather_from_constants": lambda x: (
        torch.zeros(6, 3, dtype=torch.int64).gather(1, (x[0, 0] > 0).long()),
        torch.arange(18).view(6, 3).gather(1, (x[0, 0] > 0).long()),
        torch.arange(18).view(6, 3)[(x[0, 0, 0] > 0).long()],
        (x[0, 0] > 0).gather(1, (x[0, 0] > 0).long()),
    ),
    "flips": lambda x: (x.flip(-1), x.flip((1, 2)), x.roll(2, 1), x.roll((1, -1), (2, 3))),
    "pads": lambda x: (F.pad(x, (1, 2)), F.pad(x, (0, 0, -1, 1)), F.pad(x, (1, 1), value=3.0)),
    "pad_of_booleans": lambda x: F.pad(x > 0, (1, 0)),
    "triangles": lambda x: (x.tril(), x.triu(1), torch.ones(6, 6).tril() @ x),
    "constants": lambda x: torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 2) + x.new_zeros(8),
    "matmuls": lambda x: (x @ x.mT, x @ x[0, 0, 0], x[0, 0, 0] @ x.mT, x[0, 0, 0] @ x[0, 0, 1], x[0].bmm(x[1].mT)),
    "einsum": lambda x: (torch.einsum("bchw,bcxw->bchx", x, x), torch.einsum("bchw,c->bhw", x, x[0, :, 0, 0])),
    "addmm": lambda x: torch.addmm(x[0, 0, 0, :6], x[0, 0], x[0, 1].T, beta=0.5, alpha=2),
    "outer": lambda x: torch.outer(x[0, 0, 0], x[0, 1, 0]),
    "baddbmm": lambda x: torch.baddbmm(x[0, :, :, :6], x[0], x[1].mT) + torch.mv(x[0, 0], x[0, 0, 0]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x + 1, x),
    "attention_causal": lambda x: F.scaled_dot_product_attention(x, x, x * 2, is_causal=True, scale=0.3),
    "attention_three_axes": lambda x: F.scaled_dot_product_attention(x[0], x[1], x[0]),
    "attention_grouped": lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, 1:3], enable_gqa=True),
    "attention_bool_mask": lambda x: F.scaled_dot_product_attention(x, x, x, (x[:, :1, :, :6] > -1)),
    "attention_float_mask": lambda x: F.scaled_dot_product_attention(x, x, x, x[:, :1, :1, :6] * 3),
    "attention_two_axes_mask": lambda x: F.scaled_dot_product_attention(x, x, x, x[0, 0, :, :6] > -1),
    "attention_constant_mask": lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(6, 6).triu(-1).bool()),
    "masked_mean": lambda x: (x * (x > 0).float()).sum(1) / (x > 0).float().sum(1).clamp(min=1e-9),
    "losses": lambda x: F.mse_loss(x, x * 2) + F.l1_loss(x, -x) + F.huber_loss(x, x * 3) + F.smooth_l1_loss(x, x * 0),
    "binary_losses": lambda x: F.binary_cross_entropy(x.sigmoid(), (x > 0).float())
    + F.binary_cross_entropy_with_logits(x, (x > 0).float(), pos_weight=torch.tensor(2.0)),
    "cross_entropies": lambda x: F.cross_entropy(x[:, :, 0, 0], torch.tensor([1, 3]), label_smoothing=0.1)
    + F.cross_entropy(x, (x[:, 0] > 0).long(), ignore_index=0)
    + F.cross_entropy(x, x.softmax(1))
    + F.nll_loss(x.log_softmax(1), (x[:, 0] > 0).long()),
    "kl_divergence": lambda x: F.kl_div(x.log_softmax(-1), (x * 2).softmax(-1), reduction="batchmean"),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x * x, dim=1),
    "input_returned": lambda x: (x, x + 1),
    "constant_returned": lambda x: (torch.arange(3), x),
    "float64_number": lambda x: x * torch.tensor(0.5, dtype=torch.float64),
}  # fmt: skip


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = 2 * x[:, :2]
    y[:, :, 0] = 1.5
    y[0] += 1
    return y


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_equals_pytorch(name: str) -> None:
    check(Function(FUNCTIONS[name]), {"x": image()}, tolerance=2e-5)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, padding_idx=1)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.embedding(ids) * (ids != 1).unsqueeze(-1)
        return rows


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_takes_integers_and_remembers_padding(dtype: torch.dtype) -> None:
    imported = check(Lookup(), {"ids": torch.tensor([[1, 4], [9, 0]], dtype=dtype)})

    node = next(node for node in imported.graph.nodes if node.op == "embedding")
    assert node.attrs["padding_index"] == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_inputs_of_other_dtypes_work_through_casts(dtype: torch.dtype) -> None:
    check(Function(lambda x: x.float().mean(1)), {"x": (image() * 50).to(dtype)})
