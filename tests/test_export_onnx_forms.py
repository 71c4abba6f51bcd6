"""Forms that public ONNX classifiers have: each becomes class and map, or one line that tells what to do."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image

from export.gradient.__main__ import main as differentiate
from export.onnx import main
from export.reference import reference_run
from export.sources.onnx_file import read_classifier
from runtime.classifier import Classifier
from runtime.errors import ClearpactError, FileError, ModelError, OptionError
from runtime.session import open_session

SIDE, CHANNELS, CLASSES = 8, 3, 4
FRAMES = np.random.default_rng(1).integers(0, 256, (6, SIDE, SIDE, CHANNELS), dtype=np.uint8)
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.normal(size=(6, CHANNELS, 3, 3), scale=0.4).astype(np.float32),
    "b": RNG.normal(size=6).astype(np.float32),
    "h": RNG.normal(size=(CLASSES, 6, 1, 1)).astype(np.float32),
    "axes": np.array([2, 3]),
}
BODY = "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) y = Conv(p, h)"


def net(body: str = BODY, image: str = f"float[1,{CHANNELS},{SIDE},{SIDE}] x",
        output: str = f"float[1,{CLASSES},1,1] y", opset: int = 17) -> onnx.ModelProto:  # fmt: skip
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> net ({image}) => ({output}) {{ {body} }}'
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in WEIGHTS.items() if k in used)
    return model


def run(path: Path, images: np.ndarray) -> np.ndarray:
    """Return a file's first output [n, K] for images that it takes one at a time."""
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0].reshape(1, -1) for image in images])


def exported(path: Path, *options: str, target: str = "openvino") -> Classifier:
    output = path.with_name("ours.onnx")
    main([str(path), "--target", target, "-o", str(output), *options])
    classifier = Classifier(output, engine=target)
    assert classifier.explain(FRAMES[0]).map.max() > 0
    return classifier


