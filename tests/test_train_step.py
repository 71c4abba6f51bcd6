from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train import loop
from train.data.images import ImageData
from train.losses.methods import new_guidance
from train.losses.saliency import filling
from train.quantization.spec import QuantSpec
from train.recipe import METHODS, default_recipe
from train.step import compute_gradients, loss_terms, new_optimizer, set_lr


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_loss_and_nothing_else(digits: ImageData, method: str) -> None:
    """Quantizing once a step and leaving out the images' gradient must not change the parameters' own."""
    recipe = default_recipe("digits", method)
    checkpoint = loop.start("cnn2", digits, QuantSpec(4), recipe)
    images, labels = checkpoint.input.normalize(digits.train_images[:64]), digits.train_labels[:64]
    index, fill = torch.arange(64), filling(images, "zero")
    cheap, literal = checkpoint.network(), checkpoint.network()
    for _ in range(2):  # the second time, the first gradients must be gone
        compute_gradients(cheap, new_guidance(recipe, 64), images, labels, index, fill, recipe)
    loss_terms(literal, images, labels, index, fill, recipe, new_guidance(recipe, 64)).loss.backward()
    for (name, a), b in zip(cheap.named_parameters(), literal.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name


def test_optimizer_decays_weights_and_alphas_each_by_their_own(digits: ImageData) -> None:
    recipe = default_recipe("digits")
    model = loop.start("cnn2", digits, QuantSpec(4, "lsq"), recipe).network()
    optimizer = new_optimizer(model, replace(recipe, alpha_lr=0.1))
    groups = optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [4, 3, 8]  # weights; alphas; biases and learned steps
    assert [group["weight_decay"] for group in groups] == [recipe.weight_decay, recipe.alpha_decay, 0.0]
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in groups] == [0.5, 0.05, 0.5]


def test_alphas_without_a_learning_rate_stay(digits: ImageData, tmp_path: Path) -> None:
    recipe = replace(default_recipe("digits", "plain"), epochs=1, alpha_lr=0.0)
    started = loop.start("cnn2", digits, QuantSpec(8), recipe)
    before = {k: v.clone() for k, v in started.state_dict.items()}
    finished = loop.fit(started, digits, tmp_path / "ckpt.pt")
    for name, value in finished.state_dict.items():
        assert torch.equal(value, before[name]) == name.endswith((".alpha", "x_grid.scale")), name


@pytest.mark.parametrize("method", METHODS)
def test_what_the_user_froze_stays(digits: ImageData, method: str) -> None:
    """A network whose first layer is frozen trains by every method, and that layer keeps its weights."""
    recipe = default_recipe("digits", method)
    checkpoint = loop.start("cnn2", digits, QuantSpec(8), recipe)
    network = checkpoint.network().train()
    frozen = [p.requires_grad_(False) for p in network.conv1.parameters()]
    images, labels = checkpoint.input.normalize(digits.train_images[:64]), digits.train_labels[:64]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    guidance, optimizer = new_guidance(recipe, 64), new_optimizer(network, recipe)
    set_lr(optimizer, 0.1)
    compute_gradients(network, guidance, images, labels, torch.arange(64), filling(images, "zero"), recipe)
    optimizer.step()
    moved = {name: not torch.equal(p, before[name]) for name, p in network.named_parameters()}
    stays = {name for name, p in network.named_parameters() if any(p is f for f in frozen)}
    assert stays
    assert stays == {name for name, is_moved in moved.items() if not is_moved}
