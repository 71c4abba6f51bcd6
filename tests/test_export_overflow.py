"""Biases and sums that an engine's int32 cannot hold: kept out of it, or refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from export.pipeline import export
from runtime.errors import ModelError
from train.checkpoint import Checkpoint


def with_weights(checkpoint: Checkpoint, layer: str, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    changed = copy.deepcopy(checkpoint)
    name = f"{layer}.parametrizations.weight.original"
    changed.state_dict[name] = change(changed.state_dict[name])
    return changed


def logits_in_a_users_session(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Return the exported file's logits with ONNX Runtime's own defaults, and the trained network's."""
    images = checkpoint.samples["images"][:64]
    model = export(checkpoint, target="ort", saliency=False).model
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": images.permute(0, 2, 3, 1).contiguous().numpy()})
    with torch.no_grad():
        expected = checkpoint.network()(checkpoint.input.normalize(images)).numpy()
    return np.asarray(found), expected


@pytest.mark.parametrize(
    "change", [lambda w: w * 0, lambda w: w * 1e-12, lambda w: w * 1e-30], ids=["none", "tiny", "tinier"]
)
@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1"])
def test_a_live_bias_over_dead_or_tiny_weights_does_not_wrap(
    digits_checkpoint: Checkpoint, layer: str, change: Callable[[Tensor], Tensor]
) -> None:
    def some(weight: Tensor) -> Tensor:
        # Half of the channels: the others still tell the images apart.
        return torch.cat([change(weight[::2]), weight[1::2]])[
            torch.arange(len(weight)).reshape(2, -1).t().flatten()
        ]

    found, expected = logits_in_a_users_session(with_weights(digits_checkpoint, layer, some))
    changed = (found.argmax(1) != expected.argmax(1)).mean()
    assert changed <= 0.02
    assert np.median(np.abs(found - expected).max(1)) < 0.02


@pytest.mark.parametrize("target", ["openvino", "ort", "tensorrt"])
def test_products_that_leave_int32_are_refused(
    digits_checkpoint: Checkpoint, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network whose sums reach 2^31 takes 150,000 inputs; here engines count less far.
    monkeypatch.setattr("export.pipeline.LARGEST_SUM", 10_000)
    refusal = r"^layer conv1: its products of codes can add up to .* or pool before it$"
    with pytest.raises(ModelError, match=refusal):
        export(digits_checkpoint, target=target, saliency=False)
