"""Rules against central differences in float64, over shapes that are drawn and a batch that is open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.gradient.walk import RULES, append_input_gradient
from runtime.errors import ModelError
from tests.reference_operators import EXACT

DOUBLE = TensorProto.DOUBLE
RNG = np.random.default_rng


def model_of(text: str, shape: tuple[int, ...], opset: int, **constants: Any) -> onnx.ModelProto:
    """Return `text`, which computes y of x, float64, followed by three random sums of y's elements."""
    inputs = f"double[{','.join(['N', *map(str, shape[1:])])}] x"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> net ({inputs}) => (double[N,3] logits) '
        f"{{ {text} f = Flatten(y) logits = MatMul(f, sums) }}"
    )
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[-2:], plain.graph.output[:]
    plain.graph.output.append(helper.make_tensor_value_info("y", DOUBLE, None))
    for one in (model, plain):
        one.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    y = ReferenceEvaluator(plain, new_ops=EXACT).run(None, {"x": np.zeros(shape) + 0.5})[0]
    sums = RNG(0).standard_normal((y[0].size, 3))
    model.graph.initializer.append(numpy_helper.from_array(sums, "sums"))
    return model


def check(text: str, x: np.ndarray, opset: int = 21, **constants: Any) -> np.ndarray:
    """Compare the gradient along random directions with central differences; return it."""
    model = model_of(text, x.shape, opset, **constants)
    explained = append_input_gradient(model, outputs=["gradient"])
    evaluator = ReferenceEvaluator(explained, new_ops=EXACT)
    target = np.arange(len(x)) % 3
    _, gradient = evaluator.run(None, {"x": x, "target": target})
    assert gradient.shape == x.shape
    assert gradient.dtype == np.float64

    def logits(at: np.ndarray) -> np.ndarray:
        return evaluator.run(["logits"], {"x": at, "target": target})[0][np.arange(len(x)), target]

    step = 1e-5
    for direction in RNG(1).standard_normal((2, *x.shape)):
        expected = (logits(x + step * direction) - logits(x - step * direction)) / (2 * step)
        found = (gradient * direction).reshape(len(x), -1).sum(1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    return gradient


def image(*shape: int) -> np.ndarray:
    """Return values apart from each other and from 0 by more than any step."""
    size = int(np.prod(shape))
    return (RNG(size).permutation(size) + 0.5 - size // 2).reshape(shape) / size * 3


X = image(2, 4, 4, 6)
MATRIX = RNG(3).standard_normal((6, 6))
# text, opset, constants
OPERATORS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ReduceLogSum": ("a = Exp(x) y = ReduceLogSum(a, c)", 21, {"c": [1, 3]}),
    "ReduceLogSumExp": ("y = ReduceLogSumExp(x, c)", 21, {"c": [2, 3]}),
    "ReduceLogSumExp, old": ("y = ReduceLogSumExp<axes=[1]>(x)", 13, {}),
    "ReduceL2": ("y = ReduceL2<keepdims=0>(x, c)", 21, {"c": [-1]}),
    "Swish": ("y = Swish<alpha=2.0>(x)", 24, {}),
    "Max with a constant": ("y = Max(x, c)", 21, {"c": np.float64(0.3)}),
    "Min of three": ("a = Neg(x) b = Abs(x) y = Min(a, x, b, c)", 21, {"c": np.full((4, 1), 0.4)}),
    "Max of two": ("a = Mul(x, x) y = Max(a, x)", 21, {}),
    "Mean": ("a = Mul(x, x) y = Mean(a, x, c)", 21, {"c": np.full((4, 1), 0.4)}),
    "ReduceProd": ("y = ReduceProd(x, c)", 21, {"c": [1, 2]}),
    "ReduceMin": ("y = ReduceMin(x, c)", 21, {"c": [1, 2]}),
    "LRN": ("y = LRN<size=3, alpha=0.5, beta=0.6, bias=1.2>(x)", 21, {}),
    "LRN, even": ("y = LRN<size=4, alpha=0.5>(x)", 21, {}),
    "LpNormalization, 1": ("y = LpNormalization<axis=1, p=1>(x)", 21, {}),
    "LpNormalization, 2": ("y = LpNormalization<axis=3>(x)", 21, {}),
    "GlobalLpPool": ("y = GlobalLpPool<p=3>(x)", 21, {}),
    "DepthToSpace, DCR": ("y = DepthToSpace<blocksize=2>(x)", 21, {}),
    "DepthToSpace, CRD": ('y = DepthToSpace<blocksize=2, mode="CRD">(x)', 21, {}),
    "SpaceToDepth": ("y = SpaceToDepth<blocksize=2>(x)", 21, {}),
    "Tile": ("a = Tile(x, c) y = Mul(a, a)", 21, {"c": [1, 2, 1, 3]}),
    "TopK": ("y, i = TopK<axis=1, largest=0>(x, c)", 21, {"c": [2]}),
    "Gather by TopK": ("v, i = TopK(x, c) t = GatherElements<axis=3>(x, i) y = Mul(t, v)", 21, {"c": [3]}),
    "GatherElements": ("y = GatherElements<axis=2>(x, c)", 21, {"c": RNG(0).integers(-4, 4, (2, 4, 7, 6))}),
    "Gather at run time": (
        "s = Shape<end=1>(x) i = Squeeze(s) z = Sub(i, i) r = Range(z, i, o) c = Mul(r, n) d = Unsqueeze(c, p) "
        "e = Add(d, k) w = Reshape(x, m) y = Gather(w, e)",
        21,
        {"o": np.int64(1), "n": np.int64(96), "p": [1], "k": np.arange(7)[None] * 3, "m": [-1]},
    ),
    "Gather a row at run time": (
        "s = Shape<start=0, end=1>(x) t = Sub(s, s) y = Gather<axis=2>(x, t)", 21, {},
    ),
    "ScatterND": (
        "t = Transpose<perm=[1,0,2,3]>(x) a = Slice(t, b, e, k) p = Mul(a, a) z = ScatterND(t, i, p) "
        "y = Transpose<perm=[1,0,2,3]>(z)", 21, {"b": [0], "e": [1], "k": [0], "i": np.array([[2]])},
    ),
    "ScatterElements, add": ('a = Mul(x, x) y = ScatterElements<axis=3, reduction="add">(a, i, x)', 21, {
        "i": RNG(0).integers(0, 6, X.shape),
    }),
    "CumSum": ("y = CumSum(x, c)", 21, {"c": np.int64(3)}),
    "CumSum, from the end": ("y = CumSum<exclusive=1, reverse=1>(x, c)", 21, {"c": np.int64(1)}),
    "Trilu": ("y = Trilu<upper=0>(x, c)", 21, {"c": np.int64(1)}),
    "Mod": ("y = Mod<fmod=1>(x, c)", 21, {"c": np.float64(0.77)}),
    "ReverseSequence": ("y = ReverseSequence<time_axis=2, batch_axis=0>(x, c)", 21, {"c": [3, 2]}),
    "steps": ("a = Floor(x) b = Round(x) c = Sign(x) d = Ceil(x) y = Sum(a, b, c, d, x)", 21, {}),
    "trigonometry": ("a = Sin(x) b = Cosh(a) c = Atan(b) d = Tan(c) y = Asinh(d)", 21, {}),
    "split in unequal parts": ("a, b = Split<axis=1>(x, c) y = Mul(a, b)", 21, {"c": [2, 2]}),
    "Einsum, attention": ('y = Einsum<equation="bhqd,bhkd->bhqk">(x, x)', 21, {}),
    "Einsum, a constant": ('y = Einsum<equation="...ij,jk">(x, m)', 21, {"m": MATRIX}),
    "Einsum, summed alone": ('y = Einsum<equation="bijk,jl->bl">(x, m)', 21, {"m": MATRIX[:4]}),
    "Einsum, repeated": ('a = ReduceSum(x, k) y = Einsum<equation="bijk,bijk->bik">(a, x)', 21, {"k": [2]}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_of(name: str) -> None:
    text, opset, constants = OPERATORS[name]
    assert np.abs(check(text, X, opset, **constants)).max() > 0


def test_a_product_with_zeros_has_a_gradient_at_one_alone() -> None:
    x = np.abs(image(2, 3, 4)) + 0.5
    x[0, 0, 1] = x[1, 1, 2] = x[1, 1, 3] = 0
    gradient = check("y = ReduceProd(x, c)", x, c=[2])
    assert gradient[0, 0, 1] != 0
    assert not gradient[0, 0, [0, 2, 3]].any()
    assert not gradient[1, 1].any()


def test_equal_ones_share_nothing_and_a_constant_wins() -> None:
    """Max(x, 0) is a Relu: no gradient at 0. Of equal tensors the first has all, so that the sum is kept."""
    x = np.array([[[-1.0, 0.0, 2.0]]])

    def gradient(text: str) -> np.ndarray:
        explained = append_input_gradient(model_of(text, x.shape, 21, zero=0.0), outputs=["gradient"])
        found = ReferenceEvaluator(explained).run(None, {"x": x, "target": np.zeros(1, np.int64)})[1]
        sums = numpy_helper.to_array(next(t for t in explained.graph.initializer if t.name == "sums"))
        return found.reshape(-1) / sums[:, 0]

    np.testing.assert_allclose(gradient("y = Max(x, zero)"), [0, 0, 1])
    np.testing.assert_allclose(gradient("y = Min(zero, x)"), [1, 0, 0])
    np.testing.assert_allclose(gradient("a = Identity(x) y = Max(a, x)"), [1, 1, 1])


@settings(max_examples=25)
@given(
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    places=st.sampled_from(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]),
    sizes=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    targets=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    scale=st.sampled_from([None, 0.6, 1.5, 2.0, 2.7]),
)
@example(mode="cubic", places="half_pixel", sizes=(5, 5), targets=(2, 2), scale=0.6)  # 3.0000001 pixels
def test_resize(
    mode: str, places: str, sizes: tuple[int, int], targets: tuple[int, int], scale: float | None
) -> None:
    at = f'<mode="{mode}", coordinate_transformation_mode="{places}">'
    if scale is not None and places != "align_corners":  # for which onnx takes sizes with fractions
        check(f"y = Resize{at}(x, , c)", image(2, 1, *sizes), c=np.array([1, 1, scale, 1], np.float32))
    else:
        check(f"y = Resize{at}(x, , , c)", image(1, 2, *sizes), c=np.array([1, 2, *targets]))


@settings(max_examples=20)
@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), dilation=st.integers(1, 2), pad=st.integers(0, 1),
    groups=st.sampled_from([1, 2]), extra=st.integers(0, 2), size=st.integers(1, 5),
)  # fmt: skip
def test_transposed_convolution_as_autograd(
    kernel: int, stride: int, dilation: int, pad: int, groups: int, extra: int, size: int
) -> None:
    extra = min(extra, max(stride, dilation) - 1)
    if (size - 1) * stride - 2 * pad + (kernel - 1) * dilation + 1 + extra < 1:
        return
    weight, x = RNG(0).standard_normal((4, 3, kernel, 2)), image(2, 4, size, 3)
    at = {
        "strides": [stride, 1], "dilations": [dilation, 1], "pads": [pad, 0, pad, 0], "group": groups,
        "output_padding": [extra, 0],
    }  # fmt: skip
    text = ", ".join(f"{key} = {value}" for key, value in at.items())
    model = model_of(f"y = ConvTranspose<{text}>(x, w)", x.shape, 21, w=weight)
    explained = append_input_gradient(model, outputs=["gradient"])
    feeds = {"x": x, "target": np.array([0, 2])}
    logits, gradient = ReferenceEvaluator(explained, new_ops=EXACT).run(None, feeds)
    source = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.conv_transpose2d(
        source, torch.tensor(weight), None, (stride, 1), (pad, 0), (extra, 0), groups, (dilation, 1)
    )
    sums = next(t for t in model.graph.initializer if t.name == "sums")
    expected = y.flatten(1) @ torch.tensor(numpy_helper.to_array(sums))
    np.testing.assert_allclose(logits, expected.detach(), atol=1e-10)
    expected[[0, 1], [0, 2]].sum().backward()
    np.testing.assert_allclose(gradient, source.grad, atol=1e-10)


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_transposed_convolution_padded_by_itself(pad: str) -> None:
    weight = RNG(0).standard_normal((2, 3, 3, 4))
    check(f'y = ConvTranspose<strides=[2, 3], auto_pad="{pad}">(x, w)', image(1, 2, 3, 4), w=weight)


