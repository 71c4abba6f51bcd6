"""What OpenVINO computes wrongly is written so that it does not: asked of the plain engine."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.passes.average_exactly import average_exactly
from export.passes.keep_rounding import keep_rounding
from export.reference import reference_run

CHANNELS, SIDE = 8, 8
# No sum of these steps lies on the border between two codes of another one's.
SCALES = {"a": 3.0133 / 15, "b": 1.0719 / 15, "c": 0.5351 / 15, "after": 2.5371 / 15}
BIAS_CODES = 100


class Graph:
    """A graph of quantized convolutions whose biases are whole accumulator steps: no engine has to round them."""

    def __init__(self, seed: int, *, signed: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.signed = signed
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.quantize("x", "image", 0.11)

    def constant(self, name: str, value: object) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def add(self, op_type: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def quantize(self, source: str, name: str, scale: float, *, clip: float | None = None) -> str:
        zero = self.constant(f"{name}/zero", np.array(0, np.int8 if self.signed else np.uint8))
        step = self.constant(f"{name}/scale", np.float32(scale))
        if clip is not None:
            low = self.constant(f"{name}/low", np.float32(-clip if self.signed else 0))
            high = self.constant(f"{name}/high", np.float32(clip))
            source = self.add("Clip", [source, low, high], f"{name}/clipped")
        self.add("QuantizeLinear", [source, step, zero], f"{name}/codes")
        return self.add("DequantizeLinear", [f"{name}/codes", step, zero], name)

    def conv(self, source: str, name: str, kernel: int, *, inputs: int = CHANNELS, scale: float = 0.11) -> str:
        codes = self.rng.integers(-7, 8, (CHANNELS, inputs, kernel, kernel)).astype(np.int8)
        scales = self.rng.uniform(0.01, 0.02, CHANNELS).astype(np.float32)
        steps = self.rng.integers(-BIAS_CODES, BIAS_CODES, CHANNELS)
        bias = (steps * (np.float32(scale) * scales)).astype(np.float32)
        weight = self.add(
            "DequantizeLinear",
            [self.constant(f"{name}/w", codes), self.constant(f"{name}/s", scales)],
            f"{name}/weight",
            axis=0,
        )
        bias_name = self.constant(f"{name}/bias", bias)
        return self.add("Conv", [source, weight, bias_name], name, pads=[kernel // 2] * 4)

    def activation(self, name: str, kernel: int) -> str:
        self.conv("image", f"{name}/conv", kernel)
        return self.quantize(f"{name}/conv", name, SCALES[name], clip=15 * SCALES[name])

    def model(self, output: str, *, open_batch: bool) -> onnx.ModelProto:
        batch = "N" if open_batch else 4
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, CHANNELS, SIDE, SIDE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, list("NCHW"))],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def difference(model: onnx.ModelProto, *, signed: bool) -> float:
    """Return how far plain OpenVINO is from the graph as it is written."""
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(7).normal(size=(4, CHANNELS, SIDE, SIDE)).astype(np.float32) * 4 - 2 * signed
    (expected,) = reference_run(model)[0]({"x": x}).values()
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU",
                                  {"INFERENCE_PRECISION_HINT": "f32"})  # fmt: skip
    return float(np.abs(compiled(x)[0] - expected).max())


POOLS = {
    "2 by 2": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "3 by 3, one apart": {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
    "3 by 3, pixels alone": {"kernel_shape": [3, 3], "pads": [1] * 4},
    "3 by 3, reaching over": {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    "all": {"kernel_shape": [SIDE, SIDE]},
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_average_pooling_of_codes_is_not_rounded(pool: str, signed: bool) -> None:
    for after in ("nothing", "quantizer", "convolution"):
        graph = Graph(1, signed=signed)
        graph.add("AveragePool", [graph.activation("a", 3)], "pooled", **POOLS[pool])
        output = "pooled"
        if after != "nothing":
            output = graph.quantize(output, "after", SCALES["after"], clip=15 * SCALES["after"])
        if after == "convolution":
            output = graph.conv(output, "last", 1, scale=SCALES["after"])
        model = graph.model(output, open_batch=True)
        average_exactly(model)
        assert "AveragePool" not in {node.op_type for node in model.graph.node}
        assert difference(model, signed=signed) < 1e-5, after


MERGES = {
    "nothing": lambda g: g.activation("a", 3),
    "Relu": lambda g: g.add("Relu", [g.activation("a", 3)], "merged"),
    "MaxPool": lambda g: g.add("MaxPool", [g.activation("a", 3)], "merged", kernel_shape=[3, 3], pads=[1] * 4),
    "Pad": lambda g: g.add(
        "Pad", [g.activation("a", 3), g.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))], "merged"
    ),
    "Add": lambda g: g.add("Add", [g.activation("a", 3), g.activation("b", 1)], "merged"),
    "Sub": lambda g: g.add("Sub", [g.activation("a", 3), g.activation("b", 1)], "merged"),
    "Add of a constant": lambda g: g.add(
        "Add",
        [g.activation("a", 3), g.constant("shift", g.rng.uniform(-0.5, 0.5, (CHANNELS, 1, 1)).astype(np.float32))],
        "merged",
    ),
    "Concat": lambda g: g.add("Concat", [g.activation("a", 3), g.activation("b", 1)], "merged", axis=1),
    "Concat of three": lambda g: g.add(
        "Concat", [g.activation("a", 3), g.activation("b", 1), g.activation("c", 5)], "merged", axis=1
    ),
    "Concat, pooled": lambda g: g.add(
        "MaxPool",
        [g.add("Concat", [g.activation("a", 3), g.activation("b", 1)], "joined", axis=1)],
        "merged",
        kernel_shape=[2, 2],
        strides=[2, 2],
    ),
    "Concat of Concats": lambda g: g.add(
        "Concat",
        [g.add("Concat", [g.activation("a", 3), g.activation("b", 1)], "joined", axis=1), g.activation("c", 3)],
        "merged",
        axis=1,
    ),
    "Add with a convolution": lambda g: g.add(
        "Add", [g.activation("a", 3), g.conv("image", "other", 1)], "merged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("open_batch", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("merge", MERGES)
def test_a_quantizer_behind_another_rounds_what_that_one_has_rounded(
    merge: str, signed: bool, open_batch: bool
) -> None:
    graph = Graph(2, signed=signed)
    merged = MERGES[merge](graph)
    model = graph.model(
        graph.quantize(merged, "after", SCALES["after"], clip=15 * SCALES["after"]), open_batch=open_batch
    )
    keep_rounding(model)
    assert difference(model, signed=signed) < 1e-5
    # Where a convolution's own sum is added, the engine is right, and a barrier would cost its fusion.
    barriers = sum(node.op_type == "Max" for node in model.graph.node)
    assert barriers == (0 if merge == "Add with a convolution" else 1)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    ceil_mode=st.integers(0, 1),
    count_include_pad=st.integers(0, 1),
    auto_pad=st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
)
def test_averages_are_those_of_average_pooling(
    sizes: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    ceil_mode: int,
    count_include_pad: int,
    auto_pad: str,
) -> None:
    assume(all(pads[i] < kernel[i] and pads[i + 2] < kernel[i] for i in range(2)))
    assume(all(sizes[i] + (auto_pad == "NOTSET") * (pads[i] + pads[i + 2]) >= kernel[i] for i in range(2)))
    if auto_pad.startswith("SAME"):
        # Of less than no padding ONNX Runtime leaves the first pixel out, and OpenVINO does not.
        outputs = [-(-sizes[i] // strides[i]) for i in range(2)]
        assume(all((outputs[i] - 1) * strides[i] + kernel[i] - sizes[i] > -2 for i in range(2)))
    attributes: dict[str, object] = {"kernel_shape": kernel, "strides": strides}
    if auto_pad == "NOTSET":
        attributes |= {"pads": pads, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    else:
        attributes["auto_pad"] = auto_pad
    node = helper.make_node("AveragePool", ["x"], ["y"], name="pool", **attributes)
    shape = [2, 3, *sizes]
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    average_exactly(model)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
