from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime
import pytest

from tests.exports import exported
from train.checkpoint import Checkpoint


@pytest.mark.parametrize("target", ["openvino", "ort"])
def test_no_weight_shares_its_codes_or_its_zero_point(digits_checkpoint: Checkpoint, target: str) -> None:
    """Where two do, ONNX Runtime refuses the file on processors without VNNI."""
    graph = exported(digits_checkpoint, target=target).model.graph
    constants = {tensor.name for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    assert len(weights) >= 3
    for node in weights:
        assert all(readers[name] == 1 for name in (node.input[0], *node.input[2:]))


def test_weights_that_are_made_u8_give_the_same_logits(digits_checkpoint: Checkpoint) -> None:
    """What ONNX Runtime does on processors without VNNI, asked for here: it obeys everywhere."""
    images = digits_checkpoint.model().samples.permute(0, 2, 3, 1).contiguous().numpy()
    data, found = exported(digits_checkpoint, target="ort").data, []
    for precise in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", precise)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        feeds = {"image": images, "target": np.full(len(images), -1)}
        found.append(session.run(["logits", "saliency"], feeds))
    for values, expected in zip(*found, strict=True):
        assert np.allclose(values, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