@settings(max_examples=10)
@given(
    kernel=st.integers(1, 3), stride=st.integers(1, 3), pad=st.integers(0, 1), power=st.integers(1, 3),
    size=st.integers(3, 6),
)  # fmt: skip
def test_norms_of_windows(kernel: int, stride: int, pad: int, power: int, size: int) -> None:
    pad = min(pad, kernel - 1)
    at = f"kernel_shape=[{kernel}, 2], strides=[{stride}, 1], pads=[{pad}, 0, {pad}, 0], p={power}"
    check(f"y = LpPool<{at}>(x)", image(2, 2, size, 4))


def test_the_page_lists_every_rule() -> None:
    page = Path("export/gradient/README.md").read_text()
    table = page.partition("operators with a rule |")[2].partition("\n\n")[0]
    assert {name for row in table.splitlines()[2:] for name in row.split("|")[2].strip().split(", ")} == set(RULES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('y = Einsum<equation="biik->bik">(x)', "Einsum node 'y': reads a diagonal"),
        ('a = Mul(x, x) y = ScatterND<reduction="max">(x, i, a)', "ScatterND node 'y': its reduction is 'max'"),
        ("y = Mod<fmod=1>(c, x)", "Mod node 'y': its input 'x' is computed from the image"),
        ("y = Det(x)", "Det node 'y': has no gradient rule; write it with operators that have one"),
    ],
)
def test_what_has_no_rule_names_the_node_and_the_remedy(text: str, message: str) -> None:
    x = image(2, 4, 4, 4)
    model = model_of("y = Identity(x)", x.shape, 21)
    body = onnx.parser.parse_graph(f"n (double[N,4,4,4] x) => (double[N,3] y) {{ {text} }}")
    places = np.arange(2)[:, None]
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in {"i": places, "c": x}.items())
    nodes = [*body.node, *model.graph.node[1:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises(ModelError, match=message) as caught:
        append_input_gradient(model, outputs=["gradient"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["Einsum, a constant", "Gather by TopK", "ScatterElements, add", "CumSum, from the end", "ReduceProd"]
)
def test_openvino_computes_the_same(name: str) -> None:
    """Where both directions read one square matrix, it goes wrong (2026.4), so that ours is a copy."""
    text, opset, constants = OPERATORS[name]
    model = model_of(text, X.shape, opset, **constants)
    for tensor in model.graph.initializer:
        if tensor.data_type == DOUBLE:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    explained = append_input_gradient(model, outputs=["gradient"])
    feeds = {"x": X.astype(np.float32), "target": np.array([0, 1])}
    expected = ReferenceEvaluator(explained, new_ops=EXACT).run(["gradient"], feeds)[0]
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(explained.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = next(value for port, value in compiled(feeds).items() if "gradient" in port.names)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
