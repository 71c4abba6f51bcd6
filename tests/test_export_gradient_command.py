"""What the gradient refuses, and its command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.gradient.__main__ import main
from export.gradient.walk import append_input_gradient
from runtime.errors import ClearpactError, FileError, ModelError, OptionError

ROOT = Path(__file__).parent.parent
IMAGE = "float[N,1,2,2] x"


def parse(body: str, inputs: str = IMAGE, outputs: str = "float[N,3] y", opset: int = 21) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}, "other": 1]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    mix = np.arange(12, dtype=np.float32).reshape(4, 3)
    model.graph.initializer.append(numpy_helper.from_array(mix, "m"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "v"))
    return model


def linear(**options: object) -> onnx.ModelProto:
    return parse("f = Flatten(x) y = MatMul(f, m)", **options)


def run(model: onnx.ModelProto, target: list[int]) -> list[np.ndarray]:
    feeds = {"x": np.ones((len(target), 1, 2, 2), np.float32), "target": np.array(target)}
    return ReferenceEvaluator(model).run(None, feeds)


def test_the_map_of_a_linear_classifier_is_its_weights() -> None:
    explained = append_input_gradient(linear())
    assert [i.name for i in explained.graph.input] == ["x", "target"]
    assert [o.name for o in explained.graph.output] == ["logits", "saliency"]
    logits, saliency = run(explained, [0, 2, 1])
    np.testing.assert_array_equal(logits, np.full((3, 3), [18, 22, 26]))
    np.testing.assert_array_equal(saliency, [[[0, 3], [6, 9]], [[2, 5], [8, 11]], [[1, 4], [7, 10]]])


def test_minus_one_is_the_predicted_class_and_no_class_has_no_map() -> None:
    _, saliency = run(append_input_gradient(linear()), [-1, 3])
    np.testing.assert_array_equal(saliency, [[[2, 5], [8, 11]], [[0, 0], [0, 0]]])


def test_the_batch_stays_open_and_everything_declared() -> None:
    explained = append_input_gradient(linear())
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*explained.graph.input, *explained.graph.output)
    }
    assert shapes == {"x": ["N", 1, 2, 2], "target": ["N"], "logits": ["N", 3], "saliency": ["N", 2, 2]}


def test_what_no_output_needs_is_left_out() -> None:
    """The gradient of a linear map does not depend on the image: only the logits need the forward graph."""
    model = parse("f = Flatten(x) dead = Exp(f) y = MatMul(f, m)")
    operators = [node.op_type for node in append_input_gradient(model).graph.node]
    assert "Exp" not in operators
    assert operators.count("MatMul") == 1


@pytest.mark.parametrize(
    "head",
    [
        "y = MatMul(f, m)",
        "y = Gemm(f, m)",
        "y = Gemm<alpha=2.0>(f, m, bias)",
        "t = Transpose(m) y = Gemm<transB=1>(f, t)",
    ],
)
def test_the_last_layer_is_not_multiplied_by_a_one_hot_vector(head: str) -> None:
    """Its gradient is the target's row of the weight, and zeros of a target that is no class."""
    model = parse(f"bias = Constant<value_floats=[1.0, 2.0, 3.0]>() f = Flatten(x) {head}")
    explained = append_input_gradient(model, outputs=["gradient"])
    added = [node.op_type for node in explained.graph.node if node.name.startswith("grad/")]
    assert {"MatMul", "Gemm"}.isdisjoint(added)
    assert added.count("Gather") == 1
    rows = (2 if "alpha" in head else 1) * np.arange(12).reshape(4, 3).T.reshape(3, 1, 2, 2)
    _, gradient = run(explained, [0, 1, 2, -1, 3, 1000])
    np.testing.assert_array_equal(gradient, [*rows, rows[2], np.zeros((1, 2, 2)), np.zeros((1, 2, 2))])


def test_a_transposed_last_layer_keeps_its_product() -> None:
    model = parse("f = Flatten(x) t = Transpose(f) y = Gemm<transA=1>(t, m)")
    _, gradient = run(append_input_gradient(model, outputs=["gradient"]), [0, 1, 2])
    np.testing.assert_array_equal(gradient, np.arange(12).reshape(4, 3).T.reshape(3, 1, 2, 2))


def test_an_inner_tensor_can_be_the_logits() -> None:
    model = parse("f = Flatten(x) z = MatMul(f, m) y = Softmax(z)")
    explained = append_input_gradient(model, logits="z")
    assert [o.name for o in explained.graph.output] == ["logits", "y", "saliency"]
    logits, probabilities, saliency = run(explained, [0])
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)
    np.testing.assert_array_equal(logits[0], [18, 22, 26])
    np.testing.assert_array_equal(saliency[0], [[0, 3], [6, 9]])


def test_old_opsets_are_converted_and_functions_are_inlined() -> None:
    old = linear(opset=11)
    np.testing.assert_array_equal(run(append_input_gradient(old), [0])[1][0], [[0, 3], [6, 9]])
    layered = parse("f = Flatten(x) y = other.mix(f, m)")
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    opsets = [helper.make_opsetid("", 21)]
    layered.functions.append(helper.make_function("other", "mix", ["a", "b"], ["c"], body, opsets))
    np.testing.assert_array_equal(run(append_input_gradient(layered), [0])[1][0], [[0, 3], [6, 9]])


