"""The straight-through gradient of Q/DQ graphs: gates, grids and integer weights."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import openvino
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from export.gradient.walk import append_input_gradient
from runtime.errors import ModelError
from tests.code_gate import with_code_gate
from train.quantization.quantizers import PACT

SIZE = 8


def parse(body: str, image: str = f"float[N,2,{SIZE},{SIZE}] x", **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g ({image}) => (float[N,K] logits) {{ {body} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return model


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def scalar(value: float, kind: type = np.float32) -> np.ndarray:
    return np.array(value, kind)


# How each target writes one PACT activation of `a` with n levels and clip `alpha` into `q`.
ACTIVATIONS = {
    "openvino": "c = Clip(a, zero, alpha) k = QuantizeLinear(c, s, u8) q = DequantizeLinear(k, s, u8)",
    "tensorrt": "c = Clip(a, zero, alpha) k = QuantizeLinear(c, s, s8) q = DequantizeLinear(k, s, s8)",
    "ort": "c = QuantizeLinear(a, s, u8) k = Clip(c, u8, n) q = DequantizeLinear(k, s, u8)",
    "signed": "c = Clip(a, low, alpha) k = QuantizeLinear(c, s, s8) q = DequantizeLinear(k, s, s8)",
    "relu": "c = Relu(a) k = QuantizeLinear(c, s, s8) q = DequantizeLinear(k, s, s8)",
    # A pair with two scales: steps are counted before the clip.
    "steps": "i = Div(a, s) c = Clip(i, zero, nf) k = QuantizeLinear(c, one, u8) q = DequantizeLinear(k, s, u8)",
}


def activation_constants(n: int, alpha: float) -> dict[str, np.ndarray]:
    return {
        "s": scalar(alpha / n),
        "zero": scalar(0.0),
        "alpha": scalar(alpha),
        "low": scalar(-alpha),
        "u8": scalar(0, np.uint8),
        "s8": scalar(0, np.int8),
        "n": scalar(n, np.uint8),
        "nf": scalar(n),
        "one": scalar(1.0),
    }


def fake_quantize(n: int, alpha: float, *, signed: bool, gate: str) -> nn.Module:
    """Return PACT as it trains, with either gate; tests/test_train_quantizers.py holds it to its equations."""
    bits = 8 if n >= 127 else n.bit_length() + signed
    pact = nn.Sequential(PACT(alpha, bits, signed=signed, full_range=n == 255))
    return with_code_gate(pact) if gate == "code" else pact


def weights(*shape: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 codes and one scale for each output channel."""
    random = np.random.default_rng(seed)
    return random.integers(-127, 128, shape, np.int8), random.uniform(1e-3, 3e-3, shape[0]).astype(np.float32)


def quantized_network(target: str, n: int, alpha: float) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """Return a strided Q/DQ network with int8 weights and a residual, and its dequantized weights."""
    first = "f = DequantizeLinear<axis=0>(fc, fs) a = Conv<pads=[1,1,1,1]>(x, f)"
    again = re.sub(r"\b([ickq])\b", r"\g<1>2", re.sub(r"\ba\b", "b", ACTIVATIONS[target]))
    second = "g = DequantizeLinear<axis=0>(gc, gs) h = Conv<pads=[1,1,1,1]>(q, g) b = Add(h, q)"
    third = "w = DequantizeLinear<axis=0>(wc, ws) d = Conv<strides=[2,2]>(q2, w) e = Flatten(d) "
    third += "logits = MatMul(e, m)"
    codes = {
        "f": weights(4, 2, 3, 3, seed=0),
        "g": weights(4, 4, 3, 3, seed=1),
        "w": weights(3, 4, 2, 2, seed=2),
    }
    mix = np.random.default_rng(3).normal(size=(48, 5)).astype(np.float32)
    constants = {f"{k}c": c for k, (c, _) in codes.items()} | {f"{k}s": s for k, (_, s) in codes.items()}
    model = parse(
        f"{first} {ACTIVATIONS[target]} {second} {again} {third}",
        m=mix,
        **constants,
        **activation_constants(n, alpha),
    )
    dequantized = {k: torch.tensor(c * s.reshape(-1, 1, 1, 1)) for k, (c, s) in codes.items()}
    return model, dequantized | {"m": torch.tensor(mix)}


