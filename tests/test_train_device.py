from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from train import loop
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.device import arrange, computes_bfloat16_slowly, in_precision, place
from train.losses.methods import new_guidance
from train.losses.saliency import filling
from train.quantization.quantizers import PACT
from train.quantization.spec import QuantSpec
from train.recipe import METHODS, default_recipe
from train.step import compute_gradients


def test_bfloat16_returns_float32_logits_near_those_of_float32(
    digits: ImageData, digits_checkpoint: Checkpoint
) -> None:
    images = digits_checkpoint.input.normalize(digits.test_images)
    exact = digits_checkpoint.network()(images).detach()
    model = digits_checkpoint.network()
    rounded = in_precision(place(model, "cpu"), "bfloat16")(images).detach()
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.1 * float(exact.abs().max())
    assert float((rounded.argmax(1) == exact.argmax(1)).float().mean()) > 0.98
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model(images), exact)  # what is evaluated and saved has not changed


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists a processor's instructions there")
def test_bfloat16_is_called_slow_where_the_processor_lists_no_instructions_for_it() -> None:
    lines = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.lower().startswith(("flags", "features"))
    ]
    assert computes_bfloat16_slowly("cpu") == (not {"avx512_bf16", "amx_bf16", "bf16"} & set(lines[0].split()))
    assert not computes_bfloat16_slowly("cuda")


def test_bfloat16_activations_keep_whole_codes(digits: ImageData, digits_checkpoint: Checkpoint) -> None:
    model = digits_checkpoint.network()
    trained = in_precision(place(model, "cpu"), "bfloat16")
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, PACT):
            module.register_forward_hook(
                lambda module, _, y, name=name: seen.update({name: y.float() / module.scale.item()})
            )
    with torch.no_grad():
        trained(digits_checkpoint.input.normalize(digits.test_images[:64]))
    assert len(seen) == 3
    for codes in seen.values():
        assert float((codes - codes.round()).abs().max()) <= 127 / 256  # half a bfloat16 step at code 127
        assert 0 <= float(codes.min()) <= float(codes.max()) < 128


def test_bfloat16_reaches_every_parameter_with_float32_gradients(
    digits: ImageData, digits_checkpoint: Checkpoint
) -> None:
    model = digits_checkpoint.network()
    images, labels = digits_checkpoint.input.normalize(digits.train_images[:64]), digits.train_labels[:64]
    gradients = []
    for network in (model, in_precision(place(model, "cpu"), "bfloat16")):
        model.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[1].dtype == torch.float32
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.97


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["cnn2", "resnet20"])
def test_every_method_gives_the_same_in_the_memory_format_of_gpus(
    digits: ImageData, arch: str, method: str
) -> None:
    recipe = default_recipe("digits", method)
    checkpoint = loop.start(arch, digits, QuantSpec(4, "lsq"), recipe)
    images, labels = checkpoint.input.normalize(digits.train_images[:32]), digits.train_labels[:32]
    losses, gradients = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = checkpoint.network().to(memory_format=memory_format).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # its mask is drawn in the order of the memory
        arranged = images.contiguous(memory_format=memory_format)
        fill = filling(arranged, "random", torch.Generator().manual_seed(0))
        terms = compute_gradients(
            model, new_guidance(recipe, 32), arranged, labels, torch.arange(32), fill, recipe
        )
        losses.append(terms.loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    # Sums in another order flip a few 4-bit codes, and those a few masked pixels.
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.9


def _depthwise() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 6, 3, groups=6))


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 4, 5)])
def test_arranging_changes_no_value(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    assert torch.equal(arrange(images, torch.nn.Conv2d(3, 6, 3)), images)
    assert torch.equal(arrange(images, _depthwise()), images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_depthwise_networks_train_in_channels_last_in_float32_alone(memory_format: torch.memory_format) -> None:
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    others = (
        torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(4, 4, 3, groups=2), torch.nn.Conv2d(1, 4, 3, groups=1),
        in_precision(_depthwise(), "bfloat16"),
    )  # fmt: skip
    assert arrange(images, _depthwise()).is_contiguous(memory_format=torch.channels_last)
    for model in others:
        assert arrange(images, model).is_contiguous()