def test_casts_between_floats_are_followed_and_the_map_is_float32() -> None:
    model = parse("c = Cast<to=11>(x) e = Mul(c, c) h = Cast<to=1>(e) f = Flatten(h) y = MatMul(f, m)")
    _, saliency = run(append_input_gradient(model), [0])
    np.testing.assert_array_equal(saliency[0], [[0, 6], [12, 18]])
    doubled = parse("c = Cast<to=1>(x) f = Flatten(c) y = MatMul(f, m)", inputs="double[N,1,2,2] x")
    assert append_input_gradient(doubled).graph.output[1].type.tensor_type.elem_type == TensorProto.FLOAT


def test_half_precision_has_gates_of_zero_and_one() -> None:
    """Its range ends at 65504: a slope as steep as in float32 is infinite, and 0 times that is no number."""
    model = parse("h = Cast<to=10>(x) r = Relu(h) c = Cast<to=1>(r) f = Flatten(c) y = MatMul(f, m)")
    x = np.array([[[[0, -1], [0.001, 60000]]]], np.float32)
    with np.errstate(over="ignore"):
        evaluator = ReferenceEvaluator(append_input_gradient(model))
        _, saliency = evaluator.run(None, {"x": x, "target": np.array([0])})
    np.testing.assert_array_equal(saliency[0], [[0, 0], [6, 9]])


REFUSED = {
    "no rule": (
        parse("s = Hardmax(x) f = Flatten(s) y = MatMul(f, m)"),
        "Hardmax node 's': has no gradient rule; its result is a choice .*--no-saliency$",
    ),
    "another domain": (
        parse("s = other.Relu(x) f = Flatten(s) y = MatMul(f, m)"),
        "Relu node 's': has no gradient rule; it is an operator of 'other', not of ONNX; export the file before",
    ),
    "two inputs": (
        parse("s = Add(x, z) f = Flatten(s) y = MatMul(f, m)", f"{IMAGE}, float[N,1,2,2] z"),
        r"the model has 2 inputs \(x, z\), expected one image",
    ),
    "no logits": (parse("y = Relu(x)", outputs="float[N,1,2,2] y"), "the model has 0 float outputs"),
    "two logits": (
        parse("f = Flatten(x) y = MatMul(f, m) z = Exp(y)", outputs="float[N,K] y, float[N,K] z"),
        "the model has 2 float outputs .* among y, z",
    ),
    "differentiated": (append_input_gradient(linear()), "it is differentiated already"),
    "random": (
        parse(
            "t = Constant<value=bool {1}>() r = Constant<value_float=0.5>() s = Dropout(x, r, t) "
            "f = Flatten(s) y = MatMul(f, m)"
        ),
        "Dropout node 's': drops at random",
    ),
    "by the batch": (
        parse(
            "b, mean, variance = BatchNormalization<training_mode=1>(x, v, v, v, v) "
            "f = Flatten(b) y = MatMul(f, m)"
        ),
        "BatchNormalization node 'b': normalizes by the batch",
    ),
    "dynamic weight": (parse("w = Exp(x) c = Conv(x, w) f = Flatten(c) y = MatMul(f, m)"), "Conv node 'c': "),
    "open sizes": (
        parse("p = GlobalAveragePool(x) f = Flatten(p) y = Concat<axis=1>(f, f)", "float[N,1,H,W] x"),
        r"tensor 'x': its shape \[\?, 1, \?, \?\] must be fixed along axes \[2, 3\]",
    ),
    "no path": (
        parse("i = Constant<value_ints=[2,2]>() s = Shape(x) c = Cast<to=1>(s) y = Reshape(c, i)"),
        "logits 'y' do not depend on input 'x'",
    ),
    "control flow": (
        parse(
            "total = ReduceSum<keepdims=0>(x) l = Constant<value=float {1}>() c = Greater(total, l) "
            "s = If(c) <then_branch = a () => (float[N,1,2,2] t) { t = Relu(x) }, "
            "else_branch = b () => (float[N,1,2,2] e) { e = Exp(x) }> f = Flatten(s) y = MatMul(f, m)"
        ),
        "If node 's': control flow that the image decides cannot be differentiated",
    ),
    "not four axes": (
        parse("y = MatMul(x, m)", "float[N,4] x"),
        r"input 'x': has 2 axes, expected \[N, C, H, W\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_differentiated_is_refused_in_one_line_and_nothing_is_written(
    name: str, tmp_path: Path
) -> None:
    model, text = REFUSED[name]
    path, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=text) as caught:
        main([str(path), "-o", str(output)])
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"input": "z"}, ModelError, "input 'z': no such tensor; the model's inputs are x"),
        ({"logits": "z"}, ModelError, "logits 'z': no such tensor; the model's outputs are y"),
        ({"input": "y"}, ModelError, "logits 'y' do not depend on input 'y'"),
        ({"gate": "sign"}, OptionError, "gate: got 'sign', expected one of code, ste"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], kind: type[ClearpactError], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        append_input_gradient(linear(), outputs=["gradient"], **options)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear().SerializeToString()[:-20])
    with pytest.raises(FileError, match="is not a whole ONNX file"):
        main([str(path)])
    with pytest.raises(FileError, match="no such file"):
        main([str(tmp_path / "none.onnx")])


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_command_writes_a_model_beside_its_source(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear().SerializeToString())
    done = command("-m", "export.gradient", path, "--raw")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'model_saliency.onnx'}: 2 nodes, and ")
    explained = onnx.load(tmp_path / "model_saliency.onnx")
    np.testing.assert_array_equal(run(explained, [0])[1], [[[[0, 3], [6, 9]]]])


def test_errors_are_one_line_and_status_2(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(REFUSED["no logits"][0].SerializeToString())
    done = command("-m", "export.gradient", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1