@pytest.mark.parametrize("gate", ["code", "ste"])
@pytest.mark.parametrize(
    ("target", "n"),
    [
        ("openvino", 15),
        ("openvino", 127),
        ("openvino", 255),
        ("tensorrt", 3),
        ("tensorrt", 127),
        ("ort", 15),
        ("ort", 255),
        ("relu", 127),
        ("signed", 7),
        ("signed", 127),
        ("steps", 15),
        ("steps", 127),
    ],
)
def test_a_quantized_network_has_the_gradient_of_its_fake_quantized_twin(target: str, n: int, gate: str) -> None:
    alpha = 1.5
    model, w = quantized_network(target, n, alpha)
    x = np.random.default_rng(4).normal(size=(6, 2, SIZE, SIZE)).astype(np.float32)
    targets = np.arange(6) % 5
    logits, gradient = run(append_input_gradient(model, outputs=["gradient"], gate=gate), x=x, target=targets)

    leaf, signed = torch.tensor(x, requires_grad=True), target == "signed"
    conv, fake = nn.functional.conv2d, fake_quantize(n, alpha, signed=signed, gate=gate)
    q = fake(conv(leaf, w["f"], padding=1))
    q = fake(conv(q, w["g"], padding=1) + q)
    expected = conv(q, w["w"], stride=2).flatten(1) @ w["m"]
    (wanted,) = torch.autograd.grad(expected[torch.arange(6), torch.tensor(targets)].sum(), leaf)
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-3, atol=1e-3)
    assert np.linalg.norm(gradient - wanted.numpy()) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("gate", ["code", "ste"])
@pytest.mark.parametrize(
    ("target", "n"), [("openvino", 15), ("openvino", 127), ("openvino", 255), ("signed", 127)]
)
def test_openvino_gates_the_same_codes(target: str, n: int, gate: str) -> None:
    model, _ = quantized_network(target, n, 1.5)
    explained = append_input_gradient(model, outputs=["gradient"], gate=gate)
    x = np.random.default_rng(4).normal(size=(6, 2, SIZE, SIZE)).astype(np.float32)
    targets = np.arange(6) % 5
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    result = core.compile_model(core.read_model(explained.SerializeToString()), "CPU", settings)(
        {"x": x, "target": targets}
    )
    logits, gradient = run(explained, x=x, target=targets)
    np.testing.assert_allclose(result["logits"], logits, atol=1e-5)
    assert np.linalg.norm(result["gradient"] - gradient) < 1e-4 * np.linalg.norm(gradient)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(ACTIVATIONS.keys() - {"steps"})), st.sampled_from([3, 7, 15, 127]), st.floats(1e-3, 1e3)
)
def test_the_code_gate_is_exactly_zero_or_one(target: str, n: int, alpha: float) -> None:
    n = 127 if target == "relu" else n
    model = parse(
        f"a = Identity(x) {ACTIVATIONS[target]} logits = Identity(q)",
        "float[N,K] x",
        **activation_constants(n, alpha),
    )
    codes = np.arange(-n - 2, n + 3)
    x = (codes * np.float32(alpha / n)).astype(np.float32)[None]
    _, gradient = run(
        append_input_gradient(_classes(model, x.size), outputs=["gradient"]),
        x=np.repeat(x, x.size, 0),
        target=np.arange(x.size),
    )
    low = -n if target == "signed" else 0
    np.testing.assert_array_equal(np.diag(gradient), (low < codes) & (codes < n))


