"""Each rule of the input gradient against finite differences, in float64 on onnx's reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.gradient.walk import append_input_gradient
from tests.reference_operators import EXACT

CLASSES = 3
modest = settings(max_examples=50, deadline=None, derandomize=True)


def classifier(body: str, size: tuple[int, ...], opset: int = 21, **constants: np.ndarray) -> onnx.ModelProto:
    """Return a float64 classifier that computes y from x [N, *shape] by `body`, then mixes y into logits."""

    def tensor(name: str, *sizes: int) -> str:
        return f"double[{','.join(map(str, ('N', *sizes)))}] {name}"

    def model(body: str, result: str, **constants: np.ndarray) -> onnx.ModelProto:
        graph = f"g ({tensor('x', *size)}) => ({result}) {{ {body} }}"
        text = f'<ir_version: 10, opset_import: ["": {opset}]> {graph}'
        parsed = onnx.parser.parse_model(text)
        parsed.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
        return parsed

    y = run(model(body, "double[] y", **constants), x=np.ones((2, *size)))[0]
    constants["mix"] = np.random.default_rng(1).normal(size=(y.size // 2, CLASSES))
    body += " flat = Flatten<axis=1>(y) logits = MatMul(flat, mix)"
    explicit = model(body, tensor("logits", CLASSES), **constants)
    # y's shape is stated, as exporters do: onnx infers none for GroupNormalization.
    explicit.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["N", *y.shape[1:]]))
    return explicit


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return ReferenceEvaluator(model, new_ops=EXACT).run(None, feeds)


def assert_gradient(body: str, x: np.ndarray, opset: int = 21, **constants: np.ndarray) -> None:
    """Compare the gradient of every logit at one image with central differences along every pixel."""
    model = classifier(body, x.shape, opset, **constants)
    explained = append_input_gradient(model, outputs=["gradient"])
    _, gradient = run(explained, x=np.stack([x] * CLASSES), target=np.arange(CLASSES))
    step = 1e-6
    moves = step * np.eye(x.size).reshape(-1, *x.shape)
    (ahead,), (behind,) = run(model, x=x + moves), run(model, x=x - moves)
    expected = ((ahead - behind) / (2 * step)).T.reshape(gradient.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def constant(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=shape)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# Elementwise rules.


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu(x)",
        "y = LeakyRelu<alpha=0.2>(x)",
        "y = Elu<alpha=0.7>(x)",
        "y = Sigmoid(x)",
        "y = Tanh(x)",
        "y = Softplus(x)",
        "y = HardSigmoid<alpha=0.3, beta=0.4>(x)",
        "y = HardSwish(x)",
        "y = Gelu(x)",
        'y = Gelu<approximate="tanh">(x)',
        "y = Erf(x)",
        "y = Exp(x)",
        "y = Abs(x)",
        "y = Neg(x)",
        "y = Identity(x)",
        "y = Dropout(x)",
        "y = Softmax<axis=1>(x)",
        "y = LogSoftmax<axis=-1>(x)",
        "s = Sigmoid(x) y = Mul(x, s)",
        "y = Mul(x, x)",
        "y = Add(x, x)",
        "e = Exp(x) y = Sub(e, x)",
        "e = Exp(x) y = Div(x, e)",
        "e = Exp(x) y = Log(e)",
        "e = Exp(x) y = Sqrt(e)",
        "e = Exp(x) y = Reciprocal(e)",
        "e = Exp(x) y = Sum(e, x, x)",
        "e = Exp(x) c = Greater(x, e) f = Less(x, x) n = Neg(x) g = Not(c) y = Where(g, e, n)",
    ],
)
def test_elementwise(body: str) -> None:
    assert_gradient(body, 2 * image(2, 3, 4))


@pytest.mark.parametrize(
    ("low", "high"),
    [("low", "high"), ("low", ""), ("", "high"), ("", "")],
    ids=["both", "low", "high", "none"],
)
def test_clip(low: str, high: str) -> None:
    assert_gradient(
        f"y = Clip(x, {low}, {high})".replace(", )", ")"),
        image(2, 3, 4),
        low=np.array(-0.5),
        high=np.array(0.6),
    )


@pytest.mark.parametrize("power", [2.0, 3.0, 0.5, -1.0])
def test_pow(power: float) -> None:
    assert_gradient("y = Pow(x, power)", np.abs(image(2, 3)) + 0.1, power=np.array(power))


def test_prelu() -> None:
    assert_gradient("y = PRelu(x, slope)", image(3, 2, 4), slope=constant(3, 1, 1))


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 1, 1), (1, 2, 1, 4)])
def test_arithmetic_with_a_constant(operator: str, shape: tuple[int, ...]) -> None:
    assert_gradient(f"y = {operator}(x, c)", image(2, 3, 4), c=constant(*shape) + 3)
    assert_gradient(f"e = Exp(x) y = {operator}(c, e)", image(2, 3, 4), c=constant(*shape))


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
def test_arithmetic_of_two_branches_is_summed_over_what_was_repeated(operator: str) -> None:
    """A branch of fewer pixels, or of fewer axes, meets the whole image."""
    gate = "e = Exp(x) m = ReduceMean<keepdims=1>(e, axes)"
    assert_gradient(f"{gate} y = {operator}(x, m)", image(2, 3, 4), axes=integers(2, 3))
    assert_gradient(f"{gate} y = {operator}(m, x)", image(2, 3, 4) + 4, axes=integers(1, 3))


def test_expand_and_a_branch_with_fewer_axes() -> None:
    assert_gradient("y = Expand(x, shape)", image(2, 1, 3), shape=integers(5, 1, 2, 4, 3)[1:])
    assert_gradient(
        "r = Reshape(x, shape) s = Add(r, c) y = Expand(s, wide)",
        image(1, 3),
        c=constant(3),
        shape=integers(-1, 1, 3),
        wide=integers(1, 2, 3),
    )


# Layout and reductions.


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("y = Flatten<axis=1>(x)", {}),
        ("y = Reshape(x, shape)", {"shape": integers(0, -1, 6)}),
        ("y = Transpose<perm=[0, 2, 3, 1]>(x)", {}),
        ("r = Transpose(x) y = Transpose<perm=[3, 0, 2, 1]>(r)", {}),
        ("u = Unsqueeze(x, axes) s = Mul(u, u) y = Squeeze(s, axes)", {"axes": integers(1, -1)}),
        ("e = Exp(x) y = Concat<axis=1>(x, e, x)", {}),
        ("e = Exp(x) y = Concat<axis=-1>(x, e)", {}),
        ("a, b, c = Split<axis=3, num_outputs=3>(x) e = Exp(c) y = Concat<axis=3>(e, a)", {}),
        ("a, b = Split<axis=1>(x, parts) e = Exp(b) y = Concat<axis=1>(e, a)", {"parts": integers(1, 2)}),
        ("y = Gather<axis=2>(x, index)", {"index": integers(1, 3, 1, -1)}),
        ("y = Gather<axis=1>(x, index)", {"index": np.array(-1)}),
        ("y = Gather<axis=3>(x, index)", {"index": np.array([[0, 4], [2, 2]])}),
        (
            "t = Transpose<perm=[2, 3, 0, 1]>(x) g = GatherND(t, index) y = Transpose<perm=[1, 0, 2]>(g)",
            {"index": np.array([[0, 1], [3, -1], [0, 1]])},
        ),
        ("y = ReduceSum<keepdims=0>(x, axes)", {"axes": integers(-1, 1)}),
        ("y = ReduceMean<keepdims=1>(x, axes)", {"axes": integers(2, 3)}),
        ("e = Exp(x) y = ReduceMean<keepdims=0>(e, axes)", {"axes": integers(1)}),
        ("y = ReduceMax<keepdims=0>(x, axes)", {"axes": integers(3, 2)}),
        ("y = ReduceMax<keepdims=1>(x, axes)", {"axes": integers(1)}),
        ("y = ReduceMin<keepdims=0>(x, axes)", {"axes": integers(3, 2)}),
        ("y = ReduceMin<keepdims=1>(x, axes)", {"axes": integers(1)}),
        ("f = Floor(x) c = Ceil(x) r = Round(x) s = Sign(x) a = Sum(x, f, c) y = Sum(a, r, s)", {}),
        ("y = GlobalAveragePool(x)", {}),
        ("y = GlobalMaxPool(x)", {}),
    ],
)
def test_layout_and_reductions(body: str, constants: dict[str, np.ndarray]) -> None:
    assert_gradient(body, image(3, 4, 6), **constants)


@st.composite
def slices(draw: st.DrawFn, size: int) -> tuple[int, int, int]:
    """Start, end and step of a slice that keeps something; bounds inside, outside and counted from the end."""
    step = draw(st.sampled_from([1, 2, 3, -1, -2]))
    first, last = sorted((draw(st.integers(0, size - 1)), draw(st.integers(0, size - 1))))
    if step > 0:
        start, end = draw(st.sampled_from([first, first - size])), draw(st.sampled_from([last + 1, last + 9]))
        return start, end, step
    below = first - 1
    end = below if below >= 0 else np.iinfo(np.int64).min
    return draw(st.sampled_from([last, last - size])), end, step


@modest
@given(st.data())
def test_slice(data: st.DataObject) -> None:
    starts, ends, steps = zip(*(data.draw(slices(size)) for size in (5, 4)), strict=True)
    assert_gradient(
        "y = Slice(x, starts, ends, axes, steps)",
        image(2, 5, 4),
        starts=integers(*starts),
        ends=integers(*ends),
        axes=integers(2, -1),
        steps=integers(*steps),
    )


@modest
@given(
    st.sampled_from(["constant", "reflect", "edge", "wrap"]),
    st.lists(st.integers(-1, 2), min_size=4, max_size=4),
)
def test_pad(mode: str, pads: list[int]) -> None:
    if mode != "constant":
        pads = [abs(p) for p in pads]
    assert_gradient(
        f'y = Pad<mode="{mode}">(x, pads, , axes)', image(2, 4, 3), pads=integers(*pads), axes=integers(3, 2)
    )


# Normalizations.


def test_batch_normalization() -> None:
    assert_gradient(
        "y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)",
        image(3, 2, 4),
        s=constant(3),
        b=constant(3),
        m=constant(3),
        v=np.abs(constant(3)),
    )


@pytest.mark.parametrize("axis", [-1, 2, 1])
def test_layer_normalization(axis: int) -> None:
    shape = (3, 4, 5)[axis if axis < 0 else axis - 1 :]
    assert_gradient(
        f"y = LayerNormalization<axis={axis}>(x, s, b)",
        image(3, 4, 5),
        s=constant(*shape),
        b=constant(*shape),
    )


def test_instance_and_group_normalization() -> None:
    assert_gradient("y = InstanceNormalization(x, s, b)", image(4, 3, 2), s=constant(4), b=constant(4))
    assert_gradient("y = GroupNormalization<num_groups=2>(x, s, b)", image(4, 3, 2), s=constant(4), b=constant(4))


# Weights.


@st.composite
def windows(draw: st.DrawFn, pooling: bool = False, square: bool = False) -> tuple[str, list[int], list[int]]:
    """Draw the attributes of a sliding window, its kernel, and image sizes that it fits; `square`: of one stride.

    Engines refuse to pool padding alone: pooling pads less than half a kernel, and the last window of
    ceil_mode starts in the image.
    """
    count, auto = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from(["", "", "SAME_UPPER", "SAME_LOWER", "VALID"])),
    )
    ceil_mode = pooling and not auto and draw(st.booleans())
    axes, strides = [], draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    for stride in [max(strides)] * count if square else strides:
        kernel, dilation, more = (draw(st.integers(*ends)) for ends in ((1, 3), (1, 2), (0, 4)))
        before, after = (draw(st.integers(0, (kernel - 1) // 2 if pooling else 2)) for _ in range(2))
        span = (kernel - 1) * dilation + 1
        assume(not ceil_mode or -(-(more + before + after) // stride) * stride < span + more + before)
        axes.append((kernel, stride, dilation, before, after, span + more))
    kernels, strides, dilations, before, after, sizes = (list(column) for column in zip(*axes, strict=True))
    text = f"strides={strides}, dilations={dilations}, ceil_mode={int(ceil_mode)}, kernel_shape={kernels}, "
    text += f'auto_pad="{auto}"' if auto else f"pads={before + after}"
    return text if pooling else text.replace("ceil_mode=0, ", ""), kernels, sizes


@settings(modest, max_examples=150)
@given(st.data())
def test_conv(data: st.DataObject) -> None:
    text, kernel, sizes = data.draw(windows(square=data.draw(st.booleans())))
    groups, inner, outer = (data.draw(st.integers(1, 2)) for _ in range(3))
    assert_gradient(
        f"y = Conv<group={groups}, {text}>(x, w, b)",
        image(groups * inner, *sizes),
        w=constant(groups * outer, inner, *kernel),
        b=constant(groups * outer),
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "size"), [(3, 2, 1, 8), (7, 2, 3, 9), (1, 2, 0, 6), (4, 4, 0, 8), (2, 3, 0, 8)]
)
def test_a_strided_conv_needs_no_transposed_one(kernel: int, stride: int, pad: int, size: int) -> None:
    """The strides of ResNet, of its shortcut and of a vision transformer's patches."""
    body = f"y = Conv<strides={[stride] * 2}, pads={[pad] * 4}>(x, w)"
    x, w = image(3, size, size), constant(4, 3, kernel, kernel)
    assert_gradient(body, x, w=w)
    explained = append_input_gradient(classifier(body, x.shape, w=w))
    assert "ConvTranspose" not in {node.op_type for node in explained.graph.node}


