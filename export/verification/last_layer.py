"""The last layer's steps: by how much a code, or an accumulator step, moves a logit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from export.deploy_form import DeployForm, FoldedLayer, FoldedQuantizer, folded_layers


def code_step(form: DeployForm) -> float | None:
    """Return the most by which one code before the last layer moves the gap of two logits; None in float."""
    last, input_scale = _last_layer(form)
    if last.scale is None or last.codes is None or input_scale is None:
        return None
    weight = last.codes.double().flatten(1) * last.scale.double().reshape(-1, 1)
    return float((weight.amax(0) - weight.amin(0)).max() * input_scale) or None


def _last_layer(form: DeployForm) -> tuple[FoldedLayer, Tensor | None]:
    """Return the last layer and the scale of its input's grid, None where it has none."""
    name, last = list(folded_layers(form).items())[-1]
    graph: Any = form.network.graph
    nodes = list(graph.nodes)
    before = nodes[: next(i for i, node in enumerate(nodes) if node.target == name)]
    modules = dict(form.network.named_modules())
    called = [modules[str(node.target)] for node in before if node.op == "call_module"]
    scales = [module.scale for module in called if isinstance(module, FoldedQuantizer) and module.rounds]
    return last, scales[-1] if scales else None


def logit_step(form: DeployForm, logits: Tensor) -> Tensor:
    """Return the value of an accumulator step of the last layer, [K] or []; in float, 1e-4 of a large logit."""
    last, input_scale = _last_layer(form)
    if last.scale is None or input_scale is None:
        return 1e-4 * logits.abs().max().clamp_min(1)
    steps = input_scale * last.scale
    # What comes after it may have other channels.
    return steps if steps.numel() == logits.shape[1] else steps.max()
