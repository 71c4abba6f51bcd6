"""No exported file holds what nothing reads: ONNX Runtime warns of every such constant when it opens a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from export.choices import TARGETS
from export.engine.lowering import lower
from export.graph import prune, unread
from export.own_onnx import as_it_is
from export.sources.onnx_file import read_classifier
from runtime.onnx_bytes import with_outputs, without_gradient
from tests.exports import exported
from train.checkpoint import Checkpoint
from train.input_spec import InputSpec


def warned(data: bytes, capfd: pytest.CaptureFixture[str]) -> str:
    """Return what ONNX Runtime says when it opens a file with its own settings."""
    capfd.readouterr()
    onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return capfd.readouterr().err


def toy() -> onnx.ModelProto:
    graph = parser.parse_graph("""
        g (float[N, 4] x, bool b) => (float[N, 4] y)
        <float[4] w = {1, 2, 3, 4}, float[4] dead = {1, 2, 3, 4}, float[4] inner = {4, 3, 2, 1}>
        {
            a = Add(x, w)
            unused = Mul(x, w)
            further = Exp(unused)
            y = If(b) <then_branch = t () => (float[N, 4] s) { s = Mul(a, inner) },
                       else_branch = e () => (float[N, 4] r) { r = Identity(a) }>
        }
    """)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def test_pruning_leaves_what_an_output_needs_even_within_a_branch() -> None:
    model = toy()
    assert unread(model) == ["dead", "unused", "further"]
    prune(model.graph)
    assert unread(model) == []
    assert [node.output[0] for node in model.graph.node] == ["a", "y"]
    assert [tensor.name for tensor in model.graph.initializer] == ["w", "inner"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.ones((1, 4), np.float32)
    found = session.run(["y"], {"x": x, "b": np.array(True)})[0]
    np.testing.assert_array_equal(found, [[8, 9, 8, 5]])


def test_a_warning_is_what_this_is_about(capfd: pytest.CaptureFixture[str]) -> None:
    assert "Removing initializer 'dead'" in warned(toy().SerializeToString(), capfd)


@pytest.mark.parametrize(
    ("network", "target", "int8"),
    [
        *(("digits_checkpoint", target, int8) for target in TARGETS for int8 in (True, False)),
        ("resnet_checkpoint", "ort", True),
    ],
)
def test_no_file_of_a_network_holds_what_nothing_reads(
    network: str, target: str, int8: bool, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(network)
    data = exported(checkpoint, target=target, int8=int8).data
    for part in (data, without_gradient(data), with_outputs(data, ("logits", "saliency"))):
        assert unread(onnx.load_model_from_string(part)) == []
    if target == "ort":
        assert warned(data, capfd) == warned(without_gradient(data), capfd) == ""


@pytest.mark.parametrize("islands", ["fp16", "fp32"])
def test_lowering_for_a_plan_leaves_nothing_behind(digits_models: dict[str, Path], islands: str) -> None:
    path = digits_models["tensorrt"]
    found = lower(path.read_bytes(), path.name, precision="mixed", islands=islands)
    assert unread(onnx.load_model_from_string(found.onnx)) == []


@pytest.mark.parametrize("saliency", [True, False])
def test_what_anyone_s_file_holds_without_a_reader_is_left_out(tmp_path: Path, saliency: bool) -> None:
    random = np.random.default_rng(0)
    constants = {
        "m": random.normal(size=(3 * 6 * 8, 5)),
        "rows": None,
        "default": np.zeros(()),
        "scale": np.ones(1),
    }
    tensors = [
        numpy_helper.from_array(np.array([-1, 3 * 6 * 8]) if value is None else value.astype(np.float32), name)
        for name, value in constants.items()
    ]
    nodes = [
        helper.make_node("Mul", ["input", "scale"], ["debug"]),
        helper.make_node("Reshape", ["input", "rows"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["out"]),
    ]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 6, 8])
    logits = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 5])
    model = helper.make_model(
        helper.make_graph(nodes, "net", [image], [logits], tensors),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    assert unread(model) == ["default", "scale", "debug"]
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    spec = InputSpec((6, 8), 3, (0.5,) * 3, (0.5,) * 3)
    made = as_it_is(read_classifier(path, None), spec, tuple("abcde"), target="ort", saliency=saliency)
    assert unread(onnx.load_model_from_string(made.data)) == []
