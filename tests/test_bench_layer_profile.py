from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bench.layers.profile import Layer, inspected, profile, table
from runtime.engines.tensorrt.session import open as open_plan
from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import CHANNELS, LAYERS, SIZE


def test_layers_are_named_by_their_onnx_nodes_and_typed_by_their_inputs() -> None:
    copy, conv, gradient, head = inspected(json.dumps({"Layers": LAYERS}))
    assert (copy.precision, copy.nodes) == ("copy", ())
    assert conv == Layer("conv1 + relu1", "CaskConvolution", ("node_conv2d", "node_relu"), "INT8")
    assert (gradient.precision, gradient.nodes) == ("FP16", ("grad/conv",))
    assert head == Layer("head", "", (), "?")


def test_every_wording_of_a_type_is_known() -> None:
    wordings = {
        "Row major linear FP32": "FP32",
        "Row major linear FP16 format": "FP16",
        "Thirty-two wide channel vectorized row major Int8 format": "INT8",
        "Row major Int8": "INT8",
        "Channel major FP16 format where channel % 8 == 0": "FP16",
        "N/A due to dynamic shapes": "?",
        "Row major linear BFloat16": "BF16",
        "Row major linear FP8": "FP8",
    }
    for wording, precision in wordings.items():
        entry = {"Name": "a", "LayerType": "gemm", "Inputs": [{"Format/Datatype": wording}]}
        assert inspected(json.dumps({"Layers": [entry]}))[0].precision == precision


def test_times_are_medians_in_the_order_of_execution(gpu: FakeGpu, plan: Path) -> None:
    session = open_plan(plan)
    layers = profile(session, np.zeros((1, *SIZE, CHANNELS), np.uint8), runs=5)
    assert [layer.ms for layer in layers] == [0.125, 0.25, 0.375, 0.5]
    lines = list(table(layers))
    assert lines[2] == " 0.2500  20.0%  INT8  conv1 + relu1  <- node_conv2d, node_relu"
    assert lines[5:] == [
        " 0.1250  10.0%  copy  in 1 layers",
        " 0.2500  20.0%  INT8  in 1 layers",
        " 0.3750  30.0%  FP16  in 1 layers",
        " 0.5000  40.0%  ?     in 1 layers",
    ]
    session.close()