def test_every_second_row_and_column() -> None:
    for height, width, first in ((6, 8, 0), (7, 5, 1), (9, 9, 4)):
        slices = f"y = Slice(r, first{first}, far, columns, two)"
        slices = f"r = Slice(x, first{first}, far, rows, two) " + slices
        ends = {"far": integers(2**62), "rows": integers(2), "columns": integers(3), "two": integers(2)}
        assert_gradient(slices, image(2, height, width), **ends, **{f"first{first}": integers(first)})


@pytest.mark.parametrize("turned", [0, 1])
def test_gemm(turned: int) -> None:
    weight = constant(4, 3).T if turned else constant(4, 3)
    assert_gradient(f"y = Gemm<transB={turned}, alpha=0.5, beta=2.0>(x, w, b)", image(4), w=weight, b=constant(3))
    assert_gradient(
        f"e = Exp(x) y = Gemm<transB={turned}, beta=2.0>(x, w, e)",
        image(3),
        w=constant(3, 3).T if turned else constant(3, 3),
    )


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_of_two_branches(a: int, b: int) -> None:
    """Both factors depend on the image, whose rows and columns take the place of the batch."""
    body = f"r = Reshape(x, rows) s = Exp(r) y = Gemm<transA={a}, transB={b}, alpha=2.0>(s, r)"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (double[1,2,2] x) => (double[2,2] y) {{ {body} }}'
    )
    model.graph.initializer.append(numpy_helper.from_array(integers(2, 2), "rows"))
    # Here N is a matrix axis: both rows' logits 0 are differentiated at once.
    x, target = image(1, 2, 2), np.zeros(2, np.int64)
    explained = append_input_gradient(model, outputs=["gradient"])
    explained.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 2
    _, gradient = run(explained, x=x, target=target)
    for i in np.ndindex(x.shape):
        move = np.zeros_like(x)
        move[i] = 1e-6
        (ahead,), (behind,) = run(model, x=x + move), run(model, x=x - move)
        assert gradient[i] == pytest.approx((ahead - behind)[:, 0].sum() / 2e-6, rel=1e-5)


