"""Networks that others wrote, exported: called twice, cloned, normed in every way, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from export.graph import unread
from export.pipeline import export
from runtime.errors import ModelError
from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.models import factory
from train.quantization.description import describe
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe


def conv(channels: int, out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, **options)


class Net(nn.Module):
    """Two convolutions and a head; `middle` stands between the first one and its ReLU."""

    def __init__(self, middle: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle = conv(1, 8), middle or nn.Identity()
        self.second, self.head = second or conv(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class Cloned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.third = conv(8, 8)
        self.third.load_state_dict(self.second.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.third(x)).mean((2, 3)))


class HeadFirst(nn.Module):
    """Its modules are registered in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second, self.first = nn.Linear(8, 10), conv(8, 8, bias=False), conv(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


class HeadTwice(nn.Module):
    """The layer that gives the logits stands before another one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.head = nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.head(F.relu(self.flat(x.view(x.size(0), -1))))))


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(1, 8), conv(8, 8), nn.Linear(8, 10)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        nn.init.constant_(self.norms[1].bias, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.norms[0](x)) + F.relu(self.norms[1](x))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class ZeroResidual(nn.Module):
    """As torchvision makes it with zero_init_residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.head = conv(1, 8), conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 10)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(F.relu(x + self.norm(self.second(x))).mean((2, 3)))


class OwnNormalization(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.25 * torch.tensor(0.5))


class OwnToken(nn.Module):
    """Asks the image for its batch, and puts as many tokens before the patches, as torchvision's ViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(1, 8, 4, stride=4), nn.Linear(8, 8), nn.Linear(8, 10)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        torch._assert(height == width, "expected a square")
        patches = self.patches(x).reshape(images, 8, -1).permute(0, 2, 1)
        x = torch.cat([self.token.expand(images, -1, -1), patches], dim=1)
        return self.head(F.gelu(self.mix(x)).mean(1))


class ConvOfAnotherName(nn.Conv2d):
    pass


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "called_twice": CalledTwice,
    "cloned": Cloned,
    "head_first": HeadFirst,
    "head_twice": HeadTwice,
    "two_norms": TwoNorms,
    "zero_residual": ZeroResidual,
    "own_normalization": OwnNormalization,
    "own_token": OwnToken,
    "group_norm": lambda: Net(nn.GroupNorm(2, 8)),
    "instance_norm": lambda: Net(nn.InstanceNorm2d(8, affine=True)),
    "norm_without_affine": lambda: Net(nn.BatchNorm2d(8, affine=False)),
    "sync_norm": lambda: Net(nn.SyncBatchNorm(8)),
    "derived_conv": lambda: Net(second=ConvOfAnotherName(8, 8, 3, padding=1)),
    "standardized_conv": lambda: Net(second=StandardizedConv(8, 8, 3, padding=1)),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm_without_statistics": (
        lambda: Net(nn.BatchNorm2d(8, track_running_stats=False)),
        r"^middle \(BatchNorm2d\): has no running statistics, .* track_running_stats=True",
    ),
    "weight_norm": (
        lambda: Net(second=parametrizations.weight_norm(conv(8, 8))),
        r"^second \(Conv2d\): its weight is computed by WeightNorm; fold it first",
    ),
    "spectral_norm": (
        lambda: Net(second=parametrizations.spectral_norm(conv(8, 8))),
        r"^second \(Conv2d\): its weight is computed by SpectralNorm; fold it first",
    ),
    "old_weight_norm": (
        lambda: Net(second=nn.utils.weight_norm(conv(8, 8))),
        r"^second \(Conv2d\): its weight is computed before every call; fold it first",
    ),
}


def _factory(make: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    def build(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
        torch.manual_seed(0)
        return make()

    return build


for _name, _make in [*NETWORKS.items(), *((name, make) for name, (make, _) in REFUSED.items())]:
    setattr(sys.modules[__name__], _name, _factory(_make))


def started(name: str, digits: ImageData, bits: int) -> Checkpoint:
    factory.allow(f"{__name__}:{name}")
    return loop.start(f"{__name__}:{name}", digits, QuantSpec(bits), default_recipe("digits"))


@pytest.mark.parametrize("target", ["openvino", "ort"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_exports_exactly_with_its_map(name: str, target: str, digits: ImageData) -> None:
    exported = export(started(name, digits, 4), target=target)
    assert exported.engine is not None
    assert exported.engine.changed_classes == exported.engine.undecided_classes
    # The bias of a layer that is called twice cannot be whole steps of both accumulators; ONNX Runtime rounds it.
    rounded = target == "ort" and name in ("called_twice", "head_twice")
    assert exported.engine.median_difference < (0.01 if rounded else 1e-3)
    assert exported.verification.max_logit_steps < 0.1
    assert exported.verification.weight_codes > 0
    assert exported.gradients is not None
    assert unread(exported.model) == []


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name: str, digits: ImageData) -> None:
    with pytest.raises(ModelError, match=REFUSED[name][1]) as raised:
        started(name, digits, 4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("cloned", ["first", "second", "third", "head"]),
        ("called_twice", ["first", "second", "second_second", "head"]),
    ],
)
def test_each_layer_has_codes_under_its_own_name(name: str, layers: list[str], digits: ImageData) -> None:
    """PyTorch's exporter merges what is equal."""
    model: onnx.ModelProto = export(started(name, digits, 4), saliency=False).model
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {n.removeprefix("network.").removesuffix(".codes") for n in constants if n.endswith(".codes")} == set(
        layers
    )
    assert np.array_equal(constants[f"network.{layers[1]}.codes"], constants[f"network.{layers[2]}.codes"])
    read = {name for node in model.graph.node for name in node.input}
    assert {n for n in constants if n.endswith((".codes", ".scale", ".bias"))} <= read


def test_what_stays_float_is_told(digits: ImageData) -> None:
    def of(name: str) -> dict[str, int | None]:
        return {row.name: row.bits for row in describe(started(name, digits, 4).network())}

    assert of("derived_conv")["second"] == 4
    assert of("standardized_conv")["second.weight"] is None
    assert of("sync_norm") == {"first": 8, "second": 4, "head": 8, "middle": None}