def _classes(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = count
    return model


def test_scales_and_zero_points_for_each_channel() -> None:
    body = (
        "k = QuantizeLinear<axis=1>(x, s, z) q = DequantizeLinear<axis=1>(k, s, z) e = Exp(q) "
        "logits = ReduceSum<keepdims=0>(e, axes)"
    )
    # A plain quantizer of an inner tensor: the whole range of the type is representable.
    body = "a = Neg(x) " + body.replace("(x,", "(a,")
    s, z = np.array([0.5, 0.1], np.float32), np.array([3, 100], np.uint8)
    model = _classes(parse(body, s=s, z=z, axes=np.array([2, 3])), 2)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2
    x = np.random.default_rng(0).normal(size=(2, 2, SIZE, SIZE)).astype(np.float32) * 8
    _, gradient = run(append_input_gradient(model, outputs=["gradient"]), x=x, target=np.array([0, 1]))
    code = np.rint(-x / s.reshape(2, 1, 1)) + z.reshape(2, 1, 1)
    value = (np.clip(code, 0, 255) - z.reshape(2, 1, 1)) * s.reshape(2, 1, 1)
    expected = -np.exp(value) * ((code > 0) & (code < 255)) * np.eye(2)[:, :, None, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert 0 < (gradient == 0).mean() < 1


@pytest.mark.parametrize("gate", ["code", "ste"])
def test_the_image_and_values_on_their_grid_pass_quantizers_unchanged(gate: str) -> None:
    """Nothing is clipped there, so there is nothing to gate: not even at the last code."""
    body = (
        "k = QuantizeLinear(x, s, u8) q = DequantizeLinear(k, s, u8) r = Reshape(q, shape) "
        "k2 = QuantizeLinear(r, s, u8) q2 = DequantizeLinear(k2, s, u8) logits = MatMul(q2, m)"
    )
    m = np.random.default_rng(0).normal(size=(2 * SIZE * SIZE, 3)).astype(np.float32)
    model = parse(body, m=m, shape=np.array([-1, 2 * SIZE * SIZE]), **activation_constants(255, 1.0))
    _, gradient = run(
        append_input_gradient(model, outputs=["gradient"], gate=gate),
        x=np.ones((1, 2, SIZE, SIZE), np.float32),
        target=np.array([2]),
    )
    np.testing.assert_allclose(gradient.ravel(), m[:, 2])


def test_a_clip_that_others_read_too_keeps_its_own_gate_for_them() -> None:
    """Quantized and unquantized users of one Relu6: each path has its gate, and the gradients add up."""
    body = (
        "a = Neg(x) c = Clip(a, zero, alpha) k = QuantizeLinear(c, s, u8) q = DequantizeLinear(k, s, u8) "
        "e = Exp(c) y = Add(q, e) f = Flatten(y) logits = MatMul(f, m)"
    )
    m = np.ones((2 * SIZE * SIZE, 1), np.float32)
    model = _classes(parse(body, m=m, **activation_constants(3, 6.0)), 1)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2
    x = -np.linspace(-2, 8, 2 * SIZE * SIZE, dtype=np.float32).reshape(1, 2, SIZE, SIZE)
    _, gradient = run(append_input_gradient(model, outputs=["gradient"]), x=x, target=np.array([0]))
    code = np.rint(np.clip(-x, 0, 6) / 2)
    expected = -1.0 * ((code > 0) & (code < 3)) - np.exp(-x) * ((x < 0) & (x > -6))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_integer_weights_of_groups(groups: int) -> None:
    codes, scales = weights(8, 4 // groups, 3, 3, seed=5)
    body = f"w = DequantizeLinear<axis=0>(c, s) a = Conv<group={groups}>(x, w) "
    body += "logits = ReduceMean<keepdims=0>(a, axes)"
    model = _classes(parse(body, "float[N,4,8,8] x", c=codes, s=scales, axes=np.array([2, 3])), 8)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    x = np.random.default_rng(6).normal(size=(8, 4, 8, 8)).astype(np.float32)
    _, gradient = run(append_input_gradient(model, outputs=["gradient"]), x=x, target=np.arange(8))
    leaf = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.conv2d(leaf, torch.tensor(codes * scales.reshape(-1, 1, 1, 1)), groups=groups)
    (wanted,) = torch.autograd.grad(y.mean((2, 3)).diagonal().sum(), leaf)
    np.testing.assert_allclose(gradient, wanted, atol=1e-7)


def test_bytes_are_differentiated_by_the_float_computed_from_them() -> None:
    body = (
        "t = Transpose<perm=[0, 3, 1, 2]>(image) c = Cast<to=1>(t) normalized = Mul(c, s) "
        "r = Relu(normalized) f = Flatten(r) logits = MatMul(f, m)"
    )
    m = np.random.default_rng(0).normal(size=(3 * SIZE * SIZE, 4)).astype(np.float32)
    model = parse(body, f"uint8[N,{SIZE},{SIZE},3] image", m=m, s=scalar(1 / 255))
    image = np.full((2, SIZE, SIZE, 3), 7, np.uint8)
    _, saliency = run(append_input_gradient(model), image=image, target=np.array([3, 0]))
    expected = np.abs(m.T.reshape(4, 3, SIZE, SIZE)[[3, 0]]).max(1)
    np.testing.assert_allclose(saliency, expected, rtol=1e-6)
    with pytest.raises(ModelError, match=r"^input 'image': is uint8, expected floats"):
        append_input_gradient(model, input="image")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("k = QuantizeLinear(x, s, u8) c = Cast<to=1>(k) logits = Flatten(c)", "passes through integers"),
        ("i = Cast<to=7>(x) c = Cast<to=1>(i) logits = Flatten(c)", "passes through integers"),
        (
            "m = ReduceMax<keepdims=0>(x) k = QuantizeLinear(x, m, u8) d = DequantizeLinear(k, m, u8) "
            "logits = Flatten(d)",
            "DequantizeLinear node 'd': its input 'm' is computed from the image",
        ),
    ],
)
def test_integer_paths_are_refused(body: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        append_input_gradient(parse(body, **activation_constants(255, 1.0)))