FLOATS = (FRAMES / np.float32(255)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("target", ["openvino", "ort"])
@pytest.mark.parametrize("ends", ["", "s", "s, flat"])
def test_logits_of_four_axes_and_their_softmax(ends: str, target: str, tmp_path: Path) -> None:
    body, output = BODY, f"float[1,{CLASSES},1,1] y"
    if "s" in ends:
        body, output = f"{body} s = Softmax<axis=1>(y)", output.replace(" y", " s")
    if "flat" in ends:
        body, output = (
            f"{body} k = Constant<value_ints=[1,{CLASSES}]>() o = Reshape(s, k)",
            f"float[1,{CLASSES}] o",
        )
    path = tmp_path / "net.onnx"
    path.write_bytes(net(body, output=output).SerializeToString())
    expected = run(path, FLOATS)
    found = exported(path, target=target).logits(FRAMES)
    if ends:
        found = np.exp(found) / np.exp(found).sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_gradient_alone_takes_logits_of_four_axes_and_a_size(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(
        net(image=f"float[N,{CHANNELS},H,W] x", output=f"float[N,{CLASSES},a,b] y").SerializeToString()
    )
    with pytest.raises(ModelError, match="must be fixed along axes"):
        differentiate([str(path)])
    differentiate([str(path), "--size", f"{SIDE}"])
    explained = onnx.load(tmp_path / "net_saliency.onnx")
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in explained.graph.output}
    assert shapes == {"logits": [0, CLASSES], "saliency": [0, SIDE, SIDE]}
    with pytest.raises(OptionError, match="--size 8x: expected pixels"):
        differentiate([str(path), "--size", "8x"])


def test_an_open_size_is_given(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    body = f"{BODY} f = Flatten(y)"
    path.write_bytes(net(body, f"float[N,{CHANNELS},H,W] x", f"float[N,{CLASSES}] f").SerializeToString())
    np.testing.assert_allclose(exported(path, "--size", "8").logits(FRAMES), run(path, FLOATS), atol=1e-5)


def test_bytes_that_the_graph_casts_need_no_options(tmp_path: Path) -> None:
    body = "f = Cast<to=1>(image) x = Transpose<perm=[0,3,1,2]>(f) " + BODY
    model = net(body, f"uint8[1,{SIDE},{SIDE},{CHANNELS}] image")
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    found = read_classifier(path)
    assert (found.layout, found.integers and found.integers.kind) == ("NHWC", TensorProto.UINT8)
    np.testing.assert_allclose(exported(path).logits(FRAMES), run(path, FRAMES), rtol=1e-4)
    with pytest.raises(OptionError, match="takes pixels as integers; drop --mean and --std"):
        main([str(path), "--mean", "0.5"])


class _Photos(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = iter([{"x": image[None]} for image in FLOATS])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def quantized(path: Path, form: QuantFormat, *, per_channel: bool) -> Path:
    """Quantize a small network by ONNX Runtime."""
    body = BODY.partition(" y =")[0] + " f = Flatten(p) o = Gemm<transB=1>(f, g, d)"
    model = net(body, output=f"float[1,{CLASSES}] o")
    model.graph.initializer.append(numpy_helper.from_array(WEIGHTS["h"].reshape(CLASSES, 6), "g"))
    model.graph.initializer.append(numpy_helper.from_array(WEIGHTS["b"][:CLASSES], "d"))
    plain = path.with_name("float.onnx")
    plain.write_bytes(model.SerializeToString())
    logging.getLogger().setLevel(logging.ERROR)
    quantize_static(
        str(plain), str(path), _Photos(), quant_format=form, per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["openvino", "ort"])
@pytest.mark.parametrize(("form", "per_channel"), [("QOperator", True), ("QOperator", False), ("QDQ", True)])
def test_quantized_files_keep_their_codes(form: str, per_channel: bool, target: str, tmp_path: Path) -> None:
    path = quantized(tmp_path / "net.onnx", QuantFormat[form], per_channel=per_channel)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert ("QLinearConv" in kinds) == (form == "QOperator")
    classifier = exported(path, target=target)
    assert classifier.session.manifest.precision == "int8"
    ours = onnx.load(tmp_path / "ours.onnx")
    codes = [
        numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.data_type == TensorProto.INT8
    ]
    kept = [numpy_helper.to_array(t) for t in ours.graph.initializer if t.data_type == TensorProto.INT8]
    for weight in (code for code in codes if code.ndim > 1):
        assert any(np.array_equal(weight, other) for other in kept)
    step = max(
        float(numpy_helper.to_array(t))
        for t in onnx.load(path).graph.initializer
        if t.name.startswith("o_scale") or t.name.endswith("o_scale")
    )
    # Codes of the result may lie a step apart, where a sum is rounded otherwise.
    np.testing.assert_allclose(classifier.logits(FRAMES), run(path, FLOATS), atol=1.01 * step)


def test_codes_that_are_moved_before_they_are_dequantized(tmp_path: Path) -> None:
    """As TFLite's converter writes them: int8 image, moved; int8 pooled and reshaped; a softmax in int8."""
    body = (
        "xt = Transpose<perm=[0,3,1,2]>(image) x = DequantizeLinear(xt, one, low) "
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) rq = QuantizeLinear(r, s, z) "
        "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(rq) rd = DequantizeLinear(m, s, z) "
        "p = GlobalAveragePool(rd) pq = QuantizeLinear(p, s, z) n = Constant<value_ints=[-1,6]>() "
        "pr = Reshape(pq, n) pd = DequantizeLinear(pr, s, z) l = MatMul(pd, g) lq = QuantizeLinear(l, s, z) "
        "ld = DequantizeLinear(lq, s, z) e = Softmax(ld) y = QuantizeLinear(e, t, low)"
    )
    model = net(body, f"int8[1,{SIDE},{SIDE},{CHANNELS}] image", f"int8[1,{CLASSES}] y")
    constants = {
        "one": np.float32(1), "low": np.int8(-128), "s": np.float32(9.0), "z": np.int8(-20),
        "t": np.float32(1 / 256),
        "g": RNG.normal(size=(6, CLASSES), scale=0.1).astype(np.float32),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    expected = run(path, (FRAMES.astype(np.int16) - 128).astype(np.int8)).astype(np.float32)
    found = exported(path, target="ort").logits(FRAMES)
    probabilities = np.exp(found - found.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    np.testing.assert_allclose(np.minimum(256 * probabilities - 128, 127), expected, atol=0.51)
    assert np.ptp(expected) > 20


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save_model(net(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert exported(path).logits(FRAMES).shape == (6, CLASSES)
    (tmp_path / "net.data").unlink()
    for command in (main, differentiate):
        with pytest.raises(FileError, match=r"net\.onnx: its weights lie in net\.data, which is not beside it"):
            command([str(path)])


def test_an_unsorted_graph_with_an_output_named_twice(tmp_path: Path) -> None:
    model = net()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.name = ""
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    sorted_path = tmp_path / "sorted.onnx"
    sorted_path.write_bytes(net().SerializeToString())
    np.testing.assert_allclose(exported(path).logits(FRAMES), run(sorted_path, FLOATS), atol=1e-5)


DYNAMIC = "q, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, z) " + BODY.replace("(x,", "(d,")
REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "two heads": (
        net(f"{BODY} f = Flatten(y) e = Exp(f)", output=f"float[1,{CLASSES}] f, float[1,{CLASSES}] e"),
        r"2 of the outputs \(f \[\?, 4\], e \[\?, 4\]\) are logits \[N, K\], expected one; cut the others off",
    ),
    "a map": (
        net(BODY.partition(" p =")[0], output=f"float[1,6,{SIDE},{SIDE}] r"),
        r"0 of the outputs \(r \[\?, 6, 8, 8\]\) are logits",
    ),
    "dynamic codes": (net(DYNAMIC), "DynamicQuantizeLinear node 'q': quantizes by the range of each image"),
    "integers that are no image": (
        net("o = Sub(i, i) x = Cast<to=1>(o) " + BODY, f"uint8[1,{CHANNELS},{SIDE},{SIDE}] i"),
        "input 'i': is uint8 and read by Sub, expected floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_classifier_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    model, text = REFUSED[name]
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ClearpactError, match=text) as caught:
        main([str(path), "-o", str(tmp_path / "ours.onnx")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours.onnx").exists()


BEHIND_CODES = [
    "Relu(d)", "LeakyRelu<alpha=0.2>(d)", "PRelu(d, k)", "Elu(d)", "Selu(d)", "Abs(d)", "Max(d, k)", "Min(k, d)",
    "Clip(d, low, high)", "Clip(d, low)", "HardSwish(d)", "HardSigmoid<alpha=0.1>(d)",
    "ThresholdedRelu<alpha=0.3>(d)",
]  # fmt: skip


@pytest.mark.parametrize("moved", ["", "MaxPool<kernel_shape=[2,2], strides=[2,2]>"])
@pytest.mark.parametrize("form", BEHIND_CODES)
def test_openvino_gates_what_comes_from_codes(form: str, moved: str, tmp_path: Path) -> None:
    """It moves a scale past a Mul and a Clip, and clips the codes then (2026.4); quantizers elsewhere write so."""
    body = (
        f"c = Conv<pads=[1,1,1,1]>(x, w, b) q = QuantizeLinear(c, s, z) e = DequantizeLinear(q, s, z) "
        f"d = {moved or 'Identity'}(e) r = {form} p = GlobalAveragePool(r) y = Conv(p, h)"
    )
    model = net(body, opset=18)
    constants = {"s": 0.02, "k": 0.35, "low": -0.19, "high": 0.41}
    values = {**{k: np.float32(v) for k, v in constants.items()}, "z": np.uint8(128)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
    path, output = tmp_path / "net.onnx", tmp_path / "ours.onnx"
    path.write_bytes(model.SerializeToString())
    main([str(path), "-o", str(output)])
    feeds = {"image": FRAMES, "target": np.arange(6) % CLASSES}
    expected = reference_run(onnx.load(output))[0](feeds)["saliency"]
    session = open_session(output.read_bytes(), engine="openvino")
    found = session.run(feeds, ("saliency",))["saliency"]
    differing = np.abs(found - expected) > 1e-3 * expected.max()
    assert expected.any()
    assert differing.mean() < 0.02  # where a code is rounded otherwise


@pytest.mark.parametrize("target", ["openvino", "ort"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_an_image_of_floats_is_kept_and_pixels_still_go_in(layout: str, target: str, tmp_path: Path) -> None:
    image, body = f"float[1,{CHANNELS},{SIDE},{SIDE}] x", BODY
    if layout == "NHWC":
        image, body = f"float[1,{SIDE},{SIDE},{CHANNELS}] image", f"x = Transpose<perm=[0,3,1,2]>(image) {BODY}"
    path = tmp_path / "net.onnx"
    path.write_bytes(net(body, image).SerializeToString())
    kept = exported(path, "--keep-input", "--mean", "0.4", "--std", "0.3", target=target)
    floats = (FRAMES / np.float32(255) - np.float32(0.4)) / np.float32(0.3)
    floats = floats if layout == "NHWC" else floats.transpose(0, 3, 1, 2)
    expected = run(path, np.ascontiguousarray(floats))
    np.testing.assert_allclose(kept.logits(FRAMES), expected, atol=1e-5)
    ours = onnxruntime.InferenceSession((tmp_path / "ours.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    assert ours.get_inputs()[0].shape == ["N", *floats.shape[1:]]
    feeds = {"image": np.ascontiguousarray(floats), "target": np.full(6, 1)}
    logits, gradient = ours.run(["logits", "gradient"], feeds)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert gradient.shape == (6, CHANNELS, SIDE, SIDE)
    pixels = exported(path, "--mean", "0.4", "--std", "0.3", target=target)
    np.testing.assert_allclose(kept.explain(FRAMES[0]).map, pixels.explain(FRAMES[0]).map, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [("NCHW", "openvino"), ("NHWC", "ort"), ("PyTorch", "ort")])
def test_a_quantized_network_keeps_its_image_of_floats_too(source: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    image, body = f"float[1,{CHANNELS},{SIDE},{SIDE}] x", BODY
    if source == "NHWC":
        image, body = f"float[1,{SIDE},{SIDE},{CHANNELS}] image", f"x = Transpose<perm=[0,3,1,2]>(image) {BODY}"
    path.write_bytes(net(body, image).SerializeToString())
    name = "tests.own_nets:colored" if source == "PyTorch" else str(path)
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(2).integers(0, 256, (20, SIDE, SIDE, CHANNELS), dtype=np.uint8)
    for i, photo in enumerate(pixels):
        Image.fromarray(photo).save(photos / f"{i}.png")
    options = ["--int8", "--target", target, "--size", str(SIDE), "--mean", "0.4", "--std", "0.3"]
    made = []
    for kept in (["--keep-input"], []):
        output = tmp_path / f"{len(made)}.onnx"
        main([name, *options, "--data", f"folder:{photos}", "-o", str(output), *kept])
        made.append(Classifier(output, engine=target))
    floating, whole = made
    layout = "NHWC" if source == "NHWC" else "NCHW"
    assert (floating.manifest.float_layout, floating.manifest.precision) == (layout, "int8")
    np.testing.assert_allclose(floating.logits(FRAMES), whole.logits(FRAMES), atol=1e-5)
    expected = whole.explain(FRAMES).map
    np.testing.assert_allclose(floating.explain(FRAMES).map, expected, atol=1e-5 * expected.max())
    # A program that normalizes itself runs the file alone.
    floats = (FRAMES / np.float32(255) - np.float32(0.4)) / np.float32(0.3)
    floats = floats if layout == "NHWC" else floats.transpose(0, 3, 1, 2)
    ours = onnxruntime.InferenceSession((tmp_path / "0.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    assert ours.get_inputs()[0].shape == ["N", *floats.shape[1:]]
    (logits,) = ours.run(["logits"], {"image": np.ascontiguousarray(floats), "target": np.full(6, -1)})
    np.testing.assert_allclose(logits, floating.logits(FRAMES), atol=0.05 * np.abs(logits).max())


def test_an_image_of_floats_is_not_kept_for_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(
        net(image=f"float[1,1,{SIDE},{SIDE}] g", body=f"x = Concat<axis=1>(g, g, g) {BODY}").SerializeToString()
    )
    with pytest.raises(OptionError, match="--keep-input: a plan of tensorrt takes pixels; drop it, or export for"):
        main([str(path), "--keep-input", "--int8", "--data", "digits", "--target", "tensorrt"])
