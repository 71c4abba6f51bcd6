"""Names of convolutions that a class activation map may explain: found, or refused with the nearest ones."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.errors import ModelError

if TYPE_CHECKING:
    from torch import fx, nn

_NEAR = 5


def find_layer(names: Sequence[str], asked: str) -> str:
    """Return the convolution that is meant: the one of this name, or the last whose name begins with it.

    Args:
        names: of all convolutions, in the order of the forward pass; not empty.
        asked: such as "layer2.0.conv1", or "layer2".

    Raises:
        ModelError: there is none; the text tells near names.
    """
    inside = [name for name in names if name == asked or name.startswith(f"{asked}.")]
    if asked in inside:
        return asked
    if inside:
        return inside[-1]
    groups = {name.rsplit(".", depth)[0]: None for name in names for depth in range(1, name.count(".") + 1)}
    near = difflib.get_close_matches(asked, [*names, *groups], _NEAR)
    if near and len(names) > _NEAR:
        known = f"near it are {', '.join(near)}, of {len(names)} from {names[0]} to {names[-1]}"
    elif len(names) > 2 * _NEAR:
        known = f"expected one of {', '.join(names[:_NEAR])}, ... {', '.join(names[-_NEAR:])}"
    else:
        known = f"expected one of {', '.join(names)}"
    raise ModelError(f"layer {asked!r}: no convolution of this name; {known}")


def check_layers(network: nn.Module, image: tuple[int, int, int], asked: Sequence[tuple[str, str]]) -> None:
    """Raise ModelError where a map of a layer is asked for that a network has not, before minutes of calibration.

    Args:
        network: float or quantized; it stays as it is.
        image: channels, height and width.
        asked: pairs of method and layer, from `export.choices.explanations`.
    """
    # torch takes seconds to import, and `find_layer` does without
    from train.quantization.tracing import copied, trace

    layers = [layer for _, layer in asked if layer]
    if layers:
        names = _convolutions(trace(copied(network), evaluated=True), image)
        for layer in layers if names else ():  # without, the graph tells what it has
            find_layer(names, layer)


def _convolutions(network: fx.GraphModule, image: tuple[int, int, int]) -> list[str]:
    """Return the convolutions with an output of several pixels, by the names that their weights will have."""
    import torch
    from torch import nn
    from torch.fx.passes.shape_prop import ShapeProp

    with torch.no_grad():
        ShapeProp(network.eval()).propagate(torch.zeros(1, *image))
    calls = [node for node in network.graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    names = []
    for node in calls:
        if isinstance(network.get_submodule(node.target), nn.Conv2d | nn.ConvTranspose2d):
            # A layer that is called twice becomes two, see `export.deploy_form`.
            name = node.target if times[node.target] == 1 else f"{node.target}_{node.name}"
            if tuple(node.meta["tensor_meta"].shape[2:]) != (1, 1):
                names.append(name)
    return names
