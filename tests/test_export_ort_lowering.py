"""What is moved for ONNX Runtime computes what it did before, and what would not is left where it is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from export.passes.clip_after_pooling import clip_after_pooling
from export.passes.move_codes import move_codes
from export.passes.take_pixels_as_codes import take_pixels_as_codes

MIDDLE = np.uint8(128)
IMAGES = np.arange(256, dtype=np.uint8).reshape(2, 16, 8, 1)
FRONT = """
    turned = Transpose<perm=[0, 3, 1, 2]>(image)
    cast = Cast<to=1>(turned)
    shifted = Sub(cast, mean)
    normalized = {scaled}
    codes = QuantizeLinear(normalized, scale, zero)
    x = DequantizeLinear(codes, scale, zero)
"""


def parse(body: str, *, mean: float = 128.0, by: float | np.ndarray = 0.0130719, scale: float = 0.0130719,
          zero: np.generic = MIDDLE, pads: tuple[int, ...] = (0,) * 8) -> onnx.ModelProto:  # fmt: skip
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (uint8[N,16,8,1] image) => (float[N,A,B,C] y) {{ {body} }}'
    )
    constants = {
        "mean": np.float32(mean), "by": np.asarray(by, np.float32), "scale": np.float32(scale), "zero": zero,
        "none": np.float32(0), "one": np.float32(1), "pads": np.array(pads, np.int64),
        "starts": np.array([1, 0]), "ends": np.array([9999, 9999]), "axes": np.array([2, 3]),
        "steps": np.array([2, 2]), "low": np.uint8(100), "high": np.uint8(150),
    }  # fmt: skip
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    (y,) = ReferenceEvaluator(model).run(None, {"image": IMAGES})
    return np.asarray(y)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-4, 1.0), st.booleans())
def test_pixels_on_their_grid_are_the_codes(scale: float, divides: bool) -> None:
    # 1 / s rounds: what is multiplied by is the scale itself, what is divided by its reciprocal.
    by, scaled = (1 / np.float32(scale), "Div(shifted, by)") if divides else (scale, "Mul(shifted, by)")
    model = parse(FRONT.format(scaled=scaled) + "y = Identity(x)", by=by, scale=scale)
    expected = run(model)
    take_pixels_as_codes(model, "normalized")
    assert operators(model) == ["Transpose", "DequantizeLinear", "Identity"]
    assert model.graph.node[1].output == ["normalized"]  # by which it can be differentiated
    np.testing.assert_array_equal(run(model), expected)


@pytest.mark.parametrize(
    ("settings", "after"),
    [
        ({"mean": 127.5}, "y = Identity(x)"),
        ({"scale": 0.02}, "y = Identity(x)"),
        ({"zero": np.int8(0)}, "y = Identity(x)"),
        ({"by": np.array([0.0130719, 0.014], np.float32).reshape(1, 2, 1, 1)}, "y = Identity(x)"),
        ({}, "y = Add(x, normalized)"),
    ],
)
def test_other_pixels_stay_normalized(settings: dict[str, object], after: str) -> None:
    model = parse(FRONT.format(scaled="Mul(shifted, by)") + after, **settings)  # type: ignore[arg-type]
    before = list(model.graph.node)
    take_pixels_as_codes(model, "normalized")
    assert list(model.graph.node) == before


@pytest.mark.parametrize("constant", ["", ", none"])
def test_a_shortcut_is_sliced_and_padded_as_codes(constant: str) -> None:
    body = f"""
        codes = Transpose<perm=[0, 3, 1, 2]>(image)
        x = DequantizeLinear(codes, scale, zero)
        thin = Slice(x, starts, ends, axes, steps)
        wide = Pad(thin, pads{constant})
        y = Add(wide, wide)
    """
    model = parse(body, pads=(0, 1, 0, 0, 0, 1, 0, 2))
    expected = run(model)
    assert (expected[:, 0] == 0).all()  # the padding
    move_codes(model)
    assert operators(model) == ["Transpose", "Slice", "Pad", "DequantizeLinear", "Add"]
    np.testing.assert_array_equal(run(model), expected)


@pytest.mark.parametrize(
    ("pad", "operator"),
    [("Pad(x, pads, one)", "Pad"), ("Pad<mode='reflect'>(x, pads)", "Pad"), ("Relu(x)", "Relu")],
)
def test_what_changes_values_is_not_done_to_codes(pad: str, operator: str) -> None:
    body = f"codes = Transpose<perm=[0, 3, 1, 2]>(image) x = DequantizeLinear(codes, scale, zero) y = {pad}"
    model = parse(body.replace("'", '"'), pads=(0, 0, 1, 0, 0, 0, 1, 0))
    expected = run(model)
    move_codes(model)
    assert operators(model) == ["Transpose", "DequantizeLinear", operator]
    np.testing.assert_array_equal(run(model), expected)


def test_what_only_the_gradient_slices_stays() -> None:
    body = """
        codes = Transpose<perm=[0, 3, 1, 2]>(image)
        x = DequantizeLinear(codes, scale, zero)
        thin = Slice(x, starts, ends, axes, steps)
        y = Identity(thin)
    """
    model = parse(body)
    for node in model.graph.node:
        node.input[:] = [name.replace("thin", "grad/thin") for name in node.input]
        node.output[:] = [name.replace("thin", "grad/thin") for name in node.output]
    before = list(model.graph.node)
    move_codes(model)
    assert list(model.graph.node) == before


CLIPPED = """
    turned = Transpose<perm=[0, 3, 1, 2]>(image)
    codes = Clip(turned, low, high)
    x = DequantizeLinear(codes, scale, zero)
    pooled = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(x)
"""


def test_codes_are_clipped_after_they_are_pooled() -> None:
    model = parse(CLIPPED + "y = Identity(pooled)")
    expected = run(model)
    clip_after_pooling(model)
    assert operators(model) == ["Transpose", "MaxPool", "Clip", "DequantizeLinear", "Identity"]
    np.testing.assert_array_equal(run(model), expected)


def test_the_gradient_gets_the_clipped_codes_from_before_the_pooling() -> None:
    model = parse(CLIPPED + "z = Identity(x) y = Identity(z)")
    *_, reads, gives = model.graph.node
    reads.output[0] = gives.input[0] = "grad/z"
    model.graph.output.add(name="pooled").CopyFrom(model.graph.output[0])
    model.graph.output[1].name = "pooled"
    expected = ReferenceEvaluator(model).run(None, {"image": IMAGES})
    clip_after_pooling(model)
    assert [n.name for n in model.graph.node if n.op_type == "Clip"] == ["grad/codes", "pooled/codes"]
    for found, wanted in zip(ReferenceEvaluator(model).run(None, {"image": IMAGES}), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    onnx.checker.check_model(model)


@pytest.mark.parametrize(
    "pooled",
    [
        "pooled = MaxPool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]>(x) y = Identity(pooled)",
        "pooled = MaxPool<kernel_shape=[2, 2]>(x) y = Identity(pooled)",
        "pooled = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(x) y = Identity(pooled)",
        "pooled = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(x) a = Identity(x) y = Identity(pooled)",
    ],
)
def test_codes_that_others_read_or_that_stay_as_many_are_clipped_first(pooled: str) -> None:
    model = parse(CLIPPED[: CLIPPED.index("pooled")] + pooled)
    before = list(model.graph.node)
    clip_after_pooling(model)
    assert list(model.graph.node) == before
