"""The mean of several runs' weights: as a checkpoint like any other, with BatchNorm's statistics of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from runtime.errors import FileError, OptionError
from tests.toy_models import randomize_norms
from train import checkpoint as checkpoints
from train import loop
from train.average import average, main
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.quantization.spec import QuantSpec
from train.recipe import default_recipe


@pytest.fixture(scope="module")
def second_run(digits: ImageData, digits_checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One more epoch from the shared checkpoint, by another method, in a run's folder."""
    path = tmp_path_factory.mktemp("second") / "ckpt.pt"
    recipe = dataclasses.replace(
        default_recipe("digits", "smoot"), epochs=1, lr=0.01, seed=1, init=str(digits_checkpoint_path)
    )
    loop.fit(loop.start("cnn2", digits, QuantSpec(8), recipe), digits, path)
    return path


def test_the_mean_is_a_checkpoint_with_its_own_accuracy(
    digits: ImageData,
    digits_checkpoint_path: Path,
    second_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "mean.pt"
    main([str(digits_checkpoint_path), str(second_run.parent), "-o", str(output)])
    first, second, found = map(checkpoints.load, (digits_checkpoint_path, second_run, output))
    for name, value in found.state_dict.items():
        both = first.state_dict[name].double() + second.state_dict[name].double()
        assert torch.equal(value, both.div(2).float())
    logits = found.network()(found.input.normalize(digits.test_images[:]))
    right = (logits.argmax(1) == digits.test_labels).double()
    assert found.test_accuracy == pytest.approx(100 * right.mean().item())
    assert found.test_accuracy > 95
    assert (len(found.history), found.recipe.epochs, found.optimizer, found.guidance) == (1, 1, {}, {})
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{found.test_accuracy:6.2f} %  {output}, their mean, on the test split"
    assert [line.split()[0] for line in out[:2]] == [f"{c.test_accuracy:.2f}" for c in (first, second)]


def test_batch_norms_statistics_are_those_of_the_mean_network(digits: ImageData) -> None:
    images, labels = digits.train_images[:256], digits.train_labels[:256]
    few = dataclasses.replace(digits, train_images=images, train_labels=labels)
    runs: list[Checkpoint] = []
    for seed in (0, 1):
        run = loop.start("resnet20", few, QuantSpec(4), dataclasses.replace(default_recipe("digits"), seed=seed))
        runs.append(dataclasses.replace(run, state_dict=randomize_norms(run.network()).state_dict()))
    network = average(runs, few).training_network().eval()
    taken: list[torch.Tensor] = []
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    with torch.no_grad():
        network(runs[0].input.normalize(images))
    (x,) = taken
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    # Of batches of 128, each with its own mean.
    variance = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in x.split(128)]).mean(0)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


def test_only_runs_of_one_network_have_a_mean(
    digits_checkpoint_path: Path, digits_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path, other = str(digits_checkpoint_path), tmp_path / "other.pt"
    with pytest.raises(OptionError, match=r"expected two runs at least, whose weights have a mean$"):
        main([path, "-o", str(tmp_path / "mean.pt")])
    changed = dataclasses.replace(digits_checkpoint, quant=QuantSpec(4))
    checkpoints.save(changed, other)
    with pytest.raises(OptionError, match=f"^{other}: has another quantization than {path} .*that began with one"):
        main([path, str(other), "-o", str(tmp_path / "mean.pt")])
    with pytest.raises(FileError, match="is an input, which is read"):
        main([path, str(other), "-o", str(other)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.pt"]
