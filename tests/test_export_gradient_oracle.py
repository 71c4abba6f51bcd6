"""Our gradients of float graphs beside onnx-ad's, which somebody else wrote: the same operators, other rules."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ad
import pytest

from export.gradient.walk import append_input_gradient
from tests.test_export_gradient_operators import NOT_RUN, TRAINING, open_session, own_cases, with_logits

# Where onnx-ad 0.3 takes the gradient of another function: it divides by the wrong count, or sums another axis,
# where an empty list of axes means all of them, and has a gradient beyond the border of a crop. Central
# differences say that ours is right (test_onnx_own_cases).
OTHERWISE = {
    "test_reduce_l1_default_axes_keepdims_random",
    "test_reduce_l2_default_axes_keepdims_example",
    "test_reduce_l2_default_axes_keepdims_random",
    "test_reduce_mean_default_axes_keepdims_example",
    "test_reduce_mean_default_axes_keepdims_random",
    "test_reduce_sum_square_default_axes_keepdims_example",
    "test_reduce_sum_square_default_axes_keepdims_random",
    "test_resize_tf_crop_and_resize_extrapolation_value",
}


@pytest.mark.slow  # 30 s
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_onnx_ads() -> None:
    judged, otherwise = collections.Counter[str](), set()
    for case in own_cases():
        if any(word in case.name for word in TRAINING):
            continue
        inputs, outputs = case.data_sets[0]
        name, *others = [value.name for value in case.model.graph.input]
        constants = {n: np.asarray(a) for n, a in zip(others, inputs[1:], strict=True)}
        model = with_logits(case.model, np.size(outputs[0]), constants)
        try:
            open_session(model)
            theirs = open_session(onnx_ad.reverse(model, inputs=[name], outputs=["logits"], layout="onnx"))
        except (*NOT_RUN, onnx_ad.UnsupportedOperator):
            continue
        x = np.asarray(inputs[0], np.float32)
        x = x * min(1, 4 / np.abs(x).max()) + np.random.default_rng(1).uniform(-0.01, 0.01, x.shape)
        x = (np.abs(x) + 0.5 if np.isnan(outputs[0]).any() else x).astype(np.float32)
        first = np.array([[[1], [0]]], np.float32)  # of the two logits, for one direction
        expected = theirs.run([f"adj_{name}"], {name: x, "adj_logits": first})[0].reshape(x.shape)
        ours = open_session(append_input_gradient(model, outputs=("gradient",)))
        (found,) = ours.run(["gradient"], {name: x, "target": np.zeros(1, np.int64)})
        judged.update({node.op_type for node in case.model.graph.node})
        if not np.allclose(found, expected, rtol=1e-4, atol=1e-4 * np.nanmax(np.abs(expected)), equal_nan=True):
            otherwise.add(case.name)
    assert otherwise == OTHERWISE
    assert len(judged) >= 90
    assert judged.total() >= 510
