"""A float ONNX classifier as a PyTorch network gives the file's logits; quantized, it is exported like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bench.measure import data
from export.onnx import main
from export.sources.onnx_file import read_classifier
from export.sources.torch_from_onnx import to_torch
from runtime.classifier import Classifier
from runtime.errors import ModelError, OptionError
from train.data.images import ImageData

SIDE, CLASSES = 9, 5


def write(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Any], **options: Any) -> onnx.ModelProto:
    """Write a classifier that ends in the mean of what `nodes` give as `features`, and return it."""
    channels, opset = options.get("channels", 3), options.get("opset", 18)
    shape = options.get("shape", ["N", channels, SIDE, SIDE])
    tail = [
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["rows"]),
        helper.make_node("MatMul", ["rows", "head"], ["scores"]),
        helper.make_node("Add", ["scores", "head_bias"], ["logits"]),
    ]
    rng = np.random.default_rng(1)
    width = options.get("width", 4)
    constants = {
        **constants, "head": rng.normal(size=(width, CLASSES)).astype(np.float32),
        "head_bias": rng.normal(size=CLASSES).astype(np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        [*nodes, *tail], "net", [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], CLASSES])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return model


def compare(path: Path, model: onnx.ModelProto, n: int = 3) -> torch.nn.Module:
    """Assert that the network read from a file gives the logits that ONNX Runtime gives, and return it."""
    found = read_classifier(path)
    network = to_torch(found)
    assert found.size is not None
    x = np.random.default_rng(0).normal(size=(n, found.channels, *found.size)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = x if found.layout == "NCHW" else x.transpose(0, 2, 3, 1)
    parts = [session.run(None, {"image": np.ascontiguousarray(given[i : i + 1])})[0] for i in range(n)]
    with torch.no_grad():
        logits = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(logits, np.concatenate(parts), rtol=1e-4, atol=1e-5)
    return network


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 1), (3, 3), (2, 5), (4, 1)]), st.integers(1, 3), st.integers(1, 2),
    st.sampled_from([1, 2]), st.sampled_from(["none", "even", "uneven", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    st.booleans(),
)  # fmt: skip
def test_every_convolution(
    tmp_path_factory: pytest.TempPathFactory,
    kernel: tuple[int, int],
    stride: int,
    dilation: int,
    groups: int,
    pads: str,
    bias: bool,
) -> None:
    assume(dilation == 1 or not pads.startswith("SAME"))  # which ONNX Runtime refuses
    rng = np.random.default_rng(0)
    attributes: dict[str, Any] = {"strides": [stride, stride], "dilations": [dilation, dilation], "group": groups}
    if pads in ("even", "uneven"):
        attributes["pads"] = [1, 2, 1, 2] if pads == "even" else [0, 1, 2, 0]
    elif pads != "none":
        attributes["auto_pad"] = pads
    constants = {"w": rng.normal(size=(4, 2 // groups, *kernel)).astype(np.float32)}
    constants |= {"b": rng.normal(size=4).astype(np.float32)} if bias else {}
    stem = {"stem": rng.normal(size=(2, 3, 1, 1)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["two"]),
        helper.make_node("Conv", ["two", *constants], ["features"], **attributes),
    ]
    path = tmp_path_factory.mktemp("conv") / "conv.onnx"
    network = compare(path, write(path, nodes, {**stem, **constants}))
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in network.modules()) == 2


ELEMENTWISE = {
    "Relu": {}, "LeakyRelu": {"alpha": 0.2}, "Elu": {"alpha": 0.7}, "Sigmoid": {}, "Tanh": {}, "HardSwish": {},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "Softplus": {}, "Erf": {}, "Exp": {}, "Neg": {},
    "LRN": {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 2.0},
    "MaxPool": {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [0, 0, 1, 1]},
    "AveragePool": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    "GlobalMaxPool": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_every_operator_of_one_input(kind: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["x"]),
        helper.make_node(kind, ["x"], ["features"], **ELEMENTWISE[kind]),
    ]
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    compare(tmp_path / "net.onnx", write(tmp_path / "net.onnx", nodes, {"w": weight}))


def test_a_network_of_many_operators_and_computed_shapes(tmp_path: Path) -> None:
    """A channel shuffle whose sizes the graph computes, a gate, a split, sums with constants, odd borders."""
    rng = np.random.default_rng(0)
    make = helper.make_node
    nodes = [
        make("Conv", ["image", "w"], ["x0"], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["x0", "gamma", "beta", "mean", "var"], ["x1"], epsilon=0.1),
        make("Clip", ["x1", "zero", "six"], ["x2"]),
        make("Shape", ["x2"], ["shape"]),
        make("Gather", ["shape", "first"], ["batch"]),
        make("Concat", ["batch", "groups"], ["split_shape"], axis=0),
        make("Reshape", ["x2", "split_shape"], ["x3"]),
        make("Transpose", ["x3"], ["x4"], perm=[0, 2, 1, 3, 4]),
        make("Reshape", ["x4", "shape"], ["x5"]),
        make("Split", ["x5"], ["left", "right"], axis=1, num_outputs=2),
        make("Slice", ["x5", "begin", "end", "axis", "step"], ["every"]),
        make("Concat", ["right", "left"], ["x6"], axis=1),
        make("ReduceMean", ["x6", "sides"], ["gate0"], keepdims=1),
        make("Sigmoid", ["gate0"], ["gate"]),
        make("Mul", ["x6", "gate"], ["x7"]),
        make("Sub", ["x7", "half"], ["x8"]),
        make("Div", ["x8", "each"], ["x9"]),
        make("PRelu", ["x9", "slope"], ["x10"]),
        make("Pad", ["x10", "border"], ["x11"]),
        make("Concat", ["x10", "x9", "every"], ["x12"], axis=1),
        make("Conv", ["x12", "again"], ["x13"], pads=[0, 0, 1, 1]),
        make("Add", ["x13", "added"], ["x14"]),
        make("Dropout", ["x14"], ["features"]),
    ]
    f32 = np.float32
    constants = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(f32), "gamma": rng.normal(size=4).astype(f32),
        "beta": rng.normal(size=4).astype(f32), "mean": rng.normal(size=4).astype(f32),
        "var": rng.uniform(0.5, 2, 4).astype(f32), "zero": f32(0), "six": f32(6), "first": np.array([0]),
        "groups": np.array([2, 2, SIDE, SIDE]), "begin": np.array([0, 0]), "end": np.array([4, 2**40]),
        "axis": np.array([1, -1]), "step": np.array([2, 1]), "sides": np.array([2, 3]), "half": f32(0.5),
        "each": rng.uniform(1, 2, (1, 4, 1, 1)).astype(f32), "slope": rng.uniform(0, 1, (4, 1, 1)).astype(f32),
        "border": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "again": rng.normal(size=(4, 10, 2, 2)).astype(f32),
        "added": rng.normal(size=(1, 4, 1, 1)).astype(f32),
    }  # fmt: skip
    network = compare(tmp_path / "net.onnx", write(tmp_path / "net.onnx", nodes, constants))
    kinds = [type(layer).__name__ for layer in network.modules()]
    assert (kinds.count("Conv2d"), kinds.count("BatchNorm2d"), kinds.count("Linear")) == (2, 1, 1)
    (second,) = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels == 10]
    np.testing.assert_array_equal(second.bias.detach().numpy(), constants["added"].ravel())  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["ReduceMin", "ReduceMax", "ReduceSum", "Max", "Min", "Sum"])
def test_reductions_and_extremes(kind: str, tmp_path: Path) -> None:
    constants = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = [helper.make_node("Conv", ["image", "w"], ["x"])]
    if kind.startswith("Reduce"):
        constants["axes"] = np.array([2])
        nodes.append(helper.make_node(kind, ["x", "axes"], ["r"]))
        nodes.append(helper.make_node("Sub", ["x", "r"], ["features"]))
    else:
        constants |= {"bound": np.full((4, 1, 1), 0.1, np.float32), "row": np.linspace(-1, 1, 7, dtype=np.float32)}
        nodes.append(helper.make_node(kind, ["x", "bound", "row"], ["features"]))
    compare(tmp_path / "net.onnx", write(tmp_path / "net.onnx", nodes, constants))


def test_operators_with_a_body_are_read_by_it(tmp_path: Path) -> None:
    constants = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["x"]),
        helper.make_node("MeanVarianceNormalization", ["x"], ["n"], axes=[1, 2, 3]),
        helper.make_node("Celu", ["n"], ["features"]),
    ]
    compare(tmp_path / "net.onnx", write(tmp_path / "net.onnx", nodes, constants))


@pytest.mark.parametrize("form", ["columns", "wide border", "one axis", "twice"])
def test_what_only_looks_like_a_layer_s_own(form: str, tmp_path: Path) -> None:
    """A constant along the columns of as many channels is no bias; nor has PyTorch every border of a pooling."""
    rng, make = np.random.default_rng(0), helper.make_node
    width = 7 if form == "columns" else 4
    constants = {"w": rng.normal(size=(width, 3, 3, 3)).astype(np.float32)}
    nodes = [make("Conv", ["image", "w"], ["a"])]
    if form == "columns":
        constants["row"] = rng.normal(size=7).astype(np.float32)
        nodes.append(make("Add", ["a", "row"], ["features"]))
    elif form == "wide border":
        nodes.append(
            make("AveragePool", ["a"], ["features"], kernel_shape=[3, 3], pads=[2] * 4, count_include_pad=1)
        )
    elif form == "one axis":
        constants["axes"] = np.array([2, 3])
        nodes += [
            make("ReduceMean", ["a", "axes"], ["m"], keepdims=0),
            make("Unsqueeze", ["m", "axes"], ["features"]),
        ]
    else:
        constants["k"] = rng.normal(size=(1, 4, 1, 1)).astype(np.float32)
        nodes += [make("Add", ["a", "k"], ["b"]), make("Mul", ["a", "b"], ["features"])]
    compare(tmp_path / "net.onnx", write(tmp_path / "net.onnx", nodes, constants, width=width))


@pytest.mark.parametrize(
    ("operator", "attributes", "said"),
    [("ReduceMean", {}, "averages"), ("Concat", {"axis": 0}, "joins"), ("Slice", {}, "cuts")],
)
def test_what_mixes_images_is_refused(
    operator: str, attributes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    constants = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    inputs = {"ReduceMean": ["a", "axes"], "Concat": ["a", "a"], "Slice": ["a", "axes", "ends", "axes"]}[operator]
    constants |= {name: np.array([0 if name == "axes" else 1]) for name in inputs if name != "a"}
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"]),
        helper.make_node(operator, inputs, ["features"], **attributes),
    ]
    write(tmp_path / "net.onnx", nodes, constants)
    with pytest.raises(ModelError, match=f"{said} along the first axis, of the images; export the network itself"):
        to_torch(read_classifier(tmp_path / "net.onnx"))


def test_an_image_with_its_channels_last_is_not_turned_twice(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["turned", "w"], ["features"], auto_pad="SAME_UPPER", strides=[2, 2]),
    ]
    model = write(tmp_path / "net.onnx", nodes, {"w": weight}, shape=[1, SIDE, SIDE, 3])
    network = compare(tmp_path / "net.onnx", model)
    assert "permute" not in {node.target for node in network.graph.nodes}  # type: ignore[union-attr,operator]


def digits_file(path: Path, digits: ImageData) -> tuple[onnx.ModelProto, float]:
    """Train a convolution and a layer on digits for a second; write it as ONNX; return it and its accuracy."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10)
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    x, y = digits.train_images[:].float() / 255, digits.train_labels
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    parts = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    make = helper.make_node
    nodes = [
        make("Conv", ["image", "0.weight", "0.bias"], ["a"]), make("Relu", ["a"], ["b"]),
        make("Flatten", ["b"], ["c"]), make("Gemm", ["c", "3.weight", "3.bias"], ["d"], transB=1),
        make("Softmax", ["d"], ["p"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "digits", [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(value, name) for name, value in parts.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    path.write_bytes(model.SerializeToString())
    with torch.no_grad():
        found = network(digits.test_images[:].float() / 255).argmax(1)
    return model, 100 * float((found == digits.test_labels).double().mean())


@pytest.mark.parametrize(("bits", "loss"), [("8", 1.0), ("4", 4.0)])
def test_a_float_file_is_quantized_by_one_command(
    bits: str, loss: float, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.onnx"
    _, expected = digits_file(path, digits)
    before = path.read_bytes()
    main([str(path), "--int8", "--bits", bits, "--data", "digits"])
    out = capsys.readouterr().out
    assert path.read_bytes() == before
    assert f"float {expected:.2f} %, calibrated, {bits} bit " in out
    assert "maps against those of the float network: Spearman " in out
    test = data.load("digits")
    with Classifier(tmp_path / "mine_int8.onnx") as classifier:
        assert classifier.manifest.precision == "int8"
        assert classifier.manifest.arch == "mine"
        predicted = [p.index for p in classifier.predict(list(test.images))]
        assert classifier.explain(test.images[0]).map.shape == (8, 8)
    assert 100 * float(np.mean(np.array(predicted) == test.labels)) >= expected - loss


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (["Conv", "Det"], "Det node 'x': cannot be quantized; export the network itself"),
        (["Conv", "QuantizeLinear"], "is quantized already; leave --int8 and --bits out to take it as it is"),
    ],
)
def test_what_cannot_be_quantized_names_the_node_and_the_remedy(
    nodes: list[str], message: str, tmp_path: Path
) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    make = helper.make_node
    if nodes[1] == "Det":
        more = [make("Conv", ["image", "w"], ["y"]), make("Det", ["y"], ["x"], name="x"),
                make("Reshape", ["x", "shape"], ["features"])]  # fmt: skip
    else:
        more = [make("Conv", ["image", "w"], ["y"]), make("QuantizeLinear", ["y", "scale", "zero"], ["c"]),
                make("DequantizeLinear", ["c", "scale", "zero"], ["features"])]  # fmt: skip
    constants = {"w": weight, "shape": np.array([-1, 4, 1, 1]), "scale": np.float32(0.1), "zero": np.uint8(0)}
    used = {name for node in more for name in node.input}
    write(tmp_path / "net.onnx", more, {name: value for name, value in constants.items() if name in used})
    with pytest.raises(ModelError, match=message):
        to_torch(read_classifier(tmp_path / "net.onnx"))


def test_options_and_data_that_are_missing_are_told(tmp_path: Path, digits: ImageData) -> None:
    digits_file(tmp_path / "mine.onnx", digits)
    with pytest.raises(OptionError, match="needs real images, to choose grids by and to verify with"):
        main([str(tmp_path / "mine.onnx"), "--int8"])
    with pytest.raises(OptionError, match="--state: is not for an ONNX file"):
        main([str(tmp_path / "mine.onnx"), "--int8", "--data", "digits", "--state", "x.pt"])
    for option, value, expected in (("std", "0", "numbers above 0"), ("mean", "nan", "finite numbers")):
        with pytest.raises(OptionError, match=f"--{option} {value}.*: expected {expected}"):
            main([str(tmp_path / "mine.onnx"), f"--{option}", value])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.onnx"]
