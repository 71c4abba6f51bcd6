"""A checkpoint's networks in torch: fake-quantized as trained, and with the quantizers off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.networks.network import Network
from runtime.errors import OptionError
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.choices import FLOAT_BITS

# Images in one forward pass. Activations of 64 MNIST images are so large that their memory goes back to the system
# after every pass and comes as page faults in the next: a quarter of the time.
_PASS = 32


def checkpoint_networks(file: Path, name: str, *, threads: int | None, with_float: bool) -> list[Network]:
    """Return the network of a checkpoint and, if asked for and not the same, its float form.

    Args:
        file: checkpoint.
        name: of the networks.
        threads: CPU threads of torch; None leaves the number as it is.
        with_float: see `bench.networks.opened.open_networks`.

    Raises:
        FileError: no checkpoint of this project.
        OptionError: the float form needs what is not installed.
    """
    checkpoint = checkpoints.load(file)
    if threads is not None:
        torch.set_num_threads(threads)
    trained = checkpoint.network()
    if checkpoint.quant.bits == FLOAT_BITS:
        return [as_network(trained, checkpoint, name, "float")]
    networks = []
    if with_float:
        networks.append(as_network(_float_form(trained, checkpoint), checkpoint, name, "float"))
    return [as_network(trained, checkpoint, name, f"{checkpoint.quant.bits} bit"), *networks]


def as_network(module: nn.Module, checkpoint: Checkpoint, name: str, precision: str) -> Network:
    """Return a module in torch as a network to measure; it is no longer fit for training afterwards.

    Args:
        module: in evaluation mode, from normalized images [N, C, H, W] to logits [N, K].
        checkpoint: whose images and classes it knows.
        name: of the network.
        precision: of the network, for people.
    """
    module.requires_grad_(False)
    # A parametrization would quantize the same weights again in every forward pass.
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)

    def normalized(images: np.ndarray) -> Tensor:
        return checkpoint.input.normalize(torch.from_numpy(images).permute(0, 3, 1, 2))

    def logits(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [module(part) for part in normalized(images).split(_PASS)]
        found: np.ndarray = torch.cat(parts).numpy()
        return found

    def explain(images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = normalized(images).requires_grad_()
        found: Tensor = module(x)
        given = torch.from_numpy(target)
        chosen = torch.where(given < 0, found.argmax(1), given)
        (gradient,) = torch.autograd.grad(found.gather(1, chosen.unsqueeze(1)).sum(), x)
        return found.detach().numpy(), gradient.abs().amax(1).numpy()

    return Network(
        name=name,
        precision=precision,
        engine=f"torch {torch.__version__}",
        data=checkpoint.recipe.data_name,
        shape=(*checkpoint.input.size, checkpoint.input.channels),
        classes=checkpoint.classes,
        logits=logits,
        explain=explain,
    )


def _float_form(network: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    try:
        from export.deploy_form import deploy_form
    except ImportError as error:
        raise OptionError(f"--float: needs {error.name}; pip install 'clearpact[export]'") from None
    return deploy_form(network, checkpoint.input, int8=False).network
