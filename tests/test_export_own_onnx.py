"""Anyone's ONNX classifier becomes a file of ours: same logits, with pixels in front, a map and a manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.latency import main as bench_latency
from export.onnx import main
from export.reference import reference_run
from runtime.classifier import Classifier
from runtime.errors import ClearpactError, FileError, ModelError, OptionError
from tests.image_folders import write_digits

CLASSES = 3


def classifier_file(
    path: Path,
    *,
    layout: str = "NCHW",
    channels: int = 3,
    batch: int | str = "N",
    ends: tuple[str, ...] = ("Softmax",),
    opset: int = 13,
    ir_version: int = 8,
    image: str = "input",
    name: str = "net",
) -> onnx.ModelProto:
    """Write a small classifier in one of the forms that public files have, and return it."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(4, channels, 3, 3), scale=0.4),
        "b": random.normal(size=4),
        "m": random.normal(size=(4 * 6 * 8, CLASSES), scale=0.2),
    }
    constants = [numpy_helper.from_array(value.astype(np.float32), key) for key, value in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1 if batch == 1 else -1, 4 * 6 * 8]), "rows"))
    nodes, source = [], image
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [image], ["first"], perm=[0, 3, 1, 2]))
        source = "first"
    nodes += [
        helper.make_node("Conv", [source, "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["saliency"]),  # a name that the gradient wants
        helper.make_node("Reshape", ["saliency", "rows"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["out0"]),
    ]
    for i, kind in enumerate(ends):
        nodes.append(helper.make_node(kind, [f"out{i}"], [f"out{i + 1}"]))
    size = [6, 8]
    shape = [batch, channels, *size] if layout == "NCHW" else [batch, *size, channels]
    inputs = [helper.make_tensor_value_info(image, TensorProto.FLOAT, shape)]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in constants]
    output = helper.make_tensor_value_info(f"out{len(ends)}", TensorProto.FLOAT, [batch, CLASSES])
    graph = helper.make_graph(nodes, name or "x", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    model.graph.name = name
    path.write_bytes(model.SerializeToString())
    return model


FORMS: dict[str, dict[str, object]] = {
    "softmax": {},
    "logits": {"ends": ()},
    "grey, old, one image": {"channels": 1, "batch": 1, "opset": 8, "ir_version": 3, "ends": ()},
    "rows, columns, channels": {"layout": "NHWC"},
    "our own names": {"image": "image", "ends": ()},
    "without a name": {"name": ""},
}


@pytest.mark.parametrize("target", ["openvino", "ort"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_anyones_gives_its_logits_and_its_map(
    form: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = FORMS[form]
    path, output = tmp_path / "net.onnx", tmp_path / "ours.onnx"
    original = classifier_file(path, **options)  # type: ignore[arg-type]
    before = path.read_bytes()
    main([str(path), "--target", target, "--mean", "0.4", "--std", "0.3", "-o", str(output)])
    printed = capsys.readouterr().out
    assert "all classes equal" in printed
    assert path.read_bytes() == before
    channels = int(options.get("channels", 3))  # type: ignore[call-overload]
    frames = np.random.default_rng(1).integers(0, 256, (5, 6, 8, channels), dtype=np.uint8)
    classifier = Classifier(output, engine=target)
    found = classifier.logits(frames)
    floats = (frames / np.float32(255) - np.float32(0.4)) / np.float32(0.3)
    floats = floats if options.get("layout") == "NHWC" else floats.transpose(0, 3, 1, 2)
    original.graph.name = "x"
    run, _ = reference_run(original)
    image, out = str(options.get("image", "input")), original.graph.output[0].name
    expected = np.concatenate([run({image: np.ascontiguousarray(floats[i : i + 1])})[out] for i in range(5)])
    if out == "out1":
        found = np.exp(found) / np.exp(found).sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # The map is the gradient by the normalized image: finite differences, a pixel at a time.
    explanation = classifier.explain(frames[0] if channels == 3 else frames[0, :, :, 0], target=2)
    kind = [node.op_type for node in original.graph.node]
    assert ("Softmax" in kind) == (out == "out1")
    logit_run, _ = reference_run(_without_softmax(original))
    start = floats[:1].astype(np.float32)
    step = 1e-2
    largest = np.zeros((6, 8), np.float32)
    for index in np.ndindex(*start.shape[1:]):
        ends = []
        for sign in (1, -1):
            moved = start.copy()
            moved[(0, *index)] += sign * step
            ends.append(logit_run({image: moved})["out0"][0, 2])
        row, column = index[:2] if options.get("layout") == "NHWC" else index[1:]
        largest[row, column] = max(largest[row, column], abs(ends[0] - ends[1]) / (2 * step))
    near = np.isclose(explanation.map, largest, rtol=0.02, atol=1e-3)
    assert near.mean() > 0.9  # but where a ReLU's border lies within the step


def _without_softmax(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [node for node in copy.graph.node if node.op_type != "Softmax"]
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    copy.graph.output[0].name = "out0"
    return copy


def test_every_command_takes_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier_file(tmp_path / "net.onnx", channels=1)
    folder = write_digits(tmp_path / "digits", {"zero": 12, "one": 12, "two": 12})
    main([str(tmp_path / "net.onnx"), "--data", f"folder:{folder}"])
    printed = capsys.readouterr().out
    assert "real images" in printed
    assert "accuracy on" in printed
    output = tmp_path / "net_clearpact.onnx"
    manifest = Classifier(output).session.manifest
    assert manifest.classes == ("one", "two", "zero")
    assert (manifest.arch, manifest.precision, len(manifest.checkpoint)) == ("net", "fp32", 64)
    bench_latency([str(output), "--seconds", "0.1"])
    assert "p50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "arguments", "error", "text"),
    [
        ({}, ["--int8"], OptionError, "needs real images, to choose grids by"),
        ({}, ["--size", "9x9"], OptionError, "--size 9x9, expected 6x8"),
        ({}, ["--target", "tensorrt"], OptionError, "expected one of openvino, ort"),
        ({}, ["--bits", "4"], OptionError, "needs real images, to choose grids by"),
        ({}, ["--bits", "8"], OptionError, "needs real images, to choose grids by"),
        ({}, ["--search", "mse"], OptionError, "--search: is not for an ONNX file without --int8"),
        ({"batch": 4}, [], ModelError, "takes 4 images at a time, expected one or any number"),
        ({"channels": 2}, [], ModelError, "has 2 channels, expected 1 .grey. or 3 .RGB."),
        ({"ends": ("Hardmax",)}, [], ModelError, "Hardmax node"),
    ],
)
def test_what_cannot_be_taken_is_told_and_nothing_is_written(
    options: dict[str, object], arguments: list[str], error: type[ClearpactError], text: str, tmp_path: Path
) -> None:
    path, output = tmp_path / "net.onnx", tmp_path / "ours.onnx"
    classifier_file(path, **options)  # type: ignore[arg-type]
    with pytest.raises(error, match=text) as caught:
        main([str(path), *arguments, "-o", str(output)])
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_a_file_of_half_precision_keeps_it(tmp_path: Path) -> None:
    kind = TensorProto.FLOAT16
    path, output = tmp_path / "net.onnx", tmp_path / "ours.onnx"
    model = classifier_file(path, image="normalized", ends=())
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    path.write_bytes(model.SerializeToString())
    main([str(path), "--target", "ort", "-o", str(output)])
    frame = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    run, _ = reference_run(model)
    pixels = (frame / np.float32(255)).transpose(2, 0, 1)[None].astype(dtype)
    classifier = Classifier(output, engine="ort")
    np.testing.assert_allclose(classifier.logits(frame[None]), run({"normalized": pixels})["out0"], atol=5e-3)
    assert classifier.explain(frame).map.max() > 0


def test_an_open_size_is_asked_for_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = classifier_file(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].Clear()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(OptionError, match="leaves its image's size open, give it with --size"):
        main([str(path)])
    with pytest.raises(ModelError, match=r"does not run on an image of 9x9 .*; check --size"):
        main([str(path), "--size", "9x9"])
    main([str(path), "--size", "6x8", "-o", str(tmp_path / "ours.onnx")])
    assert Classifier(tmp_path / "ours.onnx").session.manifest.input.size == (6, 8)


def test_a_broken_file_and_the_file_itself_as_output_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    classifier_file(path)
    with pytest.raises(FileError, match="is an input"):
        main([str(path), "-o", str(path)])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises((FileError, ModelError), match=r"net\.onnx"):
        main([str(path)])
