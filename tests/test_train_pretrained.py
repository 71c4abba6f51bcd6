"""torchvision's parameters in our networks. The files are made here: nothing is downloaded."""

from __future__ import annotations

import dataclasses
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model_weights

from runtime.errors import FileError, OptionError
from tests.toy_models import randomize_norms
from train import loop
from train.data.images import ImageData
from train.input_spec import InputSpec
from train.models.build import build
from train.models.pretrained import pretrained_state
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe

OURS = InputSpec((64, 64), 3, (128 / 255,) * 3, (0.25,) * 3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of downloaded parameters, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def trained(arch: str, hub: Path) -> nn.Module:
    """Return a network as if trained on ImageNet, its parameters in a file where torchvision looks for them."""
    torch.manual_seed(0)
    model = randomize_norms(getattr(torchvision.models, arch)()).eval()
    torch.save(model.state_dict(), hub / Path(get_model_weights(arch).DEFAULT.url).name)
    return model


@pytest.mark.parametrize(("arch", "head"), [("resnet18", "fc"), ("mobilenet_v2", "classifier.1")])
def test_all_but_the_last_layer_is_the_trained_networks(arch: str, head: str, hub: Path) -> None:
    reference = trained(arch, hub)
    state = pretrained_state(arch, OURS)
    model = build(arch, channels=3, size=(64, 64), classes=10)
    assert model.state_dict().keys() - state.keys() == {f"{head}.weight", f"{head}.bias"}
    changed = {name for name, value in state.items() if not torch.equal(value, reference.state_dict()[name])}
    stem = {"resnet18": ("conv1", "bn1"), "mobilenet_v2": ("features.0.0", "features.0.1")}[arch]
    assert changed == {f"{stem[0]}.weight", f"{stem[1]}.running_mean"}


@pytest.mark.parametrize(("arch", "stem", "border"), [("resnet18", "bn1", 2), ("mobilenet_v2", "features.0.1", 1)])
@pytest.mark.parametrize("channels", [3, 1])
def test_the_first_layer_sees_what_it_was_trained_to_see(
    arch: str, stem: str, border: int, channels: int, hub: Path
) -> None:
    """The same pixels, in ImageNet's normalization and in ours, but for the border that zeros reach."""
    reference = trained(arch, hub)
    spec = InputSpec((64, 64), channels, (128 / 255,) * channels, (0.31,) * channels)
    model = build(arch, channels=channels, size=(64, 64), classes=10).eval()
    model.load_state_dict({**model.state_dict(), **pretrained_state(arch, spec)})
    pixels = torch.randint(0, 256, (2, channels, 64, 64), dtype=torch.uint8)
    theirs = InputSpec((64, 64), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def seen(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        handle = network.get_submodule(stem).register_forward_hook(lambda *args: found.append(args[2].detach()))
        network(images)
        handle.remove()
        return found[0]

    expected = seen(reference, theirs.normalize(pixels.expand(-1, 3, -1, -1)))
    got = seen(model, spec.normalize(pixels))
    inner = (..., slice(border, -border), slice(border, -border))
    assert torch.allclose(got[inner], expected[inner], atol=1e-4)
    assert not torch.allclose(got, expected, atol=1e-2)


def test_a_run_starts_from_them_and_quantizes_them(hub: Path) -> None:
    reference = trained("resnet18", hub)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.arange(40) % 10
    few = ImageData("cifar10", tuple("abcdefghij"), images, labels, images, labels)
    recipe = dataclasses.replace(default_recipe("cifar10"), pretrained=True)
    started = loop.start("resnet18", few, QuantSpec(8), recipe)
    found = started.float_state()
    assert torch.equal(found["layer4.1.conv2.weight"], reference.state_dict()["layer4.1.conv2.weight"])
    assert found["fc.weight"].shape == (10, 512)
    assert started.network()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_without_network_one_line_says_where_the_file_belongs(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(
        FileError,
        match=r"--pretrained: cannot download https://.*resnet18.*\(no route to host\); fetch it elsewhere into "
        r".*checkpoints, or train resnet18 without --pretrained$",
    ):
        pretrained_state("resnet18", OURS)


def test_a_damaged_file_is_named(hub: Path) -> None:
    path = hub / Path(get_model_weights("resnet18").DEFAULT.url).name
    path.write_bytes(b"half a download")
    with pytest.raises(FileError, match=r"--pretrained: .*resnet18.*\.pth is damaged or holds code; delete it"):
        pretrained_state("resnet18", OURS)


def test_code_in_the_file_is_not_run(hub: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"conv1.weight": Code()}, hub / Path(get_model_weights("resnet18").DEFAULT.url).name)
    with pytest.raises(FileError, match="is damaged or holds code"):
        pretrained_state("resnet18", OURS)
    assert not (tmp_path / "was_run").exists()


def test_an_architecture_that_nobody_trained_is_refused() -> None:
    with pytest.raises(
        OptionError, match="--pretrained: nobody has trained deit_tiny for us, expected one of res"
    ):
        pretrained_state("deit_tiny", OURS)


def test_two_starts_are_refused() -> None:
    with pytest.raises(OptionError, match=r"init a\.pt and pretrained: both say where to start from; choose one"):
        dataclasses.replace(default_recipe("digits"), init="a.pt", pretrained=True)
