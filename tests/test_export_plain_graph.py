"""A graph in its plainest form computes what it did: any order, constant branches, operators written out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from export.gradient.joining import prepare_model
from export.gradient.walk import append_input_gradient
from export.graph import GraphFacts, infer_shapes
from export.plain_graph import expand_functions, hold_shapes, sort_nodes, take_constant_branches
from runtime.errors import ModelError

IMAGE = "float[N,2,4,4] x"


def parse(body: str, inputs: str = IMAGE, outputs: str = "float[N,K] y", opset: int = 21) -> onnx.ModelProto:
    m = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> net ({inputs}) => ({outputs}) {{ {body} }}'
    )
    model.graph.initializer.append(numpy_helper.from_array(m, "m"))
    return model


def run(model: onnx.ModelProto, batch: int = 3) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((batch, 2, 4, 4)).astype(np.float32)
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0])


SORTED = parse("a = Relu(x) b = Exp(a) c = Add(a, b) d = Neg(c) f = Flatten(d) y = MatMul(f, m)")


@settings(max_examples=20)
@given(order=st.permutations(range(6)))
def test_nodes_in_any_order_are_sorted_and_give_a_gradient(order: list[int]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(SORTED)
    del model.graph.node[:]
    model.graph.node.extend(SORTED.graph.node[i] for i in order)
    explained = append_input_gradient(model, outputs=["gradient"])
    feeds = {"x": np.ones((2, 2, 4, 4), np.float32), "target": np.array([0, 1])}
    found = ReferenceEvaluator(explained).run(None, feeds)
    expected = ReferenceEvaluator(append_input_gradient(SORTED, outputs=["gradient"])).run(None, feeds)
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_circle_is_refused_in_one_line_and_a_sorted_graph_stays() -> None:
    before = SORTED.SerializeToString()
    sort_nodes(SORTED.graph)
    assert SORTED.SerializeToString() == before
    with pytest.raises(ModelError, match="not valid ONNX"):
        append_input_gradient(parse("a = Add(x, b) b = Exp(a) f = Flatten(b) y = MatMul(f, m)"))


BRANCHES = (
    "c = Constant<value=bool {1}>() no = Not(c) "
    "s = If(c) <then_branch = a () => (float[N,2,4,4] t) { u = Relu(x) t = If(no) "
    "<then_branch = aa () => (float[N,2,4,4] v) { v = Neg(u) }, "
    "else_branch = ab () => (float[N,2,4,4] v) { v = Exp(u) }> }, "
    "else_branch = b () => (float[N,2,4,4] t) { t = Exp(x) }> "
    "r = If(no) <then_branch = d () => (float[N,2,4,4] t) { t = Relu(s) }, "
    "else_branch = e () => (float[N,2,4,4] t) { u = Tanh(s) t = Mul(u, x) }> "
    "f = Flatten(r) y = MatMul(f, m)"
)


def test_constant_branches_are_taken_with_what_they_read_and_with_equal_names_inside() -> None:
    model = parse(BRANCHES)
    expected = run(model)
    take_constant_branches(model)
    onnx.checker.check_model(model, full_check=True)
    assert "If" not in {node.op_type for node in model.graph.node}
    np.testing.assert_array_equal(run(model), expected)
    explained = append_input_gradient(parse(BRANCHES), outputs=["gradient"])
    assert "If" not in {node.op_type for node in explained.graph.node}


def test_a_branch_that_asks_for_a_known_size_is_taken_and_one_for_the_batch_is_not() -> None:
    form = (
        "s = Shape(x) i = Constant<value=int64[1] {{{axis}}}>() g = Gather(s, i) "
        "one = Constant<value=int64[1] {{1}}>() c = Equal(g, one) "
        "r = If(c) <then_branch = a () => (float[N,2,4,4] t) {{ t = Exp(x) }}, "
        "else_branch = b () => (float[N,2,4,4] t) {{ t = Relu(x) }}> f = Flatten(r) y = MatMul(f, m)"
    )
    assert "Relu" in {node.op_type for node in prepare_model(parse(form.format(axis=2))).graph.node}
    with pytest.raises(ModelError, match="If node 'r': control flow that the image decides"):
        prepare_model(parse(form.format(axis=0)))


@pytest.mark.parametrize(
    ("operator", "opset", "left"),
    [
        ("Selu(x)", 22, set()),
        ("Selu<alpha = 1.5>(x)", 18, set()),
        ("Mish(x)", 18, {"Softplus"}),
        ("Celu(x)", 12, {"Elu"}),
        ("MeanVarianceNormalization<axes = [2, 3]>(x)", 13, set()),
        ("ThresholdedRelu(x)", 22, set()),
        ("Shrink(x)", 18, set()),
        ("CastLike(x, x)", 19, set()),
        ("RMSNormalization(x, w)", 23, set()),
        ("Swish(x)", 24, {"Sigmoid"}),
    ],
)
def test_operators_are_written_out(operator: str, opset: int, left: set[str]) -> None:
    weight = "w = Constant<value = float[4] {1, 2, 3, 4}>() "
    model = parse(f"{weight} a = {operator} f = Flatten(a) y = MatMul(f, m)", opset=opset)
    expected = run(model)
    plain = expand_functions(model, {"Elu", "Softplus"})
    kinds = {node.op_type for node in plain.graph.node}
    assert operator.partition("(")[0].partition("<")[0] not in kinds
    assert left <= kinds
    onnx.checker.check_model(plain, full_check=True)
    np.testing.assert_allclose(run(plain), expected, rtol=1e-5, atol=1e-6)


def test_what_shapes_tell_becomes_a_constant_unless_it_changes_with_the_batch() -> None:
    body = (
        "s = Shape(x) i = Constant<value=int64[2] {1, 2}>() g = Gather(s, i) "
        "j = Constant<value=int64[1] {0}>() n = Gather(s, j) k = Constant<value=int64[1] {-1}>() "
        "to = Concat<axis=0>(g, k) p = Concat<axis=0>(n, to) r = Reshape(x, p) f = Flatten(r) y = MatMul(f, m)"
    )
    model = parse(body)
    facts = GraphFacts(infer_shapes(model))
    assert facts.of_shapes == {"s", "g", "n", "to", "p"}
    assert facts.value("g") is not None
    assert facts.value("n") is None
    expected = run(model, 5)
    hold_shapes(model)
    assert [node.op_type for node in model.graph.node if node.output[0] in ("g", "to")] == []
    assert "p" in {node.output[0] for node in model.graph.node}
    np.testing.assert_array_equal(run(model, 5), expected)
