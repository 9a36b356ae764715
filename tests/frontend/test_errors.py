"""What cannot be imported, and how it says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pockc.errors import UserError
from pockc.frontend.torch import trace

pytestmark = pytest.mark.torch


class Scatter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0)


class Many(nn.Module):
    """Three operators and a dtype that are not supported, one of them in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.select = Scatter()
        self.up = nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.select(self.conv(x))
        x = x + torch.sort(x, dim=1).values
        x = x * x.double().sum().float()
        up: Tensor = self.up(x)
        return up


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x)
        return pooled


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class DataShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        positive: Tensor = x[x > 0].sum()
        return positive


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.no_grad():
            z = self.second(y) * 2
        total: Tensor = y.detach() + y + z
        return total


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(6)


class Passed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> int:
        return 3


MODELS: dict[str, Callable[[], nn.Module]] = {
    "several_operators": Many,
    "one_operator": Single,
    "branch_on_data": Branch,
    "shape_from_data": DataShape,
    "changed_buffer": Counter,
    "stopped_gradient": Cut,
    "random_numbers": Noise,
    "no_tensor": Nothing,
    "double_parameters": lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).double().eval(),
    "half_parameters": lambda: nn.Conv2d(3, 2, 3).half(),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_message(name: str, golden: Callable[[str], None]) -> None:
    model = MODELS[name]()
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)

    with pytest.raises(UserError) as raised:
        trace(model, (torch.ones(2, 3, 6, 6, dtype=dtype),), loss="mse", batchnorm="fold")

    golden(f"{raised.value}\n")


def test_unknown_input_name_is_told(golden: Callable[[str], None]) -> None:
    with pytest.raises(UserError) as raised:
        trace(Single(), {"y": torch.ones(1, 3, 8, 8)}, loss="mse", batchnorm="fold")

    golden(f"{raised.value}\n")


def test_too_many_inputs_are_told() -> None:
    with pytest.raises(UserError, match=r"2 example inputs, but forward of Single takes 1"):
        trace(Single(), (torch.ones(1), torch.ones(1)), loss="mse", batchnorm="fold")


def test_inputs_that_are_no_tensors_are_told() -> None:
    with pytest.raises(UserError, match="the example input 'x' is a list"):
        trace(Single(), {"x": [1.0]}, loss="mse", batchnorm="fold")  # type: ignore[dict-item]  # that is the point


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16])
def test_inputs_of_other_dtypes_are_told(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")

    with pytest.raises(UserError, match=f"the input 'x' is {name}"):
        trace(Passed(), {"x": torch.ones(1, 3, dtype=dtype)}, loss="mse", batchnorm="fold")