def test_matmul() -> None:
    assert_gradient("y = MatMul(x, w)", image(2, 3, 4), w=constant(4, 2))
    assert_gradient("y = MatMul(w, x)", image(2, 3, 4), w=constant(5, 3))
    assert_gradient("t = Transpose<perm=[0, 1, 3, 2]>(x) y = MatMul(x, t)", image(2, 3, 4))
    assert_gradient(
        "m = ReduceSum<keepdims=1>(x, axes) t = Transpose<perm=[0, 1, 3, 2]>(x) y = MatMul(m, t)",
        image(2, 3, 4),
        axes=integers(1),
    )


# Pooling.


@modest
@given(windows(pooling=True))
def test_max_pool(window: tuple[str, list[int], list[int]]) -> None:
    text, _, sizes = window
    assert_gradient(f"y = MaxPool<{text}>(x)", image(2, *sizes))


@modest
@given(windows(pooling=True), st.integers(0, 1))
def test_average_pool(window: tuple[str, list[int], list[int]], include: int) -> None:
    text, _, sizes = window
    assert_gradient(f"y = AveragePool<{text}, count_include_pad={include}>(x)", image(2, *sizes))


def _max_pool_of_ties(kernel: int, stride: int, pad: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return our gradient of a sum of weighted maxima, and torch's."""
    pool = f"MaxPool<kernel_shape={[kernel] * 2}, strides={[stride] * 2}, pads={[pad] * 4}>"
    model = classifier(f"y = {pool}(x)", x.shape)
    _, ours = run(append_input_gradient(model, outputs=["gradient"]), x=x[None], target=integers(1))
    mix = numpy_helper.to_array(model.graph.initializer[0])
    leaf = torch.tensor(x[None], requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(leaf, kernel, stride, pad)
    (theirs,) = torch.autograd.grad(pooled.flatten(1) @ torch.tensor(mix[:, 1]), leaf)
    return ours, theirs.numpy()


@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 3, 0)])
def test_a_tie_gives_the_whole_gradient_to_the_first_maximum_as_in_torch(
    kernel: int, stride: int, pad: int
) -> None:
    x = np.random.default_rng(0).integers(0, 3, (2, 9, 9)).astype(float)
    ours, theirs = _max_pool_of_ties(kernel, stride, pad, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_global_maxima_give_the_whole_gradient_to_the_first() -> None:
    x = np.array([[[1.0, 3.0, 2.0], [3.0, 0.0, 3.0]]])
    for body in ("y = GlobalMaxPool(x)", "y = ReduceMax(x, axes)"):
        model = classifier(body, x.shape, axes=integers(2, 3))
        _, gradient = run(append_input_gradient(model, outputs=["gradient"]), x=x[None], target=integers(0))
        assert np.flatnonzero(gradient).tolist() == [1]
